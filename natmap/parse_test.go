// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the want section of testdata/errors; then read the diff")

// contractMap is the map of the README without the options of other packages.
const contractMap = `
# LISTEN           NAMES                        BACKENDS                                   OPTIONS
default idle=15m proxy=v1
:443               api.bank.example          -> 10.0.0.11:8080
:443               *.bank.example            -> 10.0.0.12:8080 10.0.0.13:8080             balance=least-conn check=tcp
:443               pay.bank.example          -> tls://10.0.0.21:8443                       proxy=v2
:443               mail.bank.example         -> 10.0.0.20:443                              mode=pass
:20000-20099                                 -> 10.0.0.30:8000-8099
:9000-9010                                   -> 10.0.0.31:+100                             mode=tcp
:80                                          -> redirect
`

func mustParse(t testing.TB, text string) *Map {
	t.Helper()
	m, err := Parse(Source{"test.natmap", text})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestExampleMapParses(t *testing.T) {
	m := mustParse(t, contractMap)
	if len(m.Rules) != 7 || len(m.Warnings()) != 0 {
		t.Fatalf("%d rules, warnings %v", len(m.Rules), m.Warnings())
	}
	want := `:443 api.bank.example -> 10.0.0.11:8080 proxy=v1 idle=15m
:443 *.bank.example -> 10.0.0.12:8080 10.0.0.13:8080 proxy=v1 idle=15m balance=least-conn check=tcp
:443 pay.bank.example -> tls://10.0.0.21:8443 proxy=v2 idle=15m
:443 mail.bank.example -> 10.0.0.20:443 mode=pass proxy=v1 idle=15m
:20000-20099 -> 10.0.0.30:8000-8099 proxy=v1 idle=15m
:9000-9010 -> 10.0.0.31:+100 mode=tcp proxy=v1 idle=15m
:80 -> redirect
`
	if got := m.String(); got != want {
		t.Errorf("canonical text:\n%s\nwant:\n%s", got, want)
	}
	if got, want := fmt.Sprint(m.Listens()), "[:80 :443 :9000-9010 :20000-20099]"; got != want {
		t.Errorf("listens %s, want %s", got, want)
	}
}

// TestExampleMapParsesInAnyOrder: its lines with the default behind the rules, and each by itself. A default line is for the
// rules below it, so that the last one reaches none there, which is a warning.
func TestExampleMapParsesInAnyOrder(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(contractMap), "\n")
	lines = append(append(lines[:1:1], lines[2:]...), lines[1])
	for _, line := range lines[1:] {
		m := mustParse(t, line)
		if isRule := strings.Contains(line, "->"); isRule != (len(m.Rules) == 1) || isRule && len(m.Warnings()) > 0 {
			t.Errorf("%s: %d rules, %v", line, len(m.Rules), m.Warnings())
		}
	}
	m := mustParse(t, strings.Join(lines, "\n"))
	if len(m.Rules) != 7 || len(m.Warnings()) != 1 || m.Warnings()[0].Msg != "default reaches no rule" {
		t.Errorf("%d rules, %v", len(m.Rules), m.Warnings())
	}
	for _, c := range []struct {
		name    string
		port    uint16
		backend string
	}{{"api.bank.example", 443, "10.0.0.11:8080"}, {"x.bank.example", 443, "10.0.0.12:8080"}, {"pay.bank.example", 443, "tls://10.0.0.21:8443"},
		{"mail.bank.example", 443, "10.0.0.20:443"}, {"any.example", 20042, "10.0.0.30:8000-8099"}, {"", 9010, "10.0.0.31:+100"}, {"", 80, ""}} {
		r := m.Port(netip.Addr{}, c.port).Lookup(c.name)
		if c.backend == "" && r.Action == Redirect {
			continue
		}
		if r == nil || r.Backends[0].String() != c.backend {
			t.Errorf("%s on port %d: %v, want %s", c.name, c.port, r, c.backend)
		}
	}
	if b := m.Port(netip.Addr{}, 9010).Lookup("").Backends[0]; b.Port(9000, 9010) != 9110 {
		t.Errorf("9010 leads to %d", b.Port(9000, 9010))
	}
}

// sections splits a case into its sources and what is expected of them.
func sections(t *testing.T, text string) (src []Source, want string) {
	t.Helper()
	parts := regexp.MustCompile(`(?m)^-- (\S+) --\n`).FindAllStringSubmatchIndex(text, -1)
	for i, p := range parts {
		end := len(text)
		if i+1 < len(parts) {
			end = parts[i+1][0]
		}
		name, body := text[p[2]:p[3]], text[p[1]:end]
		if name == "want" {
			return src, body
		}
		src = append(src, Source{name, body})
	}
	t.Fatal("no -- want -- section")
	return nil, ""
}

// TestErrorsSayWhatToWrite holds every complaint to its exact words. A case is a
// file: its reason in the first line, its sources, and what is printed.
func TestErrorsSayWhatToWrite(t *testing.T) {
	files, _ := filepath.Glob("testdata/errors/*.txt")
	if len(files) == 0 {
		t.Fatal("no cases")
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			if !strings.HasPrefix(text, "# ") {
				t.Error("the first line does not give the reason of the case")
			}
			src, want := sections(t, text)
			got := complaints(t, src)
			if *update {
				os.WriteFile(file, []byte(strings.TrimSuffix(text, want)+got), 0o644)
			} else if got != want {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

// complaints returns the errors of src, or its warnings, one a line.
func complaints(t *testing.T, src []Source) string {
	t.Helper()
	m, err := Parse(src...)
	var all Errors
	if err != nil {
		all = err.(Errors)
		for _, e := range all {
			if e.Hint == "" {
				t.Errorf("%v: says not what to write instead", e)
			}
		}
		return all.Error() + "\n"
	}
	for _, w := range m.Warnings() {
		all = append(all, &Error{w.File, w.Line, w.Col, w.Text, "warning: " + w.Msg, w.Hint})
	}
	return all.Error() + "\n"
}

func TestEightMistakesEightComplaints(t *testing.T) {
	_, err := Parse(Source{"m", `:443 a.example => 10.0.0.1:80
:70000 -> 10.0.0.1:80
:9010-9000 -> 10.0.0.1:=
:444 b.example -> http://10.0.0.1:80
:445 c.example -> 10.0.0.1
:446 *.*.example -> 10.0.0.1:80
:447 d.example -> 10.0.0.1:80 idel=3m
:448 e.example -> 10.0.0.1:80
:448 e.example -> 10.0.0.2:80
`})
	var all Errors
	if !errors.As(err, &all) || len(all) != 8 {
		t.Fatalf("%d complaints, want 8:\n%v", len(all), err)
	}
	var one *Error
	if !errors.As(err, &one) || one != all[0] {
		t.Error("errors.As does not reach the first complaint")
	}
	for i, e := range all {
		if want := []int{1, 2, 3, 4, 5, 6, 7, 9}[i]; e.Line != want {
			t.Errorf("complaint %d is of line %d, want %d: %v", i, e.Line, want, e)
		}
	}
}

// TestUnreadableBytes has the cases that would not survive an editor.
func TestUnreadableBytes(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{":443 a\x00b -> 10.0.0.1:80", `m:1:7: character U+0000 cannot be seen; delete it`},
		{":443 a\x1b[31m -> 10.0.0.1:80", `m:1:7: character U+001B cannot be seen; delete it`},
		{":443 a\xff -> 10.0.0.1:80", `m:1:7: byte 0xFF is not UTF-8; save the map as UTF-8`},
		{":443\u00a0a.example -> 10.0.0.1:80", `m:1:5: character U+00A0 looks like a space; write an ordinary space`},
		{":443 a\u200b.example -> 10.0.0.1:80", `m:1:7: character U+200B cannot be seen; delete it`},
		{":443 a.example -> 10.0.0.1:80\r:444 -> 10.0.0.1:80", `m:1:30: character U+000D cannot be seen; delete it`},
		{"\xff\xfe:\x004\x00", `m:1:1: the text is UTF-16; save it as UTF-8`},
		{strings.Repeat("#", MaxLine+1), `m:1:1: the line is longer than 128 KiB; put each rule on a line of its own`},
		{"# caf\xe9 in a comment is nobody's business\n", ``},
		{"\ufeff:443 a.example -> 10.0.0.1:80\r\n:444 -> 10.0.0.1:80\r\n", ``},
		{"\u0085:443 a -> 10.0.0.1:80 ; :0 -> b:1", "m:1:1: character U+0085 looks like a space; write an ordinary space\n" +
			`m:1:27: "0" is not a port; write a port from 1 to 65535`},
	} {
		_, err := Parse(Source{"m", c.text})
		if got := fmt.Sprint(err); got != c.want && !(c.want == "" && err == nil) {
			t.Errorf("%.40q:\ngot  %s\nwant %s", c.text, got, c.want)
		}
	}
}

func TestHostileTextIsBounded(t *testing.T) {
	const most = 30 * time.Second // of CPU time: all of them take one or two, and some four times as much with the race detector
	var protocols, names strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&protocols, "alpn:p%d ", i)
		fmt.Fprintf(&names, "n%d ", i)
	}
	for name, text := range map[string]string{
		"errors":  strings.Repeat("x\n", 1<<20),
		"names":   strings.Repeat(":1 "+strings.Repeat("a ", 60000)+"-> b:1\n", 20),
		"label":   ":1 " + strings.Repeat("a", MaxLine-20) + " -> b:1",
		"dots":    ":1 " + strings.Repeat(".", MaxLine-20) + " -> b:1",
		"option":  ":1 -> b:1 " + strings.Repeat("k", MaxLine-20) + "=1",
		"alpn":    ":1 -> b:1 alpn=" + strings.Repeat("a,", 60000),
		"routes":  ":1 " + protocols.String() + names.String() + "-> b:1", // 25 million rules
		"members": ":1 -> b:1 deny=" + strings.Repeat("1,", 60000),
		"slashes": ":1 -> b:1" + strings.Repeat("/", MaxLine-20),
		"path":    ":1 -> unix:/" + strings.Repeat("/backup", 10000),
		"ports":   strings.Repeat(":1-65535 -> b:=; 10.0.0.1:1-65535 -> b:=; 10.0.0.2:1-65535 -> b:=; 10.0.0.3:1-65535 -> b:=; 10.0.0.4:1-65535 -> b:=\n", 1),
		"text":    strings.Repeat(" ", MaxText+1),
	} {
		began := cpuTime(t)
		_, err := Parse(Source{"m", text})
		took := cpuTime(t) - began
		all, _ := err.(Errors)
		if len(all) == 0 || len(all) > MaxErrors+1 {
			t.Errorf("%s: %d complaints", name, len(all))
		}
		for _, e := range all {
			if len(e.Error()) > 1500 {
				t.Errorf("%s: a complaint of %d bytes", name, len(e.Error()))
			}
		}
		if took > most {
			t.Errorf("%s: took %v", name, took)
		}
	}
}

// cpuTime is what this process has computed so far: on a busy machine it says more than a clock does.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func TestTooManyPortsNamesTheWidest(t *testing.T) {
	var b strings.Builder
	for i := range 5 {
		fmt.Fprintf(&b, "10.0.0.%d:%d-65535 -> b:=\n", i+1, 10-i)
	}
	_, err := Parse(Source{"m", b.String()})
	want := `m:5:1: the map listens on 327640 ports, of 262144 at most; this range has 65530; listen on fewer`
	if fmt.Sprint(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestNamesAreCanonical(t *testing.T) {
	m, err := Parser{ToASCII: func(s string) (string, error) {
		if s == "bücher" {
			return "XN--bcher-kva", nil
		}
		return "", errors.New("no")
	}}.Parse(Source{"m", ":443 API.Bank.Example. *.WILD.example. bücher *.bücher _srv.example -> Db.Example.:5432 [::FFFF:10.0.0.1]:80 [2001:DB8:0::1]:80"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range m.Rules {
		names = append(names, r.Name)
	}
	if got, want := strings.Join(names, " "), "api.bank.example *.wild.example xn--bcher-kva *.xn--bcher-kva _srv.example"; got != want {
		t.Errorf("names %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(m.Rules[0].Backends), "[db.example.:5432 10.0.0.1:80 [2001:db8::1]:80]"; got != want {
		t.Errorf("backends %s, want %s", got, want)
	}
	if _, err := (Parser{ToASCII: func(string) (string, error) { return "", errors.New("no") }}).Parse(Source{"m", ":443 ñ -> a:1"}); err == nil {
		t.Error("a name that IDNA refuses is accepted")
	}
}

func TestDefaultsReachTheRulesBelowInTheirFile(t *testing.T) {
	m, err := Parse(
		Source{"a", ":1 -> b:1\ndefault idle=1m linger=2s\n:2 -> b:1\ndefault idle=off\n:3 -> b:1 linger=3s; :4 -> redirect; :5 n.example -> reject"},
		Source{"b", ":6 -> b:1"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range m.Rules {
		s := r.Listen.String()
		for _, x := range r.Settings {
			s += fmt.Sprintf(" %s=%s@%s/%v", x.Key, x.Value, x.Pos, x.Default)
		}
		got = append(got, s)
	}
	want := []string{
		":1",
		":2 idle=1m@a:2:9/true linger=2s@a:2:17/true",
		":3 idle=off@a:4:9/true linger=3s@a:5:11/false",
		":4", ":5", ":6",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if m.Rules[2].Options.Idle != Off || m.Rules[2].Options.Linger != 3*time.Second {
		t.Errorf("options %+v", m.Rules[2].Options)
	}
}

func TestDefaultsWithoutMeaningAreSilent(t *testing.T) {
	m := mustParse(t, `default mode=pass alpn=h2 cert=a.example min-tls=1.3 https-port=8443
:443 a.example -> b:1
:444 a.example -> b:1 mode=terminate
:445 -> b:1 mode=terminate
:80 -> redirect
:8443 -> demo
`)
	var got []string
	for _, r := range m.Rules {
		got = append(got, r.String())
	}
	want := []string{
		":443 a.example -> b:1 mode=pass",
		":444 a.example -> b:1 mode=terminate min-tls=1.3 alpn=h2",
		":445 -> b:1 mode=terminate min-tls=1.3 alpn=h2 cert=a.example",
		":80 -> redirect https-port=8443",
		":8443 -> demo min-tls=1.3 alpn=h2 cert=a.example",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestBrokenDefaultMakesNoNoise: only the slip itself is told, not what would follow
// from the mode it hides.
func TestBrokenDefaultMakesNoNoise(t *testing.T) {
	_, err := Parse(Source{"m", "default mode=tcp; default mode=terminat\n:443 a.example -> tls://b:1 alpn=h2\n:443 -> c:1"})
	if all, _ := err.(Errors); len(all) != 1 || all[0].Hint != "did you mean terminate?" {
		t.Errorf("got %v", err)
	}
}

func TestBackendPort(t *testing.T) {
	for _, c := range []struct {
		rule string
		in   uint16
		want uint16
	}{
		{":443 -> b:8080", 443, 8080},
		{":9000-9010 -> b:80", 9010, 80},
		{":9000-9010 -> b:+100", 9003, 9103},
		{":9000-9010 -> b:-8999", 9000, 1},
		{":9000-9010 -> b:=", 9007, 9007},
		{":20000-20099 -> b:8000-8099", 20000, 8000},
		{":20000-20099 -> b:8000-8099", 20099, 8099},
		{":1-65535 -> b:1-65535", 65535, 65535},
		{":443 -> unix:/run/app.sock", 443, 0},
	} {
		r := mustParse(t, c.rule).Rules[0]
		if got := r.Backends[0].Port(r.Listen.Lo, c.in); got != c.want {
			t.Errorf("%s: port %d goes to %d, want %d", c.rule, c.in, got, c.want)
		}
	}
}

func TestSocketPaths(t *testing.T) {
	for text, want := range map[string]Backend{
		"unix:/run/a.sock":                 {Unix: "/run/a.sock", Weight: 1},
		"unix:/run/a.sock/weight=3/backup": {Unix: "/run/a.sock", Weight: 3, Backup: true},
		"unix:/run/a.sock/backup/weight=3": {Unix: "/run/a.sock", Weight: 3, Backup: true},
		"unix:/run/weight=3/a.sock":        {Unix: "/run/weight=3/a.sock", Weight: 1},
		"unix:/run/%62ackup":               {Unix: "/run/backup", Weight: 1},
		"unix:/run/%77eight=3/weight=4":    {Unix: "/run/weight=3", Weight: 4},
		"unix:/run/a%20b%3b%23%25->c":      {Unix: "/run/a b;#%->c", Weight: 1},
		"unix:/run/%C3%BC/ü":               {Unix: "/run/ü/ü", Weight: 1},
		"srv:8080":                         {Host: "srv", Lo: 8080, Hi: 8080, Weight: 1},
		"srv:_x._tcp.App.example/backup":   {SRV: true, Host: "_x._tcp.app.example", Weight: 1, Backup: true},
		"tls://srv:_x._tcp.app/weight=2":   {TLS: true, SRV: true, Host: "_x._tcp.app", Weight: 2},
	} {
		b := mustParse(t, ":1 -> "+text).Rules[0].Backends[0]
		if b != want {
			t.Errorf("%s: %+v, want %+v", text, b, want)
		}
		if again := mustParse(t, ":1 -> "+b.String()).Rules[0].Backends[0]; again != want {
			t.Errorf("%s prints as %s, which is %+v", text, b, again)
		}
	}
}

// TestOptionDocs holds the registry to what the documentation is made of.
func TestOptionDocs(t *testing.T) {
	docs := OptionDocs()
	fields := optionFields(reflect.TypeFor[Options]())
	if len(docs) != fields {
		t.Errorf("%d rows for %d fields of Options", len(docs), fields)
	}
	for _, d := range docs {
		if d.Key == "" || d.Value == "" || d.Rules == "" || d.Help == "" || strings.Contains(d.Help, "\n") {
			t.Errorf("incomplete: %+v", d)
		}
	}
	if options[modeRow].key != "mode" {
		t.Error("modeRow is not mode's")
	}
}

// optionFields counts the fields of Options, those of its topics (PoolOptions) among
// them.
func optionFields(t reflect.Type) (n int) {
	for i := range t.NumField() {
		if f := t.Field(i).Type; strings.HasSuffix(f.Name(), "Options") {
			n += optionFields(f)
		} else {
			n++
		}
	}
	return n
}

func TestSeedsExist(t *testing.T) {
	for _, f := range []string{"FuzzParseString", "FuzzLookup"} {
		if seeds, _ := os.ReadDir("testdata/fuzz/" + f); len(seeds) == 0 {
			t.Errorf("testdata/fuzz/%s has no seed", f)
		}
	}
}

// meaning is a rule without where it was written.
func meaning(r *Rule) Rule {
	m := *r
	m.Pos, m.order = Pos{}, 0
	m.Settings = slices.Clone(r.Settings)
	for i := range m.Settings {
		m.Settings[i].Pos, m.Settings[i].Default = Pos{}, false
	}
	return m
}

// FuzzParseString: a text that is a map prints as a text that is the same map; of
// one that is not, each complaint points at the text that it quotes.
func FuzzParseString(f *testing.F) {
	f.Add(contractMap)
	f.Fuzz(checkIdentity)
}

func checkIdentity(t *testing.T, text string) {
	m, err := Parse(Source{"m", text})
	if err != nil {
		checkComplaints(t, text, err.(Errors))
		return
	}
	canon := m.String()
	again, err := Parse(Source{"m", canon})
	if err != nil {
		t.Fatalf("canonical text is refused: %v\n%s", err, canon)
	}
	if got := again.String(); got != canon {
		t.Fatalf("canonical text changed:\n%s\n%s", canon, got)
	}
	if len(m.Rules) != len(again.Rules) {
		t.Fatalf("%d rules became %d", len(m.Rules), len(again.Rules))
	}
	for i := range m.Rules {
		if a, b := meaning(m.Rules[i]), meaning(again.Rules[i]); !reflect.DeepEqual(a, b) {
			t.Fatalf("%+v\nbecame\n%+v", a, b)
		}
	}
}

// randomMap writes rules from a few words, so that most of them meet and many of
// them fit. Mutation alone seldom gets as far.
func randomMap(r *rand.Rand) string {
	pick := func(words ...string) string { return words[r.IntN(len(words))] }
	var b strings.Builder
	for range 1 + r.IntN(7) {
		if r.IntN(6) == 0 {
			b.WriteString(pick("default idle=3m\n", "default mode=tcp\n", "default proxy=v2 alpn=h2 cert=c\n", "default mode=pass min-tls=1.3\n", "default deny=@x rate-per-ip=3/s handshakes=9\n", "default mode=terminate\n", "default backend-ca=x\n", "default starttls=smtp\n"))
		}
		lo := 1 + r.IntN(12)
		b.WriteString(pick("", "", "", "10.0.0.1", "10.0.0.2", "[::1]", "[fe80::1%e]") + ":" + fmt.Sprint(lo))
		if r.IntN(3) == 0 {
			b.WriteString("-" + fmt.Sprint(lo+r.IntN(6)))
		}
		b.WriteString(pick("", "", "", " alpn:h2", " alpn:x alpn:h2"))
		for range r.IntN(4) {
			b.WriteString(" " + pick("", "", "*.") + pick("a", "b", "a.b", "b.a", "c.a.b", "A.a.b."))
		}
		b.WriteString(" -> " + pick("h:1", "h:=", "h:+3", "h:-2", "tls://h:1/backup", "tls+imap://h:1/weight=2", "tls+smtp://srv:_x._tcp.h", "[::1]:9/weight=3", "10.0.0.9:5-6 h:2", "unix:/%62ackup/backup", "srv:_x._tcp.h/weight=2", "redirect", "reject", "demo"))
		b.WriteString(pick("", "", " mode=tcp", " mode=pass", " idle=off", " alpn=h2,x lifetime=90m", " https-port=8443", " cert=*.d", " balance=random max-conns=3 queue=9,1m", " check=starttls:imap fall=9", " check=http:/ every=90s source=[::1]:1-2 retries=0 dscp=ef", " backend-verify=off backend-name=sni", " starttls=imap", " starttls=off",
			" allow=all deny=10.1.2.0/24,2001:db8::/32,@a%2C%23.txt conns=7", " conns-per-ip=5 rate-per-ip=7/m bandwidth=100Mbit/s", " handshakes=off deny=off") + pick("\n", "; ", " # c\r\n"))
	}
	return b.String()
}

func TestRandomMaps(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	valid := 0
	for range 8000 {
		text := randomMap(r)
		checkIdentity(t, text)
		if m, err := Parse(Source{"m", text}); err == nil {
			valid++
			checkLookups(t, m, "10.0.0.2", "x.a.b", uint16(1+r.IntN(16)))
		}
		if t.Failed() {
			t.Fatal(text)
		}
	}
	if valid < 400 {
		t.Errorf("only %d maps are valid: the words have drifted from the grammar", valid)
	}
}

func checkComplaints(t *testing.T, text string, all Errors) {
	t.Helper()
	lines := strings.Split(strings.TrimPrefix(text, "\ufeff"), "\n")
	for i, e := range all {
		if e.Line < 1 || e.Line > len(lines) || e.Col < 1 || e.Msg == "" || e.Hint == "" {
			t.Fatalf("bad complaint %+v", e)
		}
		if i > 0 && (e.Line < all[i-1].Line || e.Line == all[i-1].Line && e.Col < all[i-1].Col) {
			t.Fatalf("%v is out of order", e)
		}
		rest := lines[e.Line-1]
		for range e.Col - 1 {
			if rest == "" {
				t.Fatalf("%v: no such column", e)
			}
			_, size := decode(rest)
			rest = rest[size:]
		}
		if !strings.Contains(e.Msg, "rule at ") && !strings.HasPrefix(rest, e.Text) {
			t.Fatalf("%v: points at %q, not at %q", e, rest, e.Text)
		}
	}
}
