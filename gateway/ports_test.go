// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/steer"
	"github.com/tlsnat/tlsnat/natmap"
)

func mustParse(t testing.TB, text string) *natmap.Map {
	t.Helper()
	m, err := natmap.Parse(natmap.Source{Name: "test", Text: text})
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return m
}

// chancePorts is a map of ranges by chance, on every address and on one; mode=tcp, so that rules may lie in others' ranges.
func chancePorts(r *rand.Rand) string {
	var b strings.Builder
	for _, addr := range []string{"", "192.0.2.1", "[2001:db8::1]"} {
		for port := 1000 + r.IntN(200); port < 3000; port += 1 + r.IntN(3)*r.IntN(100) {
			hi := port + r.IntN(2)*r.IntN(300)
			fmt.Fprintf(&b, "%s:%d-%d -> 10.0.0.1:= mode=tcp\n", addr, port, hi)
			port = hi
		}
	}
	return b.String()
}

// TestPortsThatStayKeepTheirSockets: over many reloads, whether or not wide ranges can be steered at that moment, a port
// that stays is listened on by the socket by which it was, and every port of the map by one.
func TestPortsThatStayKeepTheirSockets(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	old, wasSteered := &layout{}, 0
	for round := range 100 {
		m := mustParse(t, chancePorts(r))
		next := old.next(m, round > 3 && r.IntN(4) > 0)
		had, plain := setOf(old.plain), setOf(next.plain)
		for _, l := range m.Listens() {
			for port := int(l.Lo); port <= int(l.Hi); port++ {
				e := endpoint{l.Addr, uint16(port)}
				switch is := next.steers(e); {
				case is == plain[e]:
					t.Fatalf("round %d: %v is listened on twice or never", round, e)
				case had[e] && is, old.steers(e) && !is:
					t.Fatalf("round %d: %v changes its socket", round, e)
				case is:
					wasSteered++
				}
			}
		}
		for _, a := range next.anchors {
			if !next.steers(a) || plain[a] || had[a] {
				t.Fatalf("round %d: the sockets of %s are bound to %d, which is not one of theirs", round, a.addr, a.port)
			}
			for _, b := range old.anchors {
				if a.addr == b.addr && a != b && next.steers(b) {
					t.Fatalf("round %d: the sockets of %s move from %d to %d, which stays", round, a.addr, b.port, a.port)
				}
			}
		}
		old = next
	}
	if wasSteered == 0 {
		t.Error("nothing was steered")
	}
}

// TestNarrowAndWideRangesAreToldApart: what is steered where, and what keeps its own socket.
func TestNarrowAndWideRangesAreToldApart(t *testing.T) {
	one := netip.MustParseAddr("192.0.2.1")
	for _, c := range []struct {
		text    string
		plain   int
		steered []natmap.Listen
		spans   []steer.Span
	}{
		{":443 -> 10.0.0.1:1 mode=tcp; :2000-2062 -> 10.0.0.1:= mode=tcp", 64, nil, nil},
		{":2000-2063 -> 10.0.0.1:= mode=tcp", 0, []natmap.Listen{{Lo: 2000, Hi: 2063}}, []steer.Span{{Lo: 2000, Hi: 2063}}},
		{":2000-2030 -> 10.0.0.1:= mode=tcp; :2031-2063 -> 10.0.0.2:= mode=tcp", 0, []natmap.Listen{{Lo: 2000, Hi: 2063}}, []steer.Span{{Lo: 2000, Hi: 2063}}},
		{":2000-2999 -> 10.0.0.1:= mode=tcp; 192.0.2.1:2050 -> 10.0.0.2:1 mode=tcp; 192.0.2.1:80 -> 10.0.0.2:1 mode=tcp", 2, []natmap.Listen{{Lo: 2000, Hi: 2999}},
			[]steer.Span{{Lo: 2000, Hi: 2999}, {Addr: one, Lo: 2050, Hi: 2050, To: steer.Own}}},
		{"192.0.2.1:2000-2999 -> 10.0.0.1:= mode=tcp; :2050 -> 10.0.0.2:1 mode=tcp", 1, []natmap.Listen{{Addr: one, Lo: 2000, Hi: 2999}},
			[]steer.Span{{Addr: one, Lo: 2000, Hi: 2999}}},
		{"[fe80::1%lo]:2000-2999 -> 10.0.0.1:= mode=tcp", 1000, nil, nil},
	} {
		m, err := natmap.Parse(natmap.Source{Name: "test", Text: c.text})
		if err != nil {
			t.Logf("%s: %v", c.text, err) // no zones in maps
			continue
		}
		l := (&layout{}).next(m, true)
		if len(l.plain) != c.plain || !slices.Equal(l.steered, c.steered) || !slices.Equal(l.spans(), c.spans) {
			t.Errorf("%s:\n%d have sockets, %v are steered: %v\nwant %d, %v: %v", c.text, len(l.plain), l.steered, l.spans(), c.plain, c.steered, c.spans)
		}
	}
}

// TestListeningIsTold: how many sockets, how many ports are steered, and why those are not that could be.
func TestListeningIsTold(t *testing.T) {
	const narrow, wide = ":443 -> 10.0.0.1:1 mode=tcp; :2000-2009 -> 10.0.0.1:= mode=tcp", ":443 -> 10.0.0.1:1 mode=tcp; :2000-2999 -> 10.0.0.1:= mode=tcp"
	first := (&layout{}).next(mustParse(t, narrow), true)
	grown := first.next(mustParse(t, wide), true)
	for _, c := range []struct {
		name string
		*layout
		why  error
		want ListeningStatus
	}{
		{"no wide range", first, nil, ListeningStatus{Sockets: 22}},
		{"steered", (&layout{}).next(mustParse(t, wide), true), nil, ListeningStatus{Sockets: 4, Steered: 1000}},
		{"no right", (&layout{}).next(mustParse(t, wide), false), unix.EPERM, ListeningStatus{Sockets: 2002, Beside: 1000, Reason: steer.Reason(unix.EPERM)}},
		{"a range that has grown", grown, nil, ListeningStatus{Sockets: 24, Steered: 990, Beside: 10, Reason: "a port that stays over a reload keeps its socket until the next start"}},
		{"one that has shrunk", grown.next(mustParse(t, ":2005-2014 -> 10.0.0.1:= mode=tcp"), true), nil, ListeningStatus{Sockets: 12, Steered: 5}},
	} {
		if got := c.status(2, c.why); *got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, *got, c.want)
		}
	}
}

// TestAnchorsThatMoveAreTold apart from those that end: where the address has another one.
func TestAnchorsThatMoveAreTold(t *testing.T) {
	before := (&layout{}).next(mustParse(t, ":2000-2999 -> 10.0.0.1:= mode=tcp; 192.0.2.1:4000-4999 -> 10.0.0.1:= mode=tcp"), true)
	one := netip.MustParseAddr("192.0.2.1")
	for _, c := range []struct {
		text string
		want []endpoint
	}{
		{":2000-2500 -> 10.0.0.1:= mode=tcp; 192.0.2.1:4000-4999 -> 10.0.0.1:= mode=tcp", nil},
		{":2001-2999 -> 10.0.0.1:= mode=tcp", []endpoint{{port: 2000}}},
		{"192.0.2.1:5000-5999 -> 10.0.0.1:= mode=tcp", []endpoint{{one, 4000}}},
		{":443 -> 10.0.0.1:1 mode=tcp", nil},
	} {
		if got := before.next(mustParse(t, c.text), true).moved(before); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v move, want %v", c.text, got, c.want)
		}
	}
}

// TestSteeredPortHasItsOwnRules: those that a socket of its own would serve; and those of the generation before until
// whoever was on his way has arrived.
func TestSteeredPortHasItsOwnRules(t *testing.T) {
	g := &Gateway{log: zap.NewNop(), house: newGatehouse()}
	g.keeper = newKeeper(g)
	t.Cleanup(g.keeper.close)
	m := mustParse(t, ":2000-2999 -> 10.0.0.1:= mode=pass; :2100-2199 a.test -> 10.0.0.2:= mode=pass; :3000-3099 -> 10.0.0.3:= mode=tcp; :2150 a.b.test -> 10.0.0.4:1 mode=pass")
	gen := g.newGeneration(&config.Config{Map: m}, nil)
	l := (&layout{}).next(m, true)
	w := gen.wideRules(l, netip.Addr{})
	if len(w.spans) != 6 {
		t.Errorf("%d spans, want 6: %v", len(w.spans), w.spans)
	}
	for port := range uint16(4000) {
		at, rules := w.at(port)
		if port < 2000 || port > 3099 {
			if rules != nil {
				t.Fatalf("port %d is served", port)
			}
			continue
		}
		if want := gen.port(netip.Addr{}, port); at != gen || rules.rules != want.rules || rules.plain != want.plain || rules.first != want.first {
			t.Fatalf("port %d serves %+v, want %+v", port, rules, want)
		}
	}
	less := mustParse(t, ":2000-2063 -> 10.0.0.1:= mode=tcp")
	later := g.newGeneration(&config.Config{Map: less}, gen)
	now := later.wideRules(l.next(less, true), netip.Addr{})
	now.before = w
	if at, rules := now.at(2010); at != later || rules.plain == nil {
		t.Error("a port that stays serves what it did")
	}
	if at, rules := now.at(2500); at != gen || rules == nil {
		t.Error("a port that was taken out does not serve those on their way")
	}
}
