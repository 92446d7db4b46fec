// SPDX-License-Identifier: Apache-2.0

// Package pool has what goes on beside the loops so that a backend answers: tasks that are done again and again, such as
// checks and lookups of names. It knows no connection.
package pool

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

// Tasks are things that are done again and again beside the loops: checks, tries, lookups. All of the process share
// one, so that there is a bound to what is done at once, and so that several that are due are done in one wake of the
// process: to wake a thread for each costs ten times what a check does.
type Tasks struct {
	ctx    context.Context
	cancel context.CancelFunc
	made   time.Time

	mu      sync.Mutex
	over    bool
	handing bool // what is due is being handed out
	agenda  agenda
	due     [taskKinds * 2]turns.Queue[string, *Task] // what is due and what runs, by class
	turn    int                                       // the class that had the last turn
	timer   *time.Timer                               // until the first of the agenda is due
	running sync.WaitGroup
}

// TasksAtOnce bounds goroutines and descriptors: with connects that take their whole timeout of some seconds as many
// are begun each second as there are backends that don't answer in a large map.
const TasksAtOnce = 512

// Never is a time until the next turn that does not come.
const Never = time.Duration(-1)

// TaskKind is what a task does. Each kind has two classes: tasks that were quick the last time, and the others. A class may
// have as many places as are free besides, and an owner in it as many as are left of those. So machines and DNS servers that do
// not answer take half of all places, and hold up neither other kinds nor what is answered.
type TaskKind uint8

const (
	someTask   TaskKind = iota
	CheckTask           // whether a server is fit
	LookupTask          // where a name leads
	ProbeTask           // whether an ejected server is back
	taskKinds
)

// quickTask bounds what is quick: an answer that is not lost on the way is there within this time.
const quickTask = time.Second

// NewTasks makes an empty set of tasks. Close ends it.
func NewTasks() *Tasks {
	e := &Tasks{made: time.Now()}
	for i := range e.due {
		e.due[i] = turns.New(func(x *Task) string { return x.owner })
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.timer = time.AfterFunc(time.Hour, e.hand) // enter sets its time; one that comes early does no harm
	return e
}

// Task is one of them. A nil task is over.
type Task struct {
	ctx context.Context
	end context.CancelFunc
	all *Tasks
	do  func(*Task) time.Duration
	due time.Duration // since Tasks was made
	at  int           // of the agenda; -1: not there

	kind  TaskKind
	owner string                      // the machine that is asked
	class *turns.Queue[string, *Task] // that it waits or runs in; nil: in none
	quick bool                        // it was, the last time
}

// agenda is who waits, as a heap: who is due next comes first.
type agenda []*Task

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].due < a[j].due }

func (a agenda) Swap(i, j int) {
	a[i], a[j] = a[j], a[i]
	a[i].at, a[j].at = i, j
}

func (a *agenda) Push(x any) {
	x.(*Task).at = len(*a)
	*a = append(*a, x.(*Task))
}

func (a *agenda) Pop() any {
	last := len(*a) - 1
	x := (*a)[last]
	(*a)[last] = nil
	*a, x.at = (*a)[:last], -1
	return x
}

// Start has do run once in has passed, and again when the time has passed that it returns, until that is Never. The time
// is kept to an eighth (see coarse).
func (e *Tasks) Start(in time.Duration, do func(*Task) time.Duration) *Task {
	return e.StartFor(someTask, "", in, do)
}

// StartFor is Start for a task of a kind, which asks owner.
func (e *Tasks) StartFor(kind TaskKind, owner string, in time.Duration, do func(*Task) time.Duration) *Task {
	x := &Task{all: e, do: do, at: -1, kind: kind, owner: owner}
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

// enter puts a task on the agenda. The lock is held.
func (e *Tasks) enter(x *Task, in time.Duration) {
	x.due = coarse(time.Since(e.made), in)
	heap.Push(&e.agenda, x)
	if x.at == 0 && !e.handing {
		e.setTimer()
	}
}

// setTimer has what is due first be handed out when it is. The lock is held.
func (e *Tasks) setTimer() {
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
func (e *Tasks) hand() {
	for x := e.next(); x != nil; x = e.next() {
		go x.run()
		runtime.Gosched()
	}
}

// next is the task whose turn it is, as one that runs; nil: nothing is due, or no place is free.
func (e *Tasks) next() *Task {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.handing = false; e.over {
		return nil
	}
	for len(e.agenda) > 0 && e.agenda[0].due <= time.Since(e.made) {
		x := heap.Pop(&e.agenda).(*Task)
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
func (e *Tasks) classWithTurn() *turns.Queue[string, *Task] {
	free := TasksAtOnce
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

// Status is how many run, and how many are due and wait for a place.
func (e *Tasks) Status() (running, waiting int) {
	for i := range e.due {
		running += int(e.due[i].Held.Load())
		waiting += int(e.due[i].Waiting.Load())
	}
	return running, waiting
}

func (x *Task) run() {
	e := x.all
	defer e.running.Done()
	next, began := Never, time.Now()
	if !x.Stopped() {
		next = x.do(x)
	}
	e.mu.Lock()
	x.class.Leave(x, 1)
	x.class, x.quick = nil, time.Since(began) < quickTask
	if next < 0 || e.over || x.Stopped() {
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

// Context ends when the task is stopped.
func (x *Task) Context() context.Context { return x.ctx }

// Stop ends a task. One that is running is told so by its context, and by Stopped.
func (x *Task) Stop() {
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

// Stopped reports whether a task has been stopped, by itself or with all.
func (x *Task) Stopped() bool { return x.ctx.Err() != nil }

// Close ends all, and waits for those that are running.
func (e *Tasks) Close() {
	e.mu.Lock()
	e.over = true
	e.timer.Stop()
	e.mu.Unlock()
	e.cancel()
	e.running.Wait()
}

// Jittered is d give or take a tenth: what began at once drifts apart.
func Jittered(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*0.2*float64(d))
}
