// SPDX-License-Identifier: Apache-2.0

package printable

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "www.bank.example": "www.bank.example", "bücher.example": "bücher.example", "日本 ok": "日本 ok",
		"a\x1b[2Jb": `a\u001b[2Jb`, "a\u009b2Jb": `a\u009b2Jb`, "\u202egnp.exe": `\u202egnp.exe`, "a\u2028b\u2029": `a\u2028b\u2029`,
		"a\x00\n\t\x7f": `a\u0000\u000a\u0009\u007f`, "\xff\xfe": `\xff\xfe`, "a\u200bb\ufeff": `a\u200bb\ufeff`, "\U000e0041": `\udb40\udc41`,
	} {
		if got := Text(text, 100); got != want {
			t.Errorf("%q becomes %q, want %q", text, got, want)
		}
	}
	if got := Text(strings.Repeat("x", 63<<10), 10); got != "xxxxxxxxxx…" {
		t.Errorf("%q", got)
	}
	if got := Text("123456789é", 10); got != "123456789…" {
		t.Errorf("half a character: %q", got)
	}
	if n := testing.AllocsPerRun(100, func() { Text("www.bank.example", 100) }); n != 0 {
		t.Errorf("a plain name costs %v allocations", n)
	}
}

func FuzzText(f *testing.F) {
	for _, s := range []string{"www", "\u202e", "\xff\u009b", "é\xc3", "\U000e0041"} {
		f.Add(s, 10)
	}
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit &= 1<<10 - 1
		got := Text(s, limit)
		for _, r := range got {
			if r == utf8.RuneError && !strings.ContainsRune(s, utf8.RuneError) || !unicode.IsPrint(r) {
				t.Fatalf("%q of %q", r, got)
			}
		}
		if len(got) > 6*limit+len("…") {
			t.Fatalf("%d bytes of %d", len(got), limit)
		}
		if Text(got, len(got)) != got {
			t.Fatalf("%q changes", got)
		}
		line, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back, same string
		if json.Unmarshal(line, &back) != nil || json.Unmarshal(JSON(line), &same) != nil || back != same {
			t.Fatalf("JSON that says something else: %q, %q", back, same)
		}
	})
}

// TestShell: what a shell makes of it is what it was made of.
func TestShell(t *testing.T) {
	for _, s := range []string{"", "plain/path-1.pem", "it's a home", "$HOME `x` \"y\"", "a\nb", "--", "~", "*"} {
		out, err := exec.Command("sh", "-c", "printf %s "+Shell(s)).Output()
		if err != nil || string(out) != s {
			t.Errorf("%q becomes %q: %v", s, out, err)
		}
	}
	if got := Quoted("a\u202eb"); got != `"a\u202eb"` {
		t.Error(got)
	}
}
