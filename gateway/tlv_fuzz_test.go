// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/pires/go-proxyproto"
	"go.uber.org/zap/zapcore"

	"github.com/tlsnat/tlsnat/natmap"
)

// FuzzTLVs: those of the types that are forwarded come out of the backend's header as they came in with the load
// balancer's, in the same order, up to the limit; all others do not, and what the log is told fits in JSON's ASCII.
func FuzzTLVs(f *testing.F) {
	f.Fuzz(func(t *testing.T, area []byte, forward, log uint64, family uint8) {
		if len(area) > 3000 {
			return
		}
		types := natmap.TLVOptions{Forward: scattered(forward), Log: scattered(log)}
		for _, own := range []byte{1, 2, 3, 4, 5, 0x20} { // as the map refuses them
			types.Forward[own>>6] &^= 1 << (own & 63)
		}
		wanted := types.Forward.Union(types.Log)
		kept := keepTLVs(headerAround(t, area, family), wanted)
		want, dropped := wantedTLVs(area, wanted)
		if kept == nil {
			kept = &tlvs{}
		}
		if !bytes.Equal(kept.raw, slices.Concat(want...)) || kept.dropped != dropped || len(kept.raw) > tlvLimit {
			t.Fatalf("%x and %d dropped, want %x and %d", kept.raw, kept.dropped, want, dropped)
		}
		r := &route{proxy: natmap.ProxyV2, rule: &natmap.Rule{Options: natmap.Options{TLVs: types}}}
		here := netip.MustParseAddrPort("192.0.2.1:443")
		c := &conn{route: r, dial: &dialling{backend: &backend{}}, report: report{sni: "edge.test", source: here, target: here, tlvs: kept}}
		want = slices.DeleteFunc(want, func(whole []byte) bool { return !types.Forward.Has(whole[0]) })
		if got := foreignTLVs(t, c); !bytes.Equal(got, slices.Concat(want...)) {
			t.Errorf("out came %x, want %x", got, want)
		}
		for _, field := range kept.fields(r, nil) {
			if field.Type == zapcore.StringType && bytes.ContainsFunc([]byte(field.String), func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '"' }) {
				t.Errorf("the log would have %q", field.String)
			}
		}
	})
}

// scattered is a set of types out of 64 bits: small numbers for mutation to play with, and those of vendors.
func scattered(bits uint64) *natmap.TLVTypes {
	return &natmap.TLVTypes{0: bits, 3: bits<<32 | bits>>32}
}

// headerAround is a header with the area behind its addresses.
func headerAround(t *testing.T, area []byte, family uint8) []byte {
	kinds := []proxyproto.AddressFamilyAndProtocol{proxyproto.TCPv4, proxyproto.TCPv6}
	b := append(slices.Clone(proxyproto.SIGV2), 0x21, byte(kinds[family%2]), 0, 0)
	b = append(b, make([]byte, proxyTLVs[b[13]>>4]-len(b))...)
	b = append(b, area...)
	b[14], b[15] = byte((len(b)-16)>>8), byte(len(b)-16)
	if n, err := proxyHeaderLen(b); n != len(b) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	return b
}

// wantedTLVs reads the area once more, as the protocol has it (section 2.2).
func wantedTLVs(area []byte, types *natmap.TLVTypes) (whole [][]byte, dropped int) {
	size := 0
	for len(area) >= 3 && len(area) >= 3+int(area[1])*256+int(area[2]) {
		n := 3 + int(area[1])*256 + int(area[2])
		if types.Has(area[0]) {
			if size+n > tlvLimit {
				dropped++
			} else {
				whole, size = append(whole, area[:n]), size+n
			}
		}
		area = area[n:]
	}
	return whole, dropped
}

// foreignTLVs are those of the backend's header that the gateway has not written itself.
func foreignTLVs(t *testing.T, c *conn) (all []byte) {
	t.Helper()
	b := wholePreface(t, c)
	if err := checkProxySum(b); err != nil {
		t.Fatal(err)
	}
	h, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(b), len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if a, ok := h.SourceAddr.(*net.TCPAddr); !ok || a.Port != 443 {
		t.Fatalf("from %v", h.SourceAddr)
	}
	list, err := h.TLVs()
	if err != nil {
		t.Fatal(err)
	}
	own := map[proxyproto.PP2Type]int{}
	for _, tlv := range list {
		switch tlv.Type {
		case proxyproto.PP2_TYPE_AUTHORITY, proxyproto.PP2_TYPE_UNIQUE_ID, proxyproto.PP2_TYPE_CRC32C:
			if own[tlv.Type]++; own[tlv.Type] > 1 {
				t.Errorf("twice: %v", tlv)
			}
		default:
			all = append(append(all, byte(tlv.Type), byte(len(tlv.Value)>>8), byte(len(tlv.Value))), tlv.Value...)
		}
	}
	if len(own) != 3 {
		t.Errorf("of the gateway's own there are %v", own)
	}
	return all
}
