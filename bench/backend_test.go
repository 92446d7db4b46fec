// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The backend speaks a protocol that costs it next to nothing. The first byte says what a connection is:
//
//	0x16  a TLS record to throw away (the ClientHello that a passthrough has routed on), then the next byte says it
//	'e'   echo: every byte comes back, this one too
//	'b'   bulk: a header of 17 bytes, 'b', down and up (big endian, 64 bits each): the backend sends `down` bytes, takes `up` bytes, and sends one more
//	      byte when both are done; then the next header may come
//
// One thread, one level-triggered epoll, no allocation per byte.
const bulkHeader = 1 + 8 + 8

// askBulk is a bulk header.
func askBulk(down, up uint64) []byte {
	p := []byte{'b'}
	p = binary.BigEndian.AppendUint64(p, down)
	return binary.BigEndian.AppendUint64(p, up)
}

type backend struct {
	poll, listener int
	talks          []*talk // by descriptor
	scratch        []byte
	zeros          []byte
}

// talk is one connection, where it stands.
type talk struct {
	fd       int
	echo     bool
	gathered []byte // a header or the head of a record, not complete yet
	skip     int    // bytes of the record that are still to be thrown away
	down, up uint64 // bytes of a bulk exchange that are still to be sent and to be taken
	pending  []byte // what the socket did not take
	waiting  bool   // for the socket to take more
	busy     bool   // in a bulk exchange
}

// runBackend is a process of its own: it prints its address, and ends with its standard input.
func runBackend() error {
	runtime.LockOSThread()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	b := &backend{scratch: make([]byte, 1<<20), zeros: make([]byte, 128<<10)}
	if err := b.listen(); err != nil {
		return err
	}
	return b.serve()
}

func (b *backend) listen() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	// Inherited by what it accepts.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("TCP_NODELAY: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		return fmt.Errorf("getsockname: %w", err)
	}
	if b.poll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	b.listener = fd
	if err := b.watch(fd, unix.EPOLL_CTL_ADD, unix.EPOLLIN); err != nil {
		return err
	}
	_, err = fmt.Printf("127.0.0.1:%d\n", at.(*unix.SockaddrInet4).Port)
	return err
}

func (b *backend) watch(fd, op int, events uint32) error {
	if err := unix.EpollCtl(b.poll, op, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

func (b *backend) serve() error {
	events := make([]unix.EpollEvent, 256)
	for {
		n, err := unix.EpollWait(b.poll, events, -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("epoll_wait: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			fd := int(e.Fd)
			if fd == b.listener {
				b.accept()
			} else if t := b.talks[fd]; !b.turn(t, e.Events) {
				b.talks[fd] = nil
				unix.Close(fd)
			}
		}
	}
}

func (b *backend) accept() {
	for range 64 {
		fd, _, err := unix.Accept4(b.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		if b.watch(fd, unix.EPOLL_CTL_ADD, unix.EPOLLIN) != nil {
			unix.Close(fd)
			continue
		}
		for len(b.talks) <= fd {
			b.talks = append(b.talks, nil)
		}
		b.talks[fd] = &talk{fd: fd}
	}
}

// turn lets a connection move on by one read and one write; false ends it.
func (b *backend) turn(t *talk, events uint32) bool {
	if events&unix.EPOLLIN != 0 && !b.take(t) {
		return false
	}
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 && events&unix.EPOLLIN == 0 {
		return false
	}
	if !b.give(t) {
		return false
	}
	return b.setWaiting(t, len(t.pending) > 0 || t.down > 0)
}

func (b *backend) setWaiting(t *talk, waiting bool) bool {
	if waiting == t.waiting {
		return true
	}
	t.waiting = waiting
	var events uint32 = unix.EPOLLIN
	if waiting {
		events |= unix.EPOLLOUT
	}
	if t.echo && waiting {
		events = unix.EPOLLOUT // an echo that is not taken stops its source
	}
	return b.watch(t.fd, unix.EPOLL_CTL_MOD, events) == nil
}

// take reads once. Bulk that comes up is dropped inside the kernel (MSG_TRUNC), uncopied.
func (b *backend) take(t *talk) bool {
	buf, flags := b.scratch, 0
	if t.up > 0 {
		buf, flags = buf[:min(uint64(len(buf)), t.up)], unix.MSG_TRUNC
	} else if !t.echo {
		buf = buf[:64<<10]
	}
	n, _, err := unix.Recvfrom(t.fd, buf, flags)
	if err != nil {
		return err == unix.EAGAIN || err == unix.EINTR
	}
	if n == 0 {
		return false
	}
	if t.up > 0 {
		t.up -= uint64(n)
		return true
	}
	return t.hear(buf[:n])
}

// hear is the protocol's state machine; it takes bytes cut anywhere.
func (t *talk) hear(p []byte) bool {
	for len(p) > 0 {
		var n int
		switch {
		case t.echo:
			t.pending = append(t.pending, p...)
			return true
		case t.skip > 0:
			n = min(t.skip, len(p))
			t.skip -= n
		case t.up > 0:
			n = int(min(t.up, uint64(len(p))))
			t.up -= uint64(n)
		case len(t.gathered) == 0 && p[0] == 'e':
			t.echo = true
		case len(t.gathered) == 0 && (t.busy || p[0] != 'b' && p[0] != 0x16):
			return false
		default:
			n = t.gather(p)
		}
		p = p[n:]
	}
	return true
}

// gather completes a bulk header or the head of a TLS record, and acts on it.
func (t *talk) gather(p []byte) int {
	need := bulkHeader
	if first := append(t.gathered, p[0])[0]; first == 0x16 {
		need = 5
	}
	n := min(need-len(t.gathered), len(p))
	t.gathered = append(t.gathered, p[:n]...)
	if len(t.gathered) < need {
		return n
	}
	if need == 5 {
		t.skip = int(binary.BigEndian.Uint16(t.gathered[3:]))
	} else {
		t.busy = true
		t.down, t.up = binary.BigEndian.Uint64(t.gathered[1:]), binary.BigEndian.Uint64(t.gathered[9:])
	}
	t.gathered = t.gathered[:0]
	return n
}

// give writes once: what is owed from before, or the next piece of a bulk answer, or the byte that ends it.
func (b *backend) give(t *talk) bool {
	switch {
	case len(t.pending) > 0:
		n, ok := write(t.fd, t.pending)
		t.pending = append(t.pending[:0], t.pending[n:]...)
		return ok
	case t.down > 0:
		n, ok := write(t.fd, b.zeros[:min(uint64(len(b.zeros)), t.down)])
		t.down -= uint64(n)
		if t.down > 0 || !ok {
			return ok
		}
	}
	if t.busy && t.down == 0 && t.up == 0 {
		t.busy = false
		n, ok := write(t.fd, []byte{'.'})
		t.pending = append(t.pending, "."[n:]...)
		return ok
	}
	return true
}

func write(fd int, p []byte) (n int, ok bool) {
	n, err := unix.Write(fd, p)
	if err == unix.EAGAIN || err == unix.EINTR {
		return 0, true
	}
	return max(n, 0), err == nil
}
