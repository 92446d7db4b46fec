// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/tlsnat/tlsnat/gateway/printable"
)

// Problem is something in the directory that an operator should know. It never holds a byte of a private key.
type Problem struct {
	File    string // path of the file or directory
	Line    int    // in File, from 1; 0 if it concerns the whole file
	Warning bool   // the certificate is served all the same
	Whole   bool   // it concerns the directory itself: nothing is read from it
	Msg     string // what is wrong
	Hint    string // what to do instead; may be empty
}

// Error is "file[:line]: what is wrong; what to do instead".
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(printable.Quoted(p.File))
	if p.Line > 0 {
		b.WriteString(":" + strconv.Itoa(p.Line))
	}
	b.WriteString(": " + p.Msg)
	if p.Hint != "" {
		b.WriteString("; " + p.Hint)
	}
	return b.String()
}

// report collects problems.
type report []Problem

// place is where a problem is.
type place struct {
	file string
	line int
}

func (r *report) fail(at place, hint, format string, args ...any) {
	*r = append(*r, Problem{File: at.file, Line: at.line, Msg: fmt.Sprintf(format, args...), Hint: hint})
}

func (r *report) warn(at place, hint, format string, args ...any) {
	*r = append(*r, Problem{File: at.file, Line: at.line, Warning: true, Msg: fmt.Sprintf(format, args...), Hint: hint})
}

// of marks what concerns dir itself.
func (r report) of(dir string) report {
	for i := range r {
		r[i].Whole = r[i].File == dir
	}
	return r
}

// sorted is by file and line, errors before warnings.
func (r report) sorted() []Problem {
	slices.SortStableFunc(r, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(rank(a), rank(b)))
	})
	said := make(map[Problem]bool, len(r))
	return slices.DeleteFunc(r, func(p Problem) bool { // two ways may lead to the same complaint
		again := said[p]
		said[p] = true
		return again
	})
}

func rank(p Problem) int {
	if p.fatal() {
		return 0
	}
	return 1
}

func (p Problem) fatal() bool { return !p.Warning }
