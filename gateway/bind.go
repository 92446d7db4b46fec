// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// boundSocket is a socket bound to the address: for all addresses one that takes IPv4 as well as IPv6, or only IPv4
// where the kernel has no IPv6.
func boundSocket(addr netip.Addr, port uint16, share bool) (int, error) {
	if addr.IsValid() {
		return bind(netip.AddrPortFrom(addr, port), true, share)
	}
	fd, err := bind(netip.AddrPortFrom(netip.IPv6Unspecified(), port), false, share)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return bind(netip.AddrPortFrom(netip.IPv4Unspecified(), port), true, share)
	}
	return fd, err
}

func bind(ap netip.AddrPort, only, share bool) (int, error) {
	sa, family := sockaddrOf(ap)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if family == unix.AF_INET6 {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, bit(only))
	}
	if share {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

func zoneIndex(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if ifi, err := net.InterfaceByName(zone); err == nil {
		return uint32(ifi.Index)
	}
	n, _ := strconv.Atoi(zone)
	return uint32(n)
}
