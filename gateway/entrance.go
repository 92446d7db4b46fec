// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"hash/maphash"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/natmap"
)

// refusal says which limit a connection met that was turned away. The list is closed: it is a field of the log line
// and a label of the metrics.
type refusal uint8

const (
	notRefused          refusal = iota
	refusedAddress              // allow=, deny=
	refusedRate                 // rate-per-ip=
	refusedConnsPerIP           // conns-per-ip=
	refusedConns                // conns=
	refusedHandshakes           // handshakes=
	refusedMaxConns             // TLSNAT_MAX_CONNS
	refusedHandshakeAll         // TLSNAT_HANDSHAKES: dropped, being the oldest that waits of the address with the most hellos
	refusedQueue                // max-conns= of every backend, and queue=
	refusedMemory               // TLSNAT_MEMORY
	refusals
)

var refusalNames = [refusals]string{"", "address", "rate-per-ip", "conns-per-ip", "conns", "handshakes", "max-conns", "handshake-queue", "queue", "memory"}

var refusalTexts = [refusals]string{"",
	"the address of the client may not come in (allow=, deny=)",
	"the client connects more often than rate-per-ip= lets it",
	"the client has as many connections open as conns-per-ip= lets it",
	"as many connections are open as conns= lets the rule have",
	"as many handshakes are under way as handshakes= lets the rule have",
	config.Prefix + "MAX_CONNS connections are open",
	"as many hellos wait already as the loop's part of " + config.Prefix + "HANDSHAKES lets",
	"every backend has max-conns= connections",
	"what other connections' destinations do not take, or its own source's, fills the loop's part of " + config.Prefix + "MEMORY",
}

func (r refusal) String() string { return refusalNames[r] }

// byAddress says whether it is the client's own address that has had enough.
func (r refusal) byAddress() bool { return r != notRefused && r <= refusedConnsPerIP }

func (r refusal) outcome() Outcome {
	if r == refusedAddress {
		return Denied
	}
	return Limited
}

// entrance is what an address has to pass. A port has one for what all its rules have in common, which is looked at
// before a byte is read; a route has its own, of which what the port has looked at already is left out.
type entrance struct {
	sets  []*gate.Set // refused is whom all of them refuse; empty: nobody
	rate  perAddress
	conns perAddress
}

// perAddress is a limit on what one address has. It counts for all that have the same scope.
type perAddress struct {
	scope uint64
	most  int       // connections; 0: no limit
	rate  gate.Rate // the zero Rate: no limit
}

// maxSets is how many different sets the rules of a port may have to be looked at before the hello.
const maxSets = 4

// common is what two entrances have in common.
func (e *entrance) common(other *entrance) *entrance {
	if e == nil || other == nil {
		return nil
	}
	both := &entrance{}
	if e.rate == other.rate {
		both.rate = e.rate
	}
	if e.conns == other.conns {
		both.conns = e.conns
	}
	if len(e.sets) > 0 && len(other.sets) > 0 {
		both.sets = slices.Clone(e.sets)
		for _, s := range other.sets {
			if !slices.Contains(both.sets, s) {
				both.sets = append(both.sets, s)
			}
		}
		if len(both.sets) > maxSets {
			both.sets = nil
		}
	}
	if both.idle() {
		return nil
	}
	return both
}

// idle says whether everybody passes.
func (e *entrance) idle() bool {
	return len(e.sets) == 0 && e.rate == perAddress{} && e.conns == perAddress{}
}

// denies says whether none of the sets lets the address in.
func (e *entrance) denies(a netip.Addr) bool {
	for _, s := range e.sets {
		if s.Allows(a) {
			return false
		}
	}
	return len(e.sets) > 0
}

// early says whether a rule of a port takes what comes with the SYN.
func (g gates) early(e endpoint) bool {
	own, every := g.island(e.addr, e.port), g.island(netip.Addr{}, e.port)
	return own != nil && own.early || every != nil && every.early
}

// decided says whether the port's entrance has said all that a route's set has to say.
func (e *entrance) decided(s *gate.Set) bool { return e != nil && len(e.sets) == 1 && e.sets[0] == s }

// lineGate is a route's gate: its entrance, and what is counted for all names and ports of its line.
type lineGate struct {
	entrance
	most       int64 // connections; 0: no limit
	handshakes int64
	count      *lineCount
}

// lineCount is what a line of the map has open. It outlives generations: the line may change, its name is what counts.
type lineCount struct{ open, shaking atomic.Int64 }

// gatehouse is what the gate remembers over all generations. The tables are made when the first connection is counted
// in them.
type gatehouse struct {
	conns atomic.Pointer[gate.Conns]
	rates atomic.Pointer[gate.Rates]
	seed  maphash.Seed

	mu    sync.Mutex // over what follows; no loop takes it
	lines map[ruleKey]*lineCount
}

func newGatehouse() *gatehouse {
	return &gatehouse{seed: maphash.MakeSeed(), lines: map[ruleKey]*lineCount{}}
}

func (h *gatehouse) connTable(most int) *gate.Conns {
	if t := h.conns.Load(); t != nil {
		return t
	}
	h.conns.CompareAndSwap(nil, gate.NewConns(most))
	return h.conns.Load()
}

func (h *gatehouse) rateTable() *gate.Rates {
	if t := h.rates.Load(); t != nil {
		return t
	}
	h.rates.CompareAndSwap(nil, gate.NewRates())
	return h.rates.Load()
}

// line is the count of a line. Those of lines that are gone and have nothing open are forgotten.
func (h *gatehouse) line(name ruleKey, keep map[*lineCount]bool) *lineCount {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := h.lines[name]
	if n == nil {
		n = &lineCount{}
		h.lines[name] = n
	}
	keep[n] = true
	return n
}

func (h *gatehouse) sweep(keep map[*lineCount]bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, n := range h.lines {
		if !keep[n] && n.open.Load() == 0 && n.shaking.Load() == 0 {
			delete(h.lines, name)
		}
	}
}

// gates are the entrances of a generation's ports, by address, every address first, and port.
type gates []island

// island is a run of listening ports whose rules overlap, with what the rules have in common, and what any of them asks for.
type island struct {
	natmap.Listen
	gate  *entrance
	some  bool             // rules were seen
	tlvs  *natmap.TLVTypes // of PROXY headers, that rules ask for
	early bool             // a rule says fastopen=on
}

// raise makes the gates of a generation's routes and ports.
func (h *gatehouse) raise(gen *generation) gates {
	m := &gateMaker{house: h, defaults: map[natmap.Pos]int{}, count: map[string]int{}, lines: map[*lineCount]bool{}, owner: map[*natmap.Setting]ruleKey{}}
	var g gates
	for _, l := range gen.config.Map.Listens() {
		g = append(g, island{Listen: l})
	}
	for _, rule := range gen.config.Map.Rules {
		r := gen.routes[rule]
		r.pace = gate.Pace(rule.Options.Gate.Bandwidth)
		r.gate = m.lineGate(rule, gen.config.Gate(rule))
		is := g.island(rule.Listen.Addr, rule.Listen.Lo)
		is.askTLVs(&rule.Options.TLVs)
		is.early = is.early || rule.Options.Pool.FastOpen == natmap.SwitchOn
		if !is.some {
			is.gate, is.some = r.gate.before(), true
		} else {
			is.gate = is.gate.common(r.gate.before())
		}
	}
	h.sweep(m.lines)
	return g
}

// before is what can be looked at before it is known which rule it is; nil: nothing.
func (g *lineGate) before() *entrance {
	if g == nil || g.idle() {
		return nil
	}
	return &g.entrance
}

// island finds the one that has the port, or nil.
func (g gates) island(addr netip.Addr, port uint16) *island {
	i, _ := slices.BinarySearchFunc(g, natmap.Listen{Addr: addr, Lo: port}, func(is island, l natmap.Listen) int {
		if c := is.Addr.Compare(l.Addr); c != 0 {
			return c
		}
		return int(is.Hi) - int(l.Lo)
	})
	if i < len(g) && g[i].Addr == addr && g[i].Contains(port) {
		return &g[i]
	}
	return nil
}

// at is the entrance of a port. plain is the route of one that has no other.
func (g gates) at(e endpoint, plain *route) *entrance {
	if plain != nil {
		return plain.gate.before()
	}
	own, every := g.island(e.addr, e.port), g.island(netip.Addr{}, e.port)
	switch {
	case own == nil && every == nil:
		return nil
	case own == nil:
		return every.gate
	case every == nil || own == every:
		return own.gate
	}
	return own.gate.common(every.gate)
}

// gateMaker makes the gates of one generation.
type gateMaker struct {
	house    *gatehouse
	defaults map[natmap.Pos]int          // which default line of its file with that option it is
	count    map[string]int              // default lines, by file and option
	lines    map[*lineCount]bool         // that the generation has
	owner    map[*natmap.Setting]ruleKey // the line that a rule belongs to, by what its names share
}

// lineGate is the gate of a rule, nil if it has none.
func (g *gateMaker) lineGate(rule *natmap.Rule, set *gate.Set) *lineGate {
	o := &rule.Options.Gate
	l := &lineGate{most: int64(o.Conns), handshakes: int64(o.Handshakes)}
	if set != nil {
		l.sets = []*gate.Set{set}
	}
	if o.RatePerIP.N > 0 {
		l.rate = perAddress{scope: g.scope(rule, "rate-per-ip"), rate: gate.Rate{N: o.RatePerIP.N, Per: o.RatePerIP.Per}}
	}
	if o.ConnsPerIP > 0 {
		l.conns = perAddress{scope: g.scope(rule, "conns-per-ip"), most: o.ConnsPerIP}
	}
	if l.most > 0 || l.handshakes > 0 {
		l.count = g.house.line(g.line(rule), g.lines)
	}
	if l.idle() && l.count == nil {
		return nil
	}
	return l
}

// line is the name of the line that a rule with options stands on: its first rule's key, which no other line can have.
func (g *gateMaker) line(rule *natmap.Rule) ruleKey {
	shared := &rule.Settings[0]
	key, known := g.owner[shared]
	if !known {
		key = keyOf(rule)
		g.owner[shared] = key
	}
	return key
}

// scope is what a limit by address counts together: a line's own option what comes to that line, a default line's all
// that comes to the rules below it. The name of it does not change when a line is added elsewhere or the number is
// another one, so that a reload does not begin to count from zero.
func (g *gateMaker) scope(rule *natmap.Rule, key string) uint64 {
	s := config.SettingOf(rule, key)
	if !s.Default {
		return maphash.Comparable(g.house.seed, struct {
			key  string
			line ruleKey
		}{key, g.line(rule)})
	}
	n, known := g.defaults[s.Pos]
	if !known {
		of := key + " " + s.Pos.File
		g.count[of]++
		n = g.count[of]
		g.defaults[s.Pos] = n
	}
	return maphash.Comparable(g.house.seed, struct {
		key, file string
		n         int
	}{key, s.Pos.File, n})
}

// What a connection holds of the gate, and has to give back when it ends.
const (
	holdsConn uint8 = 1 << iota
	holdsHandshake
)

// knock looks at what is known of a client before it has said anything: its address. It comes after the PROXY header,
// where there is one; if that names no client, the address is the peer's.
func (c *conn) knock() refusal {
	if c.loop.lacksMemory(c) {
		return refusedMemory
	}
	e := c.port.gate
	if e == nil {
		return notRefused
	}
	a := c.report.source.Addr()
	if e.denies(a) {
		return refusedAddress
	}
	return c.countAddress(e.rate, e.conns)
}

// countAddress counts a connection of an address, unless the address has had enough of them.
func (c *conn) countAddress(rate, conns perAddress) refusal {
	g, a := c.loop.gw, c.report.source.Addr()
	if rate.rate.N > 0 {
		t := g.house.rateTable()
		if !t.Take(t.Key(rate.scope, a), c.loop.now, rate.rate) {
			return refusedRate
		}
	}
	if conns.most > 0 {
		t := g.house.connTable(int(g.maxConns.Load()))
		slot, ok := t.Enter(t.Key(conns.scope, a), conns.most)
		if !ok {
			return refusedConnsPerIP
		}
		c.slot = slot + 1
	}
	return notRefused
}

// passGate looks at what the rule wants, once it is known which one it is.
func (c *conn) passGate() refusal {
	g, e := c.route.gate, c.port.gate
	if len(g.sets) > 0 && !e.decided(g.sets[0]) && g.denies(c.report.source.Addr()) {
		return refusedAddress
	}
	rate, conns := g.rate, g.conns
	if e != nil && e.rate == rate {
		rate = perAddress{}
	}
	if e != nil && e.conns == conns {
		conns = perAddress{}
	}
	if why := c.countAddress(rate, conns); why != notRefused {
		return why
	}
	if g.most > 0 && !c.hold(holdsConn, &g.count.open, g.most) {
		return refusedConns
	}
	if g.handshakes > 0 && config.Terminates(c.route.rule) && !c.holdHandshake(g) {
		return refusedHandshakes
	}
	return notRefused
}

// hold counts the connection, unless there are most already.
func (c *conn) hold(what uint8, count *atomic.Int64, most int64) bool {
	if count.Add(1) > most {
		count.Add(-1)
		return false
	}
	c.holds |= what
	return true
}

// holdHandshake counts the connection among the handshakes of its line. If these are all that handshakes= allows, one whose
// client is silent gives way, as for the places of the loop: silence must not shut out those who speak.
func (c *conn) holdHandshake(g *lineGate) bool {
	if c.hold(holdsHandshake, &g.count.shaking, g.handshakes) {
		return true
	}
	l := c.loop
	silent := l.silentOf(g.count)
	if silent == nil || l.now-silent.hs.begun < leastPatience && l.queue.Holds(silent) <= l.queue.Holds(c)+1 {
		return false // nobody, or whoever has just begun and is no crowd
	}
	silent.giveUpSilent()
	return c.hold(holdsHandshake, &g.count.shaking, g.handshakes)
}

// release gives back what the connection holds of the gate: all of it at its end, the handshake when that is done.
func (c *conn) release(what uint8) {
	what &= c.holds
	c.holds &^= what
	if what&holdsConn != 0 {
		c.route.gate.count.open.Add(-1)
	}
	if what&holdsHandshake != 0 {
		c.route.gate.count.shaking.Add(-1)
	}
}

// leaveGate is the end of a connection that the gate may have counted.
func (c *conn) leaveGate() {
	c.release(holdsConn | holdsHandshake)
	if c.slot != 0 {
		c.loop.gw.house.connTable(0).Leave(c.slot - 1)
		c.slot = 0
	}
}

// shut turns a client away with a reset, at whatever stage: it costs two system calls, leaves no socket in FIN_WAIT or
// TIME_WAIT for a flood to fill, and says nothing about what is behind. An alert would have to be waited for until it is
// read, for up to two seconds (see answerAndLinger).
func (c *conn) shut(why refusal) stage {
	c.refused(why)
	abort(&c.client)
	return c.finish(why.outcome(), refusalTexts[why])
}

// refused counts.
func (c *conn) refused(why refusal) {
	c.report.refusal = why
	c.loop.counters.refused[why].Add(1)
}

// decidedBy is the line of a list that denied the client.
func (c *conn) decidedBy() string {
	var set *gate.Set
	switch {
	case c.route != nil && c.route.gate != nil && len(c.route.gate.sets) > 0:
		set = c.route.gate.sets[0]
	case c.port.gate != nil && len(c.port.gate.sets) > 0:
		set = c.port.gate.sets[0]
	default:
		return ""
	}
	d := set.Decide(c.report.source.Addr())
	if !d.Prefix.IsValid() {
		return "in none of allow="
	}
	return d.Prefix.String() + " at " + d.Place
}

// GateCounts say whom the gate turned away and why, and how full everything is that grows with what clients do.
type GateCounts struct {
	Refused  map[string]uint64 `json:"refused"`            // connections, by the limit that they met
	Paused   uint64            `json:"bandwidth_pauses"`   // times that a stream waited for its bandwidth
	Unlogged uint64            `json:"log_lines_withheld"` // connections that are only counted in the log
	Tables   []TableUsage      `json:"tables"`
}

// TableUsage is how full a table is. None gets fuller than its limit, whatever clients do.
type TableUsage struct {
	Name    string `json:"name"`
	Entries int    `json:"entries"`
	Limit   int    `json:"limit"`
}

func (g *Gateway) sumGate(s *GateCounts) {
	s.Refused = make(map[string]uint64, refusals)
	for r := notRefused + 1; r < refusals; r++ {
		s.Refused[r.String()] = g.total(func(n *counters) *atomic.Uint64 { return &n.refused[r] })
	}
	s.Paused = g.total(func(n *counters) *atomic.Uint64 { return &n.paused })
	s.Unlogged = g.total(func(n *counters) *atomic.Uint64 { return &n.unlogged })
	s.Tables = g.tables()
}

// tables are all that clients can fill, and the lists of the map.
func (g *Gateway) tables() []TableUsage {
	var conns, rates gate.Usage
	if t := g.house.conns.Load(); t != nil {
		conns = t.Usage()
	}
	if t := g.house.rates.Load(); t != nil {
		rates = t.Usage(int64(time.Since(g.started)))
	}
	sources, shaking, queued, most := 0, 0, 0, 0
	for _, l := range g.loops {
		sources += int(l.sampler.size.Load())
		shaking += int(l.queue.Held.Load())
		queued += int(l.queue.Waiting.Load())
		most += l.maxInFlight()
	}
	return []TableUsage{
		{"connections", int(g.open.Load()), int(g.maxConns.Load())},
		{"handshakes", shaking, most},
		{"handshake-queue", queued, most},
		{"conns-per-ip", conns.Entries, conns.Limit},
		{"rate-per-ip", rates.Entries, rates.Limit},
		{"log-sources", sources, sampleSources * len(g.loops)},
		{"prefixes", g.current.Load().config.Prefixes(), config.MaxPrefixes},
	}
}
