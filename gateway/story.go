// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
	"github.com/tlsnat/tlsnat/sni"
)

// story is a connection's life in the order it happens, a verb for each stage. A verb does what it can without
// waiting and says which stage comes next; its own stage again means "not yet: call me when there is news".
//
//	accept                      listener.go
//	→ the gate                  entrance.go    what an address may, as far as no name is needed to tell
//	→ the PROXY header          proxy.go       where the peer is a load balancer that we trust: then the gate is behind it
//	→ [starttls=: the prelude]  starttls.go    in the clear, until the client asks for TLS
//	→ the ClientHello           hello.go       gathered on the loop: no goroutine yet
//	→ the rule                  hello.go
//	→ the gate of the rule      entrance.go
//	→ [terminate: handshake]    handshake.go   a goroutine of crypto/tls, bounded in number; then the keys are ours
//	→ the backend               dial.go        chosen (balance.go), waited for (waiting.go); the next one if one does not answer
//	→ [tls://: handshake]       encrypt.go     the same as with the client, the other way round
//	→ the PROXY header to it    proxy.go
//	→ [its own prelude]         starttls.go    until TLS may begin, or it has greeted
//	→ relay, half-close         relay.go
//	→ one outcome, one line     report.go
//
// A connection comes into its story through one of these doors, each of which defers rescue: begin (it was accepted), ready
// (its socket has news), due (its deadline has come), giveTurn and startEncryption (it may shake hands), shook and encrypted
// (it has), searchAgain (a backend may have room), look (a survey asks about all connections), and cut (somebody ends it).
// The story sets the stage (to). What waits outside of it goes on by goOn.
func (c *conn) story() stage {
	switch c.stage {
	case readingProxy:
		return c.readProxyHeader()
	case readingPrelude:
		return c.readPrelude()
	case readingHello:
		return c.readHello()
	case matching:
		return c.match()
	case waitingTurn: // the queue moves it on: startHandshakes
		return c.awaitTurn()
	case shakingHands: // the handshake moves it on: handshaker.done
		return c.nudgeHandshake()
	case connecting:
		return c.connect()
	case waitingForRoom:
		return c.awaitRoom()
	case asking:
		return c.ask()
	case waitingEncryption: // the queue moves it on: startHandshakes
		return c.awaitEncryption()
	case encrypting: // the handshake moves it on: encrypter.done
		return c.nudgeEncryption()
	case greeting:
		return c.greet()
	case translating, relaying:
		return c.relay()
	case cancelling:
		return c.awaitCancel()
	case readingRequest:
		return c.readRequest()
	case lingering:
		return c.linger()
	case resetting:
		return c.resetWhenDelivered()
	}
	return over
}

// to sets the stage. It is the one place that does.
func (c *conn) to(next stage) { c.stage = next }

// goOn moves the connection on from outside its story: to the stage that follows what it waited for.
func (c *conn) goOn(next stage) {
	c.to(next)
	c.advance()
}

// advance goes on with the story until it has to wait.
func (c *conn) advance() {
	defer c.rescue()
	for {
		next := c.story()
		if next == c.stage {
			return
		}
		c.to(next)
	}
}

// rescue ends the connection, and no other, whose story met a fault of ours. It is the one place that recovers on a loop:
// whoever moves a connection on, from wherever, defers it.
func (c *conn) rescue() {
	if p := recover(); p != nil {
		defer c.abandon()
		c.crashed(p)
	}
}

func (c *conn) crashed(p any) {
	c.loop.gw.log.Error("a fault of tlsnat's; please report it", zap.Any("panic", p), zap.Stack("stack"),
		zap.String("id", c.report.idText()), zap.String("stage", c.stage.String()))
	if c.stage == over {
		delete(c.loop.conns, c)
		return
	}
	why := fmt.Sprint("panic: ", p)
	c.report.told = false
	c.tell(Internal, why)
	abort(&c.client)
	abort(&c.backend)
	switch { // the goroutine of a handshake holds the descriptor
	case c.hs != nil:
		c.giveUpHandshake(why)
	case c.dial != nil && c.dial.hs != nil:
		c.giveUpEncryption(why)
	default:
		c.loop.queue.Remove(c)
		c.loop.encryptQueue.Remove(c)
		c.finish(Internal, why)
	}
}

// abandon is for a connection that not even crashed could end: its sockets are closed, and nobody comes back to it.
func (c *conn) abandon() {
	if p := recover(); p == nil {
		return
	}
	l := c.loop
	delete(l.conns, c)
	l.wheel.clear(c)
	l.closeSocket(&c.client)
	l.closeSocket(&c.backend)
	if c.stage != over {
		c.to(over)
		l.counters.outcomes[Internal].Add(1)
		if c.gen.open.Add(-1); c.counted {
			l.gw.open.Add(-1)
		}
	}
}

// due is called when the conn's deadline has come.
func (c *conn) due() {
	defer c.rescue()
	l := c.loop
	switch {
	case c.end != 0 && l.now >= c.end && c.stage < lingering && c.retired:
		c.cut(Drained, "its rule is not in the map any more, and drain= is over")
	case c.end != 0 && l.now >= c.end && c.stage < lingering:
		c.cut(Lifetime, "the rule's lifetime= is over")
	case c.busy:
		c.setDeadline(0) // it has something to do, and is waiting for its turn
	case c.spared():
	case c.undecided():
		c.finish(HelloTimeout, fmt.Sprintf("only %d bytes of it came within %sHELLO_TIMEOUT", len(c.pending), config.Prefix))
	case c.stage == waitingTurn:
		l.queue.Remove(c)
		c.finish(Limited, "waited too long for its turn to shake hands")
	case c.stage == shakingHands:
		c.handshakeDue()
	case c.stage == connecting:
		c.goOn(c.connectDue())
	case c.stage == asking:
		c.blame(c.dial.server, "no answer in time")
		c.goOn(c.nextBackend("no answer in time"))
	case c.stage == waitingForRoom:
		c.waitedInVain()
	case c.stage == waitingEncryption:
		l.encryptQueue.Remove(c)
		c.goOn(c.nextBackend("waited too long for its turn to shake hands"))
	case c.stage == encrypting:
		c.encryptionDue()
	case c.stage == greeting, c.stage == translating, c.stage == relaying:
		c.idle()
	case c.stage == cancelling:
		c.cut(Idle, "the backend did not end the connection of a CancelRequest in time")
	case c.stage == resetting:
		c.advance()
	case c.stage == lingering:
		c.finish(OK, "")
	}
}

// idle ends a connection on which nothing has moved for too long, or waits for the rest of that time. On the way there
// it is parked.
func (c *conn) idle() {
	quiet, limit := c.loop.looks.sure-c.active, c.silence()
	switch {
	case c.settling() && quiet < limit:
		c.advance()
	case c.paced():
		c.setDeadline(min(int64(parkAfter), limit))
	case quiet >= limit:
		c.cut(Idle, "nothing moved for "+time.Duration(limit).String())
	case quiet >= int64(parkAfter):
		c.park()
		c.setDeadline(limit - quiet)
	default:
		c.setDeadline(min(int64(parkAfter), limit) - quiet)
	}
}

// silence is how long nothing may move, in nanoseconds: shorter once one side has ended its stream.
func (c *conn) silence() int64 {
	if c.up.ended || c.down.ended {
		return int64(c.route.linger)
	}
	return int64(c.route.idle)
}

// cut ends a living connection from our side. Where it was quiet and everything is delivered both sides see an
// ordinary end; in the middle of things they see a reset, so that half an answer isn't taken for a whole one.
func (c *conn) cut(o Outcome, why string) {
	defer c.rescue()
	if c.stage == shakingHands {
		c.tell(o, why)
		c.giveUpHandshake(why)
		return
	}
	switch c.stage {
	case encrypting:
		c.tell(o, why)
		abort(&c.client)
		c.giveUpEncryption(why)
		return
	case waitingTurn:
		c.loop.queue.Remove(c)
	case waitingEncryption:
		c.loop.encryptQueue.Remove(c)
	}
	quiet := (o == Idle || c.loop.now-c.active > int64(time.Second)) && !c.up.stuck() && !c.down.stuck() &&
		c.upward().held() == 0 && c.downward().held() == 0
	if c.stage == relaying && quiet {
		c.sayGoodbye()
	} else {
		abort(&c.client)
		abort(&c.backend)
	}
	c.finish(o, why)
}

// gather reads what the client has sent and puts it behind c.pending. It says what was read in all, and whether the
// client's stream has ended. Nothing is kept for a client that sends all at once: b is then the loop's memory, and
// the caller keeps what it needs (see keep).
func (c *conn) gather(limit int) (b []byte, ended bool, errno unix.Errno) {
	s := &c.client
	into := c.loop.scratch[:limit]
	if len(c.pending) > 0 {
		into = grown(&c.pending, limit)
	}
	if !s.readable || len(into) == 0 {
		return c.pending, false, 0
	}
	n, e := sysRead(s.fd, into)
	switch {
	case e != 0 && streamCalls.mean(e) == meansWait:
		s.readable = false
		return c.pending, false, 0
	case e != 0:
		s.failed = e
		return c.pending, true, e
	case n == 0: // still readable: whoever comes next has to see the end, too
		return c.pending, true, s.failed
	}
	s.readable, c.report.heard = n == len(into) || s.hup || s.exact, true
	if len(c.pending) > 0 {
		c.pending = c.pending[:len(c.pending)+n]
		return c.pending, false, 0
	}
	return into[:n], false, 0
}

// grown makes room in *p for more, twice as much each time but never for more than limit in all, and returns the room.
// What a length field claims is not believed: memory grows with what has arrived.
func grown(p *[]byte, limit int) []byte {
	b := *p
	if len(b) == cap(b) {
		bigger := make([]byte, len(b), min(max(2*cap(b), 512), max(limit, len(b))))
		copy(bigger, b)
		*p, b = bigger, bigger
	}
	return b[len(b):cap(b)]
}

// keep holds on to b, which gather returned, until more arrives.
func (c *conn) keep(b []byte) {
	if len(c.pending) == 0 && len(b) > 0 {
		c.pending = append(make([]byte, 0, (len(b)+127)&^127), b...)
	}
}

// enter sets what a rule says, once it is known which one it is.
func (c *conn) enter(r *route) {
	c.route, c.report.route = r, r
	r.use.entered.Add(1)
	if r.lifetime > 0 {
		c.end = c.report.accepted + int64(r.lifetime)
	}
	if gen := c.loop.gw.current.Load(); c.gen.number < gen.number {
		c.retireUnder(gen) // a reload was quicker than its hello
	}
}

// act goes the way that the rule names, if its gate lets the client through.
func (c *conn) act() stage {
	if c.route.gate != nil {
		if why := c.passGate(); why != notRefused {
			return c.shut(why)
		}
	}
	return c.serve()
}

// serve goes the way that the rule's action and mode name.
func (c *conn) serve() stage {
	switch rule := c.route.rule; {
	case rule.Action == natmap.Redirect:
		return readingRequest
	case rule.Action == natmap.Reject:
		return c.refuse(Denied, alertAccessDenied, "a rule says reject")
	case rule.Options.Mode == natmap.Terminate:
		return c.queueHandshake()
	}
	return c.startConnect()
}

// malformed is what an error of the hello parser means for the connection.
func (c *conn) malformed(err error) stage {
	alert := uint8(alertDecodeError)
	if e, ok := errors.AsType[*sni.Error](err); ok {
		alert = e.Alert
	}
	return c.refuse(BadHello, alert, err.Error())
}
