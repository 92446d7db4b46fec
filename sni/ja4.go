// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
)

// JA4 names the kind of client, not the client: two hellos of one program have
// the same (FoxIO's JA4, TLS client fingerprint, technical_details/JA4.md).
//
//	t13d1516h2_8daaf6152771_e5627efa2ab1
//	││ │ │ │     │            └ SHA-256 of the extensions, sorted, without SNI and
//	││ │ │ │     │              ALPN, then the signature algorithms as sent
//	││ │ │ │     └ SHA-256 of the cipher suites, sorted
//	││ │ │ └ first and last character of the first ALPN protocol
//	││ │ └ number of cipher suites, number of extensions
//	││ └ d: a server name is given, i: none
//	│└ highest version
//	└ over TCP
//
// GREASE is left out everywhere; both hashes are cut to 12 hex digits. It is of
// what the Hello has: of lists that are longer than MaxListed, which no known
// client sends, the rest has no part in it.
func (h *Hello) JA4() string {
	var room [ja4Len]byte
	return string(h.AppendJA4(room[:0]))
}

const (
	ja4Len     = len("t13d1516h2_8daaf6152771_e5627efa2ab1")
	ja4HashLen = 12 // hex digits

	// ja4Room is how many values are sorted, ja4TextRoom how many bytes are
	// hashed, without allocating. OpenSSL 1.0's hellos had some 110 cipher suites.
	ja4Room     = 128
	ja4TextRoom = ja4Room * len("c02f,")
)

// AppendJA4 appends what JA4 returns, always 36 bytes, to dst. It does not
// allocate if dst has room and the hello is of a usual size.
func (h *Hello) AppendJA4(dst []byte) []byte {
	var (
		suitesRoom, extensionsRoom [ja4Room]uint16
		textRoom                   [ja4TextRoom]byte
	)
	suites := appendReal(suitesRoom[:0], h.CipherSuites)
	extensions := appendReal(extensionsRoom[:0], h.Extensions)
	slices.Sort(suites)
	slices.Sort(extensions)

	dst = append(dst, 't')
	dst = append(dst, ja4Version(h.MaxVersion())...)
	if h.HasExtension(extServerName) {
		dst = append(dst, 'd')
	} else {
		dst = append(dst, 'i')
	}
	dst = appendCount(dst, len(suites))
	dst = appendCount(dst, len(extensions))
	dst = h.appendALPNEnds(dst)

	text := appendCodes(textRoom[:0], suites)
	dst = appendHash(append(dst, '_'), text)

	extensions = slices.DeleteFunc(extensions, func(id uint16) bool { return id == extServerName || id == extALPN })
	text = appendCodes(textRoom[:0], extensions)
	if schemes := appendReal(suitesRoom[:0], h.SignatureSchemes); len(schemes) > 0 {
		text = appendCodes(append(text, '_'), schemes)
	}
	return appendHash(append(dst, '_'), text)
}

// ja4Version has the specification's codes; those of DTLS cannot come over TCP.
func ja4Version(v uint16) string {
	switch v {
	case 0x0304:
		return "13"
	case 0x0303:
		return "12"
	case 0x0302:
		return "11"
	case 0x0301:
		return "10"
	case 0x0300:
		return "s3"
	case 0x0002:
		return "s2"
	}
	return "00"
}

// appendCount appends n in two digits; more than 99 is 99.
func appendCount(dst []byte, n int) []byte {
	n = min(n, 99)
	return append(dst, '0'+byte(n/10), '0'+byte(n%10))
}

// appendALPNEnds appends the first and the last character of the first
// protocol: of its hex form if one of its two ends is no letter or digit.
func (h *Hello) appendALPNEnds(dst []byte) []byte {
	if len(h.ALPN) == 0 || h.ALPN[0] == "" {
		return append(dst, '0', '0')
	}
	const digits = "0123456789abcdef"
	first, last := h.ALPN[0][0], h.ALPN[0][len(h.ALPN[0])-1]
	if !alphanumeric(first) || !alphanumeric(last) {
		first, last = digits[first>>4], digits[last&15]
	}
	return append(dst, first, last)
}

func alphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}

// appendReal appends the values that are not GREASE.
func appendReal(dst, values []uint16) []uint16 {
	for _, v := range values {
		if !IsGREASE(v) {
			dst = append(dst, v)
		}
	}
	return dst
}

// appendCodes appends the values in four hex digits, with commas between them.
func appendCodes(dst []byte, values []uint16) []byte {
	const digits = "0123456789abcdef"
	for i, v := range values {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, digits[v>>12], digits[v>>8&15], digits[v>>4&15], digits[v&15])
	}
	return dst
}

// appendHash appends the short hash of text; zeros for no text at all.
func appendHash(dst, text []byte) []byte {
	if len(text) == 0 {
		return append(dst, "000000000000"...)
	}
	sum := sha256.Sum256(text)
	return hex.AppendEncode(dst, sum[:ja4HashLen/2])
}
