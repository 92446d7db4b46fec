// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSocketTableIsAsLongAsTheLoopsSockets: what other loops, the admin and files have open takes no room in it.
func TestSocketTableIsAsLongAsTheLoopsSockets(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	const high = 900 // below the usual limit of 1,024
	ours, theirs := pair(t)
	defer unix.Close(theirs)
	fd, err := unix.FcntlInt(uintptr(ours), unix.F_DUPFD_CLOEXEC, high)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(int(ours))
	x := &socket{fd: int32(fd)}
	if err := s.loop.watch(x); err != nil {
		t.Fatal(err)
	}
	if n := len(s.loop.socks.slots); n > 1 {
		t.Errorf("a table of %d slots for one socket, whose descriptor is %d", n, fd)
	}
	s.loop.closeSocket(x)
	if n := s.loop.socks.watched(); n != 0 {
		t.Errorf("%d sockets are watched after the only one was closed", n)
	}
}

// TestEventsFindTheirSocket: against a map, whatever was closed and took the slot meanwhile, moved or failed to begin.
func TestEventsFindTheirSocket(t *testing.T) {
	type event struct {
		slot int32
		gen  uint32
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var table sockets
	table.gens = 1<<32 - 100 // generations begin again in the middle of it
	owners := map[event]*socket{}
	var seen []event
	for range 10_000 {
		switch n := rng.IntN(5); {
		case n < 2 || len(owners) == 0:
			s := &socket{}
			table.enlist(s)
			e := event{int32(s.slot), s.gen}
			owners[e], seen = s, append(seen, e)
		case n == 2:
			for e, s := range owners {
				moved := *s
				table.replace(&moved)
				owners[e] = &moved
				break
			}
		default:
			for e, s := range owners {
				table.strike(s)
				table.strike(s) // closing twice is no news
				delete(owners, e)
				break
			}
		}
		e := seen[rng.IntN(len(seen))]
		if got := table.at(e.slot, e.gen); got != owners[e] {
			t.Fatalf("an event of %+v found %p, want %p", e, got, owners[e])
		}
		if table.watched() != len(owners) {
			t.Fatalf("%d are watched, want %d", table.watched(), len(owners))
		}
	}
}
