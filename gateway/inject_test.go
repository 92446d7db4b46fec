// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"

	"golang.org/x/sys/unix"
)

var sysCallNames = map[sysCall]string{recvCall: "recvfrom", sendCall: "sendto", readvCall: "readv", writevCall: "writev", spliceCall: "splice",
	connectCall: "connect", acceptCall: "accept4", pollCall: "epoll_wait"}

// Inject has every system call on the paths of connections asked for first: fail says with which error it fails, or 0. It
// must be called before a gateway starts, and undone when that has ended.
func Inject(fail func(call string, fd int) unix.Errno) (undo func()) {
	inject = func(call sysCall, fd int32) unix.Errno { return fail(sysCallNames[call], int(fd)) }
	return func() { inject = nil }
}

// Leftovers says what of connections is still counted in a gateway that has none; "" if nothing is.
func Leftovers(g *Gateway) string {
	left := ""
	for _, l := range g.loops {
		for what, n := range map[string]int{"connections": len(l.conns), "hellos": int(l.queue.Waiting.Load()), "handshakes": int(l.queue.Held.Load()),
			"waiting for a backend's handshake": int(l.encryptQueue.Waiting.Load()), "handshakes with backends": int(l.encryptQueue.Held.Load()),
			"computing": int(l.active.Load()), "queues": len(l.queues), "waiting for room": int(l.waiting.Load()),
			"bytes of lent memory": l.lent.out, "bytes in pipes": l.lent.piped, "pipes": l.pipes.out, "begun handshakes": len(l.begun),
			"sockets": l.socks.watched(), "streams that are paced": l.pacer.n} {
			if n != 0 {
				left += fmt.Sprintf("%s: %d; ", what, n)
			}
		}
	}
	if n := g.open.Load(); n != 0 {
		left += fmt.Sprintf("open: %d; ", n)
	}
	g.keeper.known.Lock()
	defer g.keeper.known.Unlock()
	for _, s := range g.keeper.servers {
		if n := s.open.Load(); n != 0 {
			left += fmt.Sprintf("%s has %d; ", s.name, n)
		}
	}
	return left
}
