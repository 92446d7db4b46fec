// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// GateOptions are the options about who gets in, and how much of it. A number that is
// zero is no limit.
type GateOptions struct {
	Allow, Deny []Member // both empty: everybody may come
	ConnsPerIP  int      // open at once from one address
	RatePerIP   Rate     // opened by one address
	Conns       int      // open at once
	Handshakes  int      // under way at once
	Bandwidth   int64    // bytes a second of one connection, each way
}

// A Member of allow= or deny= is a prefix, or a file with prefixes.
type Member struct {
	Prefix netip.Prefix // masked; IPv4 never in its IPv6-mapped form
	File   string       // as written: relative to the directory of the map's file
}

// String returns the member as the map writes it.
func (m Member) String() string {
	if m.File != "" {
		return "@" + escapeFile(m.File)
	}
	return m.Prefix.String()
}

// A Rate is N times in a second or a minute.
type Rate struct {
	N   int
	Per time.Duration
}

// String returns "20/s" or "300/m".
func (r Rate) String() string {
	unit := "s"
	if r.Per == time.Minute {
		unit = "m"
	}
	return strconv.Itoa(r.N) + "/" + unit
}

const (
	// A count of connections that is larger has a digit too many: it is what one machine can have open to one address
	// and port of its own, and what the table of the gate can count.
	maxConnsPerIP = 1<<20 - 1
	maxRateConns  = 16 << 20 // descriptors that Linux lets a process have (fs.nr_open) at most, by far
	maxRate       = 10_000   // connections a second: more than one machine opens
	minBandwidth  = 1000     // below it a record of TLS takes longer than an impatient idle=
	maxBandwidth  = 100_000_000_000
	maxMembers    = 10_000 // of one option; longer lists are files
	maxFiles      = 100
)

// everybody is what allow=all stands for.
var everybody = []Member{{Prefix: netip.MustParsePrefix("0.0.0.0/0")}, {Prefix: netip.MustParsePrefix("::/0")}}

const everyRule = terminate | pass | tcp | redirect | demo

var gateOptions = []option{
	members("allow", "all", "clients that may come in, all others may not; of allow= and deny= the longest prefix decides", func(o *Options) *[]Member { return &o.Gate.Allow }),
	members("deny", "off", "clients that may not come in: prefixes, or a file with one a line (its path is relative to the map's)", func(o *Options) *[]Member { return &o.Gate.Deny }),
	count("conns-per-ip", "connections that one address may have open, an IPv6 /64 counts as one; a default line counts for all rules below it together",
		everyRule, maxConnsPerIP, func(o *Options) *int { return &o.Gate.ConnsPerIP }),
	{
		key: "rate-per-ip", def: "off", value: "N/s|N/m|off", uses: everyRule,
		help: "new connections of one address: N at once, then N in each second or minute; counted like conns-per-ip",
		set:  setRate,
		show: func(o *Options) string { return orOff(o.Gate.RatePerIP.N == 0, o.Gate.RatePerIP.String()) },
	},
	count("conns", "connections that may be open at once, over all names and ports of the line", everyRule, maxRateConns, func(o *Options) *int { return &o.Gate.Conns }),
	count("handshakes", "handshakes in progress or waiting at once, over all names and ports of the line", terminate|demo, maxRateConns,
		func(o *Options) *int { return &o.Gate.Handshakes }),
	{
		key: "bandwidth", def: "off", value: "SIZE/s|off", uses: terminate | pass | tcp | demo,
		help: "bytes per second of a connection, each way, for example 500KB/s, 10MB/s or 100Mbit/s",
		set:  setBandwidth,
		show: func(o *Options) string { return orOff(o.Gate.Bandwidth == 0, bandwidth(o.Gate.Bandwidth)) },
	},
}

func orOff(off bool, s string) string {
	if off {
		return "off"
	}
	return s
}

// members is the row of an option whose value is a list of prefixes and files.
func members(key, def, help string, field func(*Options) *[]Member) option {
	return option{
		key: key, def: def, value: "PREFIX,…|@FILE|all|off", uses: everyRule, help: help,
		set: func(p *parser, o *Options, v token) { *field(o) = p.members(v) },
		show: func(o *Options) string {
			all := *field(o)
			words := make([]string, len(all))
			for i, m := range all {
				words[i] = m.String()
			}
			return orOff(len(all) == 0, strings.Join(words, ","))
		},
	}
}

// members reads a list. The rules below a default line share what it says: a list is as long as a line may be.
func (p *parser) members(v token) []Member {
	at := p.pos(v)
	list, ok := p.lists[at]
	if !ok {
		list = p.readMembers(v)
		if p.lists == nil {
			p.lists = map[Pos][]Member{}
		}
		p.lists[at] = list
	}
	return list
}

func (p *parser) readMembers(v token) (list []Member) {
	switch v.text {
	case "off":
		return nil
	case "all":
		return everybody
	}
	if n := 1 + strings.Count(v.text, ","); n > maxMembers {
		p.fault(v, fmt.Sprintf("the list has %d prefixes", n), "write them into a file, a line for each, and @ before its path")
		return nil
	}
	files := 0
	for at, item := 0, ""; at <= len(v.text); at += len(item) + 1 {
		item, _, _ = strings.Cut(v.text[at:], ",")
		t := v.sub(at, at+len(item))
		if file, ok := t.cutPrefix("@"); ok {
			if files++; files > maxFiles {
				p.fault(t, fmt.Sprintf("the list has more than %d files", maxFiles), "join some of them")
				return nil
			}
			list = append(list, Member{File: p.listFile(file)})
		} else {
			list = append(list, Member{Prefix: p.prefix(t)})
		}
	}
	return list
}

// listFile reads the path of a list. What has a meaning in the map is written as in the path of a socket.
func (p *parser) listFile(t token) string {
	path, ok := unescapePath(t.text)
	switch {
	case t.text == "":
		p.fault(t, "there is no path behind the @", "write one, as in @blocklist.txt")
	case !ok:
		p.fault(t, "% in a path is not followed by two hexadecimal digits", "write %25 for the character itself")
	case strings.IndexByte(path, 0) >= 0:
		p.fault(t, "the path contains a NUL", "write it without %00")
	}
	return path
}

// escapeFile writes a path so that it has no meaning beyond the path.
func escapeFile(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("%#;,", c) >= 0 || c == '-' && strings.HasPrefix(s[i:], "->") {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// prefix reads an address or a prefix.
func (p *parser) prefix(t token) netip.Prefix {
	c, msg, hint := ParsePrefix(t.text)
	switch {
	case t.text == "":
		p.fault(t, "a prefix of the list is empty", "write prefixes with one comma between them: 192.0.2.0/24,2001:db8::/32")
	case t.text == "all" || t.text == "off":
		p.fault(t, t.text+" stands beside prefixes", "write it alone, or remove it")
	case !c.IsValid() && looksLikePath(t.text):
		p.fault(t, quote(t.text)+" is not an address or a prefix", "write @"+clip(t.text)+" for a file with prefixes")
	case msg != "":
		p.fault(t, msg, hint)
	}
	return c
}

// ParsePrefix reads an address, which stands for itself alone, or a prefix: of the map, of files of lists, of settings and
// of queries. IPv4 in its IPv6-mapped form is IPv4, as addresses of clients are. When s is neither, p is not valid, msg says
// what is wrong and hint what to write instead.
func ParsePrefix(s string) (p netip.Prefix, msg, hint string) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return p, quote(s) + " has a zone", "write it without %" + clip(a.Zone())
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), "", ""
	}
	p, err := netip.ParsePrefix(s)
	mapped := err == nil && p.Addr().Is4In6()
	if mapped && p.Bits() >= 96 {
		p, mapped = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96), false
	}
	switch {
	case err != nil:
		return netip.Prefix{}, quote(s) + " is not an address or a prefix", "write one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32"
	case mapped:
		return netip.Prefix{}, quote(s) + " is more than IPv4", "write 0.0.0.0/0 for all of IPv4"
	case p.Masked() != p:
		return netip.Prefix{}, quote(s) + " has bits behind its prefix", "write " + p.Masked().String() + ", or " + p.Addr().String() + " for the address alone"
	}
	return p, "", ""
}

func looksLikePath(s string) bool {
	return strings.ContainsAny(s, "abcdefghijklmnopqrstuvwxyz") && strings.ContainsAny(s, "/.") && !strings.Contains(s, ":")
}

// count is the row of an option whose value is how many of something there may be.
func count(key, help string, uses kind, most int, field func(*Options) *int) option {
	return option{
		key: key, def: "off", value: "N|off", uses: uses, help: help,
		set:  func(p *parser, o *Options, v token) { *field(o) = p.count(v, most) },
		show: func(o *Options) string { return orOff(*field(o) == 0, strconv.Itoa(*field(o))) },
	}
}

// count reads a number from 1 to most, or off for zero.
func (p *parser) count(v token, most int) int {
	if v.text == "off" {
		return 0
	}
	n, err := strconv.Atoi(v.text)
	switch {
	case !digits(v.text):
		p.fault(v, quote(v.text)+" is not a number", fmt.Sprintf("write a number from 1 to %d, or off", most))
	case err != nil || n > most:
		p.fault(v, quote(v.text)+" is too large", fmt.Sprintf("write a number from 1 to %d, or off", most))
	case n == 0:
		p.fault(v, "0 would let nobody in", "write off for no limit, or the rule as -> reject")
	default:
		return n
	}
	return 0
}

func setRate(p *parser, o *Options, v token) {
	if v.text == "off" {
		o.Gate.RatePerIP = Rate{}
		return
	}
	number, unit, ok := strings.Cut(v.text, "/")
	n, err := strconv.Atoi(number)
	r := Rate{n, time.Second}
	most := maxRate
	if unit == "m" {
		r.Per, most = time.Minute, 60*maxRate
	}
	switch {
	case !ok && digits(v.text):
		p.fault(v, quote(v.text)+" does not say in which time", "write "+clip(v.text)+"/s or "+clip(v.text)+"/m")
	case !ok || !digits(number):
		p.fault(v, quote(v.text)+" is not a rate", "write connections in a second or a minute, as in 20/s or 300/m, or off")
	case unit != "s" && unit != "m":
		p.fault(v, quote(unit)+" is not a unit of time here", "write "+clip(number)+"/s or "+clip(number)+"/m")
	case err != nil || n > most:
		p.fault(v, quote(v.text)+" is too large", "write at most "+strconv.Itoa(maxRate)+"/s, or off")
	case n == 0:
		p.fault(v, "0 would let nobody in", "write off for no limit, or the rule as -> reject")
	default:
		o.Gate.RatePerIP = r
	}
}

// sizeUnits are the units of bandwidth=, in bytes: decimal, as everything that is sent over a line. Of those that fit
// String takes the first one.
var sizeUnits = []struct {
	name  string
	bytes float64
}{{"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3}, {"B", 1}, {"Gbit", 1e9 / 8}, {"Mbit", 1e6 / 8}, {"Kbit", 1e3 / 8}}

func bandwidth(n int64) string {
	for _, u := range sizeUnits {
		if size := int64(u.bytes); n%size == 0 {
			return strconv.FormatInt(n/size, 10) + u.name + "/s"
		}
	}
	return ""
}

func setBandwidth(p *parser, o *Options, v token) {
	const hint = "write bytes or bits in a second, as in 500KB/s, 10MB/s or 100Mbit/s, or off"
	if v.text == "off" {
		o.Gate.Bandwidth = 0
		return
	}
	size, slow := strings.CutSuffix(v.text, "/s")
	number := strings.TrimRight(size, "GMKBbit")
	unit := size[len(number):]
	n, err := strconv.Atoi(number)
	bytes := int64(-1)
	for _, u := range sizeUnits {
		if u.name == unit && err == nil {
			bytes = int64(min(float64(n)*u.bytes, 2*maxBandwidth))
		}
	}
	switch {
	case !digits(number) || len(number) > 12:
		p.fault(v, quote(v.text)+" is not a bandwidth", bandwidthHint(v.text, hint))
	case !slow:
		p.fault(v, quote(v.text)+" does not say in which time", bandwidthHint(v.text+"/s", hint))
	case bytes < 0:
		p.fault(v, quote(unit)+" is not a unit of bandwidth", bandwidthHint(v.text, hint))
	case bytes < minBandwidth || bytes > maxBandwidth:
		p.fault(v, quote(v.text)+" is out of range", "write from "+bandwidth(minBandwidth)+" to "+bandwidth(maxBandwidth)+", or off")
	default:
		o.Gate.Bandwidth = bytes
	}
}

// bandwidthHint finds what was meant: 10mb/s, 10M/s, 100mbps.
func bandwidthHint(s, hint string) string {
	lower := strings.ToLower(s)
	number := strings.TrimRight(lower, "kmgbitps/e")
	if !digits(number) {
		return hint
	}
	unit := strings.TrimSuffix(strings.TrimSuffix(lower[len(number):], "/s"), "ps")
	letter := strings.ToUpper(strings.TrimRight(unit, "bite"))
	if len(letter) > 1 || letter == "" && unit != "b" {
		return hint
	}
	if strings.HasSuffix(unit, "bit") {
		return "did you mean " + number + letter + "bit/s?"
	}
	return "did you mean " + number + letter + "B/s (bytes), or " + number + letter + "bit/s?"
}
