// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/natmap"
)

const (
	// maxPrefixes bounds the prefixes of all sets of a configuration: 200 MB, with the lists that they were made of.
	MaxPrefixes = 4 << 20
	// Prefixes that are allowed and denied: so many of a rule are told.
	maxConflicts = 10
)

// lists are what allow= and deny= of the rules say. Rules that say the same share a set. What did not change is taken over
// from the configuration before.
type lists struct {
	sets  map[*natmap.Rule]*gate.Set // of the rules that have one
	made  map[string]madeSet         // by what it was made of
	files map[string]*listFile       // what was read, by path

	prefixes int // of all sets
}

// listFile is a file of prefixes.
type listFile struct {
	stamp  certs.Stamp
	list   *gate.Prefixes // nil: it never could be read
	closed bool           // so whom its rules let in is not known, and it is nobody
}

type madeSet struct {
	set       *gate.Set
	conflicts Problems
}

// Gate is the set of addresses that a rule lets in. It is nil where everybody may come.
func (c *Config) Gate(r *natmap.Rule) *gate.Set { return c.lists.sets[r] }

// Prefixes is how many prefixes the sets of all rules have.
func (c *Config) Prefixes() int { return c.lists.prefixes }

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
	c.lists = lists{sets: map[*natmap.Rule]*gate.Set{}, made: map[string]madeSet{}, files: map[string]*listFile{}}
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
			if c.lists.prefixes > MaxPrefixes {
				return append(problems, Problem{Text: fmt.Sprintf("%s: the lists of the map have more than %d prefixes; write wider ones", r.Pos, MaxPrefixes)})
			}
			made[key] = set
		}
		c.lists.sets[r] = made[key]
	}
	return problems
}

func first(list []natmap.Member) *natmap.Member {
	if len(list) == 0 {
		return nil
	}
	return &list[0]
}

// makeSet makes the set of a rule, or takes one that was made of the same. Whom neither list has may come in if there is
// only a list of those who may not.
func (c *Config) makeSet(r *natmap.Rule) (*gate.Set, Problems) {
	o := &r.Options.Gate
	m := &setMaker{}
	for _, l := range []struct {
		key     string
		members []natmap.Member
	}{{"allow", o.Allow}, {"deny", o.Deny}} {
		at := SettingOf(r, l.key).Pos
		for _, member := range l.members {
			m.add(c, member, l.key, at)
		}
	}
	m.flush()
	problems, otherwise := m.problems, len(o.Allow) == 0
	switch {
	case m.closed:
		problems = append(problems, Problem{true, fmt.Sprintf("%s: a list of the rule cannot be read, so it lets nobody in", r.Pos)})
		return closedSet, problems
	case !otherwise && m.allowed == 0 && !problems.Errors():
		problems = append(problems, Problem{true, fmt.Sprintf("%s: allow= has no prefix, so nobody may come in; write some, or -> reject", SettingOf(r, "allow").Pos)})
	}
	made, known := c.lists.made[m.key]
	if !known && c.before != nil { // whose files are still in memory: no other list has their address
		made, known = c.before.lists.made[m.key]
	}
	if !known {
		made = newMadeSet(m.parts, otherwise)
	}
	if _, counted := c.lists.made[m.key]; !counted {
		c.lists.prefixes += made.set.Len()
	}
	c.lists.made[m.key] = made
	return made.set, append(problems, made.conflicts...)
}

// closedSet lets nobody in.
var closedSet, _ = gate.NewSet(nil, false)

func newMadeSet(parts []gate.Part, otherwise bool) madeSet {
	set, conflicts := gate.Join(parts, otherwise)
	made := madeSet{set: set}
	for _, x := range conflicts[:min(len(conflicts), maxConflicts)] {
		made.conflicts = append(made.conflicts, Problem{true, fmt.Sprintf("%s: %s is denied at %s too, which wins; remove one of the two", x.Allow.Place(), x.Allow.Prefix, x.Deny.Place())})
	}
	return made
}

// setMaker gathers what a set is made of.
type setMaker struct {
	parts    []gate.Part
	single   []gate.Entry // since the last list
	key      string       // tells sets apart
	allowed  int          // prefixes of allow=
	closed   bool
	problems Problems
}

func (m *setMaker) add(c *Config, member natmap.Member, option string, at natmap.Pos) {
	allow := option == "allow"
	if member.File == "" {
		m.single = append(m.single, gate.Entry{Prefix: member.Prefix, Allow: allow, List: at.String()})
		m.key += fmt.Sprintf("%s %s %s\n", option, member.Prefix, at)
		m.count(allow, 1)
		return
	}
	path := member.File
	if !filepath.IsAbs(path) && at.File != Prefix+"MAP" {
		path = filepath.Join(filepath.Dir(at.File), path)
	}
	f, problems := c.listFile(path, fmt.Sprintf("%s: %s=@%s", at, option, member.File))
	m.problems = append(m.problems, problems...)
	if f.list == nil {
		m.closed = m.closed || f.closed
		return
	}
	m.flush()
	m.parts = append(m.parts, gate.Part{List: f.list, Allow: allow})
	m.key += fmt.Sprintf("%s %p\n", option, f.list)
	m.count(allow, f.list.Len())
}

func (m *setMaker) count(allow bool, n int) {
	if allow {
		m.allowed += n
	}
}

// flush makes a part of single entries: of one prefix the one counts that was written first.
func (m *setMaker) flush() {
	if len(m.single) > 0 {
		m.parts = append(m.parts, gate.Part{Entries: m.single})
		m.single = nil
	}
}

// settingOf is where a rule's option was written.
func SettingOf(r *natmap.Rule, key string) natmap.Setting {
	for _, s := range r.Settings {
		if s.Key == key {
			return s
		}
	}
	return natmap.Setting{}
}

// listFile is a file of prefixes, read once for a configuration, and not at all if it is what it was. at is who asked for
// it. A file that cannot be used is what it was before. At the start nothing is known of it, and its rules let nobody in;
// a reload that comes to name one is refused.
func (c *Config) listFile(path, at string) (*listFile, Problems) {
	if f := c.lists.files[path]; f != nil {
		return f, nil
	}
	var had *listFile
	if c.before != nil {
		had = c.before.lists.files[path]
	}
	if had != nil && had.list != nil && had.stamp.Unread(path) {
		c.lists.files[path] = had
		return had, nil
	}
	f, problems := readList(path, at, had)
	if problems.Errors() {
		f = &listFile{closed: true}
		if had != nil {
			f.list = had.list
		}
		if c.before == nil || had != nil {
			for i, p := range problems {
				problems[i] = c.unusable(p.Text)
			}
		}
		if f.list != nil {
			problems = append(problems, Problem{true, path + ": what was read before is still in use"})
		}
	}
	c.lists.files[path] = f
	return f, problems
}

// readList reads a file, and parses it unless it has the content that it had.
func readList(path, at string, had *listFile) (*listFile, Problems) {
	text, stamp, err := readText(path, gate.MaxListText)
	if err != nil {
		return nil, Problems{{Text: fmt.Sprintf("%s: %s: %v; %s", at, path, reason(err), readable(err))}}
	}
	if had != nil && had.list != nil && had.stamp.Same(stamp) {
		return &listFile{stamp: stamp, list: had.list}, nil
	}
	list, complaints := gate.ParseList(path, string(text))
	var problems Problems
	for _, x := range complaints {
		problems = append(problems, Problem{Text: fmt.Sprintf("%s:%d:%d: %s; %s", path, x.Line, x.Col, x.Msg, x.Hint)})
	}
	return &listFile{stamp: stamp, list: list}, problems
}
