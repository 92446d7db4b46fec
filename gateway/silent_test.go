// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
)

// silent says hello and nothing more. It returns when the server's flight is there, so that its silence has begun.
func silent(t testing.TB, c net.Conn, hello []byte) net.Conn {
	t.Helper()
	if _, err := c.Write(hello); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	return c
}

// slowClient is a client that shakes hands, and answers the server only when it is told to.
func slowClient(t testing.TB, c net.Conn) *stalled {
	t.Helper()
	s := &stalled{Conn: c, asked: make(chan struct{}), resume: make(chan struct{}), done: make(chan error, 1)}
	go func() { s.done <- tls.Client(s, clientConfig(t, nil)).Handshake() }()
	s.awaitFlight(t)
	return s
}

// awaitFlight returns when the client has the server's flight, and has something to answer.
func (c *stalled) awaitFlight(t testing.TB) {
	t.Helper()
	select {
	case <-c.asked:
	case err := <-c.done:
		t.Fatalf("the server did not go on with the handshake: %v", err)
	}
}

func (c *stalled) goOn() error {
	close(c.resume)
	return <-c.done
}

// TestLongestSilentHandshakeGoesFirst: when all places are taken, a hello that waits gets that of who was silent for longest.
func TestLongestSilentHandshakeGoesFirst(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "HANDSHAKES=2", "LOOPS=1")
	oldest := slowClient(t, b.dial(t, 0))
	began := time.Now()
	other := slowClient(t, b.dial(t, 0))
	exchange(t, b.dialTLS(t, 0, nil), []byte("let in"))
	if l := b.lineOf(t, oldest.Conn); l.Outcome != "handshake_failed" || !strings.Contains(l.Error, "did not answer") {
		t.Errorf("line: %s", l)
	}
	_ = oldest.goOn()                       // the server's word that it is over may be on its way
	slow := time.Since(began) > time.Second // then the other one's patience may be over as well: 1.5 s, with all places taken
	if err := other.goOn(); err != nil && !slow {
		t.Errorf("the other one: %v", err)
	}
	if n := b.gateway.Status().Handshakes.Silent; n != 1 && !slow {
		t.Errorf("%d are counted as silent", n)
	}
}

// TestSilentHandshakesShutNobodyOut: who says hello and never answers takes places from nobody but itself, however often it does,
// whether it is seen or is named in a PROXY header; clients of its own address are served as well.
func TestSilentHandshakesShutNobodyOut(t *testing.T) {
	const places, flood, honest = 8, 120, 20
	for _, way := range []struct{ name, proxyFrom string }{{"seen", ""}, {"behind a PROXY header", "127.0.0.0/8"}} {
		t.Run(way.name, func(t *testing.T) {
			b := start(t, ":{0} edge.test -> "+echoServer(t), fmt.Sprintf("HANDSHAKES=%d", places), "LOOPS=1", "PROXY_FROM="+way.proxyFrom)
			dial := func(source string) net.Conn {
				if way.proxyFrom == "" {
					return dialFrom(t, source, b.addr(0))
				}
				c := b.dial(t, 0)
				if _, err := fmt.Fprintf(c, "PROXY TCP4 %s 127.0.0.1 4711 443\r\n", source); err != nil {
					t.Fatal(err)
				}
				return c
			}
			hello := clientHello(t, nil)
			slow := slowClient(t, dial("127.0.3.1"))
			for i := range flood {
				silent(t, dial("127.0.3.66"), hello)
				if i*honest/flood != (i+1)*honest/flood {
					exchange(t, tls.Client(dial(fmt.Sprintf("127.0.4.%d", 1+i)), clientConfig(t, nil)), []byte("from elsewhere"))
					exchange(t, tls.Client(dial("127.0.3.66"), clientConfig(t, nil)), []byte("from the same address"))
				}
			}
			if err := slow.goOn(); err != nil {
				t.Errorf("a slow client: %v", err)
			}
			status := b.gateway.Status()
			if n := status.Handshakes.Silent; n < flood-places || n > flood {
				t.Errorf("%d were ended, being silent", n)
			}
			if n := status.Gate.Refused["handshake-queue"]; n != 0 {
				t.Errorf("%d hellos were dropped", n)
			}
			lines := 0
			for _, l := range b.log.all() {
				if strings.HasPrefix(l.Client, "127.0.3.66") && l.Outcome == "handshake_failed" && l.Count == 0 {
					lines++
				}
			}
			if lines != 1 {
				t.Errorf("%d lines about clients that never answered, want one", lines)
			}
		})
	}
}

// TestManySilentSourcesShutNobodyOut: the same from more addresses than there are places.
func TestManySilentSourcesShutNobodyOut(t *testing.T) {
	const sources = 250
	b := start(t, ":{0} edge.test -> "+echoServer(t), "HANDSHAKES=32", "LOOPS=2")
	hello := clientHello(t, nil)
	for i := range 2 * sources {
		silent(t, dialFrom(t, fmt.Sprintf("127.0.5.%d", 1+i%sources), b.addr(0)), hello)
		if i%25 == 0 {
			exchange(t, tls.Client(dialFrom(t, "127.0.6.1", b.addr(0)), clientConfig(t, nil)), []byte("served"))
		}
	}
	if n := b.gateway.Status().Handshakes.Silent; n < 2*sources-32 {
		t.Errorf("%d were ended, being silent", n)
	}
}

// TestDripsAreSilence: bytes that are no answer do not save a handshake, neither from its deadline nor from who needs its place.
func TestDripsAreSilence(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "HANDSHAKES=1", "LOOPS=1")
	c := silent(t, b.dial(t, 0), clientHello(t, nil))
	for _, drip := range []byte{22, 3, 3, 4} {
		if _, err := c.Write([]byte{drip}); err != nil {
			t.Fatal(err)
		}
	}
	exchange(t, b.dialTLS(t, 0, nil), []byte("let in"))
	if l := b.lineOf(t, c); l.Outcome != "handshake_failed" {
		t.Errorf("line: %s", l)
	}
}

// TestLargeHellosTakeMorePlaces: a silent handshake costs what its hello has three times over, and counts as that.
func TestLargeHellosTakeMorePlaces(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "HANDSHAKES=8", "LOOPS=1")
	large := clientHello(t, func(c *tls.Config) { c.NextProtos = slices.Repeat([]string{strings.Repeat("x", 200)}, 70) })
	first := silent(t, dialFrom(t, "127.0.7.1", b.addr(0)), large)
	for _, table := range b.gateway.Status().Gate.Tables {
		if table.Name == "handshakes" && (table.Entries != 1+len(large)/4096 || table.Limit != 8) {
			t.Errorf("a hello of %d bytes: %+v", len(large), table)
		}
	}
	var slow []*stalled
	for i := range 4 {
		slow = append(slow, slowClient(t, dialFrom(t, fmt.Sprintf("127.0.7.%d", 2+i), b.addr(0))))
	}
	silent(t, dialFrom(t, "127.0.7.10", b.addr(0)), large)
	slow = append(slow, slowClient(t, dialFrom(t, "127.0.7.11", b.addr(0))))
	b.lineOf(t, first)
	for _, s := range slow {
		if err := s.goOn(); err != nil {
			t.Errorf("a small one: %v", err)
		}
	}
	if n := b.gateway.Status().Handshakes.Silent; n != 2 {
		t.Errorf("%d were ended, want both large ones", n)
	}
}

// TestSilenceMakesRoom: when TLSNAT_MAX_CONNS are open, a client that says nothing, half a hello, or nothing behind its hello gives
// way to one that comes; sessions never do.
func TestSilenceMakesRoom(t *testing.T) {
	const limit = 8
	hello := clientHello(t, nil)
	for name, words := range map[string][]byte{"nothing": nil, "half a hello": hello[:len(hello)/2], "a hello": hello} {
		t.Run(name, func(t *testing.T) {
			b := start(t, ":{0} edge.test -> "+echoServer(t), fmt.Sprintf("MAX_CONNS=%d", limit), "LOOPS=1")
			session := b.dialTLS(t, 0, nil)
			exchange(t, session, []byte("a session"))
			for i := range 3 * limit {
				crowded(t, b.addr(0), words)
				if i%limit == limit-1 {
					time.Sleep(300 * time.Millisecond) // they have had their time
					c := tls.Client(dialFrom(t, "127.0.4.1", b.addr(0)), clientConfig(t, nil))
					exchange(t, c, []byte("served"))
					_ = c.Close()
				}
			}
			exchange(t, session, []byte("not disturbed"))
		})
	}
}

// hungServer takes connections and never says a word.
func hungServer(t testing.TB) string {
	return serve(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
}

// tlsEcho echoes inside TLS.
func tlsEcho(t testing.TB) string {
	return serve(t, func(c *net.TCPConn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pki(t).leaves["edge-ecdsa"].certificate(pki(t))}})
		_, _ = io.Copy(s, s)
	})
}

// TestHungServerDelaysItsOwnClients: a server that does not answer handshakes holds up nobody who goes to another one.
func TestHungServerDelaysItsOwnClients(t *testing.T) {
	b := start(t, ":{0} -> tls://"+hungServer(t)+" mode=tcp connect=1h backend-verify=off\n:{1} -> tls://"+hungServer(t)+" mode=tcp connect=1h backend-verify=off\n"+
		":{2} -> tls://"+tlsEcho(t)+" mode=tcp backend-verify=off", "HANDSHAKES=8", "LOOPS=1")
	const waiting = 40
	for i := range waiting {
		b.dial(t, i%2)
	}
	for deadline := time.Now().Add(patience); len(b.stages(t, "backend_tls_queue")) < waiting-8 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	for range 10 {
		exchange(t, b.dial(t, 2), []byte("from another server"))
	}
	if n := len(b.stages(t, "backend_tls")); n < 4 || n > 7 {
		t.Errorf("%d of 8 places are the hung servers'", n)
	}
	if n := len(b.stages(t, "backend_tls")) + len(b.stages(t, "backend_tls_queue")); n != waiting {
		t.Errorf("%d of %d clients wait for the hung servers", n, waiting)
	}
}

// stages are the open connections that are at a stage.
func (b *bed) stages(t testing.TB, stage string) (all []gateway.OpenConn) {
	for _, c := range b.conns(t, 1000) {
		if c.Stage == stage {
			all = append(all, c)
		}
	}
	return all
}

// TestServerThatDoesNotShakeHandsIsEjected, as one that can't be connected to is.
func TestServerThatDoesNotShakeHandsIsEjected(t *testing.T) {
	hung := hungServer(t)
	b := start(t, ":{0} -> tls://"+hung+" tls://"+tlsEcho(t)+" mode=tcp balance=first connect=400ms eject=2 backend-verify=off", "LOOPS=1")
	for range 2 {
		exchange(t, b.dial(t, 0), []byte("from the other one"))
	}
	b.log.take(t, func(l logLine) bool {
		return l.Backend == hung && strings.Contains(l.text, "no answer to the TLS handshake in time")
	})
}

// TestSilentHandshakesCostLittle: what a handshake keeps while it waits for its client, stack and the client's end in this process
// included. Most of it is crypto/tls's.
func TestSilentHandshakesCostLittle(t *testing.T) {
	if underRace {
		t.Skip("the race detector needs memory of its own")
	}
	const n = 1000
	for name, client := range map[string]struct {
		limit  int64
		change func(*tls.Config)
	}{
		"TLS 1.3":               {20 << 10, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }},
		"TLS 1.3, post-quantum": {24 << 10, nil},
		"TLS 1.2":               {26 << 10, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, ":{0} edge.test -> "+echoServer(t), "LOOPS=2")
			hello := clientHello(t, client.change)
			fill := func(n int) {
				crowd(t, n, func() (net.Conn, error) {
					c, err := net.DialTimeout("tcp", b.addr(0), patience)
					if err == nil {
						_, err = c.Write(hello)
					}
					if err == nil {
						_, err = io.ReadFull(c, make([]byte, 100))
					}
					return c, err
				})
			}
			fill(50) // what every process needs once
			before := inUse()
			fill(n)
			cost := (inUse() - before) / n
			t.Logf("%d bytes each", cost)
			if cost > client.limit {
				t.Errorf("a silent handshake costs %d bytes, want at most %d", cost, client.limit)
			}
		})
	}
}

// inUse is how much memory objects and stacks take, when the garbage is gone.
func inUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // halves stacks once more
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}
