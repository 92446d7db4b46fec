// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/natmap"
)

// outbound is how a rule wants its sockets to be. Most rules want nothing, and have none.
type outbound struct {
	source      natmap.Origin
	keepalive   time.Duration // 0: the usual; negative: off
	userTimeout int           // milliseconds; 0: the system's
	dscp        int           // of 64; -1: the system's
	mptcp       bool
	fastOpen    bool

	kernelPorts bool          // the kernel can choose among the source's ports
	last        atomic.Uint32 // of them, where it can't
}

func newOutbound(o *natmap.PoolOptions) *outbound {
	out := &outbound{source: o.Source, keepalive: o.KeepAlive, dscp: -1, mptcp: o.MPTCP == natmap.SwitchOn, fastOpen: o.FastOpen == natmap.SwitchOn}
	if o.UserTimeout > 0 {
		const longest = 1<<31 - 1 // an int of milliseconds, 24 days
		out.userTimeout = int(min(o.UserTimeout.Milliseconds(), longest))
	}
	out.kernelPorts = o.Source.Lo != 0 && kernelChooses(o.Source.Lo, o.Source.Hi)
	if o.DSCP != nil {
		out.dscp = int(*o.DSCP)
	}
	plain := out.source == (natmap.Origin{}) && out.keepalive == 0 && out.userTimeout == 0 && out.dscp < 0
	if plain && !out.mptcp && !out.fastOpen {
		return nil
	}
	return out
}

// protocol is what a socket to a backend speaks. A kernel without MPTCP says so, and gets an ordinary one.
func (o *outbound) protocol() int {
	if o != nil && o.mptcp {
		return unix.IPPROTO_MPTCP
	}
	return unix.IPPROTO_TCP
}

// tune sets what holds for both of a connection's sockets. What a kernel does not know is left out.
func (o *outbound) tune(fd int32, family int) {
	if o.userTimeout > 0 {
		_ = sysSet(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, o.userTimeout)
	}
	if o.dscp < 0 {
		return
	}
	const ecnBits = 2 // the code point is the upper six bits of the byte (RFC 2474, section 3; RFC 3168)
	if family == unix.AF_INET6 {
		_ = sysSet(fd, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, o.dscp<<ecnBits)
	}
	_ = sysSet(fd, unix.IPPROTO_IP, unix.IP_TOS, o.dscp<<ecnBits) // IPv4 on an IPv6 socket, too
}

// tuneClient sets it for the client's socket, which is known to be the rule's only now.
func (c *conn) tuneClient() {
	if o := c.route.outbound; o != nil {
		o.tune(c.client.fd, unix.AF_INET6)
	}
}

// begin makes ready a socket that is going to connect to an address of that family.
func (o *outbound) begin(fd, family int, client netip.Addr, early bool) error {
	if o == nil {
		return nil
	}
	o.tune(int32(fd), family)
	if o.fastOpen && early {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
	}
	return o.bind(fd, family, client)
}

var errFamily = errors.New("its address and that of source= are not of one family, IPv4 or IPv6")

// bind gives the socket the address that the rule wants the backend to see. The kernel chooses the port when the
// connection is made: then it may be one that is in use towards other backends.
//
//	[setsockopt(IP_TRANSPARENT)], [setsockopt(IP_LOCAL_PORT_RANGE)], setsockopt(IP_BIND_ADDRESS_NO_PORT), bind
func (o *outbound) bind(fd, family int, client netip.Addr) error {
	from := o.source.Addr
	if o.source.Transparent {
		from = client
	}
	if !from.IsValid() {
		return nil
	}
	if from.Is4() != (family == unix.AF_INET) {
		return errFamily
	}
	if o.source.Transparent {
		if err := setTransparent(fd, family); err != nil {
			return err
		}
	}
	if o.source.Lo == 0 || o.kernelPorts && setPortRange(fd, o.source.Lo, o.source.Hi) == nil {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		sa, _ := sockaddrOf(netip.AddrPortFrom(from, 0))
		return unix.Bind(fd, sa)
	}
	return o.bindPort(fd, from)
}

// bindPort takes the next port of the range that is free. It is a loop that waits, so it does not try them all.
func (o *outbound) bindPort(fd int, from netip.Addr) error {
	const tries = 64
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // a port that is in use towards another backend will do
	n := uint32(o.source.Hi) - uint32(o.source.Lo) + 1
	var err error
	for range min(n, tries) {
		port := o.source.Lo + uint16(o.last.Add(1)%n)
		sa, _ := sockaddrOf(netip.AddrPortFrom(from, port))
		if err = unix.Bind(fd, sa); !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
	}
	return err
}

// again says whether another port of the source may do where this one is in use towards the same server.
func (o *outbound) again(err error, tried int) bool {
	const tries = 16
	return o != nil && errors.Is(err, unix.EADDRNOTAVAIL) && o.source.Lo != 0 && !o.kernelPorts && tried < tries
}

// prepare has a dialler beside the loops connect from where the rule's connections come from. There is no client whose
// address could be taken.
func (o *outbound) prepare(d *net.Dialer) {
	if o == nil {
		return
	}
	d.Control = func(network, _ string, raw syscall.RawConn) error {
		family := unix.AF_INET
		if strings.HasSuffix(network, "6") {
			family = unix.AF_INET6
		}
		var err error
		if controlErr := raw.Control(func(fd uintptr) {
			o.tune(int32(fd), family)
			if !o.source.Transparent {
				err = o.bind(int(fd), family, netip.Addr{})
			}
		}); controlErr != nil {
			return controlErr
		}
		return err
	}
}

// keepAliveAs has the kernel ask a silent peer as keepalive= says.
func (o *outbound) keepAliveAs(fd int32) {
	if o.keepalive < 0 {
		_ = sysSet(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0)
		return
	}
	keepAlive(fd)
	const longest = 32767 // seconds: MAX_TCP_KEEPIDLE of the kernel
	idle := min(max(int(o.keepalive/time.Second), 1), longest)
	_ = sysSet(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, idle)
	_ = sysSet(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, min(idle, keepaliveInterval))
}

// keepKnown has the kernel keep a connection alive that has fallen silent (the client's socket has that from its
// listener).
func (c *conn) keepKnown() {
	o := c.route.outbound
	if o == nil || o.keepalive == 0 {
		keepAlive(c.backend.fd)
		return
	}
	o.keepAliveAs(c.backend.fd)
	o.keepAliveAs(c.client.fd)
}

// ownFault says whether a connect failed for a reason on this machine that stays, such as a missing right. That says
// nothing about the backend either (see ownLack for what passes).
func ownFault(err error) bool {
	e, ok := err.(unix.Errno)
	return !ok || connectCalls.mean(e) != meansGone
}
