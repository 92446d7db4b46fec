// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/tlsnat/tlsnat/natmap"
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
	complaints = eachPrefix(text, func(p netip.Prefix, line int) { entries = append(entries, Entry{p, allow, name, line}) })
	return entries, complaints
}

// eachPrefix reads a list, and tells each prefix with its line.
func eachPrefix(text string, add func(p netip.Prefix, line int)) (complaints []Complaint) {
	line, n := 0, 0
	for s := range strings.Lines(text) {
		line++
		if p, ok := plainIPv4(s); ok && n < MaxEntries {
			add(p, line)
			n++
			continue
		}
		word, col := firstWord(strings.TrimPrefix(s, "\ufeff")) // a byte order mark; in the middle where files were put together
		if word == "" {
			continue
		}
		p, msg, hint := natmap.ParsePrefix(word)
		switch {
		case msg != "" && len(complaints) == maxComplaints:
			return append(complaints, Complaint{line, col, fmt.Sprintf("more than %d complaints", maxComplaints), "the rest is not shown"})
		case msg != "":
			complaints = append(complaints, Complaint{line, col, msg, hint})
		case n == MaxEntries:
			return append(complaints, Complaint{line, col, fmt.Sprintf("the list has more than %d prefixes", MaxEntries), "write wider ones"})
		default:
			add(p, line)
			n++
		}
	}
	return complaints
}

// plainIPv4 reads what nearly all lines of long lists are: an IPv4 address or prefix at the start of the line, and nothing
// behind it but blanks. It takes a tenth of the time. Of everything else it says no, also of what is wrong.
func plainIPv4(s string) (p netip.Prefix, ok bool) {
	var b [4]byte
	i, bits := 0, 32
	for part := range b {
		n, digits := decimal(s[i:])
		if digits == 0 || n > 255 {
			return p, false
		}
		b[part] = byte(n)
		if i += digits; part < 3 {
			if i == len(s) || s[i] != '.' {
				return p, false
			}
			i++
		}
	}
	if i < len(s) && s[i] == '/' {
		n, digits := decimal(s[i+1:])
		if digits == 0 || n > 32 {
			return p, false
		}
		bits, i = n, i+1+digits
	}
	p = netip.PrefixFrom(netip.AddrFrom4(b), bits)
	return p, strings.Trim(s[i:], " \t\r\n") == "" && p.Masked() == p
}

// decimal reads a number of at most three digits, and not with a zero before others.
func decimal(s string) (n, digits int) {
	for digits < len(s) && digits < 3 && '0' <= s[digits] && s[digits] <= '9' {
		n = n*10 + int(s[digits]-'0')
		digits++
	}
	if digits > 1 && s[0] == '0' {
		return 0, 0
	}
	return n, digits
}

// firstWord is what a line says before its comment, and the column where that begins.
func firstWord(line string) (word string, col int) {
	if i := strings.IndexAny(line, "#;"); i >= 0 {
		line = line[:i]
	}
	word = strings.TrimSpace(line)
	return word, 1 + utf8.RuneCountInString(line[:strings.Index(line, word)])
}
