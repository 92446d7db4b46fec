// SPDX-License-Identifier: Apache-2.0

package gateway

import "time"

// A process may stand still: its machine is moved or saved, its container is frozen, somebody sends SIGSTOP. When it goes
// on, deadlines have passed, and what peers sent in time lies in the sockets. So a deadline counts only when everything
// that had come by then was looked at.

// looks is up to when that is so.
type looks struct {
	sure   int64 // loop nanoseconds: what had come by then was dispatched, at the latest in this round
	from   int64 // when the looks began that are to tell it of a later time,
	unseen int   // and how many sockets they may not have told of yet
}

// begin is called before a look at the poller. now is the time of the last round, when nothing was asked yet: no
// more than that can be told, however long the process stands still from here on.
func (s *looks) begin(now int64, watched int) {
	if s.unseen <= 0 {
		s.from, s.unseen = now, watched
	}
}

// note is called when a look has brought n events. One that could have brought more has brought all that there were. If
// none does, because there is always more: sockets are told of in turns, so that it is enough to have heard of as
// many as there are.
func (s *looks) note(n int) {
	if s.unseen -= n; n < maxEvents || s.unseen <= 0 {
		s.sure, s.unseen = s.from, 0
	}
}

const (
	// A deadline that is noticed this much too late was missed because the process stood still, or had no CPU.
	stoodStill = int64(time.Second)
	// Then its connection gets this long: what comes by a handshake's goroutine, from another process or machine that
	// stood still too, or again because nobody acknowledged it, is on its way only now.
	grace = time.Second
)

// fireTimers calls due for connections whose deadlines have passed, for as long as a turn may take (survey.go). To end a
// connection takes 60 µs, and there may be a hundred thousand: those that are left are due in the next round.
func (l *loop) fireTimers() {
	first := l.wheel.next()
	if first == 0 || first > l.looks.sure {
		return
	}
	if l.looks.sure-first > stoodStill && l.wheel.whole() {
		l.resumed = l.looks.sure
	}
	began, n := l.clock(), 0
	for c := l.wheel.take(l.looks.sure); c != nil; c = l.wheel.take(l.looks.sure) {
		c.due()
		if n++; n%glimpse == 0 && l.clock()-began > int64(glanceTime) {
			return
		}
	}
}

// spared says whether the conn's deadline passed while the process stood still, and gives it its grace then: once, since
// the next deadline comes later. Time in which nobody could do anything does not count for a backend either.
func (c *conn) spared() bool {
	l := c.loop
	if c.timer.deadline > l.resumed || c.stage >= lingering {
		return false
	}
	if c.dial != nil {
		c.dial.until += l.resumed - c.timer.deadline + int64(grace)
		c.dial.waitUntil = max(c.dial.waitUntil, l.now+int64(grace))
	}
	c.setDeadline(int64(grace))
	return true
}
