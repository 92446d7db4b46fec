// SPDX-License-Identifier: Apache-2.0

package gate_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// decide is Decide by its definition: the longest prefix, of two the one that denies, of those the first.
func decide(entries []gate.Entry, otherwise bool, a netip.Addr) gate.Decision {
	a = a.Unmap().WithZone("")
	d, best := gate.Decision{Allow: otherwise}, -1
	for i := range entries {
		e := &entries[i]
		longer := e.Prefix.Bits() > best || e.Prefix.Bits() == best && d.Allow && !e.Allow
		if e.Prefix.Contains(a) && longer {
			best = e.Prefix.Bits()
			d = gate.Decision{Allow: e.Allow, Prefix: e.Prefix, Place: e.Place()}
		}
	}
	return d
}

// entriesOf makes entries of any bytes: prefixes that nest, touch and stand twice are the rule.
func entriesOf(b []byte) (entries []gate.Entry, probes []netip.Addr) {
	for ; len(b) >= 6; b = b[6:] {
		var a netip.Addr
		if b[0]&1 == 0 {
			a = netip.AddrFrom4([4]byte{10, b[1] & 3, b[2], b[3]})
		} else {
			a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, b[1] & 3, 0, 0, b[2], 15: b[3]})
		}
		if b[0]&2 != 0 {
			a = lastOf(a, b[1])
		}
		p, _ := a.Prefix(int(b[4]) % (a.BitLen() + 1))
		entries = append(entries, gate.Entry{Prefix: p, Allow: b[5]&1 != 0, List: "l" + fmt.Sprint(b[5]&6), Line: len(entries) + 1})
		probes = append(probes, a, p.Addr(), p.Addr().Prev(), lastIn(p), lastIn(p).Next())
	}
	return entries, probes
}

// lastOf is an address at the end of its family.
func lastOf(a netip.Addr, low byte) netip.Addr {
	b := a.AsSlice()
	for i := range b {
		b[i] = 0xff
	}
	b[len(b)-1] = low
	a, _ = netip.AddrFromSlice(b)
	return a
}

func lastIn(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func checkSet(t *testing.T, b []byte, otherwise bool) {
	t.Helper()
	entries, probes := entriesOf(b)
	s, _ := gate.NewSet(entries, otherwise)
	for _, a := range append(probes, netip.MustParseAddr("::ffff:10.1.2.3"), netip.MustParseAddr("192.0.2.1"), netip.IPv6Unspecified(), netip.MustParseAddr("fe80::1%e")) {
		if !a.IsValid() {
			continue
		}
		got, want := s.Decide(a), decide(entries, otherwise, a)
		if got != want || s.Allows(a) != want.Allow {
			t.Fatalf("%v: %+v, want %+v; of %+v", a, got, want, entries)
		}
	}
}

// FuzzSet holds the set against its definition.
func FuzzSet(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x03\x08\x00\x00\x01\x02\x03\x10\x01\x00\x01\x02\x03\x20\x00\x01\x01\x02\x03\x40\x00\x03\xff\x02\x03\x80\x01"), true)
	f.Fuzz(func(t *testing.T, b []byte, otherwise bool) { checkSet(t, b[:min(len(b), 600)], otherwise) })
}

func TestSeedsExist(t *testing.T) {
	for _, f := range []string{"FuzzSet", "FuzzReadList"} {
		if seeds, _ := os.ReadDir("testdata/fuzz/" + f); len(seeds) == 0 {
			t.Errorf("testdata/fuzz/%s has no seed", f)
		}
	}
}

func TestLongestPrefixDecides(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 3))
	for range 2000 {
		b := make([]byte, 6*(1+r.IntN(40)))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		checkSet(t, b, r.IntN(2) == 0)
	}
}

func TestDenyWinsOverAllowOfTheSamePrefix(t *testing.T) {
	p := netip.MustParsePrefix("10.0.0.0/8")
	s, conflicts := gate.NewSet([]gate.Entry{{Prefix: p, Allow: true, List: "a", Line: 3}, {Prefix: p, List: "d"}, {Prefix: p, Allow: true, List: "b"}}, true)
	if s.Allows(p.Addr()) || len(conflicts) != 1 || conflicts[0].Allow.Place() != "a:3" || conflicts[0].Deny.Place() != "d" {
		t.Errorf("%+v, conflicts %+v", s.Decide(p.Addr()), conflicts)
	}
}

// manyEntries are as many prefixes as a large block list has, half of them IPv6.
func manyEntries(n int) []gate.Entry {
	r := rand.New(rand.NewPCG(1, 7))
	entries := make([]gate.Entry, n)
	for i := range entries {
		var a netip.Addr
		bits := 16 + r.IntN(17)
		if i%2 == 0 {
			var b [4]byte
			binary.BigEndian.PutUint32(b[:], r.Uint32())
			a = netip.AddrFrom4(b)
		} else {
			b := [16]byte{0x20, 1}
			binary.BigEndian.PutUint32(b[2:], r.Uint32())
			binary.BigEndian.PutUint32(b[6:], r.Uint32())
			a, bits = netip.AddrFrom16(b), 32+r.IntN(33)
		}
		p, _ := a.Prefix(bits)
		entries[i] = gate.Entry{Prefix: p, Allow: r.IntN(4) == 0, List: "list", Line: i + 1}
	}
	return entries
}

func TestLookupAllocatesNothingAndIsCompact(t *testing.T) {
	s, _ := gate.NewSet(manyEntries(100_000), false)
	a := netip.MustParseAddr("2001:db8::7")
	if n := testing.AllocsPerRun(1000, func() { s.Allows(a) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if b := s.Bytes(); b > 40*s.Len() {
		t.Errorf("%d bytes for %d prefixes", b, s.Len())
	}
}

// BenchmarkSet asks for addresses everywhere, so that nothing of the set is in the cache by chance.
func BenchmarkSet(b *testing.B) {
	for _, n := range []int{10, 1000, 50_000, 100_000} {
		s, _ := gate.NewSet(manyEntries(n), false)
		for _, six := range []bool{false, true} {
			r := rand.New(rand.NewPCG(1, 9))
			probes := make([]netip.Addr, 4096)
			for i := range probes {
				probes[i] = netip.AddrFrom4([4]byte{byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), 7})
				if six {
					probes[i] = netip.AddrFrom16([16]byte{0x20, 1, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), 15: 7})
				}
			}
			b.Run(fmt.Sprintf("prefixes=%d/v6=%v", n, six), func(b *testing.B) {
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					s.Allows(probes[i%len(probes)])
					i++
				}
			})
		}
	}
}

func TestListSaysWhatToWrite(t *testing.T) {
	text := "\ufeff# a comment\n10.0.0.0/8 ; as Spamhaus writes it\n\n  2001:db8::/32\r\n::ffff:192.0.2.7 # one\n" +
		"10.0.0.1/8\nbank.example\n192.0.2.0/33\n\tfe80::1%eth0\n::ffff:0.0.0.0/90\n"
	entries, complaints := gate.ReadList("f", text, true)
	want := []string{"10.0.0.0/8 f:2", "2001:db8::/32 f:4", "192.0.2.7/32 f:5"}
	for i, e := range entries {
		if got := e.Prefix.String() + " " + e.Place(); i >= len(want) || got != want[i] || !e.Allow {
			t.Errorf("entry %d: %s", i, got)
		}
	}
	var said []string
	for _, c := range complaints {
		said = append(said, fmt.Sprintf("%d:%d: %s; %s", c.Line, c.Col, c.Msg, c.Hint))
	}
	if got := strings.Join(said, "\n"); got != strings.TrimSpace(`
6:1: "10.0.0.1/8" has bits behind its prefix; write 10.0.0.0/8, or 10.0.0.1 for the address alone
7:1: "bank.example" is not an address or a prefix; write one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32
8:1: "192.0.2.0/33" is not an address or a prefix; write one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32
9:2: "fe80::1%eth0" has a zone; write it without %eth0
10:1: "::ffff:0.0.0.0/90" is more than IPv4; write 0.0.0.0/0 for all of IPv4`) {
		t.Errorf("got:\n%s", got)
	}
}

func TestListIsBounded(t *testing.T) {
	_, complaints := gate.ReadList("f", strings.Repeat("x\n", 1000), false)
	if n := len(complaints); n > 101 {
		t.Errorf("%d complaints", n)
	}
	entries, complaints := gate.ReadList("f", strings.Repeat("1.1.1.1\n", gate.MaxEntries+1), false)
	if len(entries) != gate.MaxEntries || len(complaints) != 1 || complaints[0].Line != gate.MaxEntries+1 {
		t.Errorf("%d entries, %v", len(entries), complaints)
	}
}

// FuzzReadList: what was read prints as a list that reads as the same.
func FuzzReadList(f *testing.F) {
	f.Add("10.0.0.0/8 # x\n2001:db8::1\n;\nfoo")
	f.Fuzz(func(t *testing.T, text string) {
		entries, _ := gate.ReadList("f", text, false)
		var b strings.Builder
		for _, e := range entries {
			fmt.Fprintln(&b, e.Prefix)
		}
		again, complaints := gate.ReadList("f", b.String(), false)
		if len(complaints) > 0 || len(again) != len(entries) {
			t.Fatalf("%q: %v", b.String(), complaints)
		}
		for i := range again {
			if again[i].Prefix != entries[i].Prefix || again[i].Line != i+1 {
				t.Fatalf("%v became %v", entries[i], again[i])
			}
		}
	})
}

// TestMillionPrefixesLoadInTime: read, sorted and made a set of, in about a second. Two are allowed.
func TestMillionPrefixesLoadInTime(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	if raceEnabled {
		t.Skip("times are measured without the race detector")
	}
	var b strings.Builder
	r := rand.New(rand.NewPCG(1, 2))
	for range 1_000_000 {
		a := r.Uint32()
		fmt.Fprintf(&b, "%d.%d.%d.%d/32\n", a>>24, a>>16&255, a>>8&255, a&255)
	}
	text, began := b.String(), time.Now()
	l, complaints := gate.ParseList("block.txt", text)
	parsed := time.Since(began)
	s, _ := gate.Join([]gate.Part{{List: l}}, true)
	t.Logf("parsed in %v, a set made in %v", parsed, time.Since(began)-parsed)
	if took := time.Since(began); len(complaints) > 0 || s.Len() < 999_000 || took > 2*time.Second {
		t.Errorf("%d prefixes in %v, %d complaints", s.Len(), took, len(complaints))
	}
}

// TestKeptListsMakeTheSameSet as entries do.
func TestKeptListsMakeTheSameSet(t *testing.T) {
	const text = "10.0.0.0/8\n 192.0.2.1 # one\n2001:db8::/32\n10.1.0.0/16\n10.1.0.0/16\n\ufeff198.51.100.0/24\n::ffff:203.0.113.9\n"
	l, complaints := gate.ParseList("f", text)
	entries, _ := gate.ReadList("f", text, false)
	if len(complaints) > 0 || l.Len() != len(entries) {
		t.Fatalf("%v, %d and %d", complaints, l.Len(), len(entries))
	}
	single := []gate.Entry{{Prefix: netip.MustParsePrefix("10.1.2.0/24"), Allow: true, List: "map:1"}}
	kept, _ := gate.Join([]gate.Part{{}, {Entries: single}, {List: l}}, true)
	plain, _ := gate.NewSet(append(single, entries...), true)
	for _, a := range []string{"10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1", "192.0.2.2", "198.51.100.7", "203.0.113.9", "2001:db8::1", "2001:db9::1", "0.0.0.0", "255.255.255.255", "::"} {
		if a := netip.MustParseAddr(a); kept.Decide(a) != plain.Decide(a) {
			t.Errorf("%s: %+v and %+v", a, kept.Decide(a), plain.Decide(a))
		}
	}
}
