// SPDX-License-Identifier: Apache-2.0

package gateway

import "math/bits"

const (
	// A tick bounds how late a timeout may be. An eighth of a second is nothing beside the shortest timeout that
	// makes sense (a second), and lets a loop with nothing to do sleep for as long.
	tickShift = 27 // 2^27 ns: 134 ms
	// 256 slots: 34 s ahead. A deadline beyond that is put into the last slot and moves on when its turn comes.
	wheelSlots = 256
)

// timer is a conn's place in its loop's wheel. A conn has one: its stage decides what the deadline means.
type timer struct {
	next, prev *conn
	deadline   int64 // when it is due, in loop nanoseconds; 0: not set
	slot       int16 // 1 + the slot it hangs in; 0: none
}

// wheel holds the deadlines of a loop's connections. Pushing a deadline further away, which happens at every byte
// that moves, is a store: the entry stays where it is until its slot comes round, and moves on then.
type wheel struct {
	slots [wheelSlots]*conn
	used  [wheelSlots / 64]uint64 // a bit a slot: whether anything hangs there
	done  int64                   // the tick up to which everything is fired, but for what is left in its slot
}

// set makes c due at deadline (loop nanoseconds).
func (w *wheel) set(c *conn, deadline int64) {
	t := &c.timer
	if t.slot != 0 && t.deadline <= deadline {
		t.deadline = deadline
		return
	}
	w.clear(c)
	t.deadline = deadline
	w.link(c)
}

// link hangs c into the slot of its deadline, the last one if that is further than the wheel reaches.
func (w *wheel) link(c *conn) {
	tick := max(c.timer.deadline>>tickShift, w.done) + 1
	tick = min(tick, w.done+wheelSlots-1)
	slot := int(tick % wheelSlots)
	t := &c.timer
	t.prev, t.next, t.slot = nil, w.slots[slot], int16(slot+1)
	if t.next != nil {
		t.next.timer.prev = c
	}
	w.slots[slot] = c
	w.used[slot/64] |= 1 << (slot % 64)
}

// clear takes c out of the wheel.
func (w *wheel) clear(c *conn) {
	t := &c.timer
	if t.slot == 0 {
		return
	}
	slot := int(t.slot - 1)
	if t.prev != nil {
		t.prev.timer.next = t.next
	} else {
		w.slots[slot] = t.next
	}
	if t.next != nil {
		t.next.timer.prev = t.prev
	}
	if w.slots[slot] == nil {
		w.used[slot/64] &^= 1 << (slot % 64)
	}
	t.prev, t.next, t.slot = nil, nil, 0
}

// take takes a conn out of the wheel whose deadline has passed at now; nil: there is none. Between two calls
// anything may happen to the wheel.
func (w *wheel) take(now int64) *conn {
	for tick := now >> tickShift; ; w.done++ {
		slot := int(w.done % wheelSlots)
		for c := w.slots[slot]; c != nil; c = w.slots[slot] {
			w.clear(c)
			if c.timer.deadline <= now {
				return c
			}
			w.link(c) // it was pushed further away, or was beyond the wheel's reach
		}
		if w.done >= tick {
			return nil
		}
		if w.empty() {
			w.done = tick
			return nil
		}
	}
}

// whole says whether everything up to done is fired.
func (w *wheel) whole() bool { return w.slots[w.done%wheelSlots] == nil }

func (w *wheel) empty() bool { return w.used == [wheelSlots / 64]uint64{} }

// next is when the wheel has to be looked at again, in loop nanoseconds; 0: never.
func (w *wheel) next() int64 {
	if !w.whole() {
		return w.done << tickShift
	}
	first := int(w.done+1) % wheelSlots
	for i := range len(w.used) + 1 {
		word := (first/64 + i) % len(w.used)
		b := w.used[word]
		switch i {
		case 0:
			b = b >> (first % 64) << (first % 64)
		case len(w.used):
			b &= 1<<(first%64) - 1
		}
		if b == 0 {
			continue
		}
		slot := word*64 + bits.TrailingZeros64(b)
		ahead := int64(slot-first+wheelSlots) % wheelSlots
		return (w.done + 1 + ahead) << tickShift
	}
	return 0
}
