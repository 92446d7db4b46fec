// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/ktls"
	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/natmap"
)

const (
	// Closing a socket in which unread bytes lie sends a reset, and a reset makes the peer's kernel forget what it
	// has not read yet: our last words. So after last words the client is read, and ignored, until it has closed
	// too, for this long,
	lastWordsTime = 2 * time.Second
	// and this many bytes.
	lastWordsBytes = 256 << 10
)

// answerAndLinger says the last words to a client that gets nothing else.
func (c *conn) answerAndLinger(words []byte) stage {
	if c.downward().to.write(words); c.client.failed != 0 {
		c.report.told = c.report.told && c.report.outcome != OK // what was to be answered well was not
		return c.finish(c.lost(&c.client), "the answer could not be sent: "+c.client.failed.Error())
	}
	return c.startLinger()
}

// startLinger ends our stream to the client and waits for the end of its own.
func (c *conn) startLinger() stage {
	sysShutdown(c.client.fd, unix.SHUT_WR)
	c.pending = nil
	c.setDeadline(int64(lastWordsTime))
	return lingering
}

func (c *conn) linger() stage {
	if !c.skim(c.culprit()) || c.skimmed > lastWordsBytes {
		return c.finish(OK, "") // what was told before is what counts
	}
	return lingering
}

// culprit is whom last words are for.
func (c *conn) culprit() *socket {
	if c.lastWords && c.report.byBackend {
		return &c.backend
	}
	return &c.client
}

// skim reads and forgets what a socket brings. It says whether the peer may still send more.
func (c *conn) skim(s *socket) bool {
	for s.readable && c.skimmed <= lastWordsBytes {
		n, e := readingHalf{s}.skim(c.loop.scratch)
		switch {
		case e != 0 && streamCalls.mean(e) == meansWait, readingHalf{s}.kind() == kernelHalf && unopenable(e):
			s.readable = false
		case e != 0:
			s.failed = e
			return false
		case n == 0:
			s.readable = false
			return false
		default:
			c.skimmed += int32(n)
		}
	}
	return true
}

// skim reads into room what nobody wants. It returns 0 at the end of the stream alone.
func (r readingHalf) skim(room []byte) (int, unix.Errno) {
	if r.kind() != kernelHalf {
		return sysRead(r.fd, room)
	}
	n, typ, e := ktls.Receive(r.fd, room) // read(2) stops at what is no data
	if e == 0 && n == 0 && typ != 0 {
		n = 1 // an empty record is not the end
	}
	return n, e
}

// abort makes the close of s a reset.
func abort(s *socket) {
	if s.fd >= 0 {
		_ = unix.SetsockoptLinger(int(s.fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	}
}

// checkDelivery has a reset looked at again soon. A reset makes our kernel forget what the peer has not acknowledged, so it waits
// until that has happened. The wheel would be late by up to a tick of its own, 134 ms; the pacer's is 17 ms.
func (c *conn) checkDelivery() {
	l := c.loop
	l.wheel.set(c, l.now+1) // if the pacer has the flow already, which may wait for its bandwidth for a second
	if c.up.pause != waiting {
		c.up.pause = waiting
		l.pacer.add(paused{c, &c.up}, l.now+1)
	}
}

// startReset carries a reset (or a violation) over to the side that is still there, once that has everything that
// came before.
func (c *conn) startReset(o Outcome, why string) stage {
	c.tell(o, why)
	c.undelivered = math.MaxInt
	return resetting
}

// resetWhenDelivered waits for as long as something moves, and for the linger timeout when nothing does.
func (c *conn) resetWhenDelivered() stage {
	up, down := c.upward().deliver(), c.downward().deliver()
	culprit := c.culprit()
	switch {
	case !c.lastWords && up == 0, c.lastWords && culprit == &c.client && up == 0:
		abort(&c.backend)
		c.loop.closeSocket(&c.backend)
	case c.lastWords && culprit == &c.backend && down == 0:
		abort(&c.client)
		c.loop.closeSocket(&c.client)
	}
	if up+down < c.undelivered {
		c.undelivered = up + down
		c.end = c.loop.now + int64(c.route.linger)
	}
	if up+down > 0 && c.loop.now < c.end {
		c.checkDelivery()
		return resetting
	}
	if !c.lastWords {
		abort(&c.client)
		abort(&c.backend)
		return c.finish(OK, "")
	}
	for _, s := range [...]*socket{&c.client, &c.backend} {
		if s != culprit && s.fd >= 0 {
			abort(s)
			c.loop.closeSocket(s)
		}
	}
	if culprit.fd < 0 || culprit.failed != 0 || up+down > 0 {
		return c.finish(OK, "")
	}
	c.end = 0
	c.setDeadline(int64(lastWordsTime))
	return lingering
}

// deliver writes what the flow still has, and says how many bytes its destination has not acknowledged. Behind last
// words the stream ends in order.
func (t transfer) deliver() int {
	if t.to.fd < 0 || t.to.failed != 0 || t.stuck() && !t.flush() && t.to.failed != 0 {
		return 0
	}
	if t.stuck() {
		return len(t.out) + t.inPipe + unsent(t.to.fd)
	}
	held := t.held()
	if t.c.lastWords && t.isUp() == t.c.report.byBackend && !t.closed && t.lastSaid() && held == 0 {
		t.closed = true
		sysShutdown(t.to.fd, unix.SHUT_WR)
	}
	return held + unsent(t.to.fd)
}

// lastSaid says whether the alert that ends the connection, if there's one, is on its way.
func (t transfer) lastSaid() bool {
	return t.c.report.alertSent <= 0 || t.to.tls == nil || t.say(record.Alert(t.c.report.alertSent))
}

// lost is how a connection ends one of whose sockets is lost.
func (c *conn) lost(s *socket) Outcome {
	switch {
	case s.failed != 0 && streamCalls.mean(s.failed) != meansGone:
		return Internal
	case s == &c.backend:
		return BackendReset
	}
	return ClientReset
}

// doubts says whether a stream that ended without a close_notify, and may have been cut by anybody, goes on as a reset. A
// side that speaks TLS sees what has happened: a FIN without a close_notify. Any other would take it for the end. Of
// clients many end like that, or wait for an answer then; so for theirs the rule has to ask for it (truncation=).
func (t transfer) doubts() bool {
	switch t.c.route.truncation {
	case natmap.TruncationFIN:
		return false
	case natmap.TruncationReset:
		return t.to.tls == nil
	}
	return !t.isUp() && t.to.tls == nil
}

// side is what the log calls the owner of the socket.
func (c *conn) side(s *socket) string {
	if s == &c.backend {
		return "the backend"
	}
	return "the client"
}

// violation answers a breach of the record protocol with its alert. What came before it is delivered; then the other
// side is reset, so that it does not take what it has for the whole.
func (t transfer) violation(err error) {
	if t.c.report.told {
		return
	}
	t.c.report.byBackend = !t.isUp()
	if t.c.report.byBackend {
		t.c.tell(TLSError, "the backend broke the protocol: "+err.Error())
	} else {
		t.c.tell(TLSError, err.Error())
	}
	if e, ok := errors.AsType[*record.Error](err); ok {
		t.c.report.alertSent = int16(e.Alert)
		t.back().say(e.Alert)
	}
}

// violated ends a connection one side of which broke the protocol, or gave up with an alert of its own.
func (c *conn) violated() stage {
	c.lastWords = true
	return c.startReset(TLSError, "")
}

// stuckWithKeys ends a connection whose keys with the destination have to change and can't.
func (t transfer) stuckWithKeys(why string) {
	if t.c.report.told {
		return
	}
	t.c.tell(RekeyFailed, t.c.side(t.to.socket)+": "+why)
	t.c.report.byBackend = t.isUp()
	t.c.report.alertSent = int16(record.AlertInternalError)
	t.say(record.AlertInternalError)
}
