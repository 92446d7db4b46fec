// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An OptionDoc documents one option.
type OptionDoc struct {
	Key     string // "mode"
	Value   string // "terminate|pass|tcp"
	Rules   string // the rules it has a meaning for: "terminate, pass, tcp"
	Help    string // one line
	Default string // what it is when nobody sets it, in words; "" if a setting says that
	Setting string // the setting that does, without its prefix: "IDLE_TIMEOUT"

	row *option
}

// AppliesTo says whether the option has a meaning for the rule.
func (d *OptionDoc) AppliesTo(r *Rule) bool {
	o := d.row
	return o.uses&kindOf(r.Action, r.Options.Mode) != 0 && !(o.unnamed && r.Name != "") && !(o.header && r.Options.Proxy != ProxyV2) &&
		!(o.encrypts && !slices.ContainsFunc(r.Backends, func(b Backend) bool { return b.TLS }))
}

// settings begins the default of an option that a setting gives.
const settings = "setting "

// OptionDocs returns every option a rule can have, in canonical order.
func OptionDocs() []OptionDoc {
	docs := make([]OptionDoc, len(options))
	for i := range options {
		o := &options[i]
		docs[i] = OptionDoc{Key: o.key, Value: o.value, Rules: o.where(), Help: o.help, Default: o.def, row: o}
		if name, ok := strings.CutPrefix(o.def, settings); ok {
			docs[i].Default, docs[i].Setting = "", name
		}
	}
	return docs
}

// An option is a row of the registry: to add an option, add a row (and its field
// to Options).
type option struct {
	key, value, help string
	def              string // what it is when nobody sets it, or the setting that says so (settings)
	uses             kind
	unnamed          bool // only for a rule without a name
	encrypts         bool // only for a rule with a tls:// backend
	unrouted         bool // only for a rule without alpn:
	header           bool // only for a rule with proxy=v2
	// set reads v into its field of o, or complains about v.
	set func(p *parser, o *Options, v token)
	// show writes the field as set reads it.
	show func(o *Options) string
}

var options = slices.Concat(ruleOptions, poolOptions, gateOptions, startTLSOptions, tlvOptions)

var ruleOptions = []option{
	{
		key: "mode", def: "terminate", value: "terminate|pass|tcp", uses: terminate | pass | tcp | demo,
		help: "terminate: end TLS here; pass: route on the name and leave TLS to the backend; tcp: forward bytes unread (default terminate)",
		set:  enum(modeWords, nil, func(o *Options) *Mode { return &o.Mode }),
		show: func(o *Options) string { return o.Mode.String() },
	},
	{
		key: "proxy", def: "off", value: "v1|v2|off", uses: terminate | pass | tcp,
		help: "PROXY protocol header sent to the backend (default off)",
		set: enum(proxyWords, map[string]string{"1": "v1", "2": "v2", "none": "off", "no": "off", "on": "v2", "yes": "v2"},
			func(o *Options) *ProxyVersion { return &o.Proxy }),
		show: func(o *Options) string { return o.Proxy.String() },
	},
	timer("idle", settings+"IDLE_TIMEOUT", "ends a connection that carries no byte for this time", terminate|pass|tcp|demo, true,
		func(o *Options) *time.Duration { return &o.Idle }),
	timer("connect", settings+"CONNECT_TIMEOUT", "time to reach a backend, for all backends together, with their TLS handshakes", terminate|pass|tcp, false,
		func(o *Options) *time.Duration { return &o.Connect }),
	timer("linger", settings+"LINGER_TIMEOUT", "ends a half-closed connection whose open half carries no byte for this time", terminate|pass|tcp|demo, false,
		func(o *Options) *time.Duration { return &o.Linger }),
	timer("lifetime", "off", "ends a connection this time after it was accepted", terminate|pass|tcp|demo, true,
		func(o *Options) *time.Duration { return &o.Lifetime }),
	timer("drain", "until they end", "after a reload that removes the rule, its connections may go on for this time (default: until they end)", terminate|pass|tcp|demo, false,
		func(o *Options) *time.Duration { return &o.Drain }),
	{
		key: "min-tls", def: settings + "MIN_TLS", value: "1.2|1.3", uses: terminate | demo,
		help: "lowest TLS version a client may speak",
		set:  setMinTLS,
		show: func(o *Options) string { return "1." + strconv.Itoa(int(o.MinTLS)-0x0301) },
	},
	{
		key: "alpn", def: "none", value: "PROTOCOL,…", uses: terminate | demo, unrouted: true,
		help: "application protocols offered to the client, preferred first, for example h2,http/1.1",
		set:  setALPN,
		show: func(o *Options) string { return strings.Join(o.ALPN, ",") },
	},
	{
		key: "cert", def: "by address", value: "NAME", uses: terminate | demo, unnamed: true,
		help: "certificate for a client that sends no name",
		set:  func(p *parser, o *Options, v token) { o.Cert = p.name(v) },
		show: func(o *Options) string { return o.Cert },
	},
	{
		key: "ktls", def: settings + "KTLS", value: "auto|rx|off", uses: terminate | tcp | demo,
		help: "auto: the kernel sends TLS for connections that stream, and receives it from Linux 7.0 on; rx: it receives on older kernels too; off: neither (default auto)",
		set: enum(ktlsWords, map[string]string{"on": "auto", "yes": "auto", "no": "off"},
			func(o *Options) *KTLS { return &o.KTLS }),
		show: func(o *Options) string { return o.KTLS.String() },
	},
	{
		key: "truncation", def: "fin from clients, reset from backends", value: "fin|reset", uses: terminate | tcp | demo,
		help: "what a plain side gets if the TLS side ends without a close_notify, as an attacker on the path can cause (default fin from clients, many of which end like that, reset from backends)",
		set:  setTruncation,
		show: func(o *Options) string { return o.Truncation.String() },
	},
	{
		key: "https-port", def: "443", value: "PORT", uses: redirect,
		help: "port in the redirect's address (default 443)",
		set:  func(p *parser, o *Options, v token) { o.HTTPSPort, _ = p.port(v) },
		show: func(o *Options) string { return strconv.Itoa(int(o.HTTPSPort)) },
	},
	{
		key: "backend-ca", def: "the system's", value: "NAME", uses: terminate | tcp, encrypts: true,
		help: "CAs that backends' certificates have to be signed by: NAME.pem in TLSNAT_BACKEND_CAS (default: the system's)",
		set:  func(p *parser, o *Options, v token) { o.BackendCA = p.fileName(v) },
		show: func(o *Options) string { return o.BackendCA },
	},
	{
		key: "backend-name", def: "the backend's host", value: "NAME|sni", uses: terminate | tcp, encrypts: true,
		help: "name that the backend's certificate has to be for, sent as SNI; sni: the name that the client sent (default: the backend's host)",
		set:  setBackendName,
		show: func(o *Options) string { return o.BackendName },
	},
	{
		key: "backend-cert", def: "none", value: "NAME", uses: terminate | tcp, encrypts: true,
		help: "certificate shown to backends that ask for one, given by a name in it",
		set:  func(p *parser, o *Options, v token) { o.BackendCert = p.name(v) },
		show: func(o *Options) string { return o.BackendCert },
	},
	{
		key: "backend-verify", def: "on", value: "on|off", uses: terminate | tcp, encrypts: true,
		help: "off: accept any certificate; an attacker on the path can then read everything (default on)",
		set: func(p *parser, o *Options, v token) {
			var off uint8
			enum(verifyWords, map[string]string{"yes": "on", "true": "on", "no": "off", "none": "off", "false": "off"},
				func(*Options) *uint8 { return &off })(p, o, v)
			o.BackendUnverified = off == 1
		},
		show: func(o *Options) string {
			if o.BackendUnverified {
				return verifyWords[1]
			}
			return verifyWords[0]
		},
	},
}

func setTruncation(p *parser, o *Options, v token) {
	n := uint8(len(truncationWords))
	enum(truncationWords, map[string]string{"rst": "reset", "close": "fin"}, func(*Options) *uint8 { return &n })(p, o, v)
	if int(n) < len(truncationWords) {
		o.Truncation = TruncationFIN + Truncation(n)
	}
}

func setBackendName(p *parser, o *Options, v token) {
	v.text = strings.TrimSuffix(v.text, ".")
	if _, err := netip.ParseAddr(strings.Trim(v.text, "[]")); err == nil {
		p.fault(v, quote(v.text)+" is an address, not a name", "write tls://"+clip(v.text)+":PORT as the backend: its certificate then has to be for the address")
		return
	}
	o.BackendName = p.hostname(v)
}

var verifyWords = []string{"on", "off"}

// maxFileName bounds a name that becomes a file's: NAME_MAX is 255, and .pem follows.
const maxFileName = 200

// fileName reads the name of a file, without its extension. It never leads out of its directory.
func (p *parser) fileName(t token) string {
	name := strings.TrimSuffix(t.text, ".pem")
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
	if name == "" || len(name) > maxFileName || name[0] == '.' || name[0] == '-' || strings.Trim(name, letters) != "" {
		p.fault(t, quote(t.text)+" is not the name of a file", "write letters, digits, dots, hyphens and underscores, without .pem")
		return ""
	}
	return name
}

// where lists the rules that o has a meaning for.
func (o *option) where() string {
	var words []string
	for i, w := range kindWords {
		if o.uses&(1<<i) != 0 {
			words = append(words, w)
		}
	}
	s := strings.Join(words, ", ")
	if o.unnamed {
		s += " (without a name)"
	}
	if o.encrypts {
		s += " (to tls:// backends)"
	}
	if o.header {
		s += " (with proxy=v2)"
	}
	return s
}

// A kind is what a rule does, seen by its options. It is a set in option.uses.
type kind uint8

const (
	terminate kind = 1 << iota
	pass
	tcp
	redirect
	reject
	demo
)

var kindWords = []string{"terminate", "pass", "tcp", "redirect", "reject", "demo"}

func kindOf(a Action, m Mode) kind {
	switch a {
	case Redirect:
		return redirect
	case Reject:
		return reject
	case Demo:
		return demo
	}
	return terminate << m
}

// String returns the kind as the map writes it.
func (k kind) String() string {
	w := kindWords[bits.TrailingZeros8(uint8(k))]
	if k <= tcp {
		return "mode=" + w
	}
	return w
}

// enum reads one of words into a field whose values are their indexes. slips maps
// other spellings to the word that is meant.
func enum[T ~uint8](words []string, slips map[string]string, field func(*Options) *T) func(*parser, *Options, token) {
	return func(p *parser, o *Options, v token) {
		if i := slices.Index(words, v.text); i >= 0 {
			*field(o) = T(i)
			return
		}
		hint := "write " + list(words)
		if w := slips[strings.ToLower(v.text)]; w != "" {
			hint = "did you mean " + w + "?"
		} else if w := Nearest(v.text, words); w != "" {
			hint = "did you mean " + w + "?"
		}
		p.fault(v, quote(v.text)+" is not one of the values", hint)
	}
}

const (
	minTimer = time.Millisecond     // below it a timer fires before a packet can arrive
	maxTimer = 366 * 24 * time.Hour // above it a number is a slip
)

// timer is the row of an option whose value is a duration.
func timer(key, def, help string, uses kind, off bool, field func(*Options) *time.Duration) option {
	row := option{key: key, def: def, value: "DURATION", help: help, uses: uses}
	hint := "write a duration with its unit, as in 90s, 15m or 24h"
	if off {
		row.value += "|off"
		hint += ", or off"
	}
	row.set = func(p *parser, o *Options, v token) {
		if off && v.text == "off" {
			*field(o) = Off
			return
		}
		d, err := time.ParseDuration(v.text)
		switch {
		case err != nil:
			p.fault(v, quote(v.text)+" is not a duration", durationHint(v.text, hint))
		case d < minTimer || d > maxTimer:
			p.fault(v, quote(v.text)+" is out of range", "write a duration from 1ms to 8784h")
		default:
			*field(o) = d
		}
	}
	row.show = func(o *Options) string { return duration(*field(o)) }
	return row
}

func durationHint(s, hint string) string {
	if n, ok := strings.CutSuffix(s, "d"); ok && digits(n) && len(n) < 4 {
		days, _ := strconv.Atoi(n)
		return fmt.Sprintf("write %dh", 24*days)
	}
	if digits(s) {
		return "write the unit: " + clip(s) + "s"
	}
	return hint
}

// duration writes d without the zero units of Duration.String.
func duration(d time.Duration) string {
	if d == Off {
		return "off"
	}
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

func setMinTLS(p *parser, o *Options, v token) {
	switch v.text {
	case "1.2":
		o.MinTLS = 0x0303
	case "1.3":
		o.MinTLS = 0x0304
	case "1.0", "1.1":
		p.fault(v, "TLS "+v.text+" is not spoken here (RFC 8996)", "write 1.2 or 1.3")
	default:
		p.fault(v, quote(v.text)+" is not a TLS version", "write 1.2 or 1.3")
	}
}

// alpnSlips are protocol names that look registered and are not.
var alpnSlips = map[string]string{
	"http/2": "h2", "http2": "h2", "http/2.0": "h2", "http1.1": "http/1.1", "http1": "http/1.1", "http/1": "http/1.1", "h1": "http/1.1", "http": "http/1.1",
}

// maxALPN bounds the bytes of the list: what a server would ever choose from, far
// below the two length bytes of RFC 7301 section 3.1.
const maxALPN = 1024

func setALPN(p *parser, o *Options, v token) {
	if len(v.text) > maxALPN {
		p.fault(v, fmt.Sprintf("the list has %d bytes", len(v.text)), fmt.Sprintf("write at most %d", maxALPN))
		return
	}
	var list []string
	for at, item := 0, ""; at <= len(v.text); at += len(item) + 1 {
		item, _, _ = strings.Cut(v.text[at:], ",")
		t := v.sub(at, at+len(item))
		slip := alpnSlips[strings.ToLower(item)]
		switch {
		case item == "":
			p.fault(t, "a protocol of the list is empty", "write protocols with one comma between them: h2,http/1.1")
		case len(item) > 255 || !ascii(item):
			p.fault(t, quote(item)+" is not a protocol", "write a registered one, as in h2,http/1.1 (RFC 7301 section 6)")
		case slip != "":
			p.fault(t, quote(item)+" is not a registered protocol", "did you mean "+slip+"?")
		case slices.Contains(list, item):
			p.fault(t, quote(item)+" stands twice", "write it once")
		}
		list = append(list, item)
	}
	o.ALPN = list
}

// assignments are the options of a line: at the index of its row, nil or what was
// assigned.
type assignments []*assignment

type assignment struct {
	token   token // KEY=VALUE
	value   token
	setting Setting
	line    *defaultLine // nil on a rule
}

// A defaultLine is remembered to warn when no rule takes anything from it.
type defaultLine struct {
	pos  Pos
	used bool
}

func newAssignments() assignments { return make(assignments, len(options)) }

// optionLike reports whether s is KEY=VALUE and not a backend.
func optionLike(s string) bool {
	i := strings.IndexByte(s, '=')
	return i > 0 && strings.IndexFunc(s[:i], func(c rune) bool {
		return c != '-' && c != '_' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z')
	}) < 0
}

// spaced complains about KEY = VALUE and sets n to the tokens it takes up.
func (p *parser) spaced(toks []token, n *int) bool {
	t := toks[0]
	next := ""
	if len(toks) > 1 {
		next = toks[1].text
	}
	value := ""
	switch {
	case optionLike(t.text+"=") && strings.HasPrefix(next, "=") && next != "=>" && next != "==>":
		if *n, value = 2, next[1:]; value == "" && len(toks) > 2 {
			*n, value = 3, toks[2].text
		}
	case optionLike(t.text) && strings.HasSuffix(t.text, "=") && next != "" && !strings.ContainsAny(next, ":="):
		*n, value = 2, next
	default:
		return false
	}
	p.fault(t, "a space stands beside the =", "write "+clip(strings.TrimSuffix(t.text, "="))+"="+clip(value))
	return true
}

// lookup returns the index of the row for a key, or -1 after a complaint.
func (p *parser) lookup(t token) int {
	if i := slices.IndexFunc(options, func(o option) bool { return o.key == t.text }); i >= 0 {
		return i
	}
	keys := make([]string, len(options))
	for i, o := range options {
		keys[i] = o.key
	}
	hint := "options are " + strings.Join(keys, ", ")
	if w := Nearest(strings.ReplaceAll(t.text, "_", "-"), keys); w != "" {
		hint = "did you mean " + w + "?"
	}
	p.fault(t, "unknown option "+quote(t.text), hint)
	return -1
}

// assign reads KEY=VALUE into a, and returns the index of the row or -1.
func (p *parser) assign(a assignments, t token) int {
	eq := strings.IndexByte(t.text, '=')
	i := p.lookup(t.sub(0, eq))
	if i < 0 {
		return i
	}
	o, value := &options[i], t.from(eq+1)
	if a[i] != nil {
		p.fault(t, o.key+" stands twice on the line", "write it once")
		return i
	}
	a[i] = &assignment{token: t, value: value, setting: Setting{Key: o.key, Pos: p.pos(t)}}
	if value.text == "" {
		p.fault(t, o.key+"= has no value", "write "+o.key+"="+o.value)
		return i
	}
	faults := len(p.errs)
	var scratch Options
	if o.set(p, &scratch, value); len(p.errs) == faults {
		a[i].setting.Value = o.show(&scratch)
	}
	return i
}

// defaultLine reads default KEY=VALUE… and merges it into the defaults of the file.
func (p *parser) defaultLine(word token, toks []token) {
	if len(toks) == 0 {
		p.fault(word, "default sets nothing", "write default KEY=VALUE")
		return
	}
	line := &defaultLine{pos: p.pos(word)}
	here := newAssignments()
	for n := 1; len(toks) > 0; toks, n = toks[n:], 1 {
		t := toks[0]
		if p.spaced(toks, &n) {
			continue
		}
		if !optionLike(t.text) { // most probably a rule: the rest of it is no option either
			p.fault(t, quote(t.text)+" is not an option", "write options as KEY=VALUE behind default, rules on lines of their own")
			break
		}
		p.assignDefault(here, t, line)
	}
	p.defaults = slices.Clone(p.defaults)
	for i, a := range here {
		if a != nil {
			p.defaults[i] = a
		}
	}
	p.lines = append(p.lines, line)
}

func (p *parser) assignDefault(here assignments, t token, line *defaultLine) {
	faults := len(p.errs)
	i := p.assign(here, t)
	if i < 0 {
		return
	}
	if i == modeRow {
		p.lostMode = len(p.errs) > faults
	}
	if len(p.errs) > faults {
		here[i] = nil
		p.defaults = slices.Clone(p.defaults)
		p.defaults[i] = nil
		return
	}
	here[i].setting.Default, here[i].line = true, line
}

// settle gives a rule its options, its own before the defaults, and checks that
// they go together with the rest of it.
func (p *parser) settle(d *draft) {
	mode := d.own[modeRow]
	if mode == nil && d.Action == Forward {
		mode = p.defaults[modeRow]
	}
	if mode != nil {
		options[modeRow].set(p, &d.Options, mode.value)
	}
	k := kindOf(d.Action, d.Options.Mode)
	for i := range options {
		o, a := &options[i], d.own[i]
		if a != nil {
			p.checkUse(o, a, k, d)
		} else if a = p.defaults[i]; a == nil || !o.inherited(k, d) {
			continue
		}
		o.set(p, &d.Options, a.value)
		d.Settings = append(d.Settings, a.setting)
		if a.line != nil {
			a.line.used = true
		}
	}
	p.checkMode(d, mode)
	p.checkStartTLS(d)
}

// modeRow is the index of mode in options: it decides what the others mean.
const modeRow = 0

// inherited reports whether a default line sets o for such a rule, whose options before o are set. Demo has one
// mode only, so that a default mode does not reach it.
func (o *option) inherited(k kind, d *draft) bool {
	return o.uses&k != 0 && !(o.unnamed && d.named()) && !(o.encrypts && !d.encrypts()) && !(o.unrouted && d.alpn > 0) && !(o.header && d.Options.Proxy != ProxyV2) && !(o.key == "mode" && k == demo)
}

// checkUse complains about an option on a rule that it has no meaning for.
func (p *parser) checkUse(o *option, a *assignment, k kind, d *draft) {
	switch {
	case o.uses&k == 0:
		p.fault(a.token, o.key+"= has no meaning for "+k.String(), "remove it; it goes with "+o.where())
	case o.unnamed && d.named():
		p.fault(a.token, o.key+"= is for clients that send no name, this rule for those that do", "write it on the rule without a name")
	case o.encrypts && !d.encrypts():
		p.fault(a.token, o.key+"= is for encrypted backends, and this rule has none", "write tls:// before a backend, or remove "+o.key+"=")
	case o.unrouted && d.alpn > 0:
		p.fault(a.token, "the rule is for clients that offer "+clip(d.protocols()[0].text[len(protocolMark):])+", which is what is agreed on", "remove "+o.key+"=")
	case o.header && d.Options.Proxy != ProxyV2 && a.setting.Value != "off":
		p.fault(a.token, o.key+"= needs a PROXY header of version 2 to the backends, and this rule has proxy="+d.Options.Proxy.String(), "write proxy=v2, or remove "+o.key+"=")
	case o.key == "mode" && k == demo && a.setting.Value != "terminate":
		p.fault(a.token, "demo ends TLS itself", "remove "+a.token.text)
	}
}

// checkMode complains about names and backends that the mode cannot serve. mode is
// where it was set, if it was.
func (p *parser) checkMode(d *draft, mode *assignment) {
	says := "mode=" + d.Options.Mode.String()
	if mode != nil && mode.setting.Default {
		says += " (set at " + mode.setting.Pos.String() + ")"
	}
	switch {
	case d.Action == Redirect && d.alpn > 0:
		p.fault(d.left[1], "redirect answers plain HTTP, in which the client offers no protocol", "remove "+clip(d.left[1].text))
	case d.Action != Forward:
	case d.Options.Mode == TCP && d.alpn > 0:
		p.fault(d.left[1], says+" reads nothing, so it cannot tell protocols apart", "remove the protocol, or write mode=pass")
	case d.Options.Mode == TCP && d.named():
		p.fault(d.left[1], says+" reads nothing, so it cannot tell names apart", "remove the name, or write mode=pass")
	case d.Options.Mode == Pass && d.encrypts():
		plain, _, _ := tlsScheme(d.tls)
		p.fault(d.tls, says+" leaves TLS as the client sent it, so it cannot encrypt to a backend once more", "write "+clip(plain.text)+", or mode=terminate")
	case d.Options.Mode == TCP && d.encrypts() && d.Options.BackendName == NameOfClient:
		p.fault(d.tls, says+" reads no name, so backend-name=sni has none for this backend", "write backend-name= with a name, or mode=terminate")
	}
}
