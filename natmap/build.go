// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// An island is a run of ports of one address whose rules' ranges overlap.
type island struct {
	Listen
	rules []*Rule // by first port, wider ranges first, then in the order of the text
	table *table
}

// build checks the rules against each other and makes the map. It works through
// sorted ranges, never through pairs of rules.
func (p *parser) build() *Map {
	m := &Map{Rules: p.rules, views: map[netip.Addr][]segment{}}
	k := newKeys()
	all := islands(p.rules)
	blamed := map[Pos]bool{}
	total, widest := 0, 0
	for i := range all {
		is := &all[i]
		is.table = newTable(&k, is, func(a, b *Rule) { p.clash(a, b, blamed) })
		p.checkPlain(is.rules, blamed)
		p.checkCrossing(is.rules, blamed)
		p.checkPreludes(is.rules, blamed)
		m.listens = append(m.listens, is.Listen)
		total += is.Len()
		if is.Len() > all[widest].Len() {
			widest = i
		}
	}
	if total > MaxPorts {
		r := all[widest].rules[0]
		p.complain(r.Pos, "", fmt.Sprintf("the map listens on %d ports, of %d at most; this range has %d", total, MaxPorts, r.Listen.Len()), "listen on fewer")
	}
	if len(p.errs) > 0 {
		return nil
	}
	for len(all) > 0 {
		n := slices.IndexFunc(all, func(is island) bool { return is.Addr != all[0].Addr })
		if n < 0 {
			n = len(all)
		}
		m.views[all[0].Addr] = segments(k, all[:n], m.views[netip.Addr{}])
		all = all[n:]
	}
	return m
}

// islands sorts rules by address, every address first, and port.
func islands(rules []*Rule) []island {
	rules = slices.Clone(rules)
	slices.SortFunc(rules, func(a, b *Rule) int {
		return cmp.Or(a.Listen.Addr.Compare(b.Listen.Addr), cmp.Compare(a.Listen.Lo, b.Listen.Lo), cmp.Compare(b.Listen.Hi, a.Listen.Hi), cmp.Compare(a.order, b.order))
	})
	var all []island
	first := 0
	for i, r := range rules {
		if n := len(all) - 1; n >= 0 && all[n].Addr == r.Listen.Addr && r.Listen.Lo <= all[n].Hi {
			all[n].Hi = max(all[n].Hi, r.Listen.Hi)
		} else {
			first = i
			all = append(all, island{Listen: r.Listen})
		}
		all[len(all)-1].rules = rules[first : i+1]
	}
	return all
}

// segments cuts the islands of one address where the set of rules changes: at the
// ends of their ranges, and where the rules of every address change.
func segments(k keys, all []island, every []segment) []segment {
	var segs []segment
	for _, is := range all {
		cuts := []int{int(is.Lo), int(is.Hi) + 1}
		for _, r := range is.rules {
			cuts = append(cuts, int(r.Listen.Lo), int(r.Listen.Hi)+1)
		}
		for len(every) > 0 && every[0].hi < is.Lo {
			every = every[1:]
		}
		for _, s := range every {
			if s.lo > is.Hi {
				break
			}
			cuts = append(cuts, max(int(s.lo), int(is.Lo)), min(int(s.hi), int(is.Hi))+1)
		}
		slices.Sort(cuts)
		cuts = slices.Compact(cuts)
		for i, lo := range cuts[:len(cuts)-1] {
			var shared *table
			if p := at(every, uint16(lo)); p != nil {
				shared = p.tables[0]
			}
			segs = append(segs, segment{uint16(lo), uint16(cuts[i+1] - 1), newPort(k, uint16(lo), is.table, shared)})
		}
	}
	return segs
}

// blame complains about the later of two rules and names the place of the earlier,
// once for a pair of lines.
func (p *parser) blame(a, b *Rule, blamed map[Pos]bool, say func(old, dup *Rule) (msg, hint string)) {
	if p.full { // words that nobody will read cost most of the time
		return
	}
	if a.order > b.order {
		a, b = b, a
	}
	blamed[lineOf(b)] = true
	msg, hint := say(a, b)
	text := b.Name
	if text == "" && b.Protocol != "" {
		text = protocolMark + b.Protocol
	}
	p.complain(b.Pos, cmp.Or(text, b.Listen.String()), msg, hint)
}

func lineOf(r *Rule) Pos { return Pos{r.Pos.File, r.Pos.Line, 0} }

// claim is a listener and a name as the user thinks of them.
func claim(r *Rule) string {
	s := r.Listen.String()
	if r.Protocol != "" {
		s += " " + protocolMark + r.Protocol
	}
	if r.Name != "" {
		s += " " + r.Name
	}
	return s
}

func (p *parser) clash(a, b *Rule, blamed map[Pos]bool) {
	p.blame(a, b, blamed, func(old, dup *Rule) (string, string) {
		hint := "write all backends into one rule, or remove one of the two"
		if old.Listen == dup.Listen {
			return quote(claim(dup)) + " is already served by the rule at " + old.Pos.String(), hint
		}
		return fmt.Sprintf("%s claims %s of %s, the rule at %s", quote(claim(dup)), overlap(old, dup), quote(claim(old)), old.Pos), "give each port and name to one rule"
	})
}

func overlap(a, b *Rule) string {
	lo, hi := max(a.Listen.Lo, b.Listen.Lo), min(a.Listen.Hi, b.Listen.Hi)
	if lo == hi {
		return "port " + ports(lo, hi)
	}
	return "ports " + ports(lo, hi)
}

// checkPlain complains about a rule that reads no ClientHello and shares a port with
// rules that do. Two rules without names already clash, and redirects share ports
// with each other.
func (p *parser) checkPlain(rules []*Rule, blamed map[Pos]bool) {
	var plain []*Rule
	for _, r := range rules {
		if r.Plain() && (len(plain) == 0 || plain[len(plain)-1].Listen.Hi < r.Listen.Lo) {
			plain = append(plain, r)
		}
	}
	if len(plain) == 0 {
		return
	}
	first := make([]*Rule, len(plain)) // in the text, of the rules in its way
	count := make([]int, len(plain))
	for _, r := range rules {
		i, _ := slices.BinarySearchFunc(plain, r.Listen.Lo, func(a *Rule, lo uint16) int { return int(a.Listen.Hi) - int(lo) })
		if i == len(plain) || plain[i].Listen.Lo > r.Listen.Hi || !apart(plain[i], r) {
			continue
		}
		if count[i]++; count[i] == 1 || r.order < first[i].order {
			first[i] = r
		}
	}
	for i, r := range plain {
		if count[i] > 0 {
			p.blame(r, first[i], blamed, func(old, dup *Rule) (string, string) { return notAlone(r, old, dup, count[i]) })
		}
	}
}

// apart reports whether a rule has to be on another port than plain, one that reads no
// ClientHello.
func apart(plain, r *Rule) bool {
	clash := plain.Name == "" && r.Name == "" && r.Protocol == ""
	return !clash && !(plain.Action == Redirect && r.Action == Redirect)
}

func notAlone(plain, old, dup *Rule, n int) (msg, hint string) {
	what, hint := "mode=tcp", "listen on another port, or write mode=pass there"
	more := ""
	if n > 1 {
		more = " and " + plural(n-1, "other rule")
	}
	if plain.Action == Redirect {
		if plain == dup {
			return fmt.Sprintf("redirect answers plain HTTP, but %s is shared with the rule at %s%s, which does not", overlap(old, dup), old.Pos, more),
				"give it a port of its own"
		}
		return fmt.Sprintf("%s is on %s, where the rule at %s answers plain HTTP (redirect)", quote(claim(dup)), overlap(old, dup), old.Pos), "listen on another port"
	}
	if plain == dup {
		return fmt.Sprintf("%s reads no name, but %s is shared with the rule at %s%s, which needs one", what, overlap(old, dup), old.Pos, more),
			"give it a port of its own"
	}
	return fmt.Sprintf("%s needs a name on %s, where the rule at %s (%s) reads none", quote(claim(dup)), overlap(old, dup), old.Pos, what), hint
}

// checkCrossing complains about ranges that overlap while neither holds the other:
// one of their ends is a slip.
func (p *parser) checkCrossing(rules []*Rule, blamed map[Pos]bool) {
	var open []*Rule // ranges that hold the port we are at, each within the one before
	var crossed Listen
	for _, r := range rules {
		if r.Listen == crossed {
			continue
		}
		for len(open) > 0 && open[len(open)-1].Listen.Hi < r.Listen.Lo {
			open = open[:len(open)-1]
		}
		if len(open) > 0 {
			top := open[len(open)-1]
			if top.Listen == r.Listen {
				continue
			}
			if r.Listen.Hi > top.Listen.Hi {
				crossed = r.Listen
				p.crossing(top, r, blamed)
			}
		}
		open = append(open, r)
	}
}

func (p *parser) crossing(a, b *Rule, blamed map[Pos]bool) {
	later := b
	if a.order > b.order {
		later = a
	}
	if blamed[lineOf(later)] { // the same slip, already told
		return
	}
	p.blame(a, b, blamed, func(old, dup *Rule) (string, string) {
		return fmt.Sprintf("range %s crosses %s, the rule at %s", dup.Listen, old.Listen, old.Pos),
			"let one range hold the other, or keep them apart"
	})
}

// warn collects what is legal but surely not meant.
func (p *parser) warn(m *Map) {
	note := func(at Pos, msg, hint string) {
		m.warnings = append(m.warnings, &Error{File: at.File, Line: at.Line, Col: at.Col, Msg: msg, Hint: hint})
	}
	for _, d := range p.lines {
		if !d.used {
			note(d.pos, "default reaches no rule", "write it above the rules it is for, in the same file")
		}
	}
	var before *Rule
	for _, r := range p.rules {
		if before != nil && lineOf(before) == lineOf(r) && len(r.Backends) > 0 && len(before.Backends) > 0 && &before.Backends[0] == &r.Backends[0] {
			continue // another name of the same line
		}
		before = r
		warnRule(r, note)
	}
}

func warnRule(r *Rule, note func(at Pos, msg, hint string)) {
	warnPool(r, note)
	seen := map[string]bool{}
	backups := 0
	for _, b := range r.Backends {
		if t := b.target(); seen[t] {
			note(r.Pos, "backend "+quote(t)+" stands twice in the rule", "write it once, with /weight=N for a larger share")
		} else {
			seen[t] = true
		}
		if b.Backup {
			backups++
		}
		if loops(r.Listen, b) {
			note(r.Pos, "backend "+quote(b.target())+" is the listener itself: connections would go in circles", "write another port or address")
		}
	}
	if backups > 0 && backups == len(r.Backends) {
		note(r.Pos, "every backend of the rule is a backup", "remove /backup from the one that is used first")
	}
}

// loops reports whether b is l itself, for at least one port.
func loops(l Listen, b Backend) bool {
	here := b.Addr.IsLoopback() || b.Host == "localhost"
	if l.Addr.IsValid() {
		here = b.Addr == l.Addr
	}
	if !here {
		return false
	}
	fixed := !b.Relative && b.Lo == b.Hi
	return fixed && l.Contains(b.Lo) || !fixed && b.Port(l.Lo, l.Lo) == l.Lo
}
