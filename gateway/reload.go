// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"fmt"
	"hash/maphash"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
)

// Reloaded is how an attempt to change the configuration ended.
type Reloaded struct {
	At         time.Time `json:"at"`
	OK         bool      `json:"ok"`
	Generation uint64    `json:"generation"` // what new connections get, whether or not it is a new one
	TookMS     int64     `json:"took_ms"`
	Added      []string  `json:"added,omitempty"`    // rules, as the map writes them
	Removed    []string  `json:"removed,omitempty"`  // a changed rule is in both
	Problems   []string  `json:"problems,omitempty"` // errors and warnings
	Unusable   int       `json:"unusable,omitempty"` // of the problems: errors about single files, which do not keep the rest from being served
}

// reloader is what the gateway keeps about its generations.
type reloader struct {
	one  sync.Mutex // one reload at a time
	mu   sync.Mutex // over what follows
	last *Reloaded
	ok   uint64
	bad  uint64
	old  []*generation // not current any more, and with connections when it was looked at last

	seed  maphash.Seed             // of fingerprints
	read  atomic.Uint64            // fingerprint of the files when they were read last, if they are watched
	lists atomic.Pointer[[]string] // files that the map named when it was read last, with a mistake in it or not
}

// Reload reads map, certificates and all other files again, as ReadConfig does, and puts a new generation in the place
// of the current one: at once, or not at all. Connections keep the generation that they began under. Ports that stay
// keep their sockets; new ones are open before anything changes, and those that are gone are closed when Reload returns.
func (g *Gateway) Reload() Reloaded {
	g.reloads.one.Lock()
	defer g.reloads.one.Unlock()
	r := &Reloaded{At: time.Now(), Generation: g.current.Load().number}
	aside(func() { g.reload(r) })
	r.TookMS = time.Since(r.At).Milliseconds()
	g.noteReload(r)
	return *r
}

func (g *Gateway) reload(r *Reloaded) {
	g.noteFiles()
	c, problems := config.Reread(g.settings, g.current.Load().config)
	lists := c.ListFiles()
	g.reloads.lists.Store(&lists)
	for _, p := range problems {
		r.Problems = append(r.Problems, p.String())
	}
	if g.Draining() {
		r.Problems = append(r.Problems, "the gateway drains and takes no new configuration; start it again")
		return
	}
	if c.Refused(problems) {
		return
	}
	r.Unusable = len(c.Unusable)
	if err := g.change(c, r); err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
}

// aside runs f on a thread of its own that yields to everybody else, so that the loops don't wait for it: to the Go
// scheduler a goroutine that computes for long is as good as any other. The thread ends with f.
func aside(f func()) {
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	defer func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) - 1) }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: a thread can't get its old priority back
		const nice = 10
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), nice)
		f()
	}()
	<-done
}

// change makes the configuration the current one, or returns why it can't and leaves everything as it is.
func (g *Gateway) change(c *config.Config, r *Reloaded) error {
	last := g.current.Load()
	gen := g.newGeneration(c, last)
	for _, p := range gen.resolve(context.Background()) {
		r.Problems = append(r.Problems, config.WarningPrefix+p)
	}
	had := g.ports.layout
	o, err := g.openPorts(gen)
	if err != nil {
		return err
	}
	r.Added, r.Removed = difference(last.config.Map, gen.config.Map)
	gen.added, gen.removed = r.Added, r.Removed
	g.maxConns.Store(g.connectionLimit(o.layout))
	g.reloads.retire(last)
	g.current.Store(gen)
	g.keeper.adopt(gen)
	g.swap(gen, o)
	if err := g.steer(o); err != nil { // as unlikely as it gets: it was loaded
		r.Problems = append(r.Problems, "ports that are new in wide ranges are not served: "+err.Error())
	}
	g.retireRules(gen)
	moved := o.moved(had)
	g.close(without(had.sockets(), slices.Concat(o.sockets(), moved)), lastCall)
	g.close(moved, movedCall)
	g.forgetBefore()
	last.left.Store(true)
	r.OK, r.Generation = true, gen.number
	return nil
}

// without returns those of all that are not among others.
func without(all, others []endpoint) (rest []endpoint) {
	there := setOf(others)
	for _, e := range all {
		if !there[e] {
			rest = append(rest, e)
		}
	}
	return rest
}

// openListeners opens a listener on each loop for each endpoint: all of them, or none.
func (g *Gateway) openListeners(gen *generation, all []endpoint) (opened []*listener, err error) {
	if err := g.probe(all); err != nil {
		return nil, err
	}
	for _, e := range all {
		rules := gen.port(e.addr, e.port)
		for _, l := range g.loops {
			ln := &listener{loop: l, addr: e.addr, port: e.port, gen: gen, rules: rules, name: listenName(e.addr, e.port)}
			if err := ln.open(); err != nil {
				for _, ln := range opened {
					_ = unix.Close(int(ln.fd))
				}
				return nil, err
			}
			opened = append(opened, ln)
		}
	}
	return opened, nil
}

// swap has every loop serve the new generation, and adopt its new listeners. A loop does it between two events: a
// connection is accepted under the one generation or the other.
func (g *Gateway) swap(gen *generation, o *opening) {
	rules := make(map[endpoint]*portRules, len(o.plain))
	for _, e := range o.plain {
		rules[e] = gen.port(e.addr, e.port)
	}
	wide := g.wideRules(gen, o)
	g.onLoops(func(l *loop) {
		for _, ln := range l.listeners {
			if r := rules[endpoint{ln.addr, ln.port}]; r != nil {
				ln.serve(gen, r)
			}
		}
		for _, ln := range o.opened {
			if ln.loop == l {
				l.adopt(ln)
			}
		}
		l.serveWide(wide)
	})
	for _, ln := range o.opened {
		ln.drop()
	}
}

// adopt begins to accept on a listener that is open already. A loop that drains does not: the drain began after the reload.
func (l *loop) adopt(ln *listener) {
	if l.stopping {
		_ = unix.Close(int(ln.fd))
		ln.closing = true
		return
	}
	l.listeners = append(l.listeners, ln)
	if err := l.watchListener(ln); err != nil {
		ln.rest(unix.ENOMEM)
	}
}

// drop closes a listener that its loop has not adopted, having ended in a drain.
func (ln *listener) drop() {
	select {
	case <-ln.loop.done:
		if !ln.closing {
			_ = unix.Close(int(ln.fd))
		}
	default:
	}
}

// onLoops runs f on every loop and waits until all have.
func (g *Gateway) onLoops(f func(*loop)) {
	var done sync.WaitGroup
	for _, l := range g.loops {
		ran := make(chan struct{})
		l.post(func() {
			defer close(ran)
			f(l)
		})
		done.Go(func() {
			select {
			case <-ran:
			case <-l.done:
			}
		})
	}
	done.Wait()
}

// close closes the listeners of ports that nobody serves any more, after last calls: whoever believes to be connected
// is served. So long they may take to arrive.
func (g *Gateway) close(gone []endpoint, patience time.Duration) {
	if len(gone) == 0 {
		return
	}
	closing := map[endpoint]bool{}
	for _, e := range gone {
		closing[e] = true
	}
	each := func(do func(*listener)) {
		g.onLoops(func(l *loop) {
			for _, ln := range l.listeners {
				if closing[endpoint{ln.addr, ln.port}] {
					do(ln)
				}
			}
		})
	}
	each((*listener).lastCalls)
	time.Sleep(patience)
	each((*listener).close)
	g.onLoops(func(l *loop) {
		l.listeners = slices.DeleteFunc(l.listeners, func(ln *listener) bool { return ln.closing })
	})
}

// retireRules gives the connections of rules that the generation has not, and that say drain=, so long to end. Those whose
// rule is not known yet heed that when it is (enter).
func (g *Gateway) retireRules(gen *generation) {
	if !gen.drains {
		return
	}
	g.eachConn(func(c *conn) {
		if c.route != nil && c.gen.number < gen.number {
			c.retireUnder(gen)
		}
	})
}

// retireUnder has a connection whose rule says drain= end in time, if the generation does not have its rule.
func (c *conn) retireUnder(gen *generation) {
	if d := c.route.rule.Options.Drain; d > 0 && gen.byKey[keyOf(c.route.rule)] == nil {
		c.retire(int64(d))
	}
}

// retire has a connection whose rule is gone end within d nanoseconds.
func (c *conn) retire(d int64) {
	if end := c.loop.now + d; c.end == 0 || end < c.end {
		c.end, c.retired = end, true
		if c.stage == relaying || c.stage == translating { // the timers of the stages before are shorter, and the next one heeds the end
			c.setDeadline(0)
		}
	}
}

// ruleKey tells rules of two generations that are about the same clients.
type ruleKey struct {
	listen   natmap.Listen
	protocol string
	name     string
}

func keyOf(r *natmap.Rule) ruleKey { return ruleKey{r.Listen, r.Protocol, r.Name} }

// difference is what a reload changed: rules that are only in the new map, and those that are only in the old one.
func difference(old, now *natmap.Map) (added, removed []string) {
	was, is := map[string]int{}, map[string]int{}
	for _, r := range old.Rules {
		was[r.String()]++
	}
	for _, r := range now.Rules {
		is[r.String()]++
	}
	return surplus(now, was), surplus(old, is)
}

// surplus lists the rules of m that are not in others, at most listedRules of them.
func surplus(m *natmap.Map, others map[string]int) (rest []string) {
	more := 0
	for _, r := range m.Rules {
		text := r.String()
		if others[text] > 0 {
			others[text]--
			continue
		}
		if len(rest) == listedRules {
			more++
			continue
		}
		rest = append(rest, text)
	}
	if more > 0 {
		rest = append(rest, fmt.Sprintf("and %d more", more))
	}
	return rest
}

// listedRules are as many as somebody reads.
const listedRules = 100

// noteReload says in the log, in the counters and for the status how it went.
func (g *Gateway) noteReload(r *Reloaded) {
	s := &g.reloads
	s.mu.Lock()
	s.last = r
	if r.OK {
		s.ok++
	} else {
		s.bad++
	}
	s.mu.Unlock()
	LogProblems(g.log, r.Problems)
	fields := []zap.Field{zap.Uint64("generation", r.Generation), zap.Int("rules_added", len(r.Added)),
		zap.Int("rules_removed", len(r.Removed)), zap.Int64("took_ms", r.TookMS)}
	if r.OK {
		g.log.Info("reloaded", fields...)
	} else {
		g.log.Error("not reloaded: the configuration stays as it was", fields[0])
	}
}

// LogProblems writes what was wrong with a configuration: errors first, as errors, then warnings.
func LogProblems(log *zap.Logger, problems []string) {
	const enough = 20 // lines of the log
	warnings := func(p string) int {
		if strings.HasPrefix(p, config.WarningPrefix) {
			return 1
		}
		return 0
	}
	sorted := slices.SortedStableFunc(slices.Values(problems), func(a, b string) int { return warnings(a) - warnings(b) })
	for i, p := range sorted {
		switch {
		case i == enough:
			log.Warn(fmt.Sprintf("and %d more; 'tlsnat check' lists them all", len(sorted)-enough))
			return
		case warnings(p) > 0:
			log.Warn(strings.TrimPrefix(p, config.WarningPrefix))
		default:
			log.Error(p)
		}
	}
}

// retire keeps a generation that connections may run under, also those that its listeners accept yet.
func (s *reloader) retire(gen *generation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.old = append(slices.DeleteFunc(s.old, (*generation).gone), gen)
}

// gone says whether no connection runs under it any more, and none ever will.
func (gen *generation) gone() bool { return gen.left.Load() && gen.open.Load() == 0 }

// living are the generations in use but the current one, the newest first. A reload may be about to replace that one, and
// have it among the old ones already.
func (s *reloader) living(current *generation) []*generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.old = slices.DeleteFunc(s.old, (*generation).gone)
	all := slices.DeleteFunc(slices.Clone(s.old), func(gen *generation) bool { return gen == current || gen.open.Load() == 0 })
	slices.Reverse(all)
	return all
}
