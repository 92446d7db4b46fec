// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/pool"
	"github.com/tlsnat/tlsnat/natmap"
)

// server is an address that backends of the map lead to, and how it fares. There is one for each address, however many
// rules name it, and it stays over reloads. Loops read its state and count on it; everything else about it is the
// keeper's.
type server struct {
	name string // "10.0.0.12:8080", "unix:/run/app.sock": in the log, for the admin, and for an operator to type
	addr netip.AddrPort
	unix string // path of a socket; addr is then not valid
	seed uint64 // hash of the name, for balance=source-hash

	state atomic.Uint32 // 0: fit, like nearly all of them nearly always
	since atomic.Int64  // when it became fit again, in loop nanoseconds
	why   atomic.Pointer[string]

	_ [64]byte // what follows is written with every connection, what stands above is read: not in one cache line

	open   atomic.Int64 // connections, those that are being made included
	total  atomic.Uint64
	broken atomic.Uint64 // connects that failed
	inRow  atomic.Int32  // of them, since one that did not
	doubt  atomic.Bool   // the keeper finds out whether it is the server or its clients' addresses

	_ [64]byte

	// The keeper's, under its lock.
	changed  time.Time // of state
	checks   []*check
	probe    *pool.Task // tries to connect to it while it is ejected
	pause    time.Duration
	returned time.Time // when it was connected to again after an ejection
	rests    bool      // a task will end its slow start

	asked uint64 // for, when forget came so often; under the lock of what is known
}

// What can be wrong with a server. It gets no new connection while one of the first four is set.
const (
	isDown       uint32 = 1 << iota // checks say so
	isEjected                       // it could not be connected to, several times in a row
	isDraining                      // an operator says so
	isMaintained                    // the same, and checks leave it alone
	isWarming                       // it is back, and rules with slow-start= give it its full share later

	blocked = isDown | isEjected | isDraining | isMaintained
)

func newServer(addr netip.AddrPort, unix string) *server {
	s := &server{addr: addr, unix: unix, changed: time.Now()}
	s.name = addr.String()
	if unix != "" {
		s.name = (&natmap.Backend{Unix: unix}).String()
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(s.name))
	s.seed = mix(h.Sum64())
	return s
}

// machine is the server's address without its port, or its name if it has none.
func (s *server) machine() string {
	if s.addr.IsValid() {
		return s.addr.Addr().String()
	}
	return s.name
}

// usable says whether new connections may go there.
func (s *server) usable() bool { return s.state.Load()&blocked == 0 }

// warmth is the part of its share that a server gets: all of it, but for the time after it came back. It begins with a
// twentieth, so that it gets anything at all.
func (s *server) warmth(slowStart time.Duration, now int64) float64 {
	if s.state.Load()&isWarming == 0 || slowStart <= 0 {
		return 1
	}
	return min(max(float64(now-s.since.Load())/float64(slowStart), 0.05), 1)
}

// reserve counts one more connection, unless there are limit (0: none) already.
func (s *server) reserve(limit int64) bool {
	if limit == 0 {
		s.open.Add(1)
		return true
	}
	for {
		n := s.open.Load()
		if n >= limit {
			return false
		}
		if s.open.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// works ends a row of failures. That a connect succeeded is not enough for a server that has to speak first: the kernel takes
// connections for a process that hangs.
func (s *server) works() {
	if s != nil && s.inRow.Load() != 0 {
		s.inRow.Store(0)
	}
}

// refused notes one that failed. It says whether that was one too many: then the server is out already, and who asked
// tells the keeper.
func (s *server) refused(eject int32) bool {
	s.broken.Add(1)
	if s.inRow.Add(1) < eject || eject == 0 {
		return false
	}
	return s.state.Or(isEjected)&isEjected == 0
}

// suspected is refused for a rule with source=transparent. There a connect may fail because of the client: the answer to
// one on the server's own network goes to it directly, and never comes back here. So the server is not out yet; that is
// for suspect to find out.
func (s *server) suspected(eject int32) bool {
	s.broken.Add(1)
	return s.inRow.Add(1) >= eject && eject != 0 && s.usable() && !s.doubt.Swap(true)
}

// reason is what is wrong with it, in words.
func (s *server) reason() string {
	if why := s.why.Load(); why != nil {
		return *why
	}
	return ""
}

// word is the state in one word.
func (s *server) word() string { return stateWord(s.state.Load()) }

// StateWords are the states that a backend can be in, the first one is the good one. The list is closed.
var StateWords = []string{"up", "down", "ejected", "draining", "maintenance"}

func stateWord(state uint32) string {
	switch {
	case state&isMaintained != 0:
		return StateWords[4]
	case state&isDraining != 0:
		return StateWords[3]
	case state&isDown != 0:
		return StateWords[1]
	case state&isEjected != 0:
		return StateWords[2]
	}
	return StateWords[0]
}

// keeper looks after the servers: it knows them by address, has them checked, lets them back in, and heeds what an
// operator says about them. Nothing of it runs on a loop.
type keeper struct {
	gw    *Gateway
	tasks *pool.Tasks

	known   sync.Mutex // over these, and never held for long: a loop may take it
	servers map[serverKey]*server
	names   map[string]*name
	marks   map[string]uint32 // what an operator has said, by what he called it
	forgot  uint64            // how often forget came by

	mu      sync.Mutex // over the rest, and what servers have under it
	checks  map[checkKey]*check
	slowest time.Duration // the longest slow-start= of the rules
	crowded bool          // there were more checks than maxChecks
}

// serverKey tells servers apart: by their address, or by the path of a socket.
type serverKey struct {
	addr netip.AddrPort
	unix string
}

func newKeeper(g *Gateway) *keeper {
	return &keeper{gw: g, tasks: pool.NewTasks(), servers: map[serverKey]*server{}, names: map[string]*name{},
		marks: map[string]uint32{}, checks: map[checkKey]*check{}}
}

// server is the one for an address or a path; it is made if there is none.
func (k *keeper) server(addr netip.AddrPort, unix string) *server {
	key := serverKey{addr, unix}
	k.known.Lock()
	defer k.known.Unlock()
	s := k.servers[key]
	if s == nil {
		s = newServer(addr, unix)
		k.servers[key] = s
		if mark := k.marked(s); mark != 0 {
			s.state.Or(mark)
			s.why.Store(&asTold)
		}
	}
	s.asked = k.forgot
	return s
}

// marked is what an operator has said about a server: about its very name, or else about its host. The lock of what is
// known is held.
func (k *keeper) marked(s *server) uint32 {
	if mark, ok := k.marks[s.name]; ok {
		return mark
	}
	if !s.addr.IsValid() || len(k.marks) == 0 {
		return 0
	}
	return k.marks[s.addr.Addr().String()]
}

// asTold is why a server is in the state that an operator has put it in.
var asTold = "an operator has said so"

// isCalled says whether an operator may mean this server by a word: its name, or the path of its socket.
func (s *server) isCalled(word string) bool {
	return s.name == word || s.unix != "" && s.unix == strings.TrimPrefix(word, "unix:")
}

// change sets the bits of a server's state that are in mask, and does what comes with it. The keeper's lock is held.
func (k *keeper) change(s *server, mask, bits uint32, why string) {
	before := s.state.Load()
	for !s.state.CompareAndSwap(before, before&^mask|bits) {
		before = s.state.Load()
	}
	after := before&^mask | bits
	if before&blocked == after&blocked {
		return
	}
	k.changed(s, before, after, why)
}

// changed is told of every change of what keeps a server from being used. Its reason is that of the state that it is called
// by, which need not be the one that has changed.
func (k *keeper) changed(s *server, before, after uint32, why string) {
	s.changed = time.Now()
	switch {
	case after&(isDraining|isMaintained) != 0:
		why = asTold
	case after&isDown != 0:
		why = s.failing(why)
	}
	s.why.Store(&why)
	fields := []zap.Field{zap.String("backend", s.name), zap.String("state", stateWord(after)), zap.String("reason", why),
		zap.Int64("connections", s.open.Load())}
	if after&blocked == 0 {
		k.gw.log.Info("backend is up", fields...)
		k.warm(s)
	} else {
		k.gw.log.Warn("backend gets no new connections", fields...)
		k.gw.callWaiting() // if it was the last one, nobody who waits for room has to wait any longer
	}
	if worse := after &^ before; worse&(isDown|isMaintained) != 0 {
		k.gw.cutConnections(s, "its backend "+s.name+" is "+stateWord(after)+": "+why)
	}
}

// failing is what a check of the server says that fails, or otherwise. The keeper's lock is held.
func (s *server) failing(otherwise string) string {
	for _, c := range s.checks {
		if !c.up {
			return fmt.Sprintf("check=%s: %v", c.how, c.err)
		}
	}
	return otherwise
}

// warm lets a server that is back begin slowly, and lets in those who wait for one.
func (k *keeper) warm(s *server) {
	s.inRow.Store(0)
	s.since.Store(int64(time.Since(k.gw.started)))
	if k.slowest > 0 {
		s.state.Or(isWarming)
		if !s.rests {
			s.rests = true
			k.tasks.Start(k.slowest, func(*pool.Task) time.Duration { return k.warmed(s) })
		}
	}
	k.gw.callWaiting()
}

// warmed ends a slow start, or says how long it goes on: the server may have been away again, and slow-start= be another
// one since a reload.
func (k *keeper) warmed(s *server) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if left := k.slowest - (time.Since(k.gw.started) - time.Duration(s.since.Load())); left > 0 {
		return left
	}
	s.state.And(^isWarming)
	s.rests = false
	return pool.Never
}

const (
	// A server that was ejected is tried again so soon: a restart takes a fraction of a second,
	minPause = 250 * time.Millisecond
	// twice as late each time, but at most so late: a SYN now and then costs nothing, and clients are turned away
	// meanwhile.
	maxPause = 4 * time.Second
	// One that is ejected again before it was good for so long goes on where its pauses were.
	relapse = 30 * time.Second
	// A try to find out whether it is back takes at most so long.
	probeTime = 3 * time.Second
)

// ejected takes note of a server that a loop has put out, and has it tried until it can be used again.
func (k *keeper) ejected(s *server, trial func(context.Context) error, why string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	state := s.state.Load()
	if state&isEjected == 0 {
		return // an operator was quicker
	}
	k.changed(s, state&^isEjected, state, why)
	if time.Since(s.returned) > relapse {
		s.pause = 0
	}
	s.probe.Stop()
	s.probe = k.tasks.StartFor(pool.ProbeTask, s.machine(), k.pause(s), func(e *pool.Task) time.Duration {
		return k.probed(e, s, trial(e.Context()))
	})
}

// suspect puts a server out to which connects from clients' addresses fail, if one from our own fails as well.
func (k *keeper) suspect(s *server, trial func(context.Context) error, why string) {
	k.tasks.Start(0, func(e *pool.Task) time.Duration {
		err := trial(e.Context())
		defer s.doubt.Store(false)
		switch {
		case e.Stopped():
		case ownLack(err):
			k.gw.short(lackInCheck, err, s.name)
		case err == nil, errors.Is(err, unix.EAGAIN) && s.unix != "":
			s.inRow.Store(0)
		case s.state.Or(isEjected)&isEjected == 0:
			k.ejected(s, trial, "connects fail, from clients' addresses ("+why+") and from our own: "+err.Error())
		}
		return pool.Never
	})
}

func (k *keeper) pause(s *server) time.Duration {
	s.pause = min(max(2*s.pause, minPause), maxPause)
	return pool.Jittered(s.pause)
}

// probed is what came of a try. It says when the next one is.
func (k *keeper) probed(e *pool.Task, s *server, err error) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case e.Stopped():
		return pool.Never
	case ownLack(err):
		k.gw.short(lackInCheck, err, s.name)
		return pool.Jittered(lackPause)
	case errors.Is(err, unix.EAGAIN) && s.unix != "": // it listens, and has a lot to do
	case err != nil:
		return k.pause(s)
	}
	s.returned = time.Now()
	k.change(s, isEjected, 0, "it can be connected to again")
	return pool.Never
}

// cutConnections ends the connections to a server, of rules that say on-down=cut. Those that are about to have one look
// for another. Who comes from here on has not chosen it, unless it is back already.
func (g *Gateway) cutConnections(s *server, why string) {
	if !g.cuts() {
		return
	}
	now := int64(time.Since(g.started))
	g.eachConn(func(c *conn) {
		switch {
		case c.report.accepted > now:
		case c.server == s && c.route.onDown == natmap.Cut:
			c.loseServer(why)
		case c.dial != nil && c.dial.rivalServer == s && c.route.onDown == natmap.Cut:
			c.dropRival()
		}
	})
}

// loseServer is for a connection whose server must not be used any more, however far it has come with it: MySQL's clients
// have one before they have said anything.
func (c *conn) loseServer(why string) {
	switch {
	case c.stage == encrypting && !c.dial.passed():
		c.giveUpEncryption(why)
	case c.stage == waitingEncryption && !c.dial.passed():
		c.loop.encryptQueue.Remove(c)
		fallthrough
	case c.stage == connecting, c.stage == asking:
		c.goOn(c.nextBackend(why))
	case c.stage < lingering:
		c.cut(BackendReset, why)
	}
}

// cuts says whether there is a rule that says on-down=cut.
func (g *Gateway) cuts() bool {
	gen := g.current.Load()
	return gen != nil && gen.cuts
}

// adopt makes a generation the one whose servers are looked after.
func (k *keeper) adopt(gen *generation) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.slowest = 0
	for _, r := range gen.routes {
		k.slowest = max(k.slowest, r.slowStart)
	}
	k.follow(gen)
	k.check(gen)
	k.forget(gen)
}

// forget drops names that the generation does not have, and servers to which it leads nobody any more, once no connection
// is left. Those that a loop asks for meanwhile, on ports of a range, stay.
func (k *keeper) forget(gen *generation) {
	k.known.Lock()
	k.forgot++
	k.known.Unlock()
	leads := map[*server]bool{}
	for _, r := range gen.routes {
		r.eachServer(func(_ *backend, s *server) { leads[s] = true })
	}
	k.known.Lock()
	defer k.known.Unlock()
	for key, s := range k.servers {
		if !leads[s] && s.asked < k.forgot && s.open.Load() == 0 {
			s.probe.Stop()
			delete(k.servers, key)
		}
	}
	for key, n := range k.names {
		if gen.names[n] == nil {
			n.task.Stop()
			delete(k.names, key)
		}
	}
}

// close ends everything that the keeper has going.
func (k *keeper) close() { k.tasks.Close() }
