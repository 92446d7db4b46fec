// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// TestDNSLeadsToThisMachineOnlyWhereTheMapSaysSo: loopback, link-local, unspecified, multicast and broadcast addresses are
// refused in every form, whoever gives them, and the others are used.
func TestDNSLeadsToThisMachineOnlyWhereTheMapSaysSo(t *testing.T) {
	good := []string{"10.0.0.1", "192.168.0.1", "203.0.113.9", "fd00::1", "2001:db8::1"}
	loopback := []string{"127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"}
	never := []string{"0.0.0.0", "0.1.2.3", "::", "169.254.169.254", "::ffff:169.254.1.1", "fe80::1", "224.0.0.1", "239.1.1.1", "ff02::1", "ff0e::1",
		"255.255.255.255", "240.0.0.1", "::127.0.0.1", "::10.0.0.1", "::ffff:0.0.0.0"}
	every := slices.Concat(good, loopback, never)
	for _, c := range []struct {
		backend, option string
		own             bool
		want            []string
	}{
		{"app.example:80", "", false, good},
		{"localhost.example:80", "", false, good},
		{"test.example:80", "resolve-to=network", false, good},
		{"app.example:80", "resolve-to=any", false, every},
		{"app.example:80", "", true, every}, // of the hosts file
		{"localhost:80", "", false, slices.Concat(good, loopback)},
		{"app.localhost:80", "", false, slices.Concat(good, loopback)},
		{"app.test:80", "", false, slices.Concat(good, loopback)},
		{"srv:_x._tcp.app.example", "", false, good},
		{"srv:_x._tcp.app.example", "", true, good}, // the records' target is of the hosts file
		{"srv:_x._tcp.app.example", "resolve-to=any", false, every},
	} {
		k := chooser(t, ":1 -> "+c.backend+" mode=tcp "+c.option)
		b := k.route.backends[0]
		l := lead{weight: 1, port: 80, own: c.own}
		for _, a := range every {
			l.addrs = append(l.addrs, netip.MustParseAddr(a).Unmap())
		}
		if b.name.srv {
			l.target = "localhost."
		}
		b.name.leads.Store(&[]lead{l})
		k.route.choose()
		var got, want []string
		for _, s := range k.servers() {
			got = append(got, s.addr.Addr().String())
		}
		for _, a := range c.want {
			want = append(want, netip.MustParseAddr(a).Unmap().String())
		}
		slices.Sort(got)
		slices.Sort(want)
		if want = slices.Compact(want); !slices.Equal(slices.Compact(got), want) {
			t.Errorf("%s %s, of hosts: %v: connects to %v, want %v", c.backend, c.option, c.own, got, want)
		}
		if said := k.route.refusals(); (said == "") != (len(c.want) == len(every)) {
			t.Errorf("%s %s: %q is said", c.backend, c.option, said)
		}
		b.name.leads.Store(&[]lead{{weight: 1, port: 80, addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}})
		if k.route.choose(); strings.Contains(k.route.refusals(), "refuses") {
			t.Errorf("%s: it goes on refusing what is not there any more", c.backend)
		}
	}
}
