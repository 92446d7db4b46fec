// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// expectation is what a captured hello says, worked out apart from this package.
type expectation struct {
	file       string
	serverName string
	alpn       []string
	maxVersion uint16
	keyShares  []uint16 // without GREASE
	resumes    bool
	ja4        string
}

// chromium-pq has the fingerprint that FoxIO published for a later Chrome
// (python/test/testdata/sigalg-grease.pcapng.json).
var captured = []expectation{
	{"chromium-pq", "edge.example", []string{"h2", "http/1.1"}, 0x0304, []uint16{0x11ec, 0x001d}, false, "t13d1517h2_8daaf6152771_cb7bf5808d99"},
	{"chromium-tls12", "edge.example", []string{"h2", "http/1.1"}, 0x0303, nil, false, "t12d1212h2_d34a8e72043a_0d32fd8a6501"},
	{"curl", "edge.example", []string{"h2", "http/1.1"}, 0x0304, []uint16{0x001d}, false, "t13d3112h2_e8f1e7e78f70_b26ce05bbdd6"},
	{"curl-address", "", []string{"h2", "http/1.1"}, 0x0304, []uint16{0x001d}, false, "t13i3111h2_e8f1e7e78f70_b26ce05bbdd6"},
	{"go-pq", "edge.example", []string{"h2", "http/1.1"}, 0x0304, []uint16{0x11ec, 0x001d}, false, "t13d1312h2_f57a46bbacb6_ab7e3b40a677"},
	{"go-classic", "edge.example", nil, 0x0304, []uint16{0x001d}, false, "t13d131100_f57a46bbacb6_ab7e3b40a677"},
	{"go-psk", "edge.example", nil, 0x0304, []uint16{0x11ec, 0x001d}, true, "t13d131400_f57a46bbacb6_3b244d8fbcc8"},
	{"java", "edge.example", []string{"h2", "http/1.1"}, 0x0304, []uint16{0x001d, 0x0017}, false, "t13d3713h2_db35923f8641_7c76daad20ec"},
	{"node", "edge.example", []string{"http/1.1"}, 0x0304, []uint16{0x001d}, false, "t13d5911h1_a33745022dd6_1f22a2ca17c4"},
	{"openssl", "edge.example", nil, 0x0304, []uint16{0x001d}, false, "t13d311000_e8f1e7e78f70_1f22a2ca17c4"},
	{"openssl-tls13", "edge.example", nil, 0x0304, []uint16{0x001d}, false, "t13d041000_16476d049b0b_78f1d400d464"},
	{"openssl-tls13-ticket", "edge.example", nil, 0x0304, []uint16{0x001d}, true, "t13d041100_16476d049b0b_6775ac8fe30b"},
	{"openssl-tls12", "edge.example", nil, 0x0303, nil, false, "t12d280700_d943125447b4_e7e480e5a997"},
	{"openssl-tls12-ticket", "edge.example", nil, 0x0303, nil, true, "t12d280700_d943125447b4_e7e480e5a997"},
	{"openssl-tls10", "edge.example", nil, 0x0301, nil, false, "t10d230600_44099cda8a52_195413a0cc0f"},
	{"openssl-postgresql", "edge.example", []string{"postgresql"}, 0x0304, []uint16{0x001d}, false, "t13d3111pl_e8f1e7e78f70_1f22a2ca17c4"},
	{"wget-gnutls", "localhost", nil, 0x0304, []uint16{0x0017, 0x001d}, false, "t13d291300_723694b0fccc_899037bd0b8c"},
}

func capture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "hellos", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustParse(t testing.TB, b []byte) *Hello {
	t.Helper()
	var (
		p Parser
		h Hello
	)
	if err := p.Parse(b, &h); err != nil {
		t.Fatal(err)
	}
	return &h
}

func TestEveryCaptureIsExpected(t *testing.T) {
	files, _ := filepath.Glob(filepath.Join("testdata", "hellos", "*.bin"))
	if len(files) != len(captured) {
		t.Errorf("%d files in testdata/hellos, %d expectations", len(files), len(captured))
	}
	readme, err := os.ReadFile(filepath.Join("testdata", "hellos", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !bytes.Contains(readme, []byte("| "+filepath.Base(f)+" |")) {
			t.Errorf("the README does not say where %s comes from", f)
		}
	}
}

func TestHellosOfRealClients(t *testing.T) {
	for _, want := range captured {
		t.Run(want.file, func(t *testing.T) {
			b := capture(t, want.file)
			h := mustParse(t, b)
			if h.ServerName != want.serverName {
				t.Errorf("ServerName = %q, want %q", h.ServerName, want.serverName)
			}
			if !slices.Equal(h.ALPN, want.alpn) {
				t.Errorf("ALPN = %q, want %q", h.ALPN, want.alpn)
			}
			if v := h.MaxVersion(); v != want.maxVersion {
				t.Errorf("MaxVersion() = %04x, want %04x", v, want.maxVersion)
			}
			if shares := appendReal(nil, h.KeyShares); !slices.Equal(shares, want.keyShares) {
				t.Errorf("KeyShares = %04x, want %04x", shares, want.keyShares)
			}
			if h.Resumes() != want.resumes {
				t.Errorf("Resumes() = %v, want %v", h.Resumes(), want.resumes)
			}
			if got := h.JA4(); got != want.ja4 {
				t.Errorf("JA4() = %s, want %s", got, want.ja4)
			}
			if !bytes.Equal(h.Random[:], b[11:43]) {
				t.Errorf("Random = %x, want %x", h.Random, b[11:43])
			}
			checkAgreement(t, b)
		})
	}
}

// TestResumptionIsToldFromAskingForTickets: an empty session_ticket extension
// only asks for one.
func TestResumptionIsToldFromAskingForTickets(t *testing.T) {
	asks, presents := mustParse(t, capture(t, "openssl-tls12")), mustParse(t, capture(t, "openssl-tls12-ticket"))
	if !asks.HasExtension(extSessionTicket) || asks.SessionTicket || asks.Resumes() {
		t.Errorf("asking for a ticket: SessionTicket %v, Resumes %v", asks.SessionTicket, asks.Resumes())
	}
	if !presents.SessionTicket || presents.PSK {
		t.Errorf("presenting a ticket: SessionTicket %v, PSK %v", presents.SessionTicket, presents.PSK)
	}
	if psk := mustParse(t, capture(t, "go-psk")); !psk.PSK || psk.SessionTicket || psk.EarlyData {
		t.Errorf("PSK resumption: %+v", psk)
	}
	if h := mustParse(t, capture(t, "chromium-pq")); !h.ECH || h.SessionIDLen != 32 {
		t.Errorf("Chromium: ECH %v, SessionIDLen %d", h.ECH, h.SessionIDLen)
	}
}

// extension is an extension to build a hello with.
type extension struct {
	id   uint16
	data string
}

// vec8, vec16 and host write what wire.vec8, wire.vec16 and Hello.serverName read.
func vec8(s string) string { return string([]byte{byte(len(s))}) + s }
func vec16(s string) string {
	return string(binary.BigEndian.AppendUint16(nil, uint16(len(s)))) + s
}
func host(name string) extension { return extension{extServerName, vec16("\x00" + vec16(name))} }

// message builds a handshake message: a ClientHello with two cipher suites.
func message(extensions ...extension) []byte {
	var list strings.Builder
	for _, e := range extensions {
		list.WriteString(string(binary.BigEndian.AppendUint16(nil, e.id)) + vec16(e.data))
	}
	return handshake("\x03\x03" + strings.Repeat("R", 32) + vec8("id") +
		vec16("\x13\x01\xc0\x2f") + vec8("\x00") + vec16(list.String()))
}

func handshake(body string) []byte {
	return append([]byte{typeClientHello, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// records frames m in records of at most size bytes.
func records(m []byte, size int) (b []byte) {
	for part := range slices.Chunk(m, size) {
		b = append(b, recordTypeHandshake, 3, 1, byte(len(part)>>8), byte(len(part)))
		b = append(b, part...)
	}
	return b
}

func record(m []byte) []byte { return records(m, maxRecord) }

// TestMalformedHelloNamesTheField has every way in which a message can be wrong.
// Each is held to crypto/tls's opinion too.
func TestMalformedHelloNamesTheField(t *testing.T) {
	versions := func(s string) extension { return extension{extSupportedVersions, vec8(s)} }
	share := vec16("\x00\x1d" + vec16("key"))
	identity, binder := vec16("ticket")+"\x00\x00\x00\x00", vec8("binder")
	cases := []struct {
		field, reason string
		extensions    []extension
	}{
		{"server_name", cutShort, []extension{{extServerName, ""}}},
		{"server_name", isEmpty, []extension{{extServerName, vec16("")}}},
		{"server_name", "holds a name that is empty", []extension{host("")}},
		{"server_name", "holds a name that is cut short", []extension{{extServerName, vec16("\x00\x00\x09a")}}},
		{"server_name", "holds two host names", []extension{{extServerName, vec16("\x00" + vec16("a") + "\x00" + vec16("b"))}}},
		{"server_name", leftOver, []extension{{extServerName, host("a").data + "x"}}},
		{"server_name", "comes a second time", []extension{host("a"), host("a")}},
		{"status_request", cutShort, []extension{{extStatusRequest, ""}}},
		{"status_request", cutShort, []extension{{extStatusRequest, "\x01\x00"}}},
		{"status_request", cutShort, []extension{{extStatusRequest, "\x01\x00\x00\x00"}}},
		{"status_request", leftOver, []extension{{extStatusRequest, "\x01\x00\x00\x00\x00x"}}},
		{"supported_groups", isEmpty, []extension{{extSupportedGroups, vec16("")}}},
		{"supported_groups", oddLength, []extension{{extSupportedGroups, vec16("abc")}}},
		{"supported_groups", cutShort, []extension{{extSupportedGroups, "\x00\x02a"}}},
		{"ec_point_formats", isEmpty, []extension{{extECPointFormats, vec8("")}}},
		{"signature_algorithms", oddLength, []extension{{extSignatureAlgorithms, vec16("abc")}}},
		{"signature_algorithms_cert", isEmpty, []extension{{extSignatureAlgsCert, vec16("")}}},
		{"signature_algorithms_cert", oddLength, []extension{{extSignatureAlgsCert, vec16("abc")}}},
		{"application_layer_protocol_negotiation", isEmpty, []extension{{extALPN, vec16("")}}},
		{"application_layer_protocol_negotiation", "holds a protocol that is empty", []extension{{extALPN, vec16(vec8("h2") + vec8(""))}}},
		{"application_layer_protocol_negotiation", "holds a protocol that is cut short", []extension{{extALPN, vec16("\x09h2")}}},
		{"signed_certificate_timestamp", leftOver, []extension{{extSCT, "x"}}},
		{"extended_master_secret", leftOver, []extension{{extExtendedMaster, "x"}}},
		{"early_data", leftOver, []extension{{extEarlyData, "x"}}},
		{"supported_versions", isEmpty, []extension{versions("")}},
		{"supported_versions", oddLength, []extension{versions("\x03\x04\x03")}},
		{"supported_versions", cutShort, []extension{{extSupportedVersions, "\x02\x03"}}},
		{"cookie", isEmpty, []extension{{extCookie, vec16("")}}},
		{"psk_key_exchange_modes", cutShort, []extension{{extPSKModes, "\x02\x00"}}},
		{"renegotiation_info", cutShort, []extension{{extRenegotiationInfo, ""}}},
		{"key_share", cutShort, []extension{{extKeyShare, "\x00"}}},
		{"key_share", cutShort, []extension{{extKeyShare, vec16("\x00")}}},
		{"key_share", "holds a key that is empty", []extension{{extKeyShare, vec16("\x00\x1d" + vec16(""))}}},
		{"key_share", leftOver, []extension{{extKeyShare, share + "x"}}},
		{"pre_shared_key", isEmpty, []extension{{extPreSharedKey, vec16("")}}},
		{"pre_shared_key", "holds an identity that is empty or cut short", []extension{{extPreSharedKey, vec16(vec16("") + "\x00\x00\x00\x00")}}},
		{"pre_shared_key", "holds an identity that is empty or cut short", []extension{{extPreSharedKey, vec16(vec16("ticket") + "\x00")}}},
		{"pre_shared_key", cutShort, []extension{{extPreSharedKey, vec16(identity)}}},
		{"pre_shared_key", "holds a binder that is empty", []extension{{extPreSharedKey, vec16(identity) + vec16(vec8(""))}}},
		{"pre_shared_key", "is not the last extension", []extension{{extPreSharedKey, vec16(identity) + vec16(binder)}, host("a")}},
		{"encrypted_client_hello", leftOver, []extension{{extECH, "\x01x"}}},
		{"encrypted_client_hello", cutShort, []extension{{extECH, "\x00\x00\x01\x00\x01\x07" + vec16("enc") + "\x00"}}},
		{"encrypted_client_hello", "is of a type that is neither outer nor inner", []extension{{extECH, "\x02"}}},
		{"extension 6666", "comes a second time", []extension{{6666, ""}, {6667, ""}, {6666, ""}}},
	}
	for _, c := range cases {
		t.Run(c.field+" "+c.reason, func(t *testing.T) {
			b := record(message(c.extensions...))
			var (
				p Parser
				h Hello
			)
			e, ok := errors.AsType[*Error](p.Parse(b, &h))
			if !ok {
				t.Fatal("accepted")
			}
			if e.Field != c.field || e.Reason != c.reason {
				t.Errorf("got %v; want %s … %s", e, c.field, c.reason)
			}
			// Two bytes of extensions' length end at 9+2+32+3+6+2+2: no fault is before.
			if e.Offset < 56 || e.Offset > len(b) {
				t.Errorf("offset %d is not within the extensions, 56 to %d", e.Offset, len(b))
			}
			if want := fmt.Sprintf("client hello: %s at byte %d %s", e.Field, e.Offset, e.Reason); e.Error() != want {
				t.Errorf("Error() = %q, want %q", e.Error(), want)
			}
			checkAgreement(t, b)
		})
	}
}

func withSessionID(n int) []byte {
	return record(handshake("\x03\x03" + strings.Repeat("R", 32) + vec8(strings.Repeat("i", n)) + vec16("\x00\x2f") + vec8("\x00")))
}

// TestAlertsOfTheRFC are those where crypto/tls has another one, or none.
func TestAlertsOfTheRFC(t *testing.T) {
	psk := extension{extPreSharedKey, vec16(vec16("ticket")+"\x00\x00\x00\x00") + vec16(vec8("binder"))}
	for name, c := range map[string]struct {
		b     []byte
		alert uint8
	}{
		"pre_shared_key before another": {record(message(psk, host("a"))), alertIllegalParameter},
		"session id of 33 bytes":        {withSessionID(33), alertDecodeError},
		"session id of 255 bytes":       {withSessionID(255), alertDecodeError},
	} {
		var p Parser
		var h Hello
		if e, ok := errors.AsType[*Error](p.Parse(c.b, &h)); !ok || e.Alert != c.alert {
			t.Errorf("%s: %v, want alert %d", name, e, c.alert)
		}
	}
}

// TestTruncatedMessageNamesTheField cuts the message short and mends its lengths:
// the field that is then incomplete is named, at the byte where it starts.
func TestTruncatedMessageNamesTheField(t *testing.T) {
	whole := message(host("a.example"))
	for _, c := range []struct {
		len    int
		field  string
		offset int
	}{
		{4, "legacy_version", 9},
		{5, "legacy_version", 9},
		{20, "random", 11},
		{38, "legacy_session_id", 43},
		{40, "legacy_session_id", 43},
		{43, "cipher_suites", 46},
		{47, "legacy_compression_methods", 52},
		{50, "extensions", 54},
		{60, "extensions", 54},
	} {
		m := slices.Clone(whole[:c.len])
		m[3] = byte(c.len - messageHeaderLen)
		for _, size := range []int{maxRecord, 7} { // and over several records
			b := records(m, size)
			e, ok := errors.AsType[*Error](new(Parser).Parse(b, new(Hello)))
			if !ok || e.Field != c.field || e.Reason != cutShort || e.Alert != alertDecodeError {
				t.Errorf("message of %d bytes: %v, want %s cut short", c.len, e, c.field)
				continue
			}
			want := c.offset
			if size == 7 { // a header of five for every seven bytes before
				want += (c.offset - recordHeaderLen) / size * recordHeaderLen
			}
			if want = min(want, len(b)); e.Offset != want {
				t.Errorf("message of %d bytes in records of %d: offset %d, want %d", c.len, size, e.Offset, want)
			}
			checkAgreement(t, b)
		}
	}
	extended := handshake(string(whole[4:]) + "x")
	if e, _ := errors.AsType[*Error](new(Parser).Parse(record(extended), new(Hello))); e == nil || e.Field != "client_hello" {
		t.Errorf("a byte after the extensions: %v", e)
	}
	checkAgreement(t, record(extended))
}

// TestOddButLegalHellosAreTaken, because crypto/tls takes them.
func TestOddButLegalHellosAreTaken(t *testing.T) {
	many := make([]extension, 1000)
	for i := range many {
		many[i] = extension{uint16(1000 + i), "x"}
	}
	for name, b := range map[string][]byte{
		"no extensions block":       record(handshake("\x03\x01" + strings.Repeat("R", 32) + vec8("") + vec16("\x00\x2f") + vec8("\x00"))),
		"nothing offered":           record(handshake("\x03\x00" + strings.Repeat("R", 32) + vec8("") + vec16("") + vec8(""))),
		"empty extensions":          record(message()),
		"session id of 32 bytes":    withSessionID(32),
		"names of other types":      record(message(extension{extServerName, vec16("\x01" + vec16("x") + "\x00" + vec16("a.example") + "\x07" + vec16("y"))})),
		"only names of other types": record(message(extension{extServerName, vec16("\x01" + vec16("x"))})),
		"name that is no name":      record(message(host("\x00 \xff/"))),
		"upper case":                record(message(host("WWW.Example"))),
		"no key shares":             record(message(extension{extKeyShare, vec16("")})),
		"unknown versions":          record(message(extension{extSupportedVersions, vec8("\x0a\x0a\x7f\x1c")})),
		"early data":                record(message(extension{extEarlyData, ""})),
		"empty ECH":                 record(message(extension{extECH, ""})),
		"inner ECH":                 record(message(extension{extECH, "\x01"})),
		"ECH with bytes over":       record(message(extension{extECH, "\x00\x00\x01\x00\x01\x07" + vec16("") + vec16("") + "x"})),
		"a thousand extensions":     record(message(many...)),
		"record version 3.255":      append([]byte{recordTypeHandshake, 3, 255}, record(message())[3:]...),
		"a message after":           record(append(message(host("a.example")), 11, 0, 0, 0)),
		"start of a message after":  record(append(message(host("a.example")), 16)),
		"a record after":            append(record(message(host("a.example"))), 23, 3, 3, 0, 1, 0),
	} {
		t.Run(name, func(t *testing.T) {
			mustParse(t, b)
			checkAgreement(t, b)
		})
	}
}

func TestMaxVersionIgnoresGREASE(t *testing.T) {
	for _, c := range []struct {
		legacy   uint16
		versions []uint16
		want     uint16
	}{
		{0x0303, nil, 0x0303},
		{0x0301, nil, 0x0301},
		{0x0303, []uint16{0xfafa, 0x0303, 0x0304}, 0x0304},
		{0x0304, []uint16{0x0303}, 0x0303},
		{0x0303, []uint16{0x1a1a}, 0},
	} {
		h := Hello{LegacyVersion: c.legacy, Versions: c.versions}
		if got := h.MaxVersion(); got != c.want {
			t.Errorf("%04x, %04x: MaxVersion() = %04x, want %04x", c.legacy, c.versions, got, c.want)
		}
	}
	count := 0
	for v := range 1 << 16 {
		if IsGREASE(uint16(v)) {
			count++
		}
	}
	if count != 16 || !IsGREASE(0x0a0a) || !IsGREASE(0xfafa) || IsGREASE(0x0a1a) {
		t.Errorf("%d GREASE values, want the 16 of RFC 8701", count)
	}
}

// TestReusedHelloForgets: nothing of one connection is seen on the next, whether
// that one's hello is good, bad or no hello at all.
func TestReusedHelloForgets(t *testing.T) {
	full := record(message(host("secret.example"), extension{extALPN, vec16(vec8("secret"))},
		extension{extEarlyData, ""}, extension{extECH, ""}, extension{extSessionTicket, "t"}))
	empty := record(handshake("\x03\x01" + strings.Repeat("\x00", 32) + vec8("") + vec16("") + vec8("")))
	for name, second := range map[string][]byte{
		"empty hello":  empty,
		"not TLS":      []byte("GET / HTTP/1.1\r\n"),
		"cut short":    record(handshake("\x03")),
		"bad record":   {22, 3, 1, 0, 0},
		"bad messages": {22, 3, 1, 0, 4, 2, 0, 0, 0},
	} {
		h := mustParse(t, full)
		err := new(Parser).Parse(second, h)
		h.formerName = "" // not for the eyes of callers
		h.LegacyVersion = 0
		if want := new(Hello); !reflect.DeepEqual(visible(h), visible(want)) {
			t.Errorf("%s (%v): still has %+v", name, err, h)
		}
	}
	h := mustParse(t, full)
	if err := new(Parser).Parse([]byte{22, 3}, h); err != ErrMore || h.ServerName != "secret.example" {
		t.Errorf("ErrMore (%v) touched the hello", err)
	}
}

// visible makes empty slices nil, so that hellos can be compared.
func visible(h *Hello) Hello {
	v := *h
	v.formerName = ""
	if len(v.ALPN) == 0 {
		v.ALPN = nil
	}
	for _, s := range []*[]uint16{&v.CipherSuites, &v.Extensions, &v.Versions, &v.Groups, &v.KeyShares, &v.SignatureSchemes} {
		if len(*s) == 0 {
			*s = nil
		}
	}
	return v
}

// TestMalformedHelloStillTellsTheName, for the log line of a connection that
// never became a session.
func TestMalformedHelloStillTellsTheName(t *testing.T) {
	var h Hello
	b := record(message(host("a.example"), extension{extALPN, vec16(vec8("h2"))}, extension{extEarlyData, "x"}))
	if err := new(Parser).Parse(b, &h); err == nil {
		t.Fatal("accepted")
	}
	if h.ServerName != "a.example" || !slices.Equal(h.ALPN, []string{"h2"}) {
		t.Errorf("ServerName %q, ALPN %q; want a.example, h2", h.ServerName, h.ALPN)
	}
}

// TestLongListsAreCut: of a list that no honest client sends only the beginning is kept, though all of it is checked. A hostile
// hello costs the caller no more than an honest one, and does not leave its size behind.
func TestLongListsAreCut(t *testing.T) {
	many := strings.Repeat("\x00\x1d", 10000)
	var types []extension
	for i := range 5000 {
		types = append(types, extension{uint16(0x5000 + i), ""})
	}
	h := mustParse(t, record(message(append(types,
		extension{extSupportedGroups, vec16(many)},
		extension{extSignatureAlgorithms, vec16(many)})...)))
	if len(h.Groups) != MaxListed || len(h.SignatureSchemes) != MaxListed || len(h.Extensions) != MaxListed {
		t.Errorf("%d groups, %d schemes, %d extensions; want %d", len(h.Groups), len(h.SignatureSchemes), len(h.Extensions), MaxListed)
	}
	if got := h.JA4(); got[6:8] != "99" {
		t.Errorf("JA4 %s", got)
	}
	if err := new(Parser).Parse(record(message(extension{extALPN, vec16(strings.Repeat(vec8("x"), 10000))})), h); err != nil {
		t.Fatal(err)
	}
	if len(h.ALPN) != MaxListed {
		t.Errorf("%d protocols", len(h.ALPN))
	}
	if err := new(Parser).Parse(capture(t, "curl"), h); err != nil {
		t.Fatal(err)
	}
	if cap(h.ALPN) > 2*MaxListed || cap(h.Groups) > 2*MaxListed {
		t.Errorf("capacity for %d protocols and %d groups stays", cap(h.ALPN), cap(h.Groups))
	}
	for name, bad := range map[string]extension{
		"an odd length behind the end": {extSupportedGroups, vec16(many + "x")},
		"an empty protocol":            {extALPN, vec16(strings.Repeat(vec8("x"), 10000) + vec8(""))},
	} {
		if err := new(Parser).Parse(record(message(bad)), h); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

// TestReusedHelloReadsNewProtocols: a protocol is only taken over from the hello
// before if it is the same.
func TestReusedHelloReadsNewProtocols(t *testing.T) {
	var h Hello
	for _, want := range [][]string{{"one", "h2"}, {"two", "h2", "three"}, {"h2", "two"}, {"two"}} {
		list := ""
		for _, protocol := range want {
			list += vec8(protocol)
		}
		b := record(message(extension{extALPN, vec16(list)}, host(want[0])))
		if err := new(Parser).Parse(b, &h); err != nil || !slices.Equal(h.ALPN, want) || h.ServerName != want[0] {
			t.Errorf("%v, ALPN = %q, ServerName = %q, want %q", err, h.ALPN, h.ServerName, want)
		}
	}
}

// TestAnyExtensionSentTwiceIsRefused, however many there are.
func TestAnyExtensionSentTwiceIsRefused(t *testing.T) {
	several := make([]extension, 60)
	for i := range several {
		several[i].id = uint16(1000 + i)
	}
	for i, e := range several {
		b := record(message(append(slices.Clone(several), e)...))
		refused, ok := errors.AsType[*Error](new(Parser).Parse(b, new(Hello)))
		if want := fmt.Sprintf("extension %d", 1000+i); !ok || refused.Field != want || refused.Offset != len(b)-4 {
			t.Errorf("got %v, want %s at %d", refused, want, len(b)-4)
		}
	}
}

// TestFloodOfExtensionsIsLinear: as many as fit into a hello, all different, and
// the last one twice. Comparing each with each would take seconds.
func TestFloodOfExtensionsIsLinear(t *testing.T) {
	flood := make([]extension, 16000)
	for i := range flood {
		flood[i].id = uint16(100 + i)
	}
	mustParse(t, record(message(flood...)))
	flood = append(flood, flood[len(flood)-1])
	start := time.Now()
	for range 20 {
		e, ok := errors.AsType[*Error](new(Parser).Parse(record(message(flood...)), new(Hello)))
		if !ok || e.Field != "extension 16099" {
			t.Fatalf("got %v, want a second extension 16099", e)
		}
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("20 floods took %v", d)
	}
}
