// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTurnsAreFair compares turns with its definition, over random histories: the next place goes to who has the fewest, then to
// whose last turn is longest ago, then to who came first; the longest queue loses its oldest; who has the most is known.
func TestTurnsAreFair(t *testing.T) {
	type item struct{ owner, n int }
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		q := newTurns(func(x item) int { return x.owner })
		waiting, holding, held := map[int][]item{}, map[int][]item{}, map[int]int{}
		size := map[item]int{}
		for n := range 300 {
			switch x := (item{r.IntN(8), n}); r.IntN(6) {
			case 0, 1, 2:
				q.push(x)
				waiting[x.owner] = append(waiting[x.owner], x)
			case 3:
				if q.n.Load() == 0 {
					continue
				}
				fewest := q.fewest()
				for o, w := range waiting {
					if len(w) > 0 && held[o] < fewest {
						t.Fatalf("seed %d: %d has %d places, and fewest is %d", seed, o, held[o], fewest)
					}
				}
				got := q.take()
				if waiting[got.owner][0] != got || held[got.owner] != fewest {
					t.Fatalf("seed %d: %v was taken, of %v", seed, got, waiting)
				}
				waiting[got.owner] = waiting[got.owner][1:]
				holding[got.owner] = append(holding[got.owner], got)
				size[got] = 1 + r.IntN(2)
				held[got.owner] += size[got]
				if size[got] > 1 {
					q.enlarge(got, 1)
				}
			case 4:
				if all := holding[x.owner]; len(all) > 0 {
					gone := all[r.IntN(len(all))]
					q.leave(gone, size[gone])
					held[x.owner] -= size[gone]
					holding[x.owner] = slices.DeleteFunc(all, func(y item) bool { return y == gone })
				}
			case 5:
				if all := waiting[x.owner]; len(all) > 0 && r.IntN(2) == 0 {
					gone := all[r.IntN(len(all))]
					q.remove(gone)
					waiting[x.owner] = slices.DeleteFunc(slices.Clone(all), func(y item) bool { return y == gone })
				} else if q.n.Load() > 0 {
					got := q.drop()
					for o, w := range waiting {
						if len(w) > len(waiting[got.owner]) || o == got.owner && w[0] != got {
							t.Fatalf("seed %d: %v was dropped, of %v", seed, got, waiting)
						}
					}
					waiting[got.owner] = waiting[got.owner][1:]
				}
			}
			total, most, owners := 0, 0, 0
			for o := range 8 {
				total += held[o]
				most = max(most, held[o])
				if len(waiting[o])+len(holding[o]) > 0 {
					owners++
				}
			}
			if richest := q.richest(); most > 0 && (held[richest[0].owner] != most || !slices.Equal(richest, holding[richest[0].owner])) {
				t.Fatalf("seed %d: the richest are %v, of %v", seed, richest, holding)
			}
			if int(q.held.Load()) != total || len(q.owners) != owners {
				t.Fatalf("seed %d: %d places and %d owners, want %d and %d", seed, q.held.Load(), len(q.owners), total, owners)
			}
		}
	}
}

// TestPatienceShrinks: a client may be silent for the whole timeout while half of the places are free, and never for less than
// a client of a slow network needs.
func TestPatienceShrinks(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp", "HANDSHAKES=100", "HELLO_TIMEOUT=10s")
	for _, want := range []struct {
		held     int32
		patience time.Duration
	}{{0, 10 * time.Second}, {50, 10 * time.Second}, {75, 5750 * time.Millisecond}, {100, 1500 * time.Millisecond}, {130, 1500 * time.Millisecond}} {
		s.loop.queue.held.Store(want.held)
		if got := time.Duration(s.loop.patience()); got != want.patience {
			t.Errorf("with %d of 100 places taken: %v, want %v", want.held, got, want.patience)
		}
	}
	for _, timeout := range []string{"1s", "1ms"} {
		s = newStill(t, ":1 -> 127.0.0.1:2 mode=tcp", "HANDSHAKES=1", "HELLO_TIMEOUT="+timeout)
		s.loop.queue.held.Store(1)
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
	for range crowd - 1 {
		arrive("192.0.2.66:66")
	}
	if got := available(dropped); string(got) != "\x15\x03\x03\x00\x02\x02\x50" { // internal_error
		t.Errorf("one that was dropped got %x", got)
	}
	network := []*conn{arrive("[2001:db8::1]:1"), arrive("[2001:db8::2]:1")} // one /64
	for range crowd {
		arrive("192.0.2.66:66")
	}
	last := arrive("192.0.2.2:2")
	if n := s.loop.queue.n.Load(); n != room {
		t.Fatalf("%d wait, want %d", n, room)
	}
	if n := s.loop.counters.refused[refusedHandshakeAll].Load(); n != 2*crowd+4-room {
		t.Errorf("%d were dropped", n)
	}
	crowded := s.loop.queue.owners[netip.MustParsePrefix("192.0.2.66/32")]
	if len(crowded.waiting) != room-4 {
		t.Errorf("the crowded address has %d in the queue, want %d", len(crowded.waiting), room-4)
	}
	for i, want := range []*conn{first, crowded.waiting[0], network[0], last, crowded.waiting[1], network[1]} {
		if got := s.loop.queue.take(); got != want {
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
	if s.loop.queue.n.Load() != 1 || s.loop.queue.take() != stays {
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
	s.encryptQueue.push(c)
	s.startHandshakes()
	if n, held := s.encryptQueue.n.Load(), s.encryptQueue.held.Load(); c.stage != over || n != 0 || held != 0 || len(s.encryptQueue.owners) != 0 {
		t.Errorf("at %v: %d wait, and %d places are taken", c.stage, n, held)
	}
}
