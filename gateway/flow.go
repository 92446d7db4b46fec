// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// owner is whom a loop tells that a socket has news.
type owner interface {
	ready(s *socket, events uint32)
}

// socket is one of a conn's two sockets. What epoll said is remembered until a system call says otherwise.
type socket struct {
	owner    owner
	fd       int32  // -1: none
	gen      uint32 // tells its events from those of an earlier owner of the same slot; 0: it is not watched
	slot     uint32 // in the loop's table
	readable bool
	writable bool
	hup      bool       // the peer ended its stream: a short read does not mean "drained", the FIN is still to be read
	exact    bool       // urgent data was seen, which cuts reads short: only EAGAIN means "drained"
	failed   unix.Errno // the peer reset it, or it timed out; sticky, since the kernel says so only once
	tls      *session   // nil: the stream is carried as it is
}

// session is what is left of TLS once the handshake is done: the reading half and the writing half. What the kernel
// carries they do not open or seal any more; they count, check and make the next keys.
type session struct {
	reader record.Reader
	writer record.Writer
	asked  bool    // for new keys by the peer, and not answered yet
	rx, tx carrier // who opens and who seals
	debt   int64   // what Sent says is more by this than the flow's bytes and the kernel's records make (held)

	tickets *encrypter // of a fresh connection to a backend: takes the tickets that come before data
}

// carrier is who opens what a socket brings, or seals what is sent to it.
type carrier uint8

const (
	inUser   carrier = iota // we do; and the kernel may when the flow streams
	landing                 // we do, reading to the end of a record and no further: there the kernel goes on
	stays                   // we do for good
	inKernel                // the kernel does for good: there is no way back
)

// halfKind says in which form bytes cross a half of a socket, and who opens or seals them.
type halfKind uint8

const (
	rawHalf    halfKind = iota // as they are
	userHalf                   // in records that are opened or sealed here
	kernelHalf                 // in records that the kernel opens or seals
)

// kindOf is the kind of a half that c carries, of a socket that speaks TLS.
func kindOf(c carrier) halfKind {
	if c == inKernel {
		return kernelHalf
	}
	return userHalf
}

// readingHalf is the half of a socket that brings bytes, or an event. It is a pointer with methods, and costs nothing.
type readingHalf struct{ *socket }

// kind says what a reading half is. It is asked where the ways part (move), and where only one of them has to do something.
func (r readingHalf) kind() halfKind {
	if r.tls == nil {
		return rawHalf
	}
	return kindOf(r.tls.rx)
}

// event is what a reading call brought.
type event uint8

const (
	bytesCame   event = iota
	nothingCame       // the poller tells when that changes
	endCame           // by a FIN
	cutCame           // by a reset, or a fault
	controlCame       // the kernel has opened a record that is no data, or could not open one: readControl finds out
)

// event says what a reading call brought that returned n, or failed with e.
func (r readingHalf) event(n int, e unix.Errno) event {
	switch {
	case e == 0 && n > 0:
		return bytesCame
	case e != 0 && streamCalls.mean(e) == meansWait:
		return nothingCame
	case r.kind() == kernelHalf && (e == 0 || e == unix.EIO || unopenable(e)):
		return controlCame
	case e == 0:
		return endCame
	}
	return cutCame
}

// writingHalf is the half of a socket that takes bytes.
type writingHalf struct{ *socket }

// kind says what a writing half is.
func (w writingHalf) kind() halfKind {
	if w.tls == nil {
		return rawHalf
	}
	return kindOf(w.tls.tx)
}

// write sends what the half takes of b, and takes note of a full or a broken one. It returns how many bytes went.
func (w writingHalf) write(b []byte) int {
	n, e := sysWrite(w.fd, b)
	return w.wrote(n, len(b), e)
}

// wrote is what a writing call said: n bytes of want, or an error.
func (w writingHalf) wrote(n, want int, e unix.Errno) int {
	if e != 0 {
		if streamCalls.mean(e) == meansWait {
			w.writable = false
		} else {
			w.failed = e
		}
		return 0
	}
	if n < want {
		w.writable = false // edge-triggered: room will be news
	}
	return n
}

// flow is one direction of a conn: bytes read from one socket, written to the other. While nothing is stuck it owns
// nothing; memory and pipes are the loop's and are lent while a destination is full.
type flow struct {
	out    []byte // for the destination, which would not take it; a piece of lent
	lent   []byte
	carry  []byte // ciphertext of half a record, or of records there was no turn left for
	pipe   *pipe  // holds inPipe bytes for the destination, which would not take them
	inPipe int

	batch    uint8 // how many records' worth of bytes the next read asks for, less one
	small    uint8 // how many small records the next bytes are cut into before full ones (see relay_user.go)
	splice   bool  // the flow streams: bytes go through a pipe
	ended    bool  // the source's stream is over: FIN, or close_notify
	reset    bool  // the source's stream was cut: RST
	cutShort bool  // the source spoke TLS and ended its stream without a close_notify
	notified bool  // a close_notify was sent to the destination
	closed   bool  // the end was passed on to the destination
	pause    pause // for its bandwidth (pacer.go)
	run      int32 // bytes carried since the source was drained last (splice), or was quiet (see streamed)
	at       int64 // when the flow moved last, in loop nanoseconds
	moved    int64 // bytes, as the application counts them
	paid     int64 // the time up to which they are paid for, where there is a bandwidth
}

// stuck says whether the destination has yet to take bytes that were read already.
func (f *flow) stuck() bool { return len(f.out) > 0 || f.inPipe > 0 }

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

// release gives back what the loop lent.
func (f *flow) release(l *loop) {
	l.giveBack(f.lent)
	l.giveBack(f.carry)
	if f.pipe != nil {
		l.lent.piped -= f.inPipe
		l.pipes.drop(f.pipe)
	}
	f.out, f.lent, f.carry, f.pipe, f.inPipe = nil, nil, nil, nil, 0
}

// transfer is a flow at work: its connection, and the halves of sockets that it joins. It lives on the stack, for a turn.
type transfer struct {
	c *conn
	*flow
	from readingHalf
	to   writingHalf
}

// upward carries from the client to the backend, downward the other way.
func (c *conn) upward() transfer {
	return transfer{c, &c.up, readingHalf{&c.client}, writingHalf{&c.backend}}
}

func (c *conn) downward() transfer {
	return transfer{c, &c.down, readingHalf{&c.backend}, writingHalf{&c.client}}
}

// transferFrom is the transfer that reads from s.
func (c *conn) transferFrom(s *socket) transfer {
	if s == &c.client {
		return c.upward()
	}
	return c.downward()
}

// isUp says whether t carries from the client to the backend.
func (t transfer) isUp() bool { return t.flow == &t.c.up }

// back is the transfer of the other direction.
func (t transfer) back() transfer { return t.c.transferFrom(t.to.socket) }

// got is what a reading call said: n bytes into room for want, or an error. It returns n, and 0 when there's nothing
// to go on with.
func (t transfer) got(n, want int, e unix.Errno) int {
	switch t.from.event(n, e) {
	case bytesCame:
		// A short read means that the socket is drained: no second call to hear EAGAIN. Not so when a FIN waits behind
		// the bytes, or urgent data cuts reads short.
		if s := t.from; n < want && !s.hup && !s.exact {
			s.readable = false
		}
		return n
	case nothingCame:
		t.drained()
	case endCame:
		t.sourceOver()
	default:
		t.sourceFailed(e)
	}
	return 0
}

// sourceOver takes note of the end of the source. Of one that has failed, the end that is read is that of the failure.
func (t transfer) sourceOver() { t.ended, t.reset, t.from.readable = true, t.from.failed != 0, false }

func (t transfer) sourceFailed(e unix.Errno) {
	t.from.failed = e
	t.sourceOver()
}

// drained is a source that has nothing to read. Of one that has failed nothing will come any more: its failure may have
// been that of a write, and of the reading side EAGAIN is then all that is ever said.
func (t transfer) drained() {
	t.from.readable = false
	if t.from.failed != 0 {
		t.ended, t.reset = true, true
	}
}

// wholeRecordWaits says whether the source left a record behind that can be opened without reading more: what came
// in the same segment as the client's Finished.
func (t transfer) wholeRecordWaits() bool {
	return len(t.carry) > 0 && t.from.kind() == userHalf && t.from.tls.reader.Need(t.carry) <= len(t.carry)
}

// flush writes what the destination would not take before. It says whether nothing is left.
func (t transfer) flush() bool {
	if !t.to.writable {
		return false
	}
	if t.inPipe > 0 && !t.drainPipe() {
		return false
	}
	if len(t.out) == 0 { // what came by the pipe came before it
		return true
	}
	n := t.to.write(t.out)
	if n > 0 {
		t.c.touch()
	}
	t.out = t.out[n:]
	if len(t.out) > 0 {
		return false
	}
	t.c.loop.giveBack(t.lent)
	t.out, t.lent = nil, nil
	return true
}

// send writes b behind what is on its way to the socket already, and keeps what it would not take.
func (t transfer) send(b []byte) {
	if len(b) == 0 {
		return // a writer that has said close_notify has nothing more to say
	}
	if !t.stuck() {
		b = b[t.to.write(b):]
	}
	t.hold(t.c.loop, b)
}

// dropAll forgets what nobody is there to take any more. The source is not read on; its own end is noticed.
func (t transfer) dropAll() {
	t.release(t.c.loop)
	if t.from.failed != 0 {
		t.ended, t.reset = true, true
	}
}

// touch remembers that something moved. The timer follows when it fires.
func (c *conn) touch() {
	c.active = c.loop.now
	if c.parked {
		c.parked = false
		c.setDeadline(int64(parkAfter))
	}
}

// carried counts bytes that came from a flow's source, as the application counts them. A stream that runs for a day
// shows in the metrics all day.
func (t transfer) carried(n int) {
	t.moved += int64(n)
	if t.isUp() {
		t.c.loop.counters.bytesUp.Add(uint64(n))
	} else {
		t.c.loop.counters.bytesDown.Add(uint64(n))
	}
}
