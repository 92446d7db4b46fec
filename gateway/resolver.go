// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// question is one of the queries that a lookup sends.
type question struct {
	name string // in lower case: some servers answer with the letters that they like
	kind dnsmessage.Type
}

// hearing is what is heard of the queries of one lookup. Package net asks the servers of resolv.conf in their order, reads
// hosts, tries search domains and goes over to TCP; but it keeps to itself how long an answer holds, and that a family's
// answer is missing.
type hearing struct {
	mu     sync.Mutex
	open   map[question]bool // asked, and not answered so that it counts
	asked  bool
	ttl    time.Duration // the least one; 0: none was heard
	found  time.Time     // when the first address was heard
	lacked error         // an own lack that was in the way of a query
}

const (
	// A query over UDP is given up on after so long, and the next server is asked: resolv.conf's 5 s for each attempt
	// would take longer than the start waits if the first server is away.
	attemptTime = 2 * time.Second
	// Once one family's addresses are there, the other family's answer is waited for so long: some servers drop
	// queries for AAAA.
	familyTime = 2 * time.Second
)

var errEnough = errors.New("the addresses of the other family are there")

// resolver is Go's own, listened to. server, where one is set, is asked instead of those in resolv.conf.
func (h *hearing) resolver(server string) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if h.enough(time.Now()) {
			return nil, errEnough
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, network, cmp.Or(server, address))
		if ownLack(err) {
			h.mu.Lock()
			h.lacked = err
			h.mu.Unlock()
		}
		switch c := c.(type) {
		case *net.UDPConn:
			return &packetEar{c, ear{h: h}}, err
		case *net.TCPConn:
			return &streamEar{TCPConn: c, ear: ear{h: h}}, err
		}
		return c, err
	}}
}

// enough says whether a family that has not answered is waited for no longer.
func (h *hearing) enough(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.found.IsZero() && now.Sub(h.found) > familyTime
}

// missing says whether a query of this type has got no answer that counts.
func (h *hearing) missing(kind dnsmessage.Type) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for q := range h.open {
		if q.kind == kind {
			return true
		}
	}
	return false
}

// ear listens to one query and to what comes back.
type ear struct {
	h  *hearing
	id uint16
	q  question
}

// sends notes what is asked.
func (e *ear) sends(message []byte) {
	var p dnsmessage.Parser
	h, err := p.Start(message)
	if err != nil {
		return
	}
	q, err := p.Question()
	if err != nil {
		return
	}
	e.id, e.q = h.ID, question{strings.ToLower(q.Name.String()), q.Type}
	e.h.mu.Lock()
	defer e.h.mu.Unlock()
	e.h.asked = true
	e.h.open[e.q] = true
}

// hears reads a message. What is no answer to the query is passed over, as package net does.
func (e *ear) hears(message []byte) {
	var p dnsmessage.Parser
	h, err := p.Start(message)
	if err != nil || !h.Response || h.ID != e.id || h.Truncated {
		return
	}
	q, err := p.Question()
	if err != nil || strings.ToLower(q.Name.String()) != e.q.name || q.Type != e.q.kind || p.SkipAllQuestions() != nil {
		return
	}
	e.h.mu.Lock()
	defer e.h.mu.Unlock()
	answers := e.h.read(&p)
	refers := answers == 0 && !h.Authoritative && !h.RecursionAvailable // to other servers: package net asks the next one
	if h.RCode == dnsmessage.RCodeNameError || h.RCode == dnsmessage.RCodeSuccess && !refers {
		delete(e.h.open, e.q)
	}
}

// read goes through the answers of a message and counts them. The lock is held.
func (h *hearing) read(p *dnsmessage.Parser) (n int) {
	for ; ; n++ {
		rr, err := p.AnswerHeader()
		if err != nil || p.SkipAnswer() != nil {
			return n
		}
		if ttl := max(time.Duration(rr.TTL)*time.Second, time.Second); h.ttl == 0 || ttl < h.ttl {
			h.ttl = ttl
		}
		if h.found.IsZero() && (rr.Type == dnsmessage.TypeA || rr.Type == dnsmessage.TypeAAAA) {
			h.found = time.Now()
		}
	}
}

// packetEar and streamEar are the connections that the resolver asks over.
type packetEar struct {
	*net.UDPConn
	ear
}

func (c *packetEar) Write(p []byte) (int, error) {
	c.sends(p)
	return c.UDPConn.Write(p)
}

func (c *packetEar) Read(p []byte) (int, error) {
	n, err := c.UDPConn.Read(p)
	c.hears(p[:max(n, 0)])
	return n, err
}

// SetDeadline is how package net bounds an attempt.
func (c *packetEar) SetDeadline(t time.Time) error {
	if soon := time.Now().Add(attemptTime); soon.Before(t) {
		t = soon
	}
	return c.UDPConn.SetDeadline(t)
}

type streamEar struct {
	*net.TCPConn
	ear
	got []byte
}

// lengthSize is what precedes a message over TCP (RFC 1035, section 4.2.2).
const lengthSize = 2

func (c *streamEar) Write(p []byte) (int, error) {
	c.sends(p[min(len(p), lengthSize):])
	return c.TCPConn.Write(p)
}

func (c *streamEar) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if c.got = append(c.got, p[:max(n, 0)]...); len(c.got) >= lengthSize {
		if end := lengthSize + int(binary.BigEndian.Uint16(c.got)); len(c.got) >= end {
			c.hears(c.got[lengthSize:end])
		}
	}
	return n, err
}

// machine is what a lookup of a host name found: its addresses, sorted.
type machine struct {
	addrs []netip.Addr
	// A family whose query got no answer. It may have addresses that we don't know.
	lacksFour, lacksSix bool
	own                 bool // of the hosts file: nobody was asked
	ttl                 time.Duration
}

// addrsOf looks a host name up. A family that is not answered for is no error as long as the other one is.
func addrsOf(ctx context.Context, server, host string) (machine, error) {
	h := &hearing{open: map[question]bool{}}
	addrs, err := h.resolver(server).LookupNetIP(ctx, "ip", host)
	if err != nil {
		return machine{}, h.because(err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)
	m := machine{addrs: addrs[:min(len(addrs), maxAddrs)], lacksFour: h.missing(dnsmessage.TypeA), lacksSix: h.missing(dnsmessage.TypeAAAA)}
	h.mu.Lock()
	defer h.mu.Unlock()
	m.own, m.ttl = !h.asked, h.ttl
	return m, nil
}

// because is why a lookup failed.
func (h *hearing) because(err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lacked != nil {
		return h.lacked
	}
	return err
}

// keep adds the addresses that were known before of a family which was not answered for.
func (m *machine) keep(before []netip.Addr) {
	for _, a := range before {
		if a.Is4() && m.lacksFour || a.Is6() && m.lacksSix {
			m.addrs = append(m.addrs, a)
		}
	}
	slices.SortFunc(m.addrs, netip.Addr.Compare)
	m.addrs = slices.Compact(m.addrs)
	m.addrs = m.addrs[:min(len(m.addrs), maxAddrs)]
}

// answer is where a name leads, and for how long that holds.
type answer struct {
	leads []lead
	ttl   time.Duration
	lacks string // what got no answer, and leads where it led; "": nothing
}

// hold has the answer hold no longer than this.
func (a *answer) hold(ttl time.Duration) {
	if ttl > 0 && (a.ttl == 0 || ttl < a.ttl) {
		a.ttl = ttl
	}
}

// add puts in a machine. before is what was known of it; nil: nothing.
func (a *answer) add(l lead, m machine, before *lead) {
	if before != nil {
		m.keep(before.addrs)
	}
	switch {
	case m.lacksFour:
		a.lacks = "no DNS server answers for its IPv4 addresses"
	case m.lacksSix:
		a.lacks = "no DNS server answers for its IPv6 addresses"
	}
	l.addrs, l.own = m.addrs, m.own
	a.hold(m.ttl)
	a.leads = append(a.leads, l)
}

// lookup asks where the name leads. What gets no answer leads where it led before.
func (n *name) lookup(ctx context.Context, server string) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	a, err := n.ask(ctx, server)
	if err != nil {
		return a, plainer(err)
	}
	if a.ttl = min(max(cmp.Or(a.ttl, otherTTL), minTTL), maxTTL); a.lacks != "" {
		a.ttl = min(a.ttl, otherTTL)
	}
	return a, nil
}

func (n *name) ask(ctx context.Context, server string) (a answer, err error) {
	var before []lead
	if leads := n.leads.Load(); leads != nil {
		before = *leads
	}
	if n.srv {
		return n.askRecords(ctx, server, before)
	}
	m, err := addrsOf(ctx, server, n.host)
	if err == nil {
		a.add(lead{weight: 1}, m, known(before, lead{}))
	}
	return a, err
}

// known is what was known of a machine.
func known(before []lead, l lead) *lead {
	i := slices.IndexFunc(before, func(b lead) bool { return b.target == l.target && b.port == l.port })
	if i < 0 {
		return nil
	}
	return &before[i]
}

// targetsAtOnce bounds the lookups of one name's targets at the same time.
const targetsAtOnce = 16

// askRecords asks for SRV records, and then for their targets. A target that can't be looked up leads where it led; one
// that never led anywhere is left out, as long as there are others.
func (n *name) askRecords(ctx context.Context, server string, before []lead) (a answer, err error) {
	h := &hearing{open: map[question]bool{}}
	_, records, err := h.resolver(server).LookupSRV(ctx, "", "", n.host)
	if err != nil && len(records) == 0 { // else some records are malformed, and these are not
		return a, h.because(err)
	}
	a.hold(h.ttl)
	records = records[:min(len(records), maxAddrs)]
	machines, errs := lookUpTargets(ctx, server, records)
	for i, rec := range records {
		l := lead{target: strings.ToLower(rec.Target), port: rec.Port, weight: int(rec.Weight), priority: rec.Priority}
		was := known(before, l)
		switch {
		case errs[i] == nil:
			a.add(l, machines[i], was)
			continue
		case was != nil:
			l.addrs, l.own = was.addrs, was.own
			a.leads = append(a.leads, l)
		}
		a.lacks, err = "look up "+l.target+": "+inWords(plainer(errs[i])), errs[i]
	}
	if len(a.leads) == 0 {
		return a, cmp.Or(err, errNoRecords)
	}
	slices.SortFunc(a.leads, lead.compare)
	return a, nil
}

var errNoRecords = errors.New("its SRV records name no machine")

func lookUpTargets(ctx context.Context, server string, records []*net.SRV) ([]machine, []error) {
	machines, errs := make([]machine, len(records)), make([]error, len(records))
	var wg sync.WaitGroup
	slots := make(chan struct{}, targetsAtOnce)
	for i, rec := range records {
		slots <- struct{}{}
		wg.Go(func() {
			machines[i], errs[i] = addrsOf(ctx, server, rec.Target)
			<-slots
		})
	}
	wg.Wait()
	return machines, errs
}

// plainer is an error of a lookup without the name, which the message has already.
func plainer(err error) error {
	var e *net.DNSError
	switch {
	case errors.As(err, &e) && e.IsNotFound:
		return errors.New("there is no such name")
	case errors.As(err, &e) && e.IsTimeout:
		return errors.New("no DNS server answered in time")
	case errors.As(err, &e):
		return errors.New(e.Err)
	}
	return err
}
