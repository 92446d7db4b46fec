// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/pool"
)

// What this process or its machine lacks is not the fault of a backend, a check or a client. A connect or a check that
// fails for such a reason says nothing about the backend: it is counted here, said in the log, and tried again.

// lack is what is missing. The list is closed: it is a label of the metrics.
type lack uint8

const (
	lackNothing     lack = iota
	lackPorts            // no local port or address to connect from
	lackDescriptors      // the process's limit of open files, or the machine's
	lackMemory           // of the kernel
	lackCPU              // the process did not run when it was its turn
	lacks
)

var lackWords = [lacks]string{"", "ports", "descriptors", "memory", "cpu"}

var lackTexts = [lacks]string{"", "this machine has no free port or address to connect from", "this process has no free descriptor",
	"the kernel has no memory for it", "this process did not get to run in time"}

// errNotRun is that of a wait which ended before this process could look at what had come.
var errNotRun = errors.New("the time was over before an answer could be looked at")

// lackOf says what of our own an error is about. ENOSPC is that of epoll_ctl(2), where all watches are in use.
func lackOf(err error) lack {
	if errors.Is(err, errNotRun) {
		return lackCPU
	}
	e, ok := errors.AsType[unix.Errno](err)
	switch {
	case !ok:
	case e == unix.EADDRNOTAVAIL, e == unix.EADDRINUSE:
		return lackPorts
	case e == unix.EMFILE, e == unix.ENFILE:
		return lackDescriptors
	case e == unix.ENOBUFS, e == unix.ENOMEM, e == unix.ENOSPC:
		return lackMemory
	}
	return lackNothing
}

// ownLack says whether an error is about what this process or its machine lacks.
func ownLack(err error) bool { return lackOf(err) != lackNothing }

// inWords is an error as a line of the log has it: that of an own lack says whose lack it is.
func inWords(err error) string {
	if l := lackOf(err); l != lackNothing {
		return lackTexts[l] + " (" + err.Error() + ")"
	}
	return err.Error()
}

// lackPlace is what could not be done. The list is closed, too.
type lackPlace uint8

const (
	lackInConnect lackPlace = iota
	lackInCheck             // of a backend, and in a try whether an ejected one is back
	lackInLookup            // of a backend's name
	lackInAccept
	lackPlaces
)

var lackPlaceWords = [lackPlaces]string{"connect", "check", "lookup", "accept"}

// shortages counts what could not be done for want of something of our own.
type shortages struct {
	counts [lackPlaces][lacks]atomic.Uint64
	said   [lackPlaces][lacks]atomic.Int64 // when, in nanoseconds since the gateway's start
}

// sayAgain is how often the log says that the same thing is still missing: it may be so ten thousand times a second.
const sayAgain = 10 * time.Second

// short notes that something could not be done because of an own lack. It may be called from anywhere.
func (g *Gateway) short(in lackPlace, err error, what string) {
	l := lackOf(err)
	g.shortages.counts[in][l].Add(1)
	now, said := int64(time.Since(g.started)), &g.shortages.said[in][l]
	if last := said.Load(); last != 0 && now-last < int64(sayAgain) || !said.CompareAndSwap(last, now) {
		return
	}
	g.log.Warn("tlsnat lacks "+lackWords[l]+": that counts against nobody else", zap.String("failed", lackPlaceWords[in]), zap.String("for", what),
		zap.Uint64("times", g.shortages.counts[in][l].Load()), zap.String("error", inWords(err)))
}

// Shortage is how often something could not be done because this process or its machine lacks something.
type Shortage struct {
	Of    string `json:"of"`     // ports, descriptors, memory, cpu
	In    string `json:"failed"` // connect, check, lookup, accept
	Count uint64 `json:"count"`
}

// Shortages has all kinds there are, also those that never happened.
func (g *Gateway) Shortages() (all []Shortage) {
	for in, place := range lackPlaceWords {
		for l := lackPorts; l < lacks; l++ {
			all = append(all, Shortage{lackWords[l], place, g.shortages.counts[in][l].Load()})
		}
	}
	return all
}

// waitSteps is how many parts a wait is counted in. In each of them this process has the chance to see what has come.
const waitSteps = 8

// wait is one that counts only the time in which this process runs.
type wait struct {
	ctx   context.Context
	end   context.CancelCauseFunc
	timer *time.Timer
	step  time.Duration
	began time.Time // of the present step
	left  int       // steps
	late  int       // steps that did not count
}

// patiently is a context that ends when this process has run for as long as d. A process that stood still, or did not get
// a processor, finds its timers due before it has looked at what came meanwhile: a step that ended so late does not
// count. If that happens as often as there are steps, the wait ends as an own lack.
func patiently(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	w := &wait{step: max(d/waitSteps, 1), left: waitSteps}
	w.ctx, w.end = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(forever, w.stepOver) // a step can't end before the timer is known
	w.began = time.Now()
	w.timer.Reset(w.step)
	return w.ctx, func() {
		w.end(context.Canceled)
		w.timer.Stop()
	}
}

func (w *wait) stepOver() {
	now := time.Now()
	if now.Sub(w.began) > 2*w.step {
		w.late++
	} else {
		w.left--
	}
	w.began = now
	switch {
	case w.ctx.Err() != nil:
	case w.left == 0:
		w.end(context.DeadlineExceeded)
	case w.late == waitSteps:
		w.end(errNotRun)
	default:
		w.timer.Reset(w.step)
	}
}

// endOf is an error of what was done within a wait: if the wait is over, why that is.
func endOf(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

const (
	// A check, a try or a lookup that an own lack has prevented is made again after so long at most: soon enough for a
	// backend that fails meanwhile, and not so soon that thousands of them take what there is of the processor.
	lackPause = time.Second
	// A Unix socket whose queue of connections is full is tried again so soon,
	minBusyPause = 5 * time.Millisecond
	// twice as late each time, and at most so late: a try costs some microseconds, and a place in the queue is gone as
	// soon as it is free.
	maxBusyPause = 50 * time.Millisecond
)

// errBusy is that of a Unix socket whose queue of connections stays full: connect(2) says EAGAIN where TCP would wait.
var errBusy = errors.New("its queue of connections is full")

// whileBusy connects to a Unix socket, again and again while its queue of connections is full.
func whileBusy[T any](ctx context.Context, connect func() (T, error)) (T, error) {
	for pause := minBusyPause; ; pause = min(2*pause, maxBusyPause) {
		got, err := connect()
		if !errors.Is(err, unix.EAGAIN) {
			return got, err
		}
		select {
		case <-ctx.Done():
			return got, errBusy
		case <-time.After(pool.Jittered(pause)):
		}
	}
}
