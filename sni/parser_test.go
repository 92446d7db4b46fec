// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// TestNotAHelloIsRefusedEarly: each refusal comes with the last byte of what is
// shown here, not later, and with crypto/tls's alert or a better one.
func TestNotAHelloIsRefusedEarly(t *testing.T) {
	for _, c := range []struct {
		name, bytes string
		want        Error
	}{
		{"HTTP", "G", Error{"record type", 0, "is 71 instead of 22, handshake", alertNone}},
		{"SSH", "S", Error{"record type", 0, "is 83 instead of 22, handshake", alertNone}},
		{"PROXY v2", "\r", Error{"record type", 0, "is 13 instead of 22, handshake", alertNone}},
		{"SSLv2", "\x80", Error{"record type", 0, "is that of SSLv2", alertProtocolVersion}},
		{"application data", "\x17", Error{"record type", 0, "is 23 instead of 22, handshake", alertNone}},
		{"alert first", "\x15", Error{"record type", 0, "is 21 instead of 22, handshake", alertUnexpectedMessage}},
		{"version 2.0", "\x16\x02\x00\x00\x01", Error{"record version", 1, "is 2.0 instead of 3.x", alertProtocolVersion}},
		{"version 16.0", "\x16\x10\x00\x00\x01", Error{"record version", 1, "is 16.0 instead of 3.x", alertProtocolVersion}},
		{"empty record", "\x16\x03\x01\x00\x00", Error{"record length", 3, "is 0", alertUnexpectedMessage}},
		{"record of 2^14+1", "\x16\x03\x01\x40\x01", Error{"record length", 3, "is 16385, more than 16384", alertRecordOverflow}},
		{"forged record length", "\x16\x03\x01\xff\xff", Error{"record length", 3, "is 65535, more than 16384", alertRecordOverflow}},
		{"ServerHello", "\x16\x03\x01\x00\x09\x02\x00\x00\x05", Error{"handshake type", 5, "is 2 instead of 1, client_hello", alertUnexpectedMessage}},
		{"hello of 2^16+1", "\x16\x03\x01\x00\x09\x01\x01\x00\x01", Error{"handshake length", 6, "is 65537, more than 65536", alertIllegalParameter}},
		{"hello of 2^24-1", "\x16\x03\x01\x00\x09\x01\xff\xff\xff", Error{"handshake length", 6, "is 16777215, more than 65536", alertIllegalParameter}},
		{"header in two records", "\x16\x03\x01\x00\x03\x01\x00\x00\x16\x03\x01\x00\x00", Error{"record length", 11, "is 0", alertUnexpectedMessage}},
		{"alert amid the hello", "\x16\x03\x01\x00\x04\x01\x00\x00\x26\x15\x03\x01\x00\x02", Error{"record type", 9, "is 21 instead of 22, handshake", alertUnexpectedMessage}},
		{"data amid the hello", "\x16\x03\x01\x00\x04\x01\x00\x00\x26\x17\x03\x01\x00\x02", Error{"record type", 9, "is 23 instead of 22, handshake", alertUnexpectedMessage}},
		{"type in the second record", "\x16\x03\x01\x00\x01\x02\x16\x03\x01\x00\x03\x00\x00\x00", Error{"handshake type", 5, "is 2 instead of 1, client_hello", alertUnexpectedMessage}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var (
				p Parser
				h Hello
			)
			for i := range c.bytes {
				if err := p.Parse([]byte(c.bytes[:i]), &h); err != ErrMore {
					t.Fatalf("after %d bytes: %v, want ErrMore", i, err)
				}
			}
			for range 2 { // it does not change its mind
				e, ok := errors.AsType[*Error](p.Parse([]byte(c.bytes), &h))
				if !ok || *e != c.want {
					t.Fatalf("got %+v, want %+v", e, c.want)
				}
			}
			checkAgreement(t, []byte(c.bytes+strings.Repeat("x", 70000)))
		})
	}
}

// TestOneByteAtATime is the slowest client there can be: it sends the largest
// hello in records of one byte, and each byte in a segment of its own. Work that
// is not linear would take minutes here.
func TestOneByteAtATime(t *testing.T) {
	padding := strings.Repeat("p", maxHello-len(message(host("a.example"), extension{id: 21}))+messageHeaderLen)
	m := message(host("a.example"), extension{21, padding})
	if len(m) != messageHeaderLen+maxHello {
		t.Fatalf("the message has %d bytes, want %d", len(m), messageHeaderLen+maxHello)
	}
	b := records(m, 1)
	if len(b) != MaxLen {
		t.Fatalf("it takes %d bytes to send, want MaxLen, %d", len(b), MaxLen)
	}
	var (
		p Parser
		h Hello
	)
	for i := range b {
		if err := p.Parse(b[:i], &h); err != ErrMore {
			t.Fatalf("after %d bytes: %v", i, err)
		}
	}
	if err := p.Parse(b, &h); err != nil || h.ServerName != "a.example" || p.Len() != len(b) {
		t.Fatalf("%v, ServerName %q, Len %d", err, h.ServerName, p.Len())
	}
	checkAgreement(t, b)
}

func TestHelloOverManyRecords(t *testing.T) {
	for _, c := range captured {
		b := capture(t, c.file)
		want := visible(mustParse(t, b))
		for _, n := range []int{2, 3, 12, 100} {
			m := b[recordHeaderLen:]
			split := records(m, (len(m)+n-1)/n)
			if got := visible(mustParse(t, split)); !reflect.DeepEqual(got, want) {
				t.Errorf("%s over %d records: %+v, want %+v", c.file, n, got, want)
			}
			checkAgreement(t, split)
		}
	}
}

// TestNeedForAHeaderInTwoRecords: two bytes of the message header in the first
// record, so two of the second are needed next, and not four.
func TestNeedForAHeaderInTwoRecords(t *testing.T) {
	m := message(host("a.example"))
	b := append(record(m[:2]), record(m[2:])...)
	var (
		p     Parser
		steps []int
	)
	for err := ErrMore; err == ErrMore; {
		steps = append(steps, p.Need())
		err = p.Parse(b[:p.Need()], new(Hello))
	}
	if got, want := fmt.Sprint(steps), fmt.Sprint([]int{1, 5, 7, 12, 14, len(b)}); got != want {
		t.Errorf("looked at after %s bytes, want %s", got, want)
	}
}

// TestNeedIsExact: below Need another call changes nothing, at Need it does.
func TestNeedIsExact(t *testing.T) {
	for _, size := range []int{1, 2, 3, 5, 200, maxRecord} {
		b := append(records(capture(t, "openssl")[recordHeaderLen:], size), "more"...)
		var (
			p     Parser
			h     Hello
			steps []int
		)
		for err := ErrMore; err != nil; {
			if p.Len() != 0 {
				t.Fatalf("Len() = %d before the end", p.Len())
			}
			need, before := p.Need(), p
			if err := p.Parse(b[:need-1], &h); err != ErrMore || p != before {
				t.Fatalf("at %d, below Need: %v, %+v became %+v", need-1, err, before, p)
			}
			if err = p.Parse(b[:need], &h); err != nil && (err != ErrMore || p.Need() <= need) {
				t.Fatalf("at %d: %v, and Need() = %d is no further", need, err, p.Need())
			}
			if steps = append(steps, need); len(steps) > len(b) {
				t.Fatalf("no end: %v", steps)
			}
		}
		if want := len(b) - len("more"); p.Len() != want || steps[len(steps)-1] != want {
			t.Errorf("records of %d: Len() = %d, last Need %d, want %d", size, p.Len(), steps[len(steps)-1], want)
		}
		if want := "[1 5 9 318]"; size == maxRecord && fmt.Sprint(steps) != want {
			t.Errorf("one record is looked at after %v bytes, want %s", steps, want)
		}
	}
}

// TestLenStopsAtTheHellosRecords: what follows belongs to someone else.
func TestLenStopsAtTheHellosRecords(t *testing.T) {
	hello := record(message(host("a.example")))
	var (
		p Parser
		h Hello
	)
	if err := p.Parse(append(hello[:len(hello):len(hello)], 23, 3, 3, 0, 1), &h); err != nil || p.Len() != len(hello) {
		t.Errorf("early data behind it: %v, Len() = %d, want %d", err, p.Len(), len(hello))
	}
	trailing := record(append(message(host("a.example")), "start of the next message"...))
	p = Parser{}
	if err := p.Parse(trailing[:len(trailing)-1], &h); err != ErrMore {
		t.Errorf("its record is not whole: %v, want ErrMore", err)
	}
	if err := p.Parse(trailing, &h); err != nil || p.Len() != len(trailing) {
		t.Errorf("a message behind it: %v, Len() = %d, want %d", err, p.Len(), len(trailing))
	}
}

func TestLooksLikeHTTP(t *testing.T) {
	for s, want := range map[string]bool{
		"":                          false,
		"G":                         true,
		"GET":                       true,
		"GET / HTTP/1.1\r\n":        true,
		"GETS":                      false,
		"GE7":                       false,
		"P":                         true,
		"POST /":                    true,
		"PROXY TCP4":                false,
		"PRO":                       false,
		"PRI * HTTP/2.0\r\n\r\nSM":  true,
		"OPTIONS * HTTP/1.1":        true,
		"CONNECT a.example:443":     true,
		"get / HTTP/1.1":            false,
		"SSH-2.0-":                  false,
		"\x16\x03\x01":              false,
		"\x00\x00\x00\x08\x04\xd2b": false,
	} {
		if got := LooksLikeHTTP([]byte(s)); got != want {
			t.Errorf("LooksLikeHTTP(%q) = %v, want %v", s, got, want)
		}
	}
}

// TestParserIsSmall, for every half-open connection has one.
func TestParserIsSmall(t *testing.T) {
	if size := reflect.TypeFor[Parser]().Size(); size > 20 {
		t.Errorf("a Parser is %d bytes, want at most 20", size)
	}
}

func TestParseDoesNotAllocate(t *testing.T) {
	for _, c := range captured {
		b := capture(t, c.file)
		var h Hello
		allocs := testing.AllocsPerRun(100, func() {
			var p Parser
			for _, n := range []int{1, 5, 100, len(b)} {
				if err := p.Parse(b[:n], &h); err != nil && err != ErrMore {
					t.Fatal(err)
				}
			}
		})
		if allocs != 0 {
			t.Errorf("%s: %v allocations, want 0", c.file, allocs)
		}
	}
}

// TestNewNameIsTheOnlyAllocation: clients that follow one another ask for
// different names; the rest of what they say is not allocated.
func TestNewNameIsTheOnlyAllocation(t *testing.T) {
	alpn := extension{extALPN, vec16(vec8("h2") + vec8("http/1.1") + vec8("acme-tls/1") + vec8("own-protocol"))}
	hellos := [][]byte{record(message(host("a.example"), alpn)), record(message(host("b.example"), alpn))}
	var h Hello
	turn := 0
	allocs := testing.AllocsPerRun(100, func() {
		var p Parser
		if err := p.Parse(hellos[turn%2], &h); err != nil {
			t.Fatal(err)
		}
		turn++
	})
	if allocs != 1 {
		t.Errorf("%v allocations, want 1, the name", allocs)
	}
}

// TestEveryByteOfAHelloAgrees changes each byte of a few hellos.
func TestEveryByteOfAHelloAgrees(t *testing.T) {
	for _, name := range []string{"openssl-tls13-ticket", "openssl-tls12-ticket", "go-classic"} {
		b := capture(t, name)
		for i := range b {
			for _, change := range []byte{1, 0xff} {
				changed := append([]byte(nil), b...)
				changed[i] += change
				checkAgreement(t, changed)
				if t.Failed() {
					t.Fatalf("%s, byte %d plus %d", name, i, change)
				}
			}
		}
	}
}

// FuzzAgreesWithCryptoTLS: what we take crypto/tls takes, with the same values;
// what we refuse it refuses, with the same alert; what we wait for it waits for.
func FuzzAgreesWithCryptoTLS(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		checkAgreement(t, b)
		if len(b) > recordHeaderLen+messageHeaderLen {
			// The same bytes as a hello whose lengths are right, so that its
			// fields are reached.
			checkAgreement(t, record(handshake(string(b[recordHeaderLen+messageHeaderLen:]))))
		}
	})
}

// FuzzSplitAnywhere: where the bytes are cut, into calls and into records,
// changes nothing.
func FuzzSplitAnywhere(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		var (
			p Parser
			h Hello
		)
		err := p.Parse(b, &h)
		cuts := rand.New(rand.NewPCG(seed, 0))
		checkCalls(t, b, cuts, outcome{visible(&h), err, p.Len()})
		if err != ErrMore {
			checkRecords(t, b, cuts, &p, outcome{visible(&h), err, p.Len()})
		}
	})
}

// outcome is all that Parse tells.
type outcome struct {
	hello Hello
	err   error
	len   int
}

// checkCalls cuts b into calls.
func checkCalls(t *testing.T, b []byte, cuts *rand.Rand, want outcome) {
	t.Helper()
	var (
		p Parser
		h Hello
	)
	err := ErrMore
	for n := 0; n < len(b) && err == ErrMore; {
		n += 1 + cuts.IntN(min(len(b)-n, 1+cuts.IntN(64)))
		err = p.Parse(b[:n], &h)
	}
	got := outcome{visible(&h), err, p.Len()}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("in pieces: %+v\nat once: %+v", got, want)
	}
}

// checkRecords cuts the message that is in b into other records. Faults in the
// message stay where they are in it; those in the records are not compared.
func checkRecords(t *testing.T, b []byte, cuts *rand.Rand, whole *Parser, want outcome) {
	t.Helper()
	e, refused := errors.AsType[*Error](want.err)
	if refused && (strings.HasPrefix(e.Field, "record") || strings.HasPrefix(e.Field, "handshake")) {
		return
	}
	m := whole.join(b)
	var split []byte
	for rest := m; len(rest) > 0; {
		n := 1 + cuts.IntN(min(len(rest), maxRecord, 1+cuts.IntN(2000)))
		split = append(split, record(rest[:n])...)
		rest = rest[n:]
	}
	var (
		p Parser
		h Hello
	)
	err := p.Parse(split, &h)
	if want.hello.RootDot > 0 && split[h.RootDot] == '.' {
		h.RootDot = want.hello.RootDot // the same one, elsewhere
	}
	if !reflect.DeepEqual(visible(&h), want.hello) {
		t.Errorf("in other records: %+v\nbefore: %+v", h, want.hello)
	}
	if !refused {
		if err != nil || p.Len() != len(split) {
			t.Errorf("in other records: %v, Len() = %d, want %d", err, p.Len(), len(split))
		}
		return
	}
	again, ok := errors.AsType[*Error](err)
	if !ok || again.Field != e.Field || again.Reason != e.Reason || again.Alert != e.Alert {
		t.Errorf("in other records: %v, before: %v", err, e)
	}
}

// TestSeeds: a fuzz test without seeds proves nothing in an ordinary run.
func TestSeeds(t *testing.T) {
	if *update {
		writeSeeds(t)
	}
	sources, _ := filepath.Glob("*_test.go")
	found := 0
	for _, name := range sources {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`).FindAllSubmatch(source, -1) {
			found++
			dir := filepath.Join("testdata", "fuzz", string(match[1]))
			if seeds, _ := os.ReadDir(dir); len(seeds) < len(captured) {
				t.Errorf("%s has %d seeds, want at least %d: go test -run TestSeeds -update", dir, len(seeds), len(captured))
			}
		}
	}
	if found == 0 {
		t.Error("no fuzz test was found")
	}
}

func writeSeeds(t *testing.T) {
	seeds := map[string][]byte{
		"trailing-dot":   record(message(host("a.example."))),
		"two-names":      record(message(host("a.example"), host("b.example"))),
		"message-behind": record(append(message(host("a.example")), message()...)),
		"not-tls":        []byte("GET / HTTP/1.1\r\n\r\n"),
		"empty-record":   append(records(message(host("a.example")), 20)[:25], 22, 3, 1, 0, 0),
		"all-extensions": record(message(everyExtension()...)),
	}
	for _, c := range captured {
		seeds[c.file] = capture(t, c.file)
		seeds[c.file+"-records"] = records(capture(t, c.file)[recordHeaderLen:], 97)
	}
	for i, name := range oddNames {
		writeFile(t, filepath.Join("testdata", "fuzz", "FuzzHostName", fmt.Sprintf("name-%02d", i)), fmt.Appendf(nil, "go test fuzz v1\nstring(%q)\n", name))
	}
	for name, b := range seeds {
		one := fmt.Sprintf("go test fuzz v1\n[]byte(%q)\n", b)
		writeFile(t, filepath.Join("testdata", "fuzz", "FuzzAgreesWithCryptoTLS", name), []byte(one))
		two := fmt.Sprintf("%suint64(%d)\n", one, len(b))
		writeFile(t, filepath.Join("testdata", "fuzz", "FuzzSplitAnywhere", name), []byte(two))
	}
}

// oddNames are seeds of FuzzHostName.
var oddNames = []string{"", ".", "edge.test", "Edge.Test", "edge.test.", "edge.test..", ".edge.test", "a..test", "*.wild.test", "127.0.0.1",
	"127.0.0.1.", "1.2.3", "::1", "[2001:db8::1]", "fe80::1%eth0", "a\x00.test", "b\u00fccher.example", "a\u202eb", "edge.test:443", "a@b",
	strings.Repeat("a", 64) + ".test", strings.Repeat("\xff", 260) + ".wild.test", strings.Repeat("a.", 127) + "a"}

// everyExtension is one of each that is looked into, and rightly filled.
func everyExtension() []extension {
	return []extension{
		host("a.example"),
		{extStatusRequest, "\x01\x00\x00\x00\x00"},
		{extSupportedGroups, vec16("\x11\xec\x00\x1d")},
		{extECPointFormats, vec8("\x00")},
		{extSignatureAlgorithms, vec16("\x04\x03\x08\x04")},
		{extALPN, vec16(vec8("h2") + vec8("http/1.1"))},
		{extSCT, ""},
		{extExtendedMaster, ""},
		{extSessionTicket, "ticket"},
		{extEarlyData, ""},
		{extSupportedVersions, vec8("\x7a\x7a\x03\x04\x03\x03")},
		{extCookie, vec16("cookie")},
		{extPSKModes, vec8("\x01")},
		{extSignatureAlgsCert, vec16("\x04\x03")},
		{extKeyShare, vec16("\x00\x1d" + vec16("key"))},
		{57, "quic"},
		{extECH, "\x00\x00\x01\x00\x01\x07" + vec16("enc") + vec16("payload")},
		{extRenegotiationInfo, vec8("")},
		{0x4a4a, "x"},
		{extPreSharedKey, vec16(vec16("ticket")+"\x00\x00\x00\x00") + vec16(vec8("binder"))},
	}
}

func BenchmarkParse(b *testing.B) {
	for _, c := range captured {
		hello := capture(b, c.file)
		b.Run(c.file, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(hello)))
			var h Hello
			for b.Loop() {
				var p Parser
				if err := p.Parse(hello, &h); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("chromium-pq-12-records", func(b *testing.B) {
		hello := records(capture(b, "chromium-pq")[recordHeaderLen:], 160)
		b.ReportAllocs()
		var h Hello
		for b.Loop() {
			var p Parser
			if err := p.Parse(hello, &h); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("chromium-pq-bytewise", func(b *testing.B) {
		hello := capture(b, "chromium-pq")
		b.ReportAllocs()
		var h Hello
		for b.Loop() {
			var p Parser
			for i := range hello {
				p.Parse(hello[:i+1], &h)
			}
		}
	})
}
