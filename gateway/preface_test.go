// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/natmap"
)

// TestNoPrefaceIsLost: a header is whole, or an error. There is no third thing that could be taken for "none".
func TestNoPrefaceIsLost(t *testing.T) {
	if b, err := (preface{}).after(0); err == nil {
		t.Errorf("nobody made it, and it is %q", b)
	}
	if b, err := (preface{header: []byte("PROXY"), made: true}).after(6); err == nil {
		t.Errorf("more has gone than there is, and the rest is %q", b)
	}
	some := netip.MustParseAddrPort("192.0.2.1:1")
	for name, c := range map[string]struct {
		version natmap.ProxyVersion
		change  func(r *report)
		want    string
	}{
		"a name that fills the length field":     {natmap.ProxyV2, func(r *report) { r.sni = strings.Repeat("n", 65400) }, "bytes"},
		"a name beyond the length field":         {natmap.ProxyV2, func(r *report) { r.sni = strings.Repeat("n", 70000) }, "PROXY header for the backend"},
		"a name beyond what receivers take":      {natmap.ProxyV2, func(r *report) { r.sni = strings.Repeat("n", 4000) }, "of 4096 at most"},
		"a protocol beyond what receivers take":  {natmap.ProxyV2, func(r *report) { r.negotiated = strings.Repeat("n", 4000) }, "of 4096 at most"},
		"an address that nobody knows":           {natmap.ProxyV2, func(r *report) { r.source = netip.AddrPort{} }, "not known"},
		"an address that nobody knows, in text":  {natmap.ProxyV1, func(r *report) { r.source = netip.AddrPort{} }, "not known"},
		"a destination that nobody knows":        {natmap.ProxyV2, func(r *report) { r.target = netip.AddrPort{} }, "not known"},
		"no header, since the rule does without": {natmap.ProxyOff, func(*report) {}, ""},
		"the longest that a client can cause":    {natmap.ProxyV2, func(r *report) { r.sni, r.negotiated = strings.Repeat("n", 253), strings.Repeat("p", 255) }, ""},
	} {
		r := report{source: some, target: some, version: 0x0304, cipher: 0x1301}
		c.change(&r)
		x := &conn{route: &route{proxy: c.version}, dial: &dialling{backend: &backend{}}, report: r}
		x.client.fd = -1
		p, err := x.preface()
		switch {
		case c.want == "" && (err != nil || !p.made || (len(p.header) > 0) != (c.version != natmap.ProxyOff)):
			t.Errorf("%s: %q, %v", name, p.header, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || p.made || p.header != nil):
			t.Errorf("%s: %d bytes, %v; want an error with %q", name, len(p.header), err, c.want)
		}
	}
}
