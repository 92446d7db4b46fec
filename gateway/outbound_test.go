// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// connected is a connection with a backend and a client of the test's, as far as its sockets go.
func connected(t *testing.T, at, options string) (c *conn, backend *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c = chooser(t, fmt.Sprintf(":1 -> %s mode=tcp %s", l.Addr(), options))
	connect := func() int32 {
		fd, err := (&dialling{spot: &c.route.choices.Load().primary[0]}).socket(c, c.servers()[0], false)
		if err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(int(fd)) })
		return fd
	}
	accept := func() *net.TCPConn {
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = a.Close() })
		return a.(*net.TCPConn)
	}
	c.backend.fd = connect()
	backend = accept()
	raw, err := backend.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { c.client.fd = int32(fd) }) // any accepted socket will do for the client's
	return c, backend
}

func option(t *testing.T, fd int32, level, name int) int {
	t.Helper()
	v, err := unix.GetsockoptInt(int(fd), level, name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestSocketsAreAsTheRuleWants: those to backends from the start, clients' once it's known which rule it is.
func TestSocketsAreAsTheRuleWants(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		c, backend := connected(t, at, "dscp=ef user-timeout=7s keepalive=45s")
		c.tuneClient()
		c.keepKnown()
		level, name := unix.IPPROTO_IP, unix.IP_TOS
		if netip.MustParseAddrPort(backend.LocalAddr().String()).Addr().Is6() {
			level, name = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		for who, fd := range map[string]int32{"backend": c.backend.fd, "client": c.client.fd} {
			if v := option(t, fd, level, name); v != 46<<2 {
				t.Errorf("%s on %s: traffic class %#x, want that of EF", who, at, v)
			}
			if v := option(t, fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); v != 7000 {
				t.Errorf("%s on %s: user timeout %d ms", who, at, v)
			}
			if on, idle := option(t, fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE), option(t, fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE); on != 1 || idle != 45 {
				t.Errorf("%s on %s: keepalive %d after %d s", who, at, on, idle)
			}
		}
	}
	c, _ := connected(t, "127.0.0.1:0", "keepalive=off")
	keepAlive(c.client.fd)
	c.keepKnown()
	for who, fd := range map[string]int32{"backend": c.backend.fd, "client": c.client.fd} {
		if option(t, fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0 {
			t.Errorf("%s: keepalive is on", who)
		}
	}
}

func TestRulesWithoutSocketOptionsPayNothing(t *testing.T) {
	if c := chooser(t, ":1 -> 10.0.0.1:1 mode=tcp balance=random check=tcp"); c.route.outbound != nil {
		t.Errorf("%+v", c.route.outbound)
	}
}

// TestMultipathWhereItIsThere: package net listens with MPTCP by itself. Without it in the kernel it is TCP.
func TestMultipathWhereItIsThere(t *testing.T) {
	c, backend := connected(t, "127.0.0.1:0", "mptcp=on")
	protocol := option(t, c.backend.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if multipath, err := backend.MultipathTCP(); err != nil || multipath != (protocol == unix.IPPROTO_MPTCP) {
		t.Errorf("the socket speaks protocol %d, the backend sees multipath: %v, %v", protocol, multipath, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
	if err == nil {
		_ = unix.Close(fd)
		if protocol != unix.IPPROTO_MPTCP {
			t.Errorf("the kernel has MPTCP, and the socket speaks protocol %d", protocol)
		}
	}
}
