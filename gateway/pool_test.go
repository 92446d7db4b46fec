// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/tlsnat/tlsnat/gateway"
)

// mortal is a backend that can be killed, as kill -9 does it, and started again on its port.
type mortal struct {
	addr   string
	handle func(*net.TCPConn)

	mu       sync.Mutex
	listener net.Listener
	open     map[*net.TCPConn]bool
	running  sync.WaitGroup
	accepted atomic.Int64
}

func newMortal(t testing.TB, handle func(*net.TCPConn)) *mortal {
	t.Helper()
	m := &mortal{addr: refusing(t), handle: handle, open: map[*net.TCPConn]bool{}}
	m.live(t)
	return m
}

// live starts it, until the test ends or it is killed.
func (m *mortal) live(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		m.kill()
		m.running.Wait()
	})
	l, err := net.Listen("tcp", m.addr)
	if err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	m.listener = l
	m.mu.Unlock()
	m.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m.accepted.Add(1)
			m.serve(c.(*net.TCPConn))
		}
	})
}

func (m *mortal) serve(c *net.TCPConn) {
	m.mu.Lock()
	m.open[c] = true
	m.mu.Unlock()
	m.running.Go(func() {
		m.handle(c)
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.open, c)
		_ = c.Close()
	})
}

// deafen closes the listener and leaves connections alone.
func (m *mortal) deafen() {
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = m.listener.Close()
}

// kill closes the listener and resets all connections.
func (m *mortal) kill() {
	m.deafen()
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.open {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// becomes waits for the log to say that a backend is in a state.
func (b *bed) becomes(t testing.TB, addr, state string) {
	t.Helper()
	b.log.take(t, func(l logLine) bool {
		return l.Backend == addr && (l.Msg == "backend is up" || l.Msg == "backend gets no new connections") &&
			strings.Contains(l.text, `"state":"`+state+`"`)
	})
}

// backend is how the gateway sees one of its backends.
func (b *bed) backend(t testing.TB, addr string) gateway.BackendInfo {
	t.Helper()
	all, _ := b.gateway.Backends(1000)
	i := slices.IndexFunc(all, func(x gateway.BackendInfo) bool { return x.Address == addr })
	if i < 0 {
		t.Fatalf("no backend %s in %+v", addr, all)
	}
	return all[i]
}

// turnedAway is the line of a connection that comes to nothing. It may be reset before its client knows that it was there.
func (b *bed) turnedAway(t testing.TB, i int) logLine {
	t.Helper()
	if c, err := net.DialTimeout("tcp", b.addr(i), patience); err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	listen := fmt.Sprintf(":%d", b.ports[i])
	return b.line(t, func(l logLine) bool { return l.Listen == listen && l.Outcome != "ok" })
}

// until waits for what no event tells of.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// load makes connections one after the other, from some clients at once, until it is stopped; each exchanges a message.
// It returns how many failed.
func (b *bed) load(t testing.TB, i int) (stop func() (good, failed int)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var good, failed atomic.Int64
	var clients sync.WaitGroup
	for n := range 4 {
		clients.Go(func() {
			for ctx.Err() == nil {
				c, err := net.DialTimeout("tcp", b.addr(i), patience)
				if err == nil {
					_ = c.SetDeadline(time.Now().Add(patience))
					err = trade(c, random(uint64(n), 200))
					_ = c.Close()
				}
				if err != nil {
					failed.Add(1)
				} else {
					good.Add(1)
				}
			}
		})
	}
	return func() (int, int) {
		cancel()
		clients.Wait()
		return int(good.Load()), int(failed.Load())
	}
}

// TestKilledBackendCostsOnlyItsConnections: clients that come when it is dead notice nothing, and when it is back it
// gets work again.
func TestKilledBackendCostsOnlyItsConnections(t *testing.T) {
	doomed, other := newMortal(t, echo), newMortal(t, echo)
	b := start(t, fmt.Sprintf(":{0} -> %s %s mode=tcp slow-start=1s", doomed.addr, other.addr))
	stop := b.load(t, 0)
	until(t, "both get work", func() bool { return doomed.accepted.Load() > 20 && other.accepted.Load() > 20 })
	doomed.kill()
	b.becomes(t, doomed.addr, "ejected")
	before := other.accepted.Load()
	until(t, "the other one gets all the work", func() bool { return other.accepted.Load() > before+50 })
	doomed.live(t)
	b.becomes(t, doomed.addr, "up")
	before = doomed.accepted.Load()
	until(t, "it is back at work", func() bool { return doomed.accepted.Load() > before+20 })
	good, failed := stop()
	b.stop(t)
	onIt := 0
	for _, l := range b.log.all() {
		switch {
		case l.Msg != "connection" || l.Outcome == "ok" || l.Outcome == "client_reset":
		case l.Outcome == "backend_reset" && l.Backend == doomed.addr:
			onIt++
		default:
			t.Errorf("a client suffered that was not on the killed backend: %s", l)
		}
	}
	if failed > onIt {
		t.Errorf("%d clients saw an error, and %d were connected to the killed backend", failed, onIt)
	}
	t.Logf("%d connections, %d cut with their backend", good, onIt)
}

// TestThousandsFollowTheWeights: what is chosen is what is connected to, over two loops. Of connections that stay the one
// with the fewest is found on whichever loop (TestConnectionsFollowTheWeights is about a hundred thousand choices).
func TestThousandsFollowTheWeights(t *testing.T) {
	beside(t)
	const n = 2000
	weights := []int{5, 3, 1, 1}
	for balance, stay := range map[string]bool{"round-robin": false, "least-conn": true} {
		t.Run(balance, func(t *testing.T) {
			rule := ":{0} ->"
			var all []*mortal
			for _, w := range weights {
				m := newMortal(t, func(c *net.TCPConn) {
					_, _ = io.WriteString(c, ".")
					_, _ = io.Copy(io.Discard, c)
				})
				rule, all = rule+fmt.Sprintf(" %s/weight=%d", m.addr, w), append(all, m)
			}
			b := start(t, rule+" mode=tcp balance="+balance)
			conns := crowd(t, n, func() (net.Conn, error) {
				c, err := net.DialTimeout("tcp", b.addr(0), patience)
				if err == nil {
					_, err = io.ReadFull(c, make([]byte, 1))
				}
				if err == nil && !stay {
					err = c.Close()
				}
				return c, err
			})
			for i, w := range weights {
				got, want := float64(all[i].accepted.Load()), float64(n*w)/10
				if math.Abs(got-want) > 0.02*want {
					t.Errorf("of weight %d: %.0f connections, want %.0f give or take 2 %%", w, got, want)
				}
			}
			closeAll(conns)
			b.stop(t)
		})
	}
}

// TestDrainedBackendComesToZero: it gets no new connections, keeps those it has, and is used again when it is told so.
func TestDrainedBackendComesToZero(t *testing.T) {
	drained, other := newMortal(t, echo), newMortal(t, echo)
	b := start(t, fmt.Sprintf(":{0} -> %s %s mode=tcp", drained.addr, other.addr), "LOOPS=1")
	held := []net.Conn{b.dial(t, 0), b.dial(t, 0), b.dial(t, 0), b.dial(t, 0)}
	for _, c := range held {
		exchange(t, c, random(1, 100))
	}
	if _, err := b.gateway.OrderBackend("10.9.9.9:1", gateway.DrainBackend); err == nil {
		t.Error("a backend that is not in the map can be drained")
	}
	names, err := b.gateway.OrderBackend(drained.addr, gateway.DrainBackend)
	if err != nil || !slices.Equal(names, []string{drained.addr}) {
		t.Fatalf("%v, %v", names, err)
	}
	b.becomes(t, drained.addr, "draining")
	before := drained.accepted.Load()
	for range 6 {
		c := b.dial(t, 0)
		exchange(t, c, random(2, 100))
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: other.addr})
	}
	if n := drained.accepted.Load() - before; n != 0 {
		t.Errorf("it got %d new connections", n)
	}
	if i := b.backend(t, drained.addr); i.Open != 2 || i.State != "draining" {
		t.Errorf("%+v, want 2 connections", i)
	}
	for _, c := range held {
		exchange(t, c, random(3, 100))
		_ = c.Close()
	}
	until(t, "the drained backend has no connection", func() bool { return b.backend(t, drained.addr).Open == 0 })
	if _, err := b.gateway.OrderBackend("127.0.0.1", gateway.ReadyBackend); err != nil {
		t.Fatal(err)
	}
	b.becomes(t, drained.addr, "up")
	for range 2 {
		exchange(t, b.dial(t, 0), random(4, 100))
	}
	if drained.accepted.Load() == before {
		t.Error("it is not used again")
	}
}

// TestConnectionsWaitForRoom: one at a time, the others in their order, and one too many is turned away.
func TestConnectionsWaitForRoom(t *testing.T) {
	backend := newMortal(t, echo)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp max-conns=1 queue=2", backend.addr), "LOOPS=2")
	waiting := func(n int64) {
		t.Helper()
		until(t, fmt.Sprint(n, " wait"), func() bool { return b.gateway.BackendCounts().Waiting == n })
	}
	first := b.dial(t, 0)
	exchange(t, first, random(1, 100))
	second := b.dial(t, 0)
	waiting(1)
	third := b.dial(t, 0)
	waiting(2)
	b.turnedAway(t, 0).expect(t, logLine{Outcome: "limited", Stage: "connect", Refused: "queue"})
	if s := b.gateway.Status(); s.Gate.Refused["queue"] != 1 {
		t.Errorf("refused are %v", s.Gate.Refused)
	}
	if i := b.backend(t, backend.addr); i.Open != 1 || backend.accepted.Load() != 1 {
		t.Errorf("%+v, want one connection", i)
	}
	stages := map[string]int{}
	for _, c := range b.conns(t, 10) {
		stages[c.Stage]++
	}
	if stages["backend_queue"] != 2 || stages["relay"] != 1 {
		t.Errorf("stages %v", stages)
	}
	_ = first.Close()
	waiting(1)
	_ = second.SetLinger(0) // whichever of the two was let in; both loops have their own queue
	_ = second.Close()
	exchange(t, third, random(3, 100))
	_ = third.Close()
	b.lineOf(t, third).expect(t, logLine{Outcome: "ok", Backend: backend.addr})
	waiting(0)
}

// TestWaitingHasAnEnd: by the time of queue=, by the client, and by the end of the gateway.
func TestWaitingHasAnEnd(t *testing.T) {
	beside(t)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp max-conns=1 queue=2,200ms\n:{1} -> %s mode=tcp max-conns=1 queue=2,1h", echoServer(t), echoServer(t)))
	for i := range 2 {
		exchange(t, b.dial(t, i), random(1, 100))
	}
	late := b.dial(t, 0)
	l := b.lineOf(t, late)
	l.expect(t, logLine{Level: "warn", Outcome: "limited", Refused: "queue"})
	if l.DurationMS < 200 || !strings.Contains(l.Error, "200ms") {
		t.Errorf("it does not say how long it waited: %s", l)
	}
	gone := b.dial(t, 1)
	until(t, "it waits", func() bool { return b.gateway.BackendCounts().Waiting == 1 })
	_ = gone.SetLinger(0)
	_ = gone.Close()
	b.lineOf(t, gone).expect(t, logLine{Outcome: "client_reset", Stage: "backend_queue"})
	last := b.dial(t, 1)
	until(t, "it waits", func() bool { return b.gateway.BackendCounts().Waiting == 1 })
	b.stop(t)
	b.lineOf(t, last).expect(t, logLine{Outcome: "drained"})
}

// TestWaitEndsWithTheLastBackend: whoever waits for room is told at once when nobody is left who could have some.
func TestWaitEndsWithTheLastBackend(t *testing.T) {
	addr := echoServer(t)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp max-conns=1 queue=2,1h", addr))
	exchange(t, b.dial(t, 0), random(1, 100))
	c := b.dial(t, 0)
	until(t, "it waits", func() bool { return b.gateway.BackendCounts().Waiting == 1 })
	if _, err := b.gateway.OrderBackend(addr, gateway.DrainBackend); err != nil {
		t.Fatal(err)
	}
	if l := b.lineOf(t, c); l.Outcome != "no_backend" || !strings.Contains(l.Error, "draining") {
		t.Errorf("line: %s", l)
	}
}

// TestDeadPoolAnswersAtOnce: once it's known that nobody is there clients don't wait to hear it, and the gateway itself
// finds out when somebody is there again.
func TestDeadPoolAnswersAtOnce(t *testing.T) {
	beside(t)
	backend := newMortal(t, sayer("alive"))
	backend.kill()
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp", backend.addr))
	b.turnedAway(t, 0).expect(t, logLine{Outcome: "connect_failed"})
	b.becomes(t, backend.addr, "ejected")
	l := b.turnedAway(t, 0)
	l.expect(t, logLine{Level: "warn", Outcome: "no_backend"})
	if !strings.Contains(l.Error, backend.addr+" is ejected: connects fail: connection refused") {
		t.Errorf("it doesn't say why: %s", l)
	}
	backend.live(t)
	b.becomes(t, backend.addr, "up")
	said, l := b.visit(t, 0)
	l.expect(t, logLine{Outcome: "ok"})
	if said != "alive" {
		t.Errorf("%q answered", said)
	}
}

// TestRestartIsBridged: a backend that is away for less time than the retries take costs no client anything.
func TestRestartIsBridged(t *testing.T) {
	beside(t)
	backend := newMortal(t, sayer("alive"))
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp retries=10 eject=off connect=30s", backend.addr))
	backend.kill()
	c := b.dial(t, 0)
	until(t, "it was tried in vain", func() bool { return b.backend(t, backend.addr).Failures > 1 })
	backend.live(t)
	if said, err := io.ReadAll(c); err != nil || string(said) != "alive" {
		t.Errorf("%q, %v", said, err)
	}
	_ = c.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "ok"})
}

// web is a backend that answers HTTP with a status that can be changed.
type web struct {
	*mortal
	status atomic.Int64
	asked  atomic.Pointer[string]
}

func newWeb(t testing.TB) *web {
	w := &web{}
	w.status.Store(200)
	w.mortal = newMortal(t, func(c *net.TCPConn) {
		line, err := bufio.NewReader(c).ReadString('\n')
		if err == nil {
			w.asked.Store(&line)
			fmt.Fprintf(c, "HTTP/1.1 %d Whatever\r\nConnection: close\r\n\r\n", w.status.Load())
		}
	})
	return w
}

// TestChecksTakeBackendsOutAndIn: of each kind, a backend that fails gets nothing until it's good again.
func TestChecksTakeBackendsOutAndIn(t *testing.T) {
	leaf := pki(t).leaves["edge-ecdsa"]
	certificate := tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: leaf.key}
	sink := func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }
	secured := func(c *net.TCPConn) {
		_ = tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificate}}).Handshake()
	}
	plain, http, secure := newMortal(t, sink), newWeb(t), newMortal(t, secured)
	backups := []string{serve(t, sink), newWeb(t).addr, serve(t, secured)} // they are checked, too
	const often = " mode=tcp every=100ms fall=2 rise=2 check="
	b := start(t, fmt.Sprintf(":{0} -> %s %s/backup%stcp\n:{1} -> %s %s/backup%shttp:/well?really\n:{2} -> %s %s/backup%stls",
		plain.addr, backups[0], often, http.addr, backups[1], often, secure.addr, backups[2], often))
	for _, c := range []struct {
		addr      string
		port      int
		fail, end func()
	}{
		{plain.addr, 0, plain.deafen, func() { plain.live(t) }},
		{http.addr, 1, func() { http.status.Store(503) }, func() { http.status.Store(399) }},
		{secure.addr, 2, secure.deafen, func() { secure.live(t) }},
	} {
		until(t, "it is checked", func() bool { i := b.backend(t, c.addr); return len(i.Checks) == 1 && !i.Checks[0].At.IsZero() })
		c.fail()
		b.becomes(t, c.addr, "down")
		client := b.dial(t, c.port)
		_ = client.Close()
		b.lineOf(t, client).expect(t, logLine{Outcome: "ok", Backend: backups[c.port]})
		if i := b.backend(t, c.addr); i.Checks[0].Up || i.Checks[0].Error == "" || !strings.HasPrefix(i.Reason, "check=") {
			t.Errorf("%+v", i)
		}
		c.end()
		b.becomes(t, c.addr, "up")
	}
	if p := http.asked.Load(); *p != "GET /well?really HTTP/1.1\r\n" {
		t.Errorf("it is asked for %q", *p)
	}
}

// TestChecksAskAsConnectionsDo: for the name of backend-name=, or the rule's with mode=pass, which many a backend wants to
// hear, and with the certificate of backend-cert=.
func TestChecksAskAsConnectionsDo(t *testing.T) {
	beside(t)
	a := pki(t)
	strict := &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12,
		GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if chi.ServerName != "edge.test" {
				return nil, fmt.Errorf("there is no %q here", chi.ServerName)
			}
			c := a.leaves["edge-ecdsa"].certificate(a)
			return &c, nil
		}}
	asked := make(chan string, 64)
	lenient := strict.Clone()
	lenient.ClientAuth = tls.NoClientCert
	backend := func(config *tls.Config) string {
		return serve(t, func(c *net.TCPConn) {
			s := tls.Server(c, config)
			if r, err := http.ReadRequest(bufio.NewReader(s)); err == nil {
				asked <- r.Host
				_, _ = io.WriteString(s, "HTTP/1.1 200 OK\r\n\r\n")
			}
		})
	}
	one, other, passed := backend(strict), backend(strict), backend(lenient)
	const how = " mode=tcp backend-ca=root backend-name=edge.test backend-cert=edge.test every=1h check="
	b := start(t, ":{0} -> tls://"+one+how+"tls\n:{1} -> tls://"+other+how+"http:/\n"+
		":{2} edge.test -> "+passed+" mode=pass check=tls every=1h", trusting(t))
	for _, addr := range []string{one, other, passed} {
		until(t, addr+" is checked", func() bool { return !b.backend(t, addr).Checks[0].At.IsZero() })
		if i := b.backend(t, addr); !i.Checks[0].Up {
			t.Errorf("%+v", i)
		}
	}
	if len(asked) > 0 {
		if host := <-asked; host != "edge.test" {
			t.Errorf("it is asked for %q", host)
		}
	}
}

// TestFlappingCheckChangesNothing: with fall=2 a check that fails every other time leaves the backend up.
func TestFlappingCheckChangesNothing(t *testing.T) {
	var n atomic.Int64
	flapping := newMortal(t, func(c *net.TCPConn) {
		_, _ = bufio.NewReader(c).ReadString('\n')
		fmt.Fprintf(c, "HTTP/1.0 %d \r\n\r\n", 200+303*(n.Add(1)%2-1)*-1)
	})
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp every=250ms fall=2 check=http:/", flapping.addr))
	until(t, "it was checked eight times", func() bool { return n.Load() > 8 })
	for _, l := range b.log.all() {
		if l.Backend == flapping.addr {
			t.Errorf("it changed its state: %s", l)
		}
	}
}

// TestFirstCheckDecides: a gateway that starts beside a dead backend doesn't send clients there for three rounds.
func TestFirstCheckDecides(t *testing.T) {
	beside(t)
	dead := refusing(t)
	b := start(t, fmt.Sprintf(":{0} -> %s %s mode=tcp check=tcp every=1h", dead, echoServer(t)))
	b.becomes(t, dead, "down")
}

// TestReasonIsThatOfTheState: a backend that was down before an operator drained it is down for the same reason when he is
// done with it.
func TestReasonIsThatOfTheState(t *testing.T) {
	beside(t)
	dead := refusing(t)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp check=tcp every=1h", dead))
	b.becomes(t, dead, "down")
	for _, s := range []struct {
		order         gateway.BackendOrder
		state, reason string
	}{{gateway.DrainBackend, "draining", "an operator has said so"}, {gateway.ReadyBackend, "down", "check=tcp: connection refused"}} {
		if _, err := b.gateway.OrderBackend(dead, s.order); err != nil {
			t.Fatal(err)
		}
		if i := b.backend(t, dead); i.State != s.state || i.Reason != s.reason {
			t.Errorf("%s because of %q, want %s because of %q", i.State, i.Reason, s.state, s.reason)
		}
	}
}

// TestSilentBackendFailsItsCheck, and the end of the gateway does not wait for an answer.
func TestSilentBackendFailsItsCheck(t *testing.T) {
	beside(t)
	silent := newMortal(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	patient := newMortal(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp check=http:/ every=200ms\n:{1} -> %s mode=tcp check=http:/ every=1h", silent.addr, patient.addr))
	b.becomes(t, silent.addr, "down")
	if why := b.backend(t, silent.addr).Reason; why != "check=http:/: no answer in time" {
		t.Errorf("it is down because %q", why)
	}
	until(t, "the other one is asked", func() bool { return patient.accepted.Load() > 0 })
	began := time.Now()
	b.stop(t)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the gateway took %v to end", took)
	}
}

// TestOneCheckForManyRules: however many rules name an address, it is asked as often as the most demanding one wants.
func TestOneCheckForManyRules(t *testing.T) {
	beside(t)
	backend := newMortal(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	var rules strings.Builder
	fmt.Fprintf(&rules, ":{0} -> %s mode=tcp check=tcp every=200ms\n", backend.addr)
	for i := range 50 {
		fmt.Fprintf(&rules, ":{%d} -> %s mode=tcp check=tcp every=1h\n", i+1, backend.addr)
	}
	began := time.Now()
	start(t, rules.String())
	until(t, "it was checked some times", func() bool { return backend.accepted.Load() >= 5 })
	if most := int64(time.Since(began)/(180*time.Millisecond)) + 2; backend.accepted.Load() > most {
		t.Errorf("it was checked %d times in %v", backend.accepted.Load(), time.Since(began))
	}
}

// TestChecksAreNoClients: where rules send a PROXY header checks send one too, that says so.
func TestChecksAreNoClients(t *testing.T) {
	beside(t)
	heard := make(chan string, 64)
	listen := func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		h, err := proxyproto.Read(r)
		if err != nil {
			heard <- err.Error()
			return
		}
		line, _ := r.ReadString('\n')
		heard <- fmt.Sprintf("%d %v %v %s", h.Version, h.Command.IsLocal(), h.TransportProtocol.IsUnspec(), line)
	}
	one, two := newMortal(t, listen), newMortal(t, listen)
	start(t, fmt.Sprintf(":{0} -> %s mode=tcp proxy=v1 check=http:/\n:{1} -> %s mode=tcp proxy=v2 check=http:/", one.addr, two.addr))
	got := []string{<-heard, <-heard}
	slices.Sort(got)
	if want := []string{"1 true true GET / HTTP/1.1\r\n", "2 true true GET / HTTP/1.1\r\n"}; !slices.Equal(got, want) {
		t.Errorf("the backends heard %q, want %q", got, want)
	}
}

// TestConnectionsOfADownBackendAreCut where the rule says so, and nowhere else.
func TestConnectionsOfADownBackendAreCut(t *testing.T) {
	backend := newMortal(t, echo)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp check=tcp every=100ms fall=2 on-down=cut\n:{1} -> %s mode=tcp", backend.addr, backend.addr))
	cut, kept := b.dial(t, 0), b.dial(t, 1)
	exchange(t, cut, random(1, 100))
	exchange(t, kept, random(1, 100))
	until(t, "it is checked", func() bool { i := b.backend(t, backend.addr); return !i.Checks[0].At.IsZero() })
	backend.deafen()
	b.becomes(t, backend.addr, "down")
	if _, err := cut.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
	l := b.lineOf(t, cut)
	l.expect(t, logLine{Outcome: "backend_reset", Backend: backend.addr})
	if !strings.Contains(l.Error, "is down: check=tcp: connection refused") {
		t.Errorf("it does not say why: %s", l)
	}
	exchange(t, kept, random(2, 100))
}

// TestWhoIsOnTheWayToADownBackendGoesElsewhere, where on-down=cut: whether it is to be greeted or to shake hands with it.
func TestWhoIsOnTheWayToADownBackendGoesElsewhere(t *testing.T) {
	deaf := newMortal(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	good := mailScript.serve(t)
	b := start(t, fmt.Sprintf(":{0} edge.test -> %[1]s %[2]s/backup starttls=smtp on-down=cut connect=1h\n:{1} -> tls://%[1]s %[2]s/backup mode=tcp on-down=cut connect=1h",
		deaf.addr, good), "LOOPS=1")
	asking, encrypting := b.dial(t, 0), b.dial(t, 1)
	say(t, asking, "STARTTLS\r\n", "220 edge.test ESMTP\r\n"+tlsAnswer)
	s := tls.Client(asking, clientConfig(t, nil))
	if err := s.Handshake(); err != nil {
		t.Fatal(err)
	}
	until(t, "both wait for it", func() bool {
		stages := map[string]int{}
		for _, c := range b.conns(t, 10) {
			stages[c.Stage]++
		}
		return stages["backend_starttls"] == 1 && stages["backend_tls"] == 1
	})
	if _, err := b.gateway.OrderBackend(deaf.addr, gateway.MaintainBackend); err != nil {
		t.Fatal(err)
	}
	say(t, s, "EHLO me\r\n", mailScript.answers["EHLO"])
	say(t, encrypting, "", mailScript.greeting)
	for _, c := range []net.Conn{asking, encrypting} {
		_ = c.Close()
		l := b.lineOf(t, c)
		if l.Backend != good || !strings.Contains(l.Error, "is maintenance: an operator has said so") {
			t.Errorf("it does not say why: %s", l)
		}
	}
	if n := b.backend(t, deaf.addr).Open; n != 0 {
		t.Errorf("%d connections are counted, and none is open", n)
	}
}

// TestSilentFamilyIsRaced: of a name with two families one that is silent costs a fraction of a second, and soon nothing.
func TestSilentFamilyIsRaced(t *testing.T) {
	silent := silentServer(t, "[::1]:0")
	_, port, _ := net.SplitHostPort(silent)
	l, err := net.Listen("tcp4", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, func(c net.Conn) { sayer("raced")(c.(*net.TCPConn)) })
	four := newMortal(t, sayer("four"))
	_, port4, _ := net.SplitHostPort(four.addr)
	z := newZone(t)
	z.set("both.test", 60, address(1))
	z.set("both.test", 60, &dnsmessage.AAAAResource{AAAA: netip.IPv6Loopback().As16()})
	b := start(t, fmt.Sprintf(":{0} -> both.test:%s mode=tcp connect=20s\n:{1} -> both.test:%s mode=tcp connect=20s", port, port4), "LOOPS=1", "RESOLVER="+z.addr)
	for range 3 {
		said, line := b.visit(t, 0)
		if said != "raced" || line.Backend != "127.0.0.1:"+port || line.ConnectMS < 250 || line.ConnectMS > 5000 {
			t.Errorf("%q answered: %s", said, line)
		}
		// On [::1] nobody listens there: the refusal is an answer, and the other address is tried at once.
		said, line = b.visit(t, 1)
		if said != "four" || line.Backend != four.addr || line.ConnectMS > 250 {
			t.Errorf("%q answered: %s", said, line)
		}
	}
	b.becomes(t, silent, "ejected")
	if _, line := b.visit(t, 0); line.ConnectMS > 250 {
		t.Errorf("it is still waited for: %s", line)
	}
	if n := b.backend(t, silent).Open + b.backend(t, "127.0.0.1:"+port).Open; n != 0 {
		t.Errorf("%d connections are counted, and none is open", n)
	}
}

// TestBackendsSeeTheSource that the rule names, and its ports.
func TestBackendsSeeTheSource(t *testing.T) {
	backend := serve(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, c.RemoteAddr().String())
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	})
	ports := freePorts(t, 8)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp source=127.0.0.2\n:{1} -> %s mode=tcp source=127.0.0.3:%d-%d\n:{2} -> %s mode=tcp source=::1",
		backend, backend, ports[0], ports[7], backend))
	if said, _ := b.visit(t, 0); !strings.HasPrefix(said, "127.0.0.2:") {
		t.Errorf("the backend sees %s", said)
	}
	for range 4 {
		said, _ := b.visit(t, 1)
		seen := netip.MustParseAddrPort(said)
		if seen.Addr().String() != "127.0.0.3" || !slices.Contains(ports, int(seen.Port())) {
			t.Errorf("the backend sees %s, want a port of %v", said, ports)
		}
	}
	l := b.turnedAway(t, 2)
	l.expect(t, logLine{Outcome: "connect_failed"})
	if !strings.Contains(l.Error, "not of one family") || b.backend(t, backend).Failures != 0 {
		t.Errorf("that is not the backend's fault: %s", l)
	}
}

// zone is a DNS server on loopback. What it knows of names that begin with "big" it says over TCP only.
type zone struct {
	addr    string
	mu      sync.Mutex
	records map[string][]dnsmessage.Resource // by name and type
}

func newZone(t testing.TB) *zone {
	t.Helper()
	c, err := net.ListenPacket("udp", refusing(t))
	if err != nil {
		t.Fatal(err)
	}
	z := &zone{addr: c.LocalAddr().String(), records: map[string][]dnsmessage.Resource{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if a := z.answer(b[:n], false); a != nil {
				_, _ = c.WriteTo(a, from)
			}
		}
	}()
	l, err := net.Listen("tcp", z.addr)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, func(c net.Conn) {
		for size := make([]byte, 2); ; {
			if _, err := io.ReadFull(c, size); err != nil {
				return
			}
			b := make([]byte, binary.BigEndian.Uint16(size))
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			a := z.answer(b, true)
			_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
		}
	})
	t.Cleanup(func() {
		_ = c.Close()
		<-done
	})
	return z
}

func (z *zone) answer(question []byte, overTCP bool) []byte {
	var m dnsmessage.Message
	if m.Unpack(question) != nil || len(m.Questions) != 1 {
		return nil
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	q := m.Questions[0]
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	m.Answers = z.records[strings.ToLower(q.Name.String())+q.Type.String()]
	if m.Answers == nil && z.records[strings.ToLower(q.Name.String())+dnsmessage.TypeA.String()] == nil {
		m.RCode = dnsmessage.RCodeNameError
	}
	if strings.HasPrefix(q.Name.String(), "big") && !overTCP {
		m.Truncated, m.Answers = true, nil
	}
	b, _ := m.Pack()
	return b
}

// set makes the records of a name and a type.
func (z *zone) set(name string, ttl uint32, bodies ...dnsmessage.ResourceBody) {
	n := dnsmessage.MustNewName(name + ".")
	var all []dnsmessage.Resource
	kind := dnsmessage.TypeA
	for _, b := range bodies {
		h := dnsmessage.ResourceHeader{Name: n, Class: dnsmessage.ClassINET, TTL: ttl}
		switch b.(type) {
		case *dnsmessage.AResource:
			h.Type = dnsmessage.TypeA
		case *dnsmessage.AAAAResource:
			h.Type = dnsmessage.TypeAAAA
		case *dnsmessage.SRVResource:
			h.Type = dnsmessage.TypeSRV
		}
		kind = h.Type
		all = append(all, dnsmessage.Resource{Header: h, Body: b})
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.records[name+"."+kind.String()] = all
}

func address(last byte) *dnsmessage.AResource {
	return &dnsmessage.AResource{A: [4]byte{127, 0, 0, last}}
}

// TestNamesLeadToAllTheirAddresses, and SRV records to their ports, by priority and weight. When a name leads elsewhere
// connections follow.
func TestNamesLeadToAllTheirAddresses(t *testing.T) {
	beside(t)
	port := freePorts(t, 1)[0]
	for i := byte(2); i <= 5; i++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:%d", i, port))
		if err != nil {
			t.Fatal(err)
		}
		serveOn(t, l, func(c net.Conn) { sayer(fmt.Sprint(i))(c.(*net.TCPConn)) })
	}
	z := newZone(t)
	z.set("app.test", 0, address(2), address(3))
	z.set("_x._tcp.app.test", 60,
		&dnsmessage.SRVResource{Priority: 1, Weight: 3, Port: uint16(port), Target: dnsmessage.MustNewName("four.test.")},
		&dnsmessage.SRVResource{Priority: 1, Weight: 1, Port: uint16(port), Target: dnsmessage.MustNewName("five.test.")},
		&dnsmessage.SRVResource{Priority: 2, Weight: 1, Port: uint16(port), Target: dnsmessage.MustNewName("app.test.")})
	z.set("four.test", 60, address(4))
	z.set("big.test", 0, address(2))
	z.set("five.test", 60, address(5))
	b := start(t, fmt.Sprintf(":{0} -> app.test:%d mode=tcp\n:{1} -> srv:_x._tcp.app.test mode=tcp\n:{2} -> nowhere.test:80 mode=tcp\n:{3} -> big.test:%d mode=tcp", port, port), "LOOPS=1", "RESOLVER="+z.addr)
	turns := func(i, n int) string {
		said := ""
		for range n {
			one, l := b.visit(t, i)
			l.expect(t, logLine{Outcome: "ok"})
			said += one
		}
		all := []byte(said)
		slices.Sort(all)
		return string(all)
	}
	if got := turns(0, 4); got != "2233" {
		t.Errorf("the name leads to %s", got)
	}
	if got := turns(1, 8); got != "44444455" {
		t.Errorf("the records lead to %s", got)
	}
	b.turnedAway(t, 2).expect(t, logLine{Outcome: "no_backend"})
	if got := turns(3, 2); got != "22" {
		t.Errorf("the name with a large answer leads to %s", got)
	}
	z.set("app.test", 0, address(5))
	z.set("big.test", 0, address(4))
	for _, name := range []string{"app.test", "big.test"} { // 5 s: a TTL of 0 is taken for that
		b.log.take(t, func(l logLine) bool {
			return l.Msg == "a backend's name leads elsewhere" && strings.Contains(l.text, `"name":"`+name+`"`)
		})
	}
	if got := turns(0, 4) + turns(3, 2); got != "555544" {
		t.Errorf("the names lead to %s now", got)
	}
}

// TestBackendOrdersOutliveAddresses: what an operator said of a host holds for ports that nobody has used yet.
func TestBackendOrdersOutliveAddresses(t *testing.T) {
	backend := newMortal(t, echo)
	_, port, _ := net.SplitHostPort(backend.addr)
	b := start(t, fmt.Sprintf(":{0-2} -> 127.0.0.1:= mode=tcp\n:{3} -> 127.0.0.1:%s mode=tcp", port))
	if _, err := b.gateway.OrderBackend("127.0.0.1", gateway.MaintainBackend); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{1, 3} {
		l := b.turnedAway(t, i)
		l.expect(t, logLine{Outcome: "no_backend"})
		if !strings.Contains(l.Error, "maintenance") {
			t.Errorf("it doesn't say why: %s", l)
		}
	}
}

// TestDeadPoolIsAnsweredInTLS: who speaks TLS is told by an alert.
func TestDeadPoolIsAnsweredInTLS(t *testing.T) {
	b := start(t, fmt.Sprintf(":{0} edge.test -> %s retries=0 eject=1", refusing(t)))
	for _, want := range []string{"connect_failed", "no_backend"} {
		c := b.dialTLS(t, 0, nil)
		var alert tls.AlertError
		if _, err := c.Read(make([]byte, 1)); !errors.As(err, &alert) && !strings.Contains(err.Error(), "internal error") {
			t.Errorf("the client sees %v", err)
		}
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: want, Alert: "internal_error"})
	}
}

// TestMultipathCarriesStreams both ways, spliced and through TLS.
func TestMultipathCarriesStreams(t *testing.T) {
	backend := echoServer(t)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp mptcp=on\n:{1} edge.test -> %s mptcp=on", backend, backend))
	plain, secure := b.dial(t, 0), b.dialTLS(t, 1, nil)
	exchange(t, plain, random(1, 4<<20))
	exchange(t, secure, random(2, 4<<20))
	for _, c := range []net.Conn{plain, secure} {
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", BytesUp: 4 << 20, BytesDown: 4 << 20})
	}
}

// TestReloadKeepsWhatIsKnownOfBackends: who is down stays down, who is drained stays drained, and counts go on.
func TestReloadKeepsWhatIsKnownOfBackends(t *testing.T) {
	dead, drained, living := refusing(t), echoServer(t), echoServer(t)
	rule := fmt.Sprintf(":{0} -> %s %s %s mode=tcp eject=1 retries=0", dead, drained, living)
	v := startLive(t, rule, "LOOPS=1")
	held := v.dial(t, 0) // the dead one is tried first, and is out
	exchange(t, held, random(1, 100))
	v.becomes(t, dead, "ejected")
	if _, err := v.gateway.OrderBackend(drained, gateway.DrainBackend); err != nil {
		t.Fatal(err)
	}
	before := v.backend(t, dead)
	v.reload(t, rule+" idle=1h")
	for addr, state := range map[string]string{dead: "ejected", drained: "draining", living: "up"} {
		if i := v.backend(t, addr); i.State != state {
			t.Errorf("after the reload %s is %s, want %s", addr, i.State, state)
		}
	}
	if i := v.backend(t, dead); i.Failures < before.Failures || !i.Since.Equal(before.Since) {
		t.Errorf("%+v became %+v", before, i)
	}
	if n := v.backend(t, drained).Open + v.backend(t, living).Open; n != 1 {
		t.Errorf("%d connections are counted, and one is open", n)
	}
	for range 3 {
		c := v.dial(t, 0)
		exchange(t, c, random(2, 100))
		_ = c.Close()
		v.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: living})
	}
	v.reload(t, ":{0} -> "+living+" mode=tcp")
	if _, total := v.gateway.Backends(10); total != 1 {
		t.Errorf("%d backends, and the map has one", total)
	}
	exchange(t, held, random(3, 100))
}

// TestReloadKeepsWhatIsKnownOfRanges: a range's backends are known once somebody has asked for them, and a reload changes
// nothing about that.
func TestReloadKeepsWhatIsKnownOfRanges(t *testing.T) {
	backend := echoServer(t)
	at := netip.MustParseAddrPort(backend)
	rule := fmt.Sprintf(":{0} -> %s mode=tcp\n:{1-2} -> 127.0.0.1:%d-%d mode=tcp", refusing(t), at.Port(), at.Port()+1)
	v := startLive(t, rule)
	rule = strings.Replace(rule, "{1-2}", fmt.Sprintf("%d-%d", v.ports[1], v.ports[2]), 1)
	c := v.dial(t, 1)
	exchange(t, c, random(1, 100))
	_ = c.Close()
	v.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: backend})
	if _, err := v.gateway.OrderBackend(backend, gateway.DrainBackend); err != nil {
		t.Fatal(err)
	}
	before := v.backend(t, backend)
	v.reload(t, rule+" idle=1h")
	if i := v.backend(t, backend); i.State != "draining" || i.Total != 1 || !i.Since.Equal(before.Since) {
		t.Errorf("%+v became %+v", before, i)
	}
	if _, err := v.gateway.OrderBackend(backend, gateway.ReadyBackend); err != nil {
		t.Error(err)
	}
	c = v.dial(t, 1)
	exchange(t, c, random(2, 100))
	_ = c.Close()
	v.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: backend})
	v.reload(t, rule[:strings.Index(rule, "\n")])
	if _, total := v.gateway.Backends(10); total != 1 {
		t.Errorf("%d backends, and the map has one", total)
	}
}

// TestBackendOrdersComeBeforeTheFirstClient: of a range neither a port nor the host has to be in use, and an address is
// the same however it is written.
func TestBackendOrdersComeBeforeTheFirstClient(t *testing.T) {
	at := netip.MustParseAddrPort(echoServer(t))
	b := start(t, fmt.Sprintf(":{0-1} -> 127.0.0.1:%d-%d mode=tcp eject=off", at.Port(), at.Port()+1))
	order := func(word string, o gateway.BackendOrder, want string) {
		t.Helper()
		names, err := b.gateway.OrderBackend(word, o)
		if err != nil || len(names) != 1 || names[0] != want {
			t.Errorf("%s %s: %q, %v, want %q", o, word, names, err, want)
		}
	}
	unused := fmt.Sprintf("127.0.0.1:%d", at.Port()+1)
	order("[127.0.0.1]", gateway.MaintainBackend, "127.0.0.1")
	b.turnedAway(t, 0).expect(t, logLine{Outcome: "no_backend"})
	order("::ffff:127.0.0.1", gateway.ReadyBackend, at.String())
	c := b.dial(t, 0)
	exchange(t, c, random(1, 100))
	order(unused, gateway.DrainBackend, unused)
	if l := b.turnedAway(t, 1); l.Outcome != "no_backend" || l.Error != unused+" is draining: an operator has said so" {
		t.Errorf("it doesn't say why: %s", l)
	}
	for _, word := range []string{"127.0.0.2", fmt.Sprintf("127.0.0.1:%d", at.Port()+2), fmt.Sprintf("127.0.0.1:%d", at.Port()-1), ""} {
		if names, err := b.gateway.OrderBackend(word, gateway.DrainBackend); err == nil {
			t.Errorf("%q is taken for %q", word, names)
		}
	}
}

// TestBothFamiliesAreBlamedByName: the error says of each address what came of it.
func TestBothFamiliesAreBlamedByName(t *testing.T) {
	silent := silentServer(t, "[::1]:0")
	_, port, _ := net.SplitHostPort(silent)
	other := silentServer(t, "127.0.0.1:"+port)
	z := newZone(t)
	z.set("both.test", 60, address(1))
	z.set("both.test", 60, &dnsmessage.AAAAResource{AAAA: netip.IPv6Loopback().As16()})
	b := start(t, fmt.Sprintf(":{0} -> both.test:%s mode=tcp connect=1s retries=0", port), "RESOLVER="+z.addr)
	l := b.turnedAway(t, 0)
	l.expect(t, logLine{Outcome: "connect_failed"})
	for _, addr := range []string{silent, other} {
		if strings.Count(l.Error, addr+": no answer in time") != 1 {
			t.Errorf("it doesn't say once what came of %s: %s", addr, l.Error)
		}
	}
}

// TestDNSDoesNotLeadToLoopback: whoever answers for a backend's name must not have clients connected to what listens on this
// machine only, unless the map says so. The line of the connection and the log say what is refused.
func TestDNSDoesNotLeadToLoopback(t *testing.T) {
	backend := echoServer(t)
	_, port, _ := net.SplitHostPort(backend)
	z := newZone(t)
	z.set("app.example", 60, address(1))
	b := start(t, fmt.Sprintf(":{0} -> app.example:%s mode=tcp\n:{1} -> app.example:%s mode=tcp resolve-to=any", port, port), "RESOLVER="+z.addr)
	l := b.turnedAway(t, 0)
	l.expect(t, logLine{Outcome: "no_backend"})
	if !strings.Contains(l.Error, "DNS gives 127.0.0.1 for app.example, which resolve-to=network refuses") {
		t.Errorf("the line does not say why: %s", l)
	}
	b.log.take(t, func(l logLine) bool {
		return l.Level == "warn" && strings.Contains(l.Msg, "write resolve-to=any") && strings.Contains(l.text, `"addresses":"127.0.0.1"`)
	})
	exchange(t, b.dial(t, 1), []byte("the map says so"))
}
