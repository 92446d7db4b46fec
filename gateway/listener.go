// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// listener is one loop's socket for one port. Every loop has its own (SO_REUSEPORT), so the kernel spreads
// connections over the loops and nothing is shared.
type listener struct {
	loop  *loop
	addr  netip.Addr // not valid: every address, IPv4 and IPv6
	port  uint16
	fd    int32
	sock  socket // what the loop watches
	gen   *generation
	rules *portRules // of gen; what new connections get
	name  string     // ":443", as the log calls it
	wide  *wideRules // of one that serves many ports, of which port is one; then gen and rules are there

	backoff time.Duration // how long accepting rests after it failed
	gone    uint8         // connections in a row that had gone before they were accepted
	paused  bool
	closing bool
	far     bool // SYNs that may have come over a router are dropped: deafen
}

const (
	// Connections that wait to be accepted. The kernel lowers it to net.core.somaxconn.
	backlog = 4096
	// When accepting fails it rests, at first for this long,
	minRest = 5 * time.Millisecond
	// twice as long each time, at most for this: out of descriptors or memory, the reason won't go away by asking.
	maxRest = time.Second
)

// ListenError says which port could not be opened, and what to do.
type ListenError struct {
	Addr string
	Err  error
}

func (e *ListenError) Error() string {
	hint := "look at the address in the map"
	switch {
	case errors.Is(e.Err, unix.EADDRINUSE):
		hint = "another program listens there; 'ss -ltnp' shows which: stop it, or use another port in the map"
	case errors.Is(e.Err, unix.EACCES), errors.Is(e.Err, unix.EPERM):
		hint = "ports below 1024 need a right: AmbientCapabilities=CAP_NET_BIND_SERVICE in systemd, or the sysctl net.ipv4.ip_unprivileged_port_start"
	case errors.Is(e.Err, unix.EADDRNOTAVAIL):
		hint = "this machine does not have the address; write one of its own, or only the port to listen on all of them"
	case errors.Is(e.Err, unix.EMFILE):
		hint = "the limit of open files is too low for so many ports; raise LimitNOFILE= or ulimit -n"
	}
	return fmt.Sprintf("listen on %s: %v; %s", e.Addr, e.Err, hint)
}

func (e *ListenError) Unwrap() error { return e.Err }

// listenName is how the log calls a listener.
func listenName(addr netip.Addr, port uint16) string {
	if !addr.IsValid() {
		return ":" + strconv.Itoa(int(port))
	}
	return net.JoinHostPort(addr.String(), strconv.Itoa(int(port)))
}

// nameAt is the name for a connection; port is its report's.
func (ln *listener) nameAt(port uint16) string {
	if ln.wide == nil {
		return ln.name
	}
	return listenName(ln.addr, port)
}

// probePort finds out whether anybody else listens on the port. SO_REUSEPORT would let two gateways of one user share
// it without a word.
func probePort(addr netip.Addr, port uint16) error {
	fd, err := boundSocket(addr, port, false)
	if err == nil {
		err = unix.Listen(fd, 1)
		_ = unix.Close(fd)
	}
	if err != nil {
		return &ListenError{listenName(addr, port), err}
	}
	return nil
}

// open makes the listening socket. What is set here is inherited by every connection that it accepts, which saves
// those system calls for each.
func (ln *listener) open() error {
	fd, err := boundSocket(ln.addr, ln.port, true)
	if err != nil {
		return &ListenError{ln.name, err}
	}
	setNodelay(int32(fd))
	delayAcks(int32(fd))
	keepAlive(int32(fd))
	if err := unix.Listen(fd, backlog); err != nil {
		_ = unix.Close(fd)
		return &ListenError{ln.name, err}
	}
	ln.fd = int32(fd)
	if ln.rules.early {
		ln.takeEarly(true)
	}
	return nil
}

// earlyLimit is how many connections may have sent data with their SYN and not finished TCP's handshake: what nginx's
// manual and others recommend. Clients beyond that shake hands first, as ever (RFC 7413, section 5.1).
const earlyLimit = 256

// takeEarly has the kernel take data with the SYN, from clients that it has given a cookie, or not any more. It can be
// told while it listens; where net.ipv4.tcp_fastopen does not let servers it makes no difference.
func (ln *listener) takeEarly(on bool) {
	_ = sysSet(ln.fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, bit(on)*earlyLimit)
}

// serve has new connections get what a generation serves there.
func (ln *listener) serve(gen *generation, rules *portRules) {
	if rules.early != ln.rules.early {
		ln.takeEarly(rules.early)
	}
	ln.gen, ln.rules = gen, rules
}

// ready is told that connections wait. One is accepted at a time: the poller tells again while there are more, and a
// second accept that finds nothing would cost as much as the first. But where one was turned away there are more: then
// it is not worth the others' while to look at the poller between any two of them. The same holds while hellos wait for their
// turn: handshakes get the processor after each round, and the kernel's backlog has one queue for all sources. A client
// must not wait there behind a flood, but get into the queue that serves sources by turns.
func (ln *listener) ready(*socket, uint32) {
	l := ln.loop
	for range turnedAway {
		if l.gw.holds.Load() > 0 {
			ln.pause(minRest)
			return
		}
		if refused := l.refusedNow; !ln.accept() || l.refusedNow == refused && l.queue.Waiting.Load() == 0 {
			return
		}
	}
}

// turnedAway is how many connections are turned away one after the other: a tenth of a millisecond.
const turnedAway = 8

func (ln *listener) accept() bool {
	l := ln.loop
	fd, peer, e := l.accept4(ln.fd)
	if e == 0 {
		ln.backoff, ln.gone = 0, 0
		ln.accepted(fd)
		l.begin(ln, fd, peer)
		return true
	}
	switch acceptCalls.mean(e) {
	case meansWait:
		return false
	case meansGone:
		if ln.gone++; ln.gone < goneInARow {
			return true
		}
	}
	ln.rest(e)
	return false
}

// goneInARow is how many connections can have gone before they were accepted, one after the other, before accepting rests
// as after another failure: so that an error that stays is not asked for again and again.
const goneInARow = 64

// accepted takes back what a connection inherits from a listener that ends.
func (ln *listener) accepted(fd int32) {
	if ln.far {
		_ = hearFrom(fd, 0)
	}
}

// rest stops accepting for a while after a failure that asking again won't mend (EMFILE, ENFILE, ENOBUFS, ENOMEM).
// The clients wait in the backlog meanwhile.
func (ln *listener) rest(e unix.Errno) {
	l := ln.loop
	if ln.backoff == 0 && !ownLack(e) {
		l.gw.complain("accept", "can't accept connections; trying again", e, ln.name)
	}
	ln.backoff = min(max(2*ln.backoff, minRest), maxRest)
	l.counters.acceptRests.Add(1)
	if ownLack(e) {
		l.gw.short(lackInAccept, e, ln.name)
	}
	ln.pause(ln.backoff)
}

// pause stops accepting for so long.
func (ln *listener) pause(d time.Duration) {
	ln.paused = true
	ln.loop.unwatchListener(ln)
	time.AfterFunc(d, func() { ln.loop.post(ln.resume) })
}

// HoldAccepts has no connection accepted until release is called: the descriptors that an order needs, of a process that
// has no more, must not go to clients that wait.
func (g *Gateway) HoldAccepts() (release func()) {
	g.holds.Add(1)
	return func() { g.holds.Add(-1) }
}

func (ln *listener) resume() {
	if !ln.paused || ln.closing {
		return
	}
	ln.paused = false
	if err := ln.loop.watchListener(ln); err != nil {
		ln.rest(unix.ENOMEM)
	}
}

// New connections are turned away in three steps, so that nobody who believes to be connected is cut off: first the
// kernel drops SYNs (a client sends its SYN again later), then whoever is underway gets this long to arrive, then
// the socket is closed and from there on SYNs are refused.
const lastCall = 300 * time.Millisecond

// Where the ports stay that a socket serves, and only its own is gone, nobody knows that it ends: whoever is underway gets
// time for an answer of ours to be lost, which is sent again after a second (RFC 6298, section 2), and for his own.
const movedCall = 2 * time.Second

// lastCalls begins the end of a listener: no new connections from the network, those on their way are welcome.
func (ln *listener) lastCalls() {
	if err := ln.deafen(); err != nil {
		ln.loop.gw.complain("close", "clients that connect just now may be reset: the kernel can't be told to drop SYNs before the port closes", err, ln.name)
	}
}

// maxHops is the highest TTL (RFC 791, section 3.1) and hop limit (RFC 8200, section 3) that there is. Packets begin with
// 64 or 128, some routers' with this, and lose one at each router.
const maxHops = 255

// deafen has the kernel drop SYNs. Since Linux 6.17 or so a filter for a TCP socket takes CAP_NET_ADMIN. Without it a
// listener can still refuse packets that may have come over a router (RFC 5082): of those for a listener the kernel looks
// at SYNs, and not at what completes a handshake that has begun. What it accepts from here on inherits that, and has it
// taken back.
func (ln *listener) deafen() error {
	if sysDropSYN(ln.fd) == nil {
		return nil
	}
	return ln.dropRouted()
}

func (ln *listener) dropRouted() error {
	ln.far = true
	return hearFrom(ln.fd, maxHops)
}

// close accepts what has arrived and closes the socket.
func (ln *listener) close() {
	if ln.closing {
		return
	}
	ln.closing = true
	for ln.accept() {
	}
	ln.loop.unwatchListener(ln)
	_ = unix.Close(int(ln.fd))
}
