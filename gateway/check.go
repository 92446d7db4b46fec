// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/pool"
	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/natmap"
)

// checkKey tells checks apart: a server is asked in the same way once, however many rules want it.
type checkKey struct {
	server *server
	how    natmap.Check
}

// check is what is asked of a server, and what it answered. Of several rules the one that asks most often says how often,
// and the first one the rest.
type check struct {
	checkKey
	every      time.Duration
	rise, fall int
	out        *outbound
	proxy      natmap.ProxyVersion
	tls        bool              // the backend is a tls:// one
	speaks     starttls.Protocol // that it is asked for TLS in; off: TLS from the first byte on
	name       string            // that it is asked for, or its address
	encryption *encryption       // of a tls:// backend: how connections speak to it

	task   *pool.Task
	begun  bool // it has answered once, or failed to
	up     bool
	streak int // checks in a row that say otherwise than up
	err    error
	took   time.Duration
	at     time.Time
}

const (
	// Checks of one gateway: as many servers, each asked every 5 s, are 2000 connects a second.
	maxChecks = 10_000
	// A check is given up on after every=, but not later than this: it holds a slot of those that are done at once.
	maxCheckTime = 10 * time.Second
	// The first checks come within so long after the start, spread over it.
	firstChecks = time.Second
)

// prober asks whether a server is fit, over a connection to it that has been made.
type prober func(ctx context.Context, conn net.Conn, c *check) error

// probers are the ways to check, by the word of check=. TCP needs none.
var probers = map[string]prober{"tls": probeTLS, "http": probeHTTP, "starttls": probeStartTLS}

// check has those servers checked for which the generation's rules want it, and no others. The keeper's lock is held.
func (k *keeper) check(gen *generation) {
	wanted := map[checkKey]*check{}
	for _, rule := range gen.config.Map.Rules {
		if o := &rule.Options.Pool; (o.Check != natmap.Check{}) {
			r := gen.routes[rule]
			r.eachServer(func(b *backend, s *server) { k.want(wanted, r, b, s) })
		}
	}
	for key, c := range k.checks {
		if wanted[key] == nil {
			c.task.Stop()
			delete(k.checks, key)
			s := key.server
			s.checks = slices.DeleteFunc(s.checks, func(x *check) bool { return x == c })
			k.judge(s)
		}
	}
	for key, w := range wanted {
		k.keepChecking(key, w)
	}
}

func (k *keeper) want(wanted map[checkKey]*check, r *route, b *backend, s *server) {
	o := &r.rule.Options.Pool
	key := checkKey{s, o.Check}
	c := wanted[key]
	switch {
	case c == nil && len(wanted) >= maxChecks:
		if !k.crowded {
			k.crowded = true
			k.gw.log.Warn(fmt.Sprintf("the map asks for more than %d checks; the rest is not done", maxChecks))
		}
		return
	case c == nil:
		c = r.newCheck(key, b)
		wanted[key] = c
	}
	if every := or(o.Every, natmap.DefaultEvery); c.every == 0 || every < c.every {
		c.every, c.rise, c.fall = every, or(o.Rise, natmap.DefaultRise), or(o.Fall, natmap.DefaultFall)
	}
}

func (r *route) newCheck(key checkKey, b *backend) *check {
	c := &check{checkKey: key, up: true, out: r.outbound, proxy: r.proxy, tls: b.spec.TLS, name: r.checkName(b), encryption: r.encryption}
	if b.asks {
		c.speaks = b.speaks
	}
	return c
}

// trial is how to find out whether an ejected server is back: it can be connected to, and if connections of the rule shake hands
// with it, it answers. What it answers does not matter here: no server is ejected for that.
func (r *route) trial(b *backend, s *server) func(context.Context) error {
	if b == nil || b.spec == nil || !b.spec.TLS {
		return func(ctx context.Context) error { return s.touch(ctx, r.outbound, probeTime, nil) }
	}
	c := r.newCheck(checkKey{s, natmap.Check{Kind: "tls"}}, b)
	return func(ctx context.Context) error {
		err := c.ask(ctx, probeTime)
		if _, failed := errors.AsType[unix.Errno](err); failed || ownLack(err) || errors.Is(err, errNoAnswer) || errors.Is(err, errBusy) || errors.Is(err, io.EOF) {
			return err
		}
		return nil
	}
}

// checkName is what a connection would ask the backend for, as far as that can be known without a client.
func (r *route) checkName(b *backend) string {
	asked := r.rule.Name
	if strings.HasPrefix(asked, "*") {
		asked = ""
	}
	switch {
	case b.spec.TLS:
		return r.encryption.nameFor(b.spec, asked)
	case r.rule.Options.Mode == natmap.Pass && asked != "":
		return asked
	}
	return strings.TrimSuffix(b.spec.Host, ".")
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// keepChecking goes on with a check as it is wanted now, or begins it.
func (k *keeper) keepChecking(key checkKey, w *check) {
	if c := k.checks[key]; c != nil {
		sooner := w.every < c.every
		c.every, c.rise, c.fall, c.out, c.proxy = w.every, w.rise, w.fall, w.out, w.proxy
		c.tls, c.speaks, c.name, c.encryption = w.tls, w.speaks, w.name, w.encryption
		if !sooner {
			return
		}
		c.task.Stop()
		c.task = k.tasks.StartFor(pool.CheckTask, c.server.machine(), pool.Jittered(c.every), func(e *pool.Task) time.Duration { return k.runCheck(e, c) })
		return
	}
	k.checks[key] = w
	key.server.checks = append(key.server.checks, w)
	soon := time.Duration(rand.Int64N(int64(min(w.every, firstChecks))))
	w.task = k.tasks.StartFor(pool.CheckTask, w.server.machine(), soon, func(e *pool.Task) time.Duration { return k.runCheck(e, w) })
}

// runCheck asks, and says when to ask again.
func (k *keeper) runCheck(e *pool.Task, c *check) time.Duration {
	k.mu.Lock()
	asked := *c
	k.mu.Unlock()
	if c.server.state.Load()&isMaintained != 0 {
		return pool.Jittered(asked.every)
	}
	began := time.Now()
	err := asked.ask(e.Context(), min(asked.every, maxCheckTime))
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case e.Stopped():
		return pool.Never
	case ownLack(err): // it was not made: what is known stays
		k.gw.short(lackInCheck, err, c.server.name)
		return pool.Jittered(min(c.every, lackPause))
	}
	c.err, c.took, c.at = err, time.Since(began), began
	if c.answered(err) {
		k.judge(c.server)
	}
	return pool.Jittered(c.every)
}

// answered counts an answer, and says whether it changes what the check thinks of the server. The first one decides
// alone: nothing is known before, and three rounds are long for who has just started.
func (c *check) answered(err error) bool {
	good, first := err == nil, !c.begun
	c.begun = true
	if good == c.up {
		c.streak = 0
		return false
	}
	needed := c.rise
	if c.up {
		needed = c.fall
	}
	if c.streak++; c.streak < needed && !first {
		return false
	}
	c.up, c.streak = good, 0
	return true
}

// judge sets a server's state to what its checks say, all of them. The keeper's lock is held.
func (k *keeper) judge(s *server) {
	why, bits := s.failing(""), isDown
	if why == "" {
		bits, why = 0, "its checks succeed"
	}
	k.change(s, isDown, bits, why)
}

// ask makes a connection as the rule does, and has the prober look at it.
func (c *check) ask(ctx context.Context, patience time.Duration) error {
	var words []byte
	if c.proxy != natmap.ProxyOff {
		words = localHeader(c.proxy)
	}
	probe := probers[c.how.Kind]
	if probe == nil {
		return c.touch(ctx, patience, words)
	}
	ctx, cancel := patiently(ctx, patience)
	defer cancel()
	conn, err := dialServer(ctx, c.server, c.out)
	if err != nil {
		return plainNetError(endOf(ctx, err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(longAgo) }) // its time is over, or the gateway's
	defer stop()
	if len(words) > 0 {
		if _, err := conn.Write(words); err != nil {
			return plainNetError(endOf(ctx, err))
		}
	}
	return plainNetError(endOf(ctx, probe(ctx, conn, c)))
}

// touch is a check that only connects.
func (c *check) touch(ctx context.Context, patience time.Duration, words []byte) error {
	err := c.server.touch(ctx, c.out, patience, words)
	if !errors.Is(err, unix.EAGAIN) {
		return err
	}
	ctx, cancel := patiently(ctx, patience)
	defer cancel()
	_, err = whileBusy(ctx, func() (any, error) { return nil, c.server.touch(ctx, c.out, patience, words) })
	return err
}

// localHeader is the PROXY header of a connection that is no client's (PROXY protocol, sections 2.1 and 2.2: UNKNOWN, and
// LOCAL).
func localHeader(v natmap.ProxyVersion) []byte {
	if v == natmap.ProxyV1 {
		return []byte("PROXY UNKNOWN\r\n")
	}
	return append(slices.Clone(proxyproto.SIGV2), byte(proxyproto.LOCAL), byte(proxyproto.UNSPEC), 0, 0)
}

func probeTLS(ctx context.Context, conn net.Conn, c *check) error {
	_, err := c.encrypted(ctx, conn, c.speaks)
	return err
}

// probeStartTLS is for servers that the map has no TLS for: clients ask them for it behind mode=pass or mode=tcp.
func probeStartTLS(ctx context.Context, conn net.Conn, c *check) error {
	_, err := c.encrypted(ctx, conn, starttls.Protocol(c.how.StartTLS))
	return err
}

// encrypted shakes hands, where a protocol says so after asking for it.
func (c *check) encrypted(ctx context.Context, conn net.Conn, p starttls.Protocol) (*tls.Conn, error) {
	if p != starttls.Off {
		if err := starttls.Upgrade(conn, p, machineName()); err != nil {
			return nil, err
		}
	}
	encrypted := tls.Client(conn, c.tlsConfig())
	return encrypted, encrypted.HandshakeContext(ctx)
}

// tlsConfig takes any certificate: whether it is accepted is for the connections to say, that carry something. A backend
// whose certificate is wrong is not down, and to call it that would hide what is wrong.
func (c *check) tlsConfig() *tls.Config {
	config := &tls.Config{ServerName: c.name} // which is not sent if it is an address
	if c.tls {
		config = c.encryption.offer(c.name)
	}
	config.InsecureSkipVerify = true
	return config
}

// maxStatusLine bounds what is read of an answer. Status lines have a few dozen bytes.
const maxStatusLine = 1024

// probeHTTP asks for the path, and takes every status from 200 to 399.
func probeHTTP(ctx context.Context, conn net.Conn, c *check) error {
	if c.tls {
		encrypted, err := c.encrypted(ctx, conn, c.speaks)
		if err != nil {
			return err
		}
		conn = encrypted
	}
	host := or(c.name, "localhost")
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: tlsnat\r\nConnection: close\r\n\r\n", c.how.Path, host); err != nil {
		return err
	}
	line, err := bufio.NewReaderSize(io.LimitReader(conn, maxStatusLine), maxStatusLine).ReadString('\n')
	var minor, status int
	if _, scanErr := fmt.Sscanf(line, "HTTP/1.%1d %3d", &minor, &status); scanErr != nil {
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return errors.New("the answer is not HTTP/1")
	}
	if status < 200 || status > 399 {
		return fmt.Errorf("it answered %d", status)
	}
	return nil
}

// dialServer connects to a server beside the loops, from where the rule says.
func dialServer(ctx context.Context, s *server, out *outbound) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1}
	if s.unix != "" {
		return whileBusy(ctx, func() (net.Conn, error) { return d.DialContext(ctx, "unix", s.unix) })
	}
	out.prepare(&d)
	return d.DialContext(ctx, "tcp", s.addr.String())
}

// touch finds out whether a server can be connected to, from where the rule says; it hears the words, if there are any,
// and the end. A server of this machine has answered when connect(2) is asked again; others are waited for. A net.Dialer
// with what it takes to stop it costs twice as much.
//
//	socket, connect -> EINPROGRESS, connect -> 0 or why not, close
//	socket, connect -> EINPROGRESS, connect -> EALREADY, epoll_ctl, park, connect, close
func (s *server) touch(ctx context.Context, out *outbound, patience time.Duration, words []byte) error {
	sa, family := s.sockaddr()
	if family == unix.AF_UNIX {
		out = nil
	}
	fd, err := out.connect(family, 0, sa, func(fd int) error { return out.begin(fd, family, netip.Addr{}, false) })
	if fd < 0 {
		return err
	}
	if errors.Is(err, unix.EINPROGRESS) {
		err = unix.Connect(int(fd), sa)
	}
	if errors.Is(err, unix.EALREADY) {
		f := os.NewFile(uintptr(fd), s.name)
		defer f.Close()
		err = await(ctx, f, sa, patience)
	} else {
		defer unix.Close(int(fd))
	}
	switch {
	case err != nil:
		return plainNetError(err)
	case localAddr(fd) == s.addr && s.unix == "": // nobody listens, and the kernel has chosen this very port for us
		return unix.ECONNREFUSED
	case len(words) > 0:
		if n, e := sysWrite(fd, words); e != 0 {
			return e
		} else if n < len(words) { // a fresh socket has room for a header
			return unix.EMSGSIZE
		}
	}
	return nil
}

// await waits for a connect to succeed or to fail.
func await(ctx context.Context, f *os.File, sa unix.Sockaddr, patience time.Duration) error {
	if f.SetDeadline(time.Time{}) != nil { // the kernel has no room to watch it
		return unix.ENOSPC
	}
	ctx, cancel := patiently(ctx, patience)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = f.SetDeadline(longAgo) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var answer error
	err = raw.Write(func(fd uintptr) bool {
		answer = unix.Connect(int(fd), sa)
		return !errors.Is(answer, unix.EALREADY)
	})
	return endOf(ctx, cmp.Or(err, answer))
}

// sockaddr is where the server listens, and the family of that.
func (s *server) sockaddr() (unix.Sockaddr, int) {
	if s.unix != "" {
		return &unix.SockaddrUnix{Name: s.unix}, unix.AF_UNIX
	}
	return sockaddrOf(s.addr)
}

var errNoAnswer = errors.New("no answer in time")

// plainNetError is an error without the addresses, which whoever reads it knows.
func plainNetError(err error) error {
	var op *net.OpError
	switch {
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return errNoAnswer
	case errors.As(err, &op):
		if call, ok := errors.AsType[*os.SyscallError](op.Err); ok {
			return call.Err
		}
		return op.Err
	}
	return err
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}
