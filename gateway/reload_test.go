// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto/tls"
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
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// live is a bed whose map is a file that tests change.
type live struct {
	*bed
	file string
}

// startLive runs a gateway with a map in a file. {0}, {1}, … are free ports, in later maps too.
func startLive(t testing.TB, mapText string, settings ...string) *live {
	t.Helper()
	mapText, ports := fillPorts(t, mapText)
	v := &live{file: writeFile(t, "edge.natmap", []byte(mapText))}
	v.bed = start(t, "", append(settings, "MAP_FILE="+v.file)...)
	v.ports = ports
	return v
}

func (v *live) write(t testing.TB, mapText string) {
	t.Helper()
	for i, port := range v.ports {
		mapText = strings.ReplaceAll(mapText, fmt.Sprintf("{%d}", i), fmt.Sprint(port))
	}
	if err := os.WriteFile(v.file, []byte(mapText), 0o600); err != nil {
		t.Fatal(err)
	}
}

// reload puts another map in the place of the one before.
func (v *live) reload(t testing.TB, mapText string) gateway.Reloaded {
	t.Helper()
	v.write(t, mapText)
	r := v.gateway.Reload()
	if !r.OK {
		t.Fatalf("not reloaded: %q", r.Problems)
	}
	return r
}

// namedServer says its name and then sends back what it gets: without the pipes that package net would keep for so many
// connections.
func namedServer(t testing.TB, name string) string {
	return serve(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, name)
		_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		_ = c.CloseWrite()
	})
}

// greeting is the name that the backend of a new connection says.
func greeting(t testing.TB, c net.Conn) string {
	t.Helper()
	name := make([]byte, 1)
	if _, err := io.ReadFull(c, name); err != nil {
		t.Fatal(err)
	}
	return string(name)
}

func TestReloadChangesTheMapAndKeepsConnections(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	v := startLive(t, ":{0} edge.test -> "+a)
	old := v.dialTLS(t, 0, nil)
	if name := greeting(t, old); name != "a" {
		t.Fatalf("backend %s", name)
	}
	r := v.reload(t, ":{0} edge.test -> "+b)
	if r.Generation != 2 || len(r.Added) != 1 || len(r.Removed) != 1 || !strings.Contains(r.Added[0], b) {
		t.Errorf("%+v", r)
	}
	now := v.dialTLS(t, 0, nil)
	if name := greeting(t, now); name != "b" {
		t.Errorf("after the reload a new connection goes to %s", name)
	}
	exchange(t, old, []byte("still there"))
	all, _ := v.gateway.Generations(t.Context())
	if len(all) != 2 || !all[0].Current || all[0].Number != 2 || all[0].Open != 1 || all[1].Open != 1 || all[1].OldestMS < all[0].OldestMS {
		t.Errorf("generations: %+v", all)
	}
	old.Close()
	v.line(t, func(l logLine) bool { return l.Outcome == "ok" && l.Backend == a })
	if all, _ := v.gateway.Generations(t.Context()); len(all) != 1 {
		t.Errorf("without its last connection the old generation is still there: %+v", all)
	}
}

func TestBrokenConfigurationChangesNothing(t *testing.T) {
	v := startLive(t, ":{0} edge.test -> "+namedServer(t, "a"))
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	for _, c := range []struct{ text, says string }{
		{":{0} edge.test -> ", "edge.natmap:1"},
		{":{0} edge.test -> 127.0.0.1:1 colour=green", "unknown option"},
		{"", "the map has no rule"},
		{fmt.Sprintf(":{0} edge.test -> 127.0.0.1:1\n:%d edge.test -> 127.0.0.1:1", port), "another program listens there"},
	} {
		v.write(t, c.text)
		r := v.gateway.Reload()
		if r.OK || r.Generation != 1 || !strings.Contains(strings.Join(r.Problems, "\n"), c.says) {
			t.Errorf("%q: %+v, want a complaint about %q", c.text, r, c.says)
		}
		conn := v.dialTLS(t, 0, nil)
		if name := greeting(t, conn); name != "a" {
			t.Errorf("%q: a new connection goes to %s", c.text, name)
		}
		conn.Close()
	}
	if s := v.gateway.Status().Reloads; s.Failed != 4 || s.OK != 0 || s.Last == nil || s.Last.OK {
		t.Errorf("status: %+v", s)
	}
	if err := os.Remove(v.file); err != nil {
		t.Fatal(err)
	}
	if r := v.gateway.Reload(); r.OK {
		t.Error("reloaded without a map")
	}
}

func TestReloadOpensAndClosesPorts(t *testing.T) {
	beside(t)
	backend := namedServer(t, "a")
	v := startLive(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} edge.test -> %[1]s", backend))
	old := v.dialTLS(t, 1, nil)
	greeting(t, old)
	more := freePorts(t, 1)[0]
	v.ports = append(v.ports, more)
	v.reload(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{2} edge.test -> %[1]s", backend))
	greeting(t, v.dialTLS(t, 0, nil))
	greeting(t, v.dialTLS(t, 2, nil))
	exchange(t, old, []byte("its port is closed, the connection is not"))
	if c, err := net.DialTimeout("tcp", v.addr(1), patience); err == nil {
		c.Close()
		t.Error("the port that was removed is still open")
	}
	v.reload(t, fmt.Sprintf(":{1} edge.test -> %[1]s", backend))
	greeting(t, v.dialTLS(t, 1, nil))
}

// TestReloadAddsAnAddressOfAPort: our own socket for another address is not in the way, but another program's is.
func TestReloadAddsAnAddressOfAPort(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	one := "127.0.0.1:{0} edge.test -> " + a
	v := startLive(t, one)
	v.reload(t, one+"\n:{0} edge.test -> "+b)
	greeting(t, v.dialTLS(t, 0, nil))
	v.reload(t, ":{0} edge.test -> "+b)
	if name := greeting(t, v.dialTLS(t, 0, nil)); name != "b" {
		t.Errorf("without its own rule the address leads to %s", name)
	}
	v.reload(t, one)
	if name := greeting(t, v.dialTLS(t, 0, nil)); name != "a" {
		t.Errorf("with its own rule the address leads to %s", name)
	}
	taken, err := net.Listen("tcp", fmt.Sprintf("127.0.0.2:%d", v.ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	v.write(t, one+"\n:{0} edge.test -> "+b)
	if r := v.gateway.Reload(); r.OK || !strings.Contains(strings.Join(r.Problems, "\n"), "another program listens there") {
		t.Errorf("%+v, though another program listens on an address of the port", r)
	}
}

// TestReloadsUnderLoad: a hundred reloads, with broken files between them, while clients come and go. None of them is
// refused, reset, or sent to where no map ever sent it.
func TestReloadsUnderLoad(t *testing.T) {
	const pace = 5 * time.Millisecond // of each client: a thousand connections a second in all leave the reloads a core
	a, b := namedServer(t, "a"), namedServer(t, "b")
	maps := []string{
		":{0} edge.test -> " + a + "\n:{1} -> " + a + " mode=tcp",
		":{0} edge.test -> " + b + "\n:{1} -> " + b + " mode=tcp",
	}
	const more = "\n:{2} -> reject" // a port that comes and goes, now and then: its last call takes a quarter of a second
	v := startLive(t, maps[0]+more)
	config := clientConfig(t, nil)
	done := make(chan struct{})
	var served atomic.Int64
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := visit(v.addr(i%2), i%2 == 0, config); err != nil {
					t.Errorf("port %d: %v", i%2, err)
					return
				}
				served.Add(1)
				time.Sleep(pace)
			}
		})
	}
	for i := range 100 {
		if i%10 == 5 {
			v.write(t, maps[0]+"\n:{0} oops")
			if r := v.gateway.Reload(); r.OK {
				t.Fatalf("a broken map was taken: %+v", r)
			}
		}
		text := maps[i%2]
		if i%20 < 10 {
			text += more
		}
		v.write(t, text)
		if r := v.gateway.Reload(); !r.OK {
			t.Fatalf("reload %d: %q", i, r.Problems)
		}
	}
	close(done)
	clients.Wait()
	t.Logf("%d connections during 100 reloads", served.Load())
	if served.Load() < 100 {
		t.Errorf("only %d connections were made", served.Load())
	}
}

// visit makes a connection, hears who serves it, and says a word.
func visit(addr string, secure bool, config *tls.Config) error {
	tcp, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	defer tcp.Close()
	_ = tcp.SetDeadline(time.Now().Add(patience))
	c := tcp
	if secure {
		c = tls.Client(tcp, config)
	}
	if _, err := io.WriteString(c, "word"); err != nil {
		return err
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if s := string(got); s != "aword" && s != "bword" {
		return fmt.Errorf("heard %q", s)
	}
	return c.Close()
}

func TestReloadReplacesCertificates(t *testing.T) {
	beside(t)
	v := startLive(t, ":{0} edge.test -> "+echoServer(t))
	shown := func() []byte {
		c := v.dialTLS(t, 0, func(c *tls.Config) { c.ClientSessionCache = nil })
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Raw
	}
	before := shown()
	renewed, err := issue(pki(t).middle, "renewed", ecdsaKey, "edge.test")
	if err != nil {
		t.Fatal(err)
	}
	text := slices.Concat(renewed.pem(), pki(t).middle.pem(), renewed.keyPEM())
	if err := os.WriteFile(filepath.Join(v.certs, "edge-ecdsa.pem"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	if now := shown(); !bytes.Equal(now, before) {
		t.Error("the certificate changed before the reload")
	}
	if r := v.gateway.Reload(); !r.OK || len(r.Added)+len(r.Removed) > 0 {
		t.Fatalf("%+v", r)
	}
	if now := shown(); !bytes.Equal(now, renewed.Raw) {
		t.Error("after the reload the old certificate is shown")
	}
	if err := os.WriteFile(filepath.Join(v.certs, "edge-ecdsa.pem"), []byte("-----BEGIN CERTIFICATE-----\nbroken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := v.gateway.Reload(); !r.OK || r.Unusable != 1 {
		t.Errorf("a broken certificate is not said, or stops the reload: %+v", r)
	}
	if now := shown(); !bytes.Equal(now, renewed.Raw) {
		t.Error("a broken certificate took the place of a good one")
	}
}

// TestDrainOptionEndsConnectionsOfARemovedRule: the others of the same map go on.
func TestDrainOptionEndsConnectionsOfARemovedRule(t *testing.T) {
	beside(t)
	backend := echoServer(t)
	v := startLive(t, fmt.Sprintf(":{0} edge.test -> %[1]s drain=300ms\n:{0} a.wild.test -> %[1]s", backend))
	gone := v.dialTLS(t, 0, nil)
	stays := v.dialTLS(t, 0, func(c *tls.Config) { c.ServerName = "a.wild.test" })
	exchange(t, gone, []byte("x"))
	exchange(t, stays, []byte("x"))
	v.reload(t, ":{0} b.wild.test -> "+backend)
	exchange(t, gone, []byte("for a while it goes on"))
	l := v.line(t, func(l logLine) bool { return l.SNI == "edge.test" })
	if l.Outcome != "drained" {
		t.Errorf("outcome %s", l.Outcome)
	}
	exchange(t, stays, []byte("without drain= it goes on until it ends"))
}

// TestDrainOptionReachesWhoBeganEarlier: before a reload that still had the rule; and whose hello comes after the one that
// has it no more.
func TestDrainOptionReachesWhoBeganEarlier(t *testing.T) {
	beside(t)
	backend := echoServer(t)
	v := startLive(t, ":{0} edge.test -> "+backend+" drain=300ms")
	early := v.dialTLS(t, 0, nil)
	exchange(t, early, []byte("x"))
	v.reload(t, ":{0} edge.test -> "+backend+" drain=300ms idle=1m")
	silent := v.dial(t, 0)
	until(t, "the connection is accepted", func() bool { return len(v.conns(t, 10)) == 2 })
	v.reload(t, ":{0} b.wild.test -> "+backend)
	late := tls.Client(silent, clientConfig(t, nil))
	if err := late.Handshake(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*tls.Conn{early, late} {
		if l := v.lineOf(t, c.NetConn()); l.Outcome != "drained" {
			t.Errorf("outcome %s", l.Outcome)
		}
	}
}

// TestWatchSeesWhatKubernetesDoes swaps a directory by a symbolic link, as a mounted ConfigMap is.
func TestWatchSeesWhatKubernetesDoes(t *testing.T) {
	beside(t)
	dir := t.TempDir()
	port := freePorts(t, 1)[0]
	version := func(n int, backend string) {
		t.Helper()
		data := filepath.Join(dir, fmt.Sprintf("..v%d", n))
		if err := os.Mkdir(data, 0o700); err != nil {
			t.Fatal(err)
		}
		text := fmt.Appendf(nil, ":%d edge.test -> %s\n", port, backend)
		if err := os.WriteFile(filepath.Join(data, "edge.natmap"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(data, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version(1, namedServer(t, "a"))
	if err := os.Symlink(filepath.Join("..data", "edge.natmap"), filepath.Join(dir, "edge.natmap")); err != nil {
		t.Fatal(err)
	}
	b := start(t, "", "MAP_FILE="+dir, "WATCH=on")
	b.ports = []int{port}
	if name := greeting(t, b.dialTLS(t, 0, nil)); name != "a" {
		t.Fatalf("backend %s", name)
	}
	version(2, namedServer(t, "b"))
	for began := time.Now(); b.gateway.Status().Reloads.OK == 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatal("the swap was not noticed")
		}
	}
	if name := greeting(t, b.dialTLS(t, 0, nil)); name != "b" {
		t.Errorf("after the swap a new connection goes to %s", name)
	}
}

// TestLargeReloadBesideTraffic: 10,000 rules and 2,000 certificates are read in under two seconds of CPU time, and an echo
// on an open connection does not wait for it.
func TestLargeReloadBesideTraffic(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	if raceEnabled {
		t.Skip("times are measured without the race detector")
	}
	backend := echoServer(t)
	v := startLive(t, ":{0} edge.test -> "+backend)
	for i := range 2000 {
		id, err := issue(pki(t).middle, "many", ecdsaKey, fmt.Sprintf("n%d.many.test", i))
		if err != nil {
			t.Fatal(err)
		}
		text := slices.Concat(id.pem(), pki(t).middle.pem(), id.keyPEM())
		if err := os.WriteFile(filepath.Join(v.certs, fmt.Sprintf("many%d.pem", i)), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	fmt.Fprintf(&text, ":{0} edge.test -> %s\n", backend)
	for i := range 10_000 {
		fmt.Fprintf(&text, ":{0} h%d.many.test -> %s idle=%ds mode=pass\n", i, backend, i%300+1)
	}
	v.write(t, text.String())
	c := v.dialTLS(t, 0, nil)
	quiet := echoTimes(t, c, func() bool { return false })
	cpu := cpuTime(t)
	over := make(chan struct{})
	go func() {
		defer close(over)
		if r := v.gateway.Reload(); !r.OK {
			t.Errorf("%q", r.Problems)
		}
	}()
	beside := echoTimes(t, c, func() bool {
		select {
		case <-over:
			return false
		default:
			return true
		}
	})
	<-over
	took := cpuTime(t) - cpu
	t.Logf("reloaded in %v of CPU time; p99 of %d echoes %v, of %d before it %v", took, len(beside), p99(beside), len(quiet), p99(quiet))
	if took > 2*time.Second {
		t.Errorf("the reload took %v of CPU time", took)
	}
	if late := p99(beside); late > max(10*p99(quiet), 50*time.Millisecond) {
		t.Errorf("p99 of echoes beside the reload: %v, before it: %v", late, p99(quiet))
	}
}

// TestMillionPrefixesBesideTraffic: a list of that size is read in at most three seconds of CPU time, not read at all when it
// did not change, and an echo on an open connection does not wait for it.
func TestMillionPrefixesBesideTraffic(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	if raceEnabled {
		t.Skip("times are measured without the race detector")
	}
	var text strings.Builder
	for i := range 1_000_000 {
		n := uint32(i) * 2654435761 // in no order, and each one once
		fmt.Fprintf(&text, "%d.%d.%d.%d\n", 128|n>>24, n>>16&255, n>>8&255, n&255)
	}
	backend := echoServer(t)
	v := startLive(t, ":{0} edge.test -> "+backend)
	c := v.dialTLS(t, 0, nil)
	list := writeFile(t, "block.txt", []byte(text.String()))
	quiet := echoTimes(t, c, func() bool { return false })
	reload := func(rules string) (cpu, p time.Duration) {
		t.Helper()
		v.write(t, rules)
		before, over := cpuTime(t), make(chan struct{})
		go func() {
			defer close(over)
			if r := v.gateway.Reload(); !r.OK {
				t.Errorf("%q", r.Problems)
			}
		}()
		beside := echoTimes(t, c, func() bool {
			select {
			case <-over:
				return false
			default:
				return true
			}
		})
		<-over
		return cpuTime(t) - before, p99(beside)
	}
	first, late := reload(":{0} edge.test -> " + backend + " deny=@" + list)
	again, late2 := reload("\n:{0} edge.test -> " + backend + " deny=@" + list)
	t.Logf("read in %v of CPU time, again in %v; p99 of echoes %v and %v, before it %v", first, again, late, late2, p99(quiet))
	if first > 3*time.Second || again > first/2 {
		t.Errorf("a million prefixes took %v of CPU time with the echoes, and again %v though nothing had changed", first, again)
	}
	if limit := max(10*p99(quiet), 50*time.Millisecond); late > limit || late2 > limit {
		t.Errorf("p99 of echoes beside the reload: %v and %v, before it: %v", late, late2, p99(quiet))
	}
}

// cpuTime is what this process has computed so far.
func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// echoTimes measures echoes, 200 of them and for as long as more says.
func echoTimes(t testing.TB, c net.Conn, more func() bool) (all []time.Duration) {
	t.Helper()
	for len(all) < 200 || more() {
		began := time.Now()
		if err := trade(c, []byte("x")); err != nil {
			t.Fatal(err)
		}
		all = append(all, time.Since(began))
		time.Sleep(200 * time.Microsecond)
	}
	slices.Sort(all)
	return all
}

func p99(sorted []time.Duration) time.Duration { return sorted[len(sorted)*99/100] }

func TestReloadAfterTheEndChangesNothing(t *testing.T) {
	v := startLive(t, ":{0} edge.test -> "+echoServer(t))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	v.gateway.Drain(ctx)
	v.stopped = true
	if r := v.gateway.Reload(); r.OK || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "drains") {
		t.Errorf("reloaded a gateway that is over, or not said why not: %+v", r)
	}
}

// TestGenerationsAreNumberedInARow: one that came to nothing has no number.
func TestGenerationsAreNumberedInARow(t *testing.T) {
	rule := ":{0} -> " + echoServer(t) + " mode=tcp"
	v := startLive(t, rule)
	v.write(t, rule+"\n:"+strings.TrimPrefix(echoServer(t), "127.0.0.1:")+" -> demo")
	if r := v.gateway.Reload(); r.OK || r.Generation != 1 {
		t.Fatalf("a port that is taken: %+v", r)
	}
	if r := v.reload(t, rule+" idle=1h"); r.Generation != 2 {
		t.Errorf("generation %d comes after the first one", r.Generation)
	}
}

// TestDrainDuringAReloadOpensNoPort: the drain does not wait for the reload, and what that has opened is closed again.
func TestDrainDuringAReloadOpensNoPort(t *testing.T) {
	for name, hold := range map[string]bool{"with a connection": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			dns, err := net.ListenPacket("udp", "127.0.0.1:0") // which takes its time
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = dns.Close() })
			rule := ":{0} -> " + echoServer(t) + " mode=tcp"
			v := startLive(t, rule, "RESOLVER="+dns.LocalAddr().String())
			held := v.dial(t, 0)
			exchange(t, held, random(1, 100))
			if !hold {
				_ = held.Close()
				v.lineOf(t, held).expect(t, logLine{Outcome: "ok"})
			}
			v.ports = append(v.ports, freePorts(t, 1)...)
			v.write(t, rule+"\n:{1} -> nowhere.test:80 mode=tcp")
			var reload, drain sync.WaitGroup
			reload.Go(func() { v.gateway.Reload() })
			question := make([]byte, 512)
			n, from, err := dns.ReadFrom(question)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			v.stopped = true
			drain.Go(func() { v.gateway.Drain(ctx) })
			refused := func(i int) bool {
				c, err := net.Dial("tcp", v.addr(i))
				if err == nil {
					_ = c.Close()
				}
				return err != nil
			}
			until(t, "the drain has begun", func() bool { return refused(0) })
			drain.Go(func() {
				for err == nil { // there is no such name: RFC 1035, section 4.1.1
					question[2], question[3] = 0x80, 3
					_, _ = dns.WriteTo(question[:n], from)
					n, from, err = dns.ReadFrom(question)
				}
			})
			reload.Wait()
			_ = dns.Close()
			if !refused(1) {
				t.Error("a port was opened by a gateway that drains")
			}
			if hold {
				exchange(t, held, random(2, 100))
				_ = held.Close()
			}
			drain.Wait()
		})
	}
}

// TestNextCertificateIsShownWhenItsTimeComes: it lies beside the present one, and nothing is read again. What is said of
// the certificates is what clients are shown.
func TestNextCertificateIsShownWhenItsTimeComes(t *testing.T) {
	beside(t)
	v := startLive(t, ":{0} edge.test -> "+echoServer(t))
	change := time.Now().Truncate(time.Second).Add(2 * time.Second)
	staged := map[bool]*identity{}
	for late, validity := range map[bool][2]time.Time{false: {change.Add(-time.Minute), change}, true: {change, change.Add(time.Hour)}} {
		id, err := issueFor(pki(t).middle, validity[0], validity[1], "staged.test")
		if err != nil {
			t.Fatal(err)
		}
		text := slices.Concat(id.pem(), pki(t).middle.pem(), id.keyPEM())
		if err := os.WriteFile(filepath.Join(v.certs, fmt.Sprintf("staged-%v.pem", late)), text, 0o600); err != nil {
			t.Fatal(err)
		}
		staged[late] = id
	}
	v.reload(t, ":{0} edge.test staged.test -> "+echoServer(t))
	shown := func() []byte {
		c := v.dialTLS(t, 0, func(c *tls.Config) { c.ServerName, c.ClientSessionCache = "staged.test", nil })
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Raw
	}
	listed := func(id *identity) bool {
		return slices.ContainsFunc(v.gateway.Certificates(100), func(i gateway.CertInfo) bool {
			return slices.Contains(i.Names, "staged.test") && i.NotAfter.Equal(id.NotAfter)
		})
	}
	if time.Now().Before(change.Add(-time.Second)) { // else the machine was too slow for this half
		if !bytes.Equal(shown(), staged[false].Raw) || !listed(staged[false]) || listed(staged[true]) {
			t.Error("before the change the next certificate is shown or listed")
		}
	}
	time.Sleep(time.Until(change))
	if !bytes.Equal(shown(), staged[true].Raw) || !listed(staged[true]) || listed(staged[false]) {
		t.Error("after the change the old certificate is shown or listed")
	}
}
