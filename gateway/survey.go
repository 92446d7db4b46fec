// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A loop looks at so many of its connections in one turn when it is asked about them, some 100 µs (BenchmarkGlance).
// Between two turns it serves everybody else, however many connections it has. A turn that has taken twice as long is
// over, too: to end a connection takes 60 µs, so it asks for the time after each few.
const (
	glance     = 256
	glanceTime = 200 * time.Microsecond
	glimpse    = 4
)

// survey is a walk over all connections of a loop. Those that begin meanwhile may be missed.
type survey struct {
	loop *loop
	ctx  context.Context
	see  func(*conn)
	done func()

	next func() (struct{}, bool) // a turn's worth; false: that was the last
	stop func()
}

// begin is called on the loop. A loop that ends meanwhile runs what was posted once more, when it has no connection left:
// so every survey comes to its end.
func (s *survey) begin() {
	s.next, s.stop = iter.Pull(s.turns)
	s.turn()
}

// turns is a walk over the map that rests after each turn: the next one goes on in the same walk.
func (s *survey) turns(yield func(struct{}) bool) {
	n, began := 0, s.loop.clock()
	for c := range s.loop.conns {
		if c.stage != over {
			s.look(c)
		}
		if n++; n == glance || n%glimpse == 0 && s.loop.clock()-began > int64(glanceTime) {
			if !yield(struct{}{}) {
				return
			}
			n, began = 0, s.loop.clock()
		}
	}
}

func (s *survey) look(c *conn) {
	defer c.rescue()
	s.see(c)
}

func (s *survey) turn() {
	if s.ctx.Err() == nil {
		if _, more := s.next(); more {
			s.loop.post(s.turn)
			return
		}
	}
	s.stop()
	s.done()
}

// eachConn has every loop do something to each of its connections, a few a turn, and does not wait for that.
func (g *Gateway) eachConn(do func(*conn)) {
	for _, l := range g.loops {
		l.post(func() { (&survey{loop: l, ctx: context.Background(), see: do, done: func() {}}).begin() })
	}
}

// viewer looks at the connections of one loop, and says then what it has seen.
type viewer[T any] interface {
	see(c *conn)
	seen() []T
}

// surveyed has a viewer look at every connection of each loop, and joins what they have seen. A loop that is not done
// before ctx is over is left out, and named.
func surveyed[T any](ctx context.Context, g *Gateway, view func(*loop) viewer[T]) (all []T, missing []int) {
	answers := make([]chan []T, len(g.loops))
	for i, l := range g.loops {
		answer := make(chan []T, 1)
		answers[i] = answer
		l.post(func() {
			v := view(l)
			(&survey{loop: l, ctx: ctx, see: v.see, done: func() {
				if ctx.Err() == nil { // else it has not seen all, and nobody waits
					answer <- v.seen()
				}
			}}).begin()
		})
	}
	return join(ctx, g, answers)
}

// ConnQuery says which connections are meant: those that fit everything that is not empty.
type ConnQuery struct {
	Limit   int          // of how many is told
	After   string       // what Conns has returned as next, for those that come behind
	Client  netip.Prefix // whose client is in there
	Listen  string       // ":443", as the connection has it
	Name    string       // that the client asked for
	Rule    string       // "edge.natmap:3"
	Backend string       // "10.0.0.12:8080"
	Stage   string       // "relay": what it waits for, or waited for when it ended
}

func (q *ConnQuery) fits(r *report, at stage) bool {
	switch {
	case q.Client.IsValid() && !q.Client.Contains(r.source.Addr().Unmap()),
		q.Listen != "" && q.Listen != r.listen.nameAt(r.port),
		q.Name != "" && q.Name != r.sni,
		q.Rule != "" && (r.route == nil || q.Rule != r.route.label),
		q.Backend != "" && q.Backend != r.backend,
		q.Stage != "" && q.Stage != at.String():
		return false
	}
	return true
}

// rank is where a connection stands in the list of all: the newest first.
type rank struct {
	accepted int64
	id       uint64
}

func rankOf(r *report) rank { return rank{r.accepted, r.id} }

func (p rank) compare(o rank) int {
	return cmp.Or(cmp.Compare(o.accepted, p.accepted), cmp.Compare(o.id, p.id))
}

func (p rank) String() string { return fmt.Sprintf("%x.%x", p.accepted, p.id) }

// parseRank reads what String has written. Nobody else is meant to write one.
func parseRank(s string) (p rank, err error) {
	accepted, id, _ := strings.Cut(s, ".")
	if p.accepted, err = strconv.ParseInt(accepted, 16, 64); err == nil {
		p.id, err = strconv.ParseUint(id, 16, 64)
	}
	return p, err
}

// Conns are the newest open connections that the query is about; next is where the following ones begin, "" if there are
// none. Loops are asked a little at a time: 100,000 connections hold nobody up. Those of missing loops, which did not answer
// before ctx was over, are not among them.
func (g *Gateway) Conns(ctx context.Context, q ConnQuery) (infos []OpenConn, next string, missing []int, err error) {
	after := rank{}
	if q.After != "" {
		if after, err = parseRank(q.After); err != nil {
			return nil, "", nil, fmt.Errorf("after=%.40q is nothing that was answered as next", q.After)
		}
	}
	all, missing := surveyed(ctx, g, func(l *loop) viewer[OpenConn] { return &newest{loop: l, query: &q, after: after} })
	slices.SortFunc(all, func(a, b OpenConn) int { return a.rank.compare(b.rank) })
	if len(all) > q.Limit {
		all = all[:q.Limit]
		if q.Limit > 0 {
			next = all[q.Limit-1].rank.String()
		}
	}
	return all, next, missing, nil
}

// newest keeps the newest connections of a loop, in order, which is several times faster than to sort all. It keeps one
// more than is told, to know whether there are more.
type newest struct {
	loop  *loop
	query *ConnQuery
	after rank
	top   []ranked
}

// ranked has the rank beside the connection, so that comparing many does not fetch each from memory.
type ranked struct {
	rank
	conn *conn
}

func (n *newest) see(c *conn) {
	p := rankOf(&c.report)
	if n.query.After != "" && p.compare(n.after) <= 0 || !n.query.fits(&c.report, c.stage) {
		return
	}
	if most := n.query.Limit + 1; len(n.top) == most {
		if p.compare(n.top[most-1].rank) >= 0 {
			return
		}
		n.top = n.top[:most-1]
	}
	at, _ := slices.BinarySearchFunc(n.top, p, func(r ranked, p rank) int { return r.compare(p) })
	n.top = slices.Insert(n.top, at, ranked{p, c})
}

func (n *newest) seen() (infos []OpenConn) {
	for _, r := range n.top {
		if r.conn.stage != over { // it may have ended since it was seen
			infos = append(infos, r.conn.info())
		}
	}
	return infos
}

func (c *conn) info() OpenConn {
	o := OpenConn{ConnInfo: c.report.info(), AgeMS: millis(c.loop.now - c.report.accepted), IdleMS: millis(c.loop.now - c.active)}
	o.Stage, o.Up, o.Down = c.stage.String(), c.up.moved, c.down.moved
	return o
}

// oldest is the age in milliseconds of the oldest connection of each generation.
func (g *Gateway) oldest(ctx context.Context) (oldest map[uint64]int64, missing []int) {
	all, missing := surveyed(ctx, g, func(l *loop) viewer[age] { return &ages{loop: l, began: map[*generation]int64{}} })
	oldest = map[uint64]int64{}
	for _, a := range all {
		oldest[a.generation] = max(oldest[a.generation], a.ms)
	}
	return oldest, missing
}

type age struct {
	generation uint64
	ms         int64
}

type ages struct {
	loop  *loop
	began map[*generation]int64
}

func (a *ages) see(c *conn) {
	if at, seen := a.began[c.gen]; !seen || c.report.accepted < at {
		a.began[c.gen] = c.report.accepted
	}
}

func (a *ages) seen() (all []age) {
	for gen, at := range a.began {
		all = append(all, age{gen.number, millis(a.loop.now - at)})
	}
	return all
}
