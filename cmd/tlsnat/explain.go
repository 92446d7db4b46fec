// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/net/idna"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
)

// explain says what would become of a client.
func (p *program) explain(args []string) int {
	q, errs := readQuestion(args)
	for _, err := range errs {
		fmt.Fprintf(p.err, "tlsnat explain: %v\n", err)
	}
	if len(errs) > 0 {
		return exitUsage
	}
	config, problems := p.config()
	if config == nil {
		p.complain(problems)
		return exitInput
	}
	e := &explanation{config: config, question: q, set: p.setting, now: time.Now(), states: p.states()}
	e.write()
	fmt.Fprint(p.out, e.text.String())
	return exitOK
}

// question is a client as the edge sees it.
type question struct {
	port uint16
	addr netip.Addr // of ours, that the client connects to; not valid: one that no rule names
	from netip.Addr // not valid: any
	name string     // in lower case; "" if it sends none
	alpn []string
}

// readQuestion reads the arguments and returns every complaint about them.
func readQuestion(args []string) (q question, errs []error) {
	var port, sni, from, addr, alpn string
	f := flag.NewFlagSet("explain", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&port, "port", "", "")
	f.StringVar(&sni, "sni", "", "")
	f.StringVar(&from, "from", "", "")
	f.StringVar(&addr, "addr", "", "")
	f.StringVar(&alpn, "alpn", "", "")
	if err := f.Parse(args); err != nil {
		return q, []error{fmt.Errorf("%w; write --port 443 [--sni NAME] [--from ADDRESS] [--addr ADDRESS] [--alpn LIST]", err)}
	}
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if f.NArg() > 0 {
		bad("%q: every argument has a name, such as --sni %s", f.Args(), f.Arg(0))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case port == "":
		bad("--port is missing; write the port that the client connects to, such as --port 443")
	case err != nil || n == 0:
		bad("--port %s: not a port; write a number from 1 to 65535", port)
	}
	q.port = uint16(n)
	if q.from, err = readAddr(from); err != nil {
		bad("--from %s: not an address; write the client's, such as --from 192.0.2.7", from)
	}
	if q.addr, err = readAddr(addr); err != nil {
		bad("--addr %s: not an address; write the one of this machine that the client connects to", addr)
	}
	if q.name, err = readName(sni); err != nil {
		bad("--sni %s: %v; write a name as a client sends it, such as --sni api.example", sni, err)
	}
	if alpn != "" {
		q.alpn = strings.Split(alpn, ",")
	}
	return q, errs
}

func readAddr(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(strings.Trim(s, "[]"))
	return a.Unmap(), err
}

// readName is the name as it stands in a ClientHello.
func readName(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return "", errors.New("an address; clients send none (RFC 6066, section 3)")
	}
	name := strings.TrimSuffix(strings.ToLower(s), ".")
	if strings.Contains(name, "*") {
		return "", errors.New("no client sends a wildcard")
	}
	for _, c := range name {
		if c >= 0x80 {
			return idna.Lookup.ToASCII(name)
		}
	}
	return name, nil
}

// explanation is the answer while it is written.
type explanation struct {
	config   *config.Config
	question question
	set      func(setting string) string // a setting as the environment has it
	now      time.Time
	states   states // of the running gateway

	port *natmap.Port
	rule *natmap.Rule
	text strings.Builder
}

const labelWidth = 14

// say writes lines under a label.
func (e *explanation) say(label string, lines ...string) {
	for _, line := range lines {
		e.text.WriteString(strings.TrimRight(fmt.Sprintf("%-*s%s", labelWidth, label, line), " ") + "\n")
		label = ""
	}
}

// table aligns the columns of rows.
func table(rows [][]string) []string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
}

func (e *explanation) write() {
	e.port = e.config.Map.Port(e.question.addr, e.question.port)
	e.say("client", e.client())
	e.sayProxy()
	if e.port == nil {
		e.sayNoPort()
		return
	}
	if e.rule = e.port.Match(e.question.name, e.question.alpn); e.rule == nil {
		e.sayNoRule()
		return
	}
	e.say("rule", fmt.Sprintf("%s:%d: %s", e.rule.Pos.File, e.rule.Pos.Line, statement(&e.config.Settings, e.rule.Pos)))
	e.say("because", e.because()...)
	e.sayGate()
	e.say("does", e.does())
	e.sayPrelude()
	e.sayCertificates()
	e.sayALPN()
	e.sayBackends()
	e.sayEncryption()
	e.sayOptions()
}

func (e *explanation) client() string {
	q := e.question
	s := "port " + strconv.Itoa(int(q.port))
	if q.addr.IsValid() {
		s = netip.AddrPortFrom(q.addr, q.port).String()
	}
	if q.from.IsValid() {
		s = q.from.String() + " to " + s
	} else {
		s = "to " + s
	}
	if q.name == "" {
		s += ", sends no name"
	} else {
		s += ", asks for " + q.name
	}
	if len(q.alpn) > 0 {
		s += ", offers " + strings.Join(q.alpn, ", ")
	}
	return s
}

// sayProxy says whether the connection has to begin with a PROXY header.
func (e *explanation) sayProxy() {
	const setting = config.Prefix + "PROXY_FROM"
	s, from := &e.config.Settings, e.question.from
	var networks []string
	for _, prefix := range s.ProxyFrom {
		networks = append(networks, prefix.String())
	}
	refused := "one that comes all the same ends the connection with outcome bad_proxy"
	if e.port != nil && !e.port.Sniff() {
		refused = "one that comes all the same is taken for the client's own bytes"
	}
	switch {
	case len(networks) == 0:
		e.say("PROXY header", "believed from nobody, "+setting+" is not set; "+refused)
	case !from.IsValid():
		e.say("PROXY header", "demanded from "+strings.Join(networks, ", ")+" ("+setting+"); believed from nobody else")
	case s.Trusts(from):
		e.say("PROXY header", "demanded: "+setting+" has "+from.String()+"; the client is the one that the header names,",
			"and without a header (version 1 or 2) the connection ends with outcome bad_proxy")
	default:
		e.say("PROXY header", "not believed: "+setting+" ("+strings.Join(networks, ", ")+") doesn't have "+from.String()+";", refused)
	}
}

func (e *explanation) sayNoPort() {
	e.say("rule", "none: the map doesn't listen there")
	e.say("client sees", "its connection is refused (RST)")
	var all []string
	for _, l := range e.config.Map.Listens() {
		all = append(all, l.String())
	}
	e.say("listened on", some(all))
}

func (e *explanation) sayNoRule() {
	why := "none for this port has the name, or a wildcard for it, and none is for every client"
	if e.question.name == "" {
		why = "each one for this port has a name, and the client sends none"
	}
	e.say("rule", "none: "+why)
	if e.port.ByHost {
		e.say("client sees", "status 421 (Misdirected Request), in plain HTTP; the log has outcome unknown_name")
	} else {
		e.say("client sees", "fatal alert unrecognized_name (112); the log has outcome unknown_name")
	}
	e.say("names served", some(e.names()))
}

// names are those that the port serves.
func (e *explanation) names() (all []string) {
	for _, r := range e.config.Map.Rules {
		here := !r.Listen.Addr.IsValid() || r.Listen.Addr == e.question.addr
		if here && r.Listen.Contains(e.question.port) && r.Name != "" {
			all = append(all, r.Name)
		}
	}
	return all
}

// some is a list of which the end is left out if it is long.
func some(list []string) string {
	const enough = 12
	if len(list) > enough {
		return strings.Join(list[:enough], ", ") + fmt.Sprintf(" and %d more", len(list)-enough)
	}
	return strings.Join(list, ", ")
}

// statement is the text of the rule as its author wrote it.
func statement(s *config.Settings, at natmap.Pos) string {
	text := s.Map
	if at.File != config.Prefix+"MAP" {
		b, _, err := certs.ReadFile(at.File, natmap.MaxText)
		if err != nil {
			return err.Error()
		}
		text = string(b)
	}
	lines := strings.Split(text, "\n")
	line, _, _ := strings.Cut(lines[min(at.Line, len(lines))-1], "#")
	runes := []rune(strings.TrimPrefix(line, "\ufeff"))
	start, end := min(at.Col-1, len(runes)), min(at.Col-1, len(runes))
	for start > 0 && runes[start-1] != ';' {
		start--
	}
	for end < len(runes) && runes[end] != ';' {
		end++
	}
	return strings.Join(strings.Fields(string(runes[start:end])), " ")
}

// because says what made the choice.
func (e *explanation) because() (why []string) {
	r := e.rule
	if r.Protocol != "" {
		why = append(why, "it is for clients that offer "+r.Protocol+", which beats every rule that is not for a protocol")
	}
	if e.port.ByHost {
		why = append(why, "redirects are chosen by the name in the Host header")
	}
	switch {
	case e.port.Plain != nil:
		why = append(why, "it is alone on this port: "+word(r)+" reads no ClientHello, so no name decides")
	case r.Name == "" && e.question.name == "":
		why = append(why, "the client sends no name, and this rule asks for none")
	case r.Name == "":
		why = append(why, "no rule for this port has the name, or a wildcard for it; this one is for every client")
	case strings.HasPrefix(r.Name, "*."):
		why = append(why, "no rule has this very name, and "+r.Name+" is the longest wildcard that it fits")
	default:
		why = append(why, "it has this very name, which beats every wildcard and a rule without a name")
	}
	if r.Listen.Addr.IsValid() {
		why = append(why, "it is for the address "+r.Listen.Addr.String()+", which beats a rule for every address with the same name")
	}
	return why
}

// sayGate says whether the client's address may come in, and which line of which list decides that.
func (e *explanation) sayGate() {
	set, from := e.config.Gate(e.rule), e.question.from
	switch {
	case set == nil:
		return
	case !from.IsValid():
		e.say("gate", "not everybody may come in: write --from ADDRESS to see who may")
		return
	case e.config.Settings.Trusts(from):
		e.say("gate", "decides about the client that the PROXY header names, not about "+from.String())
		return
	}
	d := set.Decide(from)
	why := "none of the prefixes holds " + from.String()
	if d.Prefix.IsValid() {
		why = d.Prefix.String() + " is the longest prefix that holds it, at " + d.Place
	}
	if d.Allow {
		e.say("gate", "lets it in: "+why)
		return
	}
	e.say("gate", "refuses it: "+why)
	e.say("client sees", "a reset; the log has outcome denied")
}

// word is what the rule does as the map writes it.
func word(r *natmap.Rule) string {
	if r.Action == natmap.Forward {
		return "mode=" + r.Options.Mode.String()
	}
	return r.Action.String()
}

func (e *explanation) does() string {
	r := e.rule
	switch r.Action {
	case natmap.Redirect:
		return "answers a plain HTTP request with 308, to the same address on https port " + e.value("https-port")
	case natmap.Reject:
		return "refuses: fatal alert access_denied (49); the log has outcome denied"
	case natmap.Demo:
		return "ends TLS (" + e.value("min-tls") + " or newer); the built-in backend answers HTTP with what the edge knows"
	}
	switch r.Options.Mode {
	case natmap.Pass:
		return "reads the name and forwards everything as it came: the backend ends TLS"
	case natmap.TCP:
		return "forwards every byte as it comes, either side may speak first"
	}
	return "ends TLS (" + e.value("min-tls") + " or newer) and forwards what was in it"
}

// sayPrelude says what comes before TLS.
func (e *explanation) sayPrelude() {
	o := &e.rule.Options
	switch {
	case o.StartTLS == natmap.StartTLSOff:
	case o.StartTLS == natmap.StartTLSMySQL:
		e.say("before TLS", "a backend is sought, and its greeting passed on; the client asks for TLS in mysql,", "and without that it is refused: the log has outcome bad_hello")
	case o.Mode == natmap.Pass && e.rule.Action == natmap.Forward:
		e.say("before TLS", "the client asks for TLS in "+o.StartTLS.String()+", and the backend is asked in the same way;", "who goes on without TLS is refused: the log has outcome bad_hello")
	default:
		e.say("before TLS", "the client asks for TLS in "+o.StartTLS.String()+", and is answered here;", "who goes on without TLS is refused: the log has outcome bad_hello")
	}
}

func (e *explanation) sayCertificates() {
	if !config.Terminates(e.rule) {
		return
	}
	entry := e.config.Certificate(e.rule, e.question.name, func() netip.Addr { return e.question.addr })
	if entry == nil {
		hint := "put one for it into " + config.Prefix + "CERTS"
		if e.question.name == "" {
			hint = "the client sends no name, and it isn't clear which one to show: write cert=NAME into the rule"
		}
		e.say("certificate", "none: "+hint)
		e.say("client sees", "fatal alert unrecognized_name (112); the log has outcome unknown_name")
		return
	}
	served := entry.Served(e.now)
	lines := e.certificates(served)
	if len(lines) > 1 {
		lines = append(lines, "the client gets the first one that it can use")
	}
	if when, next := entry.Next(e.now); len(next) > 0 {
		lines = append(lines, "from "+when.UTC().Format("2006-01-02 15:04:05 UTC")+" on:")
		lines = append(lines, e.certificates(next)...)
	}
	e.say("certificate", lines...)
}

// certificates is a line for each.
func (e *explanation) certificates(all []*certs.Certificate) []string {
	var rows [][]string
	for _, c := range all {
		rows = append(rows, []string{c.KeyType, some(holds(c)), "issued by " + c.Issuer, expiry(c.NotAfter, e.now), c.CertFile})
	}
	return table(rows)
}

// holds are the names and addresses in a certificate.
func holds(c *certs.Certificate) []string {
	all := slices.Clone(c.Names)
	for _, a := range c.Addrs {
		all = append(all, a.String())
	}
	return all
}

func expiry(at, now time.Time) string {
	day, left := at.UTC().Format(time.DateOnly), at.Sub(now)
	if left < 0 {
		return "expired " + day
	}
	return fmt.Sprintf("until %s (%s)", day, count(int(left/(24*time.Hour)), "day"))
}

// sayALPN says what is agreed on, as crypto/tls does it: the first of ours that the client offers.
func (e *explanation) sayALPN() {
	ours, theirs := e.rule.Options.Protocols(), e.question.alpn
	if !config.Terminates(e.rule) || len(theirs) == 0 {
		return
	}
	if len(ours) == 0 {
		e.say("ALPN", "none is agreed on: the rule has no alpn=")
		return
	}
	for _, protocol := range ours {
		if slices.Contains(theirs, protocol) {
			e.say("ALPN", protocol)
			return
		}
	}
	if slices.Contains(ours, "h2") && slices.Contains(theirs, "http/1.1") {
		e.say("ALPN", "none is agreed on: HTTP/1.1 needs none")
		return
	}
	e.say("ALPN", "fatal alert no_application_protocol (120): the rule offers "+strings.Join(ours, ", ")+"; the log has outcome handshake_failed")
}

// sayBackends lists them in the order of the map, those that are tried last at the end.
func (e *explanation) sayBackends() {
	r := e.rule
	if r.Action != natmap.Forward {
		return
	}
	total := 0
	for _, b := range r.Backends {
		if !b.Backup {
			total += b.Weight
		}
	}
	var first, last [][]string
	for _, b := range r.Backends {
		at := dialled(b, r, e.question.port)
		row := []string{scheme(b) + at, e.part(b, total, len(first) == 0)}
		if state := e.states.state(at); state != "" {
			row = append(row, state)
		}
		if b.Backup {
			last = append(last, row)
		} else {
			first = append(first, row)
		}
	}
	lines := table(append(first, last...))
	if len(lines) > 1 {
		lines = append(lines, "when one doesn't answer the next one is tried, for connect="+e.value("connect")+" in all")
	}
	e.say("backends", lines...)
	if err := e.states.err; err != nil {
		e.say("their states", "not known: "+err.Error())
	}
}

// part is what a backend gets, of others with so much weight in all. isFirst says that it is the first in the map.
func (e *explanation) part(b natmap.Backend, total int, isFirst bool) string {
	switch o := &e.rule.Options.Pool; {
	case b.Backup:
		return "only when none of the others answers"
	case total == b.Weight:
		return "every connection"
	case o.Balance == natmap.First && isFirst && o.MaxConns > 0:
		return fmt.Sprintf("up to %d connections", o.MaxConns)
	case o.Balance == natmap.First && isFirst:
		return "every connection, as long as it is up"
	case o.Balance == natmap.First && o.MaxConns > 0:
		return fmt.Sprintf("when those before have %d connections", o.MaxConns)
	case o.Balance == natmap.First:
		return "when those before are down"
	}
	return fmt.Sprintf("%d of %d connections", b.Weight, total)
}

// dialled is where the backend is reached from this listening port.
func dialled(b natmap.Backend, r *natmap.Rule, port uint16) string {
	if b.Unix != "" {
		return "unix:" + b.Unix
	}
	at := b.Host
	if b.SRV {
		return "srv:" + at
	}
	if strings.Contains(at, ":") {
		at = "[" + at + "]"
	}
	return at + ":" + strconv.Itoa(int(b.Port(r.Listen.Lo, port)))
}

// scheme is how the backend is spoken to, as the map writes it before the address.
func scheme(b natmap.Backend) string {
	switch {
	case b.StartTLS != natmap.StartTLSOff:
		return "tls+" + b.StartTLS.String() + "://"
	case b.TLS:
		return "tls://"
	}
	return ""
}

// sayEncryption says who is taken for a tls:// backend.
func (e *explanation) sayEncryption() {
	r := e.rule
	if !slices.ContainsFunc(r.Backends, func(b natmap.Backend) bool { return b.TLS }) {
		return
	}
	o := &r.Options
	if o.BackendUnverified {
		e.say("TLS to them", "NOT VERIFIED: whoever answers is taken for the backend (backend-verify=off)")
		return
	}
	lines := []string{"their certificate has to be for " + e.backendName() + ",", "signed by one of the system's CAs"}
	if a := e.config.BackendCAs[o.BackendCA]; a != nil {
		lines[1] = "signed by " + some(authorities(a)) + " (" + a.File + ")"
	}
	if o.BackendCert != "" {
		lines = append(lines, "if one asks for a certificate it sees that of "+o.BackendCert)
	}
	if o.Proxy != natmap.ProxyOff {
		lines = append(lines, "the PROXY header goes before TLS")
	}
	e.say("TLS to them", lines...)
}

// backendName is what a backend's certificate has to be for.
func (e *explanation) backendName() string {
	switch name := e.rule.Options.BackendName; {
	case name == natmap.NameOfClient && e.question.name != "":
		return e.question.name + ", which the client asked for"
	case name != "" && name != natmap.NameOfClient:
		return name
	}
	return "the host that the map names"
}

func authorities(a *certs.Authority) (names []string) {
	for _, c := range a.Certs {
		names = append(names, cmp.Or(c.Subject.CommonName, c.Subject.String()))
	}
	return names
}

// sayOptions lists every option that has a meaning for the rule, with its value and where that was written.
func (e *explanation) sayOptions() {
	var rows [][]string
	for _, doc := range natmap.OptionDocs() {
		if doc.AppliesTo(e.rule) {
			value, from := e.option(doc)
			rows = append(rows, []string{doc.Key + "=" + value, from})
		}
	}
	if len(rows) > 0 {
		e.say("options", table(rows)...)
	}
}

func (e *explanation) value(key string) string {
	docs := natmap.OptionDocs()
	value, _ := e.option(docs[slices.IndexFunc(docs, func(d natmap.OptionDoc) bool { return d.Key == key })])
	return value
}

// option is the value of an option for the rule, and where it was written.
func (e *explanation) option(doc natmap.OptionDoc) (value, from string) {
	key := doc.Key
	for _, s := range e.rule.Settings {
		if s.Key == key && s.Default {
			return s.Value, fmt.Sprintf("default line, %s:%d", s.Pos.File, s.Pos.Line)
		}
		if s.Key == key {
			return s.Value, fmt.Sprintf("the rule, %s:%d", s.Pos.File, s.Pos.Line)
		}
	}
	if key == "alpn" && e.rule.Protocol != "" {
		return e.rule.Protocol, "what the rule is for"
	}
	if key == "alpn" && len(e.rule.Options.Protocols()) > 0 {
		return strings.Join(e.rule.Options.Protocols(), ","), "built in for starttls=" + e.rule.Options.StartTLS.String()
	}
	if doc.Setting != "" {
		return e.setting(doc.Setting)
	}
	return doc.Default, "built in"
}

// setting is the value of a setting as its author wrote it.
func (e *explanation) setting(key string) (value, from string) {
	if value := e.set(key); value != "" {
		return value, config.Prefix + key
	}
	for _, doc := range config.SettingDocs() {
		if doc.Name == config.Prefix+key {
			return doc.Default, "default of " + config.Prefix + key
		}
	}
	return "", ""
}
