// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/ktls"
	"github.com/tlsnat/tlsnat/natmap"
)

// chooser is a connection of a gateway that never started: it can choose a backend, and not connect.
func chooser(t testing.TB, rule string) *conn {
	t.Helper()
	m, err := natmap.Parse(natmap.Source{Name: "test", Text: rule})
	if err != nil {
		t.Fatal(err)
	}
	g := &Gateway{started: time.Now(), log: zap.NewNop(), house: newGatehouse(), kernel: &ktls.Support{}}
	g.keeper = newKeeper(g)
	t.Cleanup(g.keeper.close)
	gen := g.newGeneration(&config.Config{Map: m}, nil)
	g.current.Store(gen)
	c := &conn{loop: &loop{gw: g}, route: gen.routes[m.Rules[0]]}
	c.report.listen = &listener{port: m.Rules[0].Listen.Lo}
	c.report.source = netip.MustParseAddrPort("192.0.2.1:1")
	return c
}

func (c *conn) servers() (all []*server) {
	c.route.eachServer(func(_ *backend, s *server) { all = append(all, s) })
	return all
}

// choose picks as a connection does, and holds what it got.
func (c *conn) chooseServer() *server {
	from := c.route.choices.Load()
	s, _, _ := from.primary[c.route.pick(c, from)].fit(c)
	return s
}

const picks = 100_000

// distribution is how many of 100,000 connections each server gets, none of which ends when they are held.
func (c *conn) distribution(hold bool) map[*server]int {
	got := map[*server]int{}
	for i := range picks {
		c.report.source = clientNumber(i)
		s := c.chooseServer()
		got[s]++
		if hold {
			s.open.Add(1)
		}
	}
	return got
}

// clientNumber is one of many addresses, as they are handed out: in a row.
func clientNumber(i int) netip.AddrPort {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], 10<<24+uint32(i))
	return netip.AddrPortFrom(netip.AddrFrom4(a), uint16(i))
}

func TestConnectionsFollowTheWeights(t *testing.T) {
	const four = ":1 -> 10.0.0.1:1/weight=5 10.0.0.2:1/weight=3 10.0.0.3:1 10.0.0.4:1 mode=tcp balance="
	for _, balance := range []string{"round-robin", "least-conn", "random", "source-hash"} {
		for _, without := range []int{-1, 0, 2} {
			t.Run(fmt.Sprint(balance, without), func(t *testing.T) {
				c := chooser(t, four+balance)
				weights, total, servers := []float64{5, 3, 1, 1}, 10.0, c.servers()
				if without >= 0 {
					servers[without].state.Or(isDown)
					total -= weights[without]
					weights[without] = 0
				}
				got := c.distribution(balance == "least-conn" || balance == "random")
				for i, s := range servers {
					want := picks * weights[i] / total
					if math.Abs(float64(got[s])-want) > 0.02*want {
						t.Errorf("%s got %d, want %.0f give or take 2 %%", s.name, got[s], want)
					}
				}
			})
		}
	}
}

// TestLeastConnIsEven: with connections that stay nobody is ever more than two ahead of his share, or behind it.
func TestLeastConnIsEven(t *testing.T) {
	c := chooser(t, ":1 -> 10.0.0.1:1/weight=3 10.0.0.2:1 10.0.0.3:1 mode=tcp balance=least-conn")
	servers := c.servers()
	for n := 1; n <= 5000; n++ {
		c.chooseServer().open.Add(1)
		for i, w := range []float64{3, 1, 1} {
			if ahead := float64(servers[i].open.Load()) - float64(n)*w/5; math.Abs(ahead) > 2 {
				t.Fatalf("after %d connections %s is %.1f ahead", n, servers[i].name, ahead)
			}
		}
	}
}

// TestTwoChoicesAreNearlyEven: the gap between the fullest of n and the mean is log log n and a constant, however many
// connections there are (Berenbrink et al., "Balanced allocations: the heavily loaded case"); of one choice by chance
// it would be hundreds.
func TestTwoChoicesAreNearlyEven(t *testing.T) {
	rule := ":1 ->"
	const n = 16
	for i := range n {
		rule += fmt.Sprintf(" 10.0.0.%d:1", i+1)
	}
	c := chooser(t, rule+" mode=tcp balance=random")
	got := c.distribution(true)
	most := 0
	for _, k := range got {
		most = max(most, k)
	}
	if gap := float64(most) - picks/float64(n); gap > math.Log2(math.Log2(n))+8 {
		t.Errorf("the fullest is %.0f ahead of the mean", gap)
	}
}

// TestSourceHashMovesOnlyWhoMust: of n backends one leaves, and its clients move, and no others; when it's back they are.
func TestSourceHashMovesOnlyWhoMust(t *testing.T) {
	const n = 8
	rule := ":1 ->"
	for i := range n {
		rule += fmt.Sprintf(" 10.0.0.%d:1", i+1)
	}
	c := chooser(t, rule+" mode=tcp balance=source-hash")
	where := func() []*server {
		all := make([]*server, picks)
		for i := range all {
			c.report.source = clientNumber(i)
			all[i] = c.chooseServer()
		}
		return all
	}
	gone := c.servers()[3]
	before := where()
	gone.state.Or(isDraining)
	during := where()
	gone.state.And(^isDraining)
	moved := 0
	for i := range before {
		if before[i] != during[i] {
			if moved++; before[i] != gone {
				t.Fatalf("a client of %s moved, and %s left", before[i].name, gone.name)
			}
		}
	}
	if limit := 1.02 * picks / n; moved == 0 || float64(moved) > limit {
		t.Errorf("%d of %d clients moved, want at most %.0f", moved, picks, limit)
	}
	if !slices.Equal(before, where()) {
		t.Error("not all clients are back where they were")
	}
}

// TestSourceHashKnowsANetworkOfIPv6: privacy extensions change the lower half.
func TestSourceHashKnowsANetworkOfIPv6(t *testing.T) {
	c := chooser(t, ":1 -> 10.0.0.1:1 10.0.0.2:1 10.0.0.3:1 mode=tcp balance=source-hash")
	at := func(s string) *server {
		c.report.source = netip.AddrPortFrom(netip.MustParseAddr(s), 1)
		return c.chooseServer()
	}
	seen := map[*server]bool{}
	for i := range 64 {
		one, other := at(fmt.Sprintf("2001:db8:0:%x::1", i)), at(fmt.Sprintf("2001:db8:0:%x:a:b:c:d", i))
		if one != other {
			t.Fatalf("two addresses of one network go to %s and %s", one.name, other.name)
		}
		seen[one] = true
	}
	if len(seen) != 3 {
		t.Errorf("64 networks go to %d of 3 backends", len(seen))
	}
}

func TestFirstFillsOneAfterTheOther(t *testing.T) {
	c := chooser(t, ":1 -> 10.0.0.1:1 10.0.0.2:1 10.0.0.3:1 mode=tcp balance=first max-conns=2")
	got := ""
	for range 6 {
		s := c.chooseServer()
		got += s.name[len("10.0.0.") : len("10.0.0.")+1]
		s.open.Add(1)
	}
	if got != "112233" {
		t.Errorf("they are filled in the order %s", got)
	}
}

// TestSlowStartGrowsWithTime: after half of its time a backend that is back gets half of its share.
func TestSlowStartGrowsWithTime(t *testing.T) {
	for _, balance := range []string{"round-robin", "source-hash"} {
		c := chooser(t, ":1 -> 10.0.0.1:1 10.0.0.2:1 mode=tcp slow-start=10s balance="+balance)
		back := c.servers()[0]
		back.state.Or(isWarming)
		for _, at := range []struct{ elapsed, part float64 }{{0, 0.05}, {0.5, 0.5}, {1, 1}} {
			c.loop.now = int64(at.elapsed * 10e9)
			got := float64(c.distribution(false)[back]) / picks
			want := at.part / (1 + at.part) // the other has its full share
			if balance == "round-robin" {
				want = at.part / 2 // its own turns, as many as it takes
			}
			if math.Abs(got-want) > 0.01 {
				t.Errorf("%s: after %.0f %% of the time it gets %.3f of the connections, want %.3f", balance, 100*at.elapsed, got, want)
			}
		}
	}
}

func TestChoosingAllocatesNothing(t *testing.T) {
	for _, balance := range []string{"round-robin", "least-conn", "random", "source-hash", "first"} {
		c := chooser(t, ":1 -> 10.0.0.1:1 10.0.0.2:1/weight=2 10.0.0.3:1 mode=tcp max-conns=100 balance="+balance)
		c.servers()[0].state.Or(isEjected)
		c.chooseServer()
		if n := testing.AllocsPerRun(100, func() { c.chooseServer() }); n != 0 {
			t.Errorf("%s: %v allocations", balance, n)
		}
	}
}

// TestWeightsOfRecordsAreBounded: SRV records have weights up to 65535, and the order of turns has room for them.
func TestWeightsOfRecordsAreBounded(t *testing.T) {
	c := chooser(t, ":1 -> srv:_x._tcp.app.test/weight=256 mode=tcp")
	n := c.loop.gw.keeper.name("_x._tcp.app.test", true)
	var leads []lead
	for i := range 40 {
		leads = append(leads, lead{addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}, port: 80, weight: 65535 - 1000*i, priority: uint16(i / 20)})
	}
	n.leads.Store(&leads)
	c.route.choose()
	from := c.route.choices.Load()
	if len(from.primary) != 20 || len(from.backup) != 20 || len(from.turns) > 1<<14 {
		t.Errorf("%d primary, %d backup spots, a round of %d", len(from.primary), len(from.backup), len(from.turns))
	}
}

func BenchmarkChoose(b *testing.B) {
	for _, balance := range []string{"round-robin", "least-conn", "random", "source-hash"} {
		b.Run(balance, func(b *testing.B) {
			c := chooser(b, ":1 -> 10.0.0.1:1 10.0.0.2:1 10.0.0.3:1 10.0.0.4:1 mode=tcp balance="+balance)
			for b.Loop() {
				c.chooseServer()
			}
		})
	}
}

// TestNamesThatMoveLeaveNothingBehind: a cloud's names lead to new addresses every minute, and nobody reloads for it.
func TestNamesThatMoveLeaveNothingBehind(t *testing.T) {
	c := chooser(t, ":1 -> app.test:80 mode=tcp\n:2 -> 10.0.0.1:80 mode=tcp")
	k := c.loop.gw.keeper
	n := k.name("app.test", false)
	k.adopt(c.loop.gw.current.Load())
	move := func(last byte) {
		k.mu.Lock()
		defer k.mu.Unlock()
		n.leads.Store(&[]lead{{addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, last})}, weight: 1}})
		k.moved(n, true)
	}
	move(1) // where another rule leads as well
	move(2)
	gone := c.servers()[0]
	if !gone.refused(1) {
		t.Fatal("not ejected")
	}
	k.ejected(gone, c.route.trial(nil, gone), "it is gone")
	gone.open.Add(1)
	move(3)
	if k.servers[serverKey{addr: gone.addr}] != gone {
		t.Error("a server is forgotten that has a connection")
	}
	gone.open.Add(-1)
	for last := byte(4); last < 100; last++ {
		move(last)
	}
	if len(k.servers) != 2 {
		t.Errorf("%d servers are known, and the map leads to 2", len(k.servers))
	}
	if !gone.probe.Stopped() {
		t.Error("an address that nobody leads to is tried for ever")
	}
	if k.servers[serverKey{addr: netip.MustParseAddrPort("10.0.0.1:80")}] == nil {
		t.Error("a server of the other rule is forgotten")
	}
}

// TestSlowStartEndsAfterAReload that makes it longer, and after the server was away again.
func TestSlowStartEndsAfterAReload(t *testing.T) {
	c := chooser(t, ":1 -> 10.0.0.1:1 mode=tcp slow-start=20ms")
	g, s := c.loop.gw, c.servers()[0]
	k := g.keeper
	k.adopt(g.current.Load())
	m, err := natmap.Parse(natmap.Source{Name: "test", Text: ":1 -> 10.0.0.1:1 mode=tcp slow-start=40ms"})
	if err != nil {
		t.Fatal(err)
	}
	warm := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.warm(s)
	}
	warm()
	gen := g.newGeneration(&config.Config{Map: m}, g.current.Load())
	g.current.Store(gen)
	k.adopt(gen)
	for range 2 {
		for deadline := time.Now().Add(10 * time.Second); s.state.Load()&isWarming != 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("its slow start has no end")
			}
		}
		if age := time.Since(g.started) - time.Duration(s.since.Load()); age < 40*time.Millisecond {
			t.Errorf("its slow start was over after %v", age)
		}
		warm()
	}
}

// TestOrdersHaveABound: what is beyond it changes nothing, and ready makes room.
func TestOrdersHaveABound(t *testing.T) {
	c := chooser(t, ":1-20000 -> 10.0.0.1:1-20000 mode=tcp")
	g := c.loop.gw
	addr := func(i int) string { return fmt.Sprintf("10.0.0.1:%d", i+1) }
	drained := 0
	var err error
	for err == nil {
		if _, err = g.OrderBackend(addr(drained), DrainBackend); err == nil {
			drained++
		}
	}
	if !errors.Is(err, ErrOrders) || drained != maxMarks-1 {
		t.Fatalf("%d orders, then %v", drained, err)
	}
	drains := func(i int) bool {
		for _, s := range c.servers() {
			if s.name == addr(i) {
				return s.state.Load()&isDraining != 0
			}
		}
		return false
	}
	if drains(drained) || !drains(drained-1) {
		t.Errorf("the last order: %v, the one too many: %v", drains(drained-1), drains(drained))
	}
	if _, err := g.OrderBackend(addr(0), ReadyBackend); err != nil || drains(0) {
		t.Errorf("%v, it drains: %v", err, drains(0))
	}
	if _, err := g.OrderBackend(addr(drained), DrainBackend); err != nil || !drains(drained) {
		t.Errorf("%v, it drains: %v", err, drains(drained))
	}
}

// TestNamesWaitForDNSTogether: a server that does not answer holds a reload up once, however many names are asked for.
func TestNamesWaitForDNSTogether(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	var rules strings.Builder
	for i := range 70 { // more than are asked for at once, twice
		fmt.Fprintf(&rules, ":%d -> n%d.test:80 mode=tcp\n", i+1, i)
	}
	gen := chooser(t, rules.String()).loop.gw.current.Load()
	gen.config.Settings = config.Settings{Resolver: silent.LocalAddr().String()}
	began := time.Now()
	if problems := gen.resolve(t.Context()); len(problems) != 70 {
		t.Errorf("%d problems, of 70 names", len(problems))
	}
	if took := time.Since(began); took > firstLookups+3*time.Second {
		t.Errorf("names were waited for over %v", took)
	}
}
