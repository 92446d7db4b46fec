// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/tls"
	"encoding/hex"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/natmap"
	"github.com/tlsnat/tlsnat/sni"
)

// report is what is known of a connection. It becomes its line in the log and its part of the counters.
type report struct {
	id       uint64
	accepted int64 // loop nanoseconds
	listen   *listener
	peer     netip.AddrPort // of the socket
	source   netip.AddrPort // the client: the peer, or what a PROXY header says
	target   netip.AddrPort // where the client wanted to go, if a PROXY header says so
	tlvs     *tlvs          // what else it says, as far as a rule of the port asks for it

	route      *route
	sni        string
	offered    string // the first protocol of the client's ALPN
	negotiated string // what was agreed on
	ja4        [36]byte
	version    uint16
	cipher     uint16
	group      tls.CurveID
	resumed    bool
	local      bool // a load balancer's own connection, or one whose client it does not name (PROXY LOCAL, UNKNOWN, UNSPEC)
	heard      bool // it has said something, not counting a PROXY header
	probe      bool // came and left without a byte
	spliced    bool
	halves     uint8 // reading and writing halves that speak TLS,
	inKernel   uint8 // and how many of them the kernel carried in the end
	cutShort   uint8 // whose stream of TLS ended without a close_notify (cutShortWords)
	byBackend  bool  // the alerts are those of the backend's connection
	hurried    bool  // its handshake had less time to answer than TLSNAT_HELLO_TIMEOUT

	backendResumed bool
	backendVersion uint16 // of TLS; 0: it is spoken to in plain TCP
	backendCipher  uint16
	port           uint16 // that was connected to, where the listener serves many; see door
	backendShook   int64  // how long the handshake with it took

	shaken        int64 // when the handshake was done, in loop nanoseconds
	helloDone     int64
	connectTime   int64
	backend       string
	up, down      int64
	told          bool
	outcome       Outcome
	refusal       refusal
	stage         stage
	alertSent     int16 // -1: none
	alertReceived int16
	err           string
}

// helloed takes what a ClientHello says, and the host name that it asks for.
func (r *report) helloed(h *sni.Hello, name string, now int64) {
	r.helloDone = now
	r.sni = name
	if len(h.ALPN) > 0 {
		r.offered = h.ALPN[0]
	}
	copy(r.ja4[:], h.AppendJA4(r.ja4[:0]))
}

// shookHands takes what was agreed on.
func (r *report) shookHands(s *tls.ConnectionState, now int64) {
	r.shaken = now
	r.version, r.cipher, r.group, r.resumed, r.negotiated = s.Version, s.CipherSuite, s.CurveID, s.DidResume, s.NegotiatedProtocol
}

// encrypted takes what was agreed on with the backend.
func (r *report) encrypted(s *tls.ConnectionState, took int64) {
	r.backendVersion, r.backendCipher, r.backendResumed, r.backendShook = s.Version, s.CipherSuite, s.DidResume, took
}

// door is where the connection came in: the listener's port, or that of the connection where the listener serves many.
func (r *report) door() uint16 {
	if r.listen.wide != nil {
		return r.port
	}
	return r.listen.port
}

func (r *report) idText() string {
	b := [8]byte{}
	for i := range b {
		b[i] = byte(r.id >> (56 - 8*i))
	}
	return hex.EncodeToString(b[:])
}

// versionName is the protocol as the PROXY protocol and OpenSSL write it.
func (r *report) versionName() string {
	return strings.ReplaceAll(tls.VersionName(r.version), " ", "v")
}

// cipherName is the suite's name in the IANA registry.
func (r *report) cipherName() string { return tls.CipherSuiteName(r.cipher) }

// path says how the bytes moved.
func (r *report) path() string {
	switch {
	case r.inKernel > 0 && r.inKernel == r.halves:
		return "ktls"
	case r.inKernel > 0:
		return "ktls+user"
	case r.version != 0, r.backendVersion != 0:
		return "user"
	case r.spliced:
		return "splice"
	}
	return "user" // small messages are cheaper copied than spliced
}

// probing says whether it came to look, and has said nothing.
func (r *report) probing() bool { return r.probe || r.local && !r.heard && r.up == 0 }

// level is info for what ends well or is the client's affair, warn for what an operator should look at.
func (r *report) level() zapcore.Level {
	switch {
	case r.probing():
		return zapcore.DebugLevel
	case r.outcome == Internal:
		return zapcore.ErrorLevel
	case r.outcome == NoBackend, r.outcome == ConnectFailed, r.outcome == Limited, r.refusal != notRefused:
		return zapcore.WarnLevel
	}
	return zapcore.InfoLevel
}

// fields are the line's, those that have something to say.
func (r *report) fields(now int64, dst []zap.Field) []zap.Field {
	ms := func(d int64) float64 { return float64(d/int64(time.Microsecond)) / 1000 }
	text := func(key, value string) {
		if value != "" {
			dst = append(dst, zap.String(key, value))
		}
	}
	dst = append(dst, zap.String("id", r.idText()), zap.String("outcome", r.outcome.String()),
		zap.String("listen", r.listen.nameAt(r.port)), zap.String("client", r.source.String()), zap.String("peer", r.peer.String()))
	text("sni", r.sni)
	if r.version != 0 {
		text("alpn", r.negotiated)
	} else {
		text("alpn", r.offered) // nothing was agreed on here: pass, or it never came to that
	}
	if r.version != 0 {
		dst = append(dst, zap.String("tls", strings.TrimPrefix(tls.VersionName(r.version), "TLS ")), zap.String("cipher", r.cipherName()))
		text("group", groupName(r.group))
		dst = append(dst, zap.Bool("resumed", r.resumed))
	}
	if r.ja4[0] != 0 {
		text("ja4", string(r.ja4[:]))
	}
	if r.route != nil {
		text("rule", r.route.label)
		text("mode", r.route.modeName())
		if r.tlvs != nil {
			dst = r.tlvs.fields(r.route, dst)
		}
	}
	text("backend", r.backend)
	if r.backendVersion != 0 {
		dst = append(dst, zap.String("backend_tls", strings.TrimPrefix(tls.VersionName(r.backendVersion), "TLS ")),
			zap.String("backend_cipher", tls.CipherSuiteName(r.backendCipher)), zap.Bool("backend_resumed", r.backendResumed))
	}
	dst = append(dst, zap.Int64("bytes_up", r.up), zap.Int64("bytes_down", r.down))
	if r.shaken != 0 {
		dst = append(dst, zap.Float64("handshake_ms", ms(r.shaken-r.helloDone)))
	}
	if r.backend != "" {
		dst = append(dst, zap.Float64("connect_ms", ms(r.connectTime)))
	}
	if r.backendVersion != 0 {
		dst = append(dst, zap.Float64("backend_handshake_ms", ms(r.backendShook)))
	}
	text("cut_short", cutShortWords[r.cutShort])
	dst = append(dst, zap.Float64("duration_ms", ms(now-r.accepted)))
	if r.backend != "" {
		text("path", r.path())
	}
	if r.outcome != OK {
		text("stage", r.stage.String())
	}
	whose := ""
	if r.byBackend {
		whose = "backend_"
	}
	if r.alertSent > 0 {
		text(whose+"alert", record.Alert(r.alertSent).String())
	}
	if r.alertReceived > 0 {
		text(whose+"alert_received", record.Alert(r.alertReceived).String())
	}
	text("refused", r.refusal.String())
	text("error", r.err)
	return dst
}

// cutShortWords are the values of cut_short: bit 0 is the client's stream, bit 1 the backend's.
var cutShortWords = [4]string{"", "client", "backend", "both"}

// cutShortBy says whose streams ended without a close_notify.
func (c *conn) cutShortBy() (who uint8) {
	if c.up.cutShort {
		who |= 1
	}
	if c.down.cutShort {
		who |= 2
	}
	return who
}

func groupName(g tls.CurveID) string {
	switch g {
	case 0:
		return ""
	case tls.CurveP256:
		return "P-256"
	case tls.CurveP384:
		return "P-384"
	case tls.CurveP521:
		return "P-521"
	}
	return g.String()
}

func (r *route) modeName() string {
	switch r.rule.Action {
	case natmap.Redirect:
		return "redirect"
	case natmap.Reject:
		return "reject"
	}
	return r.rule.Options.Mode.String()
}

// log writes the line, unless the client has had enough of them (sampler.go).
func (l *loop) log(c *conn) {
	r := &c.report
	if r.sampled() && !l.sampler.take(l, r) {
		return
	}
	if entry := l.gw.log.Check(r.level(), "connection"); entry != nil {
		l.fields = r.fields(l.now, l.fields[:0])
		if r.refusal == refusedAddress {
			l.fields = append(l.fields, zap.String("decided_by", c.decidedBy()))
		}
		entry.Write(l.fields...)
	}
}

// counters are a loop's. They are read from elsewhere, and summed.
type counters struct {
	accepted, probes, bytesUp, bytesDown, spliced, acceptRests atomic.Uint64

	slowRounds         atomic.Uint64
	longestRound       atomic.Int64 // nanoseconds
	lag                lag
	kernelTX, kernelRX atomic.Uint64 // halves that went to the kernel
	fallbacks          [hindrances]atomic.Uint64

	outcomes   [outcomes]atomic.Uint64
	refused    [refusals]atomic.Uint64
	silent     atomic.Uint64                            // handshakes that ended because the client never answered
	unlogged   atomic.Uint64                            // lines that the sampler kept back
	paused     atomic.Uint64                            // times that a stream waited for its bandwidth
	handshakes [tlsVersions][tlsGroups][2]atomic.Uint64 // the last index is 1 for resumed ones

	encryptions [encryptionResults][2]atomic.Uint64 // handshakes with backends, the same
	spans       [spans]stopwatch
	lent        atomic.Int64     // bytes that destinations have not taken, as of the last round
	cutShort    [2]atomic.Uint64 // streams of TLS that ended without a close_notify: clients', backends'
}

func (l *loop) count(r *report) {
	n := &l.counters
	n.outcomes[r.outcome].Add(1)
	if r.probe {
		n.probes.Add(1)
	}
	for side := range n.cutShort {
		n.cutShort[side].Add(uint64(r.cutShort >> side & 1))
	}
	if r.route != nil {
		r.route.use.ended.Add(1)
	}
	if r.backend != "" {
		n.spans[connectionSpan].note(l.now - r.accepted)
	}
	if r.outcome == OK {
		l.ended.add(r, l.now)
	} else {
		l.failed.add(r, l.now)
	}
}
