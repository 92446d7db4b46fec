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
	s := &Set{otherwise: otherwise}
	runs, conflicts := sorted(entries)
	lists := map[string]uint16{}
	for i := range runs {
		r := &runs[i]
		n, ok := lists[r.entry.List]
		if !ok {
			n = uint16(len(s.lists)) // a rule has two options, and the parser bounds the files of each
			lists[r.entry.List] = n
			s.lists = append(s.lists, r.entry.List)
		}
		r.verdict = newVerdict(len(s.marks), r.entry.Allow)
		s.marks = append(s.marks, mark{uint32(r.entry.Line), n, uint8(r.entry.Prefix.Bits())})
	}
	first6 := slices.IndexFunc(runs, func(r run) bool { return !r.entry.Prefix.Addr().Is4() })
	if first6 < 0 {
		first6 = len(runs)
	}
	none := newVerdict(noMark, otherwise)
	for _, c := range flatten(runs[:first6], none, u128{0, 1<<32 - 1}) {
		s.begin4, s.verdict4 = append(s.begin4, uint32(c.at.lo)), append(s.verdict4, c.verdict)
	}
	for _, c := range flatten(runs[first6:], none, u128{1<<64 - 1, 1<<64 - 1}) {
		s.begin6, s.verdict6 = append(s.begin6, c.at), append(s.verdict6, c.verdict)
	}
	s.begin4, s.verdict4 = slices.Clone(s.begin4), slices.Clone(s.verdict4) // without the room for more
	s.begin6, s.verdict6 = slices.Clone(s.begin6), slices.Clone(s.verdict6)
	return s, conflicts
}

// run is an entry as a run of addresses.
type run struct {
	entry       *Entry
	first, last u128
	verdict     verdict
}

// sorted are the runs of the entries, each prefix once: IPv4 first, by where they begin, wider ones first.
func sorted(entries []Entry) (runs []run, conflicts []Conflict) {
	all := make([]run, len(entries))
	for i := range entries {
		e := &entries[i]
		all[i].entry = e
		all[i].first, all[i].last = bounds(e.Prefix)
	}
	slices.SortStableFunc(all, func(a, b run) int {
		p, q := a.entry, b.entry
		switch {
		case p.Prefix != q.Prefix:
			return p.Prefix.Compare(q.Prefix)
		case p.Allow == q.Allow:
			return 0
		case p.Allow:
			return 1
		}
		return -1
	})
	for i := range all {
		before := len(runs) - 1
		if i == 0 || all[i].entry.Prefix != runs[before].entry.Prefix {
			runs = append(runs, all[i])
		} else if e := all[i].entry; e.Allow != runs[before].entry.Allow && all[i-1].entry.Allow != e.Allow {
			conflicts = append(conflicts, Conflict{*e, *runs[before].entry})
		}
	}
	return runs, conflicts
}

// A cut is where another verdict begins to hold.
type cut struct {
	at u128
	verdict
}

// flatten cuts nested runs, the wider ones first, into runs side by side from address zero to last.
func flatten(runs []run, none verdict, last u128) []cut {
	cuts := make([]cut, 1, 2*len(runs)+1)
	cuts[0].verdict = none
	put := func(at u128, v verdict) {
		switch top := &cuts[len(cuts)-1]; {
		case top.at == at:
			top.verdict = v
		case top.verdict != v:
			cuts = append(cuts, cut{at, v})
		}
	}
	// Those that hold the address we are at, each within the one before, in a run of everything.
	open := []run{{last: last, verdict: none}}
	leave := func() {
		end := open[len(open)-1].last
		open = open[:len(open)-1]
		if end != last {
			put(end.next(), open[len(open)-1].verdict)
		}
	}
	for _, r := range runs {
		for open[len(open)-1].last.less(r.first) {
			leave()
		}
		put(r.first, r.verdict)
		open = append(open, r)
	}
	for len(open) > 1 {
		leave()
	}
	return cuts
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
func bounds(p netip.Prefix) (first, last u128) {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		first.lo = uint64(binary.BigEndian.Uint32(b[:]))
		last.lo = first.lo | (1<<(32-p.Bits()) - 1)
		return first, last
	}
	b := p.Addr().As16()
	first = u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
	free := uint(128 - p.Bits()) // a shift by 64 or more leaves nothing
	low := uint64(1)<<min(free, 64) - 1
	high := uint64(1)<<(max(free, 64)-64) - 1
	return first, u128{first.hi | high, first.lo | low}
}
