// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/natmap"
)

const (
	// maxPrefixes bounds the prefixes of a configuration, those of a file counted for each use: 160 MB.
	maxPrefixes = 4 << 20
	// Prefixes that are allowed and denied: so many of a rule are told.
	maxConflicts = 10
)

// lists are what allow= and deny= of the rules say. Rules that say the same share a set.
type lists struct {
	sets  map[*natmap.Rule]*gate.Set // of the rules that have one
	files map[string][]gate.Entry    // what was read, by path; without the entries once the sets are made

	prefixes int // of all sets
}

// Gate is the set of addresses that a rule lets in. It is nil where everybody may come.
func (c *Config) Gate(r *natmap.Rule) *gate.Set { return c.lists.sets[r] }

// ListFiles are the paths of the files that allow= and deny= name, in order.
func (c *Config) ListFiles() []string {
	files := make([]string, 0, len(c.lists.files))
	for f := range c.lists.files {
		files = append(files, f)
	}
	slices.Sort(files)
	return files
}

// readLists reads the files that the map names, and makes the sets.
func (c *Config) readLists() (problems Problems) {
	c.lists = lists{sets: map[*natmap.Rule]*gate.Set{}, files: map[string][]gate.Entry{}}
	type pair struct{ allow, deny *natmap.Member } // a list is read once and shared: its first member tells it
	made := map[pair]*gate.Set{}
	for _, r := range c.Map.Rules {
		o := &r.Options.Gate
		if len(o.Allow)+len(o.Deny) == 0 {
			continue
		}
		key := pair{first(o.Allow), first(o.Deny)}
		if made[key] == nil {
			set, found := c.makeSet(r)
			problems = append(problems, found...)
			if c.lists.prefixes += set.Len(); c.lists.prefixes > maxPrefixes {
				return append(problems, Problem{Text: fmt.Sprintf("%s: the lists of the map have more than %d prefixes; write wider ones", r.Pos, maxPrefixes)})
			}
			made[key] = set
		}
		c.lists.sets[r] = made[key]
	}
	for path := range c.lists.files {
		c.lists.files[path] = nil
	}
	return problems
}

func first(list []natmap.Member) *natmap.Member {
	if len(list) == 0 {
		return nil
	}
	return &list[0]
}

// makeSet makes the set of a rule. Whom neither list has may come in if there is only a list of those who may not.
func (c *Config) makeSet(r *natmap.Rule) (*gate.Set, Problems) {
	o := &r.Options.Gate
	var entries []gate.Entry
	var problems Problems
	for _, l := range []struct {
		key     string
		members []natmap.Member
	}{{"allow", o.Allow}, {"deny", o.Deny}} {
		at := settingOf(r, l.key).Pos
		for _, m := range l.members {
			e, found := c.entries(m, l.key, at)
			entries, problems = append(entries, e...), append(problems, found...)
		}
	}
	set, conflicts := gate.NewSet(entries, len(o.Allow) == 0)
	for _, x := range conflicts[:min(len(conflicts), maxConflicts)] {
		problems = append(problems, Problem{true, fmt.Sprintf("%s: %s is denied at %s too, which wins; remove one of the two", x.Allow.Place(), x.Allow.Prefix, x.Deny.Place())})
	}
	if len(o.Allow) > 0 && !slices.ContainsFunc(entries, func(e gate.Entry) bool { return e.Allow }) && !problems.Errors() {
		problems = append(problems, Problem{true, fmt.Sprintf("%s: allow= has no prefix, so nobody may come in; write some, or -> reject", settingOf(r, "allow").Pos)})
	}
	return set, problems
}

// settingOf is where a rule's option was written.
func settingOf(r *natmap.Rule, key string) natmap.Setting {
	for _, s := range r.Settings {
		if s.Key == key {
			return s
		}
	}
	return natmap.Setting{}
}

// entries are what a member of a list stands for.
func (c *Config) entries(m natmap.Member, key string, at natmap.Pos) ([]gate.Entry, Problems) {
	allow := key == "allow"
	if m.File == "" {
		return []gate.Entry{{Prefix: m.Prefix, Allow: allow, List: at.String()}}, nil
	}
	path := m.File
	if !filepath.IsAbs(path) && at.File != Prefix+"MAP" {
		path = filepath.Join(filepath.Dir(at.File), path)
	}
	all, known := c.lists.files[path]
	var problems Problems
	if !known {
		all, problems = readList(path, fmt.Sprintf("%s: %s=@%s", at, key, m.File))
		c.lists.files[path] = all
	}
	all = slices.Clone(all)
	for i := range all {
		all[i].Allow = allow
	}
	return all, problems
}

// readList reads a file. at is who asked for it.
func readList(path, at string) (entries []gate.Entry, problems Problems) {
	text, err := readText(path, gate.MaxListText)
	if err != nil {
		return nil, Problems{{Text: fmt.Sprintf("%s: %s: %v; %s", at, path, reason(err), readable(err))}}
	}
	entries, complaints := gate.ReadList(path, string(text), false)
	for _, x := range complaints {
		problems = append(problems, Problem{Text: fmt.Sprintf("%s:%d:%d: %s; %s", path, x.Line, x.Col, x.Msg, x.Hint)})
	}
	return entries, problems
}
