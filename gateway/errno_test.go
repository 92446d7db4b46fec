// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// Errors that Linux documents for the calls on a connection (recv(2), send(2), readv(2), writev(2), splice(2), tcp(7),
// unix(7)), and what ICMP makes of a connection's: those that say that the peer is gone, and all others.
var (
	goneErrnos = []unix.Errno{unix.ECONNRESET, unix.EPIPE, unix.ETIMEDOUT, unix.ECONNABORTED, unix.ECONNREFUSED, unix.EHOSTUNREACH,
		unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN, unix.ENETRESET, unix.ENONET, unix.EPROTO, unix.ENOPROTOOPT, unix.EACCES}
	otherErrnos = []unix.Errno{unix.EBADF, unix.EFAULT, unix.EINVAL, unix.EINTR, unix.ENOMEM, unix.ENOBUFS, unix.ENOTCONN, unix.ENOTSOCK,
		unix.EIO, unix.EISDIR, unix.EALREADY, unix.EDESTADDRREQ, unix.EISCONN, unix.EMSGSIZE, unix.EOPNOTSUPP, unix.EDQUOT, unix.EFBIG,
		unix.ENOSPC, unix.EPERM, unix.ESPIPE, unix.EBADMSG, unix.ENOSYS, unix.Errno(133), unix.Errno(4000)}
	connectErrnos = []unix.Errno{unix.EACCES, unix.EPERM, unix.EADDRINUSE, unix.EADDRNOTAVAIL, unix.EAFNOSUPPORT, unix.EAGAIN, unix.EALREADY,
		unix.EBADF, unix.ECONNREFUSED, unix.EFAULT, unix.EINTR, unix.EISCONN, unix.ENETUNREACH, unix.ENOTSOCK, unix.EPROTOTYPE, unix.ETIMEDOUT,
		unix.EHOSTUNREACH, unix.ECONNRESET, unix.ENOBUFS, unix.ENOMEM, unix.EINVAL, unix.ENOSYS}
	acceptErrnos = []unix.Errno{unix.EAGAIN, unix.EBADF, unix.ECONNABORTED, unix.EFAULT, unix.EINTR, unix.EINVAL, unix.EMFILE, unix.ENFILE, unix.ENOBUFS,
		unix.ENOMEM, unix.ENOTSOCK, unix.EOPNOTSUPP, unix.EPERM, unix.EPROTO, unix.ENETDOWN, unix.ENOPROTOOPT, unix.EHOSTDOWN, unix.ENONET,
		unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENOSR, unix.ESOCKTNOSUPPORT, unix.EPROTONOSUPPORT, unix.ETIMEDOUT}
)

// failing is which calls fail, and what was called.
type failing struct {
	side  string // whose socket: "client", "backend", "listener"
	calls string // "recvfrom|readv"
	errno unix.Errno
	times int32        // how often; 0: always
	skip  atomic.Int32 // calls that are let through before
	hits  atomic.Int32 // calls that have failed
	all   atomic.Int32 // calls and turns of loops since
}

// saboteur makes system calls of a gateway fail.
type saboteur struct {
	now     atomic.Pointer[failing]
	clients atomic.Pointer[[]int] // the gateway's ports
	reads   atomic.Int32          // of clients' sockets
}

func (s *saboteur) fail(call string, fd int) unix.Errno {
	f := s.now.Load()
	side := ""
	if f != nil || call == "recvfrom" {
		side = s.side(fd)
	}
	if call == "recvfrom" && side == "client" {
		defer s.reads.Add(1)
	}
	if f == nil {
		return 0
	}
	f.all.Add(1)
	if call == "connect" {
		side = "backend"
	}
	if side != f.side || !slices.Contains(strings.Split(f.calls, "|"), call) || f.skip.Add(-1) >= 0 {
		return 0
	}
	if n := f.hits.Add(1); f.times > 0 && n > f.times {
		return 0
	}
	return f.errno
}

// side is whose socket a descriptor is: the gateway's ports tell.
func (s *saboteur) side(fd int) string {
	ports := s.clients.Load()
	local, err := unix.Getsockname(fd)
	if err != nil || ports == nil {
		return "" // a pipe, or the poller
	}
	if _, err := unix.Getpeername(fd); err != nil {
		return "listener"
	}
	port := 0
	switch a := local.(type) {
	case *unix.SockaddrInet4:
		port = a.Port
	case *unix.SockaddrInet6:
		port = a.Port
	}
	if slices.Contains(*ports, port) {
		return "client"
	}
	return "backend"
}

// stageSet is a gateway with a way to every stage, and backends in the hands of the test.
type stageSet struct {
	*post
	*saboteur
	backend net.Conn // its end of the last connection
}

const (
	toPlain = iota
	toTLS
	toUnix
	toTCP
	toPrelude
	toRedirect
	toAsked
	toProxied
	toProxiedTLS
	toDemo
)

func newStageSet(t *testing.T) *stageSet {
	x := &stageSet{saboteur: &saboteur{}, post: &post{ports: map[string]int{"plain": toPlain, "tls": toTLS, "unix": toUnix, "tcp": toTCP},
		arrivals: map[string]chan net.Conn{}}}
	t.Cleanup(gateway.Inject(x.fail))
	socket := filepath.Join(testkit.Dir(t), "backend.sock")
	at := map[string]string{}
	var listeners []net.Listener
	var accepting sync.WaitGroup
	for kind, where := range map[string][2]string{"plain": {"tcp", "127.0.0.1:0"}, "tls": {"tcp", "127.0.0.1:0"}, "unix": {"unix", socket}} {
		l, err := net.Listen(where[0], where[1])
		if err != nil {
			t.Fatal(err)
		}
		arrivals := make(chan net.Conn, 16)
		at[kind], x.arrivals[kind] = l.Addr().String(), arrivals
		listeners = append(listeners, l)
		accepting.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				arrivals <- c
			}
		})
	}
	x.arrivals["tcp"] = x.arrivals["plain"]
	const how = " retries=0 eject=off max-conns=8 conns-per-ip=8"
	x.bed = start(t, fmt.Sprintf(":{0} edge.test -> %[1]s%[4]s\n:{1} edge.test -> tls://%[2]s backend-ca=root backend-name=edge.test%[4]s\n"+
		":{2} edge.test -> unix:%[3]s%[4]s\n:{3} -> %[1]s mode=tcp%[4]s\n:{4} edge.test -> %[1]s starttls=smtp%[4]s\n:{5} -> redirect\n"+
		":{6} edge.test -> tls+smtp://%[1]s backend-ca=root%[4]s\n:{7} edge.test -> %[1]s proxy=v2%[4]s\n"+
		":{8} edge.test -> tls://%[2]s backend-ca=root proxy=v2%[4]s\n:{9} edge.test -> demo conns-per-ip=8", at["plain"], at["tls"], socket, how),
		"LOOPS=1", "CONNECT_TIMEOUT=1m", "HELLO_TIMEOUT=1m", "BACKEND_CAS="+filepath.Dir(pki(t).rootFile(t)))
	x.bed.faults = true
	t.Cleanup(func() {
		x.stop(t)
		for _, l := range listeners {
			_ = l.Close()
		}
		accepting.Wait()
		x.drain()
	})
	x.clients.Store(&x.bed.ports)
	return x
}

// mishap is a stage of a connection at which calls on one of its sockets fail.
type mishap struct {
	name, side, calls string
	skip              int32
	act               func(t *testing.T, x *stageSet, arm func()) net.Conn // brings a connection there, arms, and has it go on
	gone, fault       string                                               // the outcomes
	carries           bool                                                 // for want of memory there's another way
	unheard           bool                                                 // nothing that the peers do ends a wait that the test has made up
}

// relayed opens a connection in the relay that has carried a byte each way.
func relayed(t *testing.T, x *stageSet, kind string) (client, backend *correspondent) {
	d := delivery{backend: kind, suite: tls.TLS_AES_128_GCM_SHA256, inner: tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	if kind == "tcp" {
		client = newCorrespondent(x.dial(t, toTCP), nil)
		backend = newCorrespondent(x.arrived(t, kind), nil)
	} else {
		client, backend = x.meet(t, d)
	}
	t.Cleanup(func() { _, _ = client.raw.Close(), backend.raw.Close() })
	x.backend = backend.raw
	for _, p := range [][2]*correspondent{{client, backend}, {backend, client}} {
		if _, err := p[0].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(p[1], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	return client, backend
}

// says has one end of a relayed connection send some bytes.
func says(kind, who string, size int) func(*testing.T, *stageSet, func()) net.Conn {
	return func(t *testing.T, x *stageSet, arm func()) net.Conn {
		client, backend := relayed(t, x, kind)
		from, to := client, backend
		if who == "backend" {
			from, to = backend, client
		}
		if size > 64<<10 { // it streams: what is read fills a call
			streams(t, client, backend)
		}
		arm()
		cuts := slices.Repeat([]int{2000}, size/2000)
		go func() { _ = from.send(make([]byte, size), append(cuts, size%2000), true) }()
		go func() { _, _ = io.Copy(io.Discard, to.raw) }()
		return client.raw
	}
}

// streams has a lot go each way.
func streams(t *testing.T, client, backend *correspondent) {
	for _, p := range [][2]*correspondent{{client, backend}, {backend, client}} {
		go func() { _, _ = p[0].Write(make([]byte, 1<<20)) }()
		if _, err := io.ReadFull(p[1], make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
}

// begun is a client that has sent the beginning of something, which the gateway has read, and goes on.
func begun(port int, greeted bool, first, then string) func(*testing.T, *stageSet, func()) net.Conn {
	return func(t *testing.T, x *stageSet, arm func()) net.Conn {
		c := x.dial(t, port)
		if greeted {
			if _, err := c.Read(make([]byte, 512)); err != nil {
				t.Fatal(err)
			}
		}
		if first != "" {
			before := x.reads.Load()
			_, _ = io.WriteString(c, first)
			until(t, "it is read", func() bool { return x.reads.Load() > before })
			x.settle(t)
		}
		arm()
		_, _ = io.WriteString(c, then)
		return c
	}
}

// shakes is a client that shakes hands on a port, asking for a name.
func shakes(port int, name string) func(*testing.T, *stageSet, func()) net.Conn {
	return func(t *testing.T, x *stageSet, arm func()) net.Conn {
		arm()
		c := x.dial(t, port)
		go func() {
			s := tls.Client(c, clientConfig(t, func(c *tls.Config) { c.ServerName = name }))
			if name != "edge.test" {
				c := s.NetConn().(*net.TCPConn)
				_, _ = c.Write(clientHello(t, func(c *tls.Config) { c.ServerName = name }))
				return
			}
			hangsUpAfter(s)
		}()
		return c
	}
}

// shakesWithBackend is a client whose backend shakes hands as well.
func shakesWithBackend(t *testing.T, x *stageSet, arm func()) net.Conn {
	c := shakes(toTLS, "edge.test")(t, x, arm)
	s := tls.Server(x.arrived(t, "tls"), serverConfig(t, tls.VersionTLS13))
	go func() { _ = s.Handshake() }()
	return c
}

// hangsUpAfter is a client that leaves when it is told the end.
func hangsUpAfter(s *tls.Conn) {
	if s.Handshake() == nil {
		_, _ = io.Copy(io.Discard, s)
	}
	_ = s.NetConn().Close()
}

var mishaps = []mishap{
	{name: "hello", side: "client", calls: "recvfrom", act: begun(toPlain, false, "\x16\x03\x01", "\x02\x00"), gone: "client_reset", fault: "internal"},
	{name: "first byte", side: "client", calls: "recvfrom", act: begun(toPlain, false, "", "\x16"), gone: "ok", fault: "internal"},
	{name: "prelude read", side: "client", calls: "recvfrom", act: begun(toPrelude, true, "EHL", "O x\r\n"), gone: "client_reset", fault: "internal"},
	{name: "prelude answer", side: "client", calls: "sendto", act: begun(toPrelude, true, "", "EHLO x\r\n"), gone: "client_reset", fault: "internal"},
	{name: "request", side: "client", calls: "recvfrom", act: begun(toRedirect, false, "GET", " / HTTP/1.1\r\n"), gone: "client_reset", fault: "internal"},
	{name: "redirect", side: "client", calls: "sendto", act: begun(toRedirect, false, "", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"), gone: "client_reset", fault: "internal"},
	{name: "refusal", side: "client", calls: "sendto", act: shakes(toPlain, "other.example"), gone: "unknown_name", fault: "unknown_name"},
	{name: "last words", side: "client", calls: "recvfrom", act: refusedAndTalking, gone: "unknown_name", fault: "unknown_name"},
	{name: "handshake read", side: "client", calls: "recvfrom", skip: 1, act: shakes(toPlain, "edge.test"), gone: "client_reset", fault: "internal"},
	{name: "handshake write", side: "client", calls: "sendto", act: shakes(toPlain, "edge.test"), gone: "client_reset", fault: "internal"},
	{name: "backend's handshake read", side: "backend", calls: "recvfrom", act: shakesWithBackend, gone: "connect_failed", fault: "internal"},
	{name: "backend's handshake write", side: "backend", calls: "sendto", act: shakes(toTLS, "edge.test"), gone: "connect_failed", fault: "internal"},
	{name: "backend's greeting", side: "backend", calls: "recvfrom", act: asked, gone: "connect_failed", fault: "connect_failed"},
	{name: "question to a backend", side: "backend", calls: "sendto", act: asked, gone: "connect_failed", fault: "connect_failed"},

	{name: "TLS to plain, read", side: "client", calls: "recvfrom", act: says("plain", "client", 100), gone: "client_reset", fault: "internal"},
	{name: "TLS to plain, write", side: "backend", calls: "sendto", act: says("plain", "client", 100), gone: "backend_reset", fault: "internal"},
	{name: "TLS to plain, writev", side: "backend", calls: "writev", act: says("plain", "client", 6000), gone: "backend_reset", fault: "internal"},
	{name: "plain to TLS, read", side: "backend", calls: "recvfrom|readv", act: says("plain", "backend", 100), gone: "backend_reset", fault: "internal"},
	{name: "plain to TLS, write", side: "client", calls: "sendto", act: says("plain", "backend", 100), gone: "client_reset", fault: "internal"},
	{name: "TLS to TLS, read", side: "client", calls: "recvfrom", act: says("tls", "client", 100), gone: "client_reset", fault: "internal"},
	{name: "TLS to TLS, write", side: "backend", calls: "sendto", act: says("tls", "client", 6000), gone: "backend_reset", fault: "internal"},
	{name: "TLS from TLS, read", side: "backend", calls: "recvfrom", act: says("tls", "backend", 100), gone: "backend_reset", fault: "internal"},
	{name: "TLS from TLS, write", side: "client", calls: "sendto", act: says("tls", "backend", 100), gone: "client_reset", fault: "internal"},
	{name: "TLS to a Unix socket, write", side: "backend", calls: "sendto|writev", act: says("unix", "client", 6000), gone: "backend_reset", fault: "internal"},
	{name: "from a Unix socket, read", side: "backend", calls: "recvfrom|readv", act: says("unix", "backend", 100), gone: "backend_reset", fault: "internal"},
	{name: "copy, read", side: "client", calls: "recvfrom", act: says("tcp", "client", 100), gone: "client_reset", fault: "internal"},
	{name: "copy, write", side: "backend", calls: "sendto", act: says("tcp", "client", 100), gone: "backend_reset", fault: "internal"},
	{name: "copy down, read", side: "backend", calls: "recvfrom", act: says("tcp", "backend", 100), gone: "backend_reset", fault: "internal"},
	{name: "copy down, write", side: "client", calls: "sendto", act: says("tcp", "backend", 100), gone: "client_reset", fault: "internal"},
	{name: "splice, read", side: "client", calls: "splice", act: says("tcp", "client", 1<<20), gone: "client_reset", fault: "internal", carries: true},
	{name: "splice, write", side: "backend", calls: "splice", act: says("tcp", "client", 1<<20), gone: "backend_reset", fault: "internal"},
	{name: "splice down, read", side: "backend", calls: "splice", act: says("tcp", "backend", 1<<20), gone: "backend_reset", fault: "internal", carries: true},
	{name: "splice down, write", side: "client", calls: "splice", act: says("tcp", "backend", 1<<20), gone: "client_reset", fault: "internal"},
	{name: "half-closed, read", side: "backend", calls: "recvfrom|readv", act: halfClosed, gone: "backend_reset", fault: "internal"},
	{name: "PROXY header, write", side: "backend", calls: "sendto|writev", act: shakes(toProxied, "edge.test"), gone: "backend_reset", fault: "internal", unheard: true},
	{name: "PROXY header before TLS, write", side: "backend", calls: "sendto", act: shakes(toProxiedTLS, "edge.test"), gone: "connect_failed", fault: "internal"},
	{name: "demo's answer, write", side: "client", calls: "sendto|writev", act: asksDemo, gone: "client_reset", fault: "internal"},
	{name: "end of the client's stream, read", side: "client", calls: "recvfrom", act: ends("client"), gone: "client_reset", fault: "internal"},
	{name: "end of the backend's stream, read", side: "backend", calls: "recvfrom|readv", act: ends("backend"), gone: "backend_reset", fault: "internal"},
	{name: "half-closed by the backend, read", side: "client", calls: "recvfrom", act: halfClosedByBackend, gone: "client_reset", fault: "internal"},
	{name: "half-closed by the backend, write", side: "backend", calls: "sendto", act: halfClosedByBackend, gone: "backend_reset", fault: "internal", unheard: true},
	{name: "half-closed, write", side: "client", calls: "sendto", act: halfClosed, gone: "client_reset", fault: "internal"},
}

// halfClosed is a client that has ended its stream, and then hears of the backend.
func halfClosed(t *testing.T, x *stageSet, arm func()) net.Conn {
	client, backend := relayed(t, x, "plain")
	if err := client.finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := backend.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	x.settle(t)
	arm()
	_, _ = backend.Write([]byte("the answer"))
	return client.raw
}

// halfClosedByBackend is a backend that has ended its stream, and then hears of the client.
func halfClosedByBackend(t *testing.T, x *stageSet, arm func()) net.Conn {
	client, backend := relayed(t, x, "plain")
	if err := backend.finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	x.settle(t)
	arm()
	_, _ = client.Write([]byte("one thing more"))
	return client.raw
}

// ends has one side end its stream.
func ends(who string) func(*testing.T, *stageSet, func()) net.Conn {
	return func(t *testing.T, x *stageSet, arm func()) net.Conn {
		client, backend := relayed(t, x, "plain")
		arm()
		if who == "client" {
			_ = client.finish()
		} else {
			_ = backend.finish()
		}
		return client.raw
	}
}

// asksDemo is a client of the built-in backend.
func asksDemo(t *testing.T, x *stageSet, arm func()) net.Conn {
	c := x.dial(t, toDemo)
	s := tls.Client(c, clientConfig(t, nil))
	if err := s.Handshake(); err != nil {
		t.Fatal(err)
	}
	x.settle(t)
	arm()
	_, _ = io.WriteString(s, "GET / HTTP/1.1\r\nHost: edge.test\r\n\r\n")
	go func() { _, _ = io.Copy(io.Discard, s) }()
	return c
}

// refusedAndTalking is a client that was refused, and talks on.
func refusedAndTalking(t *testing.T, x *stageSet, arm func()) net.Conn {
	c := x.dial(t, toPlain)
	_, _ = c.Write(clientHello(t, func(c *tls.Config) { c.ServerName = "other.example" }))
	if _, err := c.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	x.settle(t)
	arm()
	_, _ = io.WriteString(c, "but")
	return c
}

// asked is a client of a backend that is asked for TLS.
func asked(t *testing.T, x *stageSet, arm func()) net.Conn {
	c := x.dial(t, toAsked)
	s := tls.Client(c, clientConfig(t, nil))
	go hangsUpAfter(s)
	b := x.arrived(t, "plain")
	x.settle(t)
	arm()
	x.backend = b
	_, _ = io.WriteString(b, "220 mx.test\r\n")
	return c
}

// TestNoErrorMeansAgain: whatever a system call fails with, at every stage and on either side, the connection ends with
// the outcome that this has, one line, within a few turns, and nothing of it is left. Only EAGAIN waits, and does
// nothing meanwhile.
func TestNoErrorMeansAgain(t *testing.T) {
	for _, m := range mishaps {
		t.Run(m.name, func(t *testing.T) {
			x := newStageSet(t) // a gateway has a bounded number of lines for clients of one kind
			gone, others := goneErrnos, otherErrnos
			if !testkit.On(testkit.Slow) { // one of each kind
				gone, others = goneErrnos[:1], []unix.Errno{unix.EINVAL, unix.ENOBUFS, unix.EINTR, 4000}
			}
			for _, e := range gone {
				x.happens(t, m, e, m.gone)
			}
			for _, e := range others {
				want := m.fault
				if m.carries && (e == unix.ENOMEM || e == unix.ENOBUFS) {
					want = "carried"
				}
				x.happens(t, m, e, want)
			}
			if !m.unheard {
				x.waits(t, m)
			}
			x.leavesNothing(t)
		})
	}
}

// TestNoErrorOfConnectMeansAgain: whatever a connect fails with, the client hears that there is no backend.
func TestNoErrorOfConnectMeansAgain(t *testing.T) {
	x := newStageSet(t)
	for _, port := range []int{toPlain, toUnix} {
		m := mishap{side: "backend", calls: "connect", act: shakes(port, "edge.test")}
		for _, e := range connectErrnos {
			if e != unix.EAGAIN || port != toUnix { // which is busy: it is tried again until CONNECT_TIMEOUT is over
				x.happens(t, m, e, "connect_failed")
			}
		}
	}
	x.leavesNothing(t)
}

func (x *stageSet) leavesNothing(t *testing.T) {
	t.Helper()
	x.stop(t)
	if left := gateway.Leftovers(x.gateway); left != "" {
		t.Error(left)
	}
}

// mostCalls is what ending a connection may take of system calls and turns. One that is asked for again at once makes
// more of them in a millisecond.
const mostCalls = 150

// happens has one error happen.
func (x *stageSet) happens(t *testing.T, m mishap, e unix.Errno, outcome string) {
	t.Helper()
	f := &failing{side: m.side, calls: m.calls, errno: e}
	f.skip.Store(m.skip)
	defer x.now.Store(nil)
	c := m.act(t, x, func() { x.now.Store(f) })
	defer c.Close()
	if outcome == "carried" {
		until(t, "it went another way", func() bool { return f.hits.Load() > 0 })
		want := func(o gateway.OpenConn) bool { return max(o.Up, o.Down) > 2<<20 } // what has streamed before, and since
		until(t, "everything went another way", func() bool { return slices.ContainsFunc(x.conns(t, 1), want) })
		x.now.Store(nil)
		_, _ = c.Close(), x.backend.Close()
		x.lineOf(t, c)
		x.drain()
		return
	}
	l := x.lineOf(t, c)
	all := f.all.Load()
	x.now.Store(nil)
	if l.Outcome != outcome || f.hits.Load() == 0 {
		t.Errorf("%s (%d) of %s, which failed %d times: the outcome is not %s: %s", e, int(e), m.calls, f.hits.Load(), outcome, l)
	}
	if most := int32(mostCalls); all > most {
		t.Errorf("%s of %s: %d calls and turns", e, m.calls, all)
	}
	x.drain()
}

// waits has a call say EAGAIN for some time: nothing is done until there is news.
func (x *stageSet) waits(t *testing.T, m mishap) {
	t.Helper()
	f := &failing{side: m.side, calls: m.calls, errno: unix.EAGAIN}
	f.skip.Store(m.skip)
	defer x.now.Store(nil)
	c := m.act(t, x, func() { x.now.Store(f) })
	until(t, "it is asked", func() bool { return f.hits.Load() > 0 })
	time.Sleep(20 * time.Millisecond)
	if all := f.all.Load(); all > mostCalls {
		t.Errorf("EAGAIN of %s: %d calls and turns", m.calls, all)
	}
	x.now.Store(nil)
	reset(c.(*net.TCPConn))
	if x.backend != nil { // there was room all the time: nothing else would tell
		_ = x.backend.Close()
		x.backend = nil
	}
	x.lineOf(t, c)
	x.drain()
}

// drain closes what has reached the backends and was not looked at.
func (x *stageSet) drain() {
	for _, arrivals := range x.arrivals {
		for {
			select {
			case c := <-arrivals:
				_ = c.Close()
				continue
			default:
			}
			break
		}
	}
}

// TestNoErrorOfAcceptMeansAgain: accepting rests when it fails, goes on when it does not, and nobody is lost.
func TestNoErrorOfAcceptMeansAgain(t *testing.T) {
	x := newStageSet(t)
	for _, e := range acceptErrnos {
		f := &failing{side: "listener", calls: "accept4", errno: e}
		x.now.Store(f)
		c := x.dial(t, toRedirect)
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		until(t, "it is asked", func() bool { return f.hits.Load() > 0 })
		time.Sleep(20 * time.Millisecond)
		// EAGAIN is not said while somebody waits: the poller would tell again and again.
		if all := f.all.Load(); all > 3*mostCalls && e != unix.EAGAIN {
			t.Errorf("%s: %d calls and turns", e, all)
		}
		x.now.Store(nil)
		if answer, err := io.ReadAll(c); !bytes.HasPrefix(answer, []byte("HTTP/1.1 308")) {
			t.Errorf("%s: then %q, %v", e, answer, err)
		}
		_ = c.Close()
	}
}

// TestInterruptedCallsAreRepeated a few times.
func TestInterruptedCallsAreRepeated(t *testing.T) {
	x := newStageSet(t)
	client, backend := relayed(t, x, "plain")
	for _, calls := range []string{"recvfrom|readv", "sendto"} {
		for _, side := range []string{"client", "backend"} {
			x.now.Store(&failing{side: side, calls: calls, errno: unix.EINTR, times: 3})
			for _, p := range [][2]*correspondent{{client, backend}, {backend, client}} {
				if _, err := p[0].Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(p[1], make([]byte, 1)); err != nil {
					t.Fatalf("%s of the %s: %v", calls, side, err)
				}
			}
			if n := x.now.Load().hits.Load(); n < 3 {
				t.Errorf("%s of the %s was interrupted %d times", calls, side, n)
			}
		}
	}
	x.now.Store(nil)
	_, _ = client.finish(), backend.finish()
	if l := x.lineOf(t, client.raw); l.Outcome != "ok" {
		t.Errorf("line: %s", l)
	}
}
