// SPDX-License-Identifier: Apache-2.0

package gateway

import "math"

const (
	// Streams with a bandwidth go on in ticks of 2^24 ns, 16.8 ms: sixty times a second is smooth, and what a loop spends
	// on waking does not grow with how many wait.
	paceShift = 24
	// 64 slots reach a second ahead. One that waits longer is woken then, and waits on.
	paceSlots = 64

	noEnd = math.MaxInt
)

// pacer wakes the streams that have used up their bandwidth (bandwidth=), and resets that wait for what came before them. While
// there is none it costs nothing.
type pacer struct {
	slots [paceSlots][]paused
	n     int
	done  int64 // the tick up to which everything is woken
}

// paused is a direction of a connection that waits.
type paused struct {
	c *conn
	f *flow
}

// pause says whether a flow waits for its bandwidth.
type pause uint8

const (
	noPause pause = iota
	waiting
	woken // it has waited, and its source had more all the time
)

// moveAtPace is move for a rule with a bandwidth: as much as there is room for, and when there's none the pacer goes on
// later. It returns -1 then. What is read is counted, so that records, pipes and copies count alike; a piece that is
// larger than the room (a record opens only whole) is paid for by waiting longer.
func (t transfer) moveAtPace() int {
	if t.pause == waiting {
		return -1
	}
	l, pace := t.c.loop, t.c.route.pace
	room := pace.Room(&t.paid, l.now, t.pause == woken)
	if room == 0 {
		t.pause = waiting
		l.counters.paused.Add(1)
		l.pacer.add(paused{t.c, t.flow}, pace.Due(t.paid))
		return -1
	}
	before := t.moved
	l.most = min(l.most, room)
	n := t.move()
	pace.Spend(&t.paid, int(t.moved-before))
	if !t.from.readable {
		t.pause = noPause
	}
	return n
}

// paced says whether what is to move next waits for its bandwidth: then the pacer goes on with it, and the silence is ours.
func (c *conn) paced() bool { return c.up.pause == waiting || c.down.pause == waiting }

// add has a stream woken when it is due (loop nanoseconds).
func (p *pacer) add(w paused, due int64) {
	tick := min(max(due>>paceShift, p.done)+1, p.done+paceSlots-1)
	p.slots[tick%paceSlots] = append(p.slots[tick%paceSlots], w)
	p.n++
}

// fire wakes whoever is due at now.
func (p *pacer) fire(now int64) {
	for tick := now >> paceShift; p.done < tick; {
		if p.n == 0 {
			p.done = tick
			return
		}
		p.done++
		slot := &p.slots[p.done%paceSlots]
		for i, w := range *slot {
			(*slot)[i] = paused{}
			p.n--
			w.f.pause = woken
			w.c.advance() // whatever it does meanwhile; one that is over has nothing more to do
		}
		*slot = (*slot)[:0] // nothing was added to it meanwhile: add looks ahead, but never a whole round
	}
}

// next is when fire has something to do, in loop nanoseconds; 0: never.
func (p *pacer) next() int64 {
	if p.n == 0 {
		return 0
	}
	tick := p.done + 1
	for len(p.slots[tick%paceSlots]) == 0 {
		tick++
	}
	return tick << paceShift
}
