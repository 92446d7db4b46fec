// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/steer"
	"github.com/tlsnat/tlsnat/natmap"
)

// wideRange is how many ports in a row are steered to one listener for each loop rather than having a socket each. A
// socket costs 4 KiB of the kernel's memory, 50 µs to open and a descriptor, on each loop; a steered connection a
// getsockname(2) more, and every new one of the network namespace the program (30 to 70 ns). So few ports are no reason
// to ask for a right.
const wideRange = 64

// layout is how the ports of a map are listened on. Ports that stay over a reload keep how they are listened on, and by
// which sockets: none is handed from a socket to another, so none is without one for a moment.
type layout struct {
	plain   []endpoint      // that have a socket on each loop
	steered []natmap.Listen // that have not: by address and port, none touches another
	anchors []endpoint      // where the sockets are bound that serve them: a port of theirs for each address
	beside  int             // plain ones that are of wide ranges
}

// runs are the ports of a map as ranges that don't touch, by address and port.
func runs(m *natmap.Map) (all []natmap.Listen) {
	for _, l := range m.Listens() {
		all = extend(all, l)
	}
	return all
}

// extend adds a range behind the others.
func extend(all []natmap.Listen, l natmap.Listen) []natmap.Listen {
	if n := len(all) - 1; n >= 0 && all[n].Addr == l.Addr && int(all[n].Hi)+1 == int(l.Lo) {
		all[n].Hi = l.Hi
		return all
	}
	return append(all, l)
}

// isWide says whether a run of ports is steered. A link-local address is not: it means something else on each interface.
func isWide(run natmap.Listen) bool { return run.Len() >= wideRange && run.Addr.Zone() == "" }

// next is the layout of another map. Unless steer is set no port is steered that isn't already.
func (old *layout) next(m *natmap.Map, steer bool) *layout {
	had := setOf(old.plain)
	l := &layout{}
	for _, run := range runs(m) {
		wide := isWide(run)
		for port := int(run.Lo); port <= int(run.Hi); port++ {
			e := endpoint{run.Addr, uint16(port)}
			if had[e] || !(wide && steer) && !old.steers(e) {
				l.plain = append(l.plain, e)
				if wide {
					l.beside++
				}
			} else {
				l.steered = extend(l.steered, natmap.Listen{Addr: e.addr, Lo: e.port, Hi: e.port})
			}
		}
	}
	for _, s := range l.steered {
		if n := len(l.anchors); n == 0 || l.anchors[n-1].addr != s.Addr {
			l.anchors = append(l.anchors, old.anchorFor(s, l))
		}
	}
	return l
}

// anchorFor is where the sockets of an address are bound: where they were, as long as that port is steered, or at the
// first port.
func (old *layout) anchorFor(first natmap.Listen, l *layout) endpoint {
	for _, a := range old.anchors {
		if a.addr == first.Addr && l.steers(a) {
			return a
		}
	}
	return endpoint{first.Addr, first.Lo}
}

// moved are the anchors of the layout before whose addresses have another one now: their own port is gone, and of the
// others some have stayed, to which clients may be on their way through them.
func (l *layout) moved(before *layout) (all []endpoint) {
	for _, a := range without(before.anchors, l.anchors) {
		if slices.ContainsFunc(l.anchors, func(b endpoint) bool { return b.addr == a.addr }) {
			all = append(all, a)
		}
	}
	return all
}

// steers says whether the endpoint has no socket of its own.
func (l *layout) steers(e endpoint) bool {
	i, _ := slices.BinarySearchFunc(l.steered, e, func(s natmap.Listen, e endpoint) int {
		return cmp.Or(s.Addr.Compare(e.addr), cmp.Compare(s.Hi, e.port))
	})
	return i < len(l.steered) && l.steered[i].Addr == e.addr && l.steered[i].Contains(e.port)
}

// sockets are where each loop has one bound.
func (l *layout) sockets() []endpoint { return slices.Concat(l.plain, l.anchors) }

// spans are what is steered to the anchors, by number. A plain port of one address lies perhaps among the steered ones
// of every address, and keeps what is its own.
func (l *layout) spans() (all []steer.Span) {
	for _, s := range l.steered {
		to := slices.IndexFunc(l.anchors, func(a endpoint) bool { return a.addr == s.Addr })
		all = append(all, steer.Span{Addr: s.Addr, Lo: s.Lo, Hi: s.Hi, To: to})
	}
	for _, e := range l.plain {
		if e.addr.IsValid() && e.addr.Zone() == "" && l.steers(endpoint{port: e.port}) {
			all = append(all, steer.Span{Addr: e.addr, Lo: e.port, Hi: e.port, To: steer.Own})
		}
	}
	return all
}

func setOf(all []endpoint) map[endpoint]bool {
	set := make(map[endpoint]bool, len(all))
	for _, e := range all {
		set[e] = true
	}
	return set
}

// wideRules are what the listener of many ports serves: the rules of each of them, of one generation. It is immutable
// and shared by the loops.
type wideRules struct {
	gen    *generation
	spans  []spanRules
	early  bool       // all of them take data with the SYN: what a rule has not asked for it does not get (fastopen=)
	before *wideRules // for those who were on their way when ports were taken out; nil when they have arrived
}

// spanRules are the ports lo to hi, which serve the same rules.
type spanRules struct {
	lo, hi uint16
	*portRules
}

// at is what serves the port: the latest that has it.
func (w *wideRules) at(port uint16) (*generation, *portRules) {
	for ; w != nil; w = w.before {
		i, _ := slices.BinarySearchFunc(w.spans, port, func(s spanRules, port uint16) int { return cmp.Compare(s.hi, port) })
		if i < len(w.spans) && w.spans[i].lo <= port {
			return w.gen, w.spans[i].portRules
		}
	}
	return nil, nil
}

// wideRules are those of an address's steered ports.
func (gen *generation) wideRules(l *layout, addr netip.Addr) *wideRules {
	w := &wideRules{gen: gen, early: true}
	for _, s := range l.steered {
		if s.Addr != addr {
			continue
		}
		var last *natmap.Port
		for port := int(s.Lo); port <= int(s.Hi); port++ {
			if p := gen.config.Map.Port(addr, uint16(port)); p != last || port == int(s.Lo) {
				last = p
				rules := gen.port(addr, uint16(port))
				w.spans = append(w.spans, spanRules{uint16(port), 0, rules})
				w.early = w.early && rules.early
			}
			w.spans[len(w.spans)-1].hi = uint16(port)
		}
	}
	return w
}

// enterWide finds out which of the listener's many ports the client has connected to.
func (c *conn) enterWide(w *wideRules) bool {
	c.report.port = localAddr(c.client.fd).Port()
	if c.gen, c.port = w.at(c.report.port); c.port != nil {
		return true
	}
	c.gen, c.port = w.gen, &portRules{} // it took longer to connect than lastCall
	c.gen.open.Add(1)
	abort(&c.client)
	c.finish(Drained, "the port is not in the map any more")
	return false
}

// listening is what a gateway listens on. It belongs to it and not to a generation, and changes under the lock of reloads.
type listening struct {
	*layout
	wide     map[endpoint]*wideGroup
	steering steer.Steering
	status   atomic.Pointer[ListeningStatus]
}

// ListeningStatus is how the ports of the map are listened on.
type ListeningStatus struct {
	Sockets int    `json:"sockets"`           // on all loops
	Steered int    `json:"ports_steered"`     // that share a socket on each loop
	Beside  int    `json:"ports_not_steered"` // of wide ranges, that have a socket of their own on each loop
	Reason  string `json:"reason,omitempty"`  // why they have
}

// status is what the layout comes to on so many loops. why is the reason that wide ranges can't be steered.
func (l *layout) status(loops int, why error) *ListeningStatus {
	s := &ListeningStatus{Sockets: loops * len(l.sockets()), Steered: l.ports(), Beside: l.beside}
	switch {
	case s.Beside == 0:
	case why != nil:
		s.Reason = steer.Reason(why)
	default:
		s.Reason = "a port that stays over a reload keeps its socket until the next start"
	}
	return s
}

// ports is how many are steered.
func (l *layout) ports() (n int) {
	for _, s := range l.steered {
		n += s.Len()
	}
	return n
}

// wideGroup are the listeners of many ports, one for each loop.
type wideGroup struct {
	first *listener // the kernel chooses among it and those of the other loops
	rules *wideRules
}

// opening is what a generation listens on that the one before did not. Nothing of it is served before it is installed.
type opening struct {
	*layout
	opened  []*listener
	program *steer.Program // nil: what is steered stays as it is
	why     error          // that wide ranges are not steered
}

func (o *opening) discard() {
	for _, ln := range o.opened {
		_ = unix.Close(int(ln.fd))
	}
	o.opened = nil
}

// openPorts opens what the generation listens on and the one before did not: all of it, or nothing. Where nothing is
// steered yet and can't be, every port has sockets.
func (g *Gateway) openPorts(gen *generation) (*opening, error) {
	m := gen.config.Map
	why := maySteer(m)
	o, err := g.openLayout(gen, g.ports.next(m, why == nil))
	if unable, ok := errors.AsType[*steerError](err); ok && len(g.ports.steered) == 0 {
		why = unable.error
		o, err = g.openLayout(gen, g.ports.next(m, false))
	}
	if err == nil {
		o.why = why
		g.tellPorts(o)
	}
	return o, err
}

// maySteer says why the wide ranges of a map can't be steered; nil if they can, or if there are none.
func maySteer(m *natmap.Map) error {
	if !slices.ContainsFunc(runs(m), isWide) {
		return nil
	}
	return steer.Probe()
}

// steerError is why ports can't be steered.
type steerError struct{ error }

func (e *steerError) Error() string { return "steer wide port ranges: " + e.error.Error() }

func (g *Gateway) openLayout(gen *generation, next *layout) (*opening, error) {
	o := &opening{layout: next}
	if err := next.fits(len(g.loops), maySteer(gen.config.Map)); err != nil {
		return nil, err
	}
	if err := g.unclaimed(next); err != nil {
		return nil, err
	}
	var err error
	if o.opened, err = g.openListeners(gen, without(next.sockets(), g.ports.sockets())); err != nil {
		return nil, err
	}
	for _, ln := range o.opened {
		if slices.Contains(next.anchors, endpoint{ln.addr, ln.port}) {
			ln.wide, ln.gen, ln.rules = &wideRules{early: ln.rules.early}, nil, nil
		}
	}
	if err := g.load(o); err != nil {
		o.discard()
		return nil, &steerError{err}
	}
	return o, nil
}

// load makes the program for a layout, if it isn't the one that is there.
func (g *Gateway) load(o *opening) (err error) {
	spans := o.spans()
	if len(spans) == 0 || slices.Equal(spans, g.ports.spans()) && slices.Equal(o.anchors, g.ports.anchors) {
		return nil
	}
	fds := make([]int32, len(o.anchors))
	for i, a := range o.anchors {
		if group := g.ports.wide[a]; group != nil {
			fds[i] = group.first.fd
			continue
		}
		n := slices.IndexFunc(o.opened, func(ln *listener) bool { return endpoint{ln.addr, ln.port} == a })
		fds[i] = o.opened[n].fd
	}
	o.program, err = steer.Load(spans, fds)
	return err
}

// wideRules are those of all anchors, which the listeners take over.
func (g *Gateway) wideRules(gen *generation, o *opening) map[endpoint]*wideRules {
	groups := make(map[endpoint]*wideGroup, len(o.anchors))
	all := make(map[endpoint]*wideRules, len(o.anchors))
	for _, a := range o.anchors {
		group := g.ports.wide[a]
		if group == nil {
			n := slices.IndexFunc(o.opened, func(ln *listener) bool { return endpoint{ln.addr, ln.port} == a })
			group = &wideGroup{first: o.opened[n]}
		}
		w := gen.wideRules(o.layout, a.addr)
		w.before = group.rules
		groups[a], all[a] = &wideGroup{group.first, w}, w
	}
	g.ports.layout, g.ports.wide = o.layout, groups
	g.ports.status.Store(o.layout.status(len(g.loops), o.why))
	return all
}

// steer begins to steer as the opened ports need it. What was steered before stays so throughout.
func (g *Gateway) steer(o *opening) error {
	switch {
	case len(o.steered) == 0:
		return g.ports.steering.Close()
	case o.program == nil:
		return nil
	}
	defer o.program.Close()
	return g.ports.steering.Set(o.program)
}

// forgetBefore has the listeners of many ports forget the generation before. Whoever was on his way has arrived.
func (g *Gateway) forgetBefore() {
	now := make(map[endpoint]*wideRules, len(g.ports.wide))
	for a, group := range g.ports.wide {
		w := *group.rules
		w.before = nil
		group.rules, now[a] = &w, &w
	}
	if len(now) > 0 {
		g.onLoops(func(l *loop) { l.serveWide(now) })
	}
}

// serveWide gives the listeners of many ports what they serve.
func (l *loop) serveWide(rules map[endpoint]*wideRules) {
	for _, ln := range l.listeners {
		if w := rules[endpoint{ln.addr, ln.port}]; w != nil {
			if w.early != ln.wide.early {
				ln.takeEarly(w.early)
			}
			ln.wide = w
		}
	}
}

// others are the listening sockets that are not ours.
func (g *Gateway) others() (others []steer.Socket, err error) {
	all, err := steer.Listening()
	ours := setOf(g.ports.sockets())
	for _, s := range all {
		if !ours[endpoint{s.Addr.Unmap(), s.Port}] && !(s.Addr.IsUnspecified() && ours[endpoint{port: s.Port}]) {
			others = append(others, s)
		}
	}
	return others, err
}

// unclaimed says which of the ports that are going to be steered somebody else listens on. With sockets of our own the
// kernel would say so; steered connections would be taken from him without a word.
func (g *Gateway) unclaimed(next *layout) error {
	if len(next.steered) == 0 {
		return nil
	}
	others, err := g.others()
	if err != nil {
		return &steerError{err}
	}
	var errs []error
	for _, s := range others {
		for _, l := range next.steered {
			e := endpoint{l.Addr, s.Port}
			switch {
			case !l.Contains(s.Port) || !s.Meets(l.Addr):
			case g.ports.steers(e):
				g.log.Warn("another program listens on a port of a wide range, and what is for it comes here", zap.String("listen", listenName(e.addr, e.port)),
					zap.String("its_address", s.Addr.String()))
			default:
				errs = append(errs, &ListenError{listenName(e.addr, e.port), unix.EADDRINUSE})
			}
		}
	}
	return errors.Join(errs...)
}

// probe says which of the endpoints somebody else listens on, or can't be listened on. Where we have a socket with the
// same port for other addresses, which would be in the way of trying, the kernel is asked.
func (g *Gateway) probe(all []endpoint) error {
	var errs []error
	beside := map[uint16]bool{}
	for _, e := range g.ports.sockets() {
		beside[e.port] = true
	}
	var asked []endpoint
	for _, e := range all {
		if beside[e.port] {
			asked = append(asked, e)
		} else if err := probePort(e.addr, e.port); err != nil {
			errs = append(errs, err)
		}
	}
	if len(asked) > 0 {
		others, _ := g.others() // who can't ask finds out by listening
		for _, e := range asked {
			if slices.ContainsFunc(others, func(s steer.Socket) bool { return s.Port == e.port && s.Meets(e.addr) }) {
				errs = append(errs, &ListenError{listenName(e.addr, e.port), unix.EADDRINUSE})
			}
		}
	}
	return errors.Join(errs...)
}

// tellPorts says in the log what the wide ranges cost.
func (g *Gateway) tellPorts(o *opening) {
	sockets := zap.Int("sockets", len(o.opened))
	if o.program != nil {
		g.log.Info("wide port ranges are steered", zap.Int("ports", o.ports()), sockets)
		if n := g.ports.steering.Others(o.program); n > 0 {
			g.log.Warn("others steer connections in this network namespace, too: of programs that name a socket the one attached last decides",
				zap.Int("sk_lookup_programs", n))
		}
	} else if o.why != nil && len(o.opened) >= wideRange {
		g.log.Warn("wide port ranges have a socket for each port and loop: they can't be steered", sockets, zap.Int("ports", len(o.opened)/len(g.loops)),
			zap.String("reason", steer.Reason(o.why)))
	}
}

// reserved is what a process has open beside connections: standard files, log, name lookups, the admin and its clients,
// the loops' pipes and pollers, and what they listen on.
func (l *layout) reserved(loops int) int {
	const others = 16
	return others + config.AdminClients() + config.AdminSpares + loops*(len(l.plain)+len(l.anchors)+2*pipesFor(loops)+4)
}

// fits says whether there are descriptors enough for so many loops. why is the reason that wide ranges aren't steered.
func (l *layout) fits(loops int, why error) error {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || uint64(l.reserved(loops)) < r.Cur {
		return nil
	}
	text := fmt.Sprintf("%d ports of the map take %d sockets for %d loops, and the limit of open files is %d; raise it (LimitNOFILE= in systemd, "+
		"--ulimit nofile= for a container, ulimit -n), or listen on fewer ports", len(l.plain), loops*len(l.plain), loops, r.Cur)
	if why != nil {
		text += fmt.Sprintf("; ranges of %d ports and more need only a socket a loop where they can be steered, but %s", wideRange, steer.Reason(why))
	}
	return errors.New(text)
}

// CheckSockets says whether whoever runs this may open the sockets that the map needs. Nothing is opened.
func CheckSockets(c *config.Config) error {
	why := maySteer(c.Map)
	return (&layout{}).next(c.Map, why == nil).fits(c.Settings.Loops, why)
}

// Steering says whether wide port ranges can be steered, in words.
func Steering() string {
	if err := steer.Probe(); err != nil {
		return "not for wide port ranges: " + steer.Reason(err)
	}
	return fmt.Sprintf("steers ranges of %d ports and more", wideRange)
}
