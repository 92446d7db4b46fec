// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"testing"
)

// crowd is a loop with so many connections, the newest of which was accepted at n.
func crowd(n int) *loop {
	l := &loop{conns: map[*conn]struct{}{}, now: int64(n)}
	ln := &listener{name: ":443"}
	for i := range n {
		c := &conn{loop: l, stage: relaying}
		c.report = report{id: uint64(i), accepted: int64(i + 1), listen: ln, peer: netip.MustParseAddrPort("192.0.2.1:1234"), sni: "api.bank.example"}
		l.conns[c] = struct{}{}
	}
	return l
}

func TestNewestConnectionsComeFirst(t *testing.T) {
	all := crowd(glance).newest(10)
	if len(all) != 10 {
		t.Fatalf("%d connections, want 10", len(all))
	}
	for i, c := range all {
		if want := int64(glance - i); c.began != want {
			t.Errorf("the %d-th was accepted at %d, want %d", i, c.began, want)
		}
	}
}

// However many connections a loop has, it doesn't look at all of them while the others wait.
func TestGlanceIsBounded(t *testing.T) {
	if n := len(crowd(3 * glance).newest(3 * glance)); n != glance {
		t.Errorf("the loop looked at %d connections, want %d", n, glance)
	}
}

// How long the loop's other connections wait when the admin page is looked at.
func BenchmarkGlance(b *testing.B) {
	l := crowd(20_000)
	for b.Loop() {
		l.newest(100)
	}
}
