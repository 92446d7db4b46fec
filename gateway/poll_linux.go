// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
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
	armed  int64       // the deadline that is set on file; 0: none
	asleep atomic.Bool // in wait, or about to be: somebody who has news must wake it
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

// sleep returns what is ready once something is, at the latest when deadline has come (loop nanoseconds, 0: never), or
// at once if news says so: it is asked after which moment everybody who has news knows that the loop must be woken.
//
//	park, epoll_pwait(0)
func (p *poller) sleep(now, deadline int64, news func() bool) ([]unix.EpollEvent, error) {
	p.n = 0
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
	p.asleep.Store(true) // only now may wake set a deadline of its own
	if news() {
		p.asleep.Store(false)
		return nil, nil
	}
	err := p.raw.Read(p.try)
	p.asleep.Store(false)
	if err != nil {
		p.n = 0
		p.armed = -1 // it is over; the next one has to be set, whatever it is
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("wait for events: %w", err)
		}
	}
	return p.events[:p.n], p.fault
}

// longAgo as a deadline ends a sleep.
var longAgo = time.Unix(1, 0)

// wake ends the sleep, if there is one. It may be called from anywhere, and makes no system call: the deadline of the
// sleeper is moved to the past. Should that come too late for this sleep, it ends the next one.
func (p *poller) wake() {
	if p.asleep.CompareAndSwap(true, false) {
		_ = p.file.SetReadDeadline(longAgo)
	}
}

// add watches a socket for everything, edge-triggered: an edge says that there is news, and the conn remembers it until
// a call says otherwise.
func (p *poller) add(fd int32, slot, gen uint32) error {
	return p.ctl(fd, slot, gen, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLPRI|unix.EPOLLET)
}

// addLevel watches a socket for readability, level-triggered: told again and again until it's read.
func (p *poller) addLevel(fd int32, slot, gen uint32) error {
	return p.ctl(fd, slot, gen, unix.EPOLLIN)
}

func (p *poller) remove(fd int32) { _ = unix.EpollCtl(int(p.fd), unix.EPOLL_CTL_DEL, int(fd), nil) }

// ctl begins to watch a socket. The events name its slot, not its descriptor.
func (p *poller) ctl(fd int32, slot, gen uint32, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(slot), Pad: int32(gen)}
	if err := unix.EpollCtl(int(p.fd), unix.EPOLL_CTL_ADD, int(fd), &ev); err != nil {
		return fmt.Errorf("watch a socket: %w", err)
	}
	return nil
}

func (p *poller) close() { _ = p.file.Close() }
