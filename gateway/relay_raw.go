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
func (c *conn) copyOver(f *flow, from, to *socket) int {
	buf := c.loop.scratch[:min(copySize, c.loop.most)]
	n, e := sysRead(from.fd, buf)
	if n = f.got(from, n, len(buf), e); n == 0 {
		return 0
	}
	c.carried(f, n)
	f.splice = n == copySize
	c.send(f, to, buf[:n])
	return n
}

// spliceOver carries a stream without a copy:
//
//	splice(source -> pipe), splice(pipe -> destination), ... until the source says EAGAIN
//
// The pipe is the loop's, and is empty when it is borrowed: so EAGAIN means that the source has nothing. It stays
// with the flow only while the destination does not take what is in it.
func (c *conn) spliceOver(f *flow, from, to *socket) int {
	p := c.loop.pipes.borrow()
	if p == nil {
		f.splice = false // copying needs no descriptors
		if from.kernelOpens() {
			return c.copyOpened(f, from, to)
		}
		return c.copyOver(f, from, to)
	}
	want := min((int(f.batch)+1)*spliceStep, c.loop.most)
	n, e := sysSplice(from.fd, p.w, want)
	if from.kernelOpens() {
		return c.spliceOpened(f, from, to, p, want, n, e)
	}
	if e != 0 && streamCalls.mean(e) == meansLack { // of pages: copying needs none
		c.loop.pipes.giveBack(p)
		f.splice = false
		return c.copyOver(f, from, to)
	}
	if n = f.got(from, n, n, e); n == 0 {
		c.loop.pipes.giveBack(p)
		f.splice = f.run >= spliceWorth
		f.run = 0
		return 0
	}
	c.loop.counters.spliced.Add(uint64(n))
	c.report.spliced = true
	c.carried(f, n)
	f.run = int32(min(int(f.run)+n, spliceWorth))
	c.fillPipe(f, p, n)
	c.drainPipe(f, to)
	f.adapt(n == want)
	return n
}

// spliceOpened goes on where splice has brought n bytes, or e, from a half that the kernel opens. That brings one record
// a call, so several fill the pipe before it's drained; and once there is something in it, EAGAIN may be about the pipe.
func (c *conn) spliceOpened(f *flow, from, to *socket, p *pipe, want, n int, e unix.Errno) int {
	total := 0
	for e == 0 && n > 0 {
		c.loop.work += callCost
		if total += n; total >= want || c.loop.work >= turnBytes {
			break
		}
		n, e = sysSplice(from.fd, p.w, want-total)
	}
	if total == 0 {
		c.loop.pipes.giveBack(p)
		if e != 0 && streamCalls.mean(e) == meansWait {
			return f.got(from, 0, 0, e)
		}
		return c.readControl(f, from, to, e)
	}
	from.tls.reader.Carried(total)
	c.loop.counters.spliced.Add(uint64(total))
	c.report.spliced = true
	c.carried(f, total)
	c.fillPipe(f, p, total)
	c.drainPipe(f, to)
	f.adapt(total >= want)
	if e != 0 && streamCalls.mean(e) != meansWait { // some are said only once
		total += c.readControl(f, from, to, e)
	}
	return total
}

// fillPipe leaves n bytes in a pipe with the flow.
func (c *conn) fillPipe(f *flow, p *pipe, n int) {
	f.pipe, f.inPipe = p, n
	c.loop.lent.piped += n
}

// emptyPipe copies what a destination has not taken for a while out of its pipe, which others can use, into memory: a
// stream that stands still keeps no descriptors. With no memory left it keeps the pipe, of which there are only so many.
func (c *conn) emptyPipe(f *flow) {
	l := c.loop
	if f.pipe == nil || l.memoryFull() {
		return
	}
	b := l.lend(f.inPipe + len(f.out))
	for len(b) < f.inPipe {
		n, err := unix.Read(int(f.pipe.r), b[len(b):f.inPipe])
		if n <= 0 || err != nil { // a pipe brings what is in it, or it is none
			l.giveBack(b)
			panic(fmt.Sprintf("a pipe that should hold %d bytes more: %v", f.inPipe-len(b), err))
		}
		b = b[:len(b)+n]
	}
	l.lent.piped -= f.inPipe
	l.pipes.giveBack(f.pipe)
	f.pipe, f.inPipe = nil, 0
	b = append(b, f.out...) // what did not come by the pipe came behind it
	l.giveBack(f.lent)
	f.lent, f.out = b, b
}

// copyOpened is copyOver for a half that the kernel opens: a record, of whatever kind.
func (c *conn) copyOpened(f *flow, from, to *socket) int {
	buf := c.loop.scratch[:maxPlain]
	n, typ, e := ktls.Receive(from.fd, buf)
	if e == unix.EAGAIN {
		return f.got(from, 0, 0, e)
	}
	return c.received(f, from, to, buf, n, typ, e)
}

// drainPipe moves what is in the flow's pipe to the destination. It says whether the pipe is empty, which is then
// given back.
func (c *conn) drainPipe(f *flow, to *socket) bool {
	for f.inPipe > 0 {
		n, e := sysSplice(f.pipe.r, to.fd, f.inPipe)
		if e == 0 && n == 0 { // there are bytes in it, and the pipe says that it is over
			e = unix.EIO
		}
		if e != 0 {
			to.wrote(0, f.inPipe, e)
			return false
		}
		f.inPipe -= n
		c.loop.lent.piped -= n
		c.touch()
	}
	c.loop.pipes.giveBack(f.pipe)
	f.pipe = nil
	return true
}
