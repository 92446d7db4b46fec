// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"time"

	"go.uber.org/zap"
)

const (
	// When for so long no cut connection has ended, the gateway stops all the same. A handshake that computes is
	// waited for, and takes milliseconds.
	cutTime = 2 * time.Second
	// Lines wait for a reader of the log that is slow. One that takes nothing for so long has gone away or hangs.
	logTime = time.Second
	// Until then it is looked at again after this long.
	logCheck = 5 * time.Millisecond
)

// cutRest ends every connection that is still open, a few a turn, however many there are. It returns when they have ended,
// each with its outcome and its line.
func (g *Gateway) cutRest() {
	ordered := int64(time.Since(g.started))
	for _, l := range g.loops {
		l.post(func() { (&cutting{loop: l, ordered: ordered, logged: l.now}).turn() })
	}
	for before := g.open.Load(); !g.loopsEndWithin(cutTime); {
		open := g.open.Load()
		if open >= before {
			g.log.Error("connections could not be ended, and have no line", zap.Int64("connections", open))
			return
		}
		before = open
	}
}

func (g *Gateway) loopsEndWithin(d time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return g.loopsEnd(ctx)
}

// cutting is the end of all connections of a loop.
type cutting struct {
	loop    *loop
	ordered int64 // what came before this time is carried, loop nanoseconds
	logged  int64 // when the log had room last
}

// turn cuts as many as a turn has time for, and goes on in the next round. The loop ends with the last one.
func (t *cutting) turn() {
	l := t.loop
	if len(l.conns) == 0 {
		return
	}
	if l.gw.lines.roomy() {
		t.logged = l.now
	} else if l.now-t.logged < int64(logTime) {
		time.AfterFunc(logCheck, func() { l.post(t.turn) })
		return
	}
	if l.looks.sure < t.ordered || t.cutSome() {
		l.post(t.turn)
	}
}

// cutSome says whether some are left to cut.
func (t *cutting) cutSome() bool {
	l := t.loop
	n, began := 0, l.clock()
	for c := range l.conns {
		if c.report.told && (c.stage == shakingHands || c.stage == encrypting) {
			continue // it ends when its goroutine reports
		}
		c.cut(Drained, "the gateway stops")
		if n++; n%glimpse == 0 && l.clock()-began > int64(glanceTime) {
			return true
		}
	}
	return false
}

// roomy says whether the log has room for the lines of a turn.
func (b *lineBuffer) roomy() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.pending) < pendingLines/2
}
