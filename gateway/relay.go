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
	c.pump(&c.up, &c.client, &c.backend)
	c.pump(&c.down, &c.backend, &c.client)
	if c.client.failed != 0 && !c.up.ended {
		c.pump(&c.up, &c.client, &c.backend) // down has just found out; what the client sent before is delivered
	}
	if c.loop.lent.holders != nil {
		c.countMemory()
	}
	c.clearDecryptError(&c.client)
	c.clearDecryptError(&c.backend)
	c.answerUpdates()
	switch {
	case c.report.told:
		return c.violated()
	case c.up.cut(&c.client, &c.backend):
		return c.startReset(c.lost(&c.client), c.clientEnd())
	case c.down.cut(&c.backend, &c.client):
		return c.startReset(c.lost(&c.backend), c.backendEnd())
	case c.up.closed && c.down.closed && !c.client.clogged() && !c.backend.clogged():
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
func (f *flow) cut(from, to *socket) bool {
	return f.reset && (!f.stuck() || to.failed != 0) || f.ended && from.failed != 0 && !f.stuck()
}

// stuck says whether the destination has yet to take bytes that were read already.
func (f *flow) stuck() bool { return len(f.out) > 0 || f.inPipe > 0 }

// pump moves what can be moved in one direction. It stops when the source has no more, when the destination is full
// (back-pressure: then the source is not read, and its sender waits), or when the turn is used up.
func (c *conn) pump(f *flow, from, to *socket) {
	for turn := turnBytes; ; {
		if to.failed != 0 {
			f.dropAll(c.loop, from)
			return
		}
		if f.stuck() && !c.flush(f, to) {
			return
		}
		if f.ended {
			c.passEnd(f, to)
			return
		}
		if from.failed != 0 {
			from.readable = true // what came before the reset is still there
		}
		if !from.readable && !c.wholeRecordWaits(f, from) {
			return
		}
		if turn <= 0 {
			c.loop.putOff(c)
			return
		}
		sealing := to.kernelSeals()
		if sealing && !c.keysServe(f, from, to) {
			return
		}
		if c.memoryFull() && !c.wholeRecordCame(f, from) {
			from.readable = false // its rest will be news
			return
		}
		n := 0
		c.loop.work, c.loop.most = 0, c.portion()
		if c.route.pace == 0 {
			n = c.move(f, from, to)
		} else if n = c.moveAtPace(f, from, to); n < 0 {
			return // the pacer goes on with it
		}
		if n > 0 {
			c.touch()
			if sealing {
				to.tls.writer.Carried(n/maxPlain + 1)
			}
		}
		turn -= max(n, callCost, c.loop.work)
	}
}

// move carries bytes once, in the way that suits the two halves. It returns how many it read. It takes note of the
// end of the source, of a source that is drained, and of a destination that is full.
func (c *conn) move(f *flow, from, to *socket) int {
	if f.run >= kernelWorth && c.stage == relaying {
		c.considerKernel(f, from, to)
	}
	switch {
	case c.stage == translating:
		return c.translate(f, from, to)
	case from.opens() && to.seals():
		return c.reencrypt(f, from, to)
	case from.opens():
		return c.open(f, from, to)
	case to.seals():
		return c.seal(f, from, to)
	case f.splice || from.kernelOpens():
		return c.spliceOver(f, from, to)
	}
	return c.copyOver(f, from, to)
}

// touch remembers that something moved. The timer follows when it fires.
func (c *conn) touch() {
	c.active = c.loop.now
	if c.parked {
		c.parked = false
		c.setDeadline(int64(parkAfter))
	}
}

// wholeRecordWaits says whether the source left a record behind that can be opened without reading more: what came
// in the same segment as the client's Finished.
func (c *conn) wholeRecordWaits(f *flow, from *socket) bool {
	return len(f.carry) > 0 && from.opens() && from.tls.reader.Need(f.carry) <= len(f.carry)
}

// flush writes what the destination would not take before. It says whether nothing is left.
func (c *conn) flush(f *flow, to *socket) bool {
	if !to.writable {
		return false
	}
	if f.inPipe > 0 && !c.drainPipe(f, to) {
		return false
	}
	if len(f.out) == 0 { // what came by the pipe came before it
		return true
	}
	n := c.write(to, f.out)
	if n > 0 {
		c.touch()
	}
	f.out = f.out[n:]
	if len(f.out) > 0 {
		return false
	}
	c.loop.giveBack(f.lent)
	f.out, f.lent = nil, nil
	return true
}

// write sends what the socket takes of b, and takes note of a full or a broken one. It returns how many bytes went.
func (c *conn) write(s *socket, b []byte) int {
	n, e := sysWrite(s.fd, b)
	return s.wrote(n, len(b), e)
}

// wrote is what a writing call said: n bytes of want, or an error.
func (s *socket) wrote(n, want int, e unix.Errno) int {
	if e != 0 {
		if streamCalls.mean(e) == meansWait {
			s.writable = false
		} else {
			s.failed = e
		}
		return 0
	}
	if n < want {
		s.writable = false // edge-triggered: room will be news
	}
	return n
}

// got is what a reading call said: n bytes into room for want, or an error. It returns n, and 0 when there's nothing
// to go on with.
func (f *flow) got(s *socket, n, want int, e unix.Errno) int {
	switch {
	case e != 0 && streamCalls.mean(e) == meansWait:
		f.drained(s)
		return 0
	case e != 0:
		s.failed = e
		f.ended, f.reset, s.readable = true, true, false
		return 0
	case n == 0:
		f.ended, f.reset, s.readable = true, s.failed != 0, false
		return 0
	}
	// A short read means that the socket is drained: no second call to hear EAGAIN. Not so when a FIN waits behind
	// the bytes, or urgent data cuts reads short.
	if n < want && !s.hup && !s.exact {
		s.readable = false
	}
	return n
}

// drained is a source that has nothing to read. Of one that has failed nothing will come any more: its failure may have
// been that of a write, and of the reading side EAGAIN is then all that is ever said.
func (f *flow) drained(s *socket) {
	s.readable = false
	if s.failed != 0 {
		f.ended, f.reset = true, true
	}
}

// hold keeps b, which the destination would not take, in memory lent by the loop. b may lie in the loop's scratch.
func (f *flow) hold(l *loop, b []byte) {
	if len(b) == 0 {
		return
	}
	if cap(f.lent)-len(f.lent) < len(b) || len(f.out) == 0 {
		bigger := append(l.lend(len(f.out)+len(b)), f.out...)
		l.giveBack(f.lent)
		f.lent, f.out = bigger, bigger
	}
	start := len(f.lent) - len(f.out)
	f.lent = append(f.lent, b...)
	f.out = f.lent[start:]
}

// dropAll forgets what nobody is there to take any more. The source is not read on; its own end is noticed.
func (f *flow) dropAll(l *loop, from *socket) {
	f.release(l)
	if from.failed != 0 {
		f.ended, f.reset = true, true
	}
}

// passEnd passes the end of the source on: FIN as FIN, behind a close_notify where the destination speaks TLS. One that
// the source did not announce with a close_notify of its own may be somebody's who cut the stream (RFC 8446, section
// 6.1), and is not announced here either. A reset is passed on by the caller, who ends both directions.
func (c *conn) passEnd(f *flow, to *socket) {
	if f.closed || f.reset || c.report.told { // a violation: it must not look like the end
		return
	}
	if to.tls != nil && (!f.cutShort && !c.sayEnd(f, to) || f.stuck() || f.held(to) > 0) {
		return // the FIN follows once the close_notify has gone
	}
	f.closed = true
	if c.other(f).closed && to.hup && !to.readable && !to.kernelOpens() {
		return // both streams are over, and nothing is left unread: closing the socket sends the FIN
	}
	sysShutdown(to.fd, unix.SHUT_WR)
	c.setDeadline(int64(c.route.linger))
}

// sayEnd sends a close_notify, in one segment with the FIN that follows it. It says whether it's on its way.
func (c *conn) sayEnd(f *flow, to *socket) bool {
	if f.notified || to.kernelSeals() {
		return c.say(f, to, record.AlertCloseNotify)
	}
	f.notified = true
	b := to.tls.writer.AppendAlert(nil, record.AlertCloseNotify)
	if len(b) > 0 {
		n, e := sysSendMore(to.fd, b)
		f.hold(c.loop, b[to.wrote(n, len(b), e):])
	}
	return true
}

// send writes b behind what is on its way to the socket already, and keeps what it would not take.
func (c *conn) send(f *flow, to *socket, b []byte) {
	if len(b) == 0 {
		return // a writer that has said close_notify has nothing more to say
	}
	if !f.stuck() {
		b = b[c.write(to, b):]
	}
	f.hold(c.loop, b)
}

// sayGoodbye ends both streams in order, as far as the sockets take it.
func (c *conn) sayGoodbye() {
	for _, d := range [...]struct {
		f *flow
		s *socket
	}{{&c.up, &c.backend}, {&c.down, &c.client}} {
		if d.s.tls != nil && !d.f.closed && !d.f.cutShort {
			c.say(d.f, d.s, record.AlertCloseNotify)
		}
		sysShutdown(d.s.fd, unix.SHUT_WR)
	}
}
