// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"
)

// wireConn is a connection whose client has sent all it will, and reads what it
// is answered: tls.Server runs over it to its end, without a goroutine.
type wireConn struct {
	in  *bytes.Reader
	out []byte
}

func (c *wireConn) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c *wireConn) Write(b []byte) (int, error) { c.out = append(c.out, b...); return len(b), nil }
func (c *wireConn) Close() error                { return nil }
func (c *wireConn) LocalAddr() net.Addr         { return &net.TCPAddr{} }
func (c *wireConn) RemoteAddr() net.Addr        { return &net.TCPAddr{} }

func (c *wireConn) SetDeadline(time.Time) error      { return nil }
func (c *wireConn) SetReadDeadline(time.Time) error  { return nil }
func (c *wireConn) SetWriteDeadline(time.Time) error { return nil }

var errSeen = errors.New("the hello was seen")

// verdict is what crypto/tls makes of a client's bytes.
type verdict struct {
	hello *tls.ClientHelloInfo // nil unless it took the hello
	more  bool                 // it ran out of bytes
	alert uint8                // that it refused with, 0 for none
}

func askCryptoTLS(b []byte) (v verdict) {
	conn := &wireConn{in: bytes.NewReader(b)}
	err := tls.Server(conn, &tls.Config{
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			v.hello = hello
			return nil, errSeen
		},
	}).Handshake()
	v.more = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if n := len(conn.out); v.hello == nil && n >= 7 {
		v.alert = conn.out[n-1]
	}
	return v
}

// stricter reports whether e is one of the refusals that Parser's documentation
// names as stricter than crypto/tls.
func stricter(b []byte, e *Error) bool {
	return e.Field == "record version" && b[e.Offset] < 0x10 ||
		e.Field == "record type" && b[e.Offset] == recordTypeAlert ||
		e.Field == "legacy_session_id"
}

// otherAlert reports whether e is one of the refusals for which we know a better alert.
func otherAlert(e *Error) bool {
	switch e.Field {
	case "record type", "record version": // crypto/tls mostly hangs up without a word
		return true
	case "handshake type": // it reads on, and fails to decode the message
		return true
	case "handshake length": // internal_error
		return true
	case "pre_shared_key": // decode_error where it is not the last extension
		return e.Alert == alertIllegalParameter
	}
	return false
}

// checkAgreement holds Parse to what crypto/tls makes of the same bytes. A name
// that ends in a dot, which crypto/tls refuses, is compared with one that ends in
// a letter instead: all else has to be the same.
func checkAgreement(t *testing.T, b []byte) {
	t.Helper()
	var (
		p Parser
		h Hello
	)
	err := p.Parse(b, &h)
	if dot := h.RootDot; dot > 0 {
		if b[dot] != '.' || h.ServerName[len(h.ServerName)-1] != '.' {
			t.Fatalf("byte %d is %q, and no dot of %q", dot, b[dot], h.ServerName)
		}
		b = bytes.Clone(b)
		b[dot] = 'x'
		p, h = Parser{}, Hello{}
		err = p.Parse(b, &h)
	}
	theirs := askCryptoTLS(b)
	refused, isRefused := errors.AsType[*Error](err)
	switch {
	case err == nil:
		if theirs.hello == nil {
			t.Fatalf("accepted; crypto/tls refuses with alert %d, more %v", theirs.alert, theirs.more)
		}
		checkSame(t, &h, theirs.hello)
	case err == ErrMore:
		if !theirs.more {
			t.Fatalf("more is wanted; crypto/tls has decided: hello %v, alert %d", theirs.hello, theirs.alert)
		}
	case !isRefused:
		t.Fatalf("error of type %T: %v", err, err)
	case stricter(b, refused):
	case theirs.hello != nil:
		t.Fatalf("refused, %v; crypto/tls takes it", err)
	case theirs.more: // we know earlier
	case refused.Alert != theirs.alert && !otherAlert(refused):
		t.Fatalf("%v: alert %d, crypto/tls sends %d", err, refused.Alert, theirs.alert)
	}
}

func checkSame(t *testing.T, h *Hello, theirs *tls.ClientHelloInfo) {
	t.Helper()
	if h.ServerName != theirs.ServerName {
		t.Errorf("ServerName = %q, crypto/tls has %q", h.ServerName, theirs.ServerName)
	}
	if !slices.Equal(h.ALPN, listed(theirs.SupportedProtos)) {
		t.Errorf("ALPN = %q, crypto/tls has %q", h.ALPN, theirs.SupportedProtos)
	}
	versions := h.Versions
	if len(versions) == 0 {
		versions = versionsUpTo(h.LegacyVersion)
	}
	sameCodes(t, "Versions", versions, theirs.SupportedVersions)
	sameCodes(t, "CipherSuites", h.CipherSuites, theirs.CipherSuites)
	sameCodes(t, "Groups", h.Groups, theirs.SupportedCurves)
	sameCodes(t, "SignatureSchemes", h.SignatureSchemes, theirs.SignatureSchemes)
	sameCodes(t, "Extensions", h.Extensions, theirs.Extensions)
}

// versionsUpTo is how ClientHelloInfo shows a hello without supported_versions.
func versionsUpTo(highest uint16) (versions []uint16) {
	for v := uint16(tls.VersionTLS13); v >= tls.VersionTLS10; v-- {
		if v <= highest {
			versions = append(versions, v)
		}
	}
	return versions
}

func sameCodes[T ~uint16](t *testing.T, field string, ours []uint16, theirs []T) {
	t.Helper()
	same := slices.EqualFunc(ours, listed(theirs), func(a uint16, b T) bool { return a == uint16(b) })
	if !same {
		t.Errorf("%s = %04x, crypto/tls has %04x", field, ours, theirs)
	}
}

// listed is what we keep of a list.
func listed[T any](list []T) []T { return list[:min(len(list), MaxListed)] }
