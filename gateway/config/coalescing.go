// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/natmap"
)

// maxCoalescing bounds the rules of one certificate that are compared with all others of it.
const maxCoalescing = 16

// checkCoalescing warns of names that browsers take for one server. Over HTTP/2 a request may go to any open connection
// whose certificate is for its name (RFC 9113, section 9.1.1). So if two names of a certificate lead to two backends,
// requests for the second name come to the backend of the first. One pair of each certificate is named.
func (c *Config) checkCoalescing() (problems Problems) {
	if !slices.ContainsFunc(c.Map.Rules, speaksHTTP2) {
		return nil
	}
	now := time.Now()
	m := &mixing{covered: c.byCoveredName(), leads: map[*natmap.Rule]string{}}
	done := map[*certs.Certificate]int{}
	for _, a := range c.Map.Rules {
		entry := c.shownBy(a)
		if entry == nil || !speaksHTTP2(a) {
			continue
		}
		for _, cert := range entry.Served(now) {
			if done[cert]++; done[cert] > maxCoalescing {
				continue
			}
			if b := m.elsewhere(a, cert); b != nil {
				done[cert] = maxCoalescing
				problems = append(problems, Problem{true, fmt.Sprintf("%s: alpn=h2: %s is for %s and for %s (%s), which leads to other backends: "+
					"browsers send requests for the one on connections of the other; give each name a certificate of its own, or write alpn=http/1.1",
					a.Pos, cert.CertFile, a.Name, b.Name, b.Pos)})
			}
		}
	}
	return problems
}

func speaksHTTP2(r *natmap.Rule) bool { return Terminates(r) && slices.Contains(r.Options.ALPN, "h2") }

// shownBy is what clients of a rule with a name are shown.
func (c *Config) shownBy(r *natmap.Rule) *certs.Entry {
	if r.Name == "" {
		return nil // the names that lead there are the clients' to choose
	}
	return c.Certs.ForName(anyName(r.Name))
}

// anyName is a name that a rule's name stands for.
func anyName(name string) string {
	if suffix, ok := strings.CutPrefix(name, "*."); ok {
		return "any-name." + suffix
	}
	return name
}

// byCoveredName are the rules by the names of certificates that cover theirs: the name itself, and its wildcard.
func (c *Config) byCoveredName() map[string][]*natmap.Rule {
	covered := map[string][]*natmap.Rule{}
	for _, r := range c.Map.Rules {
		if r.Name == "" {
			continue
		}
		covered[r.Name] = append(covered[r.Name], r)
		if _, parent, ok := strings.Cut(r.Name, "."); ok && r.Name[0] != '*' {
			covered["*."+parent] = append(covered["*."+parent], r)
		}
	}
	return covered
}

// mixing finds rules whose requests browsers may mix up.
type mixing struct {
	covered map[string][]*natmap.Rule
	leads   map[*natmap.Rule]string // to these backends, of the rules that were looked at
}

// elsewhere is a rule on the ports of a whose name the certificate is for, and that leads to other backends.
func (m *mixing) elsewhere(a *natmap.Rule, cert *certs.Certificate) *natmap.Rule {
	for _, name := range cert.Names {
		rules, decides := m.covered[name], ""
		if _, parent, ok := strings.Cut(name, "."); ok && len(rules) == 0 {
			decides = "*." + parent // no rule of its own: one for the wildcard decides, if there is one
			rules = m.covered[decides]
		}
		for _, b := range rules {
			if (decides == "" || b.Name == decides) && b.Name != a.Name && overlap(a.Listen, b.Listen) && b.Action != natmap.Redirect && m.destination(a) != m.destination(b) {
				return b
			}
		}
	}
	return nil
}

// overlap says whether two rules share a port. Every address is one of the other's.
func overlap(a, b natmap.Listen) bool {
	return a.Lo <= b.Hi && b.Lo <= a.Hi && (a.Addr == b.Addr || !a.Addr.IsValid() || !b.Addr.IsValid())
}

// destination is where a rule leads.
func (m *mixing) destination(r *natmap.Rule) string {
	if to, known := m.leads[r]; known {
		return to
	}
	var all []string
	for _, b := range r.Backends {
		all = append(all, b.String())
	}
	slices.Sort(all)
	m.leads[r] = r.Action.String() + " " + strings.Join(all, " ")
	return m.leads[r]
}
