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
)

// errands are things that are done again and again beside the loops: checks, tries, lookups. All of the process share
// one, so that there is a bound to what is done at once, and so that several that are due are done in one wake of the
// process: to wake a thread for each costs ten times what a check does.
type errands struct {
	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{}
	made   time.Time

	mu      sync.Mutex
	over    bool
	handing bool // what is due is being handed out
	agenda  agenda
	timer   *time.Timer // until the first of the agenda is due
	running sync.WaitGroup
}

// errandsAtOnce bounds goroutines and descriptors: with connects that take their whole timeout of some seconds as many
// are begun each second as there are backends that don't answer in a large map.
const errandsAtOnce = 256

func newErrands() *errands {
	e := &errands{slots: make(chan struct{}, errandsAtOnce), made: time.Now()}
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
	x := &errand{all: e, do: do, at: -1}
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

// hand gives what is due to goroutines, one after the other: others who have something to do are not kept from it by as
// many as there are. Where all slots are taken the rest waits.
func (e *errands) hand() {
	for x := e.next(); x != nil; x = e.next() {
		select {
		case e.slots <- struct{}{}:
			go x.run()
			runtime.Gosched()
		case <-e.ctx.Done():
			e.running.Done()
			return
		}
	}
}

// next takes who is due off the agenda, as one that runs; nil: nobody is.
func (e *errands) next() *errand {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.handing = !e.over && len(e.agenda) > 0 && e.agenda[0].due <= time.Since(e.made); !e.handing {
		if !e.over {
			e.setTimer()
		}
		return nil
	}
	e.running.Add(1)
	return heap.Pop(&e.agenda).(*errand)
}

func (x *errand) run() {
	e := x.all
	defer e.running.Done()
	next := never
	if !x.stopped() {
		next = x.do(x)
	}
	<-e.slots
	e.mu.Lock()
	defer e.mu.Unlock()
	if next < 0 || e.over || x.stopped() {
		x.end()
		return
	}
	e.enter(x, next)
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
