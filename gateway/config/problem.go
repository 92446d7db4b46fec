// SPDX-License-Identifier: Apache-2.0

package config

import (
	"slices"
	"strings"
)

// Problem is one complaint about what an operator wrote.
type Problem struct {
	Warning bool
	Text    string // place: what is wrong; what to write instead
}

const WarningPrefix = "warning: "

func (p Problem) String() string {
	if p.Warning {
		return WarningPrefix + p.Text
	}
	return p.Text
}

// Problems are all complaints, in the order of the files.
type Problems []Problem

// Errors says whether there is an error among them.
func (ps Problems) Errors() bool {
	return slices.ContainsFunc(ps, func(p Problem) bool { return !p.Warning })
}

// Lines are all of them, one line each.
func (ps Problems) Lines() []string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return lines
}

func (ps Problems) String() string { return strings.Join(ps.Lines(), "\n") }
