// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
)

// Prefixes are those of one list, sorted, in a form that is kept from one configuration to the next: 8 bytes for IPv4, 32
// for IPv6. They never change.
type Prefixes struct {
	name string
	four []uint64 // address, 6 bits of length, 26 of the line (MaxListText has no more lines)
	six  []prefix6
}

type prefix6 struct {
	at   u128
	line uint32
	bits uint8
}

const lineBits = 26

// ParseList is ReadList for lists that are kept.
func ParseList(name, text string) (*Prefixes, []Complaint) {
	l := &Prefixes{name: name}
	complaints := eachPrefix(text, l.add)
	l.four = slices.Clip(l.four)
	slices.Sort(l.four) // of one prefix the first line comes first
	slices.SortFunc(l.six, func(a, b prefix6) int {
		return cmp.Or(a.at.compare(b.at), cmp.Compare(a.bits, b.bits), cmp.Compare(a.line, b.line))
	})
	return l, complaints
}

func (l *Prefixes) add(p netip.Prefix, line int) {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		l.four = append(l.four, uint64(binary.BigEndian.Uint32(b[:]))<<32|uint64(p.Bits())<<lineBits|uint64(line))
		return
	}
	first, _ := bounds(p)
	l.six = append(l.six, prefix6{first, uint32(line), uint8(p.Bits())})
}

// Len returns how many there are.
func (l *Prefixes) Len() int { return len(l.four) + len(l.six) }

// A Part of a set: prefixes of a list, or single entries, which say themselves whether they are allowed.
type Part struct {
	List    *Prefixes // nil: Entries
	Allow   bool      // those of List
	Entries []Entry
}

func (p *Part) len() int {
	if p.List != nil {
		return p.List.Len()
	}
	return len(p.Entries)
}

// entry is the i-th of the part, without its prefix.
func (p *Part) entry(i int) Entry {
	switch {
	case p.List == nil:
		return p.Entries[i]
	case i < len(p.List.four):
		return Entry{Allow: p.Allow, List: p.List.name, Line: int(p.List.four[i] & (1<<lineBits - 1))}
	}
	return Entry{Allow: p.Allow, List: p.List.name, Line: int(p.List.six[i-len(p.List.four)].line)}
}

// candidate is a prefix on its way into a set. In their order wider prefixes come before those within them, and of one
// prefix the one that counts comes first: denied before allowed, then as they were written.
type candidate struct {
	at    u128
	order uint64 // length, allowed or not, and the number of the entry over all parts
}

const indexBits = 32

func newCandidate(at u128, bits int, allow bool, index int) candidate {
	order := uint64(bits) << (indexBits + 1)
	if allow {
		order |= 1 << indexBits
	}
	return candidate{at, order | uint64(index)}
}

func (c candidate) bits() int      { return int(c.order >> (indexBits + 1)) }
func (c candidate) allow() bool    { return c.order>>indexBits&1 != 0 }
func (c candidate) index() int     { return int(c.order & (1<<indexBits - 1)) }
func (c candidate) prefix() uint64 { return c.order >> (indexBits + 1) }

func (a u128) compare(b u128) int { return cmp.Or(cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo)) }

// candidates are those of all parts, IPv4 and IPv6, each sorted.
func candidates(parts []Part) (four, six []candidate) {
	start, n4, n6 := 0, 0, 0
	for i := range parts {
		if l := parts[i].List; l != nil {
			n4, n6 = n4+len(l.four), n6+len(l.six)
		}
	}
	four, six = make([]candidate, 0, n4), make([]candidate, 0, n6)
	for i := range parts {
		p := &parts[i]
		if p.List != nil {
			four, six = p.List.candidates(four, six, p.Allow, start)
		}
		for k := range p.Entries {
			e := &p.Entries[k]
			first, _ := bounds(e.Prefix)
			c := newCandidate(first, e.Prefix.Bits(), e.Allow, start+k)
			if e.Prefix.Addr().Is4() {
				four = append(four, c)
			} else {
				six = append(six, c)
			}
		}
		start += p.len()
	}
	for _, all := range [][]candidate{four, six} {
		if order := func(a, b candidate) int { return cmp.Or(a.at.compare(b.at), cmp.Compare(a.order, b.order)) }; !slices.IsSortedFunc(all, order) {
			slices.SortFunc(all, order)
		}
	}
	return four, six
}

func (l *Prefixes) candidates(four, six []candidate, allow bool, start int) (_, _ []candidate) {
	for i, x := range l.four {
		four = append(four, newCandidate(u128{lo: x >> 32}, int(x>>lineBits&63), allow, start+i))
	}
	for i, x := range l.six {
		six = append(six, newCandidate(x.at, int(x.bits), allow, start+len(l.four)+i))
	}
	return four, six
}
