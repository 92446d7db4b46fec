// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOwnLacksAreToldFromFaults: what this machine lacks is told from what a backend does, however the error is wrapped.
func TestOwnLacksAreToldFromFaults(t *testing.T) {
	for err, want := range map[error]lack{
		unix.EADDRNOTAVAIL: lackPorts,
		unix.EADDRINUSE:    lackPorts,
		unix.EMFILE:        lackDescriptors,
		unix.ENFILE:        lackDescriptors,
		unix.ENOBUFS:       lackMemory,
		unix.ENOMEM:        lackMemory,
		unix.ENOSPC:        lackMemory,
		errNotRun:          lackCPU,
		&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.EADDRNOTAVAIL)}: lackPorts,
		fmt.Errorf("wrapped: %w", unix.EMFILE):                                           lackDescriptors,

		nil:                      lackNothing,
		unix.ECONNREFUSED:        lackNothing,
		unix.ECONNRESET:          lackNothing,
		unix.EHOSTUNREACH:        lackNothing,
		unix.ENETUNREACH:         lackNothing,
		unix.ETIMEDOUT:           lackNothing,
		unix.EACCES:              lackNothing,
		unix.EAGAIN:              lackNothing,
		unix.ENOENT:              lackNothing,
		context.DeadlineExceeded: lackNothing,
	} {
		if got := lackOf(err); got != want {
			t.Errorf("%v is a lack of %q, want %q", err, lackWords[got], lackWords[want])
		}
		if got := ownLack(err); got != (want != lackNothing) {
			t.Errorf("%v is an own lack: %v", err, got)
		}
	}
}

// TestWaitCountsOnlyTimeThatRuns: a step that ends late does not count, and a wait in which as many are late as there are
// steps says nothing about whom was waited for.
func TestWaitCountsOnlyTimeThatRuns(t *testing.T) {
	make := func() *wait {
		w := &wait{step: time.Second, left: waitSteps, timer: time.NewTimer(time.Hour)}
		w.ctx, w.end = context.WithCancelCause(t.Context())
		return w
	}
	steps := func(w *wait, n int, took time.Duration) {
		for range n {
			w.began = time.Now().Add(-took)
			w.stepOver()
		}
	}
	w := make()
	steps(w, waitSteps-1, time.Hour)
	steps(w, waitSteps-1, time.Second)
	if err := w.ctx.Err(); err != nil {
		t.Errorf("it is over before its time: %v", context.Cause(w.ctx))
	}
	steps(w, 1, time.Second)
	if err := context.Cause(w.ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("its time is over: %v", err)
	}
	w = make()
	steps(w, waitSteps, time.Hour)
	if err := context.Cause(w.ctx); !ownLack(err) {
		t.Errorf("the process never ran in time: %v", err)
	}
	ctx, cancel := patiently(t.Context(), 20*time.Millisecond)
	defer cancel()
	<-ctx.Done()
	if err := endOf(ctx, unix.ETIMEDOUT); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errNotRun) {
		t.Errorf("the wait ended with %v", err)
	}
}
