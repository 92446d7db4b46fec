// SPDX-License-Identifier: Apache-2.0

// Package sni reads what a TLS client says before anything is encrypted: its
// ClientHello (RFC 8446, section 4.1.2; RFC 5246, section 7.4.1.2).
//
// Everything that has arrived is handed in again with each call, so nothing is
// lost for whoever takes the connection next:
//
//	var (
//		parser sni.Parser
//		hello  sni.Hello
//		sent   []byte
//		buf    [4096]byte
//	)
//	for {
//		n, err := conn.Read(buf[:])
//		sent = append(sent, buf[:n]...)
//		switch perr := parser.Parse(sent, &hello); {
//		case perr == nil:
//			fmt.Println(hello.ServerName, hello.ALPN, hello.JA4())
//			return
//		case perr != sni.ErrMore:
//			return perr // an *sni.Error: which field, where, and the alert to answer with
//		case err != nil:
//			return err
//		}
//	}
//
// It takes and refuses the same messages as crypto/tls, and finds the same
// values in them; where it is stricter, [Parser] says so.
//
// It does no I/O and has no clock: deadlines, and how many bytes to hold, are
// the caller's. It does not decide whether a name is served, does not fold its
// case, does not decrypt an Encrypted ClientHello (the outer name is what it
// reports), and knows nothing of QUIC, DTLS or SSLv2.
package sni

import (
	"fmt"
	"slices"
)

// Hello is a ClientHello. The caller reuses it: [Parser.Parse] overwrites it and
// keeps the capacity of its slices, which stay valid until the next Parse.
// The strings and the arrays are copies, never parts of the bytes parsed.
type Hello struct {
	// ServerName is the host name exactly as sent, "" if none was (RFC 6066,
	// section 3). Its case, its bytes and its length are the client's choice:
	// [Hello.HostName] is what may be looked up, logged and passed on.
	ServerName string

	// RootDot is where the dot at the end of ServerName stands in the bytes given
	// to Parse, 0 if there is none. RFC 6066 forbids it, browsers send it.
	RootDot int

	// ALPN has the protocols in the client's order of preference (RFC 7301).
	ALPN []string

	// LegacyVersion is the version field of the message itself: 0x0303 from
	// every TLS 1.3 client. MaxVersion is what one wants to know.
	LegacyVersion uint16

	// Random is the client's nonce: the key log's name for the connection.
	Random [32]byte

	// SessionIDLen is the length of legacy_session_id: 0 to 32 bytes.
	SessionIDLen int

	// Code points in wire order, GREASE (RFC 8701) included; see [IsGREASE]. Of
	// these lists and of ALPN the first MaxListed values are kept.
	CipherSuites     []uint16
	Extensions       []uint16
	Versions         []uint16 // supported_versions; empty when not sent
	Groups           []uint16 // supported_groups
	KeyShares        []uint16 // the groups a key is sent for
	SignatureSchemes []uint16 // signature_algorithms

	SessionTicket bool // a TLS 1.2 ticket is presented (an empty extension only asks for one)
	PSK           bool // pre_shared_key: a TLS 1.3 resumption, or an external key
	EarlyData     bool // early_data: application data follows at once
	ECH           bool // encrypted_client_hello: real, or GREASE, nobody can tell

	formerName string // the ServerName before, so that a repeated one is not allocated again
}

// Extension types that are looked into (IANA "TLS ExtensionType Values").
const (
	extServerName          = 0
	extStatusRequest       = 5
	extSupportedGroups     = 10
	extECPointFormats      = 11
	extSignatureAlgorithms = 13
	extALPN                = 16
	extSCT                 = 18
	extExtendedMaster      = 23
	extSessionTicket       = 35
	extPreSharedKey        = 41
	extEarlyData           = 42
	extSupportedVersions   = 43
	extCookie              = 44
	extPSKModes            = 45
	extSignatureAlgsCert   = 50
	extKeyShare            = 51
	extECH                 = 0xfe0d
	extRenegotiationInfo   = 0xff01
)

// IsGREASE reports whether v is one of the sixteen values that clients send to
// keep servers tolerant, and that mean nothing (RFC 8701, section 2): 0x0a0a, 0x1a1a … 0xfafa.
func IsGREASE(v uint16) bool { return v&0x0f0f == 0x0a0a && v>>8 == v&0xff }

// MaxVersion is the highest version the client offers, 0x0304 for TLS 1.3:
// of supported_versions if it was sent, else LegacyVersion (RFC 8446, section
// 4.2.1). GREASE does not count; it is 0 if nothing else was offered.
func (h *Hello) MaxVersion() uint16 {
	if len(h.Versions) == 0 {
		return h.LegacyVersion
	}
	highest := uint16(0)
	for _, v := range h.Versions {
		if v > highest && !IsGREASE(v) {
			highest = v
		}
	}
	return highest
}

// HasExtension reports whether the client sent the extension of that type.
func (h *Hello) HasExtension(id uint16) bool { return slices.Contains(h.Extensions, id) }

// Resumes reports whether the client tries to resume a session that has a
// ticket: a certificate and a full handshake may not be needed.
func (h *Hello) Resumes() bool { return h.SessionTicket || h.PSK }

// MaxListed is how many values of a list are kept. Browsers send some 20 of
// each, and OpenSSL 1.0 sent 110 cipher suites; a hostile hello has room for
// 32,000. All of them are checked, but nobody has to sort, hash or compare
// more than these.
const MaxListed = 256

// reset forgets everything but the memory that the next hello can use.
func (h *Hello) reset() {
	former := h.formerName
	if h.ServerName != "" {
		former = h.ServerName
	}
	*h = Hello{
		ALPN:             emptied(h.ALPN),
		CipherSuites:     emptied(h.CipherSuites),
		Extensions:       emptied(h.Extensions),
		Versions:         emptied(h.Versions),
		Groups:           emptied(h.Groups),
		KeyShares:        emptied(h.KeyShares),
		SignatureSchemes: emptied(h.SignatureSchemes),
		formerName:       former,
	}
}

func emptied[T any](s []T) []T { return s[:0] }

// Reasons that several fields share.
const (
	cutShort  = "is cut short"
	isEmpty   = "is empty"
	oddLength = "is not a list of 2-byte values"
	leftOver  = "has bytes left over"
)

// maxSessionID is the longest legacy_session_id (RFC 8446, section 4.1.2; RFC 5246, section 7.4.1.2).
const maxSessionID = 32

// decode fills h from a whole handshake message, its header of 4 bytes
// included. On an error h has what was read until then, and the error's Offset
// is the capacity that was left: see wire.
func (h *Hello) decode(m wire) *Error {
	h.reset()
	body, ok := m[4:], false
	if h.LegacyVersion, ok = body.u16(); !ok {
		return malformed("legacy_version", body, cutShort)
	}
	random, ok := body.take(len(h.Random))
	if !ok {
		return malformed("random", body, cutShort)
	}
	copy(h.Random[:], random)
	at := body
	id, ok := body.vec8()
	if !ok {
		return malformed("legacy_session_id", body, cutShort)
	}
	if h.SessionIDLen = len(id); len(id) > maxSessionID {
		return malformed("legacy_session_id", at, fmt.Sprintf("has %d bytes, more than %d", len(id), maxSessionID))
	}
	suites, ok := body.vec16()
	if reason := codes(suites, ok); reason != "" {
		return malformed("cipher_suites", body, reason)
	}
	h.CipherSuites = suites.append16(h.CipherSuites)
	if _, ok = body.vec8(); !ok {
		return malformed("legacy_compression_methods", body, cutShort)
	}
	if len(body) == 0 {
		return nil // before TLS 1.2 there need not be extensions
	}
	extensions, ok := body.vec16()
	if !ok {
		return malformed("extensions", body, cutShort)
	}
	if len(body) > 0 {
		return malformed("client_hello", body, leftOver)
	}
	return h.decodeExtensions(extensions)
}

func (h *Hello) decodeExtensions(rest wire) *Error {
	var (
		seen codeSet
		ech  wire
	)
	for len(rest) > 0 {
		start := rest
		id, ok := rest.u16()
		if !ok {
			return malformed("extensions", start, cutShort)
		}
		data, ok := rest.vec16()
		if !ok {
			return malformed(extensionName(id), start, cutShort)
		}
		if !seen.add(id) {
			return malformed(extensionName(id), start, "comes a second time")
		}
		if id == extPreSharedKey && len(rest) > 0 {
			e := malformed(extensionName(id), start, "is not the last extension")
			e.Alert = alertIllegalParameter // RFC 8446, section 4.2.11; crypto/tls has decode_error
			return e
		}
		h.Extensions = appendListed(h.Extensions, id)
		if id == extECH {
			h.ECH, ech = true, data
		} else if reason := h.decodeExtension(id, data); reason != "" {
			return malformed(extensionName(id), data, reason)
		}
	}
	// As crypto/tls: a hello is first read as a whole, then its ECH is looked at.
	if len(ech) > 0 {
		return checkECH(ech)
	}
	return nil
}

// decodeExtension reads one extension's data and says what is wrong with it,
// "" if nothing is.
func (h *Hello) decodeExtension(id uint16, data wire) (reason string) {
	switch id {
	case extServerName:
		reason = h.serverName(&data)
	case extStatusRequest:
		reason = statusRequest(&data)
	case extSupportedGroups:
		h.Groups, reason = codes16(h.Groups, &data)
	case extECPointFormats:
		reason = nonEmpty(data.vec8())
	case extSignatureAlgorithms:
		h.SignatureSchemes, reason = codes16(h.SignatureSchemes, &data)
	case extALPN:
		reason = h.alpn(&data)
	case extSCT, extExtendedMaster:
		// What is sent with these two must be nothing.
	case extSessionTicket:
		h.SessionTicket = len(data) > 0
		return ""
	case extPreSharedKey:
		h.PSK = true
		reason = preSharedKey(&data)
	case extEarlyData:
		h.EarlyData = true
	case extSupportedVersions:
		h.Versions, reason = codes8(h.Versions, &data)
	case extCookie:
		reason = nonEmpty(data.vec16())
	case extPSKModes, extRenegotiationInfo:
		reason = whole(data.vec8())
	case extSignatureAlgsCert:
		reason = nonEmptyCodes(data.vec16())
	case extKeyShare:
		reason = h.keyShares(&data)
	default:
		return "" // RFC 8446, section 4.1.2: unrecognized extensions are ignored
	}
	if reason == "" && len(data) > 0 {
		return leftOver
	}
	return reason
}

// serverName reads RFC 6066, section 3: at most one host name (type 0); names of
// other types are passed over. The root's dot is noted in RootDot as the
// capacity that is left: see wire.
func (h *Hello) serverName(d *wire) (reason string) {
	list, ok := d.vec16()
	if reason := nonEmpty(list, ok); reason != "" {
		return reason
	}
	for len(list) > 0 {
		kind, _ := list.u8()
		name, ok := list.vec16()
		if reason := nonEmpty(name, ok); reason != "" {
			return "holds a name that " + reason
		}
		if kind != 0 {
			continue
		}
		if h.ServerName != "" {
			return "holds two host names"
		}
		if h.ServerName = h.formerName; h.ServerName != string(name) {
			h.ServerName = string(name)
		}
		if last := name[len(name)-1:]; last[0] == '.' {
			h.RootDot = cap(last)
		}
	}
	return ""
}

// alpn reads RFC 7301, section 3.1.
func (h *Hello) alpn(d *wire) (reason string) {
	list, ok := d.vec16()
	if reason := nonEmpty(list, ok); reason != "" {
		return reason
	}
	former := h.ALPN[:cap(h.ALPN)]
	for len(list) > 0 {
		proto, ok := list.vec8()
		if reason := nonEmpty(proto, ok); reason != "" {
			return "holds a protocol that " + reason
		}
		if len(h.ALPN) == MaxListed {
			continue
		}
		name := knownProtocol(proto)
		if i := len(h.ALPN); name == "" && i < len(former) && former[i] == string(proto) {
			name = former[i]
		} else if name == "" {
			name = string(proto)
		}
		h.ALPN = append(h.ALPN, name)
	}
	return ""
}

// knownProtocols are common enough to save their allocation, the most common first.
var knownProtocols = [...]string{
	"h2", "http/1.1", "http/1.0", "postgresql", "acme-tls/1", "mqtt", "tds/8.0", "dot", "imap", "pop3", "ftp",
	"xmpp-client", "xmpp-server", "h3",
}

// knownProtocol returns the constant that equals b, "" if none does.
func knownProtocol(b []byte) string {
	for _, known := range knownProtocols {
		if known == string(b) {
			return known
		}
	}
	return ""
}

// statusRequest reads RFC 6066, section 8.
func statusRequest(d *wire) (reason string) {
	if _, ok := d.u8(); !ok {
		return cutShort
	}
	if _, ok := d.vec16(); !ok {
		return cutShort
	}
	return whole(d.vec16())
}

// codes8 and codes16 append a list of 2-byte values that may not be empty and
// has a length of one byte (supported_versions: RFC 8446, section 4.2.1) or of
// two (supported_groups, signature_algorithms: sections 4.2.7, 4.2.3).
func codes8(dst []uint16, d *wire) (_ []uint16, reason string) {
	list, ok := d.vec8()
	if reason = nonEmptyCodes(list, ok); reason == "" {
		dst = list.append16(dst)
	}
	return dst, reason
}

func codes16(dst []uint16, d *wire) (_ []uint16, reason string) {
	list, ok := d.vec16()
	if reason = nonEmptyCodes(list, ok); reason == "" {
		dst = list.append16(dst)
	}
	return dst, reason
}

// keyShares reads RFC 8446, section 4.2.8. The list may be empty (the client
// asks for a HelloRetryRequest), a key may not.
func (h *Hello) keyShares(d *wire) (reason string) {
	list, ok := d.vec16()
	if !ok {
		return cutShort
	}
	for len(list) > 0 {
		group, ok := list.u16()
		if !ok {
			return cutShort
		}
		key, ok := list.vec16()
		if reason := nonEmpty(key, ok); reason != "" {
			return "holds a key that " + reason
		}
		h.KeyShares = appendListed(h.KeyShares, group)
	}
	return ""
}

// preSharedKey reads RFC 8446, section 4.2.11: identities with the age of their
// ticket, then binders.
func preSharedKey(d *wire) (reason string) {
	identities, ok := d.vec16()
	if reason := nonEmpty(identities, ok); reason != "" {
		return reason
	}
	for len(identities) > 0 {
		identity, ok := identities.vec16()
		if _, aged := identities.take(4); !aged || !ok || len(identity) == 0 {
			return "holds an identity that is empty or cut short"
		}
	}
	binders, ok := d.vec16()
	if reason := nonEmpty(binders, ok); reason != "" {
		return reason
	}
	for len(binders) > 0 {
		binder, ok := binders.vec8()
		if reason := nonEmpty(binder, ok); reason != "" {
			return "holds a binder that " + reason
		}
	}
	return ""
}

// checkECH holds an encrypted_client_hello to its shape (RFC 9849, section 5):
// type inner is nothing more, type outer is a cipher suite, a config id, and two vectors.
func checkECH(data wire) *Error {
	const outer, inner = 0, 1
	d := data
	switch kind, _ := d.u8(); kind {
	case inner:
		if len(d) > 0 {
			return malformed(extensionName(extECH), data, leftOver)
		}
		return nil
	case outer:
		_, suite := d.take(5)
		_, enc := d.vec16()
		if _, payload := d.vec16(); !suite || !enc || !payload {
			return malformed(extensionName(extECH), data, cutShort)
		}
		return nil
	}
	e := malformed(extensionName(extECH), data, "is of a type that is neither outer nor inner")
	e.Alert = alertIllegalParameter
	return e
}

// wire is what is left to read. All the wires cut from one message end their
// capacity where the message does, so that cap alone tells how far a reader
// came, and no offset is carried along.
type wire []byte

func (w *wire) take(n int) (wire, bool) {
	if len(*w) < n {
		return nil, false
	}
	taken := (*w)[:n]
	*w = (*w)[n:]
	return taken, true
}

func (w *wire) u8() (uint8, bool) {
	if len(*w) < 1 {
		return 0, false
	}
	v := (*w)[0]
	*w = (*w)[1:]
	return v, true
}

func (w *wire) u16() (uint16, bool) {
	if len(*w) < 2 {
		return 0, false
	}
	v := uint16((*w)[0])<<8 | uint16((*w)[1])
	*w = (*w)[2:]
	return v, true
}

// vec8 takes a vector<0..2^8-1>: a length of one byte, then as many bytes
// (RFC 8446, section 3.4). If it is cut short, nothing is taken.
func (w *wire) vec8() (wire, bool) {
	if len(*w) < 1 || len(*w)-1 < int((*w)[0]) {
		return nil, false
	}
	end := 1 + int((*w)[0])
	taken := (*w)[1:end]
	*w = (*w)[end:]
	return taken, true
}

// vec16 takes a vector<0..2^16-1>: a length of two bytes, then as many bytes.
// If it is cut short, nothing is taken.
func (w *wire) vec16() (wire, bool) {
	if len(*w) < 2 {
		return nil, false
	}
	end := 2 + (int((*w)[0])<<8 | int((*w)[1]))
	if len(*w) < end {
		return nil, false
	}
	taken := (*w)[2:end]
	*w = (*w)[end:]
	return taken, true
}

// appendListed appends v, if there is room for it in a list.
func appendListed(dst []uint16, v uint16) []uint16 {
	if len(dst) == MaxListed {
		return dst
	}
	return append(dst, v)
}

// append16 appends w as 2-byte values, as far as there is room for them.
func (w wire) append16(dst []uint16) []uint16 {
	w = w[:min(len(w), 2*(MaxListed-len(dst)))]
	dst = slices.Grow(dst, len(w)/2)
	for ; len(w) >= 2; w = w[2:] {
		dst = append(dst, uint16(w[0])<<8|uint16(w[1]))
	}
	return dst
}

// These turn what vec8 and vec16 return into what is wrong with it: nothing, if
// it is whole; if it is nonEmpty; if it is a list of 2-byte codes; if it is both.
func whole(_ wire, ok bool) (reason string) {
	if !ok {
		return cutShort
	}
	return ""
}

func nonEmpty(w wire, ok bool) (reason string) {
	switch {
	case !ok:
		return cutShort
	case len(w) == 0:
		return isEmpty
	}
	return ""
}

func codes(w wire, ok bool) (reason string) {
	switch {
	case !ok:
		return cutShort
	case len(w)%2 != 0:
		return oddLength
	}
	return ""
}

func nonEmptyCodes(w wire, ok bool) (reason string) {
	if reason := nonEmpty(w, ok); reason != "" {
		return reason
	}
	return codes(w, ok)
}

// codeSet is a set of code points that stays on the stack for every hello an
// honest client sends: one word for the types below 64, where nearly all of
// them are, and a handful of others. Only beyond that does it take 8 KiB, so
// that a hello of 16,000 extensions still costs linear time.
type codeSet struct {
	low   uint64
	count int
	few   [16]uint16
	many  *[1 << 16 / 64]uint64
}

// add puts id into the set; false if it was there.
func (s *codeSet) add(id uint16) bool {
	if id < 64 {
		fresh := s.low&(1<<id) == 0
		s.low |= 1 << id
		return fresh
	}
	if s.many == nil && s.count < len(s.few) {
		return s.addFew(id)
	}
	return s.addMany(id)
}

func (s *codeSet) addFew(id uint16) bool {
	if slices.Contains(s.few[:s.count], id) {
		return false
	}
	s.few[s.count] = id
	s.count++
	return true
}

func (s *codeSet) addMany(id uint16) bool {
	if s.many == nil {
		s.many = new([1 << 16 / 64]uint64)
		for _, v := range s.few {
			s.many[v/64] |= 1 << (v % 64)
		}
	}
	fresh := s.many[id/64]&(1<<(id%64)) == 0
	s.many[id/64] |= 1 << (id % 64)
	return fresh
}

// extensionName is the name in the IANA registry, for errors.
func extensionName(id uint16) string {
	switch id {
	case extServerName:
		return "server_name"
	case extStatusRequest:
		return "status_request"
	case extSupportedGroups:
		return "supported_groups"
	case extECPointFormats:
		return "ec_point_formats"
	case extSignatureAlgorithms:
		return "signature_algorithms"
	case extALPN:
		return "application_layer_protocol_negotiation"
	case extSCT:
		return "signed_certificate_timestamp"
	case extExtendedMaster:
		return "extended_master_secret"
	case extSessionTicket:
		return "session_ticket"
	case extPreSharedKey:
		return "pre_shared_key"
	case extEarlyData:
		return "early_data"
	case extSupportedVersions:
		return "supported_versions"
	case extCookie:
		return "cookie"
	case extPSKModes:
		return "psk_key_exchange_modes"
	case extSignatureAlgsCert:
		return "signature_algorithms_cert"
	case extKeyShare:
		return "key_share"
	case extECH:
		return "encrypted_client_hello"
	case extRenegotiationInfo:
		return "renegotiation_info"
	}
	return fmt.Sprintf("extension %d", id)
}
