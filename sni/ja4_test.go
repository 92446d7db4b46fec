// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// codesOf reads a list as JA4's documents print it.
func codesOf(t testing.TB, list string) (codes []uint16) {
	t.Helper()
	for s := range strings.SplitSeq(list, ",") {
		v, err := strconv.ParseUint(s, 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		codes = append(codes, uint16(v))
	}
	return codes
}

// TestJA4OfPublishedExamples has hellos whose lists and fingerprint others have
// published, in the order they were sent in.
func TestJA4OfPublishedExamples(t *testing.T) {
	const chromeSuites = "1301,1302,1303,c02b,c02f,c02c,c030,cca9,cca8,c013,c014,009c,009d,002f,0035"
	for _, c := range []struct {
		source                     string
		suites, extensions, scheme string
		want                       string
	}{
		{
			"FoxIO-LLC/ja4 technical_details/JA4.md, the example", chromeSuites,
			"001b,0000,0033,0010,4469,0017,002d,000d,0005,0023,0012,002b,ff01,000b,000a,0015",
			"0403,0804,0401,0503,0805,0501,0806,0601",
			"t13d1516h2_8daaf6152771_e5627efa2ab1",
		}, {
			"FoxIO-LLC/ja4 technical_details/JA4.md, without signature algorithms", chromeSuites,
			"001b,0000,0033,0010,4469,0017,002d,000d,0005,0023,0012,002b,ff01,000b,000a,0015",
			"",
			"t13d1516h2_8daaf6152771_6d807ffa2a79",
		}, {
			"FoxIO-LLC/ja4 python/test/testdata/sigalg-grease.pcapng.json, with the GREASE it leaves out", "baba," + chromeSuites,
			"1a1a,fe0d,0010,0017,0033,44cd,ff01,000a,000d,0023,002b,000b,ca34,002d,0000,0005,001b,0012,dada",
			"6a6a,0904,0905,0906,0403,0804,0401,0503,0805,0501,0806,0601",
			"t13d1517h2_8daaf6152771_cb7bf5808d99",
		}, {
			"browserleaks.com's answer to Chrome 143", chromeSuites,
			"002d,0033,0010,fe0d,0017,44cd,0000,000b,000a,002b,ff01,0023,0012,0005,000d,001b",
			"0403,0804,0401,0503,0805,0501,0806,0601",
			"t13d1516h2_8daaf6152771_d8a2da3f94cd",
		}, {
			"shigshag.com/tools/ja4, which leaves the order of the lists open", "00ff,1301,1302,1303,c02b,c02c,c02f,c030,cca8,cca9",
			"0000,0005,000a,000b,000d,0010,0017,0023,002b,002d,0033",
			"0503,0403,0807,0806,0805,0804,0601,0501,0401",
			"t13d1011h2_61a7ad8aa9b6_3fcd1a44f3e3",
		},
	} {
		h := Hello{
			ALPN:          []string{"h2", "http/1.1"},
			LegacyVersion: 0x0303,
			Versions:      []uint16{0x2a2a, 0x0304, 0x0303},
			CipherSuites:  codesOf(t, c.suites),
			Extensions:    codesOf(t, c.extensions),
		}
		if c.scheme != "" {
			h.SignatureSchemes = codesOf(t, c.scheme)
		}
		before := fmt.Sprint(h)
		if got := h.JA4(); got != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s", c.source, got, c.want)
		}
		if got := string(h.AppendJA4([]byte("ja4="))); got != "ja4="+c.want {
			t.Errorf("AppendJA4 = %q", got)
		}
		if fmt.Sprint(h) != before {
			t.Errorf("%s: the hello was changed", c.source)
		}
	}
}

func TestJA4OfNothing(t *testing.T) {
	if got, want := new(Hello).JA4(), "t00i000000_000000000000_000000000000"; got != want {
		t.Errorf("JA4() = %s, want %s", got, want)
	}
	// Server name and ALPN are counted and then left out: no extension is left.
	h := Hello{LegacyVersion: 0x0302, Extensions: []uint16{extServerName, extALPN}}
	if got, want := h.JA4(), "t11d000200_000000000000_000000000000"; got != want {
		t.Errorf("JA4() = %s, want %s", got, want)
	}
}

func TestJA4Version(t *testing.T) {
	for v, want := range map[uint16]string{0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3",
		0x0002: "s2", 0x0305: "00", 0x7f1c: "00", 0: "00"} {
		h := Hello{LegacyVersion: v}
		if got := h.JA4()[1:3]; got != want {
			t.Errorf("version %04x: %s, want %s", v, got, want)
		}
	}
	onlyGREASE := Hello{LegacyVersion: 0x0303, Versions: []uint16{0x0a0a}}
	if got := onlyGREASE.JA4()[1:3]; got != "00" {
		t.Errorf("only GREASE in supported_versions: %s, want 00", got)
	}
}

// TestJA4ALPN has the specification's own examples for protocols that are not text.
func TestJA4ALPN(t *testing.T) {
	for alpn, want := range map[string]string{
		"h2": "h2", "http/1.1": "h1", "h": "hh", "postgresql": "pl", "": "00", "A-Z": "AZ",
		"\xab": "ab", "\xab\xcd": "ad", "\x30\xab": "3b", "\x30\x31\xab\xcd": "3d", "\x30\xab\xcd\x31": "01",
		"-": "2d", "h2-": "6d",
	} {
		h := Hello{ALPN: []string{alpn, "x"}}
		if got := h.JA4()[8:10]; got != want {
			t.Errorf("ALPN %q: %s, want %s", alpn, got, want)
		}
	}
}

func TestJA4CountsStopAt99(t *testing.T) {
	h := Hello{CipherSuites: make([]uint16, 300), Extensions: make([]uint16, 100)}
	for i := range h.Extensions {
		h.Extensions[i] = uint16(1000 + i)
	}
	if got := h.JA4()[4:8]; got != "9999" {
		t.Errorf("counts are %s, want 9999", got)
	}
}

// TestJA4IgnoresOrder of suites and extensions, but not of signature algorithms.
func TestJA4IgnoresOrder(t *testing.T) {
	h := mustParse(t, capture(t, "chromium-pq"))
	want := h.JA4()
	slices.Reverse(h.CipherSuites)
	slices.Reverse(h.Extensions)
	if got := h.JA4(); got != want {
		t.Errorf("reversed: %s, want %s", got, want)
	}
	slices.Reverse(h.SignatureSchemes)
	if got := h.JA4(); got == want {
		t.Errorf("signature algorithms reversed: still %s", got)
	}
}

func TestAppendJA4DoesNotAllocate(t *testing.T) {
	dst := make([]byte, 0, ja4Len)
	for _, c := range captured {
		h := mustParse(t, capture(t, c.file))
		if allocs := testing.AllocsPerRun(100, func() { dst = h.AppendJA4(dst[:0]) }); allocs != 0 {
			t.Errorf("%s: %v allocations, want 0", c.file, allocs)
		}
	}
}

func BenchmarkJA4(b *testing.B) {
	for _, name := range []string{"chromium-pq", "curl", "node", "openssl-tls13"} {
		h := mustParse(b, capture(b, name))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var dst [ja4Len]byte
			for b.Loop() {
				h.AppendJA4(dst[:0])
			}
		})
	}
}
