// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of the loops. All of them are non-blocking, so they are made without telling the scheduler
// (RawSyscall): entering and leaving a system call the usual way costs more than some of these calls do, and wakes the
// runtime's monitor, which on a core that is not busy all the time then took 5 % of it, and moved the loop from thread to
// thread. They take microseconds, and a stop of the world waits for that long.

// interruptions is how often in a row a call is repeated that a signal has interrupted. Calls that don't block hardly ever
// are; one that always is must not hold the loop.
const interruptions = 8

// sysCall names a system call on the path of a connection.
type sysCall uint8

const (
	recvCall sysCall = iota
	sendCall
	readvCall
	writevCall
	spliceCall // from a socket, or to one
	connectCall
	acceptCall
	pollCall // of a loop: a turn; it can't be made to fail
)

// inject, where a test has set it, says with which error a call on that socket fails instead of being made; 0: it is
// made. It is nil in every program.
var inject func(call sysCall, fd int32) unix.Errno

// injected is the error that a call has to fail with.
func injected(call sysCall, fd int32) unix.Errno {
	if inject == nil {
		return 0
	}
	return inject(call, fd)
}

// sysRead reads from a socket: n == 0 and no error is the end of the stream. recvfrom(2) goes to the socket directly,
// where read(2) goes through the file system's layer: 3 % of an echo.
func sysRead(fd int32, p []byte) (int, unix.Errno) {
	for left := interruptions; ; left-- {
		n, e := uintptr(0), injected(recvCall, fd)
		if e == 0 {
			n, _, e = unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), 0, 0, 0)
		}
		if e != unix.EINTR || left == 0 {
			return int(n), e
		}
	}
}

// sysWrite writes p to a socket, by sendto(2) for the same reason.
func sysWrite(fd int32, p []byte) (int, unix.Errno) { return sysSend(fd, p, unix.MSG_NOSIGNAL) }

// sysSendMore writes p so that it goes with the next bytes, or with the FIN: it must be followed by one of them.
func sysSendMore(fd int32, p []byte) (int, unix.Errno) {
	return sysSend(fd, p, unix.MSG_NOSIGNAL|unix.MSG_MORE)
}

func sysSend(fd int32, p []byte, flags uintptr) (int, unix.Errno) {
	for left := interruptions; ; left-- {
		n, e := uintptr(0), injected(sendCall, fd)
		if e == 0 {
			n, _, e = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		}
		if e != unix.EINTR || left == 0 {
			return int(n), e
		}
	}
}

func sysReadv(fd int32, iov []unix.Iovec) (int, unix.Errno) {
	for left := interruptions; ; left-- {
		n, e := uintptr(0), injected(readvCall, fd)
		if e == 0 {
			n, _, e = unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		}
		if e != unix.EINTR || left == 0 {
			return int(n), e
		}
	}
}

func sysWritev(fd int32, iov []unix.Iovec) (int, unix.Errno) {
	for left := interruptions; ; left-- {
		n, e := uintptr(0), injected(writevCall, fd)
		if e == 0 {
			n, _, e = unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		}
		if e != unix.EINTR || left == 0 {
			return int(n), e
		}
	}
}

// sysSplice moves up to n bytes between a socket and a pipe without a copy. SPLICE_F_MORE is never set: it holds
// data back until more follows, which may be never.
func sysSplice(from, to int32, n int) (int, unix.Errno) {
	for left := interruptions; ; left-- {
		m, e := uintptr(0), injected(spliceCall, from)
		if e == 0 {
			e = injected(spliceCall, to)
		}
		if e == 0 {
			m, _, e = unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n),
				unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		}
		if e != unix.EINTR || left == 0 {
			return int(m), e
		}
	}
}

// sysEpollWait asks for what is ready, and does not wait for more.
func sysEpollWait(fd int32, events []unix.EpollEvent) (int, unix.Errno) {
	_ = injected(pollCall, fd)
	n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(events))),
		uintptr(len(events)), 0, 0, 0)
	return int(n), e
}

// sysAccept accepts a non-blocking connection and says whose it is.
func sysAccept(fd int32) (int32, netip.AddrPort, unix.Errno) {
	var sa unix.RawSockaddrAny
	size := uint32(unix.SizeofSockaddrAny)
	n, e := uintptr(0), unix.EINTR
	for left := interruptions; e == unix.EINTR && left >= 0; left-- {
		if e = injected(acceptCall, fd); e == 0 {
			n, _, e = unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
				unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		}
	}
	if e != 0 {
		return -1, netip.AddrPort{}, e
	}
	return int32(n), addrPortOf(&sa), 0
}

// sysClose closes a socket that is connected, or was about to be.
func sysClose(fd int32) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// sysShutdown ends our stream, or with SHUT_RDWR both.
func sysShutdown(fd int32, how int) {
	_, _, _ = unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), uintptr(how), 0)
}

// sysSet sets an option whose value is a number.
func sysSet(fd int32, level, option, value int) unix.Errno {
	v := int32(value)
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
	return e
}

// sysConnect tells a non-blocking socket to connect.
func sysConnect(fd int32, to unix.Sockaddr) error {
	e := injected(connectCall, fd)
	if e != 0 {
		return e
	}
	switch to := to.(type) {
	case *unix.SockaddrInet4:
		sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: swapped(uint16(to.Port)), Addr: to.Addr}
		_, _, e = unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
	case *unix.SockaddrInet6:
		sa := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swapped(uint16(to.Port)), Addr: to.Addr, Scope_id: to.ZoneId}
		_, _, e = unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
	default:
		return unix.Connect(int(fd), to)
	}
	if e != 0 {
		return e
	}
	return nil
}

// addrPortOf reads an IPv4 or IPv6 socket address; IPv4 in IPv6 is IPv4.
func addrPortOf(sa *unix.RawSockaddrAny) netip.AddrPort {
	switch sa.Addr.Family {
	case unix.AF_INET:
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), swapped(in.Port))
	case unix.AF_INET6:
		in := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom16(in.Addr).Unmap(), swapped(in.Port))
	}
	return netip.AddrPort{}
}

// swapped turns a port in network byte order, as it lies in memory, into a number.
func swapped(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

// localAddr is the address of our end of a connected socket.
func localAddr(fd int32) netip.AddrPort {
	var sa unix.RawSockaddrAny
	size := uint32(unix.SizeofSockaddrAny)
	if _, _, e := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size))); e != 0 {
		return netip.AddrPort{}
	}
	return addrPortOf(&sa)
}

// sockaddrOf is the address as the unix package takes it, and its family.
func sockaddrOf(ap netip.AddrPort) (unix.Sockaddr, int) {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16(), ZoneId: zoneIndex(ap.Addr().Zone())}, unix.AF_INET6
}
