// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/gateway/pool"
	"github.com/tlsnat/tlsnat/natmap"
)

// name is a host name that backends of the map have, and where it leads. It is looked up outside the loops, again when
// the time to live of the answer is over; while that fails it leads where it led before.
type name struct {
	host  string
	srv   bool // host is the name of SRV records
	leads atomic.Pointer[[]lead]

	// The keeper's, under its lock.
	task    *pool.Task
	failing bool
	lacks   string // what was missing of its last answer
}

// lead is a machine that a name leads to: of an SRV record, or of the name itself all of its addresses together, since
// of those nobody knows which are one machine's.
type lead struct {
	addrs    []netip.Addr // sorted
	port     uint16       // of an SRV record; 0: the map has it
	weight   int
	priority uint16
	target   string // of an SRV record
	own      bool   // the hosts file says so, and no DNS server
}

func (l lead) equal(m lead) bool {
	return slices.Equal(l.addrs, m.addrs) && l.port == m.port && l.weight == m.weight && l.priority == m.priority && l.own == m.own
}

// compare orders them by priority, and then so that the order of the answer makes no difference.
func (l lead) compare(m lead) int {
	return cmp.Or(cmp.Compare(l.priority, m.priority), slices.CompareFunc(l.addrs, m.addrs, netip.Addr.Compare), cmp.Compare(l.port, m.port))
}

const (
	// A name is looked up again when its answer's time to live is over, but not sooner than this: some servers say 0,
	minTTL = 5 * time.Second
	// and not later: who moves a machine does not wait for a day.
	maxTTL = 5 * time.Minute
	// What has no time to live (/etc/hosts), and what was not found.
	otherTTL = 30 * time.Second
	// A lookup is given up on after so long: that is two attempts at each of three servers, which is as many as resolv.conf
	// may have, and some more.
	resolveTimeout = 20 * time.Second
	// The start and a reload wait so long for names that lead nowhere yet.
	firstLookups = 5 * time.Second
	// Addresses of one name, and spots of one route: beyond that the rest is not used.
	maxAddrs, maxSpots = 256, 4096
)

// name is the one for a host; it is made if there is none.
func (k *keeper) name(host string, srv bool) *name {
	k.known.Lock()
	defer k.known.Unlock()
	key := host
	if srv {
		key = "srv:" + host
	}
	n := k.names[key]
	if n == nil {
		n = &name{host: host, srv: srv}
		k.names[key] = n
	}
	return n
}

// resolve looks up the names that lead nowhere yet, and returns what is wrong with those that still do not. Names that
// were found before have their own time. All together get firstLookups: a reload does not wait for DNS servers that are
// away, and the keeper asks for the rest.
func (gen *generation) resolve(ctx context.Context) (problems []string) {
	ctx, cancel := context.WithTimeout(ctx, firstLookups)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, lookupsAtOnce)
	var fresh []*name
	for n := range gen.names {
		if n.leads.Load() == nil {
			fresh = append(fresh, n)
		}
	}
	each := firstPatience(len(fresh))
	for _, n := range fresh {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, each)
			defer cancel()
			a, err := n.lookup(ctx, gen.config.Settings.Resolver)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				problems = append(problems, fmt.Sprintf("look up backend %s: %s", n.host, inWords(err)))
				return
			}
			n.leads.Store(&a.leads) // the routes choose again when the keeper adopts them
		})
	}
	wg.Wait()
	slices.Sort(problems)
	return problems
}

// lookupsAtOnce is how many names the start and a reload look up at the same time: half of the descriptors that tasks may have.
const lookupsAtOnce = pool.TasksAtOnce / 2

// firstPatience is how long each of n names is waited for: so long that all have had their turn when firstLookups is over, though
// most of them are not answered. A name that would have been answered later is looked up again at once (follow).
func firstPatience(n int) time.Duration {
	rounds := max(1, (n+lookupsAtOnce-1)/lookupsAtOnce)
	return firstLookups / time.Duration(rounds)
}

// follow has the generation's names looked up when their time comes. The keeper's lock is held.
func (k *keeper) follow(gen *generation) {
	for n, routes := range gen.names {
		for _, r := range routes {
			r.choose() // the name may lead elsewhere since the generation was made
		}
		if n.task == nil {
			soon := minTTL
			if n.leads.Load() == nil {
				soon = minPause
			}
			n.task = k.tasks.StartFor(pool.LookupTask, n.host, pool.Jittered(soon), func(e *pool.Task) time.Duration { return k.lookUp(e, n) })
		}
	}
}

// lookUp looks a name up again, and says when the next time is.
func (k *keeper) lookUp(e *pool.Task, n *name) time.Duration {
	a, err := n.lookup(e.Context(), k.gw.settings.Resolver)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch before := n.leads.Load(); {
	case e.Stopped():
		return pool.Never
	case ownLack(err):
		k.gw.short(lackInLookup, err, n.host)
		return pool.Jittered(lackPause)
	case err != nil:
		return k.notFound(n, err)
	case before == nil || !slices.EqualFunc(*before, a.leads, lead.equal):
		n.leads.Store(&a.leads)
		k.moved(n, before != nil)
	}
	if a.lacks != n.lacks && a.lacks != "" {
		k.gw.log.Warn("look up backend "+n.host+": the rest leads where it led before", zap.String("error", a.lacks))
	}
	n.failing, n.lacks = false, a.lacks
	return pool.Jittered(a.ttl)
}

// notFound is told of a lookup that failed, and says when the next one is. The keeper's lock is held.
func (k *keeper) notFound(n *name, err error) time.Duration {
	where, again := ": it leads where it led before", otherTTL
	if n.leads.Load() == nil {
		where, again = ": it leads nowhere yet", minTTL
	}
	if !n.failing {
		k.gw.log.Warn("look up backend "+n.host+where, zap.Error(err))
	}
	n.failing = true
	return pool.Jittered(again)
}

// moved makes the choices of the routes anew that have a name, and looks after the servers that are new, not after those
// that nobody leads to any more. Where the name led somewhere before the new ones begin slowly.
func (k *keeper) moved(n *name, slowly bool) {
	gen := k.gw.current.Load()
	was := map[*server]bool{}
	for _, r := range gen.names[n] {
		r.eachServer(func(_ *backend, s *server) { was[s] = true })
	}
	for _, r := range gen.names[n] {
		r.choose()
		r.eachServer(func(_ *backend, s *server) {
			if !was[s] && slowly && k.slowest > 0 && s.state.Load() == 0 {
				k.warm(s)
			}
			was[s] = true
		})
	}
	k.gw.log.Info("a backend's name leads elsewhere", zap.String("name", n.host), zap.Int("servers", len(was)))
	k.check(gen)
	if k.gw.reloads.one.TryLock() { // else a generation is being made of what is known; it forgets when it is done
		k.forget(gen)
		k.gw.reloads.one.Unlock()
	}
	k.gw.callWaiting()
}

// addBackends makes the route's backends and the first choices among them.
func (g *Gateway) addBackends(gen *generation, r *route) {
	r.keeper = g.keeper
	if r.rule.Action == natmap.Demo {
		r.backends = []*backend{{demo: true}}
	}
	for i := range r.rule.Backends {
		spec := &r.rule.Backends[i]
		b := &backend{spec: spec, speech: speechOf(r.rule, spec)}
		if b.spec.TLS {
			b.tickets = &tickets{}
		}
		r.backends = append(r.backends, b)
		if b.named() {
			b.name = g.keeper.name(b.spec.Host, b.spec.SRV)
			gen.names[b.name] = append(gen.names[b.name], r)
		}
	}
	r.choose()
}

// named says whether the backend's address has to be looked up.
func (b *backend) named() bool { return !b.demo && b.spec.Unix == "" && !b.spec.Addr.IsValid() }

// choose makes the route's choices of what its backends' names lead to now.
func (r *route) choose() {
	c := &choices{}
	var weights []int
	for _, b := range r.backends {
		primary, backup := b.spots(r)
		if !b.demo && b.spec.Backup {
			primary, backup = nil, append(primary, backup...)
		}
		for _, s := range primary {
			weights = append(weights, int(s.weight))
		}
		c.primary, c.backup = append(c.primary, primary...), append(c.backup, backup...)
	}
	c.primary, c.backup = c.primary[:min(len(c.primary), maxSpots)], c.backup[:min(len(c.backup), maxSpots)]
	c.turns = mixTurns(bounded(weights[:len(c.primary)]))
	r.choices.Store(c)
}

// spots are the candidates that a backend of the map stands for. Those of SRV records that have not the best priority
// are backups (RFC 2782).
func (b *backend) spots(r *route) (primary, backup []spot) {
	switch {
	case b.demo:
		return []spot{{backend: b, weight: 1, n: 1}}, nil
	case b.spec.Unix != "":
		return []spot{{backend: b, weight: float64(b.spec.Weight), n: 1, places: [2]place{{server: r.keeper.server(netip.AddrPort{}, b.spec.Unix)}}}}, nil
	case b.name == nil:
		return []spot{b.spot(r, lead{weight: 1}, b.spec.Addr)}, nil
	}
	leads := b.name.leads.Load()
	if leads == nil {
		return nil, nil
	}
	var refused []netip.Addr
	for _, l := range scaled(*leads) {
		addrs, others := b.allowed(r, &l)
		refused = append(refused, others...)
		for _, addrs := range paired(addrs) {
			s := b.spot(r, l, addrs...)
			if l.priority == (*leads)[0].priority {
				primary = append(primary, s)
			} else {
				backup = append(backup, s)
			}
		}
	}
	b.tellRefused(r, refused)
	return primary, backup
}

func (b *backend) spot(r *route, l lead, addrs ...netip.Addr) spot {
	s := spot{backend: b, weight: float64(b.spec.Weight * l.weight), n: len(addrs)}
	listen := r.rule.Listen
	for i, a := range addrs {
		p := &s.places[i]
		switch {
		case b.spec.SRV:
			p.server = r.keeper.server(netip.AddrPortFrom(a, l.port), "")
		case listen.Len() == 1 || !b.spec.Relative && b.spec.Lo == b.spec.Hi:
			p.server = r.keeper.server(netip.AddrPortFrom(a, b.spec.Port(listen.Lo, listen.Lo)), "")
		default:
			p.ports = r.keeper.ports(a, b.spec.Port(listen.Lo, listen.Lo), listen.Len())
		}
	}
	return s
}

// bounded makes weights smaller, in proportion, if a round would be too long for a table.
func bounded(weights []int) []int {
	const longest = 1 << 14
	total := 0
	for _, w := range weights {
		total += w
	}
	for i, w := range weights {
		if total > longest {
			weights[i] = max(1, w*longest/total)
		}
	}
	return weights
}

// scaled brings the weights of SRV records, which go up to 65535, down to those of the map. A weight of 0 is a small
// chance (RFC 2782).
func scaled(leads []lead) []lead {
	const most = 256
	heaviest := 0
	for _, l := range leads {
		heaviest = max(heaviest, l.weight)
	}
	scaled := slices.Clone(leads)
	for i := range scaled {
		if heaviest > most {
			scaled[i].weight = scaled[i].weight * most / heaviest
		}
		scaled[i].weight = max(scaled[i].weight, 1)
	}
	return scaled
}

// paired puts an IPv6 address and an IPv4 one together as those of one machine, the preferred family first (RFC 8305,
// section 4, leaves one of each in turn): a connect that is slow to answer is raced by one to the other. Which addresses
// are one machine's is not known; that pairs are mixed up harms nobody, as each address is in one.
func paired(addrs []netip.Addr) (pairs [][]netip.Addr) {
	var six, four []netip.Addr
	for _, a := range addrs {
		if a.Is4() {
			four = append(four, a)
		} else {
			six = append(six, a)
		}
	}
	preferred, others := six, four
	if len(six) > 0 && !reachable(six[0]) {
		preferred, others = four, six
	}
	for i := range max(len(preferred), len(others)) {
		var pair []netip.Addr
		if i < len(preferred) {
			pair = append(pair, preferred[i])
		}
		if i < len(others) {
			pair = append(pair, others[i])
		}
		pairs = append(pairs, pair)
	}
	return pairs
}

// reachable says whether there is a route to an address. Connecting a datagram socket asks the routing table, and sends
// nothing.
func reachable(a netip.Addr) bool {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 9))) // discard, RFC 863
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

// places are all that the route may send connections to.
func (r *route) places() iter.Seq2[*backend, *place] {
	return func(yield func(*backend, *place) bool) {
		c := r.choices.Load()
		for _, spots := range [...][]spot{c.primary, c.backup} {
			for i := range spots {
				for j := range spots[i].n {
					if !yield(spots[i].backend, &spots[i].places[j]) {
						return
					}
				}
			}
		}
	}
}

// eachServer visits every server that the route may send connections to: of a range of ports all, whether they were
// asked for yet or not.
func (r *route) eachServer(visit func(*backend, *server)) {
	for b, p := range r.places() {
		p.each(r, b, visit)
	}
}

func (p *place) each(r *route, b *backend, visit func(*backend, *server)) {
	if p.server != nil {
		visit(b, p.server)
	}
	if p.ports == nil {
		return
	}
	checked := r.rule.Options.Pool.Check != natmap.Check{}
	for i := range p.ports.servers {
		s := p.ports.servers[i].Load()
		if s == nil && checked {
			s = p.ports.at(r, b, r.rule.Listen.Lo+uint16(i))
		}
		if s != nil {
			visit(b, s)
		}
	}
}
