// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"
	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/natmap"
)

// tlvLimit bounds the TLVs of a load balancer's header that a connection keeps, for as long as it lives: AWS's id takes
// 26 bytes, Google's 11, Azure's 8.
const tlvLimit = 512

// tlvHead is the type and the length before a TLV's value.
const tlvHead = 1 + 2

// tlvs are those of a PROXY header that a rule of the listener asks for, as they came.
type tlvs struct {
	raw     []byte // at most tlvLimit
	dropped int    // for which there was no room
}

// eachTLV calls f with each TLV of b as it stands there, until b is at its end or what follows is none. It returns that.
func eachTLV(b []byte, f func(kind uint8, whole []byte)) (rest []byte) {
	for len(b) >= tlvHead {
		n := tlvHead + int(binary.BigEndian.Uint16(b[1:]))
		if n > len(b) {
			return b
		}
		f(b[0], b[:n])
		b = b[n:]
	}
	return b
}

// keepTLVs takes those of the wanted types out of a header, nil if it has none.
func keepTLVs(header []byte, wanted *natmap.TLVTypes) *tlvs {
	if !bytes.HasPrefix(header, proxyproto.SIGV2) || int(header[13]>>4) >= len(proxyTLVs) {
		return nil
	}
	var t tlvs
	eachTLV(header[min(proxyTLVs[header[13]>>4], len(header)):], func(kind uint8, whole []byte) {
		switch {
		case !wanted.Has(kind):
		case len(t.raw)+len(whole) > tlvLimit:
			t.dropped++
		default:
			t.raw = append(t.raw, whole...)
		}
	})
	if t.raw == nil && t.dropped == 0 {
		return nil
	}
	t.raw = slices.Clip(t.raw)
	return &t
}

// forwarded are those that the backends of a rule get as well.
func (t *tlvs) forwarded(r *route) (list []proxyproto.TLV) {
	types := r.rule.Options.TLVs.Forward
	eachTLV(t.raw, func(kind uint8, whole []byte) {
		if types.Has(kind) {
			list = append(list, proxyproto.TLV{Type: proxyproto.PP2Type(kind), Value: whole[tlvHead:]})
		}
	})
	return list
}

// fields are those that the log of a rule has. Of several of one type the values stand in one field.
func (t *tlvs) fields(r *route, dst []zap.Field) []zap.Field {
	types, first := r.rule.Options.TLVs.Log, len(dst)
	if types == nil {
		return dst
	}
	eachTLV(t.raw, func(kind uint8, whole []byte) {
		if !types.Has(kind) {
			return
		}
		key, value := readTLV(kind, whole[tlvHead:])
		if i := slices.IndexFunc(dst[first:], func(f zap.Field) bool { return f.Key == key }); i >= 0 {
			dst[first+i].String += "," + value
			return
		}
		dst = append(dst, zap.String(key, value))
	})
	if t.dropped > 0 {
		dst = append(dst, zap.Int("tlvs_dropped", t.dropped))
	}
	return dst
}

// readTLV is what the log calls a TLV and its value. What is not as its vendor describes it stands there as it is.
//
//   - AWS (docs.aws.amazon.com/elasticloadbalancing/latest/network, "Proxy protocol"): 0x01 and the endpoint's id
//   - Google Cloud (cloud.google.com/vpc/docs/configure-private-service-connect-producer): 64 bits, the high byte first
//   - Azure (learn.microsoft.com/azure/private-link/private-link-service-overview): 0x01 and 32 bits, the low byte first
func readTLV(kind uint8, value []byte) (key, text string) {
	tlv := proxyproto.TLV{Type: proxyproto.PP2Type(kind), Value: value}
	switch kind {
	case natmap.TLVAWS:
		if id, err := tlvparse.AWSVPCEndpointID(tlv); err == nil && id != "" {
			return "aws_vpce", id
		}
	case natmap.TLVGCP:
		if len(value) == 8 {
			return "gcp_psc", strconv.FormatUint(binary.BigEndian.Uint64(value), 10)
		}
	case natmap.TLVAzure:
		if id, ok := tlvparse.FindAzurePrivateEndpointLinkID([]proxyproto.TLV{tlv}); ok {
			return "azure_link_id", strconv.FormatUint(uint64(id), 10)
		}
	}
	return fmt.Sprintf("tlv_0x%02x", kind), hex.EncodeToString(value)
}

// askTLVs adds what a rule does with TLVs to what its listeners keep of them.
func (is *island) askTLVs(o *natmap.TLVOptions) {
	is.tlvs = is.tlvs.Union(o.Forward).Union(o.Log)
}

// tlvs are those that rules of a port ask for; nil: none.
func (g gates) tlvs(e endpoint) *natmap.TLVTypes {
	var wanted *natmap.TLVTypes
	if every := g.island(netip.Addr{}, e.port); every != nil {
		wanted = every.tlvs
	}
	if own := g.island(e.addr, e.port); own != nil {
		wanted = wanted.Union(own.tlvs)
	}
	return wanted
}
