// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A Source is one text of a map. Name is what complaints call it: a file's name,
// or TLSNAT_MAP for a map given inline.
type Source struct{ Name, Text string }

// A Parser holds what the grammar borrows from elsewhere.
type Parser struct {
	// ToASCII turns an internationalised name into its ASCII form (IDNA, RFC 5891).
	// When nil, a name that is not ASCII is an error that asks for the xn-- form.
	ToASCII func(string) (string, error)
}

// Parse reads a map without IDNA.
func Parse(src ...Source) (*Map, error) { return Parser{}.Parse(src...) }

// Parse reads all sources of one map. An error is an Errors with every complaint,
// and the map is then nil. No source at all is an empty map.
func (c Parser) Parse(src ...Source) (*Map, error) {
	p := &parser{toASCII: c.ToASCII}
	size := 0
	for _, s := range src {
		p.file = s.Name
		if size += len(s.Text); size > MaxText {
			p.fault(token{line: 1, col: 1}, fmt.Sprintf("the map is larger than %d MiB", MaxText>>20), "split it over several gateways")
			break
		}
		p.source(s.Text)
	}
	m := p.build()
	if len(p.errs) > 0 {
		sortErrors(p.errs, src)
		return nil, p.errs
	}
	p.warn(m)
	sortErrors(m.warnings, src)
	return m, nil
}

// Name reads one name as it stands in a rule: exact or a wildcard. It returns it in lower case and ASCII; an error is an
// Errors whose columns count in text.
func (c Parser) Name(text string) (string, error) {
	p := &parser{toASCII: c.ToASCII}
	name := p.name(token{text, 1, 1})
	if len(p.errs) > 0 {
		return "", p.errs
	}
	return name, nil
}

// A token is a piece of a line. line and col count from 1, col in characters.
type token struct {
	text      string
	line, col int
}

// sub returns the bytes i to j of t as a token of their own place.
func (t token) sub(i, j int) token {
	return token{t.text[i:j], t.line, t.col + utf8.RuneCountInString(t.text[:i])}
}

func (t token) from(i int) token { return t.sub(i, len(t.text)) }

func (t token) cutPrefix(s string) (token, bool) {
	if strings.HasPrefix(t.text, s) {
		return t.from(len(s)), true
	}
	return t, false
}

// parser is the state of one Parse.
type parser struct {
	toASCII  func(string) (string, error)
	file     string
	errs     Errors
	full     bool // MaxErrors or MaxRules reached: nothing more is read
	rules    []*Rule
	defaults assignments
	lines    []*defaultLine
	lists    map[Pos][]Member // of allow= and deny=, by where they stand
	lostMode bool             // a default mode= was not understood: what depends on it is not checked
}

func (p *parser) pos(t token) Pos { return Pos{p.file, t.line, t.col} }

// fault records a complaint about t. A complaint never stops the reading: every
// other token and line is still looked at.
func (p *parser) fault(t token, msg, hint string) {
	p.complain(p.pos(t), t.text, msg, hint)
}

func (p *parser) complain(at Pos, text, msg, hint string) {
	if len(p.errs) > MaxErrors {
		return
	}
	if len(p.errs) == MaxErrors {
		p.full = true
		msg, hint = fmt.Sprintf("more than %d complaints", MaxErrors), "the rest is not shown"
	}
	p.errs = append(p.errs, &Error{at.File, at.Line, at.Col, clip(text), msg, hint})
}

func (p *parser) source(text string) {
	if strings.HasPrefix(text, "\xff\xfe") || strings.HasPrefix(text, "\xfe\xff") {
		p.fault(token{line: 1, col: 1}, "the text is UTF-16", "save it as UTF-8")
		return
	}
	p.defaults, p.lostMode = newAssignments(), false
	text = strings.TrimPrefix(text, "\ufeff") // a byte order mark
	s := scanner{p: p}
	for n := 1; text != "" && !p.full; n++ {
		var line string
		line, text, _ = strings.Cut(text, "\n")
		line = strings.TrimSuffix(line, "\r")
		if len(line) > MaxLine {
			p.fault(token{line: n, col: 1}, fmt.Sprintf("the line is longer than %d KiB", MaxLine>>10), "put each rule on a line of its own")
			continue
		}
		s.scan(line, n)
	}
}

// A scanner cuts lines into statements and hands them to its parser.
type scanner struct {
	p     *parser
	line  int
	toks  []token // of the statement so far; the array is used again
	arrow bool    // the statement has its ->
	bad   bool    // the statement holds a character that no map may hold
}

// scan reads one line. Tokens end at white space, the statement at a semicolon, the
// line at a #. The first -> of a statement is a token wherever it stands.
func (s *scanner) scan(line string, n int) {
	s.line = n
	start, startCol, col := -1, 0, 0
	end := func(i int) {
		if start >= 0 {
			s.toks = append(s.toks, token{line[start:i], n, startCol})
			start = -1
		}
	}
	i, width := 0, 0
	for ; i < len(line) && line[i] != '#'; i += width {
		c := rune(line[i])
		width = 1
		if c >= utf8.RuneSelf {
			c, width = utf8.DecodeRuneInString(line[i:])
		}
		col++
		switch {
		case c == ' ' || c == '\t':
			end(i)
		case c == ';':
			end(i)
			s.flush()
		case c == '-' && !s.arrow && strings.HasPrefix(line[i:], "->") && !(start >= 0 && line[i-1] == '-'):
			end(i)
			s.toks = append(s.toks, token{"->", n, col})
			s.arrow, width = true, 2
			col++
		default:
			if (c < ' ' || c >= 0x7f) && !allowed(c, width) {
				s.refuse(token{line[i : i+width], n, col}, c, width)
			}
			if start < 0 {
				start, startCol = i, col
			}
		}
	}
	end(i)
	s.flush()
}

// allowed reports whether c may stand in a map: no control character, no space that
// does not separate, nothing that cannot be seen.
func allowed(c rune, width int) bool {
	return !(c == utf8.RuneError && width == 1) && unicode.IsGraphic(c) && !unicode.IsSpace(c)
}

// refuse complains about a character, once a statement.
func (s *scanner) refuse(t token, c rune, width int) {
	if s.bad {
		return
	}
	s.bad = true
	switch {
	case c == utf8.RuneError && width == 1:
		s.p.fault(t, fmt.Sprintf("byte 0x%02X is not UTF-8", t.text[0]), "save the map as UTF-8")
	case unicode.IsSpace(c) && c >= utf8.RuneSelf:
		s.p.fault(t, fmt.Sprintf("character %U looks like a space", c), "write an ordinary space")
	default:
		s.p.fault(t, fmt.Sprintf("character %U cannot be seen", c), "delete it")
	}
}

func (s *scanner) flush() {
	if len(s.toks) > 0 && !s.bad && !s.p.full {
		s.p.statement(s.toks)
	}
	s.toks, s.arrow, s.bad = s.toks[:0], false, false
}

func (p *parser) statement(toks []token) {
	if toks[0].text == "default" {
		p.defaultLine(toks[0], toks[1:])
		return
	}
	p.rule(toks)
}

// rule reads LISTEN [alpn:PROTOCOL…] [NAME…] -> BACKEND… [KEY=VALUE…] and keeps it when it has no
// fault.
func (p *parser) rule(toks []token) {
	faults := len(p.errs)
	left, arrow, right := p.arrow(toks)
	if len(left) == 0 {
		p.fault(arrow, "nothing stands before the ->", "write the listener there, as in :443")
		return
	}
	d := &draft{left: left, own: newAssignments()}
	listen := &d.Listen
	if !p.listen(left[0], listen) {
		listen = nil
	}
	names := p.names(d)
	if arrow.text == "" {
		return
	}
	p.right(d, arrow, right, listen)
	if p.lostMode && d.own[modeRow] == nil && d.Action == Forward {
		return
	}
	if len(p.errs) == faults {
		p.settle(d)
	}
	if len(p.errs) == faults {
		p.keep(d, names)
	}
}

// A draft is a rule while its line is read.
type draft struct {
	Rule
	left []token // its listener, its protocols and its names
	alpn int     // of left, how many are protocols
	tls  token   // the first backend that is encrypted to
	own  assignments
}

func (d *draft) named() bool    { return len(d.left) > 1+d.alpn }
func (d *draft) encrypts() bool { return d.tls.text != "" }

// protocols are the words with alpn:.
func (d *draft) protocols() []token { return d.left[1 : 1+d.alpn] }

// keep adds the rule, once for each of its names, and that for each of its protocols.
func (p *parser) keep(d *draft, names []string) {
	for _, t := range d.protocols() {
		d.Protocol = strings.TrimPrefix(t.text, protocolMark)
		if k := kindOf(d.Action, d.Options.Mode); k == terminate || k == demo {
			d.Options.ALPN = []string{d.Protocol} // what the client is there for is what is agreed on
		}
		if p.keepNames(d, names, t); p.full {
			return
		}
	}
	if d.alpn == 0 {
		p.keepNames(d, names, d.left[0])
	}
}

// keepNames adds the rule for each of its names. at is its place when it has none.
func (p *parser) keepNames(d *draft, names []string, place token) {
	if len(p.rules)+max(1, len(names)) > MaxRules {
		p.fault(d.left[0], fmt.Sprintf("the map has more than %d rules", MaxRules), "split it over several gateways")
		p.full = true
		return
	}
	at := d.left[1+d.alpn:]
	if len(names) == 0 {
		names, at = []string{""}, []token{place}
	}
	block := make([]Rule, len(names)) // one allocation for all names of a line
	for i, name := range names {
		block[i] = d.Rule
		block[i].Name, block[i].Pos, block[i].order = name, p.pos(at[i]), len(p.rules)
		p.rules = append(p.rules, &block[i])
	}
}

// slips are what hands write for ->.
var slips = []string{"=>", "→", "⇒", "-->", "==>", ">", ">>", "–>", "—>", "<-", "=", ":", "-", "–", "—", "➜", "➔", "⟶"}

// arrow splits a statement at its ->. Without one it complains and splits where one
// is most probably missing; the arrow is empty when there is no such place.
func (p *parser) arrow(toks []token) (left []token, arrow token, right []token) {
	for i, t := range toks {
		if t.text == "->" {
			return toks[:i], t, toks[i+1:]
		}
	}
	for i, t := range toks {
		if slices.Contains(slips, t.text) {
			p.fault(t, quote(t.text)+" stands where -> is expected", "write ->")
			return toks[:i], t, toks[i+1:]
		}
	}
	for i, t := range toks[1:] {
		if strings.Contains(t.text, ":") || slices.Contains(actionWords[Redirect:], strings.ToLower(t.text)) {
			p.fault(t, "there is no -> before "+quote(t.text), "write -> "+clip(t.text))
			return toks[:i+1], t, toks[i+1:]
		}
	}
	if isListener(toks[0].text) {
		last := toks[len(toks)-1]
		p.fault(last, "there is no -> and no backend after "+quote(last.text), "write "+clip(last.text)+" -> 10.0.0.11:8080")
		return toks, token{}, nil
	}
	return toks[:1], token{}, nil
}

// isListener reports whether s was meant as a listener.
func isListener(s string) bool { return strings.ContainsAny(s, ":[") || digits(s) }

// listen reads :443, 192.0.2.1:443, [2001:db8::1]:443 or a range of ports.
func (p *parser) listen(t token, l *Listen) bool {
	host, port, ok := p.listenSplit(t)
	if !ok {
		return false
	}
	okHost := p.listenAddr(host, port, l)
	lo, hi, okPort := p.portRange(port)
	l.Lo, l.Hi = lo, hi
	return okHost && okPort
}

func (p *parser) listenSplit(t token) (host, port token, ok bool) {
	i := strings.LastIndexByte(t.text, ':')
	bracket := strings.IndexByte(t.text, ']')
	switch {
	case strings.Contains(t.text, "://"):
		p.fault(t, "a listener has no scheme", "write only the address and the port, as in :443")
	case strings.HasPrefix(t.text, "[") && bracket < 0:
		p.fault(t, "[ without ]", "write an IPv6 address as [2001:db8::1]:443")
	case strings.HasPrefix(t.text, "[") && i != bracket+1:
		p.fault(t, quote(t.text)+" has no port to listen on", "write "+clip(t.text[:bracket+1])+":443")
	case i < 0:
		p.notListener(t)
	case bracket < 0 && strings.IndexByte(t.text, ':') != i:
		p.fault(t, quote(t.text)+" has more than one colon", "write an IPv6 address in brackets: [2001:db8::1]:443")
	default:
		return t.sub(0, i), t.from(i + 1), true
	}
	return host, port, false
}

// notListener complains about a first word without a colon.
func (p *parser) notListener(t token) {
	first, _, _ := strings.Cut(t.text, "-")
	switch {
	case digits(first):
		p.fault(t, quote(t.text)+" is not a listener", "write :"+clip(t.text))
	case Nearest(t.text, []string{"default"}) != "":
		p.fault(t, quote(t.text)+" is not a listener", "did you mean default?")
	default:
		p.fault(t, quote(t.text)+" stands where a rule says what it listens on", "begin with a listener, as in :443 "+clip(t.text)+" -> 10.0.0.11:8080")
	}
}

func (p *parser) listenAddr(host, port token, l *Listen) bool {
	if host.text == "" {
		return true
	}
	text := strings.TrimSuffix(strings.TrimPrefix(host.text, "["), "]")
	a, err := netip.ParseAddr(text)
	a = a.Unmap()
	switch {
	case host.text == "*" || err == nil && a.IsUnspecified():
		p.fault(host, quote(host.text)+" is every address", "write :"+clip(port.text)+", which is IPv4 and IPv6")
	case err != nil:
		p.fault(host, quote(host.text)+" is not an IP address", "write an address of this machine, or only :"+clip(port.text)+" for all of them")
	case a.IsMulticast():
		p.fault(host, quote(host.text)+" is a multicast address", "write an address of this machine")
	case !zoneOK(a):
		p.fault(host, quote(host.text)+" has an impossible zone", "write the name of an interface, as in [fe80::1%eth0]:443")
	default:
		l.Addr = a
		return true
	}
	return false
}

// portRange reads 443 or 9000-9010.
func (p *parser) portRange(t token) (lo, hi uint16, ok bool) {
	for _, sep := range []string{"–", "—", "‐", "−", "..", ","} {
		if first, last, found := strings.Cut(t.text, sep); found && digits(first) {
			hint := "write " + clip(first) + "-" + clip(last)
			if sep == "," {
				hint += " for a range, or a rule for each port"
			}
			p.fault(t, quote(t.text)+" is not a port", hint)
			return 0, 0, false
		}
	}
	i := strings.IndexByte(t.text, '-')
	if i <= 0 {
		lo, ok = p.port(t)
		return lo, lo, ok
	}
	lo, okLo := p.port(t.sub(0, i))
	hi, okHi := p.port(t.from(i + 1))
	if okLo && okHi && lo > hi {
		p.fault(t, "the range "+quote(t.text)+" runs backwards", "write "+ports(hi, lo))
		return 0, 0, false
	}
	return lo, hi, okLo && okHi
}

var services = map[string]string{"http": "80", "https": "443", "smtps": "465", "imaps": "993", "ldaps": "636", "mqtts": "8883"}

// port reads a number from 1 to 65535.
func (p *parser) port(t token) (uint16, bool) {
	n, err := strconv.ParseUint(t.text, 10, 16)
	msg, hint := "", "write a port from 1 to 65535"
	switch {
	case t.text == "":
		msg = "the port is missing"
	case !digits(t.text):
		msg = quote(t.text) + " is not a port"
		if number := services[strings.ToLower(t.text)]; number != "" {
			hint = "write the number, " + number
		}
	case err != nil || n == 0:
		msg = quote(t.text) + " is not a port"
	case t.text[0] == '0':
		msg, hint = quote(t.text)+" begins with a zero", fmt.Sprintf("write %d", n)
	default:
		return uint16(n), true
	}
	p.fault(t, msg, hint)
	return 0, false
}

// digits reports whether s is one or more decimal digits.
func digits(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// names reads what stands behind the listener: protocols, then names.
func (p *parser) names(d *draft) []string {
	var names []string
	seen := map[string]bool{}
	for _, t := range d.left[1:] {
		protocol, ok := t.cutPrefix(protocolMark)
		switch {
		case !ok:
			names = append(names, p.name(t))
		case len(names) > 0:
			p.fault(t, quote(t.text)+" stands behind a name", "write protocols before the names")
		case seen[protocol.text]:
			p.fault(t, quote(t.text)+" stands twice", "write it once")
		default:
			d.alpn++
			seen[protocol.text] = true
			p.protocol(protocol)
		}
	}
	return names
}

// protocolMark begins the word for a protocol among the names of a rule.
const protocolMark = "alpn:"

// protocol checks a protocol that a client has to offer.
func (p *parser) protocol(t token) {
	slip := alpnSlips[strings.ToLower(t.text)]
	switch {
	case t.text == "":
		p.fault(t, "there is no protocol behind alpn:", "write one, as in alpn:acme-tls/1")
	case strings.Contains(t.text, ","):
		p.fault(t, quote(t.text)+" has a comma", "write alpn: before each protocol, with a space between them")
	case len(t.text) > 255 || !ascii(t.text):
		p.fault(t, quote(t.text)+" is not a protocol", "write a registered one, as in alpn:acme-tls/1 (RFC 7301 section 6)")
	case slip != "":
		p.fault(t, quote(t.text)+" is not a registered protocol", "did you mean "+slip+"?")
	}
}

// name reads an exact name or a wildcard.
func (p *parser) name(t token) string {
	switch {
	case t.text == "*":
		p.fault(t, "* is not a name", "write no name at all to serve every client, or *.bank.example")
	case strings.Contains(t.text, "://"):
		p.fault(t, quote(t.text)+" is a URL", "write the name only")
	case optionLike(t.text):
		p.fault(t, quote(t.text)+" is an option before the ->", "write options behind the backends")
	case strings.Contains(t.text, ","):
		p.fault(t, quote(t.text)+" has a comma", "put a space between names")
	default:
		rest, wild := t.cutPrefix("*.")
		rest.text = strings.TrimSuffix(rest.text, ".")
		name := p.serverName(rest)
		if !wild || name == "" {
			return name
		}
		if name = "*." + name; len(name) > maxName {
			p.fault(t, fmt.Sprintf("%s has %d bytes", quote(t.text), len(name)), fmt.Sprintf("a name has at most %d (RFC 1035 section 2.3.4)", maxName))
		}
		return name
	}
	return ""
}

// serverName reads a name as clients send it: never an address (RFC 6066 section 3).
func (p *parser) serverName(t token) string {
	if _, err := netip.ParseAddr(strings.Trim(t.text, "[]")); err == nil {
		p.fault(t, quote(t.text)+" is an address; clients never send one as a name (RFC 6066 section 3)", "listen on the address, or write no name")
		return ""
	}
	if i := strings.IndexByte(t.text, ':'); i >= 0 {
		p.fault(t, quote(t.text)+" has a colon", "write a name without a port; backends stand behind the ->")
		return ""
	}
	return p.hostname(t)
}

const (
	maxName  = 253 // RFC 1035 section 2.3.4: 255 on the wire, with the first length and the root
	maxLabel = 63
)

// hostname checks a name and returns it in lower case and ASCII: letters, digits,
// hyphen (RFC 5890 section 2.3.1) and, because it is in use, underscore.
func (p *parser) hostname(t token) string {
	s := strings.ToLower(t.text)
	if !ascii(t.text) && len(s) <= 4*maxName { // a character has at most four bytes
		if s = p.idna(t); s == "" {
			return ""
		}
	}
	if len(s) > maxName {
		p.fault(t, fmt.Sprintf("%s has %d bytes", quote(t.text), len(s)), fmt.Sprintf("a name has at most %d (RFC 1035 section 2.3.4)", maxName))
		return ""
	}
	for at := 0; at <= len(s); {
		label, _, _ := strings.Cut(s[at:], ".")
		if msg, hint := badLabel(label); msg != "" {
			if ascii(t.text) {
				t = t.sub(at, min(at+max(1, len(label)), len(t.text)))
			}
			p.fault(t, msg, hint)
			return ""
		}
		at += len(label) + 1
	}
	if digits(s[strings.LastIndexByte(s, '.')+1:]) {
		p.fault(t, quote(t.text)+" ends in a number but is not an IPv4 address", "write four numbers from 0 to 255, or a name")
		return ""
	}
	return s
}

// badLabel says what is wrong with a label, or "".
func badLabel(label string) (msg, hint string) {
	switch {
	case label == "":
		return "a label of the name is empty", "write one dot between labels"
	case len(label) > maxLabel:
		return fmt.Sprintf("the label %s has %d bytes", quote(label), len(label)), "a label has at most 63 (RFC 1035 section 2.3.4)"
	case label[0] == '-' || label[len(label)-1] == '-':
		return "the label " + quote(label) + " begins or ends with a hyphen", "use letters, digits and inner hyphens"
	case strings.Contains(label, "*"):
		return "* stands inside a name", "write it once, as the whole first label: *.bank.example"
	}
	for _, c := range label {
		if c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return quote(string(c)) + " cannot stand in a name", "use letters, digits, hyphens and dots"
		}
	}
	return "", ""
}

func ascii(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// idna returns the ASCII form of t, or "" after a complaint.
func (p *parser) idna(t token) string {
	if p.toASCII == nil {
		p.fault(t, quote(t.text)+" is not ASCII", "write its xn-- form")
		return ""
	}
	s, err := p.toASCII(t.text)
	if err != nil || s == "" || !ascii(s) {
		p.fault(t, quote(t.text)+" is not an internationalised name (RFC 5891)", "write its xn-- form")
		return ""
	}
	return strings.ToLower(s)
}

// right reads what stands behind the ->: backends or one word, then options.
func (p *parser) right(d *draft, arrow token, toks []token, l *Listen) {
	var action token
	backends, options := 0, false
	for len(toks) > 0 {
		t := toks[0]
		n := 1
		switch {
		case p.spaced(toks, &n):
			options = true
		case optionLike(t.text):
			options = true
			p.assign(d.own, t)
		case t.text == "->" || slices.Contains(slips, t.text):
			p.fault(t, "a second "+t.text, "write each rule on a line of its own")
			return
		case options:
			p.fault(t, quote(t.text)+" stands behind an option", "write backends first, then options as KEY=VALUE")
		case slices.Contains(actionWords[Redirect:], t.text):
			action, d.Action = t, Action(slices.Index(actionWords, t.text))
			backends++
		default:
			d.Backends = append(d.Backends, p.backend(t, l))
			backends++
			if d.tls.text == "" && d.Backends[len(d.Backends)-1].TLS {
				d.tls = t
			}
		}
		toks = toks[n:]
	}
	switch {
	case backends == 0:
		p.fault(arrow, "no backend stands behind the "+arrow.text, "write one, as in -> 10.0.0.11:8080, or redirect, reject or demo")
	case action.text != "" && backends > 1:
		p.fault(action, action.text+" stands beside other backends", "write it alone, or remove it")
	}
}
