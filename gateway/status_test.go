// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// crowd is a loop with so many connections, the newest of which was accepted at n. It does not run: goRound does what
// was posted to it, once.
func crowd(t testing.TB, n int) *loop {
	p, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	l := &loop{conns: map[*conn]struct{}{}, now: int64(n), poll: p, done: make(chan struct{})}
	l.gw = &Gateway{loops: []*loop{l}}
	ln := &listener{name: ":443"}
	for i := range n {
		c := &conn{loop: l, stage: relaying}
		c.report = report{id: uint64(i), accepted: int64(i + 1), listen: ln, peer: netip.MustParseAddrPort("192.0.2.1:1234"), sni: "api.bank.example"}
		c.report.source = c.report.peer
		l.conns[c] = struct{}{}
	}
	return l
}

// serve runs what is posted until the test ends.
func (l *loop) serve(t testing.TB) {
	ctx, stop := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		for ctx.Err() == nil {
			l.runPosted()
			time.Sleep(100 * time.Microsecond)
		}
	}()
	t.Cleanup(func() {
		stop()
		<-over
	})
}

func TestNewestConnectionsComeFirst(t *testing.T) {
	const all = 3 * glance
	l := crowd(t, all)
	l.serve(t)
	infos, next, _, err := l.gw.Conns(t.Context(), ConnQuery{Limit: 10})
	if err != nil || len(infos) != 10 || next == "" {
		t.Fatalf("%d connections, next %q, %v; want 10 and more", len(infos), next, err)
	}
	for i, c := range infos {
		if want := int64(all - i); c.rank.accepted != want {
			t.Errorf("the %d-th was accepted at %d, want %d", i, c.rank.accepted, want)
		}
	}
}

// TestPagesAreTheWholeList: each connection is on one page, in order.
func TestPagesAreTheWholeList(t *testing.T) {
	l := crowd(t, 2500)
	for c := range l.conns {
		c.report.accepted /= 7 // several at the same time, as in a round
	}
	l.serve(t)
	var ranks []rank
	for q := (ConnQuery{Limit: 1000}); ; {
		infos, next, _, err := l.gw.Conns(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range infos {
			ranks = append(ranks, i.rank)
		}
		if q.After = next; next == "" {
			break
		}
	}
	if len(ranks) != 2500 || !slices.IsSortedFunc(ranks, rank.compare) || len(slices.Compact(slices.Clone(ranks))) != 2500 {
		t.Errorf("%d connections on all pages, want 2500, each once", len(ranks))
	}
	for _, bad := range []string{"x", "1", "1.2.3", "-", "1.-1"} {
		if _, _, _, err := l.gw.Conns(t.Context(), ConnQuery{Limit: 1, After: bad}); err == nil {
			t.Errorf("after=%s is taken", bad)
		}
	}
}

// TestQueryFindsOneInACrowd, however old it is.
func TestQueryFindsOneInACrowd(t *testing.T) {
	l := crowd(t, 20_000)
	var one *conn
	for c := range l.conns {
		if c.report.id == 17 {
			one = c
		}
	}
	one.report.source, one.report.sni, one.report.backend = netip.MustParseAddrPort("198.51.100.7:1"), "pay.bank.example", "10.0.0.1:80"
	one.report.listen, one.stage = &listener{name: ":8443"}, connecting
	l.serve(t)
	for _, q := range []ConnQuery{{Client: netip.MustParsePrefix("198.51.100.0/24")}, {Name: "pay.bank.example"}, {Backend: "10.0.0.1:80"},
		{Listen: ":8443"}, {Stage: "connect"}, {Name: "pay.bank.example", Stage: "connect"}} {
		q.Limit = 5
		infos, next, _, err := l.gw.Conns(t.Context(), q)
		if err != nil || len(infos) != 1 || infos[0].SNI != "pay.bank.example" || next != "" {
			t.Errorf("%+v: %+v, next %q, %v", q, infos, next, err)
		}
	}
	if infos, _, _, _ := l.gw.Conns(t.Context(), ConnQuery{Limit: 5, Name: "pay.bank.example", Stage: "relay"}); len(infos) != 0 {
		t.Errorf("%+v fits only in part", infos)
	}
}

// counting is a viewer that only counts.
type counting struct{ n int }

func (v *counting) see(*conn)   { v.n++ }
func (v *counting) seen() []int { return []int{v.n} }

// TestALoopIsAskedALittleAtATime: of 100,000 connections it looks at 256 a turn, and serves the others in between.
func TestALoopIsAskedALittleAtATime(t *testing.T) {
	const all = 100_000
	l := crowd(t, all)
	v := &counting{}
	answer := make(chan []int, 1)
	(&survey{loop: l, ctx: t.Context(), see: v.see, done: func() { answer <- v.seen() }}).begin()
	turns := 1
	for seen := v.n; len(answer) == 0; seen = v.n {
		if len(l.posted) != 1 {
			t.Fatalf("%d functions are posted, want the next turn", len(l.posted))
		}
		l.runPosted()
		if turns++; v.n-seen > glance {
			t.Fatalf("a turn looks at %d connections, want %d at most", v.n-seen, glance)
		}
	}
	if got := <-answer; got[0] != all || turns != all/glance+1 {
		t.Errorf("%d connections in %d turns, want %d in %d", got[0], turns, all, all/glance+1)
	}
}

// TestManyAreEndedALittleAtATime: where something is done to connections that takes a while a turn has fewer of them, and
// all of them have their turn, once.
func TestManyAreEndedALittleAtATime(t *testing.T) {
	const all, each = 2000, glanceTime / 4
	l := crowd(t, all)
	l.gw.started = time.Now()
	turns, done, ofTurn := 0, map[*conn]bool{}, 0
	l.gw.eachConn(func(c *conn) {
		for began := l.clock(); l.clock()-began < int64(each); {
		}
		done[c] = true
		delete(l.conns, c)
		ofTurn++
	})
	for ; len(l.posted) > 0; turns++ {
		ofTurn = 0
		if l.runPosted(); ofTurn > int(glanceTime/each)+glimpse {
			t.Fatalf("a turn ended %d connections, each in %v", ofTurn, each)
		}
	}
	if len(done) != all || len(l.conns) != 0 {
		t.Errorf("%d of %d were ended in %d turns", len(done), all, turns)
	}
}

// TestASurveyEndsWithWhoAsked, and with the connections.
func TestASurveyEndsWithWhoAsked(t *testing.T) {
	l := crowd(t, 3*glance)
	ctx, cancel := context.WithCancel(t.Context())
	ended := 0
	begin := func(ctx context.Context) {
		(&survey{loop: l, ctx: ctx, see: func(*conn) {}, done: func() { ended++ }}).begin()
	}
	begin(ctx)
	cancel()
	if l.runPosted(); ended != 1 || len(l.posted) != 0 {
		t.Errorf("who asked has gone: it ended %d times, %d functions are posted", ended, len(l.posted))
	}
	begin(t.Context())
	for c := range l.conns {
		delete(l.conns, c)
	}
	if l.runPosted(); ended != 2 || len(l.posted) != 0 {
		t.Errorf("all connections are gone: it ended %d times, %d functions are posted", ended, len(l.posted))
	}
}

// BenchmarkGlance is how long the loop's other connections wait for a turn of a survey.
func BenchmarkGlance(b *testing.B) {
	l := crowd(b, 100_000)
	n := &newest{loop: l, query: &ConnQuery{Limit: 1000}}
	done := true
	s := &survey{}
	for b.Loop() {
		if done {
			done = false
			n.top = nil
			s = &survey{loop: l, ctx: b.Context(), see: n.see, done: func() { done = true }}
			s.begin()
			continue
		}
		l.posted = l.posted[:0]
		s.turn()
	}
}

// TestSlowLoopIsLeftOutAndNamed: the others' connections are told of, whichever of them is slow.
func TestSlowLoopIsLeftOutAndNamed(t *testing.T) {
	for slow := range 3 {
		g := &Gateway{}
		for i := range 3 {
			l := crowd(t, 10)
			l.gw = g
			if i != slow { // that one is busy, and looks at nothing
				l.serve(t)
			}
			g.loops = append(g.loops, l)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		infos, _, missing, err := g.Conns(ctx, ConnQuery{Limit: 100})
		if err != nil || len(infos) != 20 || len(missing) != 1 || missing[0] != slow {
			t.Errorf("%d connections, %v are missing, %v; want 20 and %d", len(infos), missing, err, slow)
		}
		if _, missing := g.Ended(ctx, ConnQuery{}, 10); len(missing) == 0 { // the time is over
			t.Error("nobody is missing")
		}
	}
}
