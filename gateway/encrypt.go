// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/natmap"
)

// encryption is how the tls:// backends of a rule are spoken to.
type encryption struct {
	minTLS     uint16
	roots      *x509.CertPool // nil: the system's
	cert       *certs.Entry   // shown to a backend that asks; nil: none
	name       string         // of all backends; "": their hosts
	clientName bool           // the name that the client asked for, where it asked for one
	unverified bool
	lacks      string // what of all that could not be read, so that no connection is made; "": nothing
}

func (g *Gateway) newEncryption(c *config.Config, rule *natmap.Rule) *encryption {
	o := &rule.Options
	e := &encryption{minTLS: g.settings.OldestTLS(), unverified: o.BackendUnverified}
	if a := c.BackendCAs[o.BackendCA]; a != nil {
		e.roots = a.Pool
		if len(a.Certs) == 0 {
			e.lacks = "the CA of backend-ca=" + o.BackendCA + " cannot be read"
		}
	}
	if o.BackendCA != "" && e.roots == nil {
		e.roots = x509.NewCertPool() // without the CA that was named nobody is believed, and not whom the system believes
	}
	if o.BackendCert != "" {
		if e.cert = c.Certs.ForName(o.BackendCert); e.cert == nil {
			e.lacks = "the certificate of backend-cert=" + o.BackendCert + " cannot be read"
		}
	}
	if e.clientName = o.BackendName == natmap.NameOfClient; !e.clientName {
		e.name = o.BackendName
	}
	return e
}

// nameFor is what the backend's certificate has to be for, a name or an address. A name is also asked for (SNI); an
// address is not (RFC 6066, section 3).
func (e *encryption) nameFor(spec *natmap.Backend, asked string) string {
	switch {
	case e.name != "":
		return e.name
	case e.clientName && asked != "":
		return asked
	case spec.Addr.IsValid():
		return spec.Addr.WithZone("").String()
	}
	return strings.TrimSuffix(spec.Host, ".")
}

// show is the certificate for a backend that asks for one: one that it says it can use, else the first, so that it is
// the backend that says no.
func (e *encryption) show(cri *tls.CertificateRequestInfo) (*tls.Certificate, error) {
	if e.cert == nil {
		return &tls.Certificate{}, nil
	}
	served := e.cert.Served(time.Now())
	for _, c := range served {
		if cri.SupportsCertificate(c.TLS()) == nil {
			return c.TLS(), nil
		}
	}
	return served[0].TLS(), nil
}

// offer is what every handshake with a tls:// backend offers: of a connection and of a check, so that a check does not
// succeed where connections fail.
func (e *encryption) offer(name string) *tls.Config {
	return &tls.Config{
		ServerName:           name,
		MinVersion:           e.minTLS,
		CipherSuites:         suites12,
		CurvePreferences:     groups,
		GetClientCertificate: e.show,
	}
}

// tickets are the sessions that a backend can be asked to resume. Handshakes take and put them off the loops.
type tickets struct {
	mu     sync.Mutex
	byPeer map[ticketPeer][]*tls.ClientSessionState // newest last
}

// ticketPeer is whom a ticket is from: a backend with a range of ports is many servers, and one that is asked for the
// clients' names has a session for each.
type ticketPeer struct {
	name string
	port uint16
}

const (
	ticketsKept = 8   // of one peer: what connections that are opened at once can use without showing one twice
	ticketPeers = 256 // of one backend
)

// take is the newest ticket, which is then used up (RFC 8446, appendix C.4) unless it is the only one.
func (t *tickets) take(p ticketPeer) *tls.ClientSessionState {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := t.byPeer[p]
	if len(list) == 0 {
		return nil
	}
	newest := list[len(list)-1]
	if len(list) > 1 {
		list[len(list)-1] = nil
		t.byPeer[p] = list[:len(list)-1]
	}
	return newest
}

func (t *tickets) put(p ticketPeer, cs *tls.ClientSessionState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byPeer == nil {
		t.byPeer = map[ticketPeer][]*tls.ClientSessionState{}
	}
	list := t.byPeer[p]
	for other := range t.byPeer { // any of them: who is asked for so many names resumes seldom
		if list != nil || len(t.byPeer) < ticketPeers {
			break
		}
		delete(t.byPeer, other)
	}
	if len(list) == ticketsKept {
		list = append(list[:0], list[1:]...)
	}
	t.byPeer[p] = append(list, cs)
}

// drop forgets a ticket that was no good.
func (t *tickets) drop(p ticketPeer, cs *tls.ClientSessionState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if list := t.byPeer[p]; len(list) == 1 && list[0] == cs {
		delete(t.byPeer, p)
	}
}

// encrypt queues the connection to shake hands with the backend that has just been reached.
func (c *conn) encrypt() stage {
	l, d := c.loop, c.dial
	if lacks := c.route.encryption.lacks; lacks != "" { // it is not the backend's fault, and nothing is said to it
		return c.nextBackend(lacks)
	}
	c.to(waitingEncryption)
	c.setDeadline(d.share(c))
	l.encryptQueue.Push(c)
	l.startHandshakes()
	return c.stage
}

// serverOf is whose a handshake with a backend is; nil is the demo.
func serverOf(c *conn) *server {
	if c.dial == nil {
		return nil
	}
	return c.dial.server
}

// startEncryption gives a place to the server that is next. It is taken when everything is there that can fail: a connection
// that ends here does not know its server any more.
func (l *loop) startEncryption() {
	c := l.encryptQueue.Next()
	defer c.rescue()
	hs, err := newEncrypter(c)
	if err != nil {
		l.encryptQueue.Remove(c)
		c.goOn(c.unannounced(err))
		return
	}
	l.encryptQueue.Take()
	c.to(encrypting)
	c.setDeadline(max(c.dial.share(c), int64(c.route.connect)/4)) // however long it has waited for its turn
	l.active.Add(1)
	c.dial.hs = hs
	l.shakers.run(hs)
}

// awaitEncryption waits for the turn. The client may leave meanwhile.
func (c *conn) awaitEncryption() stage {
	if c.client.failed != 0 {
		c.loop.encryptQueue.Remove(c)
		return c.finish(ClientReset, "reset while a backend was sought")
	}
	return waitingEncryption
}

// nudgeEncryption tells the handshake that its socket has news, or that its client has left.
func (c *conn) nudgeEncryption() stage {
	if c.client.failed != 0 {
		c.tell(ClientReset, "reset while a backend was sought")
		c.giveUpEncryption("")
	}
	if c.backend.hup || c.backend.exact {
		c.dial.hs.wire.cut.Store(true)
	}
	c.dial.hs.wire.nudge()
	return encrypting
}

// giveUpEncryption ends a handshake whose goroutine holds the descriptor: what becomes of the conn is decided when it
// reports back.
func (c *conn) giveUpEncryption(why string) {
	c.dial.hs.why = why
	c.dial.hs.wire.gaveUp.Store(true)
	c.dial.hs.wire.nudge()
}

// encrypter is crypto/tls's side of a connection to a backend: in a goroutine of its own until the handshake is done,
// then only for as long as tickets may come.
type encrypter struct {
	conn    *conn
	how     *encryption
	tickets *tickets
	peer    ticketPeer
	name    string
	alpn    []string

	wire    backendWire
	tls     *tls.Conn
	secrets secrets
	offered *tls.ClientSessionState // the ticket that was shown
	began   int64                   // loop nanoseconds

	why     string // it was given up
	late    bool   // because it took too long: that is the server's fault
	state   tls.ConnectionState
	session *session
	err     error
}

func newEncrypter(c *conn) (*encrypter, error) {
	d := c.dial
	spec := d.backend.spec
	h := &encrypter{conn: c, how: c.route.encryption, tickets: d.backend.tickets, began: c.loop.clock()}
	h.name = h.how.nameFor(spec, c.report.sni)
	h.peer = ticketPeer{h.name, d.server.addr.Port()}
	if c.report.negotiated != "" {
		h.alpn = []string{c.report.negotiated}
	}
	h.wire.news = make(chan struct{}, 1)
	h.wire.begin(c.loop, &c.backend, nil)
	if d.introduced {
		return h, nil
	}
	p, err := c.preface()
	if err != nil {
		return nil, err
	}
	h.wire.preface, err = p.after(d.early)
	return h, err
}

// run is the goroutine: the handshake, then the keys, then back to the loop.
func (h *encrypter) run() {
	h.shake()
	h.secrets = secrets{}
	h.wire.compute(false)
	h.conn.loop.post(h.done)
}

func (h *encrypter) shake() {
	defer func() {
		if p := recover(); p != nil {
			h.err = &panicked{p}
		}
	}()
	config := h.how.offer(h.name)
	config.RootCAs, config.InsecureSkipVerify = h.how.roots, h.how.unverified
	config.NextProtos, config.ClientSessionCache, config.KeyLogWriter = h.alpn, h, &h.secrets
	h.tls = tls.Client(&h.wire, config)
	if h.err = h.tls.Handshake(); h.err != nil {
		return
	}
	h.state = h.tls.ConnectionState()
	h.session, h.err = h.takeKeys()
}

// takeKeys makes the record engine's halves. In TLS 1.3 tickets may come before data.
func (h *encrypter) takeKeys() (*session, error) {
	s, err := h.wire.engine(&h.secrets, &h.state, record.Client)
	if err == nil && h.state.Version == tls.VersionTLS13 {
		s.tickets = h
	}
	return s, err
}

// done is back on the loop: the handshake is over, one way or the other.
func (h *encrypter) done() {
	l := h.conn.loop
	l.encryptQueue.Leave(h.conn, 1)
	h.conn.encrypted(h)
	l.startHandshakes()
}

// encrypted goes on behind the handshake with the backend.
func (c *conn) encrypted(h *encrypter) {
	defer c.rescue()
	l := c.loop
	c.dial.hs, h.conn = nil, nil
	c.backend.readable = !h.wire.drained || len(h.wire.news) > 0 || c.backend.hup
	c.backend.writable = true
	result, why := h.result(c)
	l.counters.encrypted(result, result == encryptionOK && h.state.DidResume)
	switch result {
	case encryptionAbandoned:
		abort(&c.backend)
		c.finish(ClientReset, "")
	case encryptionFault:
		c.goOn(c.unconnected(Internal, why))
	case encryptionOK:
		h.handOver(c)
	default:
		if h.late {
			c.blame(c.dial.server, why)
		}
		c.goOn(c.nextBackend(why))
	}
}

// encryptionDue is the end of the patience with a backend. If it has answered just now, its handshake goes on.
func (c *conn) encryptionDue() {
	h := c.dial.hs
	switch {
	case h.why != "": // it was given up before
	case h.wire.waits():
		h.late = true
		c.giveUpEncryption("no answer to the TLS handshake in time")
	default:
		c.setDeadline(int64(time.Second))
	}
}

func (h *encrypter) handOver(c *conn) {
	c.backend.tls = h.session
	c.report.halves += 2
	if rest := h.wire.rest(); len(rest) > 0 {
		c.down.carry = append(c.loop.lend(len(rest)), rest...)
	}
	c.report.encrypted(&h.state, c.loop.now-h.began)
	c.loop.counters.spans[backendHandshakeSpan].note(c.report.backendShook)
	h.wire.buf, h.wire.over, h.session, h.state = nil, true, nil, tls.ConnectionState{}
	h.wire.forget()
	c.goOn(c.found())
}

// encryptionResult is what became of a handshake with a backend, in one word. The list is closed: it is a label of the
// metrics.
type encryptionResult uint8

const (
	encryptionOK         encryptionResult = iota
	encryptionUnverified                  // its certificate is not accepted
	encryptionRefused                     // it sent an alert
	encryptionNoTLS                       // it does not speak TLS
	encryptionClosed                      // it left, or reset the connection
	encryptionTimeout                     // it did not answer in time
	encryptionAbandoned                   // the client left, or the gateway ends
	encryptionFailed                      // what it says is wrong, or nothing can be agreed on
	encryptionFault                       // of tlsnat's
	encryptionResults
)

var encryptionWords = [encryptionResults]string{"ok", "certificate", "alert", "no_tls", "closed", "timeout", "abandoned", "failed", "internal"}

// Encryptions is how many handshakes with tls:// backends ended in the same way. All ways there are are listed.
type Encryptions struct {
	Result  string `json:"result"`
	Resumed bool   `json:"resumed"`
	Count   uint64 `json:"count"`
}

func (n *counters) encrypted(r encryptionResult, resumed bool) {
	i := 0
	if resumed {
		i = 1
	}
	n.encryptions[r][i].Add(1)
}

// encryptions sums them. Only what has succeeded can have been resumed.
func (g *Gateway) encryptions() (all []Encryptions) {
	for r, word := range encryptionWords {
		for i := range 2 {
			if i == 0 || encryptionResult(r) == encryptionOK {
				n := g.total(func(n *counters) *atomic.Uint64 { return &n.encryptions[r][i] })
				all = append(all, Encryptions{word, i == 1, n})
			}
		}
	}
	return all
}

// result is what became of the handshake, and if it failed why.
func (h *encrypter) result(c *conn) (encryptionResult, string) {
	switch {
	case c.report.told:
		return encryptionAbandoned, ""
	case h.why != "":
		return encryptionTimeout, h.why
	case errors.As(h.err, new(*panicked)):
		return encryptionFault, h.err.Error()
	case h.err != nil:
		return h.reason(c.backend.failed)
	}
	return encryptionOK, ""
}

// reason finds the words for a handshake that failed: the backend's certificate, its alert, or what else it did.
func (h *encrypter) reason(failed unix.Errno) (encryptionResult, string) {
	err := h.err
	var unverified *tls.CertificateVerificationError
	var op *net.OpError
	var errno unix.Errno
	switch {
	case errors.As(err, &unverified):
		return encryptionUnverified, "its certificate is not accepted: " + strings.TrimPrefix(unverified.Err.Error(), "x509: ")
	case errors.As(err, &op) && op.Op == "remote error":
		if v := reflect.ValueOf(op.Err); v.Kind() == reflect.Uint8 { // crypto/tls keeps the type of its alerts to itself
			return encryptionRefused, "it refused the TLS handshake with the alert " + record.Alert(v.Uint()).String()
		}
	case h.wire.in.alert > 0:
		return encryptionRefused, "it refused the TLS handshake with the alert " + record.Alert(h.wire.in.alert).String()
	case errors.As(err, new(tls.RecordHeaderError)):
		return encryptionNoTLS, "it does not speak TLS"
	case errors.As(err, &errno) && streamCalls.mean(errno) != meansGone:
		return encryptionFault, "TLS handshake: " + errno.Error()
	case failed != 0:
		return encryptionClosed, "TLS handshake: " + failed.Error()
	case errno != 0:
		return encryptionClosed, "TLS handshake: " + errno.Error()
	case errors.Is(err, io.EOF):
		return encryptionClosed, "it left during the TLS handshake"
	}
	return encryptionFailed, "TLS handshake: " + strings.TrimPrefix(err.Error(), "tls: ")
}

// masterMark begins our entry in a session of TLS 1.2: its master secret, which crypto/tls does not log when the
// session is resumed.
var masterMark = []byte("tlsnat/master")

// Get and Put are the tls.ClientSessionCache of this one connection.
func (h *encrypter) Get(string) (*tls.ClientSessionState, bool) {
	cs := h.tickets.take(h.peer)
	if cs == nil {
		return nil, false
	}
	h.offered = cs
	if _, state, err := cs.ResumptionState(); err == nil {
		for _, extra := range state.Extra {
			if master, ok := bytes.CutPrefix(extra, masterMark); ok && len(master) == masterLen {
				h.secrets.master.set(master) // unless the backend prefers to shake hands in full: then the log has another
			}
		}
	}
	return cs, true
}

// Put takes a ticket: in TLS 1.2 during the handshake, with the master secret in it; in TLS 1.3 when one has come.
// No ticket at all means that the one that was shown is no good.
func (h *encrypter) Put(_ string, cs *tls.ClientSessionState) {
	if cs == nil {
		h.tickets.drop(h.peer, h.offered)
		return
	}
	if h.secrets.master.n > 0 {
		ticket, state, err := cs.ResumptionState()
		if err != nil {
			return
		}
		state.Extra = [][]byte{append(append([]byte(nil), masterMark...), h.secrets.master.bytes()...)}
		if cs, err = tls.NewResumptionState(ticket, state); err != nil {
			return
		}
	}
	h.tickets.put(h.peer, cs)
}

// maxTicketRecord bounds the records that are looked at for tickets. One that has a client's chain in it has some KiB.
const maxTicketRecord = 8 << 10

// copyTicket copies the first record of b, if it may be a ticket: the engine opens records in place.
func (s *session) copyTicket(b []byte) []byte {
	if n := s.reader.Need(b); n <= len(b) && n <= maxTicketRecord {
		return append([]byte(nil), b[:n]...)
	}
	return nil
}

// takeTicket has crypto/tls read a record of NewSessionTicket messages (RFC 8446, section 4.6.1): only it knows the
// resumption secret. It reads them in order and nothing else, so with the first record of another kind that is over.
func (s *session) takeTicket(rec []byte, kind record.Kind) {
	if kind != record.Ignored || rec == nil {
		s.tickets = nil
		return
	}
	h := s.tickets
	h.wire.after = rec
	var none [1]byte
	_, _ = h.tls.Read(none[:]) // ends with errNoMore, as there is no data in it
}

// errNoMore is temporary: crypto/tls can go on afterwards.
var errNoMore = os.ErrDeadlineExceeded

// backendWire is a wire until the handshake is over, and from then on what takeTicket hands out.
type backendWire struct {
	wire
	over  bool
	after []byte
}

func (w *backendWire) Read(p []byte) (int, error) {
	if !w.over {
		return w.wire.Read(p)
	}
	n := copy(p, w.after)
	if w.after = w.after[n:]; n == 0 {
		return 0, errNoMore
	}
	return n, nil
}

// Write forgets what crypto/tls would say of a ticket, an alert: that is the record engine's affair.
func (w *backendWire) Write(p []byte) (int, error) {
	if !w.over {
		return w.wire.Write(p)
	}
	return len(p), nil
}
