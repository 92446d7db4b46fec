// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/natmap"
)

// checkTransparent says what source=transparent lacks on this machine: the right to use addresses that are not its own,
// and the routes that bring the backends' answers to it. Both are warnings, since check may run as another user.
func (c *Config) checkTransparent() (problems Problems) {
	for _, r := range c.Map.Rules {
		if !r.Options.Pool.Source.Transparent {
			continue
		}
		lacks := func(format string, args ...any) {
			problems = append(problems, Problem{true, fmt.Sprintf("%s: source=transparent: ", r.Pos) + fmt.Sprintf(format, args...)})
		}
		if err := mayBeTransparent(); err != nil {
			lacks("%v; it needs CAP_NET_ADMIN: AmbientCapabilities=CAP_NET_ADMIN in systemd, --cap-add NET_ADMIN for a container", err)
		}
		for _, client := range clientsLike(r) {
			if local, err := deliveredHere(client); err == nil && !local {
				lacks("answers for clients such as %s would not come back to this machine; 'tlsnat firewall --transparent' prints the routes that are missing", client)
			}
		}
		return problems // once: it is about the machine
	}
	return nil
}

// mayBeTransparent tries it.
func mayBeTransparent() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
}

// clientsLike are addresses that no machine has (RFC 5737, RFC 3849), of the families that the rule's backends may have.
func clientsLike(r *natmap.Rule) (all []netip.Addr) {
	four, six := false, false
	for _, b := range r.Backends {
		four = four || b.Unix == "" && !b.Addr.Is6()
		six = six || b.Addr.Is6()
	}
	if four {
		all = append(all, netip.MustParseAddr("192.0.2.1"))
	}
	if six {
		all = append(all, netip.MustParseAddr("2001:db8::1"))
	}
	return all
}

// transparentMark is the one that the printed rules use.
const transparentMark = 1

// deliveredHere asks the routing table whether a packet to addr is for this machine once it is marked (rtnetlink(7)).
func deliveredHere(addr netip.Addr) (bool, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, routeQuestion(addr), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, err
	}
	b := make([]byte, 8192)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return false, err
	}
	return routeIsLocal(b[:n])
}

// routeQuestion is what 'ip route get ADDR mark 1' sends.
func routeQuestion(addr netip.Addr) []byte {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	host := binary.NativeEndian
	b := make([]byte, unix.SizeofNlMsghdr+unix.SizeofRtMsg)
	attribute := func(kind uint16, value []byte) {
		b = host.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
		b = append(host.AppendUint16(b, kind), value...)
	}
	attribute(unix.RTA_DST, addr.AsSlice())
	attribute(unix.RTA_MARK, host.AppendUint32(nil, transparentMark))
	h := (*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
	h.Len, h.Type, h.Flags, h.Seq = uint32(len(b)), unix.RTM_GETROUTE, unix.NLM_F_REQUEST, 1
	m := (*unix.RtMsg)(unsafe.Pointer(&b[unix.SizeofNlMsghdr]))
	m.Family, m.Dst_len = uint8(family), uint8(addr.BitLen())
	return b
}

func routeIsLocal(b []byte) (bool, error) {
	if len(b) < unix.SizeofNlMsghdr+unix.SizeofRtMsg {
		return false, errors.New("short answer of the routing table")
	}
	switch (*unix.NlMsghdr)(unsafe.Pointer(&b[0])).Type {
	case unix.RTM_NEWROUTE:
		return (*unix.RtMsg)(unsafe.Pointer(&b[unix.SizeofNlMsghdr])).Type == unix.RTN_LOCAL, nil
	case unix.NLMSG_ERROR: // no route at all
		return false, nil
	}
	return false, errors.New("unexpected answer of the routing table")
}
