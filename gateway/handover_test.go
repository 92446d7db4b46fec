// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// recut lets crypto/tls shake hands and writes its protected handshake records anew: cut, with others before or with
// more in them. What comes after the handshake has to be written with the penman, since crypto/tls counts its own records.
type recut struct {
	net.Conn
	t       testing.TB
	version uint16
	client  bool                                             // crypto/tls is the client
	change  func(p *penman, typ byte, content []byte) []byte // what is written for a protected record
	log     bytes.Buffer
	master  []byte // of the TLS 1.2 session that is resumed

	said, heard []byte // randoms
	suite       uint16
	changed     bool
	pen         *penman // has the keys of the handshake
	opened      uint64  // records of crypto/tls that were opened
	waiting     []byte  // a record that was read
}

// note takes randoms and cipher suite out of a record with a hello.
func (r *recut) note(rec []byte, random *[]byte) {
	if rec[0] != 22 || r.changed || len(rec) < 50 || rec[5] > 2 {
		return
	}
	*random = slices.Clone(rec[11:43])
	if rec[5] == 2 {
		r.suite = binary.BigEndian.Uint16(rec[44+rec[43]:])
	}
}

func (r *recut) Read(b []byte) (int, error) {
	if len(r.waiting) == 0 {
		r.waiting = make([]byte, 5)
		if _, err := io.ReadFull(r.Conn, r.waiting); err != nil {
			return 0, err
		}
		r.waiting = append(r.waiting, make([]byte, binary.BigEndian.Uint16(r.waiting[3:]))...)
		if _, err := io.ReadFull(r.Conn, r.waiting[5:]); err != nil {
			return 0, err
		}
		if r.waiting[5] == 1 || r.waiting[5] == 2 {
			r.note(r.waiting, &r.heard)
		}
	}
	n := copy(b, r.waiting)
	r.waiting = r.waiting[n:]
	return n, nil
}

func (r *recut) Write(b []byte) (int, error) {
	var out []byte
	for rest := b; len(rest) > 0; {
		n := 5 + int(binary.BigEndian.Uint16(rest[3:]))
		rec := rest[:n]
		rest = rest[n:]
		switch {
		case rec[0] == 23 || r.changed && r.version == tls.VersionTLS12:
			out = append(out, r.again(rec)...)
			continue
		case rec[0] == 20:
			r.changed = true
		default:
			r.note(rec, &r.said)
		}
		out = append(out, rec...)
	}
	_, err := r.Conn.Write(out)
	return len(b), err
}

// again is what is written for a protected record of crypto/tls.
func (r *recut) again(rec []byte) []byte {
	if r.pen == nil {
		r.pen = &penman{version: r.version, keys: r.keys()}
	}
	theirs := &penman{version: r.version, keys: r.pen.keys, seq: r.opened}
	r.opened++
	typ, content := theirs.open(r.t, rec)
	if typ != 22 {
		return r.pen.record(typ, content)
	}
	return r.change(r.pen, typ, content)
}

// keys are those that our side's handshake records are sealed with.
func (r *recut) keys() (k record.Keys) {
	secrets := keyLog(r.t, r.log.String())
	var err error
	if r.version == tls.VersionTLS13 {
		label := "SERVER_HANDSHAKE_TRAFFIC_SECRET"
		if r.client {
			label = "CLIENT_HANDSHAKE_TRAFFIC_SECRET"
		}
		k, err = record.TrafficKeys(r.suite, secrets[label])
	} else {
		k, _, err = r.block(secrets)
	}
	if err != nil {
		r.t.Error(err)
	}
	return k
}

// block has the keys of TLS 1.2: what our side writes with first.
func (r *recut) block(secrets map[string][]byte) (ours, theirs record.Keys, err error) {
	if secrets["CLIENT_RANDOM"] != nil {
		r.master = secrets["CLIENT_RANDOM"]
	}
	if r.client {
		return record.KeyBlock(r.suite, r.master, r.said, r.heard)
	}
	theirs, ours, err = record.KeyBlock(r.suite, r.master, r.heard, r.said)
	return ours, theirs, err
}

// open undoes record.
func (p *penman) open(t testing.TB, rec []byte) (typ byte, content []byte) {
	nonce := make([]byte, 12)
	copy(nonce, p.keys.IV())
	var seq [8]byte
	binary.BigEndian.PutUint64(seq[:], p.seq)
	for i, x := range seq {
		nonce[4+i] ^= x
	}
	header, body := rec[:5], rec[5:]
	aad := header
	if p.version == tls.VersionTLS12 {
		if len(p.keys.IV()) == 4 {
			copy(nonce[4:], body)
			body = body[8:]
		}
		n := len(body) - 16
		aad = append(slices.Clone(seq[:]), header[0], 3, 3, byte(n>>8), byte(n))
	}
	content, err := p.aead().Open(nil, nonce, body, aad)
	if err != nil {
		t.Errorf("a record of crypto/tls: %v", err)
		return 0, nil
	}
	if p.version == tls.VersionTLS12 {
		return header[0], content
	}
	return content[len(content)-1], content[:len(content)-1]
}

// shake shakes hands, and returns who goes on.
func (r *recut) shake(raw *net.TCPConn, c *tls.Conn) *penman {
	r.t.Helper()
	_ = raw.SetDeadline(time.Now().Add(patience))
	if err := c.Handshake(); err != nil {
		r.t.Errorf("handshake: %v", err)
		return nil
	}
	secrets := keyLog(r.t, r.log.String())
	p := &penman{TCPConn: raw, version: r.version}
	role := record.Server
	if r.client {
		role = record.Client
	}
	if r.version == tls.VersionTLS12 {
		_, theirs, err := r.block(secrets)
		if err != nil {
			r.t.Error(err)
		}
		p.keys, p.seq, p.master = r.pen.keys, r.pen.seq, r.master
		p.reader.Init(theirs, 1, role)
		return p
	}
	labels := []string{"SERVER_TRAFFIC_SECRET_0", "CLIENT_TRAFFIC_SECRET_0"}
	if r.client {
		slices.Reverse(labels)
	}
	ours, err := record.TrafficKeys(r.suite, secrets[labels[0]])
	if err != nil {
		r.t.Error(err)
	}
	theirs, err := record.TrafficKeys(r.suite, secrets[labels[1]])
	if err != nil {
		r.t.Error(err)
	}
	p.keys = ours
	p.reader.Init(theirs, 0, role)
	return p
}

// finishings are ways to write the protected records of a handshake. Those with an alert are none.
var finishings = map[string]struct {
	alert  string
	change func(p *penman, typ byte, content []byte) []byte
}{
	"as it is": {"", func(p *penman, typ byte, content []byte) []byte { return p.record(typ, content) }},
	"in two records": {"", func(p *penman, typ byte, content []byte) []byte {
		return append(p.record(typ, content[:5]), p.record(typ, content[5:])...)
	}},
	"cut in its header": {"", func(p *penman, typ byte, content []byte) []byte {
		return append(p.record(typ, content[:1]), p.record(typ, content[1:])...)
	}},
	"in pieces of 3 bytes": {"", func(p *penman, typ byte, content []byte) (out []byte) {
		for piece := range slices.Chunk(content, 3) {
			out = append(out, p.record(typ, piece)...)
		}
		return out
	}},
	"after a warning": {"", func(p *penman, typ byte, content []byte) []byte {
		return append(p.record(21, []byte{1, 90}), p.record(typ, content)...)
	}},
	"after five warnings": {"", func(p *penman, typ byte, content []byte) (out []byte) {
		for range 5 {
			out = append(out, p.record(21, []byte{1, 90})...)
		}
		return append(out, p.record(typ, content)...)
	}},
	"a message behind it": {"unexpected_message", func(p *penman, typ byte, content []byte) []byte {
		if content[0] == 20 {
			content = append(content, 0, 0, 0, 0)
		}
		return p.record(typ, content)
	}},
	"half a message behind it": {"unexpected_message", func(p *penman, typ byte, content []byte) []byte {
		if content[0] == 20 {
			content = append(content, 1, 0, 1)
		}
		return p.record(typ, content)
	}},
	"a message behind its second record": {"unexpected_message", func(p *penman, typ byte, content []byte) []byte {
		out := p.record(typ, content[:7])
		if content[0] == 20 {
			content = append(content, 4, 0, 0, 1, 0)
		}
		return append(out, p.record(typ, content[7:])...)
	}},
}

// TestFinishedOfAClientInAnyRecords: it may be cut and may have warnings before it, and what follows it must open under
// the right number; but nothing may come behind it in its record.
func TestFinishedOfAClientInAnyRecords(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	caches := map[uint16]tls.ClientSessionCache{}
	masters := map[uint16][]byte{}
	for _, kind := range []struct {
		name    string
		version uint16
		resumes bool
	}{{"TLS 1.2", tls.VersionTLS12, false}, {"TLS 1.2 resumed", tls.VersionTLS12, true}, {"TLS 1.3", tls.VersionTLS13, false}} {
		for name, f := range finishings {
			t.Run(kind.name+"/"+name, func(t *testing.T) {
				if kind.resumes && caches[kind.version] == nil {
					caches[kind.version] = tls.NewLRUClientSessionCache(1)
					first := dialPenman(t, b, 0, func(c *tls.Config) {
						c.MaxVersion, c.ClientSessionCache = kind.version, caches[kind.version]
					})
					masters[kind.version] = first.master
					_ = first.Close()
					b.lineOf(t, first)
				}
				raw := b.dial(t, 0)
				r := &recut{Conn: raw, t: t, version: kind.version, client: true, change: f.change}
				config := clientConfig(t, func(c *tls.Config) { c.MaxVersion, c.KeyLogWriter = kind.version, &r.log })
				if kind.resumes {
					config.ClientSessionCache, r.master = caches[kind.version], masters[kind.version]
				}
				c := tls.Client(r, config)
				if kind.version == tls.VersionTLS12 && !kind.resumes && f.alert != "" {
					refusedInHandshake(t, b, raw, c)
					return
				}
				p := r.shake(raw, c)
				if p == nil {
					return
				}
				p.converse(t, f.alert)
				l := b.lineOf(t, p)
				want := logLine{Outcome: "ok", Alert: f.alert}
				if f.alert != "" {
					want.Outcome = "handshake_failed"
				}
				if l.Outcome != want.Outcome || l.Alert != want.Alert || l.resumed() != kind.resumes && f.alert == "" {
					t.Errorf("want %s, alert %q: %s", want.Outcome, want.Alert, l)
				}
			})
		}
	}
}

// refusedInHandshake: the gateway's last flight comes after the client's, and its alert after that.
func refusedInHandshake(t *testing.T, b *bed, raw *net.TCPConn, c *tls.Conn) {
	_ = raw.SetDeadline(time.Now().Add(patience))
	if got := refusal(c); got != "unexpected_message" {
		t.Errorf("the client saw %q", got)
	}
	_ = c.Close()
	b.lineOf(t, raw).expect(t, logLine{Outcome: "handshake_failed", Alert: "unexpected_message"})
}

// converse expects an echo, or an alert.
func (p *penman) converse(t *testing.T, alert string) {
	t.Helper()
	if alert == "" {
		for _, say := range []string{"first", "and second"} {
			want := len(p.all) + len(say)
			p.write(t, p.data([]byte(say)))
			p.read(t, want)
		}
		p.write(t, p.record(21, []byte{1, 0}))
	}
	_, got, err := p.readAll()
	if want := cmp.Or(alert, "close_notify"); got != want {
		t.Errorf("alert %q and %v, want %q", got, err, want)
	}
	_ = p.Close()
}

// TestFinishedOfABackendInAnyRecords is the same in the other role.
func TestFinishedOfABackendInAnyRecords(t *testing.T) {
	beside(t)
	type backend struct {
		name, alert string
		heard       chan string
	}
	var backends []backend
	var rules strings.Builder
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for name, f := range finishings {
			heard := make(chan string, 1)
			addr := serve(t, func(raw *net.TCPConn) {
				r := &recut{Conn: raw, t: t, version: version, change: f.change}
				config := serverConfig(t, version)
				config.KeyLogWriter, config.SessionTicketsDisabled = &r.log, true
				if s := tls.Server(r, config); f.alert != "" {
					heard <- refusal(s)
				} else {
					heard <- r.shake(raw, s).echo()
				}
			})
			what, how := "", " mode=tcp"
			if f.alert != "" { // the client is told by an alert, not by a reset
				what, how = "edge.test ", ""
			}
			fmt.Fprintf(&rules, ":{%d} %s-> tls://%s backend-ca=root backend-name=edge.test%s\n", len(backends), what, addr, how)
			backends = append(backends, backend{tls.VersionName(version) + "/" + name, f.alert, heard})
		}
	}
	b := start(t, rules.String(), trusting(t))
	for i, x := range backends {
		t.Run(x.name, func(t *testing.T) {
			if x.alert != "" {
				l, _ := b.disappoint(t, i)
				l.expect(t, logLine{Outcome: "connect_failed"})
			} else {
				c := b.dial(t, i)
				exchange(t, c, []byte("there and back"))
				exchange(t, c, []byte("and again"))
				_ = c.CloseWrite()
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
				b.lineOf(t, c).expect(t, logLine{Outcome: "ok"})
			}
			if got := <-x.heard; got != x.alert {
				t.Errorf("the backend heard the alert %q, want %q", got, x.alert)
			}
		})
	}
}

// refusal is the alert that a handshake ends with, or the first read after it.
func refusal(c *tls.Conn) string {
	err := c.Handshake()
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil {
		return "none"
	}
	words, isAlert := strings.CutPrefix(err.Error(), "remote error: tls: ")
	if !isAlert {
		return err.Error()
	}
	return strings.ReplaceAll(words, " ", "_")
}

// echo sends everything back, and says which alert came but a close_notify.
func (p *penman) echo() string {
	if p == nil {
		return "no handshake"
	}
	for {
		from := len(p.all)
		done, alert, err := p.step()
		switch {
		case done && alert == "close_notify":
			_, _ = p.TCPConn.Write(p.record(21, []byte{1, 0}))
			_ = p.Close()
			return ""
		case done:
			return fmt.Sprint(alert, err)
		}
		_, _ = p.TCPConn.Write(p.data(p.all[from:]))
	}
}

// TestLongCertificateIsNoServerHello: in TLS 1.2 a Certificate message may have more than a record, and its second record
// may begin with any byte.
func TestLongCertificateIsNoServerHello(t *testing.T) {
	beside(t)
	a := pki(t)
	for _, filling := range []byte{1, 2, 11} {
		long, err := issue(a.middle, "long", ecdsaKey, "edge.test")
		if err == nil {
			long.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 1}, Value: bytes.Repeat([]byte{filling}, 20<<10)}}
			long, err = long.signedBy(a.middle)
		}
		if err != nil {
			t.Fatal(err)
		}
		config := serverConfig(t, tls.VersionTLS12)
		config.Certificates = []tls.Certificate{long.certificate(a)}
		backend := serve(t, func(c *net.TCPConn) {
			s := tls.Server(c, config)
			_, _ = io.Copy(s, s)
			_ = s.Close()
		})
		file := writeFile(t, "edge.pem", slices.Concat(long.pem(), a.middle.pem(), long.keyPEM()))
		b := start(t, ":{0} edge.test -> "+echoServer(t)+"\n:{1} -> tls://"+backend+" mode=tcp backend-ca=root backend-name=edge.test",
			trusting(t), "CERTS="+filepath.Dir(file))
		t.Run(fmt.Sprintf("of ours, of bytes %d", filling), func(t *testing.T) {
			exchange(t, b.dialTLS(t, 0, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), []byte("there and back"))
		})
		t.Run(fmt.Sprintf("of a backend, of bytes %d", filling), func(t *testing.T) {
			exchange(t, b.dial(t, 1), []byte("there and back"))
		})
	}
}

// TestAlertReachesWhoKeepsSending: what a client, or a backend, sends after a breach is read for a while, since unread bytes
// would make the close a reset, which overtakes the alert.
func TestAlertReachesWhoKeepsSending(t *testing.T) {
	beside(t)
	x := newCrossing(t)
	w := newWitness(t)
	b := start(t, ":{0} edge.test -> "+w.addr)
	keepSending := func(t *testing.T, p *penman) {
		p.write(t, []byte{20, 3, 3, 0, 1, 1})
		for range 20 {
			time.Sleep(2 * time.Millisecond)
			p.write(t, make([]byte, 4000))
		}
		if _, alert, err := p.readAll(); alert != "unexpected_message" {
			t.Errorf("saw the alert %q and %v", alert, err)
		}
		_ = p.Close()
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run("client/"+tls.VersionName(version), func(t *testing.T) {
			p := dialPenman(t, b, 0, func(c *tls.Config) { c.MaxVersion = version })
			keepSending(t, p)
			b.lineOf(t, p).expect(t, logLine{Outcome: "tls_error"})
		})
	}
	for _, way := range ways {
		if way.backend != 0 {
			t.Run("backend/"+way.name, func(t *testing.T) {
				client := x.enter(t, way)
				keepSending(t, serverPenman(t, <-x.backends[way.backend], way.backend))
				_ = client.tcp.Close()
				x.lineOf(t, client.tcp).expect(t, logLine{Outcome: "tls_error"})
			})
		}
	}
}

// TestTicketsOfABackendInPieces: messages are counted, not records; and a ticket that is none ends the connection.
func TestTicketsOfABackendInPieces(t *testing.T) {
	beside(t)
	x := newCrossing(t)
	good := append([]byte{4, 0, 0, 33, 0, 0, 14, 16, 1, 2, 3, 4, 1, 9, 0, 19}, make([]byte, 20)...)[:4+33]
	broken := slices.Clone(good)
	broken[15]++ // the ticket is said to be a byte longer than it is
	for _, w := range ways {
		if w.backend != tls.VersionTLS13 {
			continue
		}
		for name, c := range map[string]struct {
			message []byte
			size    int
			alert   string
		}{
			"whole": {good, 100, ""}, "of a byte": {good, 1, ""}, "of 7 bytes": {good, 7, ""},
			"broken": {broken, 100, "decode_error"}, "broken, of a byte": {broken, 1, "decode_error"},
		} {
			t.Run(w.name+"/"+name, func(t *testing.T) {
				client := x.enter(t, w)
				p := serverPenman(t, <-x.backends[w.backend], w.backend)
				var out []byte
				for range 3 {
					for piece := range slices.Chunk(c.message, c.size) {
						out = append(out, p.record(22, piece)...)
					}
				}
				p.write(t, append(out, p.data([]byte("behind the tickets"))...))
				if c.alert != "" {
					if _, alert, _ := p.readAll(); alert != c.alert {
						t.Errorf("alert %q, want %q", alert, c.alert)
					}
					_, _ = p.Close(), client.tcp.Close()
					x.lineOf(t, client.tcp).expect(t, logLine{Outcome: "tls_error", BackendAlert: c.alert})
					return
				}
				p.write(t, p.record(21, []byte{1, 0}))
				_ = p.CloseWrite()
				client.expect(t, []byte("behind the tickets"), fin)
				client.finish()
				_, _, _ = p.readAll()
				_, _ = p.Close(), client.tcp.Close()
				x.lineOf(t, client.tcp).expect(t, logLine{Outcome: "ok"})
			})
		}
	}
}
