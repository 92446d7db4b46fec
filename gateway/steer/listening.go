// SPDX-License-Identifier: Apache-2.0

package steer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket is where somebody listens.
type Socket struct {
	Addr netip.Addr // unspecified: all addresses
	Port uint16
	Only bool // IPv6 only
}

// Meets says whether a connection could reach the socket as well as a listener at addr, of which the zero Addr is every
// one, on the same port.
func (s Socket) Meets(addr netip.Addr) bool {
	both := s.Addr.Is6() && s.Addr.IsUnspecified() && !s.Only
	switch {
	case !addr.IsValid() || both:
		return true
	case s.Addr.IsUnspecified():
		return s.Addr.Is4() == addr.Is4()
	}
	return s.Addr.Unmap() == addr
}

// Listening are the listening TCP sockets of the network namespace, whosever they are (sock_diag(7)). No right is
// needed.
func Listening() (all []Socket, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask who listens: %w", err)
	}
	defer unix.Close(fd)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if all, err = listening(fd, family, all); err != nil {
			return nil, fmt.Errorf("ask who listens: %w", err)
		}
	}
	return all, nil
}

// Sizes of linux/inet_diag.h: struct inet_diag_req_v2 and inet_diag_msg.
const (
	sizeofRequest = 56
	sizeofMessage = 72
)

const (
	sockDiagByFamily = 20 // linux/sock_diag.h
	stateListen      = 10 // TCP_LISTEN of net/tcp_states.h
	attrV6Only       = 11 // INET_DIAG_SKV6ONLY
)

func listening(fd int, family uint8, all []Socket) ([]Socket, error) {
	b := make([]byte, unix.SizeofNlMsghdr+sizeofRequest)
	h := (*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
	h.Len, h.Type, h.Flags = uint32(len(b)), sockDiagByFamily, unix.NLM_F_REQUEST|unix.NLM_F_DUMP
	request := b[unix.SizeofNlMsghdr:]
	request[0], request[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(request[4:], 1<<stateListen)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	answer := make([]byte, 64<<10) // more than the kernel puts into one message of a dump
	for {
		n, _, err := unix.Recvfrom(fd, answer, 0)
		if err != nil {
			return nil, err
		}
		var done bool
		if all, done, err = sockets(answer[:n], all); err != nil || done {
			return all, err
		}
	}
}

// sockets reads a piece of a dump; done says that it was the last one.
func sockets(b []byte, all []Socket) (_ []Socket, done bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return nil, false, errors.New("malformed answer of sock_diag")
		}
		body := b[unix.SizeofNlMsghdr:size]
		switch kind := binary.NativeEndian.Uint16(b[4:]); {
		case kind == unix.NLMSG_DONE:
			return all, true, nil
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			return nil, false, unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
		case kind == sockDiagByFamily && len(body) >= sizeofMessage:
			all = append(all, socketOf(body))
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return all, false, nil
}

// socketOf reads a struct inet_diag_msg and the attributes behind it.
func socketOf(m []byte) Socket {
	s := Socket{Port: binary.BigEndian.Uint16(m[4:])}
	if m[0] == unix.AF_INET {
		s.Addr = netip.AddrFrom4([4]byte(m[8:]))
	} else {
		s.Addr = netip.AddrFrom16([16]byte(m[8:]))
	}
	for a := m[sizeofMessage:]; len(a) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(a))
		if size < unix.SizeofRtAttr || size > len(a) {
			break
		}
		if binary.NativeEndian.Uint16(a[2:]) == attrV6Only && size > unix.SizeofRtAttr {
			s.Only = a[unix.SizeofRtAttr] != 0
		}
		a = a[min((size+3)&^3, len(a)):]
	}
	return s
}
