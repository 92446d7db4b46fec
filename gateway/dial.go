// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/gateway/ktls"
	"github.com/tlsnat/tlsnat/gateway/pool"
	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/natmap"
)

// backend is one backend of a rule.
type backend struct {
	spec *natmap.Backend
	name *name // where it leads is looked up; nil: an address, a socket, or the demo
	demo bool

	tickets *tickets // of a tls:// backend; nil: it's plain

	refused atomic.Pointer[string] // addresses that DNS gives for the name and resolve-to= refuses; nil: none

	speech // what comes before TLS, or before anything else
}

// dialling is the search for a backend that answers.
type dialling struct {
	choices     *choices
	first       int // of the primary spots, who was chosen
	firstBackup int
	tried       int  // spots that were looked at
	place       int  // which address of the current one
	round       int  // how often all were tried in vain
	again       bool // it may be worth while to try them again: a connect failed, and that may pass
	vain        int  // connects of this round that failed
	full        int  // servers that have all the connections that they may have
	busy        int  // servers of this round whose queue of connections is full
	waits       int  // how often all were tried again for that
	out         int  // servers that were passed over, being down or the like
	started     int64
	until       int64 // when CONNECT_TIMEOUT is over
	waitUntil   int64 // when queue= is
	waited      bool

	spot    *spot
	backend *backend
	server  *server
	errs    []string
	hs      *encrypter // shakes hands with the backend

	rival       socket // is connecting to the spot's other address, which is one of another family
	rivalServer *server

	talk       *talk // with a backend that speaks before TLS
	introduced bool  // the PROXY header has gone
	early      int   // bytes that have gone with the SYN (fastopen=): of the PROXY header, or else of what the client has sent
}

const (
	// A connect that has not answered for so long is raced by one to the machine's other address (RFC 8305, section
	// 5: the Connection Attempt Delay).
	attemptDelay = 250 * time.Millisecond
	// When all have been tried in vain they are tried again so much later, at first, and twice as late each time.
	firstPause = 100 * time.Millisecond
)

// startConnect begins the search: the backend whose turn it is, then the others, then those marked /backup.
func (c *conn) startConnect() stage {
	if c.dial != nil { // MySQL: it greets before TLS
		return c.resume()
	}
	l, r := c.loop, c.route
	c.to(connecting)
	c.dial = &dialling{started: l.now, until: l.now + int64(r.connect)}
	c.dial.rival = socket{fd: -1, owner: c}
	if r.waiting.Load() > 0 {
		return c.waitForRoom() // behind those who came before
	}
	return c.search()
}

// search goes through the candidates from the beginning.
func (c *conn) search() stage {
	d := c.dial
	c.to(connecting)
	d.choices = c.route.choices.Load()
	d.first, d.firstBackup = c.route.pick(c, d.choices), -1
	d.tried, d.vain, d.full, d.busy, d.out, d.spot = 0, 0, 0, 0, 0, nil
	return c.tryBackends()
}

// unanswered gives up a connect that failed, and goes on to the next backend.
func (c *conn) unanswered(why string) stage {
	c.dial.again = true
	c.blame(c.dial.server, why)
	return c.nextBackend(why)
}

// nextBackend gives up the one that is being tried and goes on to the next. What is wrong may be that its certificate is
// not accepted: it isn't put out for that, and not tried again.
func (c *conn) nextBackend(why string) stage {
	d := c.dial
	d.failed(why)
	if d.passed() {
		return c.unconnected(ConnectFailed, strings.Join(d.errs, "; "))
	}
	d.talk, d.introduced = nil, false
	c.hangUp()
	c.dropRival()
	return c.tryBackends()
}

// hangUp closes the socket of a candidate that was given up.
func (c *conn) hangUp() {
	c.leave()
	c.loop.closeSocket(&c.backend)
	c.backend = socket{fd: -1, owner: c}
}

// notOpened notes why a connect could not be begun. Only what is the server's fault counts against it.
func (c *conn) notOpened(err error) {
	d := c.dial
	switch {
	case err == unix.EAGAIN && d.server != nil && d.server.unix != "":
		d.busy++
		d.failed(errBusy.Error())
	case ownLack(err):
		c.lacked(d.server, err)
	case ownFault(err):
		d.failed(err.Error())
	default:
		c.faulted(d.server, err.Error())
	}
}

// lacked notes that a server could not be connected to for want of something of our own, which may be there again soon.
func (c *conn) lacked(s *server, err error) {
	name := nameOf(s, c.dial.backend)
	c.dial.again = true
	c.dial.failedAt(name, inWords(err))
	c.loop.gw.short(lackInConnect, err, name)
}

// faulted notes that a server could not be connected to; nil is the demo.
func (c *conn) faulted(s *server, why string) {
	c.dial.again = true
	c.dial.failedAt(nameOf(s, c.dial.backend), why)
	c.blame(s, why)
}

// blame counts it against the server, which is out when it was one time too many.
func (c *conn) blame(s *server, why string) {
	k, out := c.loop.gw.keeper, c.route.outbound
	switch {
	case s == nil:
	case out != nil && out.source.Transparent:
		if s.suspected(c.route.eject) {
			go k.suspect(s, c.route.trial(c.dial.backend, s), why)
		}
	case s.refused(c.route.eject):
		go k.ejected(s, c.route.trial(c.dial.backend, s), "connects fail: "+why)
	}
}

func (d *dialling) failed(why string) { d.failedAt(d.name(), why) }

func (d *dialling) failedAt(name, why string) {
	const enough = 8 // errors in one log line
	d.vain++
	if len(d.errs) < enough && d.round == 0 && d.waits == 0 {
		d.errs = append(d.errs, name+": "+why)
	}
}

func (d *dialling) name() string { return nameOf(d.server, d.backend) }

func nameOf(s *server, b *backend) string {
	if s != nil {
		return s.name
	}
	return b.String()
}

// tryBackends starts connecting to the next candidate that lets itself be tried.
func (c *conn) tryBackends() stage {
	d := c.dial
	for c.loop.now < d.until || d.tried == 0 {
		if !d.advance(c) {
			break
		}
		switch err := c.openSocket(d); {
		case err == nil:
			return c.connected()
		case errors.Is(err, unix.EINPROGRESS):
			d.setAttempt(c)
			return connecting
		default:
			c.notOpened(err)
			c.hangUp()
		}
	}
	return c.searched()
}

// setAttempt gives the current candidate its time: its share, or, where it has another address, until that is tried too.
func (d *dialling) setAttempt(c *conn) {
	t := d.share(c)
	if d.place == 0 && d.spot.n > 1 {
		t = min(t, int64(attemptDelay))
	}
	c.setDeadline(t)
}

// share is the current candidate's part of the time that is left, in nanoseconds.
func (d *dialling) share(c *conn) int64 {
	return (d.until - c.loop.now) / int64(max(1, d.choices.len()-d.tried+1))
}

// searched is the end of a round in which nobody was connected to.
func (c *conn) searched() stage {
	d, r := c.dial, c.route
	pause := int64(firstPause) << d.round
	switch {
	case d.full > 0 && d.vain == 0:
		return c.waitForRoom()
	case len(d.errs) == 0:
		return c.unconnected(NoBackend, d.nobody(c))
	case d.busy > 0 && c.loop.now+int64(maxBusyPause) < d.until:
		c.setDeadline(int64(pool.Jittered(min(minBusyPause<<d.waits, maxBusyPause))))
		d.waits = min(d.waits+1, 8) // of which 4 make the longest pause
		return connecting
	case d.again && d.round < r.retries && c.loop.now+pause < d.until:
		d.round++
		c.setDeadline(pause)
		return connecting
	}
	return c.unconnected(ConnectFailed, strings.Join(d.errs, "; "))
}

// nobody says why there was nobody to try.
func (d *dialling) nobody(c *conn) string {
	if d.out == 0 {
		return "none of the backends has an address" + c.route.refusals()
	}
	const enough = 4
	var all []string
	for _, spots := range [...][]spot{d.choices.primary, d.choices.backup} {
		for i := range spots {
			if s := spots[i].places[0].at(c, spots[i].backend); s != nil && len(all) < enough {
				all = append(all, s.name+" is "+s.word()+": "+s.reason())
			}
		}
	}
	return strings.Join(all, "; ")
}

// advance moves on to the next address of the current spot, or to the next spot. It says whether there is one.
func (d *dialling) advance(c *conn) bool {
	if d.spot != nil {
		for d.place++; d.place < d.spot.n; d.place++ {
			if d.take(c) {
				return true
			}
		}
	}
	for d.tried < d.choices.len() {
		d.spot = d.candidate(c)
		d.backend, d.tried = d.spot.backend, d.tried+1
		for d.place = 0; d.place < d.spot.n; d.place++ {
			if d.take(c) {
				return true
			}
		}
	}
	return false
}

// candidate is the next one: the chosen one, those behind it, and then the backups in the same way.
func (d *dialling) candidate(c *conn) *spot {
	from, n := d.choices, d.tried
	if n < len(from.primary) {
		return &from.primary[(d.first+n)%len(from.primary)]
	}
	if d.firstBackup < 0 {
		d.firstBackup = draw(c, from.backup, -1)
	}
	return &from.backup[(d.firstBackup+n-len(from.primary))%len(from.backup)]
}

// take reserves a connection to the place that is next, if it is fit for one.
func (d *dialling) take(c *conn) bool {
	s := d.spot.places[d.place].at(c, d.spot.backend)
	switch {
	case s == nil: // the demo
	case !s.usable():
		d.out++
		return false
	case !s.reserve(c.route.maxConns):
		d.full++
		return false
	}
	d.server, c.server = s, s
	return true
}

// openSocket begins to connect to the current candidate: nil when that is done already, EINPROGRESS when it takes a while.
//
//	socket, setsockopt(TCP_NODELAY), setsockopt(TCP_QUICKACK), connect -> EINPROGRESS, epoll_ctl
func (c *conn) openSocket(d *dialling) error {
	s := &c.backend
	early, err := c.earlyWords(d)
	if err != nil {
		return err
	}
	fd, err := d.socket(c, d.server, len(early) > 0)
	if d.early = 0; err == nil && len(early) > 0 {
		d.early, err = sendEarly(fd, early)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	s.fd = fd
	if err := c.loop.watch(s); err != nil {
		return unix.ENOMEM
	}
	return err
}

// earlyWords are what a server hears at once, where the rule has them go with the SYN: only those who have something to say
// may let it wait.
func (c *conn) earlyWords(d *dialling) ([]byte, error) {
	switch b := d.backend; {
	case c.route.outbound == nil || !c.route.outbound.fastOpen || d.server == nil || d.server.unix != "":
		return nil, nil
	case c.route.proxy != natmap.ProxyOff:
		p, err := c.preface()
		return p.header, err
	case b.spec.TLS || b.speaks != starttls.Off:
		return nil, nil
	}
	return c.pending, nil
}

// sendEarly says the first words on a socket whose SYN waits for them (TCP_FASTOPEN_CONNECT), and how many of them the SYN
// has taken. Whether anybody is there is not known before that.
func sendEarly(fd int32, b []byte) (int, error) {
	n, e := sysWrite(fd, b)
	if e != 0 && e != unix.EINPROGRESS {
		sysClose(fd)
		return 0, e
	}
	return max(n, 0), unix.EINPROGRESS
}

// socket makes a socket and tells it to connect to a server; nil is the demo. Where it is early, and there is a cookie, the
// SYN waits for the first bytes.
func (d *dialling) socket(c *conn, to *server, early bool) (int32, error) {
	if to == nil {
		fd, e := c.loop.gw.demo.connect()
		if e != 0 {
			return fd, e
		}
		return fd, nil
	}
	sa, family := to.sockaddr()
	if family == unix.AF_UNIX {
		return connectTo(family, 0, sa, func(int) error { return nil })
	}
	out := c.route.outbound
	return out.connect(family, out.protocol(), sa, func(fd int) error {
		setNodelay(int32(fd)) // keepalive comes with the first silence: park
		delayAcks(int32(fd))  // that of the connection itself goes with the first request, or see ackNow
		return out.begin(fd, family, c.report.source.Addr(), early)
	})
}

// connect tells a socket to connect, from another port of the source where the one is in use.
func (o *outbound) connect(family, protocol int, sa unix.Sockaddr, prepare func(fd int) error) (int32, error) {
	for tried := 1; ; tried++ {
		fd, err := connectTo(family, protocol, sa, prepare)
		if !o.again(err, tried) {
			return fd, err
		}
	}
}

func connectTo(family, protocol int, sa unix.Sockaddr, prepare func(fd int) error) (int32, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) { // no MPTCP here, or switched off
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		return -1, err
	}
	if err = prepare(fd); err == nil {
		err = sysConnect(int32(fd), sa)
	}
	if err == unix.EAGAIN && family != unix.AF_UNIX { // no room in the kernel's tables (connect(2))
		err = unix.ENOBUFS
	}
	if err != nil && err != unix.EINPROGRESS {
		sysClose(int32(fd))
		return -1, err
	}
	return int32(fd), err
}

// connect goes on when the backend has answered, one way or the other. The client may leave meanwhile.
func (c *conn) connect() stage {
	d, s := c.dial, &c.backend
	if c.client.failed != 0 {
		return c.finish(ClientReset, "reset while a backend was sought")
	}
	if d.rival.fd >= 0 && d.rival.writable {
		c.endRace()
	}
	if s.fd < 0 || !s.writable {
		return connecting
	}
	if s.hup {
		switch e := takeError(s.fd); {
		case e == 0:
		case e == unix.ECONNRESET && d.backend.tickets == nil && d.backend.speaks == starttls.Off: // it took the connection and reset it: that is an answer, and goes on to the client
			s.failed = e
		case d.rival.fd >= 0:
			c.faulted(d.server, e.Error())
			c.takeRival()
			return c.connect()
		default:
			return c.unanswered(e.Error())
		}
	}
	c.dropRival()
	return c.connected()
}

func (c *conn) connected() stage {
	d := c.dial
	c.backend.writable = true
	if d.server != nil {
		d.server.total.Add(1)
	}
	c.report.connectTime = c.loop.now - d.started
	if b := d.backend; b.speaks != starttls.Off && !b.inside && (!c.cancels || b.spec.TLS) {
		return c.startAsking()
	}
	return c.reached()
}

// reached is where the backend has said what it says before TLS.
func (c *conn) reached() stage {
	if c.dial.backend.tickets != nil {
		return c.encrypt()
	}
	return c.found()
}

// found is the end of the search. The line says which backends were tried in vain before.
func (c *conn) found() stage {
	c.dial.server.works()
	c.reports(c.dial.name())
	c.report.err = strings.Join(c.dial.errs, "; ")
	return greeting
}

// reports takes down who the backend is. MySQL's is found twice: before TLS, and once that is there.
func (c *conn) reports(backend string) {
	if c.report.backend == "" {
		c.loop.counters.spans[connectSpan].note(c.report.connectTime)
	}
	c.report.backend = backend
}

// connectDue is the end of the patience with a candidate, of the pause between two rounds, or of the time that one
// address has before the other one is tried as well.
func (c *conn) connectDue() stage {
	d := c.dial
	switch {
	case c.backend.fd < 0:
		return c.search()
	case d.place == 0 && d.spot.n > 1 && c.loop.now < d.until:
		c.race()
		c.setDeadline(d.share(c))
		return connecting
	}
	if d.rival.fd >= 0 {
		c.faulted(d.rivalServer, "no answer in time")
	}
	return c.unanswered("no answer in time")
}

// race connects to the spot's other address as well, if that can be. Whichever answers first is taken.
func (c *conn) race() {
	d := c.dial
	d.place = 1
	s := d.spot.places[1].at(c, d.spot.backend)
	if s == nil || !s.usable() || !s.reserve(c.route.maxConns) {
		return
	}
	fd, err := d.socket(c, s, false)
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		s.open.Add(-1)
		if ownLack(err) {
			c.loop.gw.short(lackInConnect, err, s.name)
		}
		return
	}
	d.rival, d.rivalServer = socket{fd: fd, owner: c}, s
	if c.loop.watch(&d.rival) != nil {
		c.dropRival()
	}
}

// endRace is for a rival that has answered: it takes the place of the one that has not, or leaves the field to it.
func (c *conn) endRace() {
	d := c.dial
	if d.rival.hup {
		if e := takeError(d.rival.fd); e != 0 {
			c.faulted(d.rivalServer, e.Error())
			c.dropRival()
			return
		}
	}
	c.blame(d.server, "the machine's other address answers sooner")
	c.takeRival()
}

// takeRival puts the rival in the place of the one that was tried first.
func (c *conn) takeRival() {
	d := c.dial
	rival, s := d.rival, d.rivalServer
	d.early = 0
	d.rival, d.rivalServer = socket{fd: -1, owner: c}, nil
	c.hangUp()
	c.backend, c.server, d.server = rival, s, s
	c.loop.socks.replace(&c.backend)
}

func (c *conn) dropRival() {
	d := c.dial
	if d.rival.fd < 0 {
		return
	}
	c.loop.closeSocket(&d.rival)
	d.rivalServer.open.Add(-1)
	d.rival, d.rivalServer = socket{fd: -1, owner: c}, nil
}

// unconnected ends a connection that found no backend: in words for HTTP clients there are none at this layer, so
// TLS clients get an alert and the others a reset.
func (c *conn) unconnected(o Outcome, why string) stage {
	c.tell(o, why)
	if s := c.client.tls; s != nil {
		c.report.alertSent = int16(alertInternalError)
		return c.answerAndLinger(s.writer.AppendAlert(nil, record.AlertInternalError))
	}
	if c.prelude.Protocol == starttls.MySQL && c.dial.talk == nil { // who waits for a greeting
		return c.answerAndLinger(starttls.MySQLRefusal(nil, "no server answers"))
	}
	abort(&c.client)
	return c.finish(o, why)
}

// route is a rule as the loops use it: its options with the settings filled in, its backends, and who is to choose among.
type route struct {
	rule    *natmap.Rule
	index   int    // among the generation's routes
	label   string // file:line
	profile *profile
	proxy   natmap.ProxyVersion
	kernel  *ktls.Support // what may go to the kernel; nil: nothing
	keeper  *keeper

	kernelRX bool // what is received may go there: no fault is known in how it opens, or the operator takes it as it is

	encryption *encryption // nil: no backend is a tls:// one

	gate     *lineGate  // nil: whoever comes may come in
	pace     gate.Pace  // 0: as fast as it goes
	backends []*backend // in the order of the map
	choices  atomic.Pointer[choices]
	balance  natmap.Balance
	outbound *outbound // nil: nothing is asked of sockets
	onDown   natmap.OnDown

	maxConns      int64 // to one server; 0: no bound
	queue         natmap.Queue
	waiting       atomic.Int64 // in the queue, on all loops
	retries       int
	eject         int32 // 0: off
	slowStart     time.Duration
	idle, connect time.Duration
	linger        time.Duration
	truncation    natmap.Truncation
	lifetime      time.Duration

	use *usage
}

// usage counts the connections that a rule decided about, and those of them that are over. It stays over reloads.
type usage struct{ entered, ended atomic.Uint64 }

// fillPool sets what the rule says about its backends.
func (r *route) fillPool(o *natmap.PoolOptions) {
	r.balance, r.onDown, r.outbound = o.Balance, o.OnDown, newOutbound(o)
	r.maxConns, r.queue, r.slowStart = int64(o.MaxConns), o.Queue, max(o.SlowStart, 0)
	r.retries, r.eject = natmap.DefaultRetries, natmap.DefaultEject
	if o.Retries != nil {
		r.retries = *o.Retries
	}
	if o.Eject != nil {
		r.eject = int32(*o.Eject)
	}
}

func (c *choices) len() int { return len(c.primary) + len(c.backup) }

func (b *backend) String() string {
	if b.demo {
		return "demo"
	}
	return b.spec.String()
}
