// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

const (
	// What one connection may move before the others have their turn. Large enough that a stream is carried in large
	// pieces, small enough that a message beside it waits for a fraction of a millisecond.
	turnBytes = 256 << 10
	// What costs time without bringing bytes counts as bytes, so that a turn is as long whatever a peer sends: a record, by
	// what it takes to open it beside its bytes (0.2 µs, and a byte 1 ns),
	recordCost = 256
	// and a system call (1 µs).
	callCost = 1 << 10
	// So a call's bytes are opened up to this many records. The rest waits for the next turn.
	turnRecords = turnBytes / recordCost
	// A flow whose last reads brought this many records streams. Streams are served after everybody else.
	streaming = 4
)

// relay carries bytes both ways until both streams have ended, or one was cut.
func (c *conn) relay() stage {
	up, down := c.upward(), c.downward()
	up.pump()
	down.pump()
	if c.client.failed != 0 && !c.up.ended {
		up.pump() // down has just found out; what the client sent before is delivered
	}
	if c.loop.lent.holders != nil {
		c.countMemory()
	}
	up.clearDecryptError()
	down.clearDecryptError()
	down.answerUpdate()
	up.answerUpdate()
	switch {
	case c.report.told:
		return c.violated()
	case up.cut():
		return c.startReset(c.lost(&c.client), c.clientEnd())
	case down.cut():
		return c.startReset(c.lost(&c.backend), c.backendEnd())
	case c.up.closed && c.down.closed && !up.from.clogged() && !down.from.clogged():
		return c.finish(OK, c.backendEnd())
	}
	// What a peer sends behind its close_notify is ignored (RFC 8446, section 6.1). It is read all the same: that is
	// how its FIN and its reset are seen, and closing does not answer unread bytes with a reset.
	if c.up.ended && c.client.readable {
		c.skim(&c.client)
	}
	if c.down.ended && c.backend.tls != nil && c.backend.readable {
		c.skim(&c.backend)
	}
	if c.settling() {
		c.checkDelivery()
	}
	return c.stage // the same, or relaying behind translating
}

// clientEnd says how the client's stream was cut.
func (c *conn) clientEnd() string {
	if c.client.failed == 0 {
		return "the client ended its stream without a close_notify"
	}
	return c.client.failed.Error()
}

// backendEnd says how the backend's stream ended, where that is worth a word.
func (c *conn) backendEnd() string {
	switch {
	case c.backend.failed != 0:
		return c.backend.failed.Error()
	case c.down.cutShort:
		return "the backend ended its stream without a close_notify"
	}
	return ""
}

// cut says whether the source was reset and everything it had sent before is passed on.
func (t transfer) cut() bool {
	return t.reset && (!t.stuck() || t.to.failed != 0) || t.ended && t.from.failed != 0 && !t.stuck()
}

// pump moves what can be moved in one direction. It stops when the source has no more, when the destination is full
// (back-pressure: then the source is not read, and its sender waits), or when the turn is used up.
func (t transfer) pump() {
	for turn := turnBytes; ; {
		if t.to.failed != 0 {
			t.dropAll()
			return
		}
		if t.stuck() && !t.flush() {
			return
		}
		if t.ended {
			t.passEnd()
			return
		}
		if t.from.failed != 0 {
			t.from.readable = true // what came before the reset is still there
		}
		if !t.from.readable && !t.wholeRecordWaits() {
			return
		}
		if turn <= 0 {
			t.c.loop.putOff(t.c)
			return
		}
		sealing := t.to.kind() == kernelHalf
		if sealing && !t.keysServe() {
			return
		}
		if t.c.memoryFull() && !t.wholeRecordCame() {
			t.from.readable = false // its rest will be news
			return
		}
		n := 0
		t.c.loop.work, t.c.loop.most = 0, t.c.portion()
		if t.c.route.pace == 0 {
			n = t.move()
		} else if n = t.moveAtPace(); n < 0 {
			return // the pacer goes on with it
		}
		if n > 0 {
			t.c.touch()
			if sealing {
				t.to.tls.writer.Carried(n/maxPlain + 1)
			}
		}
		turn -= max(n, callCost, t.c.loop.work)
	}
}

// move carries bytes once, in the way that suits the two halves. It returns how many it read. It takes note of the
// end of the source, of a source that is drained, and of a destination that is full.
func (t transfer) move() int {
	if t.run >= kernelWorth && t.c.stage == relaying {
		t.considerKernel()
	}
	if t.c.stage == translating {
		return t.translate()
	}
	switch from, to := t.from.kind(), t.to.kind(); {
	case from == userHalf && to == userHalf:
		return t.reencrypt()
	case from == userHalf:
		return t.open()
	case to == userHalf:
		return t.seal()
	case from == kernelHalf:
		return t.spliceOpened()
	case t.splice:
		return t.spliceOver()
	}
	return t.copyOver()
}

// passEnd passes the end of the source on: FIN as FIN, behind a close_notify where the destination speaks TLS. One that
// the source did not announce with a close_notify of its own may be somebody's who cut the stream (RFC 8446, section
// 6.1), and is not announced here either. A reset is passed on by the caller, who ends both directions.
func (t transfer) passEnd() {
	if t.closed || t.reset || t.c.report.told { // a violation: it must not look like the end
		return
	}
	if t.to.tls != nil && (!t.cutShort && !t.sayEnd() || t.stuck() || t.held() > 0) {
		return // the FIN follows once the close_notify has gone
	}
	t.closed = true
	if t.back().closed && t.to.hup && !t.to.readable && t.back().from.kind() != kernelHalf {
		return // both streams are over, and nothing is left unread: closing the socket sends the FIN
	}
	sysShutdown(t.to.fd, unix.SHUT_WR)
	t.c.setDeadline(int64(t.c.route.linger))
}

// sayEnd sends a close_notify, in one segment with the FIN that follows it. It says whether it's on its way.
func (t transfer) sayEnd() bool {
	if t.notified || t.to.kind() == kernelHalf {
		return t.say(record.AlertCloseNotify)
	}
	t.notified = true
	b := t.to.tls.writer.AppendAlert(nil, record.AlertCloseNotify)
	if len(b) > 0 {
		n, e := sysSendMore(t.to.fd, b)
		t.hold(t.c.loop, b[t.to.wrote(n, len(b), e):])
	}
	return true
}

// sayGoodbye ends both streams in order, as far as the sockets take it.
func (c *conn) sayGoodbye() {
	for _, t := range [...]transfer{c.upward(), c.downward()} {
		if t.to.tls != nil && !t.closed && !t.cutShort {
			t.say(record.AlertCloseNotify)
		}
		sysShutdown(t.to.fd, unix.SHUT_WR)
	}
}
