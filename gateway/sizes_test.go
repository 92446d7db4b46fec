// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"
	_ "unsafe" // for linkname

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// The cipher suites of TLS 1.3 can't be chosen in a tls.Config. These are what crypto/tls offers and prefers; it keeps them
// where other projects reach for them as well (go.dev/issue/67401).
//
//go:linkname suites13 crypto/tls.defaultCipherSuitesTLS13
var suites13 []uint16

//go:linkname suites13NoAES crypto/tls.defaultCipherSuitesTLS13NoAES
var suites13NoAES []uint16

// recordSizes are one, the sizes at which a record of data is as long as what surrounds it, those around a vector's worth,
// a page and a full record, and all of them mixed.
var recordSizes = []int{1, 2, 15, 16, 17, 18, 100, 237, 238, 1023, 1024, 1025, 4095, 4096, 4097, 16383, 16384, mixedSizes}

const mixedSizes = 0

// delivery is one case: what is sent, how, from where to where, and how it is read.
type delivery struct {
	suite   uint16 // of the client
	backend string // "plain", "tls", "unix"
	down    bool   // from the backend to the client
	size    int    // of a record; of a write, where no TLS is spoken
	count   int
	burst   bool   // all records in one write, as with OpenSSL's memory BIOs; else a write for each
	reader  string // "fast", "slow", "bursts"
	inner   uint16 // the suite that the backend speaks
}

func (d delivery) String() string {
	way, pace := "up", "one by one"
	if d.down {
		way = "down"
	}
	if d.burst {
		pace = "in a burst"
	}
	inner := ""
	if d.backend == "tls" {
		inner = " " + tls.CipherSuiteName(d.inner)
	}
	return fmt.Sprintf("%s, %s%s backend, %s, %d of %d bytes, %s, %s reader", tls.CipherSuiteName(d.suite), d.backend, inner, way, d.count, d.size, pace, d.reader)
}

var sizeSuites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}

// deliveries are the cases. For each backend and direction: each value of every axis, in pairs that a generator with a
// fixed seed chooses; and each small size in a burst of thousands, which more vectors would be than a call takes.
func deliveries() (all []delivery) {
	const most = 4 << 20 // bytes of a case
	for i, backend := range []string{"plain", "tls", "unix"} {
		for _, down := range []bool{false, true} {
			rng := rand.New(rand.NewPCG(uint64(i), uint64(len(all))))
			suites, counts, readers, paces := rng.Perm(len(recordSizes)), rng.Perm(len(recordSizes)), rng.Perm(len(recordSizes)), rng.Perm(len(recordSizes))
			for j, size := range recordSizes {
				d := delivery{suite: sizeSuites[suites[j]%len(sizeSuites)], backend: backend, down: down, size: size,
					count: []int{1, 5, 6000}[counts[j]%3], reader: []string{"fast", "slow", "bursts"}[readers[j]%3],
					burst: paces[j]%2 == 0, inner: sizeSuites[3+(suites[j]+j)%3]}
				d.count = min(d.count, most/max(size, 512))
				all = append(all, d)
				if size == mixedSizes || size > 1024 {
					continue
				}
				d.suite, d.count, d.burst = sizeSuites[(suites[j]+1)%len(sizeSuites)], 10_000, true
				if isTLS13(d.suite) && j%2 == 0 {
					d.inner = d.suite
				}
				all = append(all, d)
			}
		}
	}
	return all
}

func isTLS13(suite uint16) bool { return suite>>8 == 0x13 }

// TestSizesAreAllCarried: records of every size, few and many, arrive whole and in order, whoever speaks TLS to whom and
// however quickly they are read.
func TestSizesAreAllCarried(t *testing.T) {
	bySuite := map[uint16][]delivery{}
	for _, d := range deliveries() {
		if underRace {
			d.count = min(d.count, 1500)
		}
		bySuite[d.suite] = append(bySuite[d.suite], d)
	}
	aes, none := suites13, suites13NoAES
	t.Cleanup(func() { suites13, suites13NoAES = aes, none })
	for _, suite := range sizeSuites {
		t.Run(tls.CipherSuiteName(suite), func(t *testing.T) {
			if suites13, suites13NoAES = aes, none; isTLS13(suite) {
				suites13, suites13NoAES = []uint16{suite}, []uint16{suite}
			}
			x := newPost(t)
			for _, d := range bySuite[suite] {
				began := time.Now()
				x.deliver(t, d)
				if took := time.Since(began); took > 2*time.Second {
					t.Logf("%v: %s", took, d)
				}
				if t.Failed() {
					return
				}
			}
		})
	}
}

// post is a gateway with a backend of every kind.
type post struct {
	*bed
	ports    map[string]int
	arrivals map[string]chan net.Conn
}

func newPost(t *testing.T) *post {
	x := &post{ports: map[string]int{}, arrivals: map[string]chan net.Conn{}}
	mapText := ""
	for i, kind := range []string{"plain", "tls", "unix"} {
		network, at, to := "tcp", "127.0.0.1:0", ""
		if kind == "unix" {
			network, at = "unix", filepath.Join(testkit.Dir(t), "backend.sock")
		}
		l, err := net.Listen(network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		switch kind {
		case "unix":
			to = "unix:" + at
		case "tls":
			to = "tls://" + l.Addr().String()
		default:
			to = l.Addr().String()
		}
		mapText += fmt.Sprintf(":{%d} edge.test -> %s backend-ca=root backend-name=edge.test\n", i, to)
		if kind != "tls" {
			mapText = mapText[:len(mapText)-len(" backend-ca=root backend-name=edge.test\n")] + "\n"
		}
		arrivals := make(chan net.Conn, 1)
		x.ports[kind], x.arrivals[kind] = i, arrivals
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				arrivals <- c
			}
		}()
	}
	x.bed = start(t, mapText, "CONNECT_TIMEOUT=1m", "HELLO_TIMEOUT=1m", "BACKEND_CAS="+filepath.Dir(pki(t).rootFile(t)))
	return x
}

// deliver makes a connection and carries one case through it.
func (x *post) deliver(t *testing.T, d delivery) {
	t.Helper()
	client, backend := x.meet(t, d)
	defer client.raw.Close()
	defer backend.raw.Close()
	from, to := client, backend
	if d.down {
		from, to = backend, client
	}
	cuts, want := d.content()
	sent := make(chan error, 1)
	go func() { sent <- from.send(want, cuts, d.burst) }()
	got, err := to.read(d.reader, len(want))
	if e := <-sent; e != nil {
		t.Errorf("%s: write: %v", d, e)
	}
	if err != nil {
		t.Errorf("%s: read: %v", d, err)
	}
	if diff := difference(got, want); diff != "" {
		t.Errorf("%s: %s", d, diff)
	}
	if err := to.finish(); err != nil {
		t.Errorf("%s: %v", d, err)
	}
	if t.Failed() {
		t.Fatal(x.known(t, client.raw))
	}
	l := x.lineOf(t, client.raw)
	if n := map[bool]int64{false: l.BytesUp, true: l.BytesDown}[d.down]; l.Outcome != "ok" || n != int64(len(want)) {
		t.Errorf("%s: %s", d, l)
	}
}

// known is what the gateway knows of a client's connection.
func (x *post) known(t *testing.T, client net.Conn) string {
	return (&crossing{bed: x.bed}).known(t, client)
}

func (x *post) meet(t *testing.T, d delivery) (client, backend *correspondent) {
	raw := x.dial(t, x.ports[d.backend])
	client = newCorrespondent(raw, func(c net.Conn) *tls.Conn {
		return tls.Client(c, clientConfig(t, func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites, c.DynamicRecordSizingDisabled = tls.VersionTLS13, []uint16{d.suite}, true
			if !isTLS13(d.suite) {
				c.MaxVersion = tls.VersionTLS12
			}
		}))
	})
	if err := client.Conn.(*tls.Conn).Handshake(); err != nil {
		t.Fatalf("%s: %v", d, err)
	}
	if got := client.Conn.(*tls.Conn).ConnectionState().CipherSuite; got != d.suite {
		t.Fatalf("%s: the suite is %s", d, tls.CipherSuiteName(got))
	}
	arrived := x.arrived(t, d.backend)
	_ = arrived.SetDeadline(time.Now().Add(patience))
	if d.backend != "tls" {
		return client, newCorrespondent(arrived, nil)
	}
	version := uint16(tls.VersionTLS12)
	if isTLS13(d.inner) {
		version = tls.VersionTLS13
	}
	backend = newCorrespondent(arrived, func(c net.Conn) *tls.Conn {
		config := serverConfig(t, version)
		config.CipherSuites, config.DynamicRecordSizingDisabled = []uint16{d.inner}, true
		return tls.Server(c, config)
	})
	if err := backend.Conn.(*tls.Conn).Handshake(); err != nil {
		t.Fatalf("%s: %v", d, err)
	}
	return client, backend
}

// arrived is the next connection that has reached a backend. Those that the gateway has closed are of an earlier client.
func (x *post) arrived(t *testing.T, kind string) net.Conn {
	t.Helper()
	for late := time.After(patience); ; {
		select {
		case c := <-x.arrivals[kind]:
			if !hungUp(t, c) {
				t.Cleanup(func() { _ = c.Close() })
				return c
			}
			_ = c.Close()
		case <-late:
			t.Fatal("nothing reached the backend")
		}
	}
}

// hungUp says whether the other end of a connection has closed it, and nothing is to be read before that.
func hungUp(t *testing.T, c net.Conn) (over bool) {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			n, _, e := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			over = e == nil && n == 0 || e == unix.ECONNRESET
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return over
}

// content is what is sent, and where it is cut.
func (d delivery) content() (cuts []int, all []byte) {
	rng := rand.New(rand.NewPCG(1, uint64(d.count)))
	total := 0
	for range d.count {
		n := d.size
		if n == mixedSizes {
			n = recordSizes[rng.IntN(len(recordSizes)-1)]
		}
		cuts = append(cuts, n)
		total += n
	}
	return cuts, random(uint64(d.size), total)
}

// correspondent is one end of a connection, with TLS or without.
type correspondent struct {
	net.Conn
	raw net.Conn
	dam *dam
}

func newCorrespondent(raw net.Conn, speak func(net.Conn) *tls.Conn) *correspondent {
	c := &correspondent{raw: raw, dam: &dam{Conn: raw}}
	if c.Conn = c.dam; speak != nil {
		c.Conn = speak(c.dam)
	}
	return c
}

// dam holds back what is written until it is let go.
type dam struct {
	net.Conn
	closed bool
	held   bytes.Buffer
}

func (d *dam) Write(b []byte) (int, error) {
	if d.closed {
		return d.held.Write(b)
	}
	return d.Conn.Write(b)
}

func (c *correspondent) send(b []byte, cuts []int, burst bool) error {
	c.dam.closed = burst
	for _, n := range cuts {
		if _, err := c.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	if c.dam.closed = false; burst {
		if _, err := c.raw.Write(c.dam.held.Bytes()); err != nil {
			return err
		}
	}
	return c.finish()
}

// finish ends this end's stream.
func (c *correspondent) finish() error {
	if s, ok := c.Conn.(*tls.Conn); ok {
		if err := s.CloseWrite(); err != nil {
			return err
		}
		_ = c.raw.SetWriteDeadline(time.Now().Add(patience))
	}
	return c.raw.(interface{ CloseWrite() error }).CloseWrite()
}

// read reads to the end of the stream.
func (c *correspondent) read(how string, size int) ([]byte, error) {
	got := make([]byte, 0, size+bytes.MinRead)
	buf := make([]byte, 1<<20)
	for pause := 0; ; pause++ {
		room := buf
		switch how {
		case "slow":
			room = buf[:max(size/20, 1)]
			if pause < 20 {
				time.Sleep(time.Millisecond)
			}
		case "bursts":
			if pause < 3 {
				time.Sleep(10 * time.Millisecond)
			}
		}
		n, err := c.Read(room)
		if got = append(got, room[:n]...); err == io.EOF {
			return got, nil
		}
		if err != nil { // also a FIN without close_notify
			return got, err
		}
	}
}

// difference says how got is not what was wanted; "" if it is.
func difference(got, want []byte) string {
	n := min(len(got), len(want))
	at := 0
	for at < n && got[at] == want[at] {
		at++
	}
	if at == n && len(got) == len(want) {
		return ""
	}
	return fmt.Sprintf("%d bytes arrived and %d were sent; the first difference is at %d", len(got), len(want), at)
}
