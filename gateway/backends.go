// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// BackendInfo is how an address fares that backends of the map lead to.
type BackendInfo struct {
	Address  string      `json:"backend"` // "10.0.0.12:8080", "unix:/run/app.sock"
	Names    []string    `json:"names,omitempty"`
	State    string      `json:"state"` // one of StateWords
	Warming  bool        `json:"slow_start,omitempty"`
	Reason   string      `json:"reason,omitempty"`
	Since    time.Time   `json:"since"` // of this state
	Rules    int         `json:"rules"` // that have it
	Open     int64       `json:"connections_open"`
	Total    uint64      `json:"connections_total"`
	Failures uint64      `json:"connect_failures_total"`
	Checks   []CheckInfo `json:"checks,omitempty"`
}

// CheckInfo is a check of a backend and what came of it last.
type CheckInfo struct {
	Check   string    `json:"check"` // as the map has it: "http:/healthz"
	EveryMS int64     `json:"every_ms"`
	Up      bool      `json:"up"`
	Streak  int       `json:"streak,omitempty"` // checks in a row that say otherwise
	Error   string    `json:"error,omitempty"`
	TookMS  float64   `json:"took_ms"`
	At      time.Time `json:"at,omitzero"`
}

// Backends are the addresses that the map's backends lead to now, those that are not up first, then by address; at most
// limit of them, and how many there are in all. Ports of a range are there once somebody has connected to them.
func (g *Gateway) Backends(limit int) (infos []BackendInfo, total int) {
	p := g.roster()
	slices.SortFunc(p.servers, func(a, b *server) int { return cmp.Or(cmp.Compare(fitness(b), fitness(a)), byAddress(a, b)) })
	return p.infos(g.keeper, min(limit, len(p.servers))), len(p.servers)
}

// BackendSums are what backends have together that are too many to be told apart.
type BackendSums struct {
	Backends int
	Open     int64
	Total    uint64
	Failures uint64
}

// BackendsInOrder are the first backends by address, at most limit of them: always the same ones, whatever their states.
// The sums are those of the others.
func (g *Gateway) BackendsInOrder(limit int) (infos []BackendInfo, others BackendSums) {
	p := g.roster()
	slices.SortFunc(p.servers, byAddress)
	n := min(limit, len(p.servers))
	for _, s := range p.servers[n:] {
		others.Backends++
		others.Open += s.open.Load()
		others.Total += s.total.Load()
		others.Failures += s.broken.Load()
	}
	return p.infos(g.keeper, n), others
}

// roster is the servers of the current map, each once, with the number of rules that have it and what these call it.
type roster struct {
	servers []*server
	rules   map[*server]int
	names   map[*server][]string
}

func (g *Gateway) roster() *roster {
	p := &roster{rules: map[*server]int{}, names: map[*server][]string{}}
	for _, r := range g.current.Load().routes {
		r.eachServer(func(b *backend, s *server) {
			if p.rules[s]++; p.rules[s] == 1 {
				p.servers = append(p.servers, s)
			}
			if b.name != nil && !slices.Contains(p.names[s], b.name.host) {
				p.names[s] = append(p.names[s], b.name.host)
			}
		})
	}
	return p
}

func byAddress(a, b *server) int { return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(a.name, b.name)) }

// infos is about the first n servers.
func (p *roster) infos(k *keeper, n int) (infos []BackendInfo) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range p.servers[:n] {
		i := s.info()
		slices.Sort(p.names[s])
		i.Rules, i.Names = p.rules[s], p.names[s]
		infos = append(infos, i)
	}
	return infos
}

func fitness(s *server) uint32 { return min(s.state.Load()&blocked, 1) }

// info is about one server. The keeper's lock is held.
func (s *server) info() BackendInfo {
	state := s.state.Load()
	i := BackendInfo{Address: s.name, State: stateWord(state), Warming: state&blocked == 0 && state&isWarming != 0, Since: s.changed,
		Open: s.open.Load(), Total: s.total.Load(), Failures: s.broken.Load()}
	if state&blocked != 0 {
		i.Reason = s.reason()
	}
	for _, c := range s.checks {
		x := CheckInfo{Check: c.how.String(), EveryMS: c.every.Milliseconds(), Up: c.up, Streak: c.streak, TookMS: float64(c.took.Microseconds()) / 1000, At: c.at}
		if c.err != nil {
			x.Error = c.err.Error()
		}
		i.Checks = append(i.Checks, x)
	}
	return i
}

// BackendCounts are backends by their state, and how many connections wait for one with room.
type BackendCounts struct {
	States  map[string]int `json:"states"`
	Waiting int64          `json:"connections_waiting"`
}

// BackendCounts counts all addresses of the current map.
func (g *Gateway) BackendCounts() BackendCounts {
	c := BackendCounts{States: make(map[string]int, len(StateWords)), Waiting: g.waiting.Load()}
	for _, word := range StateWords {
		c.States[word] = 0
	}
	seen := map[*server]bool{}
	for _, r := range g.current.Load().routes {
		r.eachServer(func(_ *backend, s *server) {
			if !seen[s] {
				seen[s] = true
				c.States[s.word()]++
			}
		})
	}
	return c
}

// A BackendOrder is what an operator can say about a backend.
type BackendOrder string

const (
	DrainBackend    BackendOrder = "drain"    // no new connections; those that are open end by themselves
	MaintainBackend BackendOrder = "maintain" // the same, without checks; open ones are cut where rules say on-down=cut
	ReadyBackend    BackendOrder = "ready"    // as if nothing had been said, and as if it had never been ejected
)

// BackendOrders are all there are.
var BackendOrders = []BackendOrder{DrainBackend, MaintainBackend, ReadyBackend}

var orders = map[BackendOrder]uint32{DrainBackend: isDraining, MaintainBackend: isMaintained, ReadyBackend: 0}

// maxMarks bounds what is remembered of orders: they are typed.
const maxMarks = 10_000

// ErrOrders is that of OrderBackend when no further order can be remembered.
var ErrOrders = fmt.Errorf("%d backends are drained or in maintenance already: make some of them ready first", maxMarks)

// OrderBackend puts a backend into a state that stays until the next order, over reloads and whether its address comes
// and goes. word is its address as Backends has it, an IP address for all its ports, or a name for all it leads to. It
// returns the addresses that are meant now; that there is none is an error, and so is ErrOrders.
func (g *Gateway) OrderBackend(word string, order BackendOrder) ([]string, error) {
	mark, ok := orders[order]
	if !ok {
		return nil, fmt.Errorf("there is no order %q: write drain, maintain or ready", order)
	}
	k := g.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	gen, word := g.current.Load(), plainly(word)
	meant := k.meant(gen, word)
	if len(meant) == 0 && !gen.hasHost(word) {
		return nil, fmt.Errorf("no backend of the map is called %q: write an address as 'tlsnat show backends' has it", word)
	}
	if err := k.remember(word, meant, mark); err != nil {
		return nil, err
	}
	var names []string
	for _, s := range meant {
		names = append(names, s.name)
		mask := isDraining | isMaintained
		if order == ReadyBackend {
			mask |= isEjected
			s.probe.Stop()
		}
		k.change(s, mask, mark, asTold)
	}
	if len(names) == 0 {
		return []string{word}, nil
	}
	slices.Sort(names)
	return names, nil
}

// plainly is a word that is an address in the one way that we write it.
func plainly(word string) string {
	if a, err := netip.ParseAddr(strings.Trim(word, "[]")); err == nil {
		return a.Unmap().String()
	}
	if a, err := netip.ParseAddrPort(word); err == nil {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).String()
	}
	return word
}

// hasHost says whether the word is an address of which a rule has a range of ports: nobody may have used one yet.
func (gen *generation) hasHost(word string) bool {
	a, _ := netip.ParseAddr(word)
	for _, r := range gen.routes {
		for _, p := range r.places() {
			if p.ports != nil && p.ports.addr == a {
				return true
			}
		}
	}
	return false
}

// find makes sure that a server of a range is known, whether somebody has asked for its port yet or not.
func (r *route) find(at netip.AddrPort) {
	listen := r.rule.Listen
	for b, p := range r.places() {
		if p.ports == nil || p.ports.addr != at.Addr() {
			continue
		}
		if i := int(at.Port()) - int(b.spec.Port(listen.Lo, listen.Lo)); i >= 0 && i < listen.Len() {
			p.ports.at(r, b, listen.Lo+uint16(i))
		}
	}
}

// meant are the servers of the map that an operator calls by a word.
func (k *keeper) meant(gen *generation, word string) (meant []*server) {
	seen := map[*server]bool{}
	at, _ := netip.ParseAddrPort(word)
	host, _ := netip.ParseAddr(word) // for all its ports
	for _, r := range gen.routes {
		r.find(at)
		r.eachServer(func(b *backend, s *server) {
			named := b.name != nil && (b.name.host == word || b.name.host+":"+strconv.Itoa(int(s.addr.Port())) == word)
			if !seen[s] && (named || s.isCalled(word) || host.IsValid() && s.addr.Addr() == host) {
				seen[s] = true
				meant = append(meant, s)
			}
		})
	}
	return meant
}

// remember keeps an order for servers that are made later: those that are meant now, and a host's other ports. What a
// name leads to next is another machine.
func (k *keeper) remember(word string, meant []*server, mark uint32) error {
	k.known.Lock()
	defer k.known.Unlock()
	if mark != 0 && len(k.marks)+len(meant) >= maxMarks {
		return ErrOrders
	}
	delete(k.marks, word)
	if _, err := netip.ParseAddr(word); err == nil && mark != 0 {
		k.marks[word] = mark
	}
	for _, s := range meant {
		delete(k.marks, s.name)
		if k.marked(s) != mark {
			k.marks[s.name] = mark
		}
	}
	return nil
}
