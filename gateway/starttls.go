// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/natmap"
)

// What comes before TLS, on ports with starttls= and towards backends of tls+PROTOCOL://.
//
// A client is answered by us until it asks for TLS; then come its ClientHello and everything else. It reaches its backend
// behind the handshake only, so the backend's own greeting, which the client has had from us, is taken off. MySQL's servers
// begin with a greeting that nobody else can make up: there the backend is sought first, and the client gets what it says.

// preludeLimit bounds what is kept of a client or of a backend before TLS: more than the longest line or message has, with
// its header (package starttls).
const preludeLimit = 8 << 10

// speech is what a backend has to be asked or heard before bytes can be carried.
type speech struct {
	speaks starttls.Protocol // off: nothing
	asks   bool              // it is asked for TLS; else only its greeting is heard
	inside bool              // the greeting comes inside TLS
}

// speechOf is that of a rule's backend. Where mode=pass has answered the client, the backend still waits for the question.
func speechOf(r *natmap.Rule, spec *natmap.Backend) speech {
	spoken := starttls.Protocol(r.Options.StartTLS)
	switch {
	case spec.StartTLS != natmap.StartTLSOff:
		return speech{speaks: starttls.Protocol(spec.StartTLS), asks: true}
	case r.Options.Mode == natmap.Pass && spoken != starttls.Off:
		return speech{speaks: spoken, asks: true}
	case spoken.Greets():
		return speech{speaks: spoken, inside: spec.TLS}
	}
	return speech{}
}

// begins says with which stage the connections of the port begin, and whether they do so without a byte of the client's.
func (p *portRules) begins(gen *generation) {
	p.first = readingHello
	p.eager = p.plain != nil
	p.host = machineName()
	if p.rules != nil && p.rules.ByHost {
		p.first = readingRequest
	}
	if p.rules == nil || p.rules.StartTLS == natmap.StartTLSOff {
		return
	}
	p.prelude = starttls.Protocol(p.rules.StartTLS)
	p.first = readingPrelude
	p.eager = p.prelude.Greets()
	p.host = greetingName(gen.config.Map, p.rules)
}

// greetingName is what we call ourselves to clients of a port, and to its backends: the first name that it serves, the
// certificate's of its rule without one, or the machine's.
func greetingName(m *natmap.Map, port *natmap.Port) string {
	for _, r := range m.Rules {
		if name := strings.TrimPrefix(r.Name, "*."); name != "" && port.Lookup(r.Name) == r {
			return name
		}
	}
	if r := port.Lookup(""); r != nil && r.Options.Cert != "" {
		return strings.TrimPrefix(r.Options.Cert, "*.")
	}
	return machineName()
}

var machineName = sync.OnceValue(func() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "localhost"
	}
	return name
})

// readPrelude answers the client until it asks for TLS. What comes behind that is its ClientHello, or the end.
func (c *conn) readPrelude() stage {
	if c.prelude.Protocol == starttls.Off {
		return c.beginPrelude()
	}
	for {
		b, ended, errno := c.gather(preludeLimit)
		if len(b) > 0 {
			out, used, step, err := c.prelude.Next(c.loop.scratch[preludeLimit:preludeLimit], b, c.port.host)
			if next := c.answer(out, step, err); next != readingPrelude || step != starttls.More {
				return c.preludeOver(b, used, step, next)
			}
			c.keepBehind(b, used)
		}
		switch {
		case ended:
			return c.endedEarly(errno)
		case !c.client.readable:
			return readingPrelude
		}
	}
}

func (c *conn) beginPrelude() stage {
	c.prelude = starttls.NewServer(c.port.prelude)
	if c.port.prelude == starttls.MySQL {
		return c.beginMySQL()
	}
	if greeting := c.prelude.Greeting(nil, c.port.host); len(greeting) > 0 && !c.tellClient(greeting) {
		return c.finish(c.lost(&c.client), "")
	}
	return c.readPrelude()
}

// beginMySQL takes the port's only rule, whose gate comes before its backend hears of the client.
func (c *conn) beginMySQL() stage {
	c.enter(c.port.lookup(""))
	if c.route.gate != nil {
		if why := c.passGate(); why != notRefused {
			return c.shut(why)
		}
	}
	if c.route.rule.Action == natmap.Reject {
		return c.refuse(Denied, alertNone, "a rule says reject")
	}
	return c.startConnect()
}

// tellClient writes some words in the clear. They are few, and a fresh socket has room for them: one that does not is a
// client's that reads nothing.
func (c *conn) tellClient(b []byte) bool { return wholly(&c.client, b) }

func wholly(s *socket, b []byte) bool {
	n, e := sysWrite(s.fd, b)
	return writingHalf{s}.wrote(n, len(b), e) == len(b)
}

// unheard says why a backend has not taken what it was told.
func (c *conn) unheard() string {
	if e := c.backend.failed; e != 0 {
		return e.Error()
	}
	return "it reads nothing"
}

// answer says what the protocol has to say, and where that leads; readingPrelude is on.
func (c *conn) answer(out []byte, step starttls.Step, err error) stage {
	switch {
	case err != nil:
		c.tell(BadHello, c.prelude.Protocol.String()+": "+err.Error())
	case step == starttls.Bye:
		c.report.probe = true // it looked, and has left: monitoring does
		c.tell(OK, "")
	case len(out) > 0 && !c.tellClient(out):
		return c.finish(c.lost(&c.client), "")
	default:
		return readingPrelude
	}
	if len(out) > 0 {
		return c.answerAndLinger(out)
	}
	return c.startLinger()
}

// preludeOver goes on behind the prelude: with the ClientHello, or to the end that was answered.
func (c *conn) preludeOver(b []byte, used int, step starttls.Step, next stage) stage {
	if next != readingPrelude {
		return next
	}
	if c.prelude.Protocol == starttls.MySQL {
		c.dial.talk.request = bytes.Clone(b[:used])
	}
	c.keepBehind(b, used)
	if step == starttls.Cancel {
		return c.passCancel()
	}
	return readingHello
}

// keepBehind keeps what is not used up of b, which gather returned.
func (c *conn) keepBehind(b []byte, used int) {
	switch {
	case len(c.pending) == 0:
		c.keep(b[used:])
	case used == len(b):
		c.pending = nil
	default:
		c.pending = c.pending[:copy(c.pending, b[used:])]
	}
}

// passCancel takes a CancelRequest of PostgreSQL to the backend: clients send it on a connection of its own, those before
// PostgreSQL 17 always in the clear, so that no name says for which server it is. The packet goes on, over TLS to a backend
// that is spoken to in TLS, and nothing else does: neither what the client says behind it nor what the backend says.
func (c *conn) passCancel() stage {
	size := binary.BigEndian.Uint32(c.pending) // at most what is there (package starttls)
	c.pending = c.pending[:size:size]
	r := c.port.lookup("")
	if r == nil || r.rule.Action != natmap.Forward {
		c.tell(UnknownName, "a CancelRequest in the clear has no name, and no rule for this port is without one")
		return c.startLinger()
	}
	c.enter(r)
	if r.gate != nil {
		if why := c.passGate(); why != notRefused {
			return c.shut(why)
		}
	}
	c.cancels = true
	return c.startConnect()
}

// startCancel sends the packet, which the flow to the backend has, and waits for the end.
func (c *conn) startCancel() stage {
	c.dial = nil
	c.to(cancelling)
	c.setDeadline(int64(c.loop.gw.settings.HelloTimeout)) // a server ends the connection at once
	return c.awaitCancel()
}

// awaitCancel forgets what either side says. It is the backend that ends the connection. The end of the client's stream is
// passed on, and no other: PgBouncer drops a request whose client has left.
func (c *conn) awaitCancel() stage {
	if c.up.stuck() && !c.upward().flush() && c.backend.failed == 0 {
		return cancelling
	}
	if !c.skim(&c.backend) {
		return c.cancelOver(BackendReset, c.backend.failed)
	}
	before := c.skimmed
	here := c.skim(&c.client)
	switch {
	case c.client.failed != 0:
		return c.cancelOver(ClientReset, c.client.failed)
	case c.skimmed > lastWordsBytes:
		return c.cancelOver(BadHello, unix.EMSGSIZE)
	case c.skimmed > before:
		c.tell(OK, "what the client said behind a CancelRequest was not passed on")
	}
	if !here && !c.up.closed {
		c.up.closed = true
		if s := c.backend.tls; s != nil {
			wholly(&c.backend, s.writer.AppendAlert(nil, record.AlertCloseNotify))
		}
		sysShutdown(c.backend.fd, unix.SHUT_WR)
	}
	return cancelling
}

func (c *conn) cancelOver(o Outcome, failed unix.Errno) stage {
	if failed == 0 {
		return c.finish(OK, "")
	}
	abort(&c.client)
	abort(&c.backend)
	return c.finish(o, "a CancelRequest: "+failed.Error())
}

// talk is what is said with the backend before bytes can be carried.
type talk struct {
	client   starttls.Client
	heard    []byte // and not used up
	greeting []byte // what the backend begins with
	greets   bool   // and has not come to the end of
	request  []byte // MySQL: the client's for TLS
	bridge   starttls.MySQLBridge
	passed   bool // MySQL: the client has the greeting, so that no other backend can take over
}

// passed says whether the client has had the backend's greeting.
func (d *dialling) passed() bool { return d.talk != nil && d.talk.passed }

func newTalk(b speech) *talk {
	return &talk{client: starttls.NewClient(b.speaks, b.asks), greets: b.speaks.Greets()}
}

// startAsking begins to talk with the backend that has just been reached, behind the PROXY header.
func (c *conn) startAsking() stage {
	d := c.dial
	c.to(asking)
	d.talk, d.introduced = newTalk(d.backend.speech), true
	c.setDeadline(d.share(c))
	header, err := c.preface()
	if err != nil {
		return c.unannounced(err)
	}
	out, err := header.after(d.early)
	if err != nil {
		return c.unannounced(err)
	}
	out, d.early = d.talk.client.Start(out), 0
	switch {
	case len(out) == 0:
		ackNow(c.backend.fd)
	case !wholly(&c.backend, out):
		return c.nextBackend(c.unheard())
	}
	return c.ask()
}

// ask reads what the backend says until TLS may begin, or until it has greeted. The client may leave meanwhile.
func (c *conn) ask() stage {
	if c.client.failed != 0 {
		return c.finish(ClientReset, "reset while a backend was sought")
	}
	s := &c.backend
	for s.readable {
		n, e := sysRead(s.fd, c.loop.scratch[:preludeLimit])
		switch {
		case e != 0 && streamCalls.mean(e) == meansWait:
			s.readable = false
			return asking
		case e != 0:
			return c.nextBackend(e.Error())
		case n == 0:
			return c.nextBackend(c.dial.backend.speaks.String() + ": it left before it was done")
		}
		s.readable = n == preludeLimit || s.hup || s.exact
		if next := c.understand(c.loop.scratch[:n]); next != asking {
			return next
		}
	}
	return asking
}

// understand takes what the backend says, and says what follows from it; asking is on.
func (c *conn) understand(b []byte) stage {
	d := c.dial
	t := d.talk
	for t.heard = append(t.heard, b...); ; {
		out, step, err := t.next(c.port.host)
		switch {
		case err == nil && step == starttls.TLS && len(t.heard) > 0:
			err = starttls.ErrBehind
		case err == nil && step == starttls.Greeted && c.port.prelude == starttls.MySQL:
			return c.passGreeting()
		}
		switch {
		case err != nil:
			return c.nextBackend(d.backend.speaks.String() + ": " + err.Error())
		case len(out) > 0 && !wholly(&c.backend, out):
			return c.nextBackend(c.unheard())
		case step == starttls.TLS, step == starttls.Greeted && !d.backend.asks:
			return c.reached()
		case step == starttls.More:
			return asking
		}
	}
}

// next is starttls.Client.Next for what was heard. It keeps the greeting.
func (t *talk) next(host string) (out []byte, step starttls.Step, err error) {
	out, used, step, err := t.client.Next(nil, t.heard, host)
	if t.greets {
		t.greeting = append(t.greeting, t.heard[:used]...)
		t.greets = step != starttls.Greeted
	}
	t.heard = t.heard[used:]
	return out, step, err
}

// passGreeting hands MySQL's greeting on to the client, with the offer of TLS in it, and goes on with what it answers.
func (c *conn) passGreeting() stage {
	t := c.dial.talk
	if len(t.heard) > 0 {
		return c.nextBackend("mysql: it says more than a greeting")
	}
	t.passed = true
	c.reports(c.dial.name())
	if !c.tellClient(starttls.MySQLGreeting(t.greeting)) {
		return c.finish(c.lost(&c.client), "")
	}
	c.setDeadline(int64(c.loop.gw.settings.HelloTimeout))
	return readingPrelude
}

// resume goes on with the backend whose greeting the client has had, now that the client speaks TLS.
func (c *conn) resume() stage {
	d := c.dial
	d.until, d.round = c.loop.now+int64(c.route.connect), 0 // what fails now is told
	if d.backend.asks && !wholly(&c.backend, d.talk.request) {
		return c.nextBackend(c.unheard())
	}
	return c.reached()
}

// relayed is where the connection goes when both sides are there: to the relay, or first to where one side is translated
// for the other.
func (c *conn) relayed() stage {
	d := c.dial
	t := d.talk
	switch {
	case t == nil && d.backend.inside:
		d.talk = newTalk(d.backend.speech)
		return translating
	case t == nil:
		c.dial = nil // the search is over
		return relaying
	case t.passed && !d.backend.asks:
		return translating
	case c.port.prelude == starttls.Off: // the client has had no greeting yet
		c.downward().sendPlain(t.greeting)
	}
	c.downward().sendPlain(t.heard)
	c.dial = nil
	return relaying
}

// understood ends the translation: nothing stands between the two sides any more.
func (c *conn) understood() {
	c.dial = nil
	c.to(relaying)
}

// translateBytes is what one read brings while one side is translated for the other: these are logins and greetings.
const translateBytes = 16 << 10

// translate is move for as long as the two sides don't speak the same: the backend's greeting is taken off what comes
// through TLS, or MySQL's packets are numbered anew.
func (t transfer) translate() int {
	if t.from.tls != nil {
		return t.open() // sendVectors brings what was opened back to translated
	}
	n, e := sysRead(t.from.fd, t.c.loop.scratch[:translateBytes])
	if n = t.got(n, translateBytes, e); n > 0 {
		t.carried(n)
		t.translated(t.c.loop.scratch[:n])
	}
	return n
}

// translated sends on what becomes of b, and ends the translation once there is no more need for it.
func (t transfer) translated(b []byte) {
	if t.c.dial == nil { // it has ended in this very turn
		t.sendPlain(b)
		return
	}
	talk := t.c.dial.talk
	var err error
	switch {
	case t.c.dial.backend.inside && !t.isUp():
		b, err = t.c.takeGreeting(b)
	case t.c.dial.backend.inside:
	case t.isUp():
		b, err = talk.bridge.Up(nil, b)
	default:
		b = talk.bridge.Down(nil, b)
	}
	if err != nil {
		t.c.tell(BadHello, "mysql: "+err.Error()) // a greeting's error is told already
		return
	}
	t.sendPlain(b)
	if talk.bridge.Over() {
		t.c.upward().sendPlain(talk.bridge.Rest(nil))
		t.c.understood()
	}
}

// takeGreeting takes the greeting off what the backend says through TLS, and returns what is behind it.
func (c *conn) takeGreeting(b []byte) (rest []byte, err error) {
	t := c.dial.talk
	t.heard = append(t.heard, b...)
	_, step, err := t.next(c.port.host)
	switch {
	case err != nil:
		c.tell(ConnectFailed, c.dial.name()+": "+c.dial.backend.speaks.String()+": "+err.Error())
		c.report.alertSent = int16(alertInternalError)
		c.downward().say(record.AlertInternalError)
	case step == starttls.Greeted:
		rest = t.heard
		c.understood()
	}
	return rest, err
}

// sendPlain is send for bytes that are not sealed yet.
func (t transfer) sendPlain(b []byte) {
	if t.to.tls != nil {
		b = t.to.tls.sealed(b)
	}
	t.send(b)
}
