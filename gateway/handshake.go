// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"reflect"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/gateway/turns"
)

// turnQueue is where connections wait for their turn, oldest first.
type turnQueue struct {
	waiting []*conn
	n       atomic.Int32 // of them, for those who are not on the loop
}

func (q *turnQueue) push(c *conn) {
	q.waiting = append(q.waiting, c)
	q.n.Add(1)
}

func (q *turnQueue) pop() *conn {
	c := q.waiting[0]
	q.waiting[0] = nil
	q.waiting = q.waiting[1:]
	q.n.Add(-1)
	return c
}

// remove takes c out of the queue. It is rare (a deadline), so that it may look for it.
func (q *turnQueue) remove(c *conn) {
	for i, x := range q.waiting {
		if x == c {
			q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
			q.n.Add(-1)
			return
		}
	}
}

// computing is how many handshakes of a loop compute at once. One would do for a CPU; with two there is another one
// at hand when the first has to wait for its client, without the loop being asked.
const computing = 2

// sourceOf is whose a handshake is: one address, or one IPv6 network.
func sourceOf(c *conn) netip.Prefix { return gate.Prefix64(c.report.source.Addr()) }

// queueHandshake lets the client shake hands when it is its turn: at once, as a rule. At most computing handshakes compute,
// maxInFlight are in progress, and as many hellos wait here, at the cost of their bytes. If there are more, the source with
// the most of them loses its oldest: that client is the most likely to have given up.
func (c *conn) queueHandshake() stage {
	l := c.loop
	entry := c.certificate()
	if entry == nil {
		return c.refuse(UnknownName, alertUnrecognizedName, c.noCertificate())
	}
	c.terms = &terms{entry: entry}
	c.to(waitingTurn)
	l.queueHello(c)
	l.startHandshakes()
	return c.stage
}

// queueHello has a hello wait, and drops one if there are too many.
func (l *loop) queueHello(c *conn) {
	l.queue.Push(c)
	if int(l.queue.Waiting.Load()) > l.maxInFlight() {
		l.dropHello(refusedHandshakeAll)
	}
}

// dropHello ends the connection of a hello that waits. Its client gets an alert, but nobody waits for that to be read: in a
// flood those who linger would be more than those who are served.
func (l *loop) dropHello(why refusal) {
	c := l.queue.Drop()
	c.refused(why)
	c.tell(Limited, refusalTexts[why])
	c.report.alertSent = int16(alertInternalError)
	_, _ = sysWrite(c.client.fd, []byte{21, 3, 3, 0, 2, 2, alertInternalError})
	c.finish(Limited, "")
}

// awaitTurn waits for the turn. A client that resets its connection meanwhile costs no handshake.
func (c *conn) awaitTurn() stage {
	if c.client.failed != 0 {
		c.loop.queue.Remove(c)
		return c.finish(ClientReset, "reset while it waited to shake hands")
	}
	return waitingTurn
}

// terms is what a handshake needs to know of the hello that led to it.
type terms struct {
	entry *certs.Entry
}

// certificate is what the client is shown.
func (c *conn) certificate() *certs.Entry {
	return c.gen.config.Certificate(c.route.rule, c.report.sni, c.asked)
}

// asked is the address that the client connected to: the PROXY header's, behind a load balancer, else the socket's.
func (c *conn) asked() netip.Addr {
	if c.report.target.IsValid() {
		return c.report.target.Addr()
	}
	return localAddr(c.client.fd).Addr()
}

func (c *conn) noCertificate() string {
	if c.report.sni != "" {
		return "a rule matches, but no certificate in " + config.Prefix + "CERTS is for this name"
	}
	return "the client sent no name, and it is not clear which certificate it should see: write cert=NAME into the rule"
}

// maxInFlight is the loop's part of TLSNAT_HANDSHAKES. A loop can shake hands for its own connections only. With one bound
// for all loops a single loop could take all of it, and the clients of the others would pay for that.
func (l *loop) maxInFlight() int { return max(1, l.gw.settings.Handshakes/len(l.gw.loops)) }

// turnFree says whether somebody waits for a turn and may have it.
func (l *loop) turnFree() bool {
	return l.active.Load() < computing && (l.encryptionWaits() || l.handshakeWaits())
}

// encryptionWaits says whether a handshake with a server may begin. One server may have as many places as are free after
// it: a server that does not answer takes half of them, two a third each, and there is always room for the others (Choudhury
// and Hahne, "Dynamic queue length thresholds for shared-memory packet switches").
func (l *loop) encryptionWaits() bool {
	q := &l.encryptQueue
	return q.Waiting.Load() > 0 && q.Fewest() < max(1, l.maxInFlight()-int(q.Held.Load()))
}

// handshakeWaits says whether a handshake with a client may begin: when a place is free, or somebody silent has one.
func (l *loop) handshakeWaits() bool {
	return l.queue.Waiting.Load() > 0 && (l.placeFree() || l.longestSilent() != nil)
}

func (l *loop) placeFree() bool { return int(l.queue.Held.Load()) < l.maxInFlight() }

// startHandshakes gives turns to those who wait for one, to clients and servers by turns. A client whose rule does not
// terminate costs no handshake of its own, so neither kind may go before the other.
func (l *loop) startHandshakes() {
	for l.turnFree() {
		l.serverNext = !l.serverNext
		if l.encryptionWaits() && (l.serverNext || !l.handshakeWaits()) {
			l.startEncryption()
		} else {
			l.startHandshake()
		}
	}
}

// startHandshake gives a place to the client that is next. It is that of the longest silent one if none is free.
func (l *loop) startHandshake() {
	if !l.placeFree() {
		l.longestSilent().giveUpSilent()
	}
	l.endSilent()
	l.giveTurn(l.queue.Take())
}

// giveTurn begins the handshake of a client that has a place.
func (l *loop) giveTurn(c *conn) {
	defer c.rescue()
	places := 1
	defer func() {
		if c.hs == nil { // it has not begun
			l.queue.Leave(c, places)
		}
	}()
	hs := c.route.profile.handshaker(l)
	if more := min(len(c.pending)/helloPlace, l.maxInFlight()-1); more > 0 {
		l.queue.Enlarge(c, more)
		places += more
	}
	hs.begin(c)
	hs.begun, hs.places = l.now, places
	c.to(shakingHands)
	c.setDeadline(l.patience())
	c.hs = hs
	l.begun = append(l.begun, c)
	l.active.Add(1)
	l.shakers.run(hs)
}

const (
	// A handshake with a usual hello costs some 20 KiB while it waits for its client, stack included
	// (TestSilentHandshakesCostLittle). crypto/tls has a hello three times then, so larger ones have a place for each
	// helloPlace bytes.
	helloPlace = 4 << 10
	// The deadline never gets shorter: the slowest networks take half of it, and a packet that was lost is sent again after
	// a second (RFC 6298, section 2). Only when all places are taken does the longest silent client go sooner.
	leastPatience = int64(1500 * time.Millisecond)
)

// patience is how long a client may be silent, in nanoseconds: TLSNAT_HELLO_TIMEOUT while half of the places are free, then
// less and less, down to leastPatience when none is.
func (l *loop) patience() int64 {
	most, half := int64(l.gw.settings.HelloTimeout), int64(l.maxInFlight()/2)
	taken := min(int64(l.queue.Held.Load())-half, half)
	if taken <= 0 || most <= leastPatience {
		return most
	}
	return most - (most-leastPatience)/half*taken
}

// endSilent ends handshakes whose clients have been silent for longer than is left to them now that there are more of them.
// It looks at so many a handshake that begins: more than one, so that it catches up.
func (l *loop) endSilent() {
	const some = 4
	for range some {
		if len(l.begun) == 0 {
			return
		}
		c := l.begun[0]
		if l.now-c.hs.begun < l.patience() || !c.hs.wire.waits() {
			return
		}
		c.giveUpSilent()
	}
}

// longestSilent is who gives up their place for somebody who waits: of the source with the most places the client that has
// been silent for longest; nil if nobody is. Those who compute are few, so that a few are looked at.
func (l *loop) longestSilent() *conn {
	const few = 4 * computing
	all := l.queue.Richest()
	for _, c := range all[:min(len(all), few)] {
		if c.hs.wire.waits() {
			return c
		}
	}
	return nil
}

// giveUpSilent ends a handshake whose client does not answer, and gives back its place at once.
func (c *conn) giveUpSilent() {
	l, silence := c.loop, time.Duration(c.loop.now-c.hs.begun)
	if !c.report.told {
		c.report.hurried = silence < l.gw.settings.HelloTimeout
		l.counters.silent.Add(1)
	}
	c.giveUpHandshake(fmt.Sprintf("the client did not answer within %v (%sHELLO_TIMEOUT; less while many are silent)", silence.Round(time.Millisecond), config.Prefix))
	c.leavePlaces()
	c.release(holdsHandshake)
}

// silentOf is who gives up their part of handshakes= for a newcomer: of those of the line that are silent on this loop the
// one whose source has the most places, and of these the one that is silent for longest; nil if nobody is.
func (l *loop) silentOf(line *lineCount) (found *conn) {
	const looked = 64 // at sources: a lookup each takes some 50 ns
	most, n := 0, 0
	for _, c := range l.begun {
		if c.holds&holdsHandshake == 0 || c.route.gate.count != line || !c.hs.wire.waits() {
			continue
		}
		if held := l.queue.Holds(c); held > most {
			found, most = c, held
		}
		if n++; n == looked {
			break
		}
	}
	return found
}

// leavePlaces gives back what a handshake has taken, once.
func (c *conn) leavePlaces() {
	l, h := c.loop, c.hs
	if h.places > 0 {
		l.begun = turns.TakeOut(l.begun, c)
		l.queue.Leave(c, h.places)
		h.places = 0
	}
}

// handshakesWait says whether a turn that becomes free is wanted. It may be asked off the loop.
func (l *loop) handshakesWait() bool {
	return l.queue.Waiting.Load() > 0 || l.encryptQueue.Waiting.Load() > 0
}

// shaker is a handshake that is to run: with a client or with a backend.
type shaker interface{ run() }

// shakers are goroutines that run a loop's handshakes. A few stay when they are done: to grow a new stack to the
// size that a handshake needs was 3 % of its CPU time.
type shakers struct {
	work chan shaker
	idle atomic.Int32
}

// idleShakers is how many stay: those that compute, and one that comes back from its client's answer.
const idleShakers = computing + 1

func (s *shakers) run(h shaker) {
	select {
	case s.work <- h:
	default:
		go s.shake(h)
	}
}

func (s *shakers) shake(h shaker) {
	for h != nil {
		h.run()
		if s.idle.Add(1) > idleShakers {
			s.idle.Add(-1)
			return
		}
		h = <-s.work // nil: the loop has ended
		s.idle.Add(-1)
	}
}

// end lets the idle ones go. Nothing is run any more.
func (s *shakers) end() { close(s.work) }

// nudgeHandshake tells the handshake that its socket has news.
func (c *conn) nudgeHandshake() stage {
	if c.client.hup || c.client.exact {
		c.hs.wire.cut.Store(true)
	}
	c.hs.wire.nudge()
	return shakingHands
}

// handshakeDue is the end of the patience with a client. If it has answered just now, its handshake goes on.
func (c *conn) handshakeDue() {
	if c.report.told || c.hs.wire.waits() {
		c.giveUpSilent()
		return
	}
	c.setDeadline(int64(time.Second))
}

// giveUpHandshake ends a handshake that takes too long. Its goroutine holds the descriptor: it's woken by the end of
// the stream, and the conn is finished when it reports back.
func (c *conn) giveUpHandshake(why string) {
	c.tell(HandshakeFailed, why)
	sysShutdown(c.client.fd, unix.SHUT_RDWR)
	c.hs.wire.gaveUp.Store(true)
	c.hs.wire.nudge()
}

// profile is what rules with the same TLS options share: a template, and for each loop the handshakers made from it.
type profile struct {
	gw     *Gateway
	minTLS uint16
	alpn   []string
	scope  [8]byte         // goes into tickets: a session is resumed only under the options that it was made with
	idle   [][]*handshaker // by loop; touched by that loop only
}

// idleHandshakers is how many a loop keeps for later: those that compute and some that wait for their clients.
const idleHandshakers = 64

// suites12 are the TLS 1.2 suites that the record engine carries: ECDHE with an AEAD, nothing else.
var suites12 = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// groups are the key exchanges, cheapest first. P-384 and P-521 cost ten times as much as X25519, and are for peers that
// are held to them (CNSA, Suite B).
var groups = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384, tls.CurveP521}

func newProfile(g *Gateway, minTLS uint16, alpn []string) *profile {
	p := &profile{gw: g, minTLS: minTLS, alpn: alpn, idle: make([][]*handshaker, len(g.loops))}
	sum := sha256.Sum256(fmt.Append(nil, minTLS, alpn))
	copy(p.scope[:], sum[:])
	return p
}

// handshaker takes one from the loop's idle ones, or makes one.
func (p *profile) handshaker(l *loop) *handshaker {
	idle := p.idle[l.index]
	if n := len(idle); n > 0 {
		h := idle[n-1]
		p.idle[l.index] = idle[:n-1]
		return h
	}
	h := &handshaker{profile: p}
	h.wire.news = make(chan struct{}, 1)
	h.config = &tls.Config{
		MinVersion:       p.minTLS,
		CipherSuites:     suites12,
		CurvePreferences: groups,
		NextProtos:       p.alpn,
		GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return h.entry.Select(chi)
		},
		KeyLogWriter:  &h.secrets,
		WrapSession:   h.wrapSession,
		UnwrapSession: h.unwrapSession,
	}
	return h
}

func (p *profile) giveBack(l *loop, h *handshaker) {
	if idle := p.idle[l.index]; len(idle) < idleHandshakers {
		p.idle[l.index] = append(idle, h)
	}
}

// handshaker runs one handshake after another: crypto/tls's side of a connection, in a goroutine of its own. Its
// config is made once and used again; cloning one for every connection costs as much as a record of handshake.
type handshaker struct {
	profile *profile
	config  *tls.Config
	wire    wire

	// of the handshake that is running
	begun   int64 // loop nanoseconds
	places  int   // that it has taken
	conn    *conn
	entry   *certs.Entry
	tickets *tls.Config // holds the ticket keys
	sni     string
	secrets secrets

	// its result
	state   tls.ConnectionState
	session *session
	err     error
}

// secrets is what the key log said, or the ticket (TLS 1.2, resumed).
type secrets struct {
	client, server                   secret // of the application's data in TLS 1.3
	clientHandshake, serverHandshake secret // of the handshake in TLS 1.3
	master                           secret // TLS 1.2
}

// secret is one of them. It has no bytes until it is known.
type secret struct {
	b [masterLen]byte // the longest are those of SHA-384, and master secrets
	n uint8
}

// masterLen is a master secret of TLS 1.2 (RFC 5246, section 8.1).
const masterLen = 48

func (s *secret) bytes() []byte { return s.b[:s.n] }

func (s *secret) set(b []byte) { s.n = uint8(copy(s.b[:], b)) }

// Write takes a line of the key log: "LABEL <client random> <secret>", both in hex.
func (s *secrets) Write(line []byte) (int, error) {
	label, rest, _ := bytes.Cut(line, []byte(" "))
	_, text, _ := bytes.Cut(bytes.TrimSpace(rest), []byte(" "))
	var into *secret
	switch string(label) {
	case "CLIENT_TRAFFIC_SECRET_0":
		into = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		into = &s.server
	case "CLIENT_HANDSHAKE_TRAFFIC_SECRET":
		into = &s.clientHandshake
	case "SERVER_HANDSHAKE_TRAFFIC_SECRET":
		into = &s.serverHandshake
	case "CLIENT_RANDOM":
		into = &s.master
	default:
		return len(line), nil
	}
	into.n = 0
	if len(text) > 2*len(into.b) {
		return 0, errors.New("key log: secret too long")
	}
	n, err := hex.Decode(into.b[:], text)
	if err != nil {
		return 0, fmt.Errorf("key log: %w", err)
	}
	into.n = uint8(n)
	return len(line), nil
}

func (h *handshaker) begin(c *conn) {
	h.conn, h.entry, h.sni = c, c.terms.entry, c.report.sni
	h.tickets = c.loop.gw.tickets.config()
	h.wire.begin(c.loop, &c.client, c.pending)
	c.pending, c.terms = nil, nil
}

// run is the goroutine: the handshake, then the keys, then back to the loop.
func (h *handshaker) run() {
	h.shake()
	h.wire.compute(false)
	h.conn.loop.post(h.done)
}

// shake has a small frame: it is on the stack of every handshake that waits for its client, and with what finished has in it the
// collector could not halve that stack.
func (h *handshaker) shake() {
	defer func() {
		if p := recover(); p != nil {
			h.err = &panicked{p}
		}
	}()
	tc := tls.Server(&h.wire, h.config)
	h.err = tc.Handshake()
	h.finished(tc)
}

//go:noinline
func (h *handshaker) finished(tc *tls.Conn) {
	if h.state = tc.ConnectionState(); h.err != nil {
		h.findAlert(h.state.CipherSuite)
		return
	}
	h.session, h.err = h.takeKeys()
}

// findAlert looks for the alert that crypto/tls has sent. In the clear it was seen; after our Finished of TLS 1.3 it is
// the last record under the application keys.
func (h *handshaker) findAlert(suite uint16) {
	w := &h.wire.out
	if w.alert > 0 || h.secrets.server.n == 0 {
		return
	}
	out, err := record.TrafficKeys(suite, h.secrets.server.bytes())
	defer out.Wipe()
	if err != nil {
		return
	}
	next, ok := record.ProbeSequence(out, w.last, int(w.secret))
	if !ok {
		return
	}
	var r record.Reader
	r.Init(out, next-1, record.Client)
	if rec, _, err := r.Next(w.last); err == nil && rec.Kind == record.AlertReceived {
		w.alert = int16(rec.Alert)
	}
	r.Wipe()
}

// panicked is a fault of ours in a handshake: it ends that connection and no other.
type panicked struct{ value any }

func (p *panicked) Error() string { return fmt.Sprintf("panic in the handshake: %v", p.value) }

// takeKeys makes the record engine's halves from what was written down during the handshake.
func (h *handshaker) takeKeys() (*session, error) {
	return h.wire.engine(&h.secrets, &h.state, record.Server)
}

// keys are what the client and what the server writes application data with. Wipe both, also after an error.
func (s *secrets) keys(state *tls.ConnectionState, w *wire, role record.Role) (client, server record.Keys, err error) {
	suite := state.CipherSuite
	if state.Version == tls.VersionTLS13 {
		if client, err = record.TrafficKeys(suite, s.client.bytes()); err != nil {
			return client, server, fmt.Errorf("client traffic keys: %w", err)
		}
		if server, err = record.TrafficKeys(suite, s.server.bytes()); err != nil {
			return client, server, fmt.Errorf("server traffic keys: %w", err)
		}
		return client, server, nil
	}
	said, heard := &w.out, &w.in
	if role == record.Server {
		said, heard = heard, said
	}
	switch {
	case s.master.n != masterLen:
		return client, server, errors.New("no master secret: neither logged nor in the ticket")
	case !said.randomKnown || !heard.randomKnown:
		return client, server, errors.New("a hello went by unseen")
	}
	if client, server, err = record.KeyBlock(suite, s.master.bytes(), said.random[:], heard.random[:]); err != nil {
		return client, server, fmt.Errorf("key block: %w", err)
	}
	return client, server, nil
}

// done is back on the loop: the handshake is over, one way or the other.
func (h *handshaker) done() {
	h.conn.leavePlaces()
	l := h.conn.loop
	h.conn.shook(h)
	l.startHandshakes()
}

// shook goes on behind the handshake with the client.
func (c *conn) shook(h *handshaker) {
	defer c.rescue()
	l := c.loop
	c.hs = nil
	err, state, sess, rest := h.err, h.state, h.session, h.wire.rest()
	c.report.alertSent, c.report.alertReceived = h.wire.out.alert, h.wire.in.alert
	c.client.readable = !h.wire.drained || len(h.wire.news) > 0 || c.client.hup
	c.client.writable = true
	h.forget()
	h.profile.giveBack(l, h)
	c.release(holdsHandshake)
	switch {
	case c.report.told:
		c.finish(HandshakeFailed, "")
	case err != nil:
		c.handshakeFailed(err)
	default:
		c.client.tls = sess
		c.report.halves += 2
		if len(rest) > 0 {
			c.up.carry = append(l.lend(len(rest)), rest...)
		}
		c.report.shookHands(&state, l.now)
		l.counters.shookHands(&c.report)
		c.goOn(c.startConnect())
	}
}

// forget wipes what must not stay, and makes the handshaker ready for the next connection.
func (h *handshaker) forget() {
	h.secrets = secrets{}
	h.conn, h.entry, h.tickets, h.sni = nil, nil, nil, ""
	h.state, h.session, h.err = tls.ConnectionState{}, nil, nil
	h.wire.forget()
}

// handshakeFailed finds the words for it. crypto/tls has sent the alert.
func (c *conn) handshakeFailed(err error) {
	var p *panicked
	var op *net.OpError
	var errno unix.Errno
	switch {
	case errors.As(err, &p):
		c.tell(Internal, err.Error())
	case errors.As(err, &op) && op.Op == "remote error":
		if v := reflect.ValueOf(op.Err); v.Kind() == reflect.Uint8 { // crypto/tls keeps the type of its alerts to itself
			c.report.alertReceived = int16(v.Uint())
		}
		c.tell(HandshakeFailed, "the client refused: "+op.Err.Error())
	case c.report.alertReceived > 0:
		c.tell(HandshakeFailed, "the client refused: "+record.Alert(c.report.alertReceived).String())
	case errors.Is(err, io.EOF) && c.client.failed != 0:
		c.tell(ClientReset, "reset during the handshake")
	case errors.Is(err, io.EOF):
		c.tell(HandshakeFailed, "the client left during the handshake")
	case errors.As(err, &errno) && streamCalls.mean(errno) != meansGone:
		c.tell(Internal, "TLS handshake: "+errno.Error())
	case errno != 0:
		c.tell(ClientReset, "reset during the handshake")
	default:
		c.tell(HandshakeFailed, err.Error())
	}
	if errno != 0 { // nobody is there to linger for
		c.finish(HandshakeFailed, "")
		return
	}
	c.goOn(c.startLinger())
}

// ticketMark begins our entry in a ticket: what it is, the options and the name that the session was made under, and
// for TLS 1.2 the master secret, which crypto/tls does not log when a session is resumed. The ticket is encrypted.
var ticketMark = []byte("tlsnat/1")

func (h *handshaker) ticketScope() []byte {
	b := append([]byte(nil), ticketMark...)
	b = append(b, h.profile.scope[:]...)
	name := sha256.Sum256([]byte(h.sni))
	return append(b, name[:8]...)
}

func (h *handshaker) wrapSession(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
	entry := h.ticketScope()
	if cs.Version == tls.VersionTLS12 {
		if h.secrets.master.n != masterLen {
			return nil, errors.New("no master secret for the ticket")
		}
		entry = append(entry, h.secrets.master.bytes()...)
	}
	ss.Extra = append(ss.Extra, entry)
	return h.tickets.EncryptTicket(cs, ss)
}

// unwrapSession opens a ticket. One from another rule's options or another name is no ticket here: the client shakes
// hands in full.
func (h *handshaker) unwrapSession(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
	ss, err := h.tickets.DecryptTicket(ticket, cs)
	if err != nil || ss == nil {
		return nil, err
	}
	scope := h.ticketScope()
	for i, entry := range ss.Extra {
		master, ok := bytes.CutPrefix(entry, scope)
		if !ok {
			continue
		}
		if len(master) == masterLen {
			h.secrets.master.set(master)
		}
		ss.Extra = append(ss.Extra[:i], ss.Extra[i+1:]...) // a re-issued ticket gets its own
		return ss, nil
	}
	return nil, nil
}

// wire is the net.Conn that crypto/tls shakes hands over, with a client or with a backend. It hands out no more than one
// record at a time: crypto/tls reads as much as it gets, and what it has read beyond the handshake could not be had back.
type wire struct {
	loop      *loop
	fd        int32
	news      chan struct{} // the loop's word that the socket has news, after which a read is worth trying
	buf       []byte        // read and not handed out: buf[off:]
	off       int
	left      int                // of the record that is being handed out
	more      int                // of a record that is handed out in pieces: what comes behind this one
	head      [recordHeader]byte // of such a piece,
	headLeft  int                // and how much of it is still to be handed out
	drained   bool               // there is nothing to read until the loop has news
	cut       atomic.Bool        // a short read does not mean "drained": the stream's end, or urgent data, is behind it
	computing bool
	preface   []byte // goes out before everything else: the PROXY header for a backend

	in, out follower    // what crypto/tls was handed, and what it wrote
	gaveUp  atomic.Bool // nobody waits for the handshake any more
	silent  atomic.Bool // the handshake waits for its peer
}

var (
	errGaveUp  = errors.New("given up")
	errRefused = errors.New("the peer has ended the handshake with an alert") // which is not answered by another
)

// shortRecord is longer than a Finished of TLS 1.2 is in its record, which is all that is kept of what a peer sends.
const shortRecord = 64

const wireBuffer = 4 << 10 // a hello, or a Finished with a request behind it

func (w *wire) begin(l *loop, s *socket, hello []byte) {
	w.loop, w.fd, w.computing = l, s.fd, true
	w.in.begin(shortRecord)
	w.out.begin(record.MaxRecord)
	w.drained = !s.readable
	w.gaveUp.Store(false)
	w.cut.Store(s.hup || s.exact)
	w.buf = append(w.buf[:0], hello...)
	select {
	case <-w.news: // meant for the connection before
	default:
	}
}

func (w *wire) forget() {
	if cap(w.buf) > 4*wireBuffer {
		w.buf = nil
	}
	w.buf, w.off, w.left, w.more, w.headLeft = w.buf[:0], 0, 0, 0, 0
	w.loop, w.preface = nil, nil
	w.in.begin(0)
	w.out.begin(0)
}

// rest is what was read beyond the handshake.
func (w *wire) rest() []byte { return w.buf[w.off:] }

func (w *wire) nudge() {
	select {
	case w.news <- struct{}{}:
	default:
	}
}

// compute says whether the handshake computes or waits for its client, which does not count against those that may
// compute at once.
func (w *wire) compute(on bool) {
	if w.computing && !on {
		w.computing = false
		if w.loop.active.Add(-1) < computing && w.loop.handshakesWait() {
			w.loop.poll.wake() // somebody waits for this turn
		}
	}
}

// await waits for the loop's word that the socket has news. Most of the memory that is not needed meanwhile is given back:
// a peer that never answers must not cost more than it has to.
func (w *wire) await() {
	if len(w.buf) == 0 {
		w.buf = nil
	}
	if last := w.out.last; cap(last) > 4*len(last) { // it had a certificate in it
		w.out.last = append([]byte(nil), last...)
	}
	w.silent.Store(true)
	if w.compute(false); w.loop.handshakesWait() {
		w.loop.poll.wake() // for its place
	}
	<-w.news
	w.silent.Store(false)
	w.drained = false
}

// waits says whether the handshake waits for its peer, and that has not just said something.
func (w *wire) waits() bool { return w.silent.Load() && len(w.news) == 0 }

// Read hands out bytes of one record at a time.
func (w *wire) Read(p []byte) (int, error) {
	for {
		if n := w.take(p); n > 0 {
			return n, nil
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
}

// crypto/tls reads a record into a buffer that it keeps. The first one has room for this much, and a longer record would
// have it make one of twice the size and more, for as long as the handshake waits for its client. So a long record of
// handshake messages, such as a post-quantum hello, is handed out as several: they may be cut anywhere (RFC 8446, section 5.1).
const longestPiece = 512

// take moves what may be handed out into p, of one record.
func (w *wire) take(p []byte) int {
	b := w.buf[w.off:]
	if w.left == 0 && w.more == 0 {
		if len(b) < recordHeader {
			return 0
		}
		size := int(b[3])<<8 + int(b[4])
		if b[0] != record.TypeHandshake || w.in.changed || size <= longestPiece {
			w.left = recordHeader + size
		} else {
			w.head, w.more, w.off = [recordHeader]byte(b), size, w.off+recordHeader
		}
	}
	if w.left == 0 {
		n := min(w.more, longestPiece)
		w.head[3], w.head[4], w.headLeft = byte(n>>8), byte(n), recordHeader
		w.left, w.more = n, w.more-n
	}
	if w.headLeft > 0 {
		n := copy(p, w.head[recordHeader-w.headLeft:])
		w.in.follow(p[:n])
		w.headLeft -= n
		return n
	}
	n := copy(p[:min(len(p), w.left)], b)
	w.in.follow(b[:n])
	w.off += n
	w.left -= n
	return n
}

// fill reads what the socket has, and waits if that's nothing.
func (w *wire) fill() error {
	if w.off > 0 {
		w.buf = w.buf[:copy(w.buf, w.buf[w.off:])]
		w.off = 0
	}
	for {
		if w.drained {
			w.await()
		}
		if cap(w.buf)-len(w.buf) < 512 {
			w.buf = append(make([]byte, 0, max(wireBuffer, 2*cap(w.buf))), w.buf...)
		}
		room := w.buf[len(w.buf):cap(w.buf)]
		n, e := sysRead(w.fd, room)
		switch {
		case w.gaveUp.Load():
			return errGaveUp
		case e != 0 && streamCalls.mean(e) == meansWait:
			w.drained = true
		case e != 0:
			return e
		case n == 0:
			return io.EOF
		default:
			w.drained = n < len(room) && !w.cut.Load()
			w.buf = w.buf[:len(w.buf)+n]
			return nil
		}
	}
}

// Write sends all of p and notes what the engine needs to know of it.
func (w *wire) Write(p []byte) (int, error) {
	if w.in.alert > 0 {
		return 0, errRefused
	}
	w.out.follow(p)
	written := len(p)
	if w.preface != nil { // in the same segment
		p, w.preface = append(w.preface, p...), nil
	}
	for sent := 0; sent < len(p); {
		n, e := sysWrite(w.fd, p[sent:])
		switch {
		case w.gaveUp.Load():
			return 0, errGaveUp
		case e != 0 && streamCalls.mean(e) == meansWait:
			w.await()
		case e != 0:
			return 0, e // crypto/tls gives up, however much went
		default:
			sent += n
		}
	}
	return written, nil
}

// The rest of net.Conn. The loop keeps the time and closes the socket.

func (w *wire) Close() error                     { return nil }
func (w *wire) LocalAddr() net.Addr              { return net.TCPAddrFromAddrPort(localAddr(w.fd)) }
func (w *wire) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }
