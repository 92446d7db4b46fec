// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"strconv"
	"strings"
)

// TLVOptions are the options about the TLVs of a PROXY header of version 2 that a load balancer sends: what it knows of
// a client beyond its address.
type TLVOptions struct {
	Forward, Log *TLVTypes // nil: none
}

// TLVTypes is a set of TLV types (PROXY protocol, section 2.2). A nil set has none.
type TLVTypes [4]uint64

// Types of the vendors, out of the range for their own use (PROXY protocol, section 2.2.8).
const (
	TLVGCP   = 0xE0 // Google Cloud: the id of a Private Service Connect connection
	TLVAWS   = 0xEA // AWS: the id of a VPC endpoint
	TLVAzure = 0xEE // Azure: the id of a private endpoint's link
)

// Types of the protocol's own that a sender writes anew, or that say nothing (section 2.2).
const (
	tlvALPN      = 0x01
	tlvAuthority = 0x02
	tlvCRC32C    = 0x03
	tlvNoop      = 0x04
	tlvUniqueID  = 0x05
	tlvSSL       = 0x20
)

// tlvWords are the types that have a name, by type.
var tlvWords = []struct {
	kind uint8
	word string
}{{TLVGCP, "gcp"}, {TLVAWS, "aws"}, {TLVAzure, "azure"}}

// tlvSlips are other names of them, in lower case.
var tlvSlips = map[string]string{
	"aws": "aws", "amazon": "aws", "vpce": "aws", "vpc": "aws", "gcp": "gcp", "google": "gcp", "psc": "gcp", "gce": "gcp", "azure": "azure", "microsoft": "azure", "privatelink": "azure", "linkid": "azure",
}

// ownTLVs are the types that the gateway writes itself, and those that are about one header only.
var ownTLVs = map[uint8]string{
	tlvALPN: "ALPN", tlvAuthority: "AUTHORITY", tlvCRC32C: "CRC32C", tlvNoop: "NOOP", tlvUniqueID: "UNIQUE_ID", tlvSSL: "SSL",
}

// emptyTLVs are the types that tell nothing of a client.
var emptyTLVs = map[uint8]string{tlvCRC32C: "CRC32C", tlvNoop: "NOOP"}

// Has reports whether the type is in the set.
func (s *TLVTypes) Has(kind uint8) bool { return s != nil && s[kind>>6]&(1<<(kind&63)) != 0 }

func (s *TLVTypes) add(kind uint8) { s[kind>>6] |= 1 << (kind & 63) }

// Union returns the types that are in one of the two, nil if there are none.
func (s *TLVTypes) Union(other *TLVTypes) *TLVTypes {
	switch {
	case s == nil:
		return other
	case other == nil:
		return s
	}
	both := *s
	for i := range both {
		both[i] |= other[i]
	}
	return &both
}

// allTLVs are all types but those.
func allTLVs(but map[uint8]string) (s TLVTypes) {
	for kind := range 256 {
		if _, ok := but[uint8(kind)]; !ok {
			s.add(uint8(kind))
		}
	}
	return s
}

// tlvTypes is the row of an option whose value is a list of types. None of never may be in it.
func tlvTypes(row option, never map[uint8]string, why string, field func(*Options) **TLVTypes) option {
	all := allTLVs(never)
	row.value = "aws|gcp|azure|0xNN,…|all|off"
	row.set = func(p *parser, o *Options, v token) { *field(o) = p.tlvTypes(v, &all, never, why) }
	row.show = func(o *Options) string {
		if s := *field(o); s != nil && *s == all {
			return "all"
		}
		return (*field(o)).String()
	}
	return row
}

var tlvOptions = []option{
	tlvTypes(option{key: "forward-tlvs", def: "off", uses: forwarded, header: true,
		help: "TLVs of the load balancer's PROXY header that backends get as well: ids of AWS VPC endpoints, Google PSC connections, Azure private links, or any by number (default off)",
	}, ownTLVs, "the gateway writes what it knows itself", func(o *Options) **TLVTypes { return &o.TLVs.Forward }),
	tlvTypes(option{key: "log-tlvs", def: "off", uses: forwarded | demo,
		help: "TLVs of the load balancer's PROXY header that the log has: aws_vpce, gcp_psc, azure_link_id, others in hexadecimal as tlv_0xNN (default off)",
	}, emptyTLVs, "it says nothing of the client", func(o *Options) **TLVTypes { return &o.TLVs.Log }),
}

// String returns the types as the map writes them, in the order of their numbers.
func (s *TLVTypes) String() string {
	var words []string
	for kind := range 256 {
		if s.Has(uint8(kind)) {
			words = append(words, tlvWord(uint8(kind)))
		}
	}
	return orOff(len(words) == 0, strings.Join(words, ","))
}

func tlvWord(kind uint8) string {
	for _, w := range tlvWords {
		if w.kind == kind {
			return w.word
		}
	}
	return fmt.Sprintf("0x%02x", kind)
}

// tlvTypes reads a list of types.
func (p *parser) tlvTypes(v token, all *TLVTypes, never map[uint8]string, why string) *TLVTypes {
	switch v.text {
	case "off":
		return nil
	case "all":
		return all
	}
	s := &TLVTypes{}
	for at, item := 0, ""; at <= len(v.text); at += len(item) + 1 {
		item, _, _ = strings.Cut(v.text[at:], ",")
		t := v.sub(at, at+len(item))
		kind, ok := p.tlvType(t)
		name, refused := never[kind]
		switch {
		case !ok:
			return s
		case refused:
			p.fault(t, quote(item)+" is "+name+": "+why, "remove it")
		case s.Has(kind):
			p.fault(t, quote(item)+" stands twice", "write it once")
		}
		s.add(kind)
	}
	return s
}

// tlvType reads a name, or a number as the protocol writes it.
func (p *parser) tlvType(t token) (uint8, bool) {
	for _, w := range tlvWords {
		if w.word == t.text {
			return w.kind, true
		}
	}
	n, err := strconv.ParseUint(t.text, 0, 8)
	if err == nil && !strings.Contains(t.text, "_") && (t.text[0] != '0' || len(t.text) == 1 || t.text[1]|0x20 == 'x') {
		return uint8(n), true
	}
	const hint = "write aws, gcp, azure, or a number from 0x00 to 0xff"
	slip := tlvSlips[strings.ToLower(t.text)]
	switch {
	case t.text == "":
		p.fault(t, "a type of the list is empty", "write types with one comma between them: aws,0xe4")
	case t.text == "all" || t.text == "off":
		p.fault(t, t.text+" stands beside types", "write it alone, or remove it")
	case slip != "":
		p.fault(t, quote(t.text)+" is not a type of TLV", "did you mean "+slip+"?")
	default:
		p.fault(t, quote(t.text)+" is not a type of TLV", hint)
	}
	return 0, false
}
