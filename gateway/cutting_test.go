// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"io"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// slowReader is a log's reader that takes nothing until it is told to.
type slowReader struct {
	takes chan struct{}
	mu    sync.Mutex
	got   bytes.Buffer
}

func (r *slowReader) Write(b []byte) (int, error) {
	<-r.takes
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.got.Write(b)
}

// cutAll has the loop's connections cut, round by round, and returns how many rounds that took.
func (s *still) cutAll(t *testing.T) (rounds int) {
	t.Helper()
	cut := &cutting{loop: s.loop, logged: s.loop.now}
	s.loop.post(cut.turn)
	for deadline := time.Now().Add(time.Minute); len(s.loop.conns) > 0; rounds++ {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are left", len(s.loop.conns))
		}
		s.loop.tick()
		s.loop.runPosted()
	}
	return rounds
}

// logTo has the gateway write its log to out from now on.
func (s *still) logTo(t *testing.T, out io.Writer) {
	t.Cleanup(s.Gateway.lines.close) // when the test has let go of its reader
	s.Gateway.lines = newLineBuffer(out)
}

// TestManyConnectionsAreCutInTurns: each with one outcome and one line, and the loop serves others in between.
func TestManyConnectionsAreCutInTurns(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp", "LOG_LEVEL=debug")
	reader := &slowReader{takes: make(chan struct{})}
	close(reader.takes)
	s.logTo(t, reader)
	s.Gateway.log = newLogger(&s.settings, s.Gateway.lines)
	const many = 400
	for range many {
		c, client := s.accept(t)
		c.enter(s.listener.rules.plain)
		defer unix.Close(client)
	}
	if rounds := s.cutAll(t); rounds < 2 {
		t.Errorf("%d connections were cut in %d round", many, rounds)
	}
	if n := s.loop.counters.outcomes[Drained].Load(); n != many {
		t.Errorf("%d outcomes for %d connections", n, many)
	}
	s.lines.close()
	if n := bytes.Count(reader.got.Bytes(), []byte(`"outcome":"drained"`)); n != many {
		t.Errorf("%d lines for %d connections", n, many)
	}
}

// TestCutConnectionsWaitForTheLog: while the log's reader is behind none is cut, and no line is lost; one that takes nothing
// any more holds nobody up for long.
func TestCutConnectionsWaitForTheLog(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	reader := &slowReader{takes: make(chan struct{})}
	s.logTo(t, reader)
	for s.Gateway.lines.roomy() {
		_, _ = s.Gateway.lines.Write(make([]byte, 64<<10))
	}
	c, client := s.accept(t)
	defer unix.Close(client)
	c.enter(s.listener.rules.plain)
	cut := &cutting{loop: s.loop, logged: s.loop.now}
	cut.turn()
	if c.stage == over {
		t.Error("a connection was cut while the log had no room")
	}
	close(reader.takes)
	s.cutAll(t)
	if n := s.Gateway.lines.dropped.Load(); n != 0 {
		t.Errorf("%d lines were dropped", n)
	}
	stuck, other := s.accept(t)
	defer unix.Close(other)
	stuck.enter(s.listener.rules.plain)
	hung := &slowReader{takes: make(chan struct{})}
	defer close(hung.takes)
	s.logTo(t, hung)
	for s.Gateway.lines.roomy() {
		_, _ = s.Gateway.lines.Write(make([]byte, 64<<10))
	}
	s.loop.tick()
	(&cutting{loop: s.loop, logged: s.loop.now - int64(logTime)}).turn()
	if stuck.stage != over {
		t.Error("a reader that hangs keeps a connection from being cut")
	}
}
