// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How many events one look at the poller brings at most. More is no gain: what is left comes with the next look.
const maxEvents = 128

// poller is an epoll set that is waited for by parking on the Go runtime's own poller, with the epoll fd as the thing
// that becomes readable. So a loop with nothing to do costs no thread and holds no P: handshakes, log writer and
// admin run on, also under GOMAXPROCS=1. (A blocking epoll_wait keeps its P until the runtime's monitor takes it
// away, up to 10 ms later.)
type poller struct {
	fd     int32
	file   *os.File
	raw    syscall.RawConn
	try    func(uintptr) bool // look, bound once so that waiting does not allocate
	events [maxEvents]unix.EpollEvent
	n      int
	armed  int64 // the deadline that is set on file; 0: none
	fault  error
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // os.NewFile leaves blocking files to threads
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	p := &poller{fd: int32(fd), file: os.NewFile(uintptr(fd), "epoll")}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	p.try = func(uintptr) bool { return p.look() }
	return p, nil
}

// look fetches what is ready now, and says whether that's anything.
func (p *poller) look() bool {
	n, e := sysEpollWait(p.fd, p.events[:])
	if e != 0 && e != unix.EINTR {
		p.fault = fmt.Errorf("wait for events: %w", e)
		return true
	}
	p.n = max(n, 0)
	return p.n > 0
}

// wait returns what is ready; if nothing is, it sleeps until something is or deadline has come (loop nanoseconds,
// 0: none).
//
//	epoll_pwait(0)                         something is ready: that's all
//	epoll_pwait(0) -> 0, park, epoll_pwait(0)   otherwise
func (p *poller) wait(now, deadline int64) ([]unix.EpollEvent, error) {
	if p.look() {
		return p.events[:p.n], p.fault
	}
	if deadline != p.armed {
		p.armed = deadline
		var t time.Time
		if deadline != 0 {
			t = time.Now().Add(time.Duration(deadline - now))
		}
		if err := p.file.SetReadDeadline(t); err != nil {
			return nil, fmt.Errorf("wait for events: %w", err)
		}
	}
	if err := p.raw.Read(p.try); err != nil {
		p.n = 0
		p.armed = -1 // it is over; the next one has to be set, whatever it is
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("wait for events: %w", err)
		}
	}
	return p.events[:p.n], p.fault
}

// add watches fd for everything, edge-triggered: an edge says that there is news, and the conn remembers it until a
// call says otherwise.
func (p *poller) add(fd int32, gen uint32) error {
	return p.ctl(unix.EPOLL_CTL_ADD, fd, gen, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLPRI|unix.EPOLLET)
}

// addLevel watches fd for readability, level-triggered: told again and again until it's read.
func (p *poller) addLevel(fd int32, gen uint32) error {
	return p.ctl(unix.EPOLL_CTL_ADD, fd, gen, unix.EPOLLIN)
}

func (p *poller) remove(fd int32) { _ = p.ctl(unix.EPOLL_CTL_DEL, fd, 0, 0) }

func (p *poller) ctl(op int, fd int32, gen uint32, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: fd, Pad: int32(gen)}
	if err := unix.EpollCtl(int(p.fd), op, int(fd), &ev); err != nil {
		return fmt.Errorf("watch a socket: %w", err)
	}
	return nil
}

func (p *poller) close() { _ = p.file.Close() }
