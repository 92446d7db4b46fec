// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/ktls"
)

const (
	// A flow is copied while its messages are small: one read and one write, where splice needs three calls. A read
	// that fills this much means that it streams, and from there on it's spliced,
	copySize = 16 << 10
	// until the source is drained with less than this since it was drained before.
	spliceWorth = 64 << 10
	// A call asks for this much at first, and for up to a whole pipe while the destination takes it: what it does not
	// take stays in the pipe, and a thousand slow readers must not hold a thousand megabytes.
	spliceStep = pipeSize / maxBatch
)

// copyOver carries a small message: one read into the loop's memory, one write out of it.
func (t transfer) copyOver() int {
	buf := t.c.loop.scratch[:min(copySize, t.c.loop.most)]
	n, e := sysRead(t.from.fd, buf)
	if n = t.got(n, len(buf), e); n == 0 {
		return 0
	}
	t.carried(n)
	t.splice = n == copySize
	t.send(buf[:n])
	return n
}

// spliceOver carries a stream without a copy:
//
//	splice(source -> pipe), splice(pipe -> destination), ... until the source says EAGAIN
//
// The pipe is the loop's, and is empty when it is borrowed: so EAGAIN means that the source has nothing. It stays
// with the flow only while the destination does not take what is in it.
func (t transfer) spliceOver() int {
	p := t.c.loop.pipes.borrow()
	if p == nil {
		t.splice = false // copying needs no descriptors
		return t.copyOver()
	}
	want := min((int(t.batch)+1)*spliceStep, t.c.loop.most)
	n, e := sysSplice(t.from.fd, p.w, want)
	if e != 0 && streamCalls.mean(e) == meansLack { // of pages: copying needs none
		t.c.loop.pipes.giveBack(p)
		t.splice = false
		return t.copyOver()
	}
	if n = t.got(n, n, e); n == 0 {
		t.c.loop.pipes.giveBack(p)
		t.splice = t.run >= spliceWorth
		t.run = 0
		return 0
	}
	t.run = int32(min(int(t.run)+n, spliceWorth))
	t.passPipe(p, n)
	t.adapt(n == want)
	return n
}

// spliceOpened is spliceOver for a half that the kernel opens. That brings one record a call, so several fill the pipe
// before it's drained; and once there is something in it, EAGAIN may be about the pipe.
func (t transfer) spliceOpened() int {
	p := t.c.loop.pipes.borrow()
	if p == nil {
		t.splice = false
		return t.copyOpened()
	}
	want, total := min((int(t.batch)+1)*spliceStep, t.c.loop.most), 0
	n, e := sysSplice(t.from.fd, p.w, want)
	for e == 0 && n > 0 {
		t.c.loop.work += callCost
		if total += n; total >= want || t.c.loop.work >= turnBytes {
			break
		}
		n, e = sysSplice(t.from.fd, p.w, want-total)
	}
	if total == 0 {
		t.c.loop.pipes.giveBack(p)
		if t.from.event(n, e) == nothingCame {
			t.drained()
			return 0
		}
		return t.readControl(e)
	}
	t.from.tls.reader.Carried(total)
	t.passPipe(p, total)
	t.adapt(total >= want)
	if e != 0 && streamCalls.mean(e) != meansWait { // some are said only once
		total += t.readControl(e)
	}
	return total
}

// passPipe takes note of n bytes that were spliced into a pipe, and moves them on to the destination.
func (t transfer) passPipe(p *pipe, n int) {
	t.c.loop.counters.spliced.Add(uint64(n))
	t.c.report.spliced = true
	t.carried(n)
	t.pipe, t.inPipe = p, n
	t.c.loop.lent.piped += n
	t.drainPipe()
}

// emptyPipe copies what a destination has not taken for a while out of its pipe, which others can use, into memory: a
// stream that stands still keeps no descriptors. With no memory left it keeps the pipe, of which there are only so many.
func (t transfer) emptyPipe() {
	l := t.c.loop
	if t.pipe == nil || l.memoryFull() {
		return
	}
	b := l.lend(t.inPipe + len(t.out))
	for len(b) < t.inPipe {
		n, err := unix.Read(int(t.pipe.r), b[len(b):t.inPipe])
		if n <= 0 || err != nil { // a pipe brings what is in it, or it is none
			l.giveBack(b)
			panic(fmt.Sprintf("a pipe that should hold %d bytes more: %v", t.inPipe-len(b), err))
		}
		b = b[:len(b)+n]
	}
	l.lent.piped -= t.inPipe
	l.pipes.giveBack(t.pipe)
	t.pipe, t.inPipe = nil, 0
	b = append(b, t.out...) // what did not come by the pipe came behind it
	l.giveBack(t.lent)
	t.lent, t.out = b, b
}

// copyOpened is copyOver for a half that the kernel opens: a record, of whatever kind.
func (t transfer) copyOpened() int {
	buf := t.c.loop.scratch[:maxPlain]
	n, typ, e := ktls.Receive(t.from.fd, buf)
	if e == unix.EAGAIN {
		t.drained()
		return 0
	}
	return t.received(buf, n, typ, e)
}

// drainPipe moves what is in the flow's pipe to the destination. It says whether the pipe is empty, which is then
// given back.
func (t transfer) drainPipe() bool {
	for t.inPipe > 0 {
		n, e := sysSplice(t.pipe.r, t.to.fd, t.inPipe)
		if e == 0 && n == 0 { // there are bytes in it, and the pipe says that it is over
			e = unix.EIO
		}
		if e != 0 {
			t.to.wrote(0, t.inPipe, e)
			return false
		}
		t.inPipe -= n
		t.c.loop.lent.piped -= n
		t.c.touch()
	}
	t.c.loop.pipes.giveBack(t.pipe)
	t.pipe = nil
	return true
}
