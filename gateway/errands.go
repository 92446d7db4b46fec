// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// errands are things that are done again and again beside the loops: checks, tries, lookups. All of the process share
// one, so that there is a bound to what is done at once.
type errands struct {
	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{}

	mu      sync.Mutex
	over    bool
	running sync.WaitGroup
}

// errandsAtOnce bounds goroutines and descriptors: with connects that take their whole timeout of some seconds as many
// are begun each second as there are backends that don't answer in a large map.
const errandsAtOnce = 256

func newErrands() *errands {
	e := &errands{slots: make(chan struct{}, errandsAtOnce)}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

// errand is one of them. A nil errand is over.
type errand struct {
	ctx   context.Context
	end   context.CancelFunc
	all   *errands
	timer *time.Timer
	do    func(*errand) time.Duration
}

// start has do run once in has passed, and again when the time has passed that it returns, until that is never.
func (e *errands) start(in time.Duration, do func(*errand) time.Duration) *errand {
	x := &errand{all: e, do: do}
	x.ctx, x.end = context.WithCancel(e.ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over {
		x.end()
		return x
	}
	x.timer = time.AfterFunc(in, x.run)
	return x
}

func (x *errand) run() {
	e := x.all
	if !e.begin() {
		return
	}
	defer e.running.Done()
	select {
	case e.slots <- struct{}{}:
	case <-x.ctx.Done():
		return
	}
	next := never
	if !x.stopped() {
		next = x.do(x)
	}
	<-e.slots
	if next < 0 {
		x.end()
	} else if !x.stopped() {
		x.timer.Reset(next)
	}
}

// begin counts one that runs, as long as there may be any.
func (e *errands) begin() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.over {
		e.running.Add(1)
	}
	return !e.over
}

// stop ends an errand. One that is running is told so by its context, and by stopped.
func (x *errand) stop() {
	if x == nil {
		return
	}
	x.end()
	if x.timer != nil {
		x.timer.Stop()
	}
}

func (x *errand) stopped() bool { return x.ctx.Err() != nil }

// close ends all, and waits for those that are running.
func (e *errands) close() {
	e.mu.Lock()
	e.over = true
	e.mu.Unlock()
	e.cancel()
	e.running.Wait()
}

// jittered is d give or take a tenth: what began at once drifts apart.
func jittered(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*0.2*float64(d))
}
