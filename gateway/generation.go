// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/natmap"
)

// generation is a configuration in the form the loops use. It never changes; a connection keeps the one it was
// accepted under for its whole life, so another one can take its place at any time.
type generation struct {
	number   uint64
	made     time.Time
	config   *config.Config
	routes   map[*natmap.Rule]*route
	byKey    map[ruleKey]*route
	profiles map[string]*profile
	names    map[*name][]*route // of backends, that have to be looked up
	cuts     bool               // a rule says on-down=cut, or one of an earlier generation did
	drains   bool               // a rule of an earlier generation says drain=
	gates    gates
	open     atomic.Int64 // connections that run under it
	left     atomic.Bool  // no listener serves it any more: open does not grow again

	added, removed []string // rules, compared with the generation before

	certMu   sync.Mutex // over what follows, which only the admin asks for
	certList []*certs.Certificate
	certsAt  int64 // unix time at which certList is what is served
}

// portRules is what a listener serves: the port's part of the map, and the routes behind its rules.
type portRules struct {
	rules  *natmap.Port
	plain  *route    // of a port whose bytes are not looked at
	gate   *entrance // nil: nothing is looked at before the hello
	routes map[*natmap.Rule]*route
	tlvs   *natmap.TLVTypes // of a PROXY header, that its rules ask for; nil: none

	first   stage             // of its connections, behind a PROXY header
	eager   bool              // they go on without a byte of the client's
	early   bool              // data that comes with their SYN is taken
	prelude starttls.Protocol // what they speak before TLS
	host    string            // what we call ourselves in it
}

// lookup is the route of those who have no hello to offer a protocol in.
func (p *portRules) lookup(name string) *route { return p.match(name, nil) }

func (p *portRules) match(name string, offered []string) *route {
	rule := p.rules.Match(name, offered)
	if rule == nil {
		return nil
	}
	return p.routes[rule]
}

// newGeneration makes a generation of a configuration. From the last one, nil at the start, it takes over what doesn't
// depend on it: handshakers of the same options, the rules' counters.
func (g *Gateway) newGeneration(c *config.Config, last *generation) *generation {
	if last == nil {
		last = &generation{}
	}
	gen := &generation{number: last.number + 1, made: time.Now(), config: c, routes: make(map[*natmap.Rule]*route, len(c.Map.Rules)),
		byKey: make(map[ruleKey]*route, len(c.Map.Rules)), profiles: map[string]*profile{}, names: map[*name][]*route{}, cuts: last.cuts}
	gen.drains = last.drains || last.config != nil && slices.ContainsFunc(last.config.Map.Rules, func(r *natmap.Rule) bool { return r.Options.Drain > 0 })
	for i, rule := range c.Map.Rules {
		r := &route{use: new(usage), rule: rule, index: i, label: fmt.Sprintf("%s:%d", rule.Pos.File, rule.Pos.Line), proxy: rule.Options.Proxy}
		r.idle = fallback(rule.Options.Idle, g.settings.IdleTimeout)
		r.connect = fallback(rule.Options.Connect, g.settings.ConnectTimeout)
		r.linger = fallback(rule.Options.Linger, g.settings.LingerTimeout)
		r.lifetime = fallback(rule.Options.Lifetime, 0)
		r.truncation = rule.Options.Truncation
		r.profile = g.profileFor(gen, last, rule)
		if g.kernel != nil && g.settings.KTLS != "off" && rule.Options.KTLS != natmap.KTLSOff {
			r.kernel = g.kernel
			r.kernelRX = g.kernel.Mended || g.settings.KTLS == "rx" || rule.Options.KTLS == natmap.KTLSRX
		}
		if config.Encrypts(rule) {
			r.encryption = g.newEncryption(c, rule)
		}
		r.fillPool(&rule.Options.Pool)
		gen.cuts = gen.cuts || r.onDown == natmap.Cut
		g.addBackends(gen, r)
		gen.routes[rule], gen.byKey[keyOf(rule)] = r, r
		if before := last.byKey[keyOf(rule)]; before != nil {
			r.use = before.use
		}
	}
	gen.gates = g.house.raise(gen)
	return gen
}

// forever is a timeout that is off: longer than anything runs, short enough that adding it to a time does not
// overflow.
const forever = 100 * 365 * 24 * time.Hour

func fallback(d, setting time.Duration) time.Duration {
	switch d {
	case 0:
		return setting
	case natmap.Off:
		return forever
	}
	return d
}

// profileFor is the profile of the rule's TLS options, shared with the other rules that have the same.
func (g *Gateway) profileFor(gen, last *generation, rule *natmap.Rule) *profile {
	minTLS := cmp.Or(rule.Options.MinTLS, g.settings.OldestTLS())
	alpn := rule.Options.Protocols()
	key := fmt.Sprint(minTLS, alpn)
	if gen.profiles[key] == nil {
		gen.profiles[key] = cmp.Or(last.profiles[key], newProfile(g, minTLS, alpn))
	}
	return gen.profiles[key]
}

// port is what a listener on the address and port serves.
func (gen *generation) port(addr netip.Addr, port uint16) *portRules {
	p := gen.config.Map.Port(addr, port)
	rules := &portRules{rules: p, routes: gen.routes}
	if p != nil && p.Plain != nil {
		rules.plain = gen.routes[p.Plain]
	}
	rules.gate = gen.gates.at(endpoint{addr, port}, rules.plain)
	rules.tlvs = gen.gates.tlvs(endpoint{addr, port})
	rules.early = gen.gates.early(endpoint{addr, port})
	rules.begins(gen)
	return rules
}

// endpoint is a pair of address and port to listen on; an invalid address is every address.
type endpoint struct {
	addr netip.Addr
	port uint16
}

// ticketKeeper holds the session ticket keys in the form crypto/tls wants: one config, made again when the keys
// change, shared by all handshakes so that a ticket from one loop is good on another.
type ticketKeeper struct {
	keys    *certs.Tickets
	current atomic.Pointer[ticketConfig]
}

type ticketConfig struct {
	config *tls.Config
	epoch  uint64
}

func (k *ticketKeeper) config() *tls.Config {
	now := time.Now()
	epoch := k.keys.Generation(now)
	if c := k.current.Load(); c != nil && c.epoch == epoch {
		return c.config
	}
	c := &ticketConfig{&tls.Config{}, epoch}
	c.config.SetSessionTicketKeys(k.keys.Keys(now))
	k.current.Store(c)
	return c.config
}
