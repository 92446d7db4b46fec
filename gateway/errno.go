// SPDX-License-Identifier: Apache-2.0

package gateway

import "golang.org/x/sys/unix"

// What an error of a system call means for a connection is decided here, and nowhere else. The table is closed: what it
// does not list is a fault, and ends what it happened to. So no error is ever taken for "try again" by mistake.
//
// Two kinds never come here. Interrupted calls are repeated where they are made, a few times (sys_linux.go). And errors of
// records that the kernel opens, which it has no other words for than EBADMSG, EMSGSIZE, EINVAL and EIO, are about a
// record and not about the connection (unopenable, readControl).

// meaning is what an error means. It is never asked about 0, which is none.
type meaning uint8

const (
	meansFault meaning = iota // tlsnat's, or of the machine: it ends with internal
	meansWait                 // nothing is there, or there is no room: the poller tells when that changes
	meansGone                 // the peer is: it reset the connection, vanished, or can't be reached
	meansLack                 // of our own: of memory, descriptors, ports or rights
)

// calls are system calls whose errors mean the same.
type calls uint8

const (
	streamCalls  calls = iota // recvfrom, readv, sendto, writev, splice and their like on a connection; and SO_ERROR
	connectCalls              // connect, and what comes before it on a new socket
	acceptCalls               // accept4
	callKinds
)

// meanings is the table. Errors of a peer are those of TCP and of Unix sockets, and what ICMP makes the kernel say
// (icmp_err_convert in Linux' net/ipv4/icmp.c, tab_unreach in net/ipv6/icmp.c).
//
// ENOBUFS and ENOMEM on a connection end it. When the kernel is only short of buffers TCP says EAGAIN, and tells when
// there is room. These two it says when even its reserves are used up; no event follows, and a timer would have
// connections keep their memory just then. splice may fail so for want of a page, where a copy needs none: that is tried
// (spliceOver).
var meanings = [callKinds]map[meaning][]unix.Errno{
	streamCalls: {
		meansWait: {unix.EAGAIN},
		meansGone: {unix.ECONNRESET, unix.EPIPE, unix.ETIMEDOUT, unix.ECONNABORTED, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH,
			unix.EHOSTDOWN, unix.ENETDOWN, unix.ENETRESET, unix.ENONET, unix.EPROTO, unix.ENOPROTOOPT, unix.EACCES},
		meansLack: {unix.ENOBUFS, unix.ENOMEM},
	},
	connectCalls: {
		meansWait: {unix.EINPROGRESS},
		meansGone: {unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE, unix.ETIMEDOUT, unix.ECONNABORTED, unix.EHOSTUNREACH, unix.ENETUNREACH,
			unix.EHOSTDOWN, unix.ENETDOWN, unix.ENETRESET, unix.ENONET, unix.EPROTO, unix.ENOPROTOOPT,
			unix.ENOENT, unix.ENOTDIR, unix.EPROTOTYPE, unix.EAGAIN}, // of Unix sockets: no such path, of another type, a full queue
		meansLack: {unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EADDRNOTAVAIL, unix.EADDRINUSE, unix.EPERM, unix.EACCES, unix.EAFNOSUPPORT, unix.ENOSPC},
	},
	acceptCalls: { // who is gone is the connection that was to be accepted, and the next one may be well (accept(2))
		meansWait: {unix.EAGAIN},
		meansGone: {unix.ECONNABORTED, unix.ECONNRESET, unix.ETIMEDOUT, unix.EPROTO, unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.EPERM,
			unix.ENETDOWN, unix.ENETUNREACH, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ENONET},
		meansLack: {unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM},
	},
}

// lastErrno is Linux' last number of an error, EHWPOISON.
const lastErrno = 133

// errnoTable is meanings by number: EAGAIN is met at every turn.
var errnoTable = func() (table [callKinds][lastErrno + 1]meaning) {
	for kind, lists := range meanings {
		for m, list := range lists {
			for _, e := range list {
				table[kind][e] = m
			}
		}
	}
	return table
}()

func (k calls) mean(e unix.Errno) meaning {
	if e > lastErrno {
		return meansFault
	}
	return errnoTable[k][e]
}
