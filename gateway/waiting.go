// SPDX-License-Identifier: Apache-2.0

package gateway

import "time"

// Connections for which no backend has room (max-conns=) wait in a queue of their rule (queue=). Each loop has its own
// part of it, oldest first; the bound is the rule's. A loop where a connection to a backend ends calls the loops that
// have somebody waiting, and otherwise pays a load of an atomic for it.

// waitForRoom queues the connection, or turns it away when enough are waiting.
func (c *conn) waitForRoom() stage {
	l, r, d := c.loop, c.route, c.dial
	if !d.waited {
		if r.queue.Len == 0 {
			return c.crowdedOut(refusalTexts[refusedQueue])
		}
		if r.waiting.Add(1) > int64(r.queue.Len) {
			r.waiting.Add(-1)
			return c.crowdedOut(refusalTexts[refusedQueue] + ", and queue= of them wait already")
		}
		d.waitUntil = l.now + int64(or(r.queue.Time, r.connect))
	} else {
		r.waiting.Add(1)
	}
	l.queueUp(c, d.waited)
	d.waited = true
	c.to(waitingForRoom)
	c.setDeadline(d.waitUntil - l.now)
	return waitingForRoom
}

// queueUp puts c into the queue of its route, at the front if it was there before. A connection may have ended since
// this one looked for room, and not have seen it waiting: so the queue is looked at once more.
func (l *loop) queueUp(c *conn, front bool) {
	q := l.queues[c.route]
	if q == nil {
		q = &turnQueue{}
		l.queues[c.route] = q
	}
	if q.push(c); front {
		copy(q.waiting[1:], q.waiting)
		q.waiting[0] = c
	}
	l.waiting.Add(1)
	l.gw.waiting.Add(1)
	l.call()
}

// leaveQueue takes c out of the queue.
func (l *loop) leaveQueue(c *conn) {
	l.queues[c.route].remove(c)
	l.left(c.route)
}

// left counts one that is not waiting any more.
func (l *loop) left(r *route) {
	r.waiting.Add(-1)
	l.waiting.Add(-1)
	l.gw.waiting.Add(-1)
	if len(l.queues[r].waiting) == 0 {
		delete(l.queues, r)
	}
}

// awaitRoom waits for its turn. The client may leave meanwhile.
func (c *conn) awaitRoom() stage {
	if c.client.failed != 0 {
		return c.finish(ClientReset, "reset while it waited for a backend with room")
	}
	return waitingForRoom
}

// leave counts a connection to a server that is over, or was not made.
func (c *conn) leave() {
	s := c.server
	if s == nil {
		return
	}
	c.server = nil
	s.open.Add(-1)
	if c.loop.gw.waiting.Load() > 0 {
		c.loop.gw.callWaiting()
	}
}

// callWaiting has the loops look whether those who wait there can go on.
func (g *Gateway) callWaiting() {
	for _, l := range g.loops {
		if l.waiting.Load() > 0 {
			l.call()
		}
	}
}

// call has the loop serve its queues, in its turn; it's called once for however many reasons there are.
func (l *loop) call() {
	if !l.called.Swap(true) {
		l.post(l.serveQueues)
	}
}

// serveQueues lets those go on for whom there is room now.
func (l *loop) serveQueues() {
	l.called.Store(false)
	for _, q := range l.queues {
		for len(q.waiting) > 0 && q.waiting[0].searchAgain(q) {
		}
	}
}

// searchAgain lets the first of a queue go on, if there may be room for it. It says whether the next one is worth a look.
func (c *conn) searchAgain(q *turnQueue) (next bool) {
	defer c.rescue()
	if !c.worthTrying() {
		return false
	}
	l, r := c.loop, c.route
	q.pop()
	l.left(r)
	c.dial.until = l.now + int64(r.connect)
	c.to(c.search())
	if c.stage == waitingForRoom {
		return false // somebody was quicker; it's at the front again
	}
	c.advance()
	return true
}

// worthTrying says whether a search would end otherwise than in the queue again: there is room, or nobody is left who
// could ever have some.
func (c *conn) worthTrying() bool {
	full := false
	from := c.route.choices.Load()
	for _, spots := range [...][]spot{from.primary, from.backup} {
		for i := range spots {
			fit, crowded, demo := spots[i].fit(c)
			if fit != nil || demo {
				return true
			}
			full = full || crowded
		}
	}
	return !full
}

// waitedInVain is the end of a connection's patience.
func (c *conn) waitedInVain() {
	waited := time.Duration(or(int64(c.route.queue.Time), int64(c.route.connect)))
	c.leaveAndRefuse("no backend had room for it within " + waited.String())
}

func (c *conn) leaveAndRefuse(why string) {
	c.loop.leaveQueue(c)
	c.to(connecting)
	c.goOn(c.crowdedOut(why))
}

// crowdedOut is the end of a connection for which no backend had room.
func (c *conn) crowdedOut(why string) stage {
	c.refused(refusedQueue)
	return c.unconnected(Limited, why)
}
