// SPDX-License-Identifier: Apache-2.0

package ktls

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// pair is a TCP connection through the loopback interface. One end is the kernel's to carry, the other end is carried
// by package record.
type pair struct {
	kernel, user int32
	pipe         [2]int
	reader       record.Reader // what the kernel's end sends
	writer       record.Writer // to the kernel's end
	got          []byte        // read at the user's end and not opened
}

// patience bounds a call, in seconds: over loopback they take microseconds.
const patience = 2

func newPair() (p *pair, err error) {
	p = &pair{kernel: -1, user: -1, pipe: [2]int{-1, -1}}
	defer func() {
		if err != nil {
			p.close()
			err = fmt.Errorf("make a connection to try it on: %w", err)
		}
	}()
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, err
	}
	defer unix.Close(listener)
	if err := unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return p, err
	}
	if err := unix.Listen(listener, 1); err != nil {
		return p, err
	}
	addr, err := unix.Getsockname(listener)
	if err != nil {
		return p, err
	}
	user, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, err
	}
	p.user = int32(user)
	if err := unix.Connect(user, addr); err != nil {
		return p, err
	}
	if _, err := newEnd(user, nil); err != nil {
		return p, err
	}
	if p.kernel, err = acceptFrom(listener, p.user); err != nil {
		return p, err
	}
	return p, unix.Pipe2(p.pipe[:], unix.O_CLOEXEC)
}

// acceptFrom accepts the connection of that socket; whoever else found the port is sent away.
func acceptFrom(listener int, user int32) (int32, error) {
	ours, err := unix.Getsockname(int(user))
	if err != nil {
		return -1, err
	}
	for {
		fd, peer, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != nil {
			return -1, err
		}
		a, _ := peer.(*unix.SockaddrInet4)
		b, _ := ours.(*unix.SockaddrInet4)
		if a != nil && b != nil && a.Port == b.Port && a.Addr == b.Addr {
			return newEnd(fd, nil)
		}
		_ = unix.Close(fd)
	}
}

// newEnd sets what keeps a test from hanging. Calls with a time limit are not restarted behind a signal, of which the Go
// runtime sends itself many: see whole.
func newEnd(fd int, err error) (int32, error) {
	if err != nil {
		return -1, err
	}
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &unix.Timeval{Sec: patience}); err != nil {
			return int32(fd), err
		}
	}
	return int32(fd), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

func (p *pair) close() {
	for _, fd := range []int{int(p.kernel), int(p.user), p.pipe[0], p.pipe[1]} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	p.reader.Wipe()
	p.writer.Wipe()
}

// try runs one test on a pair of its own, whose ends have keys of the kind.
func try(k Kind, test func(*pair) error) error {
	p, err := newPair()
	if err != nil {
		return err
	}
	defer p.close()
	if err := Attach(p.kernel); err != nil {
		return fmt.Errorf("TCP_ULP: %w", err)
	}
	down, up, err := testKeys(k)
	if err != nil {
		return err
	}
	// Numbers that are not 0, and of more than one byte: their order has to be right.
	const begin = 0x0102
	p.reader.Init(down, begin, record.Client)
	p.writer.Init(up, begin)
	return test(p)
}

// testKeys are keys of the kind that nobody else has, for the kernel's end to write and to read with.
func testKeys(k Kind) (down, up record.Keys, err error) {
	secret := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		return b
	}
	if !k.TLS13() {
		up, down, err = record.KeyBlock(k.suite(), secret(48), secret(32), secret(32))
		return down, up, err
	}
	size := 32
	if k == TLS13AES256 {
		size = 48
	}
	if down, err = record.TrafficKeys(k.suite(), secret(size)); err != nil {
		return down, up, err
	}
	up, err = record.TrafficKeys(k.suite(), secret(size))
	return down, up, err
}

// sizes are around the ends of a record (16384), and what makes several.
var sizes = []int{1, 2, 15, 16, 17, 255, 4096, 16383, 16384, 16385, 2*16384 - 1, 2 * 16384, 3*16384 + 1}

// pattern is n bytes in which no two records are alike.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8 + i>>14 + n)
	}
	return b
}

// trySealing has the kernel seal and package record open.
func trySealing(p *pair) error {
	k, seq := p.reader.Export()
	defer k.Wipe()
	if err := SetTX(p.kernel, &k, seq); err != nil {
		return fmt.Errorf("set TLS_TX: %w", err)
	}
	for i, n := range sizes {
		send := p.write
		if i%2 == 1 || n > 16384 {
			send = p.splice
		}
		data := pattern(n)
		if err := send(data); err != nil {
			return fmt.Errorf("send %d bytes: %w", n, err)
		}
		if err := p.expect(data); err != nil {
			return fmt.Errorf("send %d bytes: %w", n, err)
		}
	}
	if e := Send(p.kernel, record.TypeAlert, []byte{1, byte(record.AlertCloseNotify)}); e != 0 {
		return fmt.Errorf("send close_notify: %w", e)
	}
	rec, err := p.next()
	if err == nil && rec.Kind != record.CloseNotify {
		err = errors.New("it came as " + rec.Kind.String())
	}
	return err
}

func (p *pair) write(data []byte) error { return writeAll(int(p.kernel), data) }

// whole makes a call again that a signal has interrupted.
func whole(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := whole(func() (int, error) { return unix.Write(fd, b) })
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		b = b[n:]
	}
	return nil
}

func spliceSome(from, to, n int) (int, error) {
	return whole(func() (int, error) {
		m, err := unix.Splice(from, nil, to, nil, n, 0)
		return int(m), err
	})
}

// splice sends data through the pipe, which holds 64 KiB: more than any of sizes.
func (p *pair) splice(data []byte) error {
	if err := writeAll(p.pipe[1], data); err != nil {
		return err
	}
	for left := len(data); left > 0; {
		n, err := spliceSome(p.pipe[0], int(p.kernel), left)
		if err != nil {
			return fmt.Errorf("splice: %w", err)
		}
		left -= n
	}
	return nil
}

// expect reads and opens as much as data, at the user's end, and compares.
func (p *pair) expect(data []byte) error {
	var plain []byte
	for len(plain) < len(data) {
		rec, err := p.next()
		if err != nil {
			return err
		}
		if rec.Kind != record.Data {
			return errors.New("a record came as " + rec.Kind.String())
		}
		plain = append(plain, rec.Data...)
	}
	return same(plain, data)
}

func same(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return errors.New("other bytes came out than went in")
	}
	return nil
}

// next is the next record at the user's end.
func (p *pair) next() (record.Record, error) {
	for {
		rec, n, err := p.reader.Next(p.got)
		if err != nil {
			return rec, err
		}
		if n > 0 {
			rec.Data = slices.Clone(rec.Data)
			p.got = p.got[n:]
			return rec, nil
		}
		buf := make([]byte, record.MaxRecord)
		m, err := whole(func() (int, error) { return unix.Read(int(p.user), buf) })
		if err != nil || m == 0 {
			return rec, fmt.Errorf("read: %d bytes, %v", m, err)
		}
		p.got = append(p.got, buf[:m]...)
	}
}

// tryOpening has package record seal and the kernel open.
func tryOpening(p *pair) error {
	k, seq := p.writer.Export()
	defer k.Wipe()
	if err := SetRX(p.kernel, &k, seq); err != nil {
		return fmt.Errorf("set TLS_RX: %w", err)
	}
	for _, n := range sizes {
		data := pattern(n)
		if err := p.seal(data); err != nil {
			return fmt.Errorf("receive %d bytes: %w", n, err)
		}
		got, err := p.spliced(n)
		if err == nil {
			err = same(got, data)
		}
		if err != nil {
			return fmt.Errorf("receive %d bytes: %w", n, err)
		}
	}
	return p.tryControl()
}

// tryControl sends a close_notify, which splice has to refuse and Receive to deliver.
func (p *pair) tryControl() error {
	alert := p.writer.AppendAlert(nil, record.AlertCloseNotify)
	if err := writeAll(int(p.user), alert); err != nil {
		return err
	}
	if _, err := spliceSome(int(p.kernel), p.pipe[1], 1); err != unix.EINVAL {
		return fmt.Errorf("receive close_notify: splice says %v, not EINVAL", err)
	}
	var b [16]byte
	n, typ, e := Receive(p.kernel, b[:])
	if e != 0 || n != 2 || typ != record.TypeAlert {
		return fmt.Errorf("receive close_notify: %d bytes of type %d, error %d", n, typ, e)
	}
	return nil
}

// seal sends data from the user's end, in full records.
func (p *pair) seal(data []byte) error {
	for chunk := range slices.Chunk(data, record.MaxPlaintext) {
		slot := make([]byte, p.writer.Prefix()+len(chunk)+p.writer.Suffix())
		copy(slot[p.writer.Prefix():], chunk)
		sealed := slot[:p.writer.Seal(slot, len(chunk))]
		if err := writeAll(int(p.user), sealed); err != nil {
			return err
		}
	}
	return nil
}

// spliced reads n bytes at the kernel's end, through the pipe.
func (p *pair) spliced(n int) (got []byte, err error) {
	for len(got) < n {
		m, err := spliceSome(int(p.kernel), p.pipe[1], n-len(got))
		if err != nil || m == 0 {
			return got, fmt.Errorf("splice: %d bytes, %v", m, err)
		}
		for buf := make([]byte, m); m > 0; {
			read, err := whole(func() (int, error) { return unix.Read(p.pipe[0], buf[:m]) })
			if err != nil {
				return got, fmt.Errorf("read the pipe: %w", err)
			}
			got = append(got, buf[:read]...)
			m -= read
		}
	}
	return got, nil
}

// keyUpdate asks for no answer (RFC 8446, section 4.6.3).
var keyUpdate = []byte{24, 0, 0, 1, 0}

// tryNewTX replaces the key that the kernel seals with.
func tryNewTX(p *pair) error {
	k, seq := p.reader.Export()
	defer k.Wipe()
	if err := SetTX(p.kernel, &k, seq); err != nil {
		return err
	}
	if e := Send(p.kernel, record.TypeHandshake, keyUpdate); e != 0 {
		return e
	}
	k.Update()
	if err := SetTX(p.kernel, &k, 0); err != nil {
		return err
	}
	if rec, err := p.next(); err != nil || rec.Kind != record.KeyUpdate {
		return fmt.Errorf("%v came, %v", rec.Kind, err)
	}
	data := pattern(100)
	if err := p.write(data); err != nil {
		return err
	}
	return p.expect(data)
}

// tryNewRX replaces the key that the kernel opens with.
func tryNewRX(p *pair) error {
	k, seq := p.writer.Export()
	defer k.Wipe()
	if err := SetRX(p.kernel, &k, seq); err != nil {
		return err
	}
	if err := writeAll(int(p.user), p.writer.AppendKeyUpdate(nil, false)); err != nil {
		return err
	}
	news := []unix.PollFd{{Fd: p.kernel, Events: unix.POLLIN}}
	if _, err := whole(func() (int, error) { return unix.Poll(news, patience*1000) }); err != nil {
		return err
	}
	var b [16]byte
	if n, typ, e := Receive(p.kernel, b[:]); e != 0 || typ != record.TypeHandshake || !bytes.Equal(b[:n], keyUpdate) {
		return fmt.Errorf("%x of type %d came, error %d", b[:n], typ, e)
	}
	k.Update()
	if err := SetRX(p.kernel, &k, 0); err != nil {
		return err
	}
	data := pattern(100)
	if err := p.seal(data); err != nil {
		return err
	}
	got, err := p.spliced(len(data))
	if err != nil {
		return err
	}
	return same(got, data)
}
