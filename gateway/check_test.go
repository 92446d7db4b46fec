// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
	"github.com/tlsnat/tlsnat/natmap"
)

const patience = time.Minute

// deafServer listens, and hears nobody who wants to connect until it is told to.
func deafServer(t testing.TB) (s *server, l *net.TCPListener, hear func()) {
	t.Helper()
	config := net.ListenConfig{}
	config.SetMultipathTCP(false) // which takes no filter
	heard, err := config.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l = heard.(*net.TCPListener)
	t.Cleanup(func() { _ = l.Close() })
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { err = (&listener{fd: int32(fd)}).dropRouted() })
	if err != nil {
		t.Fatal(err)
	}
	return newServer(l.Addr().(*net.TCPAddr).AddrPort(), ""), l, func() {
		_ = raw.Control(func(fd uintptr) { err = hearFrom(int32(fd), 0) })
		if err != nil {
			t.Error(err)
		}
	}
}

// TestTouchWaitsForAnAnswer: from a server that does not answer at once, as far as patience and the gateway last; what
// it hears is the words and the end.
func TestTouchWaitsForAnAnswer(t *testing.T) {
	s, l, hear := deafServer(t)
	if err := s.touch(t.Context(), nil, 50*time.Millisecond, nil); err == nil || err.Error() != "no answer in time" {
		t.Errorf("out of patience: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	began := time.Now()
	if err := s.touch(ctx, nil, patience, nil); err == nil || time.Since(began) > patience/2 {
		t.Errorf("stopped: %v after %v", err, time.Since(began))
	}
	time.AfterFunc(50*time.Millisecond, hear) // the kernel sends its SYN again after a second
	if err := s.touch(t.Context(), nil, patience, []byte("PROXY UNKNOWN\r\n")); err != nil {
		t.Errorf("late: %v", err)
	}
	_ = l.SetDeadline(time.Now().Add(patience))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if heard, err := io.ReadAll(c); err != nil || string(heard) != "PROXY UNKNOWN\r\n" {
		t.Errorf("the server heard %q, %v", heard, err)
	}
}

// TestTouchTellsWhoListens: over TCP and in the file system; a port that the kernel gives to the very socket that wants to
// connect there is not one where somebody listens.
func TestTouchTellsWhoListens(t *testing.T) {
	port := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(unused(t)))
	path := filepath.Join(testkit.Dir(t), "socket")
	here, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	s, _, hear := deafServer(t)
	hear()
	itself := &outbound{source: natmap.Origin{Addr: port.Addr(), Lo: port.Port(), Hi: port.Port()}, dscp: -1}
	for _, c := range []struct {
		name string
		to   *server
		out  *outbound
		want error
	}{
		{"a port", s, nil, nil},
		{"a socket", newServer(netip.AddrPort{}, path), itself, nil},
		{"no port", newServer(port, ""), nil, unix.ECONNREFUSED},
		{"no socket", newServer(netip.AddrPort{}, path+"2"), nil, unix.ENOENT},
		{"itself", newServer(port, ""), itself, unix.ECONNREFUSED},
	} {
		if err := c.to.touch(t.Context(), c.out, patience, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// BenchmarkTouch is a check=tcp of a server that is not there.
func BenchmarkTouch(b *testing.B) {
	s := newServer(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(unused(b))), "")
	b.ReportAllocs()
	for b.Loop() {
		if err := s.touch(b.Context(), nil, patience, nil); !errors.Is(err, unix.ECONNREFUSED) {
			b.Fatal(err)
		}
	}
}
