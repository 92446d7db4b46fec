// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/printable"
	"github.com/tlsnat/tlsnat/natmap"
)

// Status is how the gateway is doing. Counts are since its start.
type Status struct {
	Started     time.Time `json:"started"`
	Draining    bool      `json:"draining"`
	Generation  uint64    `json:"generation"`  // number of the configuration that new connections get
	Generations int       `json:"generations"` // that connections run under, the current one included
	Loops       int       `json:"loops"`

	Connections ConnectionCounts `json:"connections"`
	Bytes       ByteCounts       `json:"bytes"`
	Handshakes  HandshakeCounts  `json:"handshakes"`
	Encryptions []Encryptions    `json:"backend_handshakes"`
	Times       TimesStatus      `json:"times"`
	Kernel      KernelCounts     `json:"ktls"`
	Gate        GateCounts       `json:"gate"`

	Memory MemoryStatus `json:"memory"`
	Tasks  TaskStatus   `json:"tasks"`

	AcceptPauses uint64     `json:"accept_pauses"`       // out of descriptors or memory
	Shortages    []Shortage `json:"shortages,omitempty"` // of this process or machine: those that have happened
	LinesDropped uint64     `json:"log_lines_dropped"`
	Rules        int        `json:"rules"`
	Certificates int        `json:"certificates"`
	Unusable     int        `json:"unusable_files"` // errors about single files of the configuration
	Ports        int        `json:"ports"`          // listened on
	Listens      []string   `json:"listen"`         // the ports as ranges, at most maxListens of them

	Listening ListeningStatus `json:"listening"` // how

	Reloads ReloadCounts `json:"reloads"`
	PerLoop []LoopStatus `json:"per_loop"`
}

// LoopStatus is how one event loop is doing.
type LoopStatus struct {
	Accepted     uint64  `json:"accepted"`         // connections
	SlowRounds   uint64  `json:"slow_rounds"`      // that took more than 10 ms: connections waited for it as long
	LongestRound float64 `json:"longest_round_ms"` // since the start; 0: none took a millisecond
	Lag          float64 `json:"lag_ms"`           // the longest of the last one or two minutes
}

// ReloadCounts are attempts to change the configuration, and how the last one ended.
type ReloadCounts struct {
	OK     uint64    `json:"ok"`
	Failed uint64    `json:"failed"`
	Since  time.Time `json:"since"` // when what is served now was read
	Last   *Reloaded `json:"last,omitempty"`
}

// ConnectionCounts add up: what was accepted is open or has an outcome.
type ConnectionCounts struct {
	Accepted uint64            `json:"accepted"`
	Open     int64             `json:"open"`
	Limit    int               `json:"limit"`
	Probes   uint64            `json:"probes"` // came and left without a byte; their outcome is ok
	Outcomes map[string]uint64 `json:"outcomes"`
	CutShort map[string]uint64 `json:"cut_short"` // streams of TLS that ended without a close_notify, by whose they were
}

// ByteCounts are bytes as the application counts them: without TLS around them. They include connections that are
// open.
type ByteCounts struct {
	Up      uint64 `json:"up"` // client to backend
	Down    uint64 `json:"down"`
	Spliced uint64 `json:"spliced"` // of both: those that never came to user space
}

// MemoryStatus is what destinations have not taken yet, and how much it may be in all.
type MemoryStatus struct {
	Used  int64 `json:"used"`
	Limit int64 `json:"limit"`
}

// TaskStatus is about what is done beside the loops: checks, lookups, tries of ejected servers.
type TaskStatus struct {
	Running int `json:"running"`
	Waiting int `json:"waiting"` // that are due, and have no place yet
}

// KernelCounts are halves of connections that streamed, a direction of TLS each: those that went to the kernel, and
// those that stayed in user space, by why.
type KernelCounts struct {
	TX        uint64            `json:"tx"` // what is sent, sealed by the kernel
	RX        uint64            `json:"rx"` // what is received, opened by the kernel
	Fallbacks map[string]uint64 `json:"fallbacks"`
}

// HandshakeCounts are those that were finished, by what was agreed on, and those that wait.
type HandshakeCounts struct {
	Full    uint64          `json:"full"`
	Resumed uint64          `json:"resumed"`
	Queued  int             `json:"queued"` // hellos that wait for their turn
	Silent  uint64          `json:"silent"` // handshakes that ended because the client never answered
	Kinds   []HandshakeKind `json:"kinds"`
}

// HandshakeKind is how many handshakes agreed on the same things. All kinds there are are listed, those that did not
// happen too.
type HandshakeKind struct {
	Version string `json:"version"` // "1.3"
	Group   string `json:"group"`   // "none" when a TLS 1.2 session was resumed: there was no key exchange
	Resumed bool   `json:"resumed"`
	Count   uint64 `json:"count"`
}

// The kinds of handshakes. The lists are closed, since they become labels of metrics.
const (
	tlsVersions = 2
	tlsGroups   = 7
)

var (
	versionLabels = [tlsVersions]string{"1.2", "1.3"}
	groupLabels   = [tlsGroups]string{"none", "X25519MLKEM768", "X25519", "P-256", "P-384", "P-521", "other"}
)

func groupIndex(id tls.CurveID) int {
	switch id {
	case 0:
		return 0
	case tls.X25519MLKEM768:
		return 1
	case tls.X25519:
		return 2
	case tls.CurveP256:
		return 3
	case tls.CurveP384:
		return 4
	case tls.CurveP521:
		return 5
	}
	return 6
}

func (n *counters) shookHands(r *report) {
	version, resumed := 0, 0
	if r.version == tls.VersionTLS13 {
		version = 1
	}
	if r.resumed {
		resumed = 1
	}
	n.handshakes[version][groupIndex(r.group)][resumed].Add(1)
	n.spans[handshakeSpan+span(resumed)].note(r.shaken - r.helloDone)
}

// maxListens bounds the list of ports in a Status; a map may listen on 200,000 of them.
const maxListens = 256

// Status sums what the loops have counted. It doesn't ask them, so it costs them nothing.
func (g *Gateway) Status() Status {
	gen := g.current.Load()
	listens := gen.config.Map.Listens()
	s := Status{Started: g.started, Draining: g.Draining(), Generation: gen.number, Loops: len(g.loops),
		LinesDropped: g.lines.dropped.Load(), Rules: len(gen.config.Map.Rules), Certificates: len(gen.certificates()), Unusable: len(gen.config.Unusable)}
	for i, l := range listens {
		s.Ports += l.Len()
		if i < maxListens {
			s.Listens = append(s.Listens, l.String())
		}
	}
	s.Listening = g.Listening()
	s.Reloads.Since, s.Generations = gen.made, 1+len(g.reloads.living(gen))
	s.Reloads.Last, s.Reloads.OK, s.Reloads.Failed = g.LastReload()
	for _, l := range g.loops {
		n := &l.counters
		s.PerLoop = append(s.PerLoop, LoopStatus{n.accepted.Load(), n.slowRounds.Load(), float64(n.longestRound.Load()) / 1e6,
			float64(n.lag.longest(l.clock())) / 1e6})
	}
	g.sum(&s)
	return s
}

// Listening is how the ports of the map are listened on: nothing before Start.
func (g *Gateway) Listening() ListeningStatus {
	if s := g.ports.status.Load(); s != nil {
		return *s
	}
	return ListeningStatus{}
}

// sum reads the ends before the beginnings, so that never more connections have ended than were accepted.
func (g *Gateway) sum(s *Status) {
	c := &s.Connections
	c.Outcomes = make(map[string]uint64, outcomes)
	for o := range outcomes {
		c.Outcomes[o.String()] = g.total(func(n *counters) *atomic.Uint64 { return &n.outcomes[o] })
	}
	c.CutShort = map[string]uint64{}
	for side := range 2 {
		c.CutShort[cutShortWords[1<<side]] = g.total(func(n *counters) *atomic.Uint64 { return &n.cutShort[side] })
	}
	c.Probes = g.total(func(n *counters) *atomic.Uint64 { return &n.probes })
	c.Open, c.Limit = g.open.Load(), int(g.maxConns.Load())
	c.Accepted = g.total(func(n *counters) *atomic.Uint64 { return &n.accepted })
	s.Bytes.Up = g.total(func(n *counters) *atomic.Uint64 { return &n.bytesUp })
	s.Bytes.Down = g.total(func(n *counters) *atomic.Uint64 { return &n.bytesDown })
	s.Bytes.Spliced = g.total(func(n *counters) *atomic.Uint64 { return &n.spliced })
	s.Shortages = slices.DeleteFunc(g.Shortages(), func(x Shortage) bool { return x.Count == 0 })
	s.Memory.Limit = int64(g.settings.Memory)
	s.Tasks.Running, s.Tasks.Waiting = g.keeper.tasks.Status()
	for _, l := range g.loops {
		s.Memory.Used += l.counters.lent.Load()
	}
	s.AcceptPauses = g.total(func(n *counters) *atomic.Uint64 { return &n.acceptRests })
	s.Kernel.TX = g.total(func(n *counters) *atomic.Uint64 { return &n.kernelTX })
	s.Kernel.RX = g.total(func(n *counters) *atomic.Uint64 { return &n.kernelRX })
	s.Kernel.Fallbacks = make(map[string]uint64, hindrances)
	for f := range hindrances {
		s.Kernel.Fallbacks[f.String()] = g.total(func(n *counters) *atomic.Uint64 { return &n.fallbacks[f] })
	}
	g.sumHandshakes(&s.Handshakes)
	s.Encryptions, s.Times = g.encryptions(), g.times()
	g.sumGate(&s.Gate)
}

func (g *Gateway) sumHandshakes(h *HandshakeCounts) {
	h.Silent = g.total(func(n *counters) *atomic.Uint64 { return &n.silent })
	for _, l := range g.loops {
		h.Queued += int(l.queue.Waiting.Load())
	}
	for v, version := range versionLabels {
		for i, group := range groupLabels {
			full := g.total(func(n *counters) *atomic.Uint64 { return &n.handshakes[v][i][0] })
			resumed := g.total(func(n *counters) *atomic.Uint64 { return &n.handshakes[v][i][1] })
			h.Full += full
			h.Resumed += resumed
			h.Kinds = append(h.Kinds, HandshakeKind{version, group, false, full}, HandshakeKind{version, group, true, resumed})
		}
	}
}

func (g *Gateway) total(which func(*counters) *atomic.Uint64) (n uint64) {
	for _, l := range g.loops {
		n += which(&l.counters).Load()
	}
	return n
}

// ConnInfo is what the admin shows of a connection. The names are those of its line in the log.
type ConnInfo struct {
	ID      string         `json:"id"`
	Listen  string         `json:"listen"`
	Client  netip.AddrPort `json:"client"`
	Peer    netip.AddrPort `json:"peer"`
	SNI     string         `json:"sni,omitempty"`
	TLS     string         `json:"tls,omitempty"`
	Rule    string         `json:"rule,omitempty"`
	Mode    string         `json:"mode,omitempty"`
	Backend string         `json:"backend,omitempty"`
	Stage   string         `json:"stage"` // what it waits for, or waited for when it ended
	Up      int64          `json:"bytes_up"`
	Down    int64          `json:"bytes_down"`

	rank rank
}

// OpenConn is a connection that is open.
type OpenConn struct {
	ConnInfo
	AgeMS  int64 `json:"age_ms"`
	IdleMS int64 `json:"idle_ms"` // since bytes moved last
}

// EndedConn is one that is over.
type EndedConn struct {
	ConnInfo
	Outcome    string `json:"outcome"`
	Error      string `json:"error,omitempty"`
	DurationMS int64  `json:"duration_ms"`
	AgoMS      int64  `json:"ago_ms"` // since it ended
}

// Ended are those of the connections that ended last that the query is about, the latest first: at most limit of those with
// outcome ok, and as many of the others, which the former would push out. So would load balancers' probes, which are left
// out. The query's own limit and its place are for those that are open. Of missing loops nothing is known.
func (g *Gateway) Ended(ctx context.Context, q ConnQuery, limit int) (ended []EndedConn, missing []int) {
	all, missing := ask(ctx, g, func(l *loop) []EndedConn { return append(l.ended.list(&q, l.now), l.failed.list(&q, l.now)...) })
	slices.SortFunc(all, func(a, b EndedConn) int { return cmp.Compare(a.AgoMS, b.AgoMS) })
	room := map[bool]int{true: limit, false: limit}
	return slices.DeleteFunc(all, func(c EndedConn) bool {
		ok := c.Outcome == OK.String()
		room[ok]--
		return room[ok] < 0
	}), missing
}

// ask has f run on every loop and joins the answers. Loops that are over have none; those that have not answered before ctx
// is over are missing.
func ask[T any](ctx context.Context, g *Gateway, f func(*loop) []T) (all []T, missing []int) {
	answers := make([]chan []T, len(g.loops))
	for i, l := range g.loops {
		answer := make(chan []T, 1) // the loop doesn't wait for somebody to take it
		answers[i] = answer
		l.post(func() { answer <- f(l) })
	}
	return join(ctx, g, answers)
}

// join waits for the loops' answers. One that is slow does not cost the answers of the others.
func join[T any](ctx context.Context, g *Gateway, answers []chan []T) (all []T, missing []int) {
	for i, l := range g.loops {
		select {
		case a := <-answers[i]:
			all = append(all, a...)
			continue
		default:
		}
		select {
		case a := <-answers[i]:
			all = append(all, a...)
		case <-l.done:
		case <-ctx.Done():
			missing = append(missing, i)
		}
	}
	return all, missing
}

func millis(d int64) int64 { return d / int64(time.Millisecond) }

func (r *report) info() ConnInfo {
	i := ConnInfo{ID: r.idText(), Listen: r.listen.nameAt(r.port), Client: r.source, Peer: r.peer, SNI: printable.Text(r.sni, maxField), Backend: r.backend,
		Stage: r.stage.String(), Up: r.up, Down: r.down, rank: rankOf(r)}
	if r.version != 0 {
		i.TLS = r.versionNumber()
	}
	if r.route != nil {
		i.Rule, i.Mode = r.route.label, r.route.modeName()
	}
	return i
}

// versionNumber is "1.2" or "1.3", as the log and the metrics write it.
func (r *report) versionNumber() string {
	if r.version == tls.VersionTLS13 {
		return versionLabels[1]
	}
	return versionLabels[0]
}

// endedRing holds the last connections of a loop that are over.
type endedRing struct {
	ring [32]endedEntry
	next int
}

type endedEntry struct {
	report report
	at     int64 // loop nanoseconds; 0: none
}

func (e *endedRing) add(r *report, now int64) {
	if r.probing() {
		return
	}
	e.ring[e.next] = endedEntry{*r, now}
	e.next = (e.next + 1) % len(e.ring)
}

func (e *endedRing) list(q *ConnQuery, now int64) (all []EndedConn) {
	for i := range e.ring {
		if entry := &e.ring[i]; entry.at != 0 && q.fits(&entry.report, entry.report.stage) {
			r := &entry.report
			all = append(all, EndedConn{ConnInfo: r.info(), Outcome: r.outcome.String(), Error: printable.Text(r.err, maxField),
				DurationMS: millis(entry.at - r.accepted), AgoMS: millis(now - entry.at)})
		}
	}
	return all
}

// RuleInfo is a rule of the map and how much it was used.
type RuleInfo struct {
	Rule     string       `json:"rule"` // file:line
	Listen   string       `json:"listen"`
	Protocol string       `json:"protocol,omitempty"` // that a client has to offer
	Name     string       `json:"name,omitempty"`
	Action   string       `json:"action"`
	Mode     string       `json:"mode"`
	Backends []string     `json:"backends,omitempty"`
	Options  []RuleOption `json:"options,omitempty"`
	Open     uint64       `json:"connections_open"`
	Total    uint64       `json:"connections_total"`
}

// RuleOption is an option of a rule and where it comes from.
type RuleOption struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	From  string `json:"from"` // file:line:col
}

// Rules are the rules of the map in its order, at most limit of them.
func (g *Gateway) Rules(limit int) []RuleInfo {
	gen := g.current.Load()
	rules := gen.config.Map.Rules
	infos := make([]RuleInfo, min(limit, len(rules)))
	for i := range infos {
		infos[i] = gen.routes[rules[i]].info()
	}
	return infos
}

func (r *route) info() RuleInfo {
	i := RuleInfo{Rule: r.label, Listen: r.rule.Listen.String(), Protocol: r.rule.Protocol, Name: r.rule.Name, Action: r.rule.Action.String(), Mode: r.modeName()}
	if r.rule.Action == natmap.Forward {
		for _, b := range r.rule.Backends {
			i.Backends = append(i.Backends, b.String())
		}
	}
	for _, s := range r.rule.Settings {
		i.Options = append(i.Options, RuleOption{s.Key, s.Value, s.Pos.String()})
	}
	over := r.use.ended.Load() // before entered: it never gets ahead of that
	i.Total = r.use.entered.Load()
	i.Open = i.Total - over
	return i
}

// CertInfo is a certificate.
type CertInfo struct {
	Names     []string     `json:"names,omitempty"`
	Addrs     []netip.Addr `json:"addresses,omitempty"`
	KeyType   string       `json:"key"`
	Issuer    string       `json:"issuer"`
	NotBefore time.Time    `json:"not_before"`
	NotAfter  time.Time    `json:"not_after"`
	File      string       `json:"file"`
	Kept      bool         `json:"kept,omitempty"` // the file cannot be used any more: this is what it held before
}

// Certificates are those that are served, the one that expires first comes first; at most limit of them.
func (g *Gateway) Certificates(limit int) []CertInfo {
	all := g.current.Load().certificates()
	infos := make([]CertInfo, min(limit, len(all)))
	for i := range infos {
		c := all[i]
		infos[i] = CertInfo{c.Names, c.Addrs, c.KeyType, c.Issuer, c.NotBefore, c.NotAfter, c.CertFile, c.Kept}
	}
	return infos
}

// certificates are those that are served now, each once, by the time when they expire.
func (gen *generation) certificates() []*certs.Certificate {
	now := time.Now()
	gen.certMu.Lock()
	defer gen.certMu.Unlock()
	if gen.certList == nil || now.Unix() != gen.certsAt { // a handshake chooses by the second, too
		gen.certList, gen.certsAt = gen.config.Certs.Served(now), now.Unix()
		slices.SortStableFunc(gen.certList, func(a, b *certs.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	}
	return gen.certList
}

// GenerationInfo is a configuration that connections run under.
type GenerationInfo struct {
	Number       uint64    `json:"generation"`
	Since        time.Time `json:"since"`
	Rules        int       `json:"rules"`
	Certificates int       `json:"certificates"`
	Added        []string  `json:"added,omitempty"`   // rules that the generation before did not have
	Removed      []string  `json:"removed,omitempty"` // rules that it had; a changed rule is in both
	Open         int64     `json:"connections_open"`
	OldestMS     int64     `json:"oldest_ms"` // age of the connection that has run under it for longest; 0: none
	Current      bool      `json:"current"`   // new connections get it
}

// Generations are the configurations that are in use, the newest first. Of missing loops the connections' ages are not known.
func (g *Gateway) Generations(ctx context.Context) (infos []GenerationInfo, missing []int) {
	current := g.current.Load()
	all := append([]*generation{current}, g.reloads.living(current)...)
	oldest, missing := g.oldest(ctx)
	infos = make([]GenerationInfo, len(all))
	for i, gen := range all {
		infos[i] = GenerationInfo{Number: gen.number, Since: gen.made, Rules: len(gen.config.Map.Rules), Certificates: len(gen.certificates()),
			Added: gen.added, Removed: gen.removed, Open: gen.open.Load(), OldestMS: oldest[gen.number], Current: i == 0}
	}
	return infos, missing
}

// LastReload is how the last reload ended, and how many there were of either kind; nil if there was none.
func (g *Gateway) LastReload() (last *Reloaded, ok, failed uint64) {
	s := &g.reloads
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, s.ok, s.bad
}
