// SPDX-License-Identifier: Apache-2.0

package gateway

// sockets are those that a loop watches, by slot. An event of epoll carries the slot and the generation of its socket, so
// that it is found without a search. The table is as long as the loop has had sockets at once. The number of a
// descriptor would not do for the slot: it is the process's, and each loop's table would be as long as all
// descriptors of all loops.
type sockets struct {
	slots []*socket
	free  []uint32 // slots that nobody has
	gens  uint32   // the last generation that was given
}

// enlist gives a socket a slot, and a generation that is not 0.
func (t *sockets) enlist(s *socket) {
	if t.gens++; t.gens == 0 {
		t.gens = 1
	}
	s.gen = t.gens
	if n := len(t.free); n > 0 {
		s.slot, t.free = t.free[n-1], t.free[:n-1]
		t.slots[s.slot] = s
		return
	}
	s.slot = uint32(len(t.slots))
	t.slots = append(t.slots, s)
}

// strike takes a socket out of the table; one that is not in it stays out.
func (t *sockets) strike(s *socket) {
	if s.gen == 0 {
		return
	}
	t.slots[s.slot] = nil
	t.free = append(t.free, s.slot)
	s.gen = 0
}

// at is the socket that an event is about. An event for a socket that was closed in this very round finds another
// generation in the slot, or nobody: then it is nil.
func (t *sockets) at(slot int32, gen uint32) *socket {
	if s := t.slots[slot]; s != nil && s.gen == gen {
		return s
	}
	return nil
}

// replace has the slot of a socket that was copied lead to the copy.
func (t *sockets) replace(s *socket) { t.slots[s.slot] = s }

// watched is how many sockets are in the table.
func (t *sockets) watched() int { return len(t.slots) - len(t.free) }
