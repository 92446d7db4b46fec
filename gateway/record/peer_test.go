// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
	_ "unsafe" // for linkname
)

// crypto/tls has no setting for TLS 1.3 cipher suites: these two variables, which it keeps linkable,
// are the only way to make both sides agree on a given one.
//
//go:linkname defaultCipherSuitesTLS13 crypto/tls.defaultCipherSuitesTLS13
var defaultCipherSuitesTLS13 []uint16

//go:linkname defaultCipherSuitesTLS13NoAES crypto/tls.defaultCipherSuitesTLS13NoAES
var defaultCipherSuitesTLS13NoAES []uint16

// handshaking guards them: one handshake at a time.
var handshaking sync.Mutex

// fastSuites need no RSA: one of each algorithm and version.
var fastSuites = []uint16{
	tls.TLS_AES_128_GCM_SHA256,
	tls.TLS_AES_256_GCM_SHA384,
	tls.TLS_CHACHA20_POLY1305_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
}

var allSuites = append([]uint16{
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}, fastSuites...)

var ecdsaCert = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return selfSigned(key, err)
})

var rsaCert = sync.OnceValue(func() tls.Certificate {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	return selfSigned(key, err)
})

func selfSigned(key crypto.Signer, err error) tls.Certificate {
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// errDrained ends a queue whose writer has stopped: unlike io.EOF, crypto/tls does not take it for a
// close_notify.
var errDrained = errors.New("nothing more was sent")

// queue is one direction of an in-memory connection that never blocks a writer. It keeps all it was
// given.
type queue struct {
	mu   sync.Mutex
	more sync.Cond
	all  []byte
	read int
	done bool
}

func newQueue() *queue {
	q := new(queue)
	q.more.L = &q.mu
	return q
}

func (q *queue) write(b []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all = append(q.all, b...)
	q.more.Broadcast()
}

func (q *queue) finish() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.done = true
	q.more.Broadcast()
}

// take waits for bytes and moves up to len(p) of them to p.
func (q *queue) take(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.read == len(q.all) && !q.done {
		q.more.Wait()
	}
	if q.read == len(q.all) {
		return 0, errDrained
	}
	n := copy(p, q.all[q.read:])
	q.read += n
	return n, nil
}

// rest takes what is there without waiting.
func (q *queue) rest() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := bytes.Clone(q.all[q.read:])
	q.read = len(q.all)
	return b
}

// wire is one end of an in-memory connection. Read never gives bytes of more than one record, so that
// what follows a handshake stays in the queue.
type wire struct {
	net.Conn
	in, out *queue
	left    int // bytes of the record under way, once its header was read
	header  []byte
}

func (c *wire) Read(p []byte) (int, error) {
	want := c.left
	if want == 0 {
		want = headerLen - len(c.header)
	}
	n, err := c.in.take(p[:min(want, len(p))])
	if c.left > 0 {
		c.left -= n
		return n, err
	}
	if c.header = append(c.header, p[:n]...); len(c.header) == headerLen {
		c.left = int(c.header[3])<<8 | int(c.header[4])
		c.header = nil
	}
	return n, err
}

func (c *wire) Write(p []byte) (int, error)      { c.out.write(p); return len(p), nil }
func (c *wire) Close() error                     { c.out.finish(); return nil }
func (c *wire) SetDeadline(time.Time) error      { return nil }
func (c *wire) SetReadDeadline(time.Time) error  { return nil }
func (c *wire) SetWriteDeadline(time.Time) error { return nil }

// session is a connection after its handshake: crypto/tls on the far side, our engine on the near one.
type session struct {
	t       testing.TB
	suite   uint16
	peer    *tls.Conn
	in, out *queue // from the peer, to the peer
	r       Reader
	w       Writer
	unread  []byte

	readKeys, writeKeys Keys // as they were at the start
	readSeq, writeSeq   uint64
}

// dial does a handshake between two crypto/tls ends, drops the near one and takes over with its keys.
func dial(t testing.TB, suite uint16, role Role) *session {
	t.Helper()
	handshaking.Lock()
	defer handshaking.Unlock()
	in, out := newQueue(), newQueue()
	near, far := &wire{in: in, out: out}, &wire{in: out, out: in}
	var log bytes.Buffer
	config := testConfig(suite)
	logged := config.Clone()
	logged.KeyLogWriter = &log

	ours, peer, server := tls.Server(near, logged), tls.Client(far, config), out
	if role == Client {
		ours, peer, server = tls.Client(near, logged), tls.Server(far, config), in
	}
	failed := make(chan error, 1)
	go func() { failed <- peer.Handshake() }()
	if err := errors.Join(ours.Handshake(), <-failed); err != nil {
		t.Fatal(err)
	}
	if got := peer.ConnectionState().CipherSuite; got != suite {
		t.Fatalf("handshake settled on %#04x, want %#04x", got, suite)
	}
	s := &session{t: t, suite: suite, peer: peer, in: in, out: out}
	s.takeOver(role, log.String(), server.all)
	return s
}

// takeOver goes on where the near crypto/tls stopped.
func (s *session) takeOver(role Role, keyLog string, serverBytes []byte) {
	s.t.Helper()
	s.readKeys, s.writeKeys = keysFromLog(s.t, s.suite, role, keyLog, serverBytes)
	if !isTLS13(s.suite) {
		s.readSeq = 1 // the peer's Finished was record 0
	}
	s.out.mu.Lock()
	last := lastRecord(s.out.all)
	s.out.mu.Unlock()
	s.writeSeq, _ = ProbeSequence(s.writeKeys, last, 8)
	s.r.Init(s.readKeys, s.readSeq, role)
	s.w.Init(s.writeKeys, s.writeSeq)
}

func testConfig(suite uint16) *tls.Config {
	c := &tls.Config{
		InsecureSkipVerify: true,
		CurvePreferences:   []tls.CurveID{tls.X25519},
		ClientSessionCache: tls.NewLRUClientSessionCache(1), // asks for tickets
		ServerName:         "record.test",
		CipherSuites:       []uint16{suite},
		MaxVersion:         tls.VersionTLS12,
		Certificates:       []tls.Certificate{ecdsaCert()},
		Time:               time.Now,
		// records as large as the writes: what is split is up to the tests
		DynamicRecordSizingDisabled: true,
	}
	if strings.Contains(tls.CipherSuiteName(suite), "_RSA_") {
		c.Certificates = []tls.Certificate{rsaCert()}
	}
	if isTLS13(suite) {
		c.MinVersion, c.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
		defaultCipherSuitesTLS13 = []uint16{suite}
		defaultCipherSuitesTLS13NoAES = []uint16{suite}
	}
	return c
}

// keysFromLog reads an NSS key log. serverBytes begin with the ServerHello, for its random.
func keysFromLog(t testing.TB, suite uint16, role Role, log string, serverBytes []byte) (read, write Keys) {
	t.Helper()
	var client, server Keys
	var err error
	for line := range strings.Lines(log) {
		f := strings.Fields(line)
		random, secret := unhex(t, f[1]), unhex(t, f[2])
		switch f[0] {
		case "CLIENT_TRAFFIC_SECRET_0":
			client, err = TrafficKeys(suite, secret)
		case "SERVER_TRAFFIC_SECRET_0":
			server, err = TrafficKeys(suite, secret)
		case "CLIENT_RANDOM":
			const at = headerLen + msgHeaderLen + 2
			client, server, err = KeyBlock(suite, secret, random, serverBytes[at:at+randomLen])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if role == Server {
		return client, server
	}
	return server, client
}

// lastRecord is the last whole record of b.
func lastRecord(b []byte) (rec []byte) {
	var r Reader
	for n := r.Need(b); n <= len(b) && len(b) > 0; n = r.Need(b) {
		rec, b = b[:n], b[n:]
	}
	return rec
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// send seals data into records of at most size bytes and gives them to the peer.
func (s *session) send(data []byte, size int) {
	for first := true; first || len(data) > 0; first = false {
		n := min(size, len(data))
		s.out.write(sealData(&s.w, data[:n]))
		data = data[n:]
	}
}

func sealData(w *Writer, data []byte) []byte {
	slot := make([]byte, w.Prefix()+len(data)+w.Suffix())
	copy(slot[w.Prefix():], data)
	return slot[:w.Seal(slot, len(data))]
}

// expect reads from the peer, as crypto/tls sees it.
func (s *session) expect(want []byte) {
	s.t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s.peer, got); err != nil {
		s.t.Fatalf("crypto/tls could not read what we sealed: %v", err)
	}
	if !bytes.Equal(got, want) {
		s.t.Fatal("crypto/tls read something else than we sealed")
	}
}

// receive opens what the peer has sent up to now.
func (s *session) receive() (data []byte, events []Record) {
	s.t.Helper()
	data, events, s.unread, _ = s.open(s.in.rest())
	return data, events
}

func (s *session) open(b []byte) (data []byte, events []Record, rest []byte, err error) {
	s.t.Helper()
	data, events, rest, err = openAll(&s.r, append(s.unread, b...))
	if err != nil {
		s.t.Fatal(err)
	}
	return data, events, rest, err
}

// openAll opens every whole record of b.
func openAll(r *Reader, b []byte) (data []byte, events []Record, rest []byte, err error) {
	for {
		rec, n, err := r.Next(b)
		if err != nil || n == 0 {
			return data, events, b, err
		}
		b = b[n:]
		if rec.Kind == Data {
			data = append(data, rec.Data...)
			continue
		}
		events = append(events, rec)
		if rec.Kind == CloseNotify || rec.Kind == AlertReceived {
			return data, events, b, nil
		}
	}
}

// forge seals any inner plaintext under any outer type: what a Writer would never send.
func forge(h *half, typ byte, inner []byte) []byte {
	prefix := headerLen + int(h.explicit)
	rec := append(make([]byte, prefix), inner...)
	n := len(rec) - headerLen + tagLen
	copy(rec, []byte{typ, 3, 3, byte(n >> 8), byte(n)})
	h.ready()
	aad := rec[:headerLen]
	if !h.tls13 {
		copy(rec[headerLen:prefix], h.nonce[saltLen:])
		aad = h.aad12(rec, len(inner))
	}
	rec = h.aead.Seal(rec[:prefix], h.nonce[:], bytes.Clone(inner), bytes.Clone(aad))
	h.seq++
	return rec
}

// forgeContent seals content of any type, with padding in TLS 1.3.
func forgeContent(h *half, typ byte, content []byte, padding int) []byte {
	if !h.tls13 {
		return forge(h, typ, content)
	}
	inner := append(bytes.Clone(content), typ)
	return forge(h, TypeData, append(inner, make([]byte, padding)...))
}

func eachSuite(t *testing.T, suites []uint16, f func(t *testing.T, suite uint16, role Role)) {
	for _, suite := range suites {
		for role, name := range map[Role]string{Server: "server", Client: "client"} {
			t.Run(tls.CipherSuiteName(suite)+"/"+name, func(t *testing.T) { f(t, suite, role) })
		}
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

func TestDataPassesBothWays(t *testing.T) {
	eachSuite(t, allSuites, func(t *testing.T, suite uint16, role Role) {
		s := dial(t, suite, role)
		for _, n := range []int{1, 2, 255, 1400, MaxPlaintext, 3*MaxPlaintext + 1} {
			want := pattern(n)
			if _, err := s.peer.Write(want); err != nil {
				t.Fatal(err)
			}
			if got, _ := s.receive(); !bytes.Equal(got, want) {
				t.Fatalf("%d bytes from crypto/tls came out as %d others", n, len(got))
			}
			s.send(want, MaxPlaintext)
			s.expect(want)
			s.r.Park()
			s.w.Park()
		}
	})
}

func TestKeysFollowKeyUpdate(t *testing.T) {
	eachSuite(t, fastSuites[:3], func(t *testing.T, suite uint16, role Role) {
		s := dial(t, suite, role)
		for range 3 {
			s.out.write(s.w.AppendKeyUpdate(nil, true))
			s.send([]byte("after our update"), MaxPlaintext)
			s.expect([]byte("after our update"))
			s.peer.Write([]byte("after the peer's"))
			got, events := s.receive()
			if string(got) != "after the peer's" {
				t.Fatalf("read %q", got)
			}
			if last := events[len(events)-1]; last.Kind != KeyUpdate {
				t.Fatalf("crypto/tls answered with %v, want key_update", last.Kind)
			}
		}
		s.out.write(s.w.AppendKeyUpdate(nil, false))
		s.send([]byte("x"), 1)
		s.expect([]byte("x"))
		if _, events := s.receive(); len(events) != 0 {
			t.Fatalf("an update without a request was answered: %v", events)
		}
	})
}

func TestCloseNotifyIsHalfClose(t *testing.T) {
	eachSuite(t, fastSuites, func(t *testing.T, suite uint16, role Role) {
		s := dial(t, suite, role)
		s.peer.Write([]byte("last words"))
		s.peer.CloseWrite()
		got, events := s.receive()
		if string(got) != "last words" || len(events) == 0 || events[len(events)-1].Kind != CloseNotify {
			t.Fatalf("read %q and %v, want last words and close_notify", got, events)
		}
		if _, _, err := s.r.Next(make([]byte, headerLen)); !errors.Is(err, ErrClosed) {
			t.Fatalf("reading after close_notify: %v, want ErrClosed", err)
		}
		s.send([]byte("still here"), MaxPlaintext)
		s.expect([]byte("still here"))
		s.out.write(s.w.AppendAlert(nil, AlertCloseNotify))
		if n, err := s.peer.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("crypto/tls read %d, %v after our close_notify, want EOF", n, err)
		}
	})
}

func TestAlertsArriveBothWays(t *testing.T) {
	eachSuite(t, fastSuites, func(t *testing.T, suite uint16, role Role) {
		s := dial(t, suite, role)
		s.out.write(s.w.AppendAlert(nil, AlertRecordOverflow))
		_, err := s.peer.Read(make([]byte, 1))
		if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "remote error" || op.Err != tls.AlertError(AlertRecordOverflow) && !strings.Contains(op.Err.Error(), "record overflow") {
			t.Fatalf("crypto/tls read our alert as %v", err)
		}

		s = dial(t, suite, role)
		damaged := sealData(&s.w, []byte("x"))
		damaged[len(damaged)-1] ^= 1
		s.out.write(damaged)
		s.peer.Read(make([]byte, 1))
		_, events := s.receive()
		if len(events) == 0 || events[len(events)-1].Kind != AlertReceived || events[len(events)-1].Alert != AlertBadRecordMAC {
			t.Fatalf("crypto/tls's alert came as %v, want bad_record_mac", events)
		}
	})
}

func TestProbeFindsTheSequence(t *testing.T) {
	eachSuite(t, fastSuites, func(t *testing.T, suite uint16, role Role) {
		s := dial(t, suite, role)
		want := uint64(1) // TLS 1.2: the Finished. TLS 1.3: the server's one ticket
		if isTLS13(suite) && role == Client {
			want = 0 // the client's Finished has other keys
		}
		if s.writeSeq != want {
			t.Fatalf("probe says %d, want %d", s.writeSeq, want)
		}
		for i := range uint64(5) {
			var w Writer
			w.Init(s.writeKeys, i)
			rec := sealData(&w, []byte("probed"))
			copied := bytes.Clone(rec)
			if next, ok := ProbeSequence(s.writeKeys, rec, 5); !ok || next != i+1 {
				t.Fatalf("record %d: probe says %d, %v", i, next, ok)
			}
			if !bytes.Equal(rec, copied) {
				t.Fatal("the probe changed the record")
			}
			if next, ok := ProbeSequence(s.writeKeys, rec, int(i)); ok {
				t.Fatalf("record %d was found below %d: %d", i, i, next)
			}
		}
	})
}
