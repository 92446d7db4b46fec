// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"

	"github.com/tlsnat/tlsnat/natmap"
)

// choices are the candidates of a route, in the order of the map. They are made anew when a name leads elsewhere, and
// never change.
type choices struct {
	primary []spot
	backup  []spot
	turns   []uint16 // primary spots, each as often as its weight says, evenly mixed
}

// spot is one candidate: a backend of the map, at one of the machines that its name leads to.
type spot struct {
	backend *backend
	weight  float64
	places  [2]place // where it is reached: of a machine with IPv4 and IPv6 both, the preferred one first
	n       int      // of them
}

// place is an address of a spot: a server, or, where the backend's port goes along with the listening one, many.
type place struct {
	server *server
	ports  *ports
}

// ports are the servers of an address by listening port, each found when it is asked for first.
type ports struct {
	addr    netip.Addr
	servers []atomic.Pointer[server]
}

// at is the server for a connection; nil is the demo, which is no server.
func (p *place) at(c *conn, b *backend) *server {
	if p.ports == nil {
		return p.server
	}
	return p.ports.at(c.route, b, c.report.door())
}

// ports are those of an address from port first on, n of them. Servers that are known already have their places.
func (k *keeper) ports(addr netip.Addr, first uint16, n int) *ports {
	p := &ports{addr, make([]atomic.Pointer[server], n)}
	k.known.Lock()
	defer k.known.Unlock()
	for i := range p.servers {
		if s := k.servers[serverKey{addr: netip.AddrPortFrom(addr, first+uint16(i))}]; s != nil {
			p.servers[i].Store(s)
		}
	}
	return p
}

func (p *ports) at(r *route, b *backend, port uint16) *server {
	slot := &p.servers[port-r.rule.Listen.Lo]
	s := slot.Load()
	if s == nil {
		s = r.keeper.server(netip.AddrPortFrom(p.addr, b.spec.Port(r.rule.Listen.Lo, port)), "")
		slot.Store(s)
	}
	return s
}

// fit is the server of the spot that a connection may use; full says that there is one, and it has all the connections
// that it may have.
func (s *spot) fit(c *conn) (fit *server, full, demo bool) {
	for i := range s.n {
		x := s.places[i].at(c, s.backend)
		switch {
		case x == nil:
			return nil, false, true
		case !x.usable():
		case c.route.maxConns > 0 && x.open.Load() >= c.route.maxConns:
			full = true
		default:
			return x, false, false
		}
	}
	return nil, full, false
}

// share is the part of the connections that the spot should get now, in relation to the others: 0 if it can't be used.
func (s *spot) share(c *conn) (float64, *server) {
	x, _, demo := s.fit(c)
	switch {
	case demo:
		return s.weight, nil
	case x == nil:
		return 0, nil
	}
	return s.weight * x.warmth(c.route.slowStart, c.loop.now), x
}

// whole says whether the spot can be used and gets its full share: as a rule one load of an atomic that nobody writes.
func (s *spot) whole(c *conn) bool {
	x := s.places[0].at(c, s.backend)
	return x == nil || x.state.Load() == 0 && (c.route.maxConns == 0 || x.open.Load() < c.route.maxConns)
}

// pick chooses who is asked first, an index into primary. Should none of them be usable it is any.
func (r *route) pick(c *conn, from *choices) int {
	spots := from.primary
	if len(spots) < 2 {
		return 0
	}
	switch r.balance {
	case natmap.LeastConn:
		return leastBusy(c, spots, int(c.loop.round(r)))
	case natmap.Random:
		return lessBusy(c, from)
	case natmap.SourceHash:
		return hashed(c, spots)
	case natmap.First:
		return firstFit(c, spots)
	}
	i := int(from.turns[c.loop.round(r)%uint32(len(from.turns))])
	if spots[i].whole(c) {
		return i
	}
	return spared(c, spots, i)
}

// round counts the route's connections. Every loop counts for itself, so that they share nothing.
func (l *loop) round(r *route) uint32 {
	for len(l.rounds) <= r.index {
		l.rounds = append(l.rounds, 0)
	}
	n := l.rounds[r.index]
	l.rounds[r.index]++
	return n
}

// spared is for a turn that i can't take, or not every time since it has just come back: the others draw lots for it.
func spared(c *conn, spots []spot, i int) int {
	if share, _ := spots[i].share(c); share > 0 && rand.Float64()*spots[i].weight < share {
		return i
	}
	return draw(c, spots, i)
}

// draw picks by chance, each as its share says, but for one of them (-1: for none) unless there is no other.
func draw(c *conn, spots []spot, but int) int {
	total := 0.0
	for i := range spots {
		if i != but {
			share, _ := spots[i].share(c)
			total += share
		}
	}
	if total == 0 {
		return max(but, 0)
	}
	lot, last := rand.Float64()*total, max(but, 0)
	for i := range spots {
		if share, _ := spots[i].share(c); share > 0 && i != but {
			if last = i; lot < share {
				break
			}
			lot -= share
		}
	}
	return last
}

// load is how busy a server would be with one more connection, for its share.
func load(s *server, share float64) float64 {
	if s == nil {
		return 0
	}
	return float64(s.open.Load()+1) / share
}

// leastBusy is the one with the fewest connections for its share; among equals whose turn it is.
func leastBusy(c *conn, spots []spot, turn int) int {
	best, least := 0, math.Inf(1)
	for n := range spots {
		i := (turn + n) % len(spots)
		if share, s := spots[i].share(c); share > 0 {
			if busy := load(s, share); busy < least {
				best, least = i, busy
			}
		}
	}
	return best
}

// lessBusy is the less busy of two picked by chance (Mitzenmacher, "The power of two choices in randomized load
// balancing"): nearly as even as the least busy of all, without every loop running to the same one.
func lessBusy(c *conn, from *choices) int {
	spots := from.primary
	a := int(from.turns[rand.IntN(len(from.turns))])
	if !spots[a].whole(c) {
		a = draw(c, spots, -1)
	}
	b := int(from.turns[rand.IntN(len(from.turns))])
	if b == a || !spots[b].whole(c) {
		b = draw(c, spots, a)
	}
	shareA, serverA := spots[a].share(c)
	shareB, serverB := spots[b].share(c)
	if shareB > 0 && (shareA == 0 || load(serverB, shareB) < load(serverA, shareA)) {
		return b
	}
	return a
}

// hashed is the one that wins the client by rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to
// increase hit rates"): when one leaves only its own clients move, and when one comes it takes its share of each of
// the others. The scores are weighted as Schindelhauer and Schomaker do ("Weighted distributed hash tables"). Nothing
// in it is random, so that several gateways send a client to the same backend.
func hashed(c *conn, spots []spot) int {
	client := hashOf(c.report.source.Addr())
	best, score := 0, math.Inf(-1)
	for i := range spots {
		share, s := spots[i].share(c)
		if share == 0 {
			continue
		}
		seed := uint64(i)
		if s != nil {
			seed = s.seed
		}
		// In (0, 1): the upper 53 bits are what a float64 holds.
		u := (float64(mix(client^seed)>>11) + 0.5) / (1 << 53)
		if x := math.Log(u) / share; x > score {
			best, score = i, x
		}
	}
	return best
}

// hashOf is a client's number. A network of /64 is one client: privacy extensions (RFC 8981) change the rest at will.
func hashOf(a netip.Addr) uint64 {
	b := a.As16()
	high := binary.BigEndian.Uint64(b[:8])
	if a.Is4() {
		return mix(binary.BigEndian.Uint64(b[8:]))
	}
	return mix(high ^ 1<<63)
}

// mix spreads every bit over all others (the finalizer of splitmix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// firstFit is the first of the map that can be used.
func firstFit(c *conn, spots []spot) int {
	for i := range spots {
		if share, _ := spots[i].share(c); share > 0 {
			return i
		}
	}
	return 0
}

// mixTurns spreads backends over a round so that each gets exactly its weight, evenly mixed: the one that is most
// behind its share is next (nginx's smooth weighted round-robin).
func mixTurns(weights []int) []uint16 {
	total, divisor := 0, 0
	for _, w := range weights {
		divisor = gcd(divisor, w)
	}
	behind := make([]int, len(weights))
	for i := range weights {
		total += weights[i] / divisor
	}
	turns := make([]uint16, 0, total)
	for range total {
		best := 0
		for i, w := range weights {
			behind[i] += w / divisor
			if behind[i] > behind[best] {
				best = i
			}
		}
		behind[best] -= total
		turns = append(turns, uint16(best))
	}
	return turns
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
