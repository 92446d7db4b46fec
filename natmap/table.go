// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"hash/maphash"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
)

// A Port is what one listening port serves. It is immutable and safe for
// concurrent use.
type Port struct {
	// Plain is the rule of a port that serves it whatever the client says, nil on any
	// other: mode=tcp, or a redirect where none has a name.
	Plain *Rule
	// ByHost is set on a port of redirects of which some have names: what is looked up
	// is the name of the Host header.
	ByHost bool
	// StartTLS is what the port speaks before TLS, the same for all its rules.
	StartTLS StartTLS

	port   uint16    // any port of the segment: all of them serve the same rules
	tables [2]*table // of the address, then of every address; either may be nil
	wild   depths    // of both
	keys   keys
	rest   *Rule     // the rule without a name
	alpn   []routing // the rules for clients that offer a protocol, by its name

	shallow bool // wild holds at most fewDepths
}

// Sniff reports whether the port reads a ClientHello before it decides.
func (p *Port) Sniff() bool { return p.Plain == nil && !p.ByHost }

// routing is what a port serves to clients that offer a protocol.
type routing struct {
	protocol string
	*Port
}

// maxOffered bounds the protocols of a client that rules are looked up for. Clients
// offer three or four; a hostile ClientHello has room for 30,000.
const maxOffered = 32

// Match returns the rule that serves a client which asked for name and offered these
// protocols (RFC 7301), the one it prefers first; or nil when nothing does. A rule for
// a protocol that it offers beats every rule without one, whatever their names; of two
// such rules the one for the protocol that the client prefers wins. Otherwise it is as
// Lookup.
func (p *Port) Match(name string, offered []string) *Rule {
	if len(p.alpn) == 0 {
		return p.Lookup(name)
	}
	for _, protocol := range offered[:min(len(offered), maxOffered)] {
		i, ok := slices.BinarySearchFunc(p.alpn, protocol, func(r routing, s string) int { return strings.Compare(r.protocol, s) })
		if !ok {
			continue
		}
		if r := p.alpn[i].Lookup(name); r != nil {
			return r
		}
	}
	return p.Lookup(name)
}

// Protocols returns what rules with alpn: are there for, sorted.
func (p *Port) Protocols() []string {
	all := make([]string, len(p.alpn))
	for i, r := range p.alpn {
		all[i] = r.protocol
	}
	return all
}

// Lookup returns the rule that serves a client which offers no protocol and asked for name, "" when it
// sent none, or nil when nothing does. The name is in lower case; one trailing dot
// is ignored. It allocates nothing, and its time does not grow with the number of
// names: one pass over the name, then one probe for it and one for each of its
// suffixes that is as deep as some wildcard.
func (p *Port) Lookup(name string) *Rule {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > maxName || p.Plain != nil {
		return p.rest
	}
	if p.shallow {
		var marks [fewDepths]uint64
		return p.search(name, marks[:])
	}
	var marks [maxDepth]uint64
	return p.search(name, marks[:])
}

func (p *Port) search(name string, marks []uint64) *Rule {
	h, n := p.keys.walk(name, &p.wild, marks)
	if r := p.find(h|exactKey, name); r != nil {
		return r
	}
	for n--; n >= 0; n-- { // the longest suffix is the last mark
		if r := p.find(marks[n]&^0xff|wildKey, name[marks[n]&0xff:]); r != nil {
			return r
		}
	}
	return p.rest
}

func (p *Port) find(key uint64, suffix string) *Rule {
	for _, t := range p.tables {
		if t == nil {
			continue
		}
		if r := t.find(key, suffix, p.port); r != nil {
			return r
		}
	}
	return nil
}

const (
	// maxDepth is above the labels of any name: 253 bytes hold 127.
	maxDepth = 128
	// fewDepths is what nearly every map has. Clearing room for maxDepth marks would
	// cost a quarter of a lookup.
	fewDepths = 8
)

// depths is the set of label counts of wildcards' suffixes.
type depths [maxDepth / 64]uint64

func (d *depths) add(n int)      { d[n/64] |= 1 << (n % 64) }
func (d *depths) len() int       { return bits.OnesCount64(d[0]) + bits.OnesCount64(d[1]) }
func (d *depths) has(n int) bool { return n < maxDepth && d[n/64]&(1<<(n%64)) != 0 }

// keys seed the hash of one map, so that nobody who sees the names of a map, or
// writes some of them, can tell which ones collide.
type keys [2]uint64

func newKeys() keys { return NewKeys() }

// NewKeys returns two secret numbers to seed a hash with, the second one odd. They differ in each process.
func NewKeys() [2]uint64 {
	seed := maphash.MakeSeed()
	return [2]uint64{maphash.Comparable(seed, 0), maphash.Comparable(seed, 1) | 1}
}

// The low byte of a slot's key tells what its suffix is. A free slot's key is zero.
const (
	exactKey = 1 // the whole name
	wildKey  = 2 // what stands behind *.
)

// walk hashes a name from its end, so that one pass has the hash of every suffix on
// its way. It returns the hash of the whole name with a zero low byte, and the
// number of marks: one for each suffix of a depth in wild that has something before
// it, shortest first, with the suffix's offset in the low byte of its hash.
//
// A label is taken eight bytes at a time, each word of it multiplied into the hash,
// and one more at its end. Names with the same hash are told apart by comparing
// them: no byte of a hostile name can forge a match.
func (k *keys) walk(name string, wild *depths, marks []uint64) (hash uint64, n int) {
	h, depth, end := k[0], 0, len(name)
	for {
		w := tail(name, end)
		size := min(bits.LeadingZeros64(dots(w))/8, end) // bytes behind the last dot
		h = mix(h^w>>(64-8*size), k[1])
		if end -= size; size == 8 {
			continue
		}
		if end == 0 {
			return h &^ 0xff, n
		}
		end--
		if depth++; end > 0 && wild.has(depth) {
			marks[n] = h&^0xff | uint64(end+1)
			n++
		}
	}
}

// tail returns the eight bytes before name[end], the last one on top, with zeros
// below when there are fewer.
func tail(name string, end int) uint64 {
	switch {
	case end >= 8:
		return word64(name[end-8:])
	case len(name) >= 8:
		return word64(name) << (64 - 8*end)
	}
	w := uint64(0)
	for i := range end {
		w = w>>8 | uint64(name[i])<<56
	}
	return w
}

// word64 is one load of eight bytes, little endian.
func word64(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// dots returns w with the high bit set in each byte that is a dot, all else clear.
func dots(w uint64) uint64 {
	const ones, low = 0x0101010101010101, 0x7f7f7f7f7f7f7f7f
	x := w ^ '.'*ones // a dot is now zero; no carry leaves its byte
	return ^(x&low + low | x | low)
}

// mix is one step of wyhash: a 64 by 64 bit product folded.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// key returns the key of a rule's name and what the table compares.
func (k *keys) key(name string) (key uint64, suffix string) {
	suffix, isWild := strings.CutPrefix(name, "*.")
	h, _ := k.walk(suffix, new(depths), nil)
	if isWild {
		return h | wildKey, suffix
	}
	return h | exactKey, suffix
}

// A table holds the names of one island of ports. It is open-addressed, with linear
// probing, and at most half full.
type table struct {
	slots []slot // a power of two of them
	shift uint8  // takes a hash to its slot by its top bits
	wild  depths
	// ranged has the rules of a name that do not serve every port of the island, by
	// port: their ranges do not overlap.
	ranged map[*slot][]*Rule
	// alpn has the rules for clients that offer a protocol, which are not in slots.
	alpn     map[string]*table
	preludes []prelude // nil when every port begins with TLS
	// redirects is set when the rules are redirects: those of one island all are, or
	// none is. named is set when some of these have names.
	redirects, named bool
}

// A slot is one name. Two of them fill a cache line, so that a name is found with
// two misses: the slot and the bytes to compare.
type slot struct {
	key    uint64
	suffix string
	rule   *Rule // for every port of the island; nil: look into ranged
}

// slot returns the slot of a key, which is free when the name is not there.
func (t *table) slot(key uint64, suffix string) *slot {
	mask := uint64(len(t.slots) - 1)
	for i := key >> t.shift; ; i++ {
		s := &t.slots[i&mask]
		if s.key == key && s.suffix == suffix || s.key == 0 {
			return s
		}
	}
}

// find returns the rule for a name and a port, or nil.
func (t *table) find(key uint64, suffix string, port uint16) *Rule {
	s := t.slot(key, suffix)
	if s.rule != nil || s.key == 0 {
		return s.rule
	}
	rules := t.ranged[s]
	i, _ := slices.BinarySearchFunc(rules, port, func(r *Rule, port uint16) int { return int(r.Listen.Hi) - int(port) })
	if i < len(rules) && rules[i].Listen.Contains(port) {
		return rules[i]
	}
	return nil
}

// newTable builds the table of an island, whose rules come by first port. It calls
// clash for two rules that claim a name at the same port.
func newTable(k *keys, is *island, clash func(a, b *Rule)) *table {
	general, special := split(is.rules)
	t := newNames(k, general, is.Listen, clash)
	t.preludes = preludes(is.rules)
	t.redirects = is.rules[0].Action == Redirect
	t.named = t.redirects && slices.ContainsFunc(is.rules, func(r *Rule) bool { return r.Name != "" })
	for protocol, rules := range special {
		if t.alpn == nil {
			t.alpn = map[string]*table{}
		}
		t.alpn[protocol] = newNames(k, rules, is.Listen, clash)
	}
	return t
}

// split parts the rules for clients that offer a protocol from the others.
func split(rules []*Rule) (general []*Rule, special map[string][]*Rule) {
	for i, r := range rules {
		switch {
		case r.Protocol != "":
			if special == nil {
				special, general = map[string][]*Rule{}, slices.Clone(rules[:i])
			}
			special[r.Protocol] = append(special[r.Protocol], r)
		case special != nil:
			general = append(general, r)
		}
	}
	if special == nil {
		return rules, nil
	}
	return general, special
}

func newNames(k *keys, rules []*Rule, whole Listen, clash func(a, b *Rule)) *table {
	size := bits.Len(uint(2*max(1, len(rules)) - 1))
	t := &table{slots: make([]slot, 1<<size), shift: uint8(64 - size), ranged: map[*slot][]*Rule{}}
	for _, r := range rules {
		key, suffix := k.key(r.Name)
		if key&0xff == wildKey {
			t.wild.add(1 + strings.Count(suffix, "."))
		}
		s := t.slot(key, suffix)
		s.key, s.suffix = key, suffix
		t.add(s, r, whole, clash)
	}
	return t
}

func (t *table) add(s *slot, r *Rule, whole Listen, clash func(a, b *Rule)) {
	if s.rule != nil {
		clash(s.rule, r)
		return
	}
	rules := t.ranged[s]
	n := len(rules)
	switch {
	case n > 0 && rules[n-1].Listen.Hi >= r.Listen.Lo:
		clash(rules[n-1], r)
		if r.Listen.Hi > rules[n-1].Listen.Hi {
			rules[n-1] = r
		}
	case r.Listen == whole:
		s.rule = r
	default:
		t.ranged[s] = append(rules, r)
	}
}

// A segment is a run of ports of one address that serve the same rules.
type segment struct {
	lo, hi uint16
	port   *Port
}

// Port returns what a listener at addr and port serves, or nil when nothing does.
// An address that no rule names sees the rules of every address, and so does the
// zero or unspecified Addr. It allocates nothing; ports that serve the same rules
// share one *Port.
func (m *Map) Port(addr netip.Addr, port uint16) *Port {
	addr = addr.Unmap()
	if addr.IsValid() && !addr.IsUnspecified() {
		if p := at(m.views[addr], port); p != nil {
			return p
		}
	}
	return at(m.views[netip.Addr{}], port)
}

func at(segs []segment, port uint16) *Port {
	i, _ := slices.BinarySearchFunc(segs, port, func(s segment, port uint16) int { return int(s.hi) - int(port) })
	if i < len(segs) && segs[i].lo <= port {
		return segs[i].port
	}
	return nil
}

// newPort joins what one address and every address serve at a port. A rule that
// reads no ClientHello cannot share a port with rules that do, nor can rules that
// differ in what comes before it: there those of the address are alone. Redirects
// share it with redirects.
func newPort(k keys, port uint16, own, every *table) *Port {
	p := &Port{port: port, keys: k, tables: [2]*table{own, every}}
	if own != nil && every != nil && !own.shares(every, &k, port) {
		p.tables[1] = nil
	}
	if own != nil {
		p.StartTLS = own.prelude(port)
	} else if every != nil {
		p.StartTLS = every.prelude(port)
	}
	for _, t := range p.tables {
		if t == nil {
			continue
		}
		if p.rest == nil {
			p.rest = t.unnamed(&k, port)
		}
		for i, w := range t.wild {
			p.wild[i] |= w
		}
		p.ByHost = p.ByHost || t.named
	}
	p.shallow = p.wild.len() <= fewDepths
	if p.rest != nil && p.rest.Plain() && !p.ByHost {
		p.Plain = p.rest
	}
	p.route(k, port)
	return p
}

// shares reports whether the rules of every address are seen beside t, those of one.
func (t *table) shares(every *table, k *keys, port uint16) bool {
	if t.redirects || every.redirects {
		return t.redirects && every.redirects
	}
	return t.plain(k, port) == nil && every.plain(k, port) == nil && t.prelude(port) == every.prelude(port)
}

// route adds what is served to clients that offer a protocol.
func (p *Port) route(k keys, port uint16) {
	seen := map[string]bool{}
	for _, t := range p.tables {
		if t == nil {
			continue
		}
		for protocol := range t.alpn {
			seen[protocol] = true
		}
	}
	for _, protocol := range slices.Sorted(maps.Keys(seen)) {
		p.alpn = append(p.alpn, routing{protocol, newPort(k, port, p.tables[0].protocol(protocol), p.tables[1].protocol(protocol))})
	}
}

func (t *table) protocol(name string) *table {
	if t == nil {
		return nil
	}
	return t.alpn[name]
}

func (t *table) unnamed(k *keys, port uint16) *Rule {
	key, suffix := k.key("")
	return t.find(key, suffix, port)
}

func (t *table) plain(k *keys, port uint16) *Rule {
	if r := t.unnamed(k, port); r != nil && r.Plain() {
		return r
	}
	return nil
}
