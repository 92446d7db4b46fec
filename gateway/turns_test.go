// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPatienceShrinks: a client may be silent for the whole timeout while half of the places are free, and never for less than
// a client of a slow network needs.
func TestPatienceShrinks(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp", "HANDSHAKES=100", "HELLO_TIMEOUT=10s")
	for _, want := range []struct {
		held     int32
		patience time.Duration
	}{{0, 10 * time.Second}, {50, 10 * time.Second}, {75, 5750 * time.Millisecond}, {100, 1500 * time.Millisecond}, {130, 1500 * time.Millisecond}} {
		s.loop.queue.Held.Store(want.held)
		if got := time.Duration(s.loop.patience()); got != want.patience {
			t.Errorf("with %d of 100 places taken: %v, want %v", want.held, got, want.patience)
		}
	}
	for _, timeout := range []string{"1s", "1ms"} {
		s = newStill(t, ":1 -> 127.0.0.1:2 mode=tcp", "HANDSHAKES=1", "HELLO_TIMEOUT="+timeout)
		s.loop.queue.Held.Store(1)
		if got := time.Duration(s.loop.patience()); got.String() != timeout {
			t.Errorf("%v, want %s", got, timeout)
		}
	}
}

// TestCrowdedSourceLosesItsHellos: while no handshake can begin, hellos of one address do not push out those of others, and the
// others are next.
func TestCrowdedSourceLosesItsHellos(t *testing.T) {
	const room, crowd = 16, 200
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp", "HANDSHAKES=16")
	s.loop.active.Store(computing)
	arrive := func(source string) *conn { c, _ := s.queued(t, source); return c }
	first := arrive("192.0.2.1:1")
	_, dropped := s.queued(t, "192.0.2.66:66")
	var crowded []*conn
	for range crowd - 1 {
		crowded = append(crowded, arrive("192.0.2.66:66"))
	}
	if got := available(dropped); string(got) != "\x15\x03\x03\x00\x02\x02\x50" { // internal_error
		t.Errorf("one that was dropped got %x", got)
	}
	network := []*conn{arrive("[2001:db8::1]:1"), arrive("[2001:db8::2]:1")} // one /64
	for range crowd {
		crowded = append(crowded, arrive("192.0.2.66:66"))
	}
	last := arrive("192.0.2.2:2")
	if n := s.loop.queue.Waiting.Load(); n != room {
		t.Fatalf("%d wait, want %d", n, room)
	}
	if n := s.loop.counters.refused[refusedHandshakeAll].Load(); n != 2*crowd+4-room {
		t.Errorf("%d were dropped", n)
	}
	crowded = crowded[len(crowded)-(room-4):]
	if oldest, n := s.loop.queue.Longest(); oldest != crowded[0] || n != room-4 {
		t.Errorf("the crowded address has %d in the queue, want %d", n, room-4)
	}
	for i, want := range []*conn{first, crowded[0], network[0], last, crowded[1], network[1]} {
		if got := s.loop.queue.Take(); got != want {
			t.Errorf("turn %d: %v", i, got.report.source)
		}
	}
}

// queued is a client whose hello waits for its turn, and the client's end of it.
func (s *still) queued(t testing.TB, source string) (*conn, int) {
	c, client := s.accept(t)
	t.Cleanup(func() {
		_ = unix.Close(client)
		if c.stage != over {
			c.finish(OK, "")
		}
	})
	c.report.source = netip.MustParseAddrPort(source)
	c.terms, c.stage = &terms{}, waitingTurn
	s.loop.queueHello(c)
	return c, client
}

// TestClientThatHasLeftHasNoTurn: a reset takes the hello out of the queue.
func TestClientThatHasLeftHasNoTurn(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	s.loop.active.Store(computing)
	left, _ := s.queued(t, "192.0.2.1:1")
	stays, _ := s.queued(t, "192.0.2.1:2")
	left.ready(&left.client, unix.EPOLLERR|unix.EPOLLHUP)
	left.client.failed = unix.ECONNRESET // socketpairs have no reset
	left.advance()
	if r := &left.report; left.stage != over || r.outcome != ClientReset || r.stage != waitingTurn {
		t.Errorf("it ends with %v at %v", r.outcome, r.stage)
	}
	if s.loop.queue.Waiting.Load() != 1 || s.loop.queue.Take() != stays {
		t.Error("the other one has no turn")
	}
}

// TestDeliveryIsLookedAtSoon: a reset that waits for what came before it goes when that has arrived, not when the wheel turns.
func TestDeliveryIsLookedAtSoon(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	c, client := s.accept(t)
	defer unix.Close(client)
	ours, backend := pair(t)
	defer unix.Close(backend)
	c.backend = socket{owner: c, fd: ours, writable: true}
	c.enter(s.listener.rules.plain)
	if _, err := unix.Write(int(c.client.fd), make([]byte, 1000)); err != nil { // the client has not taken it
		t.Fatal(err)
	}
	c.stage = relaying
	c.stage = c.startReset(BackendReset, "reset")
	c.advance()
	for range 10 { // events that come meanwhile
		c.ready(&c.client, unix.EPOLLOUT)
	}
	if c.stage != resetting || s.loop.pacer.n != 1 {
		t.Fatalf("stage %v, %d looks at it", c.stage, s.loop.pacer.n)
	}
	if due := time.Duration(s.loop.nextDue() - s.loop.now); due > 40*time.Millisecond {
		t.Errorf("it is looked at again in %v", due)
	}
	available(client)
	s.loop.now += int64(40 * time.Millisecond)
	s.loop.pacer.fire(s.loop.now)
	if c.stage != over || c.report.outcome != BackendReset {
		t.Errorf("40 ms after it has arrived: %v", c.stage)
	}
}

// TestHeaderThatCannotBeWrittenTakesNoPlace: a connection that ends before its handshake with a server has begun leaves the queue
// and takes no place.
func TestHeaderThatCannotBeWrittenTakesNoPlace(t *testing.T) {
	s := newStill(t, ":1 -> tls://127.0.0.1:2 mode=tcp proxy=v2 backend-verify=off")
	c, client := s.accept(t)
	defer unix.Close(client)
	c.enter(s.listener.rules.plain)
	c.dial = &dialling{backend: c.route.backends[0], server: newServer(netip.MustParseAddrPort("127.0.0.1:2"), ""), choices: c.route.choices.Load()}
	c.dial.rival = socket{fd: -1, owner: c}
	c.report.target = netip.MustParseAddrPort("127.0.0.1:1")
	c.report.sni = string(make([]byte, 1<<17)) // no header has room for it
	c.stage = waitingEncryption
	s.encryptQueue.Push(c)
	s.startHandshakes()
	if n, held := s.encryptQueue.Waiting.Load(), s.encryptQueue.Held.Load(); c.stage != over || n != 0 || held != 0 {
		t.Errorf("at %v: %d wait, and %d places are taken", c.stage, n, held)
	}
}
