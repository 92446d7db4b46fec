// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLastCallsNeedNoRight: before a port closes nobody new is let in, and whoever has begun to connect is served, with
// the kernel's filter where that is allowed, and without it.
func TestLastCallsNeedNoRight(t *testing.T) {
	for name, deafen := range map[string]func(*listener) error{"as it can": (*listener).deafen, "without a right": (*listener).dropRouted} {
		for _, at := range []string{"", "127.0.0.1", "::1"} {
			t.Run(name+" on "+at, func(t *testing.T) { lastCallsOn(t, at, deafen) })
		}
	}
}

func lastCallsOn(t *testing.T, at string, deafen func(*listener) error) {
	l := &loop{gw: &Gateway{}, accept4: sysAccept}
	ln := &listener{loop: l, rules: &portRules{}}
	if at != "" {
		ln.addr = netip.MustParseAddr(at)
	}
	if err := ln.open(); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(int(ln.fd))
	ports := localAddr(ln.fd).Port()
	ways := []string{at}
	if at == "" {
		ways = []string{"127.0.0.1", "::1"}
	}
	// With it a handshake is complete for the kernel only when the client has sent something.
	if err := unix.SetsockoptInt(int(ln.fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 10); err != nil {
		t.Fatal(err)
	}
	var begun []net.Conn
	connect := func(host string, in time.Duration) (net.Conn, error) {
		return net.DialTimeout("tcp", netip.AddrPortFrom(netip.MustParseAddr(host), ports).String(), in)
	}
	for _, host := range ways {
		c, err := connect(host, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		begun = append(begun, c)
	}
	if err := deafen(ln); err != nil {
		t.Fatal(err)
	}
	for _, host := range ways {
		if c, err := connect(host, 50*time.Millisecond); err == nil {
			_ = c.Close()
			t.Errorf("a client of %s is let in", host)
		}
	}
	for _, c := range begun {
		finishes(t, ln, c)
	}
}

// finishes has a client that is on its way arrive, and talk.
func finishes(t *testing.T, ln *listener, c net.Conn) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "a"); err != nil {
		t.Fatal(err)
	}
	fd := int32(-1)
	for deadline := time.Now().Add(patience); fd < 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a client that has begun to connect is not accepted")
		}
		fd, _, _ = sysAccept(ln.fd)
	}
	ln.accepted(fd)
	_ = unix.SetNonblock(int(fd), false)
	defer unix.Close(int(fd))
	for _, word := range []string{"a", "b"} { // the second one comes to the accepted socket
		b := make([]byte, 1)
		if n, err := unix.Read(int(fd), b); err != nil || string(b[:n]) != word {
			t.Fatalf("it said %q, %v", b[:max(n, 0)], err)
		}
		if word == "a" {
			_, _ = io.WriteString(c, "b")
		}
	}
}
