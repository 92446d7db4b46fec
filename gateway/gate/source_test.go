// SPDX-License-Identifier: Apache-2.0

package gate_test

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/gate"
)

// stranger is the i-th of many different addresses.
func stranger(i int) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], 0x2001_0db8_0000_0000+uint64(i))
	return netip.AddrFrom16(b)
}

func TestSourceOfIPv6IsItsNetwork(t *testing.T) {
	c := gate.NewConns(100)
	key := func(s string) uint64 { return c.Key(1, netip.MustParseAddr(s)) }
	if key("2001:db8::1") != key("2001:db8::ffff:1") || key("2001:db8::1") == key("2001:db8:0:1::1") {
		t.Error("a /64 is not one source")
	}
	if key("192.0.2.1") == key("192.0.2.2") || key("192.0.2.1") != key("::ffff:192.0.2.1") || key("::") == key("0.0.0.0") {
		t.Error("an IPv4 address is not one source")
	}
	if c.Key(1, stranger(1)) == c.Key(2, stranger(1)) {
		t.Error("scopes count together")
	}
	if got := gate.Prefix64(netip.MustParseAddr("fe80::1:2%e")).String() + gate.Prefix64(netip.MustParseAddr("::ffff:192.0.2.1")).String(); got != "fe80::/64192.0.2.1/32" {
		t.Error(got)
	}
}

// TestConnsAgreesWithACount holds the table against a map, as full as it gets.
func TestConnsAgreesWithACount(t *testing.T) {
	const most, limit = 4096, 3
	c := gate.NewConns(most)
	type held struct {
		who  int
		slot uint32
	}
	var open []held
	count := map[int]int{}
	wrong := 0
	for i := range 200_000 {
		if len(open) == 0 || len(open) < most && i%5 != 0 {
			who := (i * 7919) % 3000
			slot, ok := c.Enter(c.Key(0, stranger(who)), limit)
			if ok != (count[who] < limit) {
				wrong++
			}
			if ok {
				count[who]++
				open = append(open, held{who, slot})
			}
			continue
		}
		at := (i * 31) % len(open)
		c.Leave(open[at].slot)
		count[open[at].who]--
		open[at] = open[len(open)-1]
		open = open[:len(open)-1]
	}
	if wrong > 200_000/1000 {
		t.Errorf("%d of 200000 answers are wrong", wrong)
	}
	for _, h := range open {
		c.Leave(h.slot)
	}
	if u := c.Usage(); u.Entries != 0 {
		t.Errorf("%+v after everybody has left", u)
	}
}

// TestConnsHoldBetweenLoops: many at once do not get more than the limit, and none is lost.
func TestConnsHoldBetweenLoops(t *testing.T) {
	const limit, loops = 10, 4
	c := gate.NewConns(1000)
	key := c.Key(0, stranger(1))
	slot, ok := c.Enter(key, limit) // the first one makes the entry
	if !ok {
		t.Fatal("the first one is refused")
	}
	var in, most atomic.Int64
	in.Store(1)
	var loop sync.WaitGroup
	for range loops {
		loop.Go(func() {
			for range 20_000 {
				slot, ok := c.Enter(key, limit)
				if !ok {
					continue
				}
				if n := in.Add(1); n > most.Load() {
					most.Store(n)
				}
				runtime.Gosched()
				in.Add(-1)
				c.Leave(slot)
			}
		})
	}
	loop.Wait()
	c.Leave(slot)
	if most.Load() > limit || c.Usage().Entries != 0 {
		t.Errorf("%d at once, %+v left", most.Load(), c.Usage())
	}
}

func TestRateIsWhatItSays(t *testing.T) {
	for _, r := range []gate.Rate{{1, time.Second}, {20, time.Second}, {7, time.Minute}, {10_000, time.Second}} {
		table := gate.NewRates()
		key := table.Key(0, stranger(1))
		now, passed := int64(12345), 0
		for range 10 * r.N { // a burst
			if table.Take(key, now, r) {
				passed++
			}
		}
		if passed != r.N {
			t.Errorf("%v: %d at once", r, passed)
		}
		passed = 0
		for range 50 * r.N { // five times the rate, for ten times its period
			now += int64(r.Per) / int64(5*r.N)
			if table.Take(key, now, r) {
				passed++
			}
		}
		if passed < 10*r.N-1 || passed > 10*r.N+1 {
			t.Errorf("%v: %d in ten times the period", r, passed)
		}
	}
}

// TestNobodyCrowdsHimselfOut: a source at its limit stays at its limit, however many other addresses come by and fill the
// table.
func TestNobodyCrowdsHimselfOut(t *testing.T) {
	table := gate.NewRates()
	r := gate.Rate{N: 5, Per: time.Minute}
	now := int64(time.Hour)
	const attackers = 100
	for a := range attackers {
		for table.Take(table.Key(0, stranger(-1-a)), now, r) {
		}
	}
	for i := range 1_000_000 {
		table.Take(table.Key(0, stranger(i)), now, r)
	}
	for a := range attackers {
		if table.Take(table.Key(0, stranger(-1-a)), now, r) {
			t.Errorf("source %d has its rate back", a)
		}
	}
	now += int64(2 * r.Per)
	if !table.Take(table.Key(0, stranger(-1)), now, r) {
		t.Error("a source that has paid is refused")
	}
}

// TestAMillionAddressesGrowNothing: tables take what they take from the beginning.
func TestAMillionAddressesGrowNothing(t *testing.T) {
	rates, conns := gate.NewRates(), gate.NewConns(10_000)
	r := gate.Rate{N: 100, Per: time.Second}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range 1_000_000 {
		a := stranger(i)
		rates.Take(rates.Key(0, a), int64(i)*1000, r)
		if slot, ok := conns.Enter(conns.Key(0, a), 10); ok {
			conns.Leave(slot)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.Mallocs - before.Mallocs; n > 100 { // of the test's own surroundings
		t.Errorf("%d allocations", n)
	}
	if u := rates.Usage(1_000_000 * 1000); u.Entries > u.Limit || u.Bytes != 4<<20 {
		t.Errorf("%+v", u)
	}
	if u := conns.Usage(); u.Entries != 0 || u.Bytes > 16*2*10_000 {
		t.Errorf("%+v", u)
	}
}

// TestPaceForgetsSilence: whoever was quiet does not catch up on all of it.
func TestPaceForgetsSilence(t *testing.T) {
	const p = gate.Pace(1_000_000)
	paid, now := int64(0), int64(time.Hour)
	if n := p.Room(&paid, now, false); n < 99_000 || n > 101_000 {
		t.Errorf("room for %d bytes", n)
	}
	p.Spend(&paid, 100_000)
	if n := p.Room(&paid, now, false); n != 0 {
		t.Errorf("room for %d bytes more", n)
	}
	if n := p.Room(&paid, now+int64(time.Minute), true); n < 990_000 || n > 1_010_000 {
		t.Errorf("room for %d bytes, after a minute's sleep of the loop", n)
	}
}

func BenchmarkSources(b *testing.B) {
	rates, conns := gate.NewRates(), gate.NewConns(100_000)
	r := gate.Rate{N: 100, Per: time.Second}
	b.Run("rates", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			rates.Take(rates.Key(1, stranger(i&0xffff)), int64(i)*1000, r)
		}
	})
	b.Run("conns", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if slot, ok := conns.Enter(conns.Key(1, stranger(i&0xffff)), 10); ok {
				conns.Leave(slot)
			}
		}
	})
}

// TestPaceIsExact: whatever the rate, and however late a stream is woken, it carries what it may, and no burst shows.
func TestPaceIsExact(t *testing.T) {
	for _, p := range []gate.Pace{1000, 50_000, 1_000_000, 125_000_000, 10_000_000_000} {
		var now, paid, moved int64 = 1 << 40, 0, 0
		began := now
		for now-began < int64(10*time.Second) {
			n := p.Room(&paid, now, now > began)
			if n == 0 {
				if due := p.Due(paid); due <= now {
					t.Fatalf("%d: nothing may move and it is due", p)
				}
				now = p.Due(paid) + int64(300*time.Millisecond) // a tick and a very busy machine later
				continue
			}
			n = min(n, 256<<10)
			p.Spend(&paid, n)
			moved += int64(n)
		}
		if share := float64(moved) / (10 * float64(p)); share < 0.95 || share > 1.2 || p > 10_000 && share > 1.05 {
			t.Errorf("%d bytes/s: %.3f of it", p, share)
		}
	}
}
