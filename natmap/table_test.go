// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func decode(s string) (rune, int) { return utf8.DecodeRuneInString(s) }

var anyAddr netip.Addr

// rule returns the first backend of the rule for a name, or "-".
func rule(m *Map, addr, name string, port uint16) string {
	a, _ := netip.ParseAddr(addr)
	p := m.Port(a, port)
	if p == nil {
		return "no port"
	}
	if r := p.Lookup(name); r != nil {
		return r.Backends[0].String()
	}
	return "-"
}

func TestExactBeatsLongestWildcardBeatsNone(t *testing.T) {
	m := mustParse(t, `
:443 api.bank.example -> exact:1
:443 *.bank.example -> short:1
:443 *.eu.bank.example -> long:1
:443 -> none:1
:444 *.example -> wild:1
`)
	for name, want := range map[string]string{
		"api.bank.example":        "exact:1",
		"api.bank.example.":       "exact:1",
		"x.bank.example":          "short:1",
		"x.api.bank.example":      "short:1",
		"eu.bank.example":         "short:1",
		"x.eu.bank.example":       "long:1",
		"x.y.z.eu.bank.example":   "long:1",
		"bank.example":            "none:1",
		".bank.example":           "none:1",
		"*.bank.example":          "short:1", // no client sends it; it is one label like any other
		"xbank.example":           "none:1",
		"":                        "none:1",
		".":                       "none:1",
		strings.Repeat(".", 253):  "none:1",
		strings.Repeat("a.", 200): "none:1",
		"x" + strings.Repeat(".bank.example", 19): "short:1",
	} {
		if got := rule(m, "", name, 443); got != want {
			t.Errorf("%q is served by %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{"a.example": "wild:1", "example": "-", "": "-", "other": "-"} {
		if got := rule(m, "", name, 444); got != want {
			t.Errorf("%q on 444 is served by %s, want %s", name, got, want)
		}
	}
}

func TestAddressBeatsEveryAddressAmongEqualNames(t *testing.T) {
	m := mustParse(t, `
:443 a.example *.b.example -> every:1
:443 -> every-none:1
192.0.2.1:443 a.example -> own:1
192.0.2.1:443 *.example -> own-wild:1
192.0.2.2:443 -> own-none:1
[2001:db8::1]:443 *.x.b.example -> six:1
`)
	for _, c := range []struct{ addr, name, want string }{
		{"192.0.2.1", "a.example", "own:1"},
		{"192.0.2.1", "x.b.example", "every:1"}, // the longer wildcard
		{"192.0.2.1", "x.example", "own-wild:1"},
		{"192.0.2.1", "", "every-none:1"},
		{"::ffff:192.0.2.1", "a.example", "own:1"},
		{"192.0.2.2", "", "own-none:1"},
		{"192.0.2.2", "a.example", "every:1"},
		{"192.0.2.9", "a.example", "every:1"},
		{"0.0.0.0", "a.example", "every:1"},
		{"::", "a.example", "every:1"},
		{"2001:db8::1", "y.x.b.example", "six:1"},
		{"2001:db8::1", "x.b.example", "every:1"},
	} {
		if got := rule(m, c.addr, c.name, 443); got != c.want {
			t.Errorf("%s %q is served by %s, want %s", c.addr, c.name, got, c.want)
		}
	}
}

func TestPlainPortDoesNotSniff(t *testing.T) {
	m := mustParse(t, `
:80 -> redirect
:9000-9010 -> b:= mode=tcp
:443 -> b:1
192.0.2.1:443 -> own:1 mode=tcp
192.0.2.1:9005 a.example -> named:1
`)
	for _, c := range []struct {
		addr  string
		port  uint16
		sniff bool
	}{
		{"", 80, false}, {"", 9000, false}, {"", 443, true}, {"192.0.2.1", 443, false},
		{"192.0.2.1", 9005, true}, {"192.0.2.1", 9006, false}, {"192.0.2.2", 443, true},
	} {
		a, _ := netip.ParseAddr(c.addr)
		p := m.Port(a, c.port)
		if p == nil || p.Sniff() != c.sniff || c.sniff != (p.Plain == nil) {
			t.Errorf("%s:%d: %+v, want sniff %v", c.addr, c.port, p, c.sniff)
		}
		if p.Plain != nil && p.Lookup("any.example") != p.Plain {
			t.Errorf("%s:%d: Lookup is not the plain rule", c.addr, c.port)
		}
	}
	if r := m.Port(netip.MustParseAddr("192.0.2.1"), 9005).Lookup(""); r != nil {
		t.Errorf("a named port serves %v to a client without a name", r)
	}
	if p := m.Port(anyAddr, 81); p != nil {
		t.Error("a port that nothing listens on is served")
	}
	if p := new(Map).Port(anyAddr, 443); p != nil {
		t.Error("an empty map serves a port")
	}
}

func TestRangesShareOnePort(t *testing.T) {
	m := mustParse(t, ":20000-20099 a.example b.example -> b:8000-8099\n:20050 c.example -> c:1\n")
	first, mid, last := m.Port(anyAddr, 20000), m.Port(anyAddr, 20050), m.Port(anyAddr, 20099)
	if first != m.Port(anyAddr, 20049) || last != m.Port(anyAddr, 20051) || first == mid {
		t.Error("ports with the same rules do not share, or others do")
	}
	if first.tables != mid.tables || mid.tables != last.tables {
		t.Error("names of a range are stored more than once")
	}
	if rule(m, "", "c.example", 20050) != "c:1" || rule(m, "", "c.example", 20051) != "-" || rule(m, "", "a.example", 20050) != "b:8000-8099" {
		t.Error("a rule within a range is looked up wrongly")
	}
}

// TestOneNameOnManyPorts: within one island a name may have a rule for each port.
func TestOneNameOnManyPorts(t *testing.T) {
	var b strings.Builder
	b.WriteString(":1-65535 all.example -> all:1\n")
	for i := 1; i <= 30000; i++ {
		fmt.Fprintf(&b, ":%d one.example -> h%d:1\n", 2*i, i)
	}
	m := mustParse(t, b.String())
	for _, i := range []int{1, 17, 30000} {
		if got, want := rule(m, "", "one.example", uint16(2*i)), fmt.Sprintf("h%d:1", i); got != want {
			t.Errorf("port %d goes to %s, want %s", 2*i, got, want)
		}
		if got := rule(m, "", "one.example", uint16(2*i+1)); got != "-" {
			t.Errorf("port %d goes to %s", 2*i+1, got)
		}
	}
}

// TestSuffixesHashAlike: the hash of a suffix does not depend on what stands before
// it. The whole lookup relies on that.
func TestSuffixesHashAlike(t *testing.T) {
	k := newKeys()
	all := depths{^uint64(0), ^uint64(0)}
	for _, name := range []string{"a.b", "www.api.bank.example", "1234567.12345678.123456789.x", strings.Repeat("abcdefgh.", 20) + "abcdefgh", "a\x00..\xae.b", deepest} {
		marks := make([]uint64, maxDepth)
		_, n := k.walk(name, &all, marks)
		if n != strings.Count(name, ".") {
			t.Errorf("%q: %d marks", name, n)
		}
		for _, m := range marks[:n] {
			suffix := name[m&0xff:]
			if h, _ := k.walk(suffix, new(depths), nil); h != m&^0xff {
				t.Errorf("%q: hash of %q differs", name, suffix)
			}
			if name[m&0xff-1] != '.' {
				t.Errorf("%q: a mark at %q", name, suffix)
			}
		}
	}
}

// TestRedirectsAreFoundByHost: the names of redirects are looked up as those of a ClientHello are, on ports of redirects only.
func TestRedirectsAreFoundByHost(t *testing.T) {
	m := mustParse(t, `
:80 good.example *.shop.example xn--bcher-kva.example -> redirect
:80 *.a.shop.example -> redirect https-port=2
:81 a.example -> redirect
:81 -> redirect https-port=3
:82-90 a.example -> redirect
:85 b.example -> redirect
192.0.2.1:80 good.example -> redirect https-port=4
192.0.2.1:81 -> redirect https-port=5
192.0.2.2:80 good.example -> tls:1
192.0.2.3:80 -> b:1 mode=tcp
`)
	for _, c := range []struct {
		addr   string
		port   uint16
		name   string
		want   int // https-port; -1: no rule
		byHost bool
	}{
		{"", 80, "good.example", 0, true}, {"", 80, "good.example.", 0, true}, {"", 80, "x.shop.example", 0, true}, {"", 80, "x.a.shop.example", 2, true},
		{"", 80, "xn--bcher-kva.example", 0, true}, {"", 80, "shop.example", -1, true}, {"", 80, "evil.example", -1, true}, {"", 80, "", -1, true},
		{"", 81, "a.example", 0, true}, {"", 81, "evil.example", 3, true}, {"", 81, "", 3, true},
		{"", 84, "a.example", 0, true}, {"", 84, "b.example", -1, true}, {"", 85, "b.example", 0, true},
		{"192.0.2.1", 80, "good.example", 4, true}, {"192.0.2.1", 80, "x.shop.example", 0, true},
		{"192.0.2.1", 81, "a.example", 0, true}, {"192.0.2.1", 81, "", 5, true},
		{"192.0.2.2", 80, "x.shop.example", -1, false}, {"192.0.2.3", 80, "x.shop.example", 0, false},
	} {
		a, _ := netip.ParseAddr(c.addr)
		p := m.Port(a, c.port)
		got := -1
		if r := p.Lookup(c.name); r != nil {
			got = int(r.Options.HTTPSPort)
		}
		if got != c.want || p.ByHost != c.byHost || c.byHost && (p.Sniff() || p.Plain != nil) {
			t.Errorf("%s:%d %q: https-port %d, want %d; by host %v", c.addr, c.port, c.name, got, c.want, p.ByHost)
		}
	}
}

func TestListensMergeWhatOverlaps(t *testing.T) {
	m := mustParse(t, ":443 a b -> x:1; :444 -> x:1; :9000-9010 a -> x:1; :9005 b -> x:1; 192.0.2.1:443 -> x:1; [::1]:443 -> x:1")
	if got, want := fmt.Sprint(m.Listens()), "[:443 :444 :9000-9010 192.0.2.1:443 [::1]:443]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// reference is Match by its definition.
func reference(m *Map, addr netip.Addr, port uint16, name string, offered []string) (*Rule, bool) {
	var own, every []*Rule
	plain, redirects := map[bool]*Rule{}, map[bool]bool{}
	for _, r := range m.Rules {
		if !r.Listen.Contains(port) {
			continue
		}
		specific := r.Listen.Addr.IsValid()
		switch {
		case specific && r.Listen.Addr == addr:
			own = append(own, r)
		case !specific:
			every = append(every, r)
		default:
			continue
		}
		if r.Plain() {
			plain[specific], redirects[specific] = r, r.Action == Redirect
		}
	}
	rules := append(own, every...)
	if len(own) > 0 && (plain[true] != nil || plain[false] != nil) && !(redirects[true] && redirects[false]) {
		rules = own
	}
	if len(own) > 0 && len(every) > 0 && own[0].Options.StartTLS != every[0].Options.StartTLS {
		rules = own
	}
	for _, protocol := range append(slices.Clone(offered), "") {
		if r := referenceName(rules, name, protocol); r != nil {
			return r, true
		}
	}
	return nil, len(rules) > 0
}

// referenceName is the best of the rules for a protocol.
func referenceName(rules []*Rule, name, protocol string) *Rule {
	name = strings.TrimSuffix(name, ".")
	var best *Rule
	rank := -1
	for _, r := range rules {
		if r.Protocol != protocol {
			continue
		}
		n := -1
		switch suffix, wild := strings.CutPrefix(r.Name, "*"); {
		case r.Name == "":
			n = 0
		case r.Name == name && len(name) <= maxName:
			n = 1000
		case wild && strings.HasSuffix(name, suffix) && len(name) > len(suffix) && len(name) <= maxName:
			n = len(suffix)
		}
		if n > rank {
			best, rank = r, n
		}
	}
	return best
}

func FuzzLookup(f *testing.F) {
	f.Add(contractMap, "10.0.0.1", "x.bank.example", uint16(443))
	f.Fuzz(func(t *testing.T, text, addr, name string, port uint16) {
		m, err := Parse(Source{"m", text})
		if err != nil {
			return
		}
		checkLookups(t, m, addr, name, port)
	})
}

// checkLookups compares m with the definition, at the given place and at those that
// its rules mention.
func checkLookups(t *testing.T, m *Map, addr, name string, port uint16) {
	t.Helper()
	a, _ := netip.ParseAddr(addr)
	addrs := []netip.Addr{a, anyAddr}
	names := []string{name, ""}
	ports := []uint16{port}
	for _, r := range m.Rules[:min(8, len(m.Rules))] {
		addrs = append(addrs, r.Listen.Addr)
		names = append(names, r.Name, strings.Replace(r.Name, "*", "x", 1), name+"."+strings.TrimPrefix(r.Name, "*."))
		ports = append(ports, r.Listen.Lo, r.Listen.Hi, r.Listen.Hi+1, r.Listen.Lo-1)
	}
	for _, a := range addrs {
		a = a.Unmap()
		if a.IsUnspecified() {
			a = anyAddr
		}
		for _, port := range ports {
			for _, name := range names {
				for _, offered := range [][]string{nil, {"y", "x", "h2"}} {
					checkLookup(t, m, lookupOf{a, port, name, offered})
				}
			}
		}
	}
}

type lookupOf struct {
	addr    netip.Addr
	port    uint16
	name    string
	offered []string
}

func checkLookup(t *testing.T, m *Map, q lookupOf) {
	t.Helper()
	want, served := reference(m, q.addr, q.port, q.name, q.offered)
	p := m.Port(q.addr, q.port)
	if (p != nil) != served {
		t.Fatalf("%v is served: %v, want %v\n%v", q, p != nil, served, m)
	}
	if p == nil {
		return
	}
	if got := p.Match(q.name, q.offered); got != want {
		t.Fatalf("%v is served by %v, want %v\n%v", q, got, want, m)
	}
	if p.Lookup(q.name) != p.Match(q.name, nil) {
		t.Fatalf("%v: Lookup is not Match without a protocol", q)
	}
}

// TestProtocolRoutes: a client that offers a protocol with a rule of its own gets that rule.
func TestProtocolRoutes(t *testing.T) {
	m := mustParse(t, `
:443 api.bank.example                       -> app:1
:443 alpn:acme-tls/1                        -> acme:1  mode=pass
:443 alpn:acme-tls/1 own.bank.example       -> own:1   mode=pass
:443 alpn:h2 alpn:http/1.1 *.bank.example   -> web:1
192.0.2.1:443 alpn:h2 api.bank.example      -> here:1
:444 alpn:h2 a.example                      -> only:1
`)
	for _, c := range []struct {
		addr, name, offered, want string
		port                      uint16
	}{
		{"", "api.bank.example", "", "app:1", 443},
		{"", "api.bank.example", "imap", "app:1", 443},
		{"", "api.bank.example", "acme-tls/1", "acme:1", 443},
		{"", "own.bank.example", "acme-tls/1", "own:1", 443},
		{"", "", "acme-tls/1", "acme:1", 443},
		{"", "api.bank.example", "h2", "web:1", 443},
		{"", "api.bank.example", "x http/1.1 acme-tls/1", "web:1", 443},
		{"", "other.example", "h2", "-", 443},
		{"192.0.2.1", "api.bank.example", "h2", "here:1", 443},
		{"192.0.2.1", "x.bank.example", "h2", "web:1", 443},
		{"192.0.2.1", "x.bank.example", "acme-tls/1", "acme:1", 443},
		{"", "a.example", "h2", "only:1", 444},
		{"", "a.example", "", "-", 444},
		{"", "api.bank.example", strings.Repeat("x ", maxOffered) + "h2", "app:1", 443}, // beyond what is looked at
	} {
		a, _ := netip.ParseAddr(c.addr)
		got := "-"
		if r := m.Port(a, c.port).Match(c.name, strings.Fields(c.offered)); r != nil {
			got = r.Backends[0].String()
		}
		if got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
	for _, r := range m.Rules {
		if r.Protocol == "h2" && fmt.Sprint(r.Options.ALPN) != "[h2]" {
			t.Errorf("%v agrees on %v", r, r.Options.ALPN)
		}
	}
}

// deepest is the hostile name: 253 bytes, 127 labels.
var deepest = strings.Repeat("a.", 126) + "a"

// manyNames is a map of n names on one port, a tenth of them wildcards.
func manyNames(n int) string {
	var b strings.Builder
	for i := range n {
		wild := ""
		if i%10 == 0 {
			wild = "*."
		}
		fmt.Fprintf(&b, ":443 %sapp-%d.customer-%d.bank.example -> 10.%d.%d.%d:8080\n", wild, i, i%1000, i>>16&0xff, i>>8&0xff, i&0xff)
	}
	return b.String()
}

func TestLookupAllocatesNothing(t *testing.T) {
	var b strings.Builder
	b.WriteString(manyNames(1000))
	for i := 1; i < 127; i++ { // a wildcard at every depth
		fmt.Fprintf(&b, ":443 *.%sa -> x:1\n", strings.Repeat("a.", i-1))
	}
	b.WriteString("192.0.2.1:443 own.example -> x:1\n")
	m := mustParse(t, b.String())
	own := netip.MustParseAddr("192.0.2.1")
	for _, name := range []string{"app-1.customer-1.bank.example", "x.app-10.customer-10.bank.example", "none.example", deepest, "b." + deepest[2:], strings.Repeat(".", 253), ""} {
		if n := testing.AllocsPerRun(100, func() { m.Port(own, 443).Lookup(name) }); n != 0 {
			t.Errorf("%.20q: %v allocations", name, n)
		}
	}
	if r := m.Port(own, 443).Lookup(deepest); r == nil || r.Name != "*."+deepest[2:] {
		t.Errorf("the deepest name is served by %v", r)
	}
}

// TestLargeMapsParseInTime has a generous factor over the measured times for slow
// machines and the race detector; what is quadratic exceeds it by far.
func TestLargeMapsParseInTime(t *testing.T) {
	var overlap, addrs strings.Builder
	overlap.WriteString(":1-65535 -> b:= mode=tcp\n")
	for i := range 10000 {
		fmt.Fprintf(&overlap, ":%d-%d n%d.example -> b:1\n", 1+i, 65535-i, i)
		fmt.Fprintf(&addrs, "10.0.%d.%d:%d -> b:1\n", i>>8&0xff, i&0xff, 1+i)
	}
	for name, text := range map[string]string{
		"names":     manyNames(50000),
		"overlap":   overlap.String(),
		"addresses": addrs.String() + ":1-60000 -> b:=\n",
		"same":      strings.Repeat(":443 a.example -> b:1\n", 30000),
	} {
		start := time.Now()
		Parse(Source{"m", text})
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("%s: %v", name, d)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, c := range []struct{ kind, name string }{
		{"exact", "app-%d.customer-%d.bank.example"},
		{"wildcard", "www.app-%d.customer-%d.bank.example"},
		{"miss", "app-%d.customer-%d.bank.other"},
	} {
		for _, n := range []int{10, 100000} {
			b.Run(fmt.Sprintf("%s/%d", c.kind, n), func(b *testing.B) {
				p := mustParse(b, manyNames(n)).Port(anyAddr, 443)
				names := make([]string, 1<<12)
				for i := range names {
					k := i * 7919 % n / 10 * 10 // a wildcard's number
					if c.kind == "exact" {
						k++
					}
					names[i] = fmt.Sprintf(c.name, k, k%1000)
					if got := p.Lookup(names[i]) != nil; got != (c.kind != "miss") {
						b.Fatalf("%s: found %v", names[i], got)
					}
				}
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					p.Lookup(names[i&(len(names)-1)])
				}
			})
		}
	}
	b.Run("hostile", func(b *testing.B) {
		var text strings.Builder
		for i := 1; i < 127; i++ {
			fmt.Fprintf(&text, ":443 *.%sa -> x:1\n", strings.Repeat("a.", i-1))
		}
		p := mustParse(b, text.String()).Port(anyAddr, 443)
		name := "b." + strings.Repeat("b.", 125) + "b"
		b.ReportAllocs()
		for b.Loop() {
			p.Lookup(name)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	for _, n := range []int{10000, 100000} {
		text := manyNames(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				mustParse(b, text)
			}
		})
	}
}

// TestPortSpeaksWhatItsRulesSay: all ports of a range, and a port of one address that differs from that of every address.
func TestPortSpeaksWhatItsRulesSay(t *testing.T) {
	m := mustParse(t, `
		:20-29 a.example -> b:1 starttls=smtp
		:22 b.example -> tls+smtp://b:1 starttls=smtp
		:30 a.example -> b:1
		10.0.0.1:22 c.example -> b:1 starttls=smtp
		10.0.0.1:23 c.example -> b:1 starttls=imap
		10.0.0.1:40 -> b:1 starttls=mysql`)
	for _, tt := range []struct {
		addr string
		port uint16
		want StartTLS
		name string
		rule int // line of the rule for the name, 0: none
	}{
		{"", 20, StartTLSSMTP, "a.example", 2},
		{"", 22, StartTLSSMTP, "b.example", 3},
		{"", 30, StartTLSOff, "a.example", 4},
		{"10.0.0.1", 22, StartTLSSMTP, "a.example", 2},
		{"10.0.0.1", 22, StartTLSSMTP, "c.example", 5},
		{"10.0.0.1", 23, StartTLSIMAP, "c.example", 6},
		{"10.0.0.1", 23, StartTLSIMAP, "a.example", 0},
		{"10.0.0.1", 29, StartTLSSMTP, "a.example", 2},
		{"10.0.0.1", 40, StartTLSMySQL, "", 7},
	} {
		var addr netip.Addr
		if tt.addr != "" {
			addr = netip.MustParseAddr(tt.addr)
		}
		p := m.Port(addr, tt.port)
		line := 0
		if r := p.Lookup(tt.name); r != nil {
			line = r.Pos.Line
		}
		if p.StartTLS != tt.want || line != tt.rule {
			t.Errorf("%s:%d speaks %s, and the rule for %q is on line %d; want %s, %d", tt.addr, tt.port, p.StartTLS, tt.name, line, tt.want, tt.rule)
		}
	}
}
