// SPDX-License-Identifier: Apache-2.0

package gateway

import "golang.org/x/sys/unix"

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

// pipesFor is how many pipes a loop may have: a thirty-second of the descriptors serves the pipes of all loops, and
// idlePipes each are kept in any case. Streams beyond that are copied.
func pipesFor(loops int) int {
	const most = 1024
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return idlePipes
	}
	return min(max(int(min(r.Cur, 1<<24))/64/loops, idlePipes), most)
}
