// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"
)

// Bounds of a list. What goes beyond them is a complaint.
const (
	MaxEntries    = 1 << 20  // of a list: every prefix of the Internet's routing table
	MaxListText   = 64 << 20 // bytes of its file: a line of 64 for each
	maxComplaints = 100      // nobody reads more of one file
)

// A Complaint is what is wrong with a line of a list.
type Complaint struct {
	Line, Col int // from 1, Col in characters
	Msg, Hint string
}

// ReadList reads a list of prefixes: an address or a prefix a line, and behind a # or a ; whatever its author wants to
// say. name is what the entries call the list.
func ReadList(name, text string, allow bool) (entries []Entry, complaints []Complaint) {
	text = strings.TrimPrefix(text, "\ufeff") // a byte order mark
	line := 0
	for s := range strings.Lines(text) {
		line++
		word, col := firstWord(s)
		if word == "" {
			continue
		}
		p, msg, hint := ParsePrefix(word)
		switch {
		case msg != "" && len(complaints) == maxComplaints:
			return entries, append(complaints, Complaint{line, col, fmt.Sprintf("more than %d complaints", maxComplaints), "the rest is not shown"})
		case msg != "":
			complaints = append(complaints, Complaint{line, col, msg, hint})
		case len(entries) == MaxEntries:
			return entries, append(complaints, Complaint{line, col, fmt.Sprintf("the list has more than %d prefixes", MaxEntries), "write wider ones"})
		default:
			entries = append(entries, Entry{p, allow, name, line})
		}
	}
	return entries, complaints
}

// firstWord is what a line says before its comment, and the column where that begins.
func firstWord(line string) (word string, col int) {
	if i := strings.IndexAny(line, "#;"); i >= 0 {
		line = line[:i]
	}
	word = strings.TrimSpace(line)
	return word, 1 + utf8.RuneCountInString(line[:strings.Index(line, word)])
}

// ParsePrefix reads an address or a prefix. When it is none, msg says what is wrong with it and hint what to write.
func ParsePrefix(s string) (p netip.Prefix, msg, hint string) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return p, fmt.Sprintf("%.80q has a zone", s), "write it without %" + a.Zone()
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
		return netip.Prefix{}, fmt.Sprintf("%.80q is not an address or a prefix", s), "write one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32"
	case mapped:
		return netip.Prefix{}, fmt.Sprintf("%.80q is more than IPv4", s), "write 0.0.0.0/0 for all of IPv4"
	case p.Masked() != p:
		return netip.Prefix{}, fmt.Sprintf("%.80q has bits behind its prefix", s), "write " + p.Masked().String() + ", or " + p.Addr().String() + " for the address alone"
	}
	return p, "", ""
}
