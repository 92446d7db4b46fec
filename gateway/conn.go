// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/sni"
)

// conn is one client's connection, from its first byte to its last. Everything about it happens on its loop, so
// nothing here takes a lock; only while its handshake runs does a goroutine hold its client's descriptor as well,
// and then the loop does not read from it (see handshake.go).
type conn struct {
	loop *loop
	gen  *generation // what was configured when it was accepted, for its whole life
	port *portRules  // what its listener serves

	client, backend socket
	up, down        flow // client to backend, backend to client

	stage     stage
	busy      bool  // in the loop's queue of those that go on later
	counted   bool  // among the connections that TLSNAT_MAX_CONNS counts
	parked    bool  // quiet: the key schedules were let go
	kept      bool  // quiet once: the backend's socket has keepalive
	retired   bool  // its rule is gone from the map, and says how long it may go on
	lastWords bool  // an alert is on its way to the side that broke the protocol: no reset must overtake it
	holds     uint8 // of the gate's counts (entrance.go)
	skimmed   int32
	slot      uint32          // 1 + where its address is counted (conns-per-ip=); 0: nowhere
	prelude   starttls.Server // what the client has asked for before TLS
	knocked   refusal         // why a LOCAL connection may say nothing
	cancels   bool            // it has sent nothing but a CancelRequest of PostgreSQL, in the clear

	undelivered int // bytes that were on their way when a reset was about to be carried over

	timer  timer
	active int64 // when bytes moved last, in loop nanoseconds
	end    int64 // when lifetime= is over; 0: never

	pending []byte     // read from the client and not used up: an unfinished header or hello, or what came behind it
	hello   sni.Parser // how far the ClientHello has been followed
	terms   *terms
	hs      *handshaker
	dial    *dialling
	route   *route
	server  *server // that is being connected to, or is; nil for the demo, too
	report  report
}

// stage is what a conn waits for, and which verb goes on when there is news.
type stage uint8

const (
	readingProxy stage = iota
	readingPrelude
	readingHello
	matching
	waitingTurn
	shakingHands
	connecting
	waitingForRoom
	asking
	waitingEncryption
	encrypting
	greeting
	translating
	relaying
	cancelling
	readingRequest
	lingering
	resetting
	over
)

var stageNames = [...]string{"proxy_header", "starttls", "hello", "match", "handshake_queue", "handshake", "connect", "backend_queue",
	"backend_starttls", "backend_tls_queue", "backend_tls", "proxy_out",
	"login", "relay", "cancel_request", "http_request", "linger", "reset", "over"}

func (s stage) String() string { return stageNames[s] }

// StageWords are what a connection's stage can be called. The list is closed.
var StageWords = stageNames[:over]

// newConn is the first word of a story: a connection was accepted.
func newConn(l *loop, ln *listener, fd int32, peer netip.AddrPort) *conn {
	c := &conn{loop: l, gen: ln.gen, port: ln.rules, active: l.now}
	c.client.fd, c.client.owner = fd, c
	c.backend.fd, c.backend.owner = -1, c
	c.client.writable = true // nothing was sent yet
	c.report = report{id: l.nextID(), accepted: l.now, listen: ln, peer: peer, source: peer}
	return c
}

// ready is told by the loop that one of the sockets has news, and goes on with the story.
func (c *conn) ready(s *socket, events uint32) {
	defer c.rescue()
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		s.readable = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		s.hup = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		s.writable = true
	}
	s.exact = s.exact || events&unix.EPOLLPRI != 0
	if events&unix.EPOLLERR != 0 && s.failed == 0 && (s == &c.client || c.stage != connecting) {
		c.transferFrom(s).takeSocketError()
	}
	if c.stage == relaying && max(c.up.batch, c.down.batch) >= streaming {
		c.loop.putOff(c)
		return
	}
	c.advance()
}

// setDeadline makes the conn's timer due in d nanoseconds, but not later than its lifetime ends.
func (c *conn) setDeadline(d int64) {
	at := c.loop.now + d
	if c.end != 0 {
		at = min(at, c.end)
	}
	c.loop.wheel.set(c, at)
}

// tell remembers what a connection is going to end with; the first word counts.
func (c *conn) tell(o Outcome, why string) {
	if c.report.told {
		return
	}
	c.report.told, c.report.outcome, c.report.stage = true, o, c.stage
	if why != "" {
		c.report.err = why
	}
}

// finish ends the connection: sockets, memory, counters, its line in the log. With it the story is over.
func (c *conn) finish(o Outcome, why string) stage {
	c.tell(o, why)
	l := c.loop
	l.wheel.clear(c)
	c.stopSearch()
	c.to(over) // so that a fault in what follows does not count it twice
	l.closeSocket(&c.client)
	l.closeSocket(&c.backend)
	c.up.release(l)
	c.down.release(l)
	c.countMemory()
	c.pending = nil
	c.report.up, c.report.down = c.up.moved, c.down.moved
	c.report.cutShort = c.cutShortBy()
	delete(l.conns, c)
	c.gen.open.Add(-1)
	if c.counted {
		l.gw.open.Add(-1)
	}
	if c.slot != 0 || c.holds != 0 {
		c.leaveGate()
	}
	l.count(&c.report)
	l.log(c)
	return over
}

// stopSearch lets go of what belongs to the search for a backend, and of the backend's place for this connection.
func (c *conn) stopSearch() {
	if c.stage == waitingForRoom {
		c.loop.leaveQueue(c)
	}
	if c.dial != nil {
		c.dropRival()
		c.dial = nil
	}
	c.leave()
}
