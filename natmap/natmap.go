// SPDX-License-Identifier: Apache-2.0

// Package natmap reads the map of the gateway: which listener and which server
// name lead to which backend port.
//
//	m, err := natmap.Parse(natmap.Source{Name: "edge.natmap", Text: `
//		:443          api.bank.example  -> 10.0.0.11:8080
//		:443          *.bank.example    -> 10.0.0.12:8080 10.0.0.13:8080/backup
//		:20000-20099                    -> 10.0.0.30:8000-8099
//	`})
//	if err != nil {
//		return err // every complaint: file:line:col: what is wrong; what to write instead
//	}
//	rule := m.Port(netip.Addr{}, 443).Lookup("api.bank.example")
//
// One rule stands on a line, or between semicolons:
//
//	LISTEN [alpn:PROTOCOL…] [NAME…] -> BACKEND… [KEY=VALUE…]
//	LISTEN [alpn:PROTOCOL…] [NAME…] -> redirect | reject | demo [KEY=VALUE…]
//	default KEY=VALUE…
//
// A # starts a comment that runs to the end of its line. A name is exact or
// *.suffix, which stands for one or more labels. An exact name beats the longest
// wildcard, which beats a rule without a name. Where a rule for one address and a
// rule for every address claim the same name, the one for the address wins. A rule
// with alpn: serves only clients that offer the protocol, and beats every rule without.
//
// On one address, a port, a protocol and a name belong to one rule; a range may hold another but
// not cross it; and a rule that reads no ClientHello (mode=tcp, redirect) shares its
// ports with none that does. Only redirects share them with each other: their names
// are those of the Host header. Such a rule for one address hides the rules for every address there, and
// is not seen where the address has rules of its own. The same holds for rules that
// differ in starttls=, on which the rules of a port have to agree.
//
// The package does no input or output: it opens no file, resolves no name, checks
// no certificate, reads no clock and dials nobody.
package natmap

import (
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// Bounds of a map. Parse reports what goes beyond them before it allocates for it.
const (
	MaxText   = 64 << 20  // bytes of all sources: half a million rules of 128 bytes
	MaxLine   = 128 << 10 // bytes of a line: the longest variable Linux passes to a process (MAX_ARG_STRLEN)
	MaxRules  = 1 << 19   // rules, counting each name of a line
	MaxPorts  = 1 << 18   // distinct pairs of address and port: a socket each, four whole addresses
	MaxErrors = 1000      // complaints; nobody reads more, and hostile text could make millions
)

// A Map is a parsed map. It is immutable and safe for concurrent use.
type Map struct {
	Rules []*Rule // in the order of the text; a line with n names is n rules, for each of its protocols

	listens  []Listen
	views    map[netip.Addr][]segment // the zero Addr: listeners on every address
	warnings []*Error
}

// Listens returns the distinct listeners, by address (every address first) and
// port. Ranges that overlap are merged; ranges that only touch are not.
func (m *Map) Listens() []Listen { return slices.Clone(m.listens) }

// Warnings returns what is legal but surely not meant, in the order of the text:
// a default line that reaches no rule, a backend that is its own listener, a
// backend named twice, a rule of nothing but backups.
func (m *Map) Warnings() []*Error { return slices.Clone(m.warnings) }

// String returns the map as canonical text, one rule a line, with the options of
// default lines written into the rules. Parsing it gives the same rules.
func (m *Map) String() string {
	var b []byte
	for _, r := range m.Rules {
		b = append(r.append(b), '\n')
	}
	return string(b)
}

// A Pos is a place in a source. Line and Col count from 1; Col counts characters.
type Pos struct {
	File      string
	Line, Col int
}

// String returns "file:line:col".
func (p Pos) String() string {
	return p.File + ":" + strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Col)
}

// A Rule serves one name (or every name) on one listener.
type Rule struct {
	Pos      Pos // of its name; of its listener when it has none
	Listen   Listen
	Protocol string // "" (whatever the client offers), "acme-tls/1" (RFC 7301): only clients that offer it
	Name     string // "" (every client), "api.bank.example", "*.bank.example"
	Action   Action
	Backends []Backend // of Forward, at least one; shared by the names of a line
	Options  Options
	Settings []Setting // what set Options, in the order of OptionDocs; shared like Backends

	order int // its index in Map.Rules
}

// String returns the rule as one line of canonical text.
func (r *Rule) String() string { return string(r.append(nil)) }

func (r *Rule) append(b []byte) []byte {
	b = append(b, r.Listen.String()...)
	if r.Protocol != "" {
		b = append(append(b, " alpn:"...), r.Protocol...)
	}
	if r.Name != "" {
		b = append(append(b, ' '), r.Name...)
	}
	b = append(b, " ->"...)
	if r.Action != Forward {
		b = append(append(b, ' '), r.Action.String()...)
	}
	for _, be := range r.Backends {
		b = append(append(b, ' '), be.String()...)
	}
	for _, s := range r.Settings {
		b = append(append(b, ' '), s.Key...)
		b = append(append(b, '='), s.Value...)
	}
	return b
}

// Plain reports whether the rule reads no ClientHello: mode=tcp and redirect. The
// first has no name and is alone on its address and port; redirects may have names,
// and share ports with each other.
func (r *Rule) Plain() bool {
	return r.Action == Redirect || r.Action == Forward && r.Options.Mode == TCP
}

// A Listen is an address and the ports Lo to Hi, both included. The zero Addr is
// every address, IPv4 and IPv6; an IPv4 address is never in its IPv6-mapped form.
type Listen struct {
	Addr   netip.Addr
	Lo, Hi uint16
}

// Contains reports whether port is one of l's.
func (l Listen) Contains(port uint16) bool { return l.Lo <= port && port <= l.Hi }

// Len returns the number of ports, 1 to 65535.
func (l Listen) Len() int { return int(l.Hi) - int(l.Lo) + 1 }

// String returns ":443", "192.0.2.1:443", "[2001:db8::1]:9000-9010".
func (l Listen) String() string {
	host := ""
	if l.Addr.IsValid() {
		host = bracket(l.Addr.String())
	}
	return host + ":" + ports(l.Lo, l.Hi)
}

func ports(lo, hi uint16) string {
	s := strconv.Itoa(int(lo))
	if lo != hi {
		s += "-" + strconv.Itoa(int(hi))
	}
	return s
}

// An Action is what a rule does with a connection.
type Action uint8

const (
	Forward  Action = iota // to one of Backends
	Redirect               // answer plain HTTP with 308 to https
	Reject                 // refuse
	Demo                   // the built-in backend
)

var actionWords = []string{"forward", "redirect", "reject", "demo"}

// String returns the word of the map ("forward" has none there).
func (a Action) String() string { return word(actionWords, int(a)) }

// A Mode is how much of a forwarded connection the gateway looks at.
type Mode uint8

const (
	Terminate Mode = iota // TLS ends here
	Pass                  // the ClientHello is read, nothing is touched
	TCP                   // nothing is read
)

var modeWords = []string{"terminate", "pass", "tcp"}

// String returns the value of mode=.
func (m Mode) String() string { return word(modeWords, int(m)) }

// A ProxyVersion is the PROXY protocol header written to backends.
type ProxyVersion uint8

const (
	ProxyOff ProxyVersion = iota
	ProxyV1
	ProxyV2
)

var proxyWords = []string{"off", "v1", "v2"}

// String returns the value of proxy=.
func (v ProxyVersion) String() string { return word(proxyWords, int(v)) }

// Truncation is how the end of a stream of TLS without a close_notify goes on to a side that speaks no TLS: anybody on the
// way could have cut the stream there (RFC 8446, section 6.1).
type Truncation uint8

const (
	TruncationBySide Truncation = iota // a client's as FIN, a backend's as reset
	TruncationFIN                      // as FIN, whoever's it is
	TruncationReset                    // as reset
)

var truncationWords = []string{"fin", "reset"}

// String returns the value of truncation=, "" for none.
func (t Truncation) String() string {
	if t == TruncationBySide {
		return ""
	}
	return word(truncationWords, int(t)-1)
}

// KTLS says whether the kernel may open and seal a rule's TLS.
type KTLS uint8

const (
	KTLSAuto KTLS = iota // where it can, and where it pays
	KTLSOff
	KTLSRX // as KTLSAuto; the kernel may open what is received even if faults are known in how it does that
)

var ktlsWords = []string{"auto", "off", "rx"}

// String returns the value of ktls=.
func (k KTLS) String() string { return word(ktlsWords, int(k)) }

func word(words []string, i int) string {
	if i < len(words) {
		return words[i]
	}
	return strconv.Itoa(i)
}

// Off is the value of a timer that was switched off, where zero means that the
// gateway's setting holds.
const Off time.Duration = -1

// Options are the options of a rule, those of default lines included. The zero
// value of a field leaves it to the gateway's setting.
type Options struct {
	Mode     Mode
	Proxy    ProxyVersion
	Idle     time.Duration // or Off
	Connect  time.Duration
	Linger   time.Duration
	Lifetime time.Duration // or Off
	Drain    time.Duration
	MinTLS   uint16   // 0x0303 or 0x0304, as in RFC 8446 section 4.2.1
	ALPN     []string // protocols offered, preferred first (RFC 7301)
	Cert     string   // name of the certificate for a client that sends none
	KTLS     KTLS

	Truncation Truncation
	HTTPSPort  uint16 // where redirect sends to

	BackendCA         string // name of the CAs that tls:// backends are verified against; "": the system's
	BackendName       string // what they are asked for and verified as; "": their host; NameOfClient: what the client asked for
	BackendCert       string // a name of the certificate that they are shown, if they ask for one
	BackendUnverified bool   // whoever answers is taken for the backend

	Pool PoolOptions
	Gate GateOptions
	TLVs TLVOptions

	StartTLS StartTLS // how clients ask for TLS, where they begin in the clear
}

// NameOfClient is the value of backend-name= that stands for the name that the client asked for.
const NameOfClient = "sni"

// A Setting is one option of a rule and where it came from.
type Setting struct {
	Key, Value string // as String writes them
	Pos        Pos
	Default    bool // from a default line
}
