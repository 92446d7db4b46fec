// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Attacks on what all share: memory, places of handshakes with servers, name servers, the loops, and the gateway's end.
var sharedAttacks = []attack{
	{"memory-filled-by-one-source", "one client with many streams that it does not read takes all of TLSNAT_MEMORY", memoryFilledByOne},
	{"hung-tls-backend", "a tls:// backend that never answers holds up the clients of all others", hungTLSBackend},
	{"reset-storm", "clients that reset at once leave sockets, memory or a spinning loop behind", resetStorm},
	{"small-records-both-ways", "small records in both directions at once lose bytes, or a loop spins", smallRecordsBothWays},
	{"names-that-are-not-answered", "a name server that hangs holds up every name, and names that it answers", namesNotAnswered},
	{"names-that-lead-home", "DNS sends clients to the machine's own loopback", namesThatLeadHome},
	{"ports-used-up-under-checks", "a check that finds no free port takes the backend down, and on-down=cut cuts everybody", portsUsedUp},
	{"backend-down-with-many-connections", "cutting many connections at once stops the loop, or loses lines", cutMany},
	{"drain-with-many-connections", "the end of a drain loses connections' lines", drainMany},
	{"state-directory-of-somebody-else", "keys and the token are written where others lead them", foreignState},
	{"pause-beside-checks", "a process that stood still takes healthy backends for down", pauseBesideChecks},
}

func memoryFilledByOne(s *stage) error {
	flood, err := s.flood()
	if err != nil {
		return err
	}
	e, err := s.start(":{0} -> "+flood+" mode=tcp\n:{1} a.example -> {echo}", "MEMORY=16MB", "MAX_CONNS=2000")
	if err != nil {
		return err
	}
	for range s.scaled(1200, 1900) { // as large as a flow of a source with memory may read, this would be 19 MB
		c, err := e.dialSlow("127.0.7.7", 0)
		if err != nil {
			break // refusing this source is right
		}
		defer c.Close()
	}
	if err := until(e.quiet); err != nil { // a thousand streams take some seconds until they stand still
		return err
	}
	for i := range 20 {
		if _, err := e.honest(fmt.Sprintf("127.0.8.%d", i+1), 1, "a.example"); err != nil {
			return fmt.Errorf("honest client %d of 20: %w", i+1, err)
		}
	}
	return nil
}

func hungTLSBackend(s *stage) error {
	hung, err := s.serve(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	if err != nil {
		return err
	}
	good, err := s.tlsEcho()
	if err != nil {
		return err
	}
	e, err := s.start(":{0} -> tls://"+hung+" mode=tcp connect=3s backend-verify=off\n:{1} -> tls://"+good+" mode=tcp backend-verify=off", "HANDSHAKES=16")
	if err != nil {
		return err
	}
	for range 100 {
		c, err := e.dial(0)
		if err != nil {
			return err
		}
		defer c.Close()
	}
	for range 20 {
		began := time.Now()
		c, err := e.dial(1)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := echoes(c, []byte("over the other backend")); err != nil {
			return err
		}
		if took := time.Since(began); took > time.Second { // 3 ms on a quiet machine
			return fmt.Errorf("a client of another backend waited for %v", took)
		}
	}
	return nil
}

// tlsEcho is an echo inside TLS.
func (s *stage) tlsEcho() (string, error) {
	own, err := tls.LoadX509KeyPair(s.path("certs/a.pem"), s.path("certs/a.pem"))
	if err != nil {
		return "", err
	}
	return s.serve(func(raw net.Conn) {
		c := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{own}, DynamicRecordSizingDisabled: true})
		_, _ = io.Copy(c, c)
	})
}

func resetStorm(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo}\n:{1} -> {echo} mode=tcp")
	if err != nil {
		return err
	}
	first, err := hello("a.example")
	if err != nil {
		return err
	}
	words := [][]byte{nil, first[:20], first, append(append([]byte(nil), first...), 23, 3, 3, 0, 1, 0)}
	n := s.scaled(2000, 20000)
	for i := range n {
		c, err := e.dial(i % 2)
		if err != nil {
			return err
		}
		_, _ = c.Write(words[i/2%len(words)])
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	if _, err := e.honest("", 0, "a.example"); err != nil {
		return err
	}
	if err := e.allOver(); err != nil {
		return err
	}
	return e.quiet()
}

// allOver waits until no connection is open any more, and each has its outcome.
func (e *edge) allOver() error {
	return until(func() error {
		open, accepted, ended, err := e.counts()
		if err == nil && (open != 0 || accepted != ended) {
			err = fmt.Errorf("%v connections were accepted, %v have an outcome, %v are open", accepted, ended, open)
		}
		return err
	})
}

// counts are connections, of the metrics.
func (e *edge) counts() (open, accepted, ended float64, err error) {
	_, text, err := e.get("/metrics", within)
	if err != nil {
		return 0, 0, 0, err
	}
	for l := range strings.Lines(text) {
		var v float64
		name, value, _ := strings.Cut(strings.TrimSpace(l), " ")
		if _, err := fmt.Sscan(value, &v); err != nil {
			continue
		}
		switch {
		case name == "tlsnat_connections_open":
			open = v
		case name == "tlsnat_connections_accepted_total":
			accepted = v
		case strings.HasPrefix(name, "tlsnat_connections_total{"):
			ended += v
		}
	}
	return open, accepted, ended, nil
}

func smallRecordsBothWays(s *stage) error {
	back, err := s.tlsEcho() // answers in the records that it gets
	if err != nil {
		return err
	}
	e, err := s.start(":{0} a.example -> tls://" + back + " backend-verify=off")
	if err != nil {
		return err
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, size := range []int{1, 17, 80, 237, 1024} {
			if err := e.sendsRecords(version, size, s.scaled(3000, 20000)); err != nil {
				return fmt.Errorf("%s, records of %d bytes: %w", tls.VersionName(version), size, err)
			}
		}
	}
	return e.quiet()
}

// nameServer answers queries for A as answer says: an address; "" is that there is no such name; "-" is silence.
func (s *stage) nameServer(answer func(name string) string) (string, error) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s.atEnd(c.Close)
	go func() {
		for b := make([]byte, 4096); ; {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if reply := answerQuery(b[:n], answer); reply != nil {
				_, _ = c.WriteTo(reply, from)
			}
		}
	}()
	return c.LocalAddr().String(), nil
}

// answerQuery is the answer to a query; nil: none.
func answerQuery(query []byte, answer func(name string) string) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	addr := answer(strings.TrimSuffix(q.Name.String(), "."))
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	switch ip := net.ParseIP(addr).To4(); {
	case addr == "-":
		return nil
	case addr == "":
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		h := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}
		m.Answers = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AResource{A: [4]byte(ip)}}}
	}
	reply, err := m.Pack()
	if err != nil {
		return nil
	}
	return reply
}

func namesNotAnswered(s *stage) error {
	names, err := s.nameServer(func(name string) string {
		switch {
		case strings.HasPrefix(name, "good."):
			return "127.0.0.1"
		case strings.HasPrefix(name, "gone."):
			return ""
		}
		return "-"
	})
	if err != nil {
		return err
	}
	back, err := s.echo()
	if err != nil {
		return err
	}
	_, p, _ := net.SplitHostPort(back)
	var hung strings.Builder
	for i := range s.scaled(200, 2000) {
		fmt.Fprintf(&hung, ":{0} n%d.a.example -> hung%d.test:%s mode=pass\n", i, i, p)
	}
	began := time.Now()
	e, err := s.start(hung.String()+":{0} gone.a.example -> gone.test:"+p+" mode=pass\n:{1} -> good.test:"+p+" mode=tcp resolve-to=any", "RESOLVER="+names)
	if err != nil {
		return err
	}
	if took := time.Since(began); took > 15*time.Second { // it waits 5 s for names
		return fmt.Errorf("the start took %v", took)
	}
	c, err := e.dial(1)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail(e.said()))
	}
	defer c.Close()
	if err := echoes(c, []byte("a name that is answered")); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(e.said()))
	}
	return e.ready()
}

func namesThatLeadHome(s *stage) error {
	addresses := []string{"127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255"}
	names, err := s.nameServer(func(name string) string {
		var i int
		_, _ = fmt.Sscanf(name, "n%d.a.example", &i)
		return addresses[min(i, len(addresses)-1)]
	})
	if err != nil {
		return err
	}
	heard := make(chan struct{}, 16)
	back, err := s.serve(func(net.Conn) { heard <- struct{}{} })
	if err != nil {
		return err
	}
	_, p, _ := net.SplitHostPort(back)
	var text strings.Builder
	for i := range addresses {
		fmt.Fprintf(&text, ":{%d} -> n%d.a.example:%s mode=tcp\n", i, i, p)
	}
	e, err := s.start(text.String(), "RESOLVER="+names)
	if err != nil {
		return err
	}
	for i, a := range addresses {
		c, err := e.dial(i)
		if isReset(err) {
			continue // turned away before the dial returned
		}
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, c)
		c.Close()
		if o, err := e.outcome(c.LocalAddr()); err != nil || o != "no_backend" {
			return errors.Join(fmt.Errorf("a name that leads to %s: outcome %q, not no_backend", a, o), err)
		}
	}
	select {
	case <-heard:
		return errors.New("the machine's own port was connected to")
	default:
		return nil
	}
}

func portsUsedUp(s *stage) error {
	first, err := portsInARow(4)
	if err != nil {
		return err
	}
	e, err := s.start(fmt.Sprintf(":{0} -> {echo} mode=tcp check=tcp every=1s on-down=cut source=127.0.0.77:%d-%d", first, first+3))
	if err != nil {
		return err
	}
	var open []net.Conn
	for range 4 {
		c, err := e.dial(0)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := echoes(c, []byte("before")); err != nil {
			continue // a check has the port just now
		}
		open = append(open, c)
	}
	time.Sleep(3500 * time.Millisecond) // three checks find no port
	for _, c := range open {
		if err := echoes(c, []byte("after")); err != nil {
			return fmt.Errorf("a healthy connection: %w", err)
		}
	}
	if strings.Contains(e.said(), `"state":"down"`) || strings.Contains(e.said(), `"state":"ejected"`) {
		return errors.New("the backend is said to be down: " + tail(e.said()))
	}
	return nil
}

// portsInARow is the first of n ports of 127.0.0.77 that nobody uses.
func portsInARow(n int) (int, error) {
	for range 100 {
		first, err := port()
		if err != nil {
			return 0, err
		}
		free := 0
		for i := range n {
			if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.77:%d", first+i)); err == nil {
				l.Close()
				free++
			}
		}
		if free == n {
			return first, nil
		}
	}
	return 0, fmt.Errorf("there are no %d free ports in a row", n)
}

// hold opens n connections that have moved something.
func (e *edge) hold(n int) (open []net.Conn, err error) {
	for range n {
		c, err := e.dial(0)
		if err != nil {
			return open, err
		}
		open = append(open, c)
		if err := echoes(c, []byte("here")); err != nil {
			return open, err
		}
	}
	return open, nil
}

func closeAll(open []net.Conn) {
	for _, c := range open {
		c.Close()
	}
}

func cutMany(s *stage) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	var served []net.Conn
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			mu.Lock()
			served = append(served, c)
			mu.Unlock()
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		closeAll(served)
	})
	e, err := s.start(":{0} -> " + l.Addr().String() + " mode=tcp check=tcp every=1s fall=1 on-down=cut\n:{1} a.example -> {echo}")
	if err != nil {
		return err
	}
	open, err := e.hold(s.scaled(1500, 8000))
	defer closeAll(open)
	if err != nil {
		return err
	}
	l.Close() // from here on checks fail
	var slowest time.Duration
	err = until(func() error {
		took, err := e.honest("", 1, "a.example")
		if err != nil {
			return err
		}
		slowest = max(slowest, took)
		left, _, _, err := e.counts()
		if err == nil && left > 1 {
			err = fmt.Errorf("%v connections to a backend that is down are left", left)
		}
		return err
	})
	if err == nil && slowest > time.Second { // 20 ms on a quiet machine
		err = fmt.Errorf("a neighbour waited for %v", slowest)
	}
	return errors.Join(err, e.allOver())
}

func drainMany(s *stage) error {
	e, err := s.start(":{0} -> {echo} mode=tcp", "DRAIN_TIMEOUT=500ms")
	if err != nil {
		return err
	}
	n := s.scaled(1500, 8000)
	open, err := e.hold(n)
	defer closeAll(open)
	if err != nil {
		return err
	}
	if err := e.cmd.Process.Signal(sigterm); err != nil {
		return err
	}
	select {
	case <-e.ended:
	case <-time.After(patience):
		return errors.New("SIGTERM does not end it")
	}
	if code := e.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("exit code %d", code)
	}
	lines := 0
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range e.lines {
		if l.str("msg") == "connection" && l.str("outcome") == "drained" {
			lines++
		}
	}
	if lines != n {
		return fmt.Errorf("%d connections were open, and %d have a line", n, lines)
	}
	return nil
}

func foreignState(s *stage) error {
	elsewhere := s.path("elsewhere")
	if err := os.Mkdir(elsewhere, 0o700); err != nil {
		return err
	}
	for name, lay := range map[string]func(path string) error{
		"somebody else's link": func(path string) error {
			return errors.Join(os.Symlink(elsewhere, path), os.Lchown(path, 65534, 65534))
		},
		"a directory for everybody":    func(path string) error { return errors.Join(os.Mkdir(path, 0o777), os.Chmod(path, 0o777)) },
		"somebody else's directory":    func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chown(path, 65534, 65534)) },
		"a file":                       func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"a link that leads to nowhere": func(path string) error { return os.Symlink(s.path("nowhere"), path) },
	} {
		path := s.path("state")
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		if err := lay(path); err != nil {
			if strings.HasPrefix(name, "somebody else") && errors.Is(err, os.ErrPermission) {
				continue // only root can lay it
			}
			return err
		}
		if err := s.wouldTakeState(name); err != nil {
			return err
		}
	}
	left, err := os.ReadDir(elsewhere)
	if _, statErr := os.Stat(s.path("nowhere")); err != nil || len(left) > 0 || statErr == nil {
		return fmt.Errorf("something was written where the link leads: %v, %v", left, err)
	}
	return nil
}

// wouldTakeState runs the gateway with the state directory as it is. It may refuse to start, or run without: it may not write there.
func (s *stage) wouldTakeState(name string) error {
	e, err := s.prepare(":{0} -> demo cert=a.example")
	if err != nil {
		return err
	}
	if err := e.launch(); err != nil {
		return err
	}
	select {
	case <-e.ended:
	case <-time.After(700 * time.Millisecond):
	}
	if err := e.stop(); err != nil {
		return err
	}
	if left, err := os.ReadDir(s.path("state")); err == nil && len(left) > 0 {
		return fmt.Errorf("%s is taken for the state directory, and now has %v", name, left)
	}
	return nil
}

func pauseBesideChecks(s *stage) error {
	e, err := s.start(":{0} -> {echo} mode=tcp check=tcp every=1s fall=1 on-down=cut")
	if err != nil {
		return err
	}
	open, err := e.hold(5)
	defer closeAll(open)
	if err != nil {
		return err
	}
	keep := &http.Client{Timeout: patience}
	ask := func() error {
		r, err := keep.Get("http://" + e.admin + "/readyz")
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, r.Body)
		return r.Body.Close()
	}
	if err := ask(); err != nil {
		return err
	}
	if err := e.standStill(time.Duration(s.scaled(3, 6)) * time.Second); err != nil {
		return err
	}
	for range 20 { // the checks that were due come now
		for _, c := range open {
			if err := echoes(c, []byte("after")); err != nil {
				return fmt.Errorf("a healthy connection: %w", err)
			}
		}
		if err := ask(); err != nil {
			return fmt.Errorf("the admin, over a connection from before: %w", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if strings.Contains(e.said(), `"state":"down"`) {
		return errors.New("the backend is said to be down: " + tail(e.said()))
	}
	return nil
}
