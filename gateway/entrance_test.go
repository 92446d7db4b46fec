// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// knock connects from an address and says what the edge does: nil if it waits for what the client has to say, which
// it then doesn't.
func knock(t testing.TB, from, to string, says ...byte) error {
	t.Helper()
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", to)
	if err != nil {
		return err // the reset can be there before the dialler has looked
	}
	t.Cleanup(func() { _ = c.Close() })
	if len(says) > 0 { // writing nothing would take the reset away from the read
		if _, err := c.Write(says); err != nil {
			return err
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	_, err = c.Read(make([]byte, 1))
	return err
}

// echoes says whether an echo comes back, on a connection from an address.
func echoes(t testing.TB, from, to string) (*net.TCPConn, error) {
	t.Helper()
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", to)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), trade(c, []byte("hello"))
}

// refusedBy holds the counters against what has to be in them. The others are zero.
func (b *bed) refusedBy(t testing.TB, want map[string]uint64) {
	t.Helper()
	for reason, n := range b.gateway.Status().Gate.Refused {
		if n != want[reason] {
			t.Errorf("%d refused for %s, want %d", n, reason, want[reason])
		}
	}
}

// TestDeniedIsResetBeforeItSpeaks, where every rule of the port denies it; and the log says which line decided.
func TestDeniedIsResetBeforeItSpeaks(t *testing.T) {
	list := writeFile(t, "block.txt", []byte("# bad ones\n192.0.2.0/24\n127.0.0.64/28 ; and these\n"))
	b := start(t, fmt.Sprintf("default deny=127.0.0.99,@%s\n:{0} edge.test -> %s\n:{0} *.wild.test -> %[2]s\n:{1} -> %[2]s mode=tcp", list, echoServer(t)))
	for i := range 2 {
		for from, by := range map[string]string{"127.0.0.66": "127.0.0.64/28 at " + list + ":3", "127.0.0.99": "127.0.0.99/32 at TLSNAT_MAP:1:9"} {
			if err := knock(t, from, b.addr(i)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: %v, want a reset", from, err)
			}
			if i == 1 && b.gateway.Status().Gate.Unlogged > 0 {
				continue // it came to the loop where the first one has its line already
			}
			l := b.line(t, func(l logLine) bool { return strings.HasPrefix(l.Client, from) })
			if l.Level != "warn" || l.Outcome != "denied" || l.Refused != "address" || l.DecidedBy != by || l.Stage != "hello" {
				t.Errorf("line: %s, want decided_by %s", l, by)
			}
		}
	}
	exchange(t, b.dialTLS(t, 0, nil), []byte("who is not denied is let in"))
	b.refusedBy(t, map[string]uint64{"address": 4})
}

// TestRuleOfTheNameDecides, where rules of a port differ: a client is not refused before its name is known.
func TestRuleOfTheNameDecides(t *testing.T) {
	b := start(t, fmt.Sprintf(":{0} edge.test -> %s allow=127.0.0.0/8,10.0.0.0/8 deny=127.0.0.64/26\n:{0} *.wild.test -> %[1]s\n", echoServer(t)))
	dial := func(name string) error {
		c := tls.Client(dialFrom(t, "127.0.0.66", b.addr(0)), clientConfig(t, func(c *tls.Config) { c.ServerName = name }))
		if err := c.Handshake(); err != nil {
			return err
		}
		return trade(c, []byte("hello"))
	}
	if err := dial("edge.test"); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	l := b.next(t)
	if l.Outcome != "denied" || l.SNI != "edge.test" || l.JA4 == "" || l.Rule == "" || l.DecidedBy == "" || l.Stage != "match" {
		t.Errorf("line: %s", l)
	}
	if err := dial("a.wild.test"); err != nil {
		t.Error(err)
	}
	exchange(t, b.dialTLS(t, 0, nil), []byte("let in"))
}

// TestFloodOfRefusalsIsCountedNotLogged: a line and a count for each loop; the counters are exact, and so is the count.
func TestFloodOfRefusalsIsCountedNotLogged(t *testing.T) {
	beside(t)
	const n = 500
	b := start(t, ":{0} edge.test -> "+echoServer(t)+" deny=127.0.0.66")
	for range n {
		if knock(t, "127.0.0.66", b.addr(0)) == nil {
			t.Fatal("it is let in")
		}
	}
	exchange(t, b.dialTLS(t, 0, nil), []byte("let in"))
	b.refusedBy(t, map[string]uint64{"address": n})
	b.stop(t)
	lines, counted := 0, uint64(0)
	for _, l := range b.log.all() {
		if l.Outcome == "denied" && l.Count > 0 {
			counted += l.Count
			if l.Level != "warn" || l.Client != "127.0.0.66" || l.Refused != "address" {
				t.Errorf("line: %s", l)
			}
		} else if l.Outcome == "denied" {
			lines++
		}
	}
	if lines < 1 || lines > 2 || uint64(lines)+counted != n {
		t.Errorf("%d lines, and %d counted", lines, counted)
	}
	if s := b.gateway.Status().Gate; s.Unlogged != counted {
		t.Errorf("%d withheld, want %d", s.Unlogged, counted)
	}
}

// TestHellosThatFailDoNotFillTheLog: a source has a hundred lines a minute on a loop, then it is counted.
func TestHellosThatFailDoNotFillTheLog(t *testing.T) {
	b := start(t, ":{0} other.test -> "+echoServer(t), "LOOPS=1")
	hello := clientHello(t, nil)
	for range 150 {
		c := b.dial(t, 0)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
	b.stop(t)
	lines, counted := 0, uint64(0)
	for _, l := range b.log.all() {
		counted += l.Count
		if l.Outcome == "unknown_name" && l.JA4 != "" && l.SNI == "edge.test" && l.Alert == "unrecognized_name" {
			lines++
		}
	}
	if lines != 100 || counted != 50 {
		t.Errorf("%d lines, %d counted", lines, counted)
	}
}

// TestDeadPoolDoesNotFillTheLog: nor do those that nobody is there for.
func TestDeadPoolDoesNotFillTheLog(t *testing.T) {
	const n = 300
	b := start(t, ":{0} -> "+refusing(t)+" mode=tcp retries=off eject=1", "LOOPS=1")
	for range n {
		_ = knock(t, "127.0.0.1", b.addr(0))
	}
	until(t, "all are told of", func() bool {
		s := b.gateway.Status()
		return s.Connections.Outcomes["connect_failed"]+s.Connections.Outcomes["no_backend"] == n
	})
	b.stop(t)
	lines := 0
	for _, l := range b.log.all() {
		if l.Outcome == "no_backend" && l.Count == 0 {
			lines++
		}
	}
	if lines != 100 {
		t.Errorf("%d lines, want 100", lines)
	}
}

// TestConnsPerIPHoldsOverLoops: no address has more than its limit, on whichever loops; what it closes it can open again.
func TestConnsPerIPHoldsOverLoops(t *testing.T) {
	const limit, tries = 10, 60
	b := start(t, fmt.Sprintf("default conns-per-ip=%d\n:{0} -> %s mode=tcp\n:{1} -> %[2]s mode=tcp", limit, echoServer(t)), "LOOPS=2")
	var mu sync.Mutex
	var in []*net.TCPConn
	var all sync.WaitGroup
	for i := range tries {
		all.Go(func() {
			if c, err := echoes(t, "127.0.0.1", b.addr(i%2)); err == nil {
				mu.Lock()
				defer mu.Unlock()
				in = append(in, c)
			}
		})
	}
	all.Wait()
	if len(in) != limit {
		t.Fatalf("%d are in, want %d", len(in), limit)
	}
	if _, err := echoes(t, "127.0.0.2", b.addr(0)); err != nil {
		t.Errorf("another address: %v", err)
	}
	b.refusedBy(t, map[string]uint64{"conns-per-ip": tries - limit})
	if u := b.table("conns-per-ip"); u.Entries != 2 || u.Limit == 0 {
		t.Errorf("%+v", u)
	}
	_ = in[0].Close()
	b.lineOf(t, in[0])
	if _, err := echoes(t, "127.0.0.1", b.addr(1)); err != nil {
		t.Errorf("room again: %v", err)
	}
	if _, err := echoes(t, "127.0.0.1", b.addr(1)); err == nil {
		t.Error("one too many is in")
	}
}

func (b *bed) table(name string) gateway.TableUsage {
	for _, u := range b.gateway.Status().Gate.Tables {
		if u.Name == name {
			return u
		}
	}
	return gateway.TableUsage{}
}

// TestRatePerIPHoldsOverLoops, counted together for all rules below the default line, and unknown names too.
func TestRatePerIPHoldsOverLoops(t *testing.T) {
	const rate = 20
	b := start(t, fmt.Sprintf("default rate-per-ip=%d/m mode=tcp\n:{0} -> %s\n:{1} -> %[2]s\n", rate, echoServer(t)), "LOOPS=2")
	in := 0
	for i := range 3 * rate {
		if _, err := echoes(t, "127.0.0.1", b.addr(i%2)); err == nil {
			in++
		}
	}
	if in < rate || in > rate+rate { // a minute gives another 20: a slow machine may see some of them
		t.Errorf("%d are in, want %d", in, rate)
	}
	b.refusedBy(t, map[string]uint64{"rate-per-ip": uint64(3*rate - in)})
	if _, err := echoes(t, "127.0.0.2", b.addr(0)); err != nil {
		t.Errorf("another address: %v", err)
	}
}

// TestNamelessClientsPassTheGate: a header that names no client is a probe's until something is said behind it. Then the
// gate sees the load balancer, as it would see a client.
func TestNamelessClientsPassTheGate(t *testing.T) {
	headers := map[string]string{"LOCAL": "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", "UNKNOWN": "PROXY UNKNOWN\r\n", "UNSPEC": unspec,
		"LOCAL with an address": "\r\n\r\n\x00\r\nQUIT\n\x20\x11\x00\x0c\xc0\x00\x02\x07\xc0\x00\x02\x01\x0f\xa0\x01\xbb"}
	w := newWitness(t)
	b := start(t, ":{0} -> "+w.addr+" mode=tcp allow=192.0.2.0/24\n:{1} edge.test -> "+w.addr+" deny=127.0.0.9\n:{2} edge.test -> "+w.addr+
		" deny=127.0.0.9 starttls=smtp\n:{2} a.wild.test -> "+w.addr+" deny=127.0.0.9 starttls=smtp\n:{3} edge.test -> "+w.addr+" allow=192.0.2.0/24\n:{3} a.wild.test -> "+
		w.addr, "PROXY_FROM=127.0.0.9")
	hello, turned := clientHello(t, nil), uint64(0)
	for name, header := range headers {
		for i := range 4 {
			for _, together := range []bool{false, true} {
				probe := dialFrom(t, "127.0.0.9", b.addr(i))
				_, _ = io.WriteString(probe, header)
				_ = probe.CloseWrite()
				if said, err := io.ReadAll(probe); err != nil || len(said) > 0 {
					t.Errorf("%s on port %d: a probe hears %q, %v", name, i, said, err)
				}
				if l := b.lineOf(t, probe); l.Outcome != "ok" || l.Level != "debug" {
					t.Errorf("%s on port %d: line of a probe: %s", name, i, l)
				}
				c := dialFrom(t, "127.0.0.9", b.addr(i))
				if together {
					_, _ = c.Write(append([]byte(header), hello...))
				} else {
					_, _ = io.WriteString(c, header)
					waitDelivered(t, c)
					_, _ = c.Write(hello)
				}
				if said, err := io.ReadAll(c); err == nil || len(said) > 0 {
					t.Errorf("%s on port %d: who may not come in hears %q, %v", name, i, said, err)
				}
				if turned++; turned == 1 { // the others are only counted
					b.lineOf(t, c).expect(t, logLine{Outcome: "denied", Level: "warn", Client: c.LocalAddr().String()})
				}
			}
		}
	}
	b.refusedBy(t, map[string]uint64{"address": turned})
	select {
	case <-w.conns:
		t.Error("a backend was connected to")
	default:
	}
}

// TestNamelessClientsAreCounted: what they have open counts for the load balancer's address.
func TestNamelessClientsAreCounted(t *testing.T) {
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp conns-per-ip=1", "PROXY_FROM=127.0.0.9")
	for i, header := range []string{unspec, "PROXY UNKNOWN\r\n"} {
		c := dialFrom(t, "127.0.0.9", b.addr(0))
		_, _ = io.WriteString(c, header)
		if err := trade(c, []byte("hello")); (err == nil) != (i == 0) {
			t.Errorf("number %d: %v", i, err)
		}
	}
	b.refusedBy(t, map[string]uint64{"conns-per-ip": 1})
}

// TestNamelessClientCountsOnce at rate-per-ip=, though it is looked at when it comes and when it speaks.
func TestNamelessClientCountsOnce(t *testing.T) {
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp conns-per-ip=1 rate-per-ip=3/m", "PROXY_FROM=127.0.0.9")
	come := func() (net.Conn, error) {
		c := dialFrom(t, "127.0.0.9", b.addr(0))
		_, _ = io.WriteString(c, "PROXY UNKNOWN\r\n")
		waitDelivered(t, c)
		return c, trade(c, []byte("hello"))
	}
	first, err := come()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := come(); err == nil {
		t.Fatal("a second one is in")
	}
	_ = first.Close()
	b.lineOf(t, first)
	if _, err := come(); err != nil {
		t.Errorf("the third connection is not in: %v", err)
	}
	b.refusedBy(t, map[string]uint64{"conns-per-ip": 1})
}

// TestProxiedAddressCounts: behind a load balancer it is the client's address that is denied and counted.
func TestProxiedAddressCounts(t *testing.T) {
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp allow=192.0.2.0/24 deny=192.0.2.66 conns-per-ip=1", "PROXY_FROM=127.0.0.9")
	from := func(header string) (net.Conn, error) {
		c := dialFrom(t, "127.0.0.9", b.addr(0))
		_, err := c.Write([]byte(header))
		if err == nil {
			err = trade(c, []byte("hello"))
		}
		return c, err
	}
	v1 := func(client string) string { return "PROXY TCP4 " + client + " 192.0.2.1 4000 443\r\n" }
	if _, err := from(v1("192.0.2.66")); err == nil {
		t.Error("the denied one is in")
	}
	if l := b.next(t); l.Outcome != "denied" || l.Client != "192.0.2.66:4000" || !strings.HasPrefix(l.Peer, "127.0.0.9:") || l.Stage != "proxy_header" {
		t.Errorf("line: %s", l)
	}
	if _, err := from(v1("192.0.2.7")); err != nil {
		t.Error(err)
	}
	if _, err := from(v1("192.0.2.7")); err == nil {
		t.Error("a second one of the same client is in")
	}
	if _, err := from(v1("192.0.2.8")); err != nil {
		t.Error(err)
	}
	b.refusedBy(t, map[string]uint64{"address": 1, "conns-per-ip": 1})
}

// TestConnsOfALine count over its names, and end with the connection.
func TestConnsOfALine(t *testing.T) {
	b := start(t, ":{0} edge.test *.wild.test -> "+echoServer(t)+" conns=2", "LOOPS=2")
	first := b.dialTLS(t, 0, nil)
	exchange(t, b.dialTLS(t, 0, func(c *tls.Config) { c.ServerName = "a.wild.test" }), []byte("two"))
	c := tls.Client(b.dial(t, 0), clientConfig(t, nil))
	if err := c.Handshake(); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	if l := b.next(t); l.Outcome != "limited" || l.Refused != "conns" || l.Level != "warn" {
		t.Errorf("line: %s", l)
	}
	_ = first.Close()
	b.lineOf(t, first)
	exchange(t, b.dialTLS(t, 0, nil), []byte("room again"))
}

// TestHandshakesOfALine: one whose client is silent gives way to the next; established connections and those of other lines
// don't count.
func TestHandshakesOfALine(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t)+" handshakes=1\n:{0} *.wild.test -> "+echoServer(t), "LOOPS=1")
	exchange(t, b.dialTLS(t, 0, nil), []byte("established"))
	slow := slowClient(t, b.dial(t, 0))
	exchange(t, b.dialTLS(t, 0, func(c *tls.Config) { c.ServerName = "a.wild.test" }), []byte("another rule"))
	if err := slow.goOn(); err != nil {
		t.Fatal(err)
	}
	until(t, "its last message has come, and its place is free", func() bool { return b.gateway.Status().Handshakes.Full == 3 })
	silent := slowClient(t, b.dial(t, 0))
	if err := tls.Client(b.dial(t, 0), clientConfig(t, nil)).Handshake(); err == nil {
		t.Error("a newcomer is served, and nobody has had the time to answer")
	}
	time.Sleep(2 * time.Second) // leastPatience is over
	exchange(t, b.dialTLS(t, 0, nil), []byte("the next one"))
	_ = silent.goOn() // the server's word that it is over may be on its way
	if n := b.gateway.Status().Handshakes.Silent; n != 1 {
		t.Errorf("%d gave way, want 1", n)
	}
	b.refusedBy(t, map[string]uint64{"handshakes": 1})
}

// TestHandshakesOfALineAreTakenFromTheCrowd: of the silent ones of a line the source with the most of them loses its oldest, and
// no other line any; a flood of them shuts nobody out.
func TestHandshakesOfALineAreTakenFromTheCrowd(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t)+" handshakes=4\n:{0} *.wild.test -> "+echoServer(t)+" handshakes=4", "LOOPS=1")
	hello := clientHello(t, nil)
	other := &stalled{Conn: dialFrom(t, "127.0.3.66", b.addr(0)), asked: make(chan struct{}), resume: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		other.done <- tls.Client(other, clientConfig(t, func(c *tls.Config) { c.ServerName = "a.wild.test" })).Handshake()
	}()
	other.awaitFlight(t)
	slow := slowClient(t, dialFrom(t, "127.0.3.1", b.addr(0)))
	for range 3 {
		silent(t, dialFrom(t, "127.0.3.66", b.addr(0)), hello)
	}
	for range 40 {
		crowded(t, b.addr(0), hello)
		exchange(t, tls.Client(dialFrom(t, "127.0.4.1", b.addr(0)), clientConfig(t, nil)), []byte("from elsewhere"))
	}
	for _, c := range []*stalled{slow, other} {
		if err := c.goOn(); err != nil {
			t.Errorf("a slow client: %v", err)
		}
	}
	if n := b.gateway.Status().Handshakes.Silent; n < 39 || n > 43 {
		t.Errorf("%d were ended, being silent", n)
	}
}

// crowded is one more client of a crowded address. It may be turned away; else it says its words, and hears an answer.
func crowded(t *testing.T, addr string, words []byte) {
	t.Helper()
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 3, 66)}}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(200 * time.Millisecond)) // half a hello has no answer
	if _, err := c.Write(words); err == nil && len(words) > 0 {
		_, _ = c.Read(make([]byte, 1))
	}
}

// TestProtocolGoesToItsBackend: acme-tls/1 passes through to whoever answers the challenge, and the name's own rule
// ends TLS as before.
func TestProtocolGoesToItsBackend(t *testing.T) {
	a := pki(t)
	answerer, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{a.leaves["wild-ecdsa"].certificate(a)}, NextProtos: []string{"acme-tls/1"}})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, answerer, func(c net.Conn) { _ = c.(*tls.Conn).Handshake() })
	b := start(t, fmt.Sprintf(":{0} edge.test -> %s\n:{0} alpn:acme-tls/1 -> %s mode=pass\n:{0} alpn:h2 edge.test -> %[1]s", echoServer(t), answerer.Addr()))
	challenge := b.dialTLS(t, 0, func(c *tls.Config) { c.NextProtos, c.InsecureSkipVerify = []string{"acme-tls/1"}, true })
	if s := challenge.ConnectionState(); s.NegotiatedProtocol != "acme-tls/1" || !slices.Contains(s.PeerCertificates[0].DNSNames, "*.wild.test") {
		t.Errorf("the challenge went to %v, %q", s.PeerCertificates[0].DNSNames, s.NegotiatedProtocol)
	}
	exchange(t, b.dialTLS(t, 0, func(c *tls.Config) { c.NextProtos = []string{"imap"} }), []byte("as before"))
	two := b.dialTLS(t, 0, func(c *tls.Config) { c.NextProtos = []string{"h2", "http/1.1"} })
	if p := two.ConnectionState().NegotiatedProtocol; p != "h2" {
		t.Errorf("agreed on %q", p)
	}
	exchange(t, two, []byte("h2"))
}

// TestListComplaintsHaveTheirPlace: what is wrong with a file is told with its line, and what cannot be read with the
// place that names it.
func TestListComplaintsHaveTheirPlace(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := writeFile(t, name, []byte(text))
		return path
	}
	list := write("list.txt", "10.0.0.0/8\n10.0.0.1/9\n\n  bank\n")
	mapFile := write("edge.natmap", ":1 -> 127.0.0.1:1 mode=tcp deny=@"+list+"\n:2 -> 127.0.0.1:1 mode=tcp allow=192.0.2.7,@missing.txt\n:3 -> 127.0.0.1:1 mode=tcp allow=10.0.0.0/8 deny=10.0.0.0/8")
	s, err := config.ReadSettings([]string{config.Prefix + "MAP_FILE=" + mapFile, config.Prefix + "STATE=" + dir})
	if err != nil {
		t.Fatal(err)
	}
	config, problems := config.Read(s)
	got := problems.String()
	for _, want := range []string{
		list + `:2:1: "10.0.0.1/9" has bits behind its prefix; write 10.0.0.0/9, or 10.0.0.1 for the address alone`,
		list + `:4:3: "bank" is not an address or a prefix; write one such as`,
		mapFile + ":2:28: allow=@missing.txt: " + filepath.Join(filepath.Dir(mapFile), "missing.txt") + ": no such file or directory;",
		"warning: " + mapFile + ":3:28: 10.0.0.0/8 is denied at " + mapFile + ":3:45 too, which wins;",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s\nin:\n%s", want, got)
		}
	}
	if config == nil || len(config.Unusable) != 3 {
		t.Errorf("lists that cannot be read close their rules, not the gateway: %+v", config)
	}
}

// TestBandwidthIsWhatItSays: within 5 % over three seconds, both ways at once, for records and for spliced streams; and
// nobody spins meanwhile.
func TestBandwidthIsWhatItSays(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	const rate, seconds = 4_000_000, 3
	var up [2]atomic.Int64
	backend := func(i int) string {
		return serve(t, func(c *net.TCPConn) {
			go gush(c)
			drink(c, &up[i])
		})
	}
	b := start(t, fmt.Sprintf("default bandwidth=%dB/s\n:{0} edge.test -> %s\n:{1} -> %s mode=tcp", rate, backend(0), backend(1)))
	clients := []net.Conn{b.dialTLS(t, 0, nil), b.dial(t, 1)}
	var down [2]atomic.Int64
	var all sync.WaitGroup
	for i, c := range clients {
		_ = c.SetDeadline(time.Time{})
		all.Go(func() { gush(c) })
		all.Go(func() { drink(c, &down[i]) })
	}
	moved := func() [4]int64 { return [4]int64{up[0].Load(), down[0].Load(), up[1].Load(), down[1].Load()} }
	for attempt := range 3 { // the machine may have other things to do than to wake whoever fills a socket
		before, was, began := b.gateway.Status(), moved(), time.Now()
		time.Sleep(seconds * time.Second)
		is, took, after := moved(), time.Since(began).Seconds(), b.gateway.Status()
		close := true
		for i, what := range []string{"up, records", "down, records", "up, spliced", "down, spliced"} {
			share := float64(is[i]-was[i]) / (rate * took)
			t.Logf("%s: %.3f of its bandwidth", what, share)
			close = close && share > 0.95 && share < 1.05
		}
		if n := after.Gate.Paused - before.Gate.Paused; n > 4*65*uint64(took+1) {
			t.Errorf("streams waited %d times", n)
		}
		if after.Bytes.Spliced == before.Bytes.Spliced {
			t.Error("nothing was spliced")
		}
		if close {
			break
		}
		if attempt == 2 && !underRace {
			t.Error("that is not what bandwidth= says")
		}
	}
	for _, c := range clients {
		_ = c.Close()
	}
	all.Wait()
}

// gush writes until it can't.
func gush(c net.Conn) {
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// drink reads and counts until it can't.
func drink(c net.Conn, n *atomic.Int64) {
	b := make([]byte, 64<<10)
	for {
		m, err := c.Read(b)
		n.Add(int64(m))
		if err != nil {
			return
		}
	}
}

// TestSlowBandwidthDeliversAll: a few kilobytes at the lowest rates, and the end of the stream after them.
func TestSlowBandwidthDeliversAll(t *testing.T) {
	beside(t)
	b := start(t, fmt.Sprintf("default bandwidth=10KB/s\n:{0} edge.test -> %s\n:{1} -> %[1]s mode=tcp", echoServer(t)))
	data := random(3, 8<<10)
	var all sync.WaitGroup
	for _, c := range []net.Conn{b.dialTLS(t, 0, nil), b.dial(t, 1)} {
		all.Go(func() {
			began := time.Now()
			if err := trade(c, data); err != nil {
				t.Error(err)
			}
			if d := time.Since(began); d < 500*time.Millisecond {
				t.Errorf("8 KiB at 10 KB/s took %v", d)
			}
			_ = c.(interface{ CloseWrite() error }).CloseWrite()
			if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("at the end: %d, %v", n, err)
			}
		})
	}
	all.Wait()
	for range 2 {
		if l := b.next(t); l.Outcome != "ok" {
			t.Errorf("line: %s", l)
		}
	}
}

// TestFloodFromOneAddressLeavesOthersAlone: 50,000 connects of one address, and others still shake hands and have their
// echo in at most twice the time (the 99th percentile) that it takes when it is quiet.
func TestFloodFromOneAddressLeavesOthersAlone(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	flood := 50_000
	if underRace {
		flood = 2000
	}
	b := runEdge(t, "default rate-per-ip=100/s conns-per-ip=50\n:{0} edge.test -> "+echoServer(t))
	config := clientConfig(t, nil)
	address := 0
	visit := func() time.Duration {
		address++
		began := time.Now()
		c := tls.Client(dialFrom(t, fmt.Sprintf("127.0.%d.%d", 1+address/250%250, 1+address%250), b.addr(0)), config)
		defer c.Close()
		if err := trade(c, []byte("hello")); err != nil {
			t.Error(err)
		}
		return time.Since(began)
	}
	var quiet, busy time.Duration
	for range 3 { // the machine may have other things to do
		var calm, rough []time.Duration
		for range 400 {
			calm = append(calm, visit())
		}
		attacker := command(t, os.Args[0])
		attacker.Env = []string{fmt.Sprintf("%s=%d %d", floodVariable, b.ports[0], flood)}
		launch(t, attacker)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = attacker.Wait()
		}()
		for flooding := true; flooding; {
			rough = append(rough, visit())
			select {
			case <-done:
				flooding = false
			default:
			}
		}
		quiet, busy = percentile(calm, 99), percentile(rough, 99)
		t.Logf("p99 quiet %v, in the flood %v (%d visits)", quiet, busy, len(rough))
		if busy <= 2*quiet || underRace {
			break
		}
	}
	if !underRace && busy > 2*quiet {
		t.Errorf("p99 %v in the flood, %v when it is quiet", busy, quiet)
	}
	b.signal(t, unix.SIGTERM)
	if code := b.exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	refused := uint64(0)
	for _, l := range b.log.all() {
		if strings.HasPrefix(l.Client, "127.0.0.66") && l.Refused == "rate-per-ip" {
			refused += max(1, l.Count)
		}
	}
	if refused < uint64(flood)/2 {
		t.Errorf("only %d were refused", refused)
	}
}

// The attacker is a process of its own, and a humble one (SCHED_IDLE): on its machine it would not compete with the edge
// for a core.
const floodVariable = "FLOOD"

func init() {
	port, n := 0, 0
	if _, err := fmt.Sscan(os.Getenv(floodVariable), &port, &n); err != nil {
		return
	}
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0)
	to := unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}
	for range n {
		fling(&to)
	}
	os.Exit(0)
}

// fling connects from 127.0.0.66 and leaves with a reset, so that no port stays taken.
func fling(to unix.Sockaddr) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	_ = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 66}})
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Connect(fd, to)
	_ = unix.Close(fd)
}

func percentile(all []time.Duration, p int) time.Duration {
	slices.Sort(all)
	return all[len(all)*p/100]
}

// TestReloadDoesNotCountFromZero: what an address has open stays counted, also when the limit changes and lines are added
// above it.
func TestReloadDoesNotCountFromZero(t *testing.T) {
	backend := echoServer(t)
	v := startLive(t, "default conns-per-ip=2 mode=tcp\n:{0} -> "+backend+" conns=9")
	in := func() error {
		_, err := echoes(t, "127.0.0.1", v.addr(0))
		return err
	}
	for range 2 {
		if err := in(); err != nil {
			t.Fatal(err)
		}
	}
	v.reload(t, "# another line\ndefault idle=1h\n\ndefault conns-per-ip=2 mode=tcp\n:{0} -> "+backend+" conns=3")
	if in() == nil {
		t.Error("a third one is in")
	}
	v.reload(t, "default conns-per-ip=4 mode=tcp\n:{0} -> "+backend+" conns=3")
	if err := in(); err != nil {
		t.Errorf("the third of four: %v", err)
	}
	if in() == nil {
		t.Error("the line has a fourth one, of three")
	}
	v.refusedBy(t, map[string]uint64{"conns-per-ip": 1, "conns": 1})
}

// TestWatchSeesLists: a list that changes is read again; with a mistake in it the list stays as it was, until that is mended.
func TestWatchSeesLists(t *testing.T) {
	beside(t)
	list := writeFile(t, "block.txt", []byte("192.0.2.0/24\n"))
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp deny=@"+list, "WATCH=on")
	write := func(text string, done func(gateway.Status) bool) {
		t.Helper()
		if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for began := time.Now(); !done(b.gateway.Status()); time.Sleep(10 * time.Millisecond) {
			if time.Since(began) > patience {
				t.Fatal("the change was not noticed")
			}
		}
	}
	write("127.0.0.66\nnonsense\n", func(s gateway.Status) bool { return s.Reloads.OK == 1 && s.Unusable == 1 })
	if _, err := echoes(t, "127.0.0.66", b.addr(0)); err != nil {
		t.Errorf("a broken list has changed something: %v", err)
	}
	write("127.0.0.66\n", func(s gateway.Status) bool { return s.Reloads.OK == 2 && s.Unusable == 0 })
	if _, err := echoes(t, "127.0.0.66", b.addr(0)); err == nil {
		t.Error("it is let in")
	}
	if u := b.table("prefixes"); u.Entries != 1 {
		t.Errorf("%+v", u)
	}
}
