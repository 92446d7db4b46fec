// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDrainUnderLoad: SIGTERM while clients come and go and others stream. Whoever was connected gets all of its data,
// whoever comes later is refused, the exit code is 0, and every connection has its line.
func TestDrainUnderLoad(t *testing.T) {
	e := runEdge(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} -> %[1]s mode=tcp\n:{2} edge.test -> %[1]s mode=pass", echoServer(t)),
		"DRAIN_TIMEOUT=1m", "LOOPS=2")
	load := &load{edge: e, hello: clientHello(t, nil), term: make(chan struct{})}
	var clients sync.WaitGroup
	for i := range 9 {
		clients.Go(func() { load.comeAndGo(t, i%3) })
		if i < 6 {
			clients.Go(func() { load.stream(t, i%3) })
		}
	}
	for began := time.Now(); time.Since(began) < 700*time.Millisecond || load.exchanges.Load() < 30; {
		time.Sleep(10 * time.Millisecond)
	}
	e.signal(t, syscall.SIGTERM)
	close(load.term)
	clients.Wait()
	if code := e.exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	lines := map[string]int{}
	n := 0
	for _, l := range e.log.all() {
		if l.Msg == "connection" {
			lines[l.Outcome]++
			n++
			if l.Outcome != "ok" {
				t.Errorf("line: %s", l)
			}
		}
	}
	if connected := int(load.connected.Load()); n != connected {
		t.Errorf("%d clients were connected, and %d lines are in the log", connected, n)
	}
	t.Logf("%d connections, %d exchanges, %d clients refused after SIGTERM", n, load.exchanges.Load(), load.refused.Load())
}

// load is what clients do to a gateway that's going to be stopped.
type load struct {
	*edge
	hello                         []byte
	term                          chan struct{} // closed when SIGTERM was sent
	connected, exchanges, refused atomic.Int64
}

// connect makes a connection on the i-th port. It is nil once the gateway refuses new ones.
func (l *load) connect(t *testing.T, i int) (net.Conn, *net.TCPConn) {
	c, err := net.DialTimeout("tcp", l.addr(i), patience)
	if err != nil {
		select {
		case <-l.term:
		default:
			t.Errorf("before SIGTERM: %v", err)
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v, want that it's refused", err)
		}
		l.refused.Add(1)
		return nil, nil
	}
	l.connected.Add(1)
	_ = c.SetDeadline(time.Now().Add(patience))
	switch i {
	case 0:
		return tls.Client(c, clientConfig(t, nil)), c.(*net.TCPConn)
	case 2: // passed on unread: what looks like a hello is data for the backend
		if err := trade(c, l.hello); err != nil {
			t.Errorf("hello: %v", err)
		}
	}
	return c, c.(*net.TCPConn)
}

// comeAndGo makes short connections until the gateway refuses them.
func (l *load) comeAndGo(t *testing.T, i int) {
	data := random(uint64(i), 20_000)
	for {
		c, tcp := l.connect(t, i)
		if c == nil {
			return
		}
		for range 3 {
			if err := trade(c, data); err != nil {
				t.Errorf("port %d, connected: %v", i, err)
			}
			l.exchanges.Add(1)
		}
		l.bye(t, c, tcp)
	}
}

// stream keeps a connection busy until well after SIGTERM.
func (l *load) stream(t *testing.T, i int) {
	c, tcp := l.connect(t, i)
	if c == nil {
		return
	}
	data := random(uint64(i), 300_000)
	for after := 0; after < 40; {
		if err := trade(c, data); err != nil {
			t.Errorf("port %d, streaming: %v", i, err)
			return
		}
		l.exchanges.Add(1)
		select {
		case <-l.term:
			after++
		default:
		}
	}
	l.bye(t, c, tcp)
}

// bye ends a connection in order, and waits for the other side's end.
func (l *load) bye(t *testing.T, c net.Conn, tcp *net.TCPConn) {
	e := &end{c, tcp}
	e.finish()
	if b, how := e.rest(); how != fin || len(b) > 0 {
		t.Errorf("the stream ended with %s, and %d bytes more", how, len(b))
	}
	_ = tcp.Close()
}

// TestDrainEndsSomeTime: what is still open is cut, with outcome drained, at the deadline, with a second SIGTERM, or at
// once with SIGQUIT, wherever it is in its story.
func TestDrainEndsSomeTime(t *testing.T) {
	beside(t)
	const deadline = 2 * time.Second
	for name, c := range map[string]struct {
		signals  []syscall.Signal
		timeout  string
		min, max time.Duration
	}{
		"deadline":         {[]syscall.Signal{syscall.SIGTERM}, deadline.String(), deadline, deadline + 5*time.Second},
		"second SIGTERM":   {[]syscall.Signal{syscall.SIGTERM, syscall.SIGTERM}, "10m", 0, 5 * time.Second},
		"SIGQUIT":          {[]syscall.Signal{syscall.SIGQUIT}, "10m", 0, 5 * time.Second},
		"SIGTERM, SIGQUIT": {[]syscall.Signal{syscall.SIGTERM, syscall.SIGQUIT}, "10m", 0, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			e := runEdge(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} -> %[1]s mode=tcp", echoServer(t)),
				"DRAIN_TIMEOUT="+c.timeout, "HELLO_TIMEOUT=1m")
			conns := e.openInEveryStage(t)
			began := time.Now()
			e.signal(t, c.signals[0])
			if len(c.signals) > 1 {
				e.log.take(t, func(l logLine) bool { return l.Msg == "draining" })
				exchange(t, conns["tcp"], []byte("still there"))
				exchange(t, conns["terminate"], []byte("still there"))
				e.signal(t, c.signals[1])
			}
			if code := e.exit(t); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(began); took < c.min || took > c.max {
				t.Errorf("it took %v, want from %v to %v", took, c.min, c.max)
			}
			for stage, conn := range conns {
				if l := e.lineOf(t, conn); l.Outcome != "drained" {
					t.Errorf("%s: %s", stage, l)
				}
			}
		})
	}
}

// openInEveryStage opens a connection for each stage in which it may be for long.
func (e *edge) openInEveryStage(t *testing.T) map[string]net.Conn {
	t.Helper()
	hello := clientHello(t, nil)
	conns := map[string]net.Conn{"silence": e.dial(t, 0), "half a hello": e.dial(t, 0), "handshake": e.dial(t, 0), "tcp": e.dial(t, 1)}
	for stage, bytes := range map[string][]byte{"half a hello": hello[:100], "handshake": hello} {
		if _, err := conns[stage].Write(bytes); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadFull(conns["handshake"], make([]byte, 600)); err != nil {
		t.Fatal(err)
	}
	exchange(t, conns["tcp"], []byte("x"))
	idle := e.dialTLS(t, 0, nil)
	exchange(t, idle, []byte("x"))
	conns["terminate"] = idle
	return conns
}
