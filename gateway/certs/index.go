// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"cmp"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// soon is when a certificate that is about to expire is worth a warning: certbot renews 30 days before, so at 21
// something has failed three weeks long. Of a certificate that lives less than 63 days it is the last third.
const soon = 21 * 24 * time.Hour

// index makes the Store of certificates; nil if none serves anything.
func index(certs []*Certificate, now time.Time, r *report) *Store {
	b := &builder{now: now, report: r, number: numbered(certs), entries: make(map[string]*Entry), lost: make(map[[2]*Certificate]bool), odd: make(map[*Certificate]bool)}
	s := &Store{certs: certs, exact: make(map[string]*Entry), wildcard: make(map[string]*Entry), addrs: make(map[netip.Addr]*Entry)}
	names, addrs := make(map[string][]*Certificate), make(map[netip.Addr][]*Certificate)
	for _, c := range certs {
		for _, name := range c.Names {
			names[name] = append(names[name], c)
		}
		for _, addr := range c.Addrs {
			addrs[addr] = append(addrs[addr], c)
		}
	}
	for _, name := range sortedKeys(names, strings.Compare) { // wildcards first: '*' sorts before letters and digits
		e := b.entry(name, names[name], s.above(name))
		e.Names = append(e.Names, name)
		if below, ok := strings.CutPrefix(name, "*"); ok {
			s.wildcard[below] = e
		} else {
			s.exact[name] = e
		}
	}
	for _, addr := range sortedKeys(addrs, netip.Addr.Compare) {
		e := b.entry(addr.String(), addrs[addr], nil)
		e.Addrs = append(e.Addrs, addr)
		s.addrs[addr] = e
	}
	if s.entries = b.order; len(s.entries) == 0 {
		return nil
	}
	b.warnTimes()
	return s
}

// above is the entry of the wildcard that holds an exact name, or nil.
func (s *Store) above(name string) *Entry {
	dot := strings.IndexByte(name, '.')
	if dot <= 0 || name[0] == '*' {
		return nil
	}
	return s.wildcard[name[dot:]]
}

// numbered gives each certificate a number, to tell sets of them apart by.
func numbered(certs []*Certificate) map[*Certificate]int {
	numbers := make(map[*Certificate]int, len(certs))
	for i, c := range certs {
		numbers[c] = i
	}
	return numbers
}

// builder makes one Entry for all names that have the same certificates.
type builder struct {
	entries map[string]*Entry
	number  map[*Certificate]int
	order   []*Entry
	lost    map[[2]*Certificate]bool // winner and loser that have been named
	odd     map[*Certificate]bool    // have been looked at for browsers
	now     time.Time
	*report
}

func (b *builder) entry(name string, certs []*Certificate, under *Entry) *Entry {
	if under != nil && subset(under.all, certs) {
		under = nil
	}
	var key []byte
	for _, c := range certs {
		key = binary.AppendUvarint(key, uint64(b.number[c])) // certs are in the order of their numbers
	}
	if under != nil {
		key = append(append(key, 0, 0), under.Names[0]...)
	}
	e := b.entries[string(key)]
	if e == nil {
		e = &Entry{all: certs, under: under}
		b.entries[string(key)] = e
		b.order = append(b.order, e)
	}
	best := bestOf(certs, b.now.Unix())
	for _, c := range certs {
		b.warnLost(name, best[c.kind], c)
	}
	return e
}

func subset(some, all []*Certificate) bool {
	return !slices.ContainsFunc(some, func(c *Certificate) bool { return !slices.Contains(all, c) })
}

// warnLost says once for two certificates, not for each name, that one is served in the other's place. A certificate
// that lies ready for later is not lost.
func (b *builder) warnLost(name string, winner, loser *Certificate) {
	pair := [2]*Certificate{winner, loser}
	if winner == loser || b.lost[pair] || loser.Kept || b.now.Before(loser.NotBefore) {
		return
	}
	b.lost[pair] = true
	why := "newer"
	if !winner.issuedAfter(loser) { // then the loser has expired
		why = "valid"
	}
	b.warn(loser.at(), "remove the one that is not wanted", "not served for %s: %s has a %s certificate (%s, from %s)",
		name, winner.at(), why, winner.KeyType, day(winner.NotBefore))
}

func (c *Certificate) at() place { return place{c.CertFile, c.line} }

// warnTimes is about certificates that are served; an old one that lost its names to a new one expires in peace.
func (b *builder) warnTimes() {
	seen := make(map[*Certificate]bool)
	for _, e := range b.order {
		best := bestOf(e.all, b.now.Unix())
		for _, c := range best {
			if c != nil && !seen[c] {
				seen[c] = true
				b.warnTime(c, bestOf(e.all, c.NotAfter.Unix())[c.kind])
			}
		}
		if served := e.Served(b.now); len(served) == 1 && !b.odd[served[0]] {
			b.odd[served[0]] = true
			b.warnBrowsers(served[0])
		}
	}
}

// warnTime is about a certificate and the one that is served when it has expired: the same one if no other is ready.
func (b *builder) warnTime(c, next *Certificate) {
	if next != c && next.validAt(c.NotAfter.Unix()) && !b.now.After(c.NotAfter) {
		return
	}
	name := title(c.pair.Leaf)
	early := min(soon, c.NotAfter.Sub(c.NotBefore)/3)
	switch left := c.NotAfter.Sub(b.now); {
	case b.now.Before(c.NotBefore):
		b.warn(c.at(), "check the clock of this machine", "the certificate for %s is not valid before %s", name, day(c.NotBefore))
	case left < 0:
		b.warn(c.at(), "renew it: clients refuse it", "the certificate for %s expired %s", name, day(c.NotAfter))
	case left < early:
		b.warn(c.at(), "renew it", "the certificate for %s expires %s, %s", name, in(left), day(c.NotAfter))
	}
}

func in(left time.Duration) string {
	if left < 48*time.Hour {
		return fmt.Sprintf("in %d hours", left/time.Hour)
	}
	return fmt.Sprintf("in %d days", left/(24*time.Hour))
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

// title is how messages call a certificate: by its first name, quoted unless it is a plain host name.
func title(c *x509.Certificate) string {
	name := commonName(c.Subject)
	switch {
	case len(c.DNSNames) > 0:
		name = strings.ToLower(c.DNSNames[0])
	case len(c.IPAddresses) > 0:
		return c.IPAddresses[0].String()
	}
	if servable(name) {
		return name
	}
	return fmt.Sprintf("%.80q", name)
}

func commonName(n pkix.Name) string { return cmp.Or(n.CommonName, n.String()) }

func sortedKeys[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compare)
	return keys
}
