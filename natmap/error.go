// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// An Error is one complaint about a map. Text is what stands at File:Line:Col and
// was not understood (its first 80 characters at most; empty when something is
// missing there; for two rules that are in each other's way the name or listener
// they both claim). Msg says what is wrong, Hint what to write instead.
type Error struct {
	File      string
	Line, Col int
	Text      string
	Msg, Hint string
}

// Error returns "file:line:col: what is wrong; what to write instead".
func (e *Error) Error() string {
	s := Pos{e.File, e.Line, e.Col}.String() + ": " + e.Msg
	if e.Hint != "" {
		s += "; " + e.Hint
	}
	return s
}

// Errors are all complaints about a map, in the order of its text.
type Errors []*Error

// Error returns the complaints, one a line.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, x := range e {
		lines[i] = x.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.As reach each *Error.
func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, x := range e {
		errs[i] = x
	}
	return errs
}

// sortErrors orders complaints by the order of the sources, then by place.
func sortErrors(errs []*Error, src []Source) {
	rank := make(map[string]int, len(src))
	for i, s := range src {
		rank[s.Name] = i
	}
	slices.SortStableFunc(errs, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(rank[a.File], rank[b.File]), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
}

// maxQuote bounds the characters of the user's text that a complaint repeats.
const maxQuote = 80

// clip returns the first maxQuote characters of s.
func clip(s string) string {
	n := 0
	for i := range s {
		if n == maxQuote {
			return s[:i]
		}
		n++
	}
	return s
}

// quote returns s in quotes, with control characters escaped so that a complaint
// is safe on a terminal, and cut to a length that can be read.
func quote(s string) string {
	c := clip(s)
	q := strconv.Quote(c)
	if len(c) < len(s) {
		q = q[:len(q)-1] + `…"`
	}
	return q
}

// list returns "a, b or c".
func list(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// Nearest returns the word that s is most probably a slip of, or "". Large and small letters are the same.
func Nearest(s string, words []string) string {
	if len(s) == 0 || len(s) > 24 { // longer than any word of ours: not a slip, and distance is quadratic
		return ""
	}
	best, at := "", 1+min(2, utf8.RuneCountInString(s)/3)
	for _, w := range words {
		if d := distance(strings.ToLower(s), strings.ToLower(w)); d < at {
			best, at = w, d
		}
	}
	return best
}

// distance returns the number of insertions, deletions, replacements and swaps of
// neighbours between a and b (optimal string alignment, in bytes).
func distance(a, b string) int {
	var before, prev, row [64]int
	if len(b) >= len(row) || len(a) >= len(row) {
		return len(row)
	}
	for j := range len(b) + 1 {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(prev[j]+1, row[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, prev = prev, row
	}
	return prev[len(b)]
}
