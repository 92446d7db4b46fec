// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"net/netip"
	"strings"

	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/natmap"
)

// Whoever owns a backend's zone, or can forge an answer, must not be able to have clients connected to what listens on
// this machine only, such as the admin. Addresses that mean this machine or its link are connected to only where the map
// says so: as addresses, by resolve-to=any, by a name that this machine's hosts file has, or by one that nobody else
// can own.

// thisMachine says whether an address means something only on this machine or its link.
func thisMachine(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() || neverUnicast(a)
}

// neverUnicast are the rest of 0.0.0.0/8 (RFC 1122, section 3.2.1.3: Linux takes it for this network), 240.0.0.0/4 with the
// broadcast address (RFC 1112, section 4), and IPv4 addresses in ::/96 (RFC 4291, section 2.5.5.1), which are obsolete.
func neverUnicast(a netip.Addr) bool {
	b := a.As16()
	if a.Is4() {
		return b[12] == 0 || b[12] >= 240
	}
	return [12]byte(b[:12]) == [12]byte{}
}

// ownName says whether no zone of others can have this name: those below localhost and test are the machine's or the
// operator's own (RFC 6761, sections 6.2 and 6.3).
func ownName(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	tld := host[strings.LastIndexByte(host, '.')+1:]
	return tld == "localhost" || tld == "test"
}

// allowed are the addresses that the rule lets the backend's name lead to, and those that it does not. Where an SRV record
// names a machine it is DNS that has chosen the name: then hosts does not count.
func (b *backend) allowed(r *route, l *lead) (allowed, refused []netip.Addr) {
	if r.rule.Options.Pool.ResolveTo == natmap.ResolveToAny || l.own && !b.spec.SRV {
		return l.addrs, nil
	}
	loopback := ownName(b.spec.Host)
	for _, a := range l.addrs {
		if thisMachine(a) && !(loopback && a.Unmap().IsLoopback()) {
			refused = append(refused, a)
		} else {
			allowed = append(allowed, a)
		}
	}
	return allowed, refused
}

// tellRefused says in the log which addresses are refused, once for each.
func (b *backend) tellRefused(r *route, refused []netip.Addr) {
	if len(refused) == 0 {
		b.refused.Store(nil)
		return
	}
	const enough = 4
	text := strings.Trim(fmt.Sprint(refused[:min(len(refused), enough)]), "[]")
	if before := b.refused.Swap(&text); before != nil && *before == text {
		return
	}
	r.keeper.gw.log.Warn("DNS gives addresses of this machine or its link for a backend: they are not connected to; if they are meant, write resolve-to=any",
		zap.String("name", b.spec.Host), zap.String("addresses", text), zap.String("rule", r.label))
}

// refusals are the words about addresses that are refused.
func (r *route) refusals() string {
	for _, b := range r.backends {
		if text := b.refused.Load(); text != nil {
			return "; DNS gives " + *text + " for " + b.spec.Host + ", which resolve-to=network refuses"
		}
	}
	return ""
}
