// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"container/heap"
	"context"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/tlsnat/tlsnat/gateway/turns"
)

// errands are things that are done again and again beside the loops: checks, tries, lookups. All of the process share
// one, so that there is a bound to what is done at once, and so that several that are due are done in one wake of the
// process: to wake a thread for each costs ten times what a check does.
type errands struct {
	ctx    context.Context
	cancel context.CancelFunc
	made   time.Time

	mu      sync.Mutex
	over    bool
	handing bool // what is due is being handed out
	agenda  agenda
	due     [errandKinds * 2]turns.Queue[string, *errand] // what is due and what runs, by class
	turn    int                                           // the class that had the last turn
	timer   *time.Timer                                   // until the first of the agenda is due
	running sync.WaitGroup
}

// errandsAtOnce bounds goroutines and descriptors: with connects that take their whole timeout of some seconds as many
// are begun each second as there are backends that don't answer in a large map.
const errandsAtOnce = 512

// errandKind is what an errand does. Each kind has two classes: errands that were quick the last time, and the others. A class may
// have as many places as are free besides, and an owner in it as many as are left of those. So machines and DNS servers that do
// not answer take half of all places, and hold up neither other kinds nor what is answered.
type errandKind uint8

const (
	someErrand errandKind = iota
	checkErrand
	nameErrand
	probeErrand
	errandKinds
)

// quickErrand bounds what is quick: an answer that is not lost on the way is there within this time.
const quickErrand = time.Second

func newErrands() *errands {
	e := &errands{made: time.Now()}
	for i := range e.due {
		e.due[i] = turns.New(func(x *errand) string { return x.owner })
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.timer = time.AfterFunc(forever, e.hand)
	return e
}

// errand is one of them. A nil errand is over.
type errand struct {
	ctx context.Context
	end context.CancelFunc
	all *errands
	do  func(*errand) time.Duration
	due time.Duration // after its errands were made
	at  int           // of the agenda; -1: not there

	kind  errandKind
	owner string                        // the machine that is asked
	class *turns.Queue[string, *errand] // that it waits or runs in; nil: in none
	quick bool                          // it was, the last time
}

// agenda is who waits, as a heap: who is due next comes first.
type agenda []*errand

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].due < a[j].due }

func (a agenda) Swap(i, j int) {
	a[i], a[j] = a[j], a[i]
	a[i].at, a[j].at = i, j
}

func (a *agenda) Push(x any) {
	x.(*errand).at = len(*a)
	*a = append(*a, x.(*errand))
}

func (a *agenda) Pop() any {
	last := len(*a) - 1
	x := (*a)[last]
	(*a)[last] = nil
	*a, x.at = (*a)[:last], -1
	return x
}

// start has do run once in has passed, and again when the time has passed that it returns, until that is never. The time
// is kept to an eighth (see coarse).
func (e *errands) start(in time.Duration, do func(*errand) time.Duration) *errand {
	return e.startFor(someErrand, "", in, do)
}

// startFor is start for an errand of a kind, which asks owner.
func (e *errands) startFor(kind errandKind, owner string, in time.Duration, do func(*errand) time.Duration) *errand {
	x := &errand{all: e, do: do, at: -1, kind: kind, owner: owner}
	x.ctx, x.end = context.WithCancel(e.ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over {
		x.end()
	} else {
		e.enter(x, in)
	}
	return x
}

// enter puts an errand on the agenda. The lock is held.
func (e *errands) enter(x *errand, in time.Duration) {
	x.due = coarse(time.Since(e.made), in)
	heap.Push(&e.agenda, x)
	if x.at == 0 && !e.handing {
		e.setTimer()
	}
}

// setTimer has what is due first be handed out when it is. The lock is held.
func (e *errands) setTimer() {
	if len(e.agenda) > 0 {
		e.timer.Reset(e.agenda[0].due - time.Since(e.made))
	}
}

// coarse is when something is due that has so long to go: on a grid that all share, so that what is due at about the same
// time is due at once. Its steps are a power of two of nanoseconds, an eighth to a sixteenth of the time: a step of one
// is a step of the finer ones, too.
func coarse(now, in time.Duration) time.Duration {
	step := time.Duration(1) << max(0, bits.Len64(uint64(in))-4)
	return (now + in + step/2) &^ (step - 1)
}

// hand starts what is due, one after the other, and yields in between, so that a burst of them does not starve other goroutines.
// What finds no place waits for its turn.
func (e *errands) hand() {
	for x := e.next(); x != nil; x = e.next() {
		go x.run()
		runtime.Gosched()
	}
}

// next is the errand whose turn it is, as one that runs; nil: nothing is due, or no place is free.
func (e *errands) next() *errand {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.handing = false; e.over {
		return nil
	}
	for len(e.agenda) > 0 && e.agenda[0].due <= time.Since(e.made) {
		x := heap.Pop(&e.agenda).(*errand)
		x.class = &e.due[2*int(x.kind)]
		if x.quick {
			x.class = &e.due[2*int(x.kind)+1]
		}
		x.class.Push(x)
	}
	c := e.classWithTurn()
	if c == nil {
		e.setTimer()
		return nil
	}
	e.handing = true
	e.running.Add(1)
	return c.Take()
}

// classWithTurn is the next class in which somebody waits and may have a place; nil: none. The lock is held.
func (e *errands) classWithTurn() *turns.Queue[string, *errand] {
	free := errandsAtOnce
	for i := range e.due {
		free -= int(e.due[i].Held.Load())
	}
	for range e.due {
		e.turn = (e.turn + 1) % len(e.due)
		c := &e.due[e.turn]
		if held := int(c.Held.Load()); c.Waiting.Load() > 0 && held < free && c.Fewest() < max(1, free-held) {
			return c
		}
	}
	return nil
}

// status is how many run, and how many are due and wait for a place.
func (e *errands) status() (running, waiting int) {
	for i := range e.due {
		running += int(e.due[i].Held.Load())
		waiting += int(e.due[i].Waiting.Load())
	}
	return running, waiting
}

func (x *errand) run() {
	e := x.all
	defer e.running.Done()
	next, began := never, time.Now()
	if !x.stopped() {
		next = x.do(x)
	}
	e.mu.Lock()
	x.class.Leave(x, 1)
	x.class, x.quick = nil, time.Since(began) < quickErrand
	if next < 0 || e.over || x.stopped() {
		x.end()
	} else {
		e.enter(x, next)
	}
	idle := !e.handing
	e.mu.Unlock()
	if idle {
		e.hand() // somebody may wait for the place
	}
}

// stop ends an errand. One that is running is told so by its context, and by stopped.
func (x *errand) stop() {
	if x == nil {
		return
	}
	x.end()
	x.all.mu.Lock()
	defer x.all.mu.Unlock()
	if x.at >= 0 {
		heap.Remove(&x.all.agenda, x.at)
	} else if x.class != nil {
		x.class.Remove(x) // if it waits there
	}
}

func (x *errand) stopped() bool { return x.ctx.Err() != nil }

// close ends all, and waits for those that are running.
func (e *errands) close() {
	e.mu.Lock()
	e.over = true
	e.timer.Stop()
	e.mu.Unlock()
	e.cancel()
	e.running.Wait()
}

// jittered is d give or take a tenth: what began at once drifts apart.
func jittered(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*0.2*float64(d))
}
