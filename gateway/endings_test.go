// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
)

// way is a way through the gateway: how bytes are carried, and so who carries their end.
type way struct {
	name string
	port int    // of the crossing
	tls  uint16 // the version that the client speaks with the gateway; 0: none

	backend uint16 // the version that the gateway speaks with the backend; 0: none
}

// ways are all pairs of halves, joined in both directions.
var ways = []way{
	{"terminate TLS 1.2", 0, tls.VersionTLS12, 0}, {"terminate TLS 1.3", 0, tls.VersionTLS13, 0}, {"pass", 1, 0, 0}, {"tcp", 2, 0, 0},
	{"tcp to TLS 1.2", 3, 0, tls.VersionTLS12}, {"tcp to TLS 1.3", 4, 0, tls.VersionTLS13},
	{"TLS 1.2 to TLS 1.2", 5, tls.VersionTLS12, tls.VersionTLS12}, {"TLS 1.2 to TLS 1.3", 6, tls.VersionTLS12, tls.VersionTLS13},
	{"TLS 1.3 to TLS 1.2", 5, tls.VersionTLS13, tls.VersionTLS12}, {"TLS 1.3 to TLS 1.3", 6, tls.VersionTLS13, tls.VersionTLS13},
}

// crossing is a gateway with every way through it. Both ends of its connections are in the test's hands.
type crossing struct {
	*bed
	backends map[uint16]chan *net.TCPConn // by the version that is spoken with them
	hello    []byte                       // what opens a connection that is passed on unread
}

func newCrossing(t testing.TB, settings ...string) *crossing {
	x := &crossing{backends: map[uint16]chan *net.TCPConn{}, hello: clientHello(t, nil)}
	plain, tls12, tls13 := x.listen(t, 0), x.listen(t, tls.VersionTLS12), x.listen(t, tls.VersionTLS13)
	const how = "backend-ca=root backend-name=edge.test"
	x.bed = start(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} edge.test -> %[1]s mode=pass\n:{2} -> %[1]s mode=tcp\n"+
		":{3} -> tls://%[2]s mode=tcp %[4]s\n:{4} -> tls://%[3]s mode=tcp %[4]s\n"+
		":{5} edge.test -> tls://%[2]s %[4]s\n:{6} edge.test -> tls://%[3]s %[4]s", plain, tls12, tls13, how),
		append([]string{"CONNECT_TIMEOUT=1m", "HELLO_TIMEOUT=1m", // whoever shakes hands here may be starved, and is not dead
			"BACKEND_CAS=" + filepath.Dir(pki(t).rootFile(t))}, settings...)...)
	return x
}

func (x *crossing) listen(t testing.TB, version uint16) net.Addr {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	arrivals := make(chan *net.TCPConn, 4096)
	x.backends[version] = arrivals
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			arrivals <- c.(*net.TCPConn)
		}
	}()
	return l.Addr()
}

// end is one end of a connection through the gateway.
type end struct {
	net.Conn // what data goes through
	tcp      *net.TCPConn
}

// cross makes a connection.
func (x *crossing) cross(t testing.TB, w way) (client, backend *end) {
	t.Helper()
	client = x.enter(t, w)
	backend = x.arrived(t, w.backend)
	if w.name == "pass" {
		if _, err := io.ReadFull(backend, make([]byte, len(x.hello))); err != nil {
			t.Fatal(err)
		}
	}
	return client, backend
}

// arrived is the backend's end of the next connection.
func (x *crossing) arrived(t testing.TB, version uint16) *end {
	t.Helper()
	select {
	case c := <-x.backends[version]:
		t.Cleanup(func() { _ = c.Close() })
		e, err := serverEnd(t, c, version)
		if err != nil {
			t.Fatal(err)
		}
		return e
	case <-time.After(patience):
		t.Fatal("no connection reached the backend")
		return nil
	}
}

// serverEnd shakes hands as edge.test, if a version is spoken.
func serverEnd(t testing.TB, c *net.TCPConn, version uint16) (*end, error) {
	_ = c.SetDeadline(time.Now().Add(patience))
	if version == 0 {
		return &end{c, c}, nil
	}
	s := tls.Server(c, serverConfig(t, version))
	return &end{s, c}, s.Handshake()
}

func serverConfig(t testing.TB, version uint16) *tls.Config {
	a := pki(t)
	return &tls.Config{Certificates: []tls.Certificate{a.leaves["edge-ecdsa"].certificate(a)}, MinVersion: version, MaxVersion: version}
}

// enter is the client's half of cross.
func (x *crossing) enter(t testing.TB, w way) *end {
	t.Helper()
	c := x.dial(t, w.port)
	if w.tls == 0 {
		if w.name == "pass" {
			if _, err := c.Write(x.hello); err != nil {
				t.Error(err)
			}
		}
		return &end{c, c}
	}
	s := tls.Client(c, clientConfig(t, func(c *tls.Config) { c.MaxVersion = w.tls }))
	if err := s.Handshake(); err != nil {
		t.Error(err)
	}
	return &end{s, c}
}

// send writes everything.
func (e *end) send(t testing.TB, b []byte) {
	t.Helper()
	if _, err := e.Write(b); err != nil {
		t.Errorf("write: %v", err)
	}
}

// notify says close_notify, where TLS is spoken.
func (e *end) notify() {
	switch s := e.Conn.(type) {
	case *tls.Conn:
		_ = s.CloseWrite()
		_ = e.tcp.SetWriteDeadline(time.Now().Add(patience)) // crypto/tls lets no more writes through
	case *rekeying:
		s.notify()
	}
}

// finish ends this end's stream in order.
func (e *end) finish() {
	e.notify()
	_ = e.tcp.CloseWrite()
}

// abort ends it with a reset, once the other kernel has everything: what it has not acknowledged a reset takes away.
func (e *end) abort(t testing.TB) {
	t.Helper()
	waitDelivered(t, e.tcp)
	reset(e.tcp)
}

// What a stream ends with.
const (
	fin = "FIN"
	rst = "RST"
)

// rest reads to the end of the stream and says how that came.
func (e *end) rest() ([]byte, string) {
	b, err := io.ReadAll(e)
	if err != nil {
		return b, ending(err)
	}
	if e.Conn != e.tcp { // behind the close_notify there has to be a FIN
		_, err = io.Copy(io.Discard, e.tcp)
	}
	if err != nil {
		return b, "close_notify, then " + ending(err)
	}
	return b, fin
}

func ending(err error) string {
	switch {
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return rst
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "FIN without close_notify"
	}
	return err.Error()
}

// expect reads to the end of the stream, which has to be these bytes and this ending.
func (e *end) expect(t testing.TB, want []byte, how string) {
	t.Helper()
	got, ended := e.rest()
	if ended != how {
		t.Errorf("the stream ended with %s, want %s", ended, how)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes arrived, want these %d", len(got), len(want))
	}
}

// expectBroken writes until that fails: how a reset shows on a stream whose reading half is over already.
func (e *end) expectBroken(t testing.TB) {
	t.Helper()
	for {
		_, err := e.Write(make([]byte, 32<<10))
		if err == nil {
			continue
		}
		if ending(err) != rst {
			t.Errorf("writing ended with %v, want a reset", err)
		}
		return
	}
}

// endings is the table: what the two ends do, called near and far, and the outcome. Each runs both ways round: in the
// first the client is near, in the second the backend is.
var endings = []struct {
	name string
	act  func(t *testing.T, near, far *end)
	// with the client near, and with the backend near
	outcomes [2]string
	onlyTLS  bool // it's about close_notify: who is near speaks TLS
	cutShort bool // TestTruncationIsNoEnd has the backends' part of it
}{
	{name: "one ends first", act: func(t *testing.T, near, far *end) {
		up, down := random(1, 100<<10), random(2, 300<<10)
		near.send(t, up)
		near.finish()
		far.expect(t, up, fin)
		far.send(t, down)
		far.finish()
		near.expect(t, down, fin)
	}, outcomes: [2]string{"ok", "ok"}},
	{name: "one ends without a word, the other goes on", act: func(t *testing.T, near, far *end) {
		near.finish()
		far.expect(t, nil, fin)
		down := random(3, 1<<20)
		sent := inBackground(func() { far.send(t, down); far.finish() })
		near.expect(t, down, fin)
		<-sent
	}, outcomes: [2]string{"ok", "ok"}},
	{name: "both end at once", act: func(t *testing.T, near, far *end) {
		up, down := random(4, 70_000), random(5, 50_000)
		near.send(t, up)
		far.send(t, down)
		near.finish()
		far.finish()
		near.expect(t, down, fin)
		far.expect(t, up, fin)
	}, outcomes: [2]string{"ok", "ok"}},
	{name: "reset before data", act: func(t *testing.T, near, far *end) {
		near.abort(t)
		far.expect(t, nil, rst)
	}, outcomes: [2]string{"client_reset", "backend_reset"}},
	{name: "reset behind data that nobody has read yet", act: func(t *testing.T, near, far *end) {
		up := random(6, 1<<20)
		near.send(t, up)
		near.abort(t)
		far.expect(t, up, rst)
	}, outcomes: [2]string{"client_reset", "backend_reset"}},
	{name: "reset between data", act: func(t *testing.T, near, far *end) {
		up, down := random(7, 200<<10), random(8, 100<<10)
		near.send(t, up)
		if _, err := io.ReadFull(far, make([]byte, len(up)/2)); err != nil {
			t.Error(err)
		}
		far.send(t, down)
		if _, err := io.ReadFull(near, make([]byte, len(down))); err != nil {
			t.Error(err)
		}
		near.abort(t)
		far.expect(t, up[len(up)/2:], rst)
	}, outcomes: [2]string{"client_reset", "backend_reset"}},
	{name: "reset after its own end", act: func(t *testing.T, near, far *end) {
		up := random(9, 80_000)
		near.send(t, up)
		near.finish()
		far.expect(t, up, fin)
		reset(near.tcp)
		far.expectBroken(t)
	}, outcomes: [2]string{"client_reset", "backend_reset"}},
	{name: "reset after the other's end", act: func(t *testing.T, near, far *end) {
		up, down := random(10, 80_000), random(11, 90_000)
		far.send(t, down)
		far.finish()
		near.expect(t, down, fin)
		near.send(t, up)
		near.abort(t)
		far.expect(t, up, rst)
	}, outcomes: [2]string{"client_reset", "backend_reset"}},
	{name: "end with 8 MiB queued", act: func(t *testing.T, near, far *end) {
		up := random(12, 8<<20)
		_ = far.tcp.SetReadBuffer(64 << 10)
		sent := inBackground(func() { near.send(t, up); near.finish() })
		waitStuck(t, near)
		(&end{slowConn{far.Conn}, far.tcp}).expect(t, up, fin)
		<-sent
		far.finish()
		near.expect(t, nil, fin)
	}, outcomes: [2]string{"ok", "ok"}},
	{name: "close while the other still sends", act: func(t *testing.T, near, far *end) {
		up := random(13, 10_000)
		near.send(t, up)
		_ = near.tcp.Close()
		if got, _ := far.rest(); !bytes.Equal(got, up) {
			t.Errorf("%d bytes arrived, want these %d", len(got), len(up))
		}
		far.expectBroken(t)
	}, outcomes: [2]string{"client_reset", "backend_reset"}},
	{name: "close_notify without FIN", act: func(t *testing.T, near, far *end) {
		up, down := random(14, 100_000), random(15, 2<<20)
		near.send(t, up)
		near.notify()
		far.expect(t, up, fin)
		sent := inBackground(func() { far.send(t, down); far.finish() })
		near.expect(t, down, fin)
		<-sent
	}, outcomes: [2]string{"ok", "ok"}, onlyTLS: true},
	{name: "FIN without close_notify", act: func(t *testing.T, near, far *end) {
		up, down := random(16, 100_000), random(17, 2<<20)
		near.send(t, up)
		_ = near.tcp.CloseWrite()
		far.expect(t, up, fin)
		sent := inBackground(func() { far.send(t, down); far.finish() })
		near.expect(t, down, fin)
		<-sent
	}, outcomes: [2]string{"ok"}, onlyTLS: true, cutShort: true},
	{name: "close_notify, then reset", act: func(t *testing.T, near, far *end) {
		up := random(18, 100_000)
		near.send(t, up)
		near.notify()
		far.expect(t, up, fin)
		near.abort(t)
		far.expectBroken(t)
	}, outcomes: [2]string{"client_reset", "backend_reset"}, onlyTLS: true},
	{name: "close_notify, then noise", act: func(t *testing.T, near, far *end) {
		up, down := random(19, 100_000), random(20, 8<<20)
		near.send(t, up)
		near.notify()
		if _, err := near.tcp.Write([]byte("what nobody is going to read")); err != nil {
			t.Error(err)
		}
		far.expect(t, up, fin)
		sent := inBackground(func() { far.send(t, down); far.finish() })
		waitStuck(t, far)
		if _, err := near.tcp.Write([]byte("nor this")); err != nil {
			t.Error(err)
		}
		near.expect(t, down, fin)
		<-sent
	}, outcomes: [2]string{"ok", "ok"}, onlyTLS: true},
}

// TestTruncationIsNoEnd: a backend's stream that ends without a close_notify may have been cut by anybody on the way. A
// client that speaks TLS sees just that; one that does not sees a reset. The other way round a TLS backend sees what
// its client did.
func TestTruncationIsNoEnd(t *testing.T) {
	beside(t)
	x := newCrossing(t)
	for _, w := range ways {
		if w.backend == 0 {
			continue
		}
		t.Run(w.name, func(t *testing.T) {
			client := x.dial(t, w.port)
			var pen *penman
			if w.tls != 0 {
				pen = shakeHands(t, client, clientConfig(t, func(c *tls.Config) { c.MaxVersion = w.tls }), manner{})
			}
			seen := &tapped{TCPConn: <-x.backends[w.backend]}
			defer seen.Close()
			_ = seen.SetDeadline(time.Now().Add(patience))
			backend := tls.Server(seen, serverConfig(t, w.backend))
			down, up := random(1, 300_000), random(2, 100_000)
			if _, err := backend.Write(down); err != nil {
				t.Fatal(err)
			}
			_ = seen.CloseWrite()
			outcome := "ok"
			if w.tls == 0 {
				outcome = "backend_reset"
				(&end{client, client}).expect(t, down, rst)
			} else {
				got, alert, err := pen.readAll()
				if !bytes.Equal(got, down) || alert != "" || err != io.EOF {
					t.Errorf("the client got %d of %d bytes, the alert %q, then %v", len(got), len(down), alert, err)
				}
				pen.write(t, slices.Concat(pen.data(up[:9000]), pen.data(up[9000:20000])))
				_ = client.CloseWrite()
				if got, err := io.ReadAll(backend); !bytes.Equal(got, up[:20000]) || err != nil {
					t.Errorf("the backend got %d bytes, then %v", len(got), err)
				}
				if seen.closeNotify(w.backend) {
					t.Error("the backend was told that this is the end")
				}
			}
			_, _ = client.Close(), seen.Close()
			if l := x.lineOf(t, client); l.Outcome != outcome || !strings.Contains(l.Error, "without a close_notify") {
				t.Errorf("want %s: %s", outcome, l)
			}
		})
	}
}

// tapped remembers what it reads.
type tapped struct {
	*net.TCPConn
	all []byte
}

func (c *tapped) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.all = append(c.all, b[:n]...)
	return n, err
}

// closeNotify says whether the last record is an alert: in TLS 1.3 that shows in its length.
func (c *tapped) closeNotify(version uint16) bool {
	last := []byte{0, 0, 0, 0, 0}
	for b := c.all; len(b) >= 5; b = b[min(len(b), 5+int(b[3])<<8+int(b[4])):] {
		last = b
	}
	return last[0] == 21 || version == tls.VersionTLS13 && len(last) == 5+2+1+16
}

// inBackground runs f beside the test and tells when it's done.
func inBackground(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}

// waitStuck waits until what e sends stays where it is: in our kernel, because the gateway reads no more, or because
// all of it has gone and the other end takes no more.
func waitStuck(t testing.TB, e *end) {
	t.Helper()
	was, same := -1, 0
	for deadline := time.Now().Add(patience); same < 10; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it goes on and on")
		}
		n := unsentBytes(t, e.tcp)
		if same++; n != was {
			was, same = n, 0
		}
	}
}

// slowConn reads little at a time.
type slowConn struct{ net.Conn }

func (c slowConn) Read(p []byte) (int, error) { return (&slowReader{c.Conn, 16 << 10}).Read(p) }

// TestEndsAreCarriedOver: data complete, FIN as FIN, RST as RST, and the outcome in the log, on every way through the
// gateway, whoever begins.
func TestEndsAreCarriedOver(t *testing.T) {
	beside(t)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			beside(t)
			x := newCrossing(t)
			for _, c := range endings {
				for i, who := range []string{"client", "backend"} {
					if near := [2]uint16{w.tls, w.backend}[i]; c.onlyTLS && near == 0 || c.cutShort && w.backend != 0 {
						continue
					}
					t.Run(c.name+"/"+who, func(t *testing.T) {
						client, backend := x.cross(t, w)
						if i == 0 {
							c.act(t, client, backend)
						} else {
							c.act(t, backend, client)
						}
						_, _ = client.tcp.Close(), backend.tcp.Close()
						l := x.lineOf(t, client.tcp)
						if l.Outcome != c.outcomes[i] {
							t.Errorf("want %s: %s", c.outcomes[i], l)
						}
					})
				}
			}
		})
	}
}

// TestEndBehindTheHelloIsCarriedOver: a client may end its stream before anybody has looked at what it said.
func TestEndBehindTheHelloIsCarriedOver(t *testing.T) {
	x := newCrossing(t, "PROXY_FROM=127.0.0.9")
	for _, from := range []string{"127.0.0.1", "127.0.0.9"} {
		t.Run(from, func(t *testing.T) {
			first := x.hello
			if from == "127.0.0.9" {
				first = append([]byte("PROXY UNKNOWN\r\n"), x.hello...)
			}
			for range 20 { // now and then all of it is there when the gateway looks
				c := dialFrom(t, from, x.addr(1))
				client := &end{c, c}
				client.send(t, first)
				client.finish()
				backend := x.arrived(t, 0)
				backend.expect(t, x.hello, fin)
				backend.send(t, []byte("a reply"))
				backend.finish()
				client.expect(t, []byte("a reply"), fin)
				_, _ = c.Close(), backend.tcp.Close()
				if l := x.lineOf(t, c); l.Outcome != "ok" {
					t.Errorf("line: %s", l)
				}
			}
		})
	}
}

// TestClientThatLeavesWhileABackendIsSoughtIsLetGo at once, not when the search is over.
func TestClientThatLeavesWhileABackendIsSoughtIsLetGo(t *testing.T) {
	beside(t)
	b := start(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} -> %[1]s mode=tcp", silentServer(t, "127.0.0.1:0")), "CONNECT_TIMEOUT=40s")
	for i, mode := range []string{"terminate", "tcp"} {
		t.Run(mode, func(t *testing.T) {
			c := b.dial(t, i)
			if mode == "terminate" {
				if err := tls.Client(c, clientConfig(t, nil)).Handshake(); err != nil {
					t.Fatal(err)
				}
			}
			waitDelivered(t, c)
			b.settle(t)
			reset(c)
			if l := b.lineOf(t, c); l.Outcome != "client_reset" || l.Stage != "connect" || l.DurationMS > 20_000 {
				t.Errorf("line: %s", l)
			}
		})
	}
}

// TestHalfCloseKeepsReply: a client that ends its stream gets its answer however long that takes, and however slowly
// it comes: the linger timeout counts silence, not time.
func TestHalfCloseKeepsReply(t *testing.T) {
	const linger = 1500 * time.Millisecond
	x := newCrossing(t, "LINGER_TIMEOUT="+linger.String())
	clients, backends := x.crossAll(t)
	for i := range ways {
		clients[i].finish()
		backends[i].expect(t, nil, fin)
	}
	tick := time.NewTicker(linger / 5)
	defer tick.Stop()
	for range 10 { // twice the linger timeout
		for _, b := range backends {
			b.send(t, []byte("."))
		}
		<-tick.C
	}
	for i, w := range ways {
		backends[i].finish()
		clients[i].expect(t, bytes.Repeat([]byte("."), 10), fin)
		if l := x.lineOf(t, clients[i].tcp); l.Outcome != "ok" || l.DurationMS < float64(2*linger.Milliseconds())*0.9 {
			t.Errorf("%s: %s", w.name, l)
		}
	}
}

// crossAll makes a connection on each way.
func (x *crossing) crossAll(t testing.TB) (clients, backends []*end) {
	t.Helper()
	for _, w := range ways {
		client, backend := x.cross(t, w)
		clients, backends = append(clients, client), append(backends, backend)
	}
	return clients, backends
}

// TestSilenceEndsConnections: after the idle timeout when both streams are open, after the linger timeout when one is
// over. Both sides see the end of a stream.
func TestSilenceEndsConnections(t *testing.T) {
	const idle, linger = 1200 * time.Millisecond, 600 * time.Millisecond
	x := newCrossing(t, "IDLE_TIMEOUT="+idle.String(), "LINGER_TIMEOUT="+linger.String())
	open, idleBackends := x.crossAll(t)
	for i := range ways {
		open[i].send(t, []byte("hello"))
		if _, err := io.ReadFull(idleBackends[i], make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
	half, halfBackends := x.crossAll(t)
	for i := range ways {
		half[i].finish()
		halfBackends[i].expect(t, nil, fin)
	}
	for i, w := range ways {
		half[i].expect(t, nil, fin)
		open[i].expect(t, nil, fin)
		idleBackends[i].expect(t, nil, fin)
		for client, timeout := range map[*end]time.Duration{half[i]: linger, open[i]: idle} {
			l := x.lineOf(t, client.tcp)
			checkTimeout(t, l, timeout)
			if l.Outcome != "idle" {
				t.Errorf("%s: %s", w.name, l)
			}
		}
	}
}

// TestSlowReaderBoundsMemory: a client that does not read stops its backend, instead of filling our memory.
func TestSlowReaderBoundsMemory(t *testing.T) {
	const size, each = 64 << 20, 640 << 10 // a stuck connection holds what one call has read: at most 512 KiB
	x := newCrossing(t)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			const conns = 8
			var clients, backends [conns]*end
			for i := range conns {
				clients[i], backends[i] = x.cross(t, w)
			}
			block := random(1, 1<<20)
			var sent [conns]atomic.Int64
			var writers [conns]<-chan struct{}
			grown := heapGrowth(t, func() {
				for i, b := range backends {
					writers[i] = inBackground(func() {
						for n, err := 0, error(nil); err == nil && sent[i].Load() < size; sent[i].Add(int64(n)) {
							n, err = b.Write(block)
						}
						b.finish()
					})
				}
				for i, b := range backends {
					until(t, "it is stuck", func() bool { waitStuck(t, b); return unsentBytes(t, b.tcp) > 0 })
					if n := sent[i].Load(); n >= size {
						t.Errorf("after %d bytes it should be stuck", n)
					}
				}
			})
			t.Logf("%d bytes for a client that does not read", grown/conns)
			if grown > conns*each {
				t.Errorf("%d clients that do not read cost %d KiB", conns, grown>>10)
			}
			got, want := sha256.New(), sha256.New()
			n, err := io.Copy(got, clients[0])
			<-writers[0]
			for range size / len(block) {
				want.Write(block)
			}
			if err != nil || n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
				t.Errorf("the slow reader got %d bytes of %d, %v", n, size, err)
			}
			for i := range conns {
				_, _ = clients[i].tcp.Close(), backends[i].tcp.Close()
				<-writers[i]
			}
		})
	}
}

// TestKeyUpdatesAmidStreams: the client goes over to new keys again and again and asks for new ones, while both
// directions stream.
func TestKeyUpdatesAmidStreams(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	p := dialPenman(t, b, 0, nil)
	const rounds = 300
	up := random(1, rounds*9000)
	sent := inBackground(func() {
		for i, piece := range slices.Collect(slices.Chunk(up, 9000)) {
			out := p.data(piece[:4000])
			if i%3 == 0 {
				out = append(out, p.update(i%2 == 0)...)
			}
			out = append(out, p.data(piece[4000:])...)
			if _, err := p.TCPConn.Write(out); err != nil {
				t.Error(err)
				return
			}
		}
		_, _ = p.TCPConn.Write(p.record(21, []byte{1, 0}))
	})
	down, alert, err := p.readAll()
	<-sent
	if !bytes.Equal(down, up) || alert != "close_notify" || err != io.EOF {
		t.Errorf("%d of %d bytes came back, then %s, %v", len(down), len(up), alert, err)
	}
	if p.updates == 0 {
		t.Error("the gateway did not change its keys when it was asked to")
	}
	_ = p.Close()
	if l := b.lineOf(t, p); l.Outcome != "ok" {
		t.Errorf("line: %s", l)
	}
}

// TestAThousandConversations of random sizes, cut at random, with KeyUpdates at random, ended one way or another: nothing
// is lost, nothing is made up, and each end is carried over.
func TestAThousandConversations(t *testing.T) {
	conversations, atOnce := 1000, 12
	if os.Getenv("KTLS_EAGER") != "" {
		conversations = 250 // an emulated machine takes 40 ms for each
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	x := newCrossing(t)
	meet := newMeeting(t, x)
	defer meet.stop()
	next := make(chan int)
	var workers sync.WaitGroup
	for range atOnce {
		workers.Go(func() {
			for i := range next {
				c := conversation{rng: rand.New(rand.NewPCG(seed, uint64(i))), number: i}
				if err := c.run(t, x, meet); err != nil {
					t.Errorf("conversation %d of seed %d, %s: %v", i, seed, c.text, err)
				}
			}
		})
	}
	for i := range conversations {
		next <- i
	}
	close(next)
	workers.Wait()
}

// meeting brings the two ends of a conversation together: the first 8 bytes that a client sends are its number.
type meeting struct {
	mu      sync.Mutex
	waiting map[uint64]chan *end
	end     chan struct{}
	ended   sync.WaitGroup
}

func newMeeting(t testing.TB, x *crossing) *meeting {
	m := &meeting{waiting: map[uint64]chan *end{}, end: make(chan struct{})}
	for version, arrivals := range x.backends {
		m.ended.Go(func() {
			for {
				select {
				case c := <-arrivals:
					m.ended.Go(func() {
						if version == tls.VersionTLS13 && rand.IntN(2) == 0 {
							m.introduce(&end{&rekeying{penman: serverPenman(t, c, version)}, c}, len(x.hello))
						} else if e, err := serverEnd(t, c, version); err == nil {
							m.introduce(e, len(x.hello))
						}
					})
				case <-m.end:
					return
				}
			}
		})
	}
	return m
}

func (m *meeting) stop() {
	close(m.end)
	m.ended.Wait()
}

func (m *meeting) introduce(c *end, hello int) {
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	if head[0] == 22 { // passed on: the hello comes first
		_, _ = io.CopyN(io.Discard, c, int64(hello-8))
		_, _ = io.ReadFull(c, head[:])
	}
	m.at(binary.BigEndian.Uint64(head[:])) <- c
}

func (m *meeting) at(number uint64) chan *end {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting[number] == nil {
		m.waiting[number] = make(chan *end, 1)
	}
	return m.waiting[number]
}

// rekeying is an end in TLS 1.3 that goes over to new keys now and then, and cuts its records at random.
type rekeying struct {
	*penman
	heard int // of what was read
	ended error
}

func (r *rekeying) Write(b []byte) (n int, err error) {
	var out []byte
	for n < len(b) {
		m := min(1+rand.IntN(1<<rand.IntN(15)), len(b)-n)
		out = append(out, r.data(b[n:n+m])...)
		if n += m; rand.IntN(8) == 0 && m > 2000 { // not so many that it's a storm
			// Before Linux 6.14 the kernel can't answer a request.
			out = append(out, r.update(rand.IntN(2) == 0 && (os.Getenv("KTLS_EAGER") == "" || gateway.EagerToRekey()))...)
		}
	}
	_, err = r.TCPConn.Write(out)
	return n, err
}

func (r *rekeying) Read(b []byte) (int, error) {
	for r.heard == len(r.all) && r.ended == nil {
		done, alert, err := r.step()
		switch {
		case !done:
		case alert == "close_notify":
			r.ended = err
		case err == io.EOF:
			r.ended = io.ErrUnexpectedEOF
		default:
			r.ended = err
		}
	}
	if r.heard == len(r.all) {
		return 0, r.ended
	}
	n := copy(b, r.all[r.heard:])
	r.heard += n
	return n, nil
}

func (r *rekeying) notify() { _, _ = r.TCPConn.Write(r.record(21, []byte{1, 0})) }

// conversation is one of the thousand.
type conversation struct {
	rng    *rand.Rand
	number int
	text   string // what it is about, for its error
}

// side is what one end does: so many bytes in such pieces, then its end.
type side struct {
	data    []byte
	pieces  []int
	reading int // bytes a call
	waits   bool
	resets  bool
}

func (c *conversation) side(seed uint64) side {
	size := 1 << c.rng.IntN(19) // half of them below 1 KiB, and some of 512 KiB
	s := side{data: random(seed, c.rng.IntN(size+1)), reading: 1 + c.rng.IntN(1<<c.rng.IntN(17)), waits: c.rng.IntN(3) == 0}
	for left := len(s.data); left > 0; {
		n := 1 + c.rng.IntN(left)
		s.pieces = append(s.pieces, n)
		left -= n
	}
	return s
}

// known is what the gateway knows of a client's connection, whether it is over or not.
func (x *crossing) known(t testing.TB, client net.Conn) string {
	for _, l := range x.log.all() {
		if l.isOf(client) {
			return l.text
		}
	}
	for _, c := range x.conns(t, 10_000) {
		if c.Peer.String() == client.LocalAddr().String() && portOf(c.Listen) == portOf(client.RemoteAddr().String()) {
			return fmt.Sprintf("%+v", c)
		}
	}
	return "nothing is known of " + client.LocalAddr().String()
}

func (c *conversation) run(t *testing.T, x *crossing, m *meeting) error {
	w := ways[c.rng.IntN(len(ways))]
	up, down := c.side(uint64(2*c.number)), c.side(uint64(2*c.number+1))
	if up.waits {
		down.waits = false // somebody has to begin
	}
	if c.rng.IntN(4) == 0 {
		up.resets = true
		up.waits, down.waits = false, true
	}
	c.text = fmt.Sprintf("%s, %d bytes up (reset: %v), %d down", w.name, len(up.data), up.resets, len(down.data))
	var client *end
	if w.tls == tls.VersionTLS13 && c.rng.IntN(2) == 0 {
		p := dialPenman(t, x.bed, w.port, nil)
		client = &end{&rekeying{penman: p}, p.TCPConn}
	} else {
		client = x.enter(t, w)
	}
	client.send(t, binary.BigEndian.AppendUint64(nil, uint64(c.number)))
	var backend *end
	select {
	case backend = <-m.at(uint64(c.number)):
	case <-time.After(patience):
		return errors.New("it did not reach the backend: " + x.known(t, client.tcp))
	}
	results := make(chan error, 2)
	go func() { results <- up.talk(t, client, down, fin) }()
	go func() {
		how := fin
		if up.resets {
			how = rst
		}
		results <- down.talk(t, backend, up, how)
	}()
	err := errors.Join(<-results, <-results)
	_, _ = client.tcp.Close(), backend.tcp.Close()
	l := x.lineOf(t, client.tcp)
	switch {
	case up.resets && l.Outcome != "client_reset", !up.resets && l.Outcome != "ok":
		err = errors.Join(err, errors.New(l.String()))
	}
	return err
}

// talk is one end's part: it sends, and reads what the other sends.
func (s *side) talk(t *testing.T, e *end, other side, how string) error {
	heard := make(chan error, 1)
	listen := func() { heard <- other.check(e, s.reading, how) }
	if s.resets { // what the other says is lost with the reset
		listen = func() { heard <- nil }
	}
	if s.waits {
		listen()
	} else {
		go listen()
	}
	if s.waits && how == rst {
		return <-heard // there is nobody left
	}
	data := s.data
	for _, n := range s.pieces {
		if _, err := e.Write(data[:n]); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		data = data[n:]
	}
	if s.resets {
		e.abort(t)
	} else {
		e.finish()
	}
	return <-heard
}

// check reads everything and compares it with what was sent.
func (s *side) check(e *end, reading int, how string) error {
	var got, want hash.Hash = sha256.New(), sha256.New()
	want.Write(s.data)
	var n int
	buf := make([]byte, reading)
	for {
		m, err := e.Read(buf)
		got.Write(buf[:m])
		n += m
		if err == nil {
			continue
		}
		ended := fin
		if err != io.EOF {
			ended = ending(err)
		}
		if ended != how || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			return fmt.Errorf("%d of %d bytes arrived, then %s (want %s)", n, len(s.data), ended, how)
		}
		return nil
	}
}

// TestNoGoroutineForAConnection: only handshakes have one, and only while they run.
func TestNoGoroutineForAConnection(t *testing.T) {
	x := newCrossing(t)
	open := func(n int) {
		for range n {
			for _, w := range ways {
				client, backend := x.cross(t, w)
				client.send(t, []byte("x"))
				if _, err := io.ReadFull(backend, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	open(2)
	before := gatewayGoroutines()
	open(50)
	if after := gatewayGoroutines(); after != before {
		t.Errorf("%d goroutines with a few connections, %d with many", before, after)
	}
	if n, want := len(x.conns(t, 1000)), 52*len(ways); n != want {
		t.Errorf("%d connections are open, want %d", n, want)
	}
}

// gatewayGoroutines counts those that run the gateway's code, once those that are about to end have ended. The few that
// wait for the next handshake are not bound to connections, and are not counted.
func gatewayGoroutines() (n int) {
	buf := make([]byte, 4<<20)
	for was, same := -1, 0; same < 5; time.Sleep(10 * time.Millisecond) {
		n = 0
		for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			_, top, _ := strings.Cut(stack, "\n")
			if strings.Contains(stack, "tlsnat/gateway.") && !strings.HasPrefix(top, "github.com/tlsnat/tlsnat/gateway.(*shakers).shake(") {
				n++
			}
		}
		if same++; n != was {
			was, same = n, 0
		}
	}
	return n
}
