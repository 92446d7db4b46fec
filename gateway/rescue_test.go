// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// faults are ways to a connection from outside its story, each with something that is missing there.
var faults = []struct {
	name  string
	plant func(s *still, c *conn) (meet func())
}{
	{"an event", func(s *still, c *conn) func() {
		c.stage, c.route = relaying, nil
		return func() { c.ready(&c.client, unix.EPOLLIN) }
	}},
	{"a deadline", func(s *still, c *conn) func() {
		c.stage, c.route = relaying, nil
		return func() { s.wheel.set(c, s.now); s.fireAll(s.now + 2<<tickShift) }
	}},
	{"a turn", func(s *still, c *conn) func() {
		c.stage, c.route = relaying, nil
		c.client.readable = true
		return func() { s.putOff(c); s.serveLater() }
	}},
	{"its bandwidth", func(s *still, c *conn) func() {
		c.stage, c.route = relaying, nil
		c.client.readable = true
		return func() { s.pacer.add(paused{c, &c.up}, s.now); s.pacer.fire(s.now + 2<<paceShift) }
	}},
	{"the end of its gateway", func(s *still, c *conn) func() {
		c.stage = encrypting // without a handshake
		return func() { c.cut(Drained, "the gateway stops") }
	}},
	{"its turn to shake hands", func(s *still, c *conn) func() {
		c.stage, c.terms = waitingTurn, nil
		s.queue.Push(c)
		return s.startHandshakes
	}},
	{"its turn to shake hands with a backend", func(s *still, c *conn) func() {
		c.stage, c.dial = waitingEncryption, &dialling{rival: socket{fd: -1}} // to no backend
		s.encryptQueue.Push(c)
		return s.startHandshakes
	}},
	{"the end of a handshake", func(s *still, c *conn) func() {
		s.queue.Push(c)
		s.queue.Take()
		h := &handshaker{conn: c, places: 1} // of no profile
		c.stage, c.hs = shakingHands, h
		s.begun = append(s.begun, c)
		return func() { s.post(h.done); s.runPosted() }
	}},
	{"the end of a handshake with a backend", func(s *still, c *conn) func() {
		c.dial = &dialling{rival: socket{fd: -1}}
		s.encryptQueue.Push(c)
		s.encryptQueue.Take()
		c.stage, c.route = encrypting, nil
		return func() { s.post((&encrypter{conn: c}).done); s.runPosted() }
	}},
	{"room at a backend", func(s *still, c *conn) func() {
		r := *c.route.rule
		c.route = &route{rule: &r, use: new(usage)} // has no list of servers
		c.dial = &dialling{rival: socket{fd: -1}}
		c.stage = waitingForRoom
		c.route.waiting.Add(1)
		s.queueUp(c, false)
		return s.runPosted
	}},
	{"a question of the admin's", func(s *still, c *conn) func() {
		see := func(x *conn) {
			if x == c {
				panic("planted")
			}
		}
		return func() {
			s.post((&survey{loop: s.loop, ctx: context.Background(), see: see, done: func() {}}).begin)
			s.runPosted()
		}
	}},
	{"its end", func(s *still, c *conn) func() {
		c.dial = &dialling{rival: socket{fd: 1 << 20}} // of no server
		return func() { c.stage, c.end = relaying, 1; c.cut(Lifetime, "") }
	}},
}

// TestFaultEndsItsConnection and no other, whichever way it is met: the loop goes on, every count is back, and the
// connection has its outcome.
func TestFaultEndsItsConnection(t *testing.T) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
			other, peer := s.accept(t)
			defer unix.Close(peer)
			c, client := s.accept(t)
			defer unix.Close(client)
			for _, x := range []*conn{other, c} {
				x.enter(s.listener.rules.plain)
				x.gen.open.Add(1)
				x.counted = true
				s.open.Add(1)
			}
			f.plant(s, c)()
			s.runPosted() // nobody comes back to it
			s.serveLater()
			s.fireAll(s.loop.now + 1<<40)
			if c.stage != over || c.client.fd >= 0 || c.backend.fd >= 0 {
				t.Errorf("it is at %s", c.stage)
			}
			if n := s.counters.outcomes[Internal].Load(); n != 1 {
				t.Errorf("%d connections ended with a fault of ours", n)
			}
			if _, there := s.conns[other]; !there || len(s.conns) != 1 || s.open.Load() != 1 || c.gen.open.Load() != 1 {
				t.Errorf("%d connections are left, %d and %d are counted", len(s.conns), s.open.Load(), c.gen.open.Load())
			}
			if s.queue.Held.Load() != 0 || s.encryptQueue.Held.Load() != 0 || s.active.Load() != 0 || s.queue.Waiting.Load()+s.encryptQueue.Waiting.Load() != 0 ||
				len(s.queues) != 0 || s.waiting() != 0 {
				t.Errorf("it is still counted: %d, %d, %d", s.queue.Held.Load(), s.encryptQueue.Held.Load(), s.active.Load())
			}
			if n := len(available(client)); n != 0 {
				t.Errorf("the client got %d bytes", n)
			}
			if _, err := unix.Write(client, []byte("x")); err == nil {
				t.Error("its socket is open")
			}
			other.finish(OK, "")
		})
	}
}

// fireAll has everything done that is due by a time.
func (s *still) fireAll(by int64) {
	for c := s.wheel.take(by); c != nil; c = s.wheel.take(by) {
		c.due()
	}
}

func (s *still) waiting() int64 { return int64(s.loop.waiting.Load()) + s.Gateway.waiting.Load() }

// TestFaultOfNewConnectionEndsIt: one that was accepted on a port of which nothing is known.
func TestFaultOfNewConnectionEndsIt(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	ours, theirs := pair(t)
	defer unix.Close(theirs)
	s.listener.rules = nil
	s.begin(s.listener, ours, netip.MustParseAddrPort("192.0.2.7:4711"))
	if n := s.counters.outcomes[Internal].Load(); n != 1 || len(s.conns) != 0 || s.open.Load() != 0 || s.listener.gen.open.Load() != 0 {
		t.Errorf("%d ended so, %d are left, %d and %d are counted", n, len(s.conns), s.open.Load(), s.listener.gen.open.Load())
	}
}
