// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/gateway/ktls"
	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/natmap"
)

// backend is one backend of a rule. Where its name leads is looked up outside the loops, and read here.
type backend struct {
	spec  *natmap.Backend
	addrs atomic.Pointer[[]netip.Addr] // nil until the name was found; IP literals have it from the start
	demo  bool

	tickets *tickets // of a tls:// backend; nil: it's plain

	speech // what comes before TLS, or before anything else
}

// dialling is the search for a backend that answers.
type dialling struct {
	first   int // where in the route's turn the search began
	tried   int // candidates tried, or being tried
	addr    int // which address of the current one
	started int64
	until   int64 // when CONNECT_TIMEOUT is over
	backend *backend
	target  netip.AddrPort
	errs    []string
	hs      *encrypter // shakes hands with the backend

	talk       *talk // with a backend that speaks before TLS
	introduced bool  // the PROXY header has gone
}

// startConnect begins the search: the backend whose turn it is, then the others, then those marked /backup.
func (c *conn) startConnect() stage {
	if c.dial != nil { // MySQL: it greets before TLS
		return c.resume()
	}
	l := c.loop
	c.stage = connecting
	c.dial = &dialling{first: c.route.pick(l), started: l.now, until: l.now + int64(c.route.connect)}
	return c.tryBackends()
}

// nextBackend gives up the one that is being tried and goes on to the next.
func (c *conn) nextBackend(why string) stage {
	d := c.dial
	d.failed(why)
	if d.talk != nil && d.talk.passed {
		return c.unconnected(ConnectFailed, strings.Join(d.errs, "; "))
	}
	d.talk, d.introduced = nil, false
	c.loop.closeSocket(&c.backend)
	c.backend = socket{fd: -1, owner: c}
	return c.tryBackends()
}

func (d *dialling) failed(why string) {
	const enough = 8 // errors in one log line
	if len(d.errs) < enough {
		d.errs = append(d.errs, d.name()+": "+why)
	}
}

func (d *dialling) name() string {
	if d.target.IsValid() {
		return d.target.String()
	}
	return d.backend.String()
}

// tryBackends starts connecting to the next candidate that lets itself be tried.
func (c *conn) tryBackends() stage {
	d := c.dial
	for c.loop.now < d.until || d.tried == 0 {
		if !d.advance(c) {
			break
		}
		e := c.openSocket(d)
		switch e {
		case 0:
			return c.connected()
		case unix.EINPROGRESS:
			c.setDeadline(d.share(c))
			return connecting
		}
		d.failed(e.Error())
		c.loop.closeSocket(&c.backend)
		c.backend = socket{fd: -1, owner: c}
	}
	if len(d.errs) == 0 {
		return c.unconnected(NoBackend, "none of the backends has an address")
	}
	return c.unconnected(ConnectFailed, strings.Join(d.errs, "; "))
}

// share is the current candidate's part of the time that is left, in nanoseconds.
func (d *dialling) share(c *conn) int64 {
	return (d.until - c.loop.now) / int64(max(1, c.route.candidates()-d.tried+1))
}

// advance moves on to the next address of the current backend, or to the next backend. It says whether there is one.
func (d *dialling) advance(c *conn) bool {
	if d.backend != nil && d.backend.spec != nil {
		if addrs := d.backend.addrs.Load(); addrs != nil && d.addr+1 < len(*addrs) {
			d.addr++
			d.target = netip.AddrPortFrom((*addrs)[d.addr], d.target.Port())
			return true
		}
	}
	for d.tried < c.route.candidates() {
		d.backend, d.addr, d.target = c.route.candidate(d.first, d.tried), 0, netip.AddrPort{}
		d.tried++
		if d.backend.demo || d.backend.spec.Unix != "" {
			return true
		}
		addrs := d.backend.addrs.Load()
		if addrs == nil || len(*addrs) == 0 {
			d.failed("the name was not found")
			continue
		}
		d.target = netip.AddrPortFrom((*addrs)[0], d.backend.spec.Port(c.route.rule.Listen.Lo, c.report.listen.port))
		return true
	}
	return false
}

// openSocket begins to connect to the current candidate: 0 when that is done already, EINPROGRESS when it takes a while.
//
//	socket, setsockopt(TCP_NODELAY), setsockopt(TCP_QUICKACK), connect -> EINPROGRESS, epoll_ctl
func (c *conn) openSocket(d *dialling) unix.Errno {
	s := &c.backend
	fd, e := d.socket(c.loop.gw)
	if e != 0 && e != unix.EINPROGRESS {
		return e
	}
	s.fd = fd
	if err := c.loop.watch(s); err != nil {
		return unix.ENOMEM
	}
	return e
}

// socket makes a socket for the current candidate and tells it to connect.
func (d *dialling) socket(g *Gateway) (int32, unix.Errno) {
	if d.backend.demo {
		return g.demo.connect()
	}
	var sa unix.Sockaddr
	family := unix.AF_UNIX
	if d.backend.spec.Unix != "" {
		sa = &unix.SockaddrUnix{Name: d.backend.spec.Unix}
	} else {
		sa, family = sockaddrOf(d.target)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err.(unix.Errno)
	}
	if family != unix.AF_UNIX {
		setNodelay(int32(fd)) // keepalive comes with the first silence: park
		delayAcks(int32(fd))  // that of the connection itself goes with the first request
	}
	if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
		_ = unix.Close(fd)
		return -1, err.(unix.Errno)
	} else if err != nil {
		return int32(fd), unix.EINPROGRESS
	}
	return int32(fd), 0
}

// connect goes on when the backend has answered, one way or the other. The client may leave meanwhile.
func (c *conn) connect() stage {
	s := &c.backend
	if c.client.failed != 0 {
		return c.finish(ClientReset, "reset while a backend was sought")
	}
	if !s.writable {
		return connecting
	}
	if s.hup {
		switch e := takeError(s.fd); {
		case e == 0:
		case e == unix.ECONNRESET && c.dial.backend.tickets == nil: // it took the connection and reset it: that is an answer, and goes on to the client
			s.failed = e
		default:
			return c.nextBackend(e.Error())
		}
	}
	return c.connected()
}

func (c *conn) connected() stage {
	c.backend.writable = true
	c.report.connectTime = c.loop.now - c.dial.started
	if b := c.dial.backend; b.speaks != starttls.Off && !b.inside && !c.cancels {
		return c.startAsking()
	}
	return c.reached()
}

// reached is where the backend has said what it says before TLS.
func (c *conn) reached() stage {
	if c.dial.backend.tickets != nil && !c.cancels {
		return c.encrypt()
	}
	return c.found()
}

// found is the end of the search. The line says which backends were tried in vain before.
func (c *conn) found() stage {
	c.report.backend = c.dial.name()
	c.report.err = strings.Join(c.dial.errs, "; ")
	return greeting
}

// unconnected ends a connection that found no backend: in words for HTTP clients there are none at this layer, so
// TLS clients get an alert and the others a reset.
func (c *conn) unconnected(o Outcome, why string) stage {
	c.tell(o, why)
	if s := c.client.tls; s != nil {
		c.report.alertSent = alertInternalError
		return c.answerAndLinger(s.writer.AppendAlert(nil, alertInternalError))
	}
	if c.prelude.Protocol == starttls.MySQL && c.dial.talk == nil { // who waits for a greeting
		return c.answerAndLinger(starttls.MySQLRefusal(nil, "no server answers"))
	}
	abort(&c.client)
	return c.finish(o, why)
}

// route is a rule as the loops use it: its options with the settings filled in, its backends in the order of their
// turns.
type route struct {
	rule    *natmap.Rule
	index   int    // among the generation's routes
	label   string // file:line
	profile *profile
	proxy   natmap.ProxyVersion
	kernel  *ktls.Support // what may go to the kernel; nil: nothing

	encryption *encryption // nil: no backend is a tls:// one

	gate    *lineGate // nil: whoever comes may come in
	pace    gate.Pace // 0: as fast as it goes
	primary []*backend
	backup  []*backend
	turns   []uint16 // primary backends, each as often as its weight says, evenly mixed

	idle, connect, linger, lifetime time.Duration

	use *usage
}

// usage counts the connections that a rule decided about, and those of them that are over. It stays over reloads.
type usage struct{ entered, ended atomic.Uint64 }

// pick is whose turn it is. Every loop counts for itself, so that they share nothing.
func (r *route) pick(l *loop) int {
	if len(r.turns) == 0 {
		return 0
	}
	for len(l.rounds) <= r.index {
		l.rounds = append(l.rounds, 0)
	}
	n := l.rounds[r.index]
	l.rounds[r.index]++
	return int(r.turns[n%uint32(len(r.turns))])
}

func (r *route) candidates() int { return len(r.primary) + len(r.backup) }

// candidate is the n-th to be tried when the turn was first's.
func (r *route) candidate(first, n int) *backend {
	if n < len(r.primary) {
		return r.primary[(first+n)%len(r.primary)]
	}
	return r.backup[n-len(r.primary)]
}

// mixTurns spreads backends over a round so that each gets exactly its weight, evenly mixed: the one that is most
// behind its share is next (nginx's smooth weighted round-robin).
func mixTurns(weights []int) []uint16 {
	total, divisor := 0, 0
	for _, w := range weights {
		divisor = gcd(divisor, w)
	}
	behind := make([]int, len(weights))
	for i := range weights {
		total += weights[i] / divisor
	}
	turns := make([]uint16, 0, total)
	for range total {
		best := 0
		for i, w := range weights {
			behind[i] += w / divisor
			if behind[i] > behind[best] {
				best = i
			}
		}
		behind[best] -= total
		turns = append(turns, uint16(best))
	}
	return turns
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

func (b *backend) String() string {
	if b.demo {
		return "demo"
	}
	return b.spec.String()
}
