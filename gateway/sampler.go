// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/gateway/gate"
)

const (
	// What did not become a session is logged in full for so many connections of one source and outcome in sampleTime:
	// enough to see what is wrong with a client.
	sampleLines = 100
	// An address that the gate turns away has one line, and so has one that is silent while many are: they are all alike, and
	// come in floods.
	refusedLines = 1
	sampleTime   = time.Minute
	// Sources of whom a loop remembers how many lines they had; those beyond are counted together. With it a loop logs
	// at most 1024 times sampleLines in a minute, however many addresses attack.
	sampleSources = 1024
)

// sampler keeps one source from filling the log: connections that never became a session have their lines up to a
// number, and beyond it one warning when the minute is over, with how many there were. Every loop has its own.
type sampler struct {
	sources map[sampled]*sample
	others  uint64 // connections of sources for which there was no room
	size    atomic.Int32
	flusher *time.Timer // runs while sources has something to say
}

type sampled struct {
	source  netip.Prefix // an address, or the /64 of one
	outcome Outcome
}

type sample struct {
	lines    int
	unlogged uint64

	// of the last one of them
	listen   *listener
	port     uint16 // as in report
	sni, err string
	refusal  refusal
}

// sampled says whether the connection ended before it was a session, for a reason that a client can repeat as often as
// it likes. Probes are only logged at level debug.
func (r *report) sampled() bool {
	switch r.outcome {
	case BadProxy, BadHello, HelloTimeout, UnknownName, Denied, Limited, HandshakeFailed, ClientCertRefused, NoBackend, ConnectFailed:
		return true
	}
	return r.outcome == ClientReset && r.stage < greeting
}

// take says whether the connection has a line of its own, and counts it if it has none.
func (s *sampler) take(l *loop, r *report) bool {
	key := sampled{gate.Prefix64(r.source.Addr()), r.outcome}
	x := s.sources[key]
	switch {
	case x != nil:
	case len(s.sources) < sampleSources:
		if s.sources == nil {
			s.sources = map[sampled]*sample{}
		}
		x = &sample{}
		s.sources[key] = x
		s.size.Store(int32(len(s.sources)))
	default:
		s.others++
		l.counters.unlogged.Add(1)
		return false
	}
	if s.flusher == nil {
		s.flusher = time.AfterFunc(sampleTime, func() { l.post(func() { s.flush(l) }) })
	}
	limit := sampleLines
	if r.refusal.byAddress() || r.hurried {
		limit = refusedLines
	}
	if x.lines < limit {
		x.lines++
		return true
	}
	x.unlogged++
	x.listen, x.port, x.sni, x.err, x.refusal = r.listen, r.port, r.sni, r.err, r.refusal
	l.counters.unlogged.Add(1)
	return false
}

// flush says how many lines were kept back, and begins anew.
func (s *sampler) flush(l *loop) {
	for key, x := range s.sources {
		if x.unlogged > 0 {
			x.log(l, key)
		}
	}
	if s.others > 0 {
		l.gw.log.Warn("connections not logged one by one", zap.String("client", "others"), zap.Uint64("count", s.others))
	}
	clear(s.sources)
	s.others = 0
	s.size.Store(0)
	if s.flusher != nil {
		s.flusher.Stop()
		s.flusher = nil
	}
}

// log tells what the last one of them was; the others were like it, but for names perhaps.
func (x *sample) log(l *loop, key sampled) {
	client := key.source.String()
	if key.source.IsSingleIP() {
		client = key.source.Addr().String()
	}
	fields := []zap.Field{zap.String("client", client), zap.String("outcome", key.outcome.String()), zap.Uint64("count", x.unlogged),
		zap.String("listen", x.listen.nameAt(x.port))}
	for _, f := range [...][2]string{{"sni", x.sni}, {"refused", x.refusal.String()}, {"error", x.err}} {
		if f[1] != "" {
			fields = append(fields, zap.String(f[0], f[1]))
		}
	}
	l.gw.log.Warn("connections not logged one by one", fields...)
}
