// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// swarm is a number of open connections that one thread serves: crypto/tls shakes hands, and from then on their bytes go through one epoll and through
// package record, many records for a system call. A load that is slower than the gateway would measure it half asleep, and flatter those that are slower.
type swarm struct {
	poll    int
	lines   []*line
	scratch []byte // what one read brings
	events  []unix.EpollEvent
}

// line is a connection of a swarm.
type line struct {
	fd      int
	number  int // in its swarm
	secured bool
	read    record.Reader
	write   record.Writer
	kept    []byte // the beginning of a record
	room    []byte // where what is to be sent lies
	owed    []byte // inside room: what the socket has not taken yet
	waiting bool   // for the socket to take more

	busy   bool   // in an exchange
	text   []byte // what is sent, and must come back; nil: anything
	unsent int    // bytes of the exchange
	due    int    // bytes that are to come back
	left   int    // exchanges after this one
	began  time.Time
}

const (
	recordsAtOnce = 16
	readAtOnce    = 256 << 10
)

func newSwarm() (*swarm, error) {
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &swarm{poll: poll, scratch: make([]byte, readAtOnce+record.MaxRecord), events: make([]unix.EpollEvent, 256)}, nil
}

func (s *swarm) close() {
	for _, l := range s.lines {
		unix.Close(l.fd)
	}
	unix.Close(s.poll)
}

// join opens n connections, sixteen at a time.
func (s *swarm) join(n int, w way) error {
	lines := make([]*line, n)
	err := together(16, func(worker int) (err error) {
		for i := worker; i < n; i += 16 {
			if lines[i], err = w.line(); err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
		}
		return nil
	})
	for _, l := range lines {
		if l == nil {
			continue
		}
		l.number = len(s.lines)
		s.lines = append(s.lines, l)
		err = errors.Join(err, s.watch(l, unix.EPOLL_CTL_ADD, unix.EPOLLIN))
	}
	return err
}

func (s *swarm) watch(l *line, op int, events uint32) error {
	if err := unix.EpollCtl(s.poll, op, l.fd, &unix.EpollEvent{Events: events, Fd: int32(l.number)}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

// line is dial with the connection taken out of the hands of net and crypto/tls.
func (w way) line() (*line, error) {
	var log bytes.Buffer
	if w.tls != nil {
		w.tls = w.tls.Clone()
		w.tls.KeyLogWriter = &log
	}
	c, err := w.dial()
	if err != nil {
		return nil, err
	}
	l := new(line)
	if secured, ok := c.(*tls.Conn); ok {
		c = secured.NetConn()
		err = l.secure(secured.ConnectionState(), &log)
	}
	defer c.Close() // this descriptor of it; tls.Conn's Close would say close_notify
	if err != nil {
		return nil, err
	}
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	if e := raw.Control(func(fd uintptr) { l.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); e != nil || err != nil {
		return nil, fmt.Errorf("dup: %w", errors.Join(e, err))
	}
	return l, nil
}

// secure takes over from crypto/tls after the last byte of its handshake: both sides stand at their first record.
func (l *line) secure(state tls.ConnectionState, log *bytes.Buffer) error {
	l.secured = true
	for lines := bufio.NewScanner(log); lines.Scan(); {
		word := strings.Fields(lines.Text())
		secret, err := hex.DecodeString(word[2])
		if err != nil {
			return err
		}
		keys, err := record.TrafficKeys(state.CipherSuite, secret)
		if err != nil {
			return err
		}
		switch word[0] {
		case "CLIENT_TRAFFIC_SECRET_0":
			l.write.Init(keys, 0)
		case "SERVER_TRAFFIC_SECRET_0":
			l.read.Init(keys, 0, record.Client)
		}
	}
	if l.write.Suite() == 0 || l.read.Suite() == 0 {
		return errors.New("the handshake has told no keys")
	}
	return nil
}

// echo lets every connection of some send `times` messages, one after the other, all connections at once. It returns how long each took.
func (s *swarm) echo(some []*line, size, times int) ([]time.Duration, error) {
	took := make([]time.Duration, 0, len(some)*times)
	text := message(size)
	for _, l := range some {
		l.text, l.left = text, times-1
	}
	again := func(l *line) { l.unsent, l.due, l.began = size, size, time.Now() }
	err := s.exchange(some, again, func(l *line) bool {
		took = append(took, time.Since(l.began))
		l.left--
		return l.left < 0
	})
	return took, err
}

// bulk moves bytes through every connection, down and up at once, and returns when the backend has both sent and seen all of them.
func (s *swarm) bulk(down, up int) error {
	for _, l := range s.lines {
		l.text, l.unsent = askBulk(uint64(down), uint64(up)), bulkHeader
		if err := s.send(l); err != nil {
			return fmt.Errorf("ask for bulk: %w", err)
		}
		l.text = nil
	}
	return s.exchange(s.lines, func(l *line) { l.unsent, l.due = up, down+1 }, func(*line) bool { return true })
}

// exchange has some lines begin and goes on until each has sent and received all of it; then done says whether that was the last for this line.
func (s *swarm) exchange(some []*line, begin func(*line), done func(*line) bool) error {
	for _, l := range some {
		l.busy = true
		begin(l)
		if err := s.send(l); err != nil {
			return err
		}
	}
	for busy := len(some); busy > 0; {
		n, err := unix.EpollWait(s.poll, s.events, int(patience/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return fmt.Errorf("%d of %d connections are not done after %v: %v", busy, len(some), patience, err)
		}
		for _, e := range s.events[:n] {
			l := s.lines[e.Fd]
			if err := s.turn(l, e.Events); err != nil {
				return fmt.Errorf("%d bytes to send, %d to come: %w", l.unsent+len(l.owed), l.due, err)
			}
			if !l.busy || l.due > 0 || l.unsent > 0 || len(l.owed) > 0 {
				continue
			}
			if l.busy = !done(l); !l.busy {
				busy--
				continue
			}
			begin(l)
			if err := s.send(l); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *swarm) turn(l *line, events uint32) error {
	if events&^unix.EPOLLOUT != 0 {
		if err := s.receive(l); err != nil {
			return err
		}
	}
	if events&unix.EPOLLOUT != 0 {
		return s.send(l)
	}
	return nil
}

// send writes once: what is owed, or the next batch.
func (s *swarm) send(l *line) error {
	if len(l.owed) == 0 && l.unsent > 0 {
		l.seal()
	}
	if len(l.owed) > 0 {
		n, ok := write(l.fd, l.owed)
		if !ok {
			return errors.New("send: the connection has ended")
		}
		l.owed = l.owed[n:]
	}
	waiting := len(l.owed) > 0 || l.unsent > 0
	if waiting == l.waiting {
		return nil
	}
	l.waiting = waiting
	var events uint32 = unix.EPOLLIN
	if waiting {
		events |= unix.EPOLLOUT
	}
	return s.watch(l, unix.EPOLL_CTL_MOD, events)
}

// seal makes the next batch of what is to be sent.
func (l *line) seal() {
	n := min(l.unsent, recordsAtOnce*record.MaxPlaintext)
	before, behind := l.write.Prefix(), l.write.Suffix()
	if need := n + (n/record.MaxPlaintext+1)*(before+behind); len(l.room) < need {
		l.room = make([]byte, need)
	}
	at, text := 0, l.text
	for n > 0 {
		k := min(n, record.MaxPlaintext)
		if !l.secured {
			copy(l.room[at:], text)
			at += k
		} else {
			slot := l.room[at : at+before+k+behind]
			copy(slot[before:], text)
			at += l.write.Seal(slot, k)
		}
		text = text[min(k, len(text)):]
		n -= k
		l.unsent -= k
	}
	l.owed = l.room[:at]
}

// receive reads once. Plain bulk is dropped inside the kernel (MSG_TRUNC), uncopied.
func (s *swarm) receive(l *line) error {
	flags := 0
	if !l.secured && l.text == nil {
		flags = unix.MSG_TRUNC
	}
	had := copy(s.scratch, l.kept)
	n, _, err := unix.Recvfrom(l.fd, s.scratch[had:], flags)
	if err == unix.EAGAIN || err == unix.EINTR {
		return nil
	}
	if err != nil || n <= 0 {
		return fmt.Errorf("read: the connection has ended, %v", err)
	}
	if !l.secured {
		return l.take(s.scratch[:n], n)
	}
	p := s.scratch[:had+n]
	for {
		rec, n, err := l.read.Next(p)
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		p = p[n:]
		if rec.Kind == record.CloseNotify || rec.Kind == record.AlertReceived {
			return fmt.Errorf("the gateway ends it: %v %v", rec.Kind, rec.Alert)
		}
		if err := l.take(rec.Data, len(rec.Data)); err != nil {
			return err
		}
	}
	l.kept = append(l.kept[:0], p...)
	return nil
}

// take counts n bytes that have come.
func (l *line) take(p []byte, n int) error {
	if n > l.due {
		return fmt.Errorf("%d bytes too many", n-l.due)
	}
	if at := len(l.text) - l.due; l.text != nil && !bytes.Equal(p, l.text[at:at+n]) {
		return errors.New("the echo is not what was sent")
	}
	l.due -= n
	return nil
}
