// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"strings"
	"testing"
	"unicode"
)

// TestHostName: which names a client is served under, and what is said of those that no host can have.
func TestHostName(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 63)+".", 4)[:253]
	for _, c := range []struct{ sent, name, err string }{
		{"", "", ""},
		{"Edge.Test", "edge.test", ""},
		{"edge.test.", "edge.test", ""},
		{"xn--bcher-kva.example", "xn--bcher-kva.example", ""},
		{"_acme.a-b.test", "_acme.a-b.test", ""},
		{long, long, ""},
		{long + ".", long, ""},
		{"127.0.0.1", "", ""},
		{"127.0.0.1.", "", ""},
		{"::1", "", ""},
		{"[2001:db8::1]", "", ""},
		{"fe80::1%eth0", "", ""},
		{"1.2.3", "1.2.3", ""},
		{"9", "9", ""},
		{".", "", `"." has an empty label`},
		{"..", "", `".." has an empty label`},
		{"edge.test..", "", `"edge.test.." has an empty label`},
		{".edge.test", "", `".edge.test" has an empty label`},
		{"a..test", "", `"a..test" has an empty label`},
		{strings.Repeat("a", 64) + ".test", "", `"` + strings.Repeat("a", 60) + `" has a label of more than 63 bytes`},
		{long + "a", "", "has 254 bytes, a host name has at most 253"},
		{long + "a.", "", "has 255 bytes, a host name has at most 253"},
		{strings.Repeat("\xff", 21900) + ".wild.test", "", "has 21910 bytes, a host name has at most 253"},
		{"a\x00.test", "", `"a\x00.test" has the byte 0x00, which no host name has`},
		{"bücher.example", "", `"b\u00fccher.example" has the byte 0xc3, which no host name has`},
		{"a b", "", `"a b" has the byte 0x20, which no host name has`},
		{"*.wild.test", "", `"*.wild.test" has the byte 0x2a, which no host name has`},
		{"edge.test:443", "", `"edge.test:443" has the byte 0x3a, which no host name has`},
		{"a@b", "", `"a@b" has the byte 0x40, which no host name has`},
		{"a`b", "", "\"a`b\" has the byte 0x60, which no host name has"},
		{"a{b", "", `"a{b" has the byte 0x7b, which no host name has`},
		{"a\u202eb", "", `"a\u202eb" has the byte 0xe2, which no host name has`},
	} {
		h := Hello{ServerName: c.sent}
		name, err := h.HostName()
		if said := ""; name != c.name || c.err != "" || err != nil {
			if err != nil {
				said = err.Error()
			}
			if name != c.name || said != c.err {
				t.Errorf("%.80q: %q, %q; want %q, %q", c.sent, name, said, c.name, c.err)
			}
		}
	}
}

// FuzzHostName: a name is one that the map could have, whatever was sent; what is said of another is short and printable;
// and reading it once more changes nothing.
func FuzzHostName(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		name, err := HostName(s)
		if err != nil {
			if name != "" || len(err.Error()) > 300 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r > unicode.MaxASCII || r < ' ' }) {
				t.Errorf("%q, %v", name, err)
			}
			return
		}
		if again, err := HostName(name); again != name || err != nil {
			t.Errorf("%q becomes %q, %v", name, again, err)
		}
		if len(name) > MaxName || strings.ToLower(name) != name || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
			t.Errorf("a host can't be called %q", name)
		}
		for label := range strings.SplitSeq(name, ".") {
			if name != "" && (label == "" || len(label) > MaxLabel) {
				t.Errorf("a label of %q", name)
			}
		}
	})
}

// TestRootDotIsFound in whatever records the hello comes.
func TestRootDotIsFound(t *testing.T) {
	m := message(extension{extALPN, vec16(vec8("h2"))}, host("a.example."), extension{extSupportedGroups, vec16("\x00\x1d")})
	for size := 1; size <= len(m); size++ {
		b := records(m, size)
		if h := mustParse(t, b); h.RootDot == 0 || b[h.RootDot] != '.' || h.ServerName != "a.example." {
			t.Fatalf("records of %d: dot of %q at %d", size, h.ServerName, h.RootDot)
		}
		checkAgreement(t, b)
	}
	if h := mustParse(t, record(message(host("a.example")))); h.RootDot != 0 {
		t.Errorf("a dot at %d", h.RootDot)
	}
}
