// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// choice is what an entry serves from one second to another, in unix time. Within them no certificate of the entry
// begins or ends, so a handshake compares two numbers only.
type choice struct {
	from, until int64
	certs       []*Certificate
}

// fixed says whether the entry serves the same certificate at all times.
func (e *Entry) fixed() bool { return len(e.all) == 1 && e.under == nil }

// Served are the certificates for clients that come at that time: the best one for each type of key, ECDSA before
// Ed25519 before RSA. Those that are valid come before those that are not. If no certificate for a name is valid and
// there is a wildcard with one that is, the wildcard's are served. There is at least one, and the slice is for reading.
func (e *Entry) Served(now time.Time) []*Certificate {
	if e.fixed() {
		return e.all
	}
	at := now.Unix()
	c := e.choice.Load()
	if c == nil || at < c.from || at >= c.until { // the clock may be set back
		c = e.choose(at)
		e.choice.Store(c)
	}
	return c.certs
}

// Next says when other certificates than those of now will be served, and which; the zero time if never.
func (e *Entry) Next(now time.Time) (time.Time, []*Certificate) {
	served := e.Served(now)
	for c := e.choose(now.Unix()); c.until != math.MaxInt64; {
		if c = e.choose(c.until); !subset(c.certs, served) {
			return time.Unix(c.from, 0), c.certs
		}
	}
	return time.Time{}, nil
}

func (e *Entry) choose(at int64) *choice {
	c := &choice{from: math.MinInt64, until: math.MaxInt64}
	e.narrow(c, at)
	best := bestOf(e.all, at)
	if e.under != nil && !best.anyValid(at) {
		if wild := bestOf(e.under.all, at); wild.anyValid(at) {
			best = wild
		}
	}
	for _, cert := range best {
		if cert != nil {
			c.certs = append(c.certs, cert)
		}
	}
	slices.SortStableFunc(c.certs, func(a, b *Certificate) int {
		return cmp.Compare(invalid(a, at), invalid(b, at))
	})
	return c
}

func invalid(c *Certificate, at int64) int {
	if c.validAt(at) {
		return 0
	}
	return 1
}

// narrow limits a choice to the time around at in which no certificate begins or ends.
func (e *Entry) narrow(c *choice, at int64) {
	for ; e != nil; e = e.under {
		for _, cert := range e.all {
			for _, edge := range [...]int64{cert.NotBefore.Unix(), cert.NotAfter.Unix()} {
				if edge <= at {
					c.from = max(c.from, edge)
				} else {
					c.until = min(c.until, edge)
				}
			}
		}
	}
}

// perKind is at most one certificate of each kind.
type perKind [kinds]*Certificate

// bestOf takes of each kind the certificate that is valid, and of several the one that was issued last.
func bestOf(certs []*Certificate, at int64) (best perKind) {
	for _, c := range certs {
		if other := best[c.kind]; other == nil || c.beats(other, at) {
			best[c.kind] = c
		}
	}
	return best
}

func (p *perKind) anyValid(at int64) bool {
	return slices.ContainsFunc(p[:], func(c *Certificate) bool { return c != nil && c.validAt(at) })
}

func (c *Certificate) beats(other *Certificate, at int64) bool {
	if valid := c.validAt(at); valid != other.validAt(at) {
		return valid
	}
	if c.Kept != other.Kept { // what is read now goes before what was read once
		return other.Kept
	}
	return c.issuedAfter(other)
}

func (c *Certificate) issuedAfter(other *Certificate) bool {
	return cmp.Or(c.NotBefore.Compare(other.NotBefore), c.NotAfter.Compare(other.NotAfter)) > 0
}

// validAt leaves the last second to the next certificate: RFC 5280, 4.1.2.5 counts it, but a client that comes in it
// may look at its clock after it.
func (c *Certificate) validAt(at int64) bool {
	return c.NotBefore.Unix() <= at && at < c.NotAfter.Unix()
}
