// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
)

// An Entry is a prefix and what is to be done with the addresses in it.
type Entry struct {
	Prefix netip.Prefix // masked, and never IPv4 in IPv6
	Allow  bool
	List   string // where it stands: the name of a file, or a place in the map
	Line   int    // in List, from 1; 0: List says it all
}

// Place returns "list" or "list:line".
func (e *Entry) Place() string {
	if e.Line == 0 {
		return e.List
	}
	return e.List + ":" + strconv.Itoa(e.Line)
}

// A Set is a set of prefixes, each allowed or denied. The longest that holds an address decides about it. A Set is
// immutable and safe for concurrent use.
//
// The prefixes are cut into runs of addresses that one of them decides about, sorted by where they begin: an address is
// found by halving, in 17 steps among 50,000 prefixes. A run of IPv4 addresses takes 8 bytes, one of IPv6 20, and a
// prefix makes two runs at most, with 8 bytes to tell where it was written.
type Set struct {
	begin4    []uint32
	verdict4  []verdict
	begin6    []u128
	verdict6  []verdict
	marks     []mark
	lists     []string
	otherwise bool
}

// verdict is the index of the mark that decides, twice, plus one if it allows. Without a mark the index is noMark.
type verdict uint32

const noMark = 1<<31 - 1

func newVerdict(index int, allow bool) verdict {
	v := verdict(index) << 1
	if allow {
		v++
	}
	return v
}

func (v verdict) allows() bool { return v&1 != 0 }
func (v verdict) index() int   { return int(v >> 1) }

// mark is where an entry was written.
type mark struct {
	line uint32
	list uint16
	bits uint8
}

// A Conflict is a prefix that is allowed and denied. It is denied.
type Conflict struct{ Allow, Deny Entry }

// NewSet makes a set of entries. otherwise says whether an address that none of them holds is allowed. A prefix that
// stands twice counts as it was written first; one that is allowed and denied is denied, and returned.
func NewSet(entries []Entry, otherwise bool) (*Set, []Conflict) {
	return Join([]Part{{Entries: entries}}, otherwise)
}

// Join is NewSet for lists that are kept.
func Join(parts []Part, otherwise bool) (*Set, []Conflict) {
	four, six := candidates(parts)
	m := &maker{Set: &Set{otherwise: otherwise}, parts: parts, numbers: map[string]uint16{}}
	start := 0
	for i := range parts {
		m.starts = append(m.starts, start)
		start += parts[i].len()
	}
	m.marks = make([]mark, 0, len(four)+len(six))
	s := m.Set
	s.begin4, s.verdict4 = make([]uint32, 0, 2*len(four)+1), make([]verdict, 0, 2*len(four)+1)
	m.flatten(four, 32, func(at u128, v verdict) {
		s.begin4, s.verdict4 = append(s.begin4, uint32(at.lo)), append(s.verdict4, v)
	})
	m.flatten(six, 128, func(at u128, v verdict) { s.begin6, s.verdict6 = append(s.begin6, at), append(s.verdict6, v) })
	s.begin4, s.verdict4 = slices.Clone(s.begin4), slices.Clone(s.verdict4) // without the room for more
	s.begin6, s.verdict6 = slices.Clone(s.begin6), slices.Clone(s.verdict6)
	return s, m.conflicts
}

// maker makes a set of sorted candidates.
type maker struct {
	*Set
	parts     []Part
	starts    []int // the number of each part's first entry
	numbers   map[string]uint16
	conflicts []Conflict
}

// open is a prefix that holds the address we are at.
type open struct {
	last    u128
	verdict verdict
}

// flatten cuts nested prefixes, the wider ones first, into runs of addresses side by side. They come in order, each with
// where it begins and the verdict about it.
func (m *maker) flatten(all []candidate, width int, add func(u128, verdict)) {
	none := newVerdict(noMark, m.otherwise)
	whole := last(u128{}, width, 0)
	at, v := u128{}, none // the run that is not told yet
	put := func(next u128, w verdict) {
		switch {
		case next == at:
			v = w
		case v != w:
			add(at, v)
			at, v = next, w
		}
	}
	nested := []open{{whole, none}}
	leave := func() {
		end := nested[len(nested)-1].last
		nested = nested[:len(nested)-1]
		if end != whole {
			put(end.next(), nested[len(nested)-1].verdict)
		}
	}
	for i, c := range all {
		if i > 0 && c.at == all[i-1].at && c.prefix() == all[i-1].prefix() {
			m.again(all, i, width)
			continue
		}
		for nested[len(nested)-1].last.less(c.at) {
			leave()
		}
		w := m.note(c)
		put(c.at, w)
		nested = append(nested, open{last(c.at, width, c.bits()), w})
	}
	for len(nested) > 1 {
		leave()
	}
	add(at, v)
}

// again looks at a prefix that stands more than once: allowed once, and denied before, is a conflict.
func (m *maker) again(all []candidate, i, width int) {
	if c, before := all[i], all[i-1]; c.allow() && !before.allow() {
		first := i - 1 // what counts
		for first > 0 && all[first-1].at == c.at && all[first-1].prefix() == c.prefix() {
			first--
		}
		m.conflicts = append(m.conflicts, Conflict{m.entry(c, width), m.entry(all[first], width)})
	}
}

// note keeps where a prefix was written, and returns the verdict that leads there.
func (m *maker) note(c candidate) verdict {
	e := m.origin(c)
	n, ok := m.numbers[e.List]
	if !ok {
		n = uint16(len(m.lists)) // a rule has two options, and the parser bounds the files of each
		m.numbers[e.List] = n
		m.lists = append(m.lists, e.List)
	}
	v := newVerdict(len(m.marks), c.allow())
	m.marks = append(m.marks, mark{uint32(e.Line), n, uint8(c.bits())})
	return v
}

// origin is the entry of a candidate, without its prefix.
func (m *maker) origin(c candidate) Entry {
	part, found := slices.BinarySearch(m.starts, c.index())
	if !found {
		part--
	}
	for m.parts[part].len() == 0 { // several parts begin at one number if all but the last are empty
		part++
	}
	return m.parts[part].entry(c.index() - m.starts[part])
}

func (m *maker) entry(c candidate, width int) Entry {
	e := m.origin(c)
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], c.at.hi)
	binary.BigEndian.PutUint64(b[8:], c.at.lo)
	a := netip.AddrFrom16(b)
	if width == 32 {
		a = netip.AddrFrom4([4]byte(b[12:]))
	}
	e.Prefix = netip.PrefixFrom(a, c.bits())
	return e
}

// Allows says whether the address may come in. It allocates nothing.
func (s *Set) Allows(a netip.Addr) bool { return s.find(a).allows() }

// find returns what holds at an address.
func (s *Set) find(a netip.Addr) verdict {
	if a.Is4() {
		b := a.As4()
		return s.find4(binary.BigEndian.Uint32(b[:]))
	}
	b := a.As16()
	at := u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
	if at.hi == 0 && at.lo>>32 == 0xffff { // RFC 4291 section 2.5.5.2: it is an IPv4 address
		return s.find4(uint32(at.lo))
	}
	lo, n := 0, len(s.begin6)
	for n > 1 {
		half := n / 2
		if !at.less(s.begin6[lo+half]) {
			lo += half
		}
		n -= half
	}
	return s.verdict6[lo]
}

// find4 halves without a jump that could be guessed wrongly: the compiler makes a conditional move of the if.
func (s *Set) find4(at uint32) verdict {
	begin := s.begin4
	lo, n := 0, len(begin)
	for n > 1 {
		half := n / 2
		next := lo + half
		if begin[next] <= at {
			lo = next
		}
		n -= half
	}
	return s.verdict4[lo]
}

// A Decision is what a Set says about an address, and why.
type Decision struct {
	Allow  bool
	Prefix netip.Prefix // the longest that holds the address; not valid when none does
	Place  string       // of that prefix: "block.txt:17"
}

// Decide is Allows with the reason, for those who ask rarely.
func (s *Set) Decide(a netip.Addr) Decision {
	a = a.Unmap()
	v := s.find(a)
	d := Decision{Allow: v.allows()}
	if v.index() != noMark {
		m := s.marks[v.index()]
		d.Prefix, _ = a.WithZone("").Prefix(int(m.bits))
		e := Entry{List: s.lists[m.list], Line: int(m.line)}
		d.Place = e.Place()
	}
	return d
}

// Len returns how many prefixes the set has.
func (s *Set) Len() int { return len(s.marks) }

// Bytes returns how much memory the set takes, but for the names of its lists.
func (s *Set) Bytes() int {
	return 8*cap(s.begin4) + 20*cap(s.begin6) + 8*cap(s.marks)
}

// u128 is an address as a number. IPv4 has the lower 32 bits.
type u128 struct{ hi, lo uint64 }

func (a u128) less(b u128) bool {
	_, borrow := bits.Sub64(a.lo, b.lo, 0)
	_, borrow = bits.Sub64(a.hi, b.hi, borrow)
	return borrow != 0
}

func (a u128) next() u128 {
	lo, carry := bits.Add64(a.lo, 1, 0)
	return u128{a.hi + carry, lo}
}

// bounds are the first and the last address of a prefix.
func bounds(p netip.Prefix) (first, end u128) {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		first.lo = uint64(binary.BigEndian.Uint32(b[:]))
		return first, last(first, 32, p.Bits())
	}
	b := p.Addr().As16()
	first = u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
	return first, last(first, 128, p.Bits())
}

// last is the last address of a prefix, of addresses of that width.
func last(first u128, width, prefix int) u128 {
	free := uint(width - prefix) // a shift by 64 or more leaves nothing
	low := uint64(1)<<min(free, 64) - 1
	high := uint64(1)<<(max(free, 64)-64) - 1
	return u128{first.hi | high, first.lo | low}
}
