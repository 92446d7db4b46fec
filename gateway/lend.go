// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"math/bits"

	"golang.org/x/sys/unix"
)

// lender lends memory to connections whose destination is full, and takes it back. Sizes are powers of two, so that
// a stuck connection costs at most twice what it holds.
type lender struct {
	free  [21 + 1][][]byte // by the logarithm of the size; up to 2 MiB: what was in a pipe, and an alert behind it
	kept  int              // bytes in free
	out   int              // bytes that are lent
	piped int              // bytes that lie in pipes, for a destination that is full
	share int              // of TLSNAT_MEMORY: the loop's part (budget.go)
}

const (
	smallestLoan = 9       // 512 B
	keepAtMost   = 8 << 20 // what is given back beyond this goes to the garbage collector
)

// lend returns an empty slice with room for n bytes. Give it back with giveBack.
func (l *loop) lend(n int) []byte {
	class := max(bits.Len(uint(n-1)), smallestLoan)
	d := &l.lent
	d.out += 1 << class
	if free := d.free[class]; len(free) > 0 {
		b := free[len(free)-1]
		d.free[class] = free[:len(free)-1]
		d.kept -= cap(b)
		return b
	}
	return make([]byte, 0, 1<<class)
}

// giveBack takes what lend returned; nil is fine.
func (l *loop) giveBack(b []byte) {
	d := &l.lent
	d.out -= cap(b)
	if cap(b) == 0 || d.kept+cap(b) > keepAtMost {
		return
	}
	class := bits.Len(uint(cap(b))) - 1
	d.free[class] = append(d.free[class], b[:0])
	d.kept += cap(b)
}

const (
	// A pipe of 1 MiB takes what a fast socket brings in one call. The kernel gives an unprivileged user less once he
	// has many (fs.pipe-user-pages-soft); whatever it is, it works.
	pipeSize = 1 << 20
	// Pipes kept for the next connection that streams.
	idlePipes = 16
)

// pipe is what splice moves bytes through. Between loans it is empty.
type pipe struct{ r, w int32 }

type pipes struct {
	free []*pipe
	out  int // that are borrowed
	most int // how many may be (pipesFor)
}

// borrow returns an empty pipe, or nil when the loop has no more, or the process is out of descriptors.
func (p *pipes) borrow() *pipe {
	if p.out >= p.most {
		return nil
	}
	if n := len(p.free); n > 0 {
		x := p.free[n-1]
		p.free = p.free[:n-1]
		p.out++
		return x
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	p.out++
	return &pipe{int32(fds[0]), int32(fds[1])}
}

// drop takes a pipe that is not empty: nobody else may have it.
func (p *pipes) drop(x *pipe) {
	p.out--
	x.discard()
}

// giveBack takes an empty pipe.
func (p *pipes) giveBack(x *pipe) {
	p.out--
	if len(p.free) >= idlePipes {
		x.discard()
		return
	}
	p.free = append(p.free, x)
}

// discard closes a pipe, with whatever is in it.
func (x *pipe) discard() {
	_ = unix.Close(int(x.r))
	_ = unix.Close(int(x.w))
}

func (p *pipes) close() {
	for _, x := range p.free {
		x.discard()
	}
	p.free = nil
}
