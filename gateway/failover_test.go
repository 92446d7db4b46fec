// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
)

// backendVariable makes of the test's program a backend, a process that can be killed: it says the letter in the variable,
// listens on the address behind that, and echoes.
const backendVariable = "BACKEND"

func init() {
	name, at := "", ""
	if _, err := fmt.Sscan(os.Getenv(backendVariable), &name, &at); err != nil {
		return
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go func() {
			_, _ = io.WriteString(c, name)
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}()
	}
}

// launchBackend starts a backend on its machine, and waits until it listens.
func (n *network) launchBackend(t testing.TB, name, at string) *exec.Cmd {
	t.Helper()
	cmd := command(t, program(t, "ip", "iproute2"), "netns", "exec", n.backend, os.Args[0])
	cmd.Env = []string{backendVariable + "=" + name + " " + at}
	launch(t, cmd)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	until(t, name+" listens", func() bool {
		return within(t, n.backend, func() (bool, error) {
			c, err := net.Dial("tcp", at)
			if err == nil {
				_ = c.Close()
			}
			return err == nil, nil
		})
	})
	return cmd
}

// visited is what became of a client.
type visited struct {
	peer  string // its address
	name  string // of the backend
	began time.Time
	err   error
}

// traffic is clients that come from the client's machine, one every 5 ms whatever becomes of those before: 200 a second.
type traffic struct {
	stop func() []visited

	mu  sync.Mutex
	all []visited
}

func (n *network) traffic(t testing.TB, addr string) *traffic {
	f := &traffic{}
	ended := make(chan struct{})
	var clients sync.WaitGroup
	looping := inBackground(func() {
		within(t, n.client, func() (struct{}, error) { // on its thread every socket is the machine's
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ended:
					return struct{}{}, nil
				case <-tick.C:
				}
				v := visited{began: time.Now()}
				c, err := net.DialTimeout("tcp", addr, patience)
				if err != nil {
					v.err = err
					f.note(v)
					continue
				}
				clients.Go(func() {
					defer c.Close()
					v.peer = c.LocalAddr().String()
					v.name, v.err = converse(c)
					f.note(v)
				})
			}
		})
	})
	f.stop = sync.OnceValue(func() []visited {
		close(ended)
		<-looping
		clients.Wait()
		return f.all
	})
	t.Cleanup(func() { f.stop() })
	return f
}

// converse hears who serves, and has some words echoed.
func converse(c net.Conn) (string, error) {
	_ = c.SetDeadline(time.Now().Add(patience))
	name := make([]byte, 1)
	if _, err := io.ReadFull(c, name); err != nil {
		return "", err
	}
	return string(name), trade(c, random(1, 300))
}

func (f *traffic) note(v visited) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = append(f.all, v)
}

// served counts who came to a backend since then, and who came in all.
func (f *traffic) served(name string, since time.Time) (its, all int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.all {
		if v.began.Before(since) {
			continue
		}
		if all++; v.name == name {
			its++
		}
	}
	return its, all
}

// TestFailoverOverTheNetwork is a life of two backends behind the program, as processes on another machine, under 200 new
// clients a second: one is killed, and costs only the connections that it had; it comes back, and gets its share slowly; it
// is drained, and comes to zero, over a reload too; it's let in again.
func TestFailoverOverTheNetwork(t *testing.T) {
	n := newNetwork(t)
	const a, b = "10.77.2.2:8081", "10.77.2.2:8082"
	doomed := n.launchBackend(t, "a", a)
	n.launchBackend(t, "b", b)
	const admin = "ADMIN=127.0.0.1:9180" // on a machine of its own no port is taken
	cmd, ports := edgeCommand(t, ":{0} -> "+a+" "+b+" mode=tcp slow-start=4s", []string{admin, adminToken}, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, ports)
	at := fmt.Sprintf("10.77.1.1:%d", e.ports[0])
	f := n.traffic(t, at)
	many := func(name string, least int) {
		t.Helper()
		since := time.Now()
		until(t, name+" gets work", func() bool { its, _ := f.served(name, since); return its >= least })
	}
	many("a", 50)

	theirs, names := n.hold(t, at, 8)
	_ = doomed.Process.Kill()
	e.becomes(t, a, "ejected")
	for i, c := range theirs {
		if err := trade(c, random(1, 300)); (err != nil) != (names[i] == 'a') {
			t.Errorf("a connection to %c: %v", names[i], err)
		}
		_ = c.Close()
	}
	many("b", 100)

	n.launchBackend(t, "a", a)
	e.becomes(t, a, "up")
	back := time.Now()
	until(t, "some clients came", func() bool { _, all := f.served("a", back); return all >= 150 })
	if its, all := f.served("a", back); time.Since(back) < 2*time.Second && 4*its > all {
		t.Errorf("just back it gets %d of %d clients", its, all)
	}
	until(t, "it has its share", func() bool {
		now := time.Now()
		until(t, "some clients came", func() bool { _, all := f.served("a", now); return all >= 100 })
		its, all := f.served("a", now)
		return 10*its >= 4*all
	})

	held, names := n.hold(t, at, 10)
	onA := strings.Count(names, "a")
	n.tell(t, admin, "backend", "drain", a)
	until(t, "only what is held is left", func() bool { return n.backendState(t, admin, a).Open == int64(onA) })
	n.tell(t, admin, "reload")
	since := time.Now()
	many("b", 100)
	if its, all := f.served("a", since); its > 0 || n.backendState(t, admin, a).State != "draining" {
		t.Errorf("drained and after a reload it gets %d of %d clients", its, all)
	}
	for _, c := range held {
		if err := trade(c, random(2, 300)); err != nil {
			t.Errorf("a connection of the drained backend, or of the other one: %v", err)
		}
		_ = c.Close()
	}
	until(t, "the drained backend comes to zero", func() bool { return n.backendState(t, admin, a).Open == 0 })
	n.tell(t, admin, "backend", "ready", a)
	many("a", 20)

	all := f.stop()
	cut := map[string]bool{}
	e.signal(t, os.Interrupt)
	_ = e.exit(t)
	for _, l := range e.log.all() {
		switch {
		case l.Msg != "connection" || l.Outcome == "ok":
		case l.Outcome == "backend_reset" && l.Backend == a, l.Outcome == "client_reset" && l.Backend == a:
			cut[l.Peer] = true
		default:
			t.Errorf("line: %s", l)
		}
	}
	failed, nameless := 0, 0
	for _, v := range all {
		if v.err == nil {
			continue
		}
		failed++
		if v.peer == "" && errors.Is(v.err, syscall.ECONNRESET) { // the reset was there before connect looked
			nameless++
			continue
		}
		if !cut[v.peer] {
			t.Errorf("a client that was not on the killed backend: %v", v.err)
		}
		delete(cut, v.peer)
	}
	for _, c := range theirs {
		delete(cut, c.LocalAddr().String())
	}
	if nameless > len(cut) {
		t.Errorf("%d clients were reset as they connected, %d connections to the killed backend: %v", nameless, len(cut), cut)
	}
	t.Logf("%d clients, %d of them cut with their backend", len(all), failed)
}

// hold makes connections from the client's machine, and says which backend each has: "abab…".
func (n *network) hold(t testing.TB, at string, k int) (all []net.Conn, names string) {
	t.Helper()
	for range k {
		c := within(t, n.client, func() (net.Conn, error) { return net.DialTimeout("tcp", at, patience) })
		t.Cleanup(func() { _ = c.Close() })
		name, err := converse(c)
		if err != nil {
			t.Fatal(err)
		}
		all, names = append(all, c), names+name
	}
	return all, names
}

// tell runs the program's command on the edge's machine, and returns what it says.
// adminToken has commands give orders over TCP: they do not share the gateway's directories.
const adminToken = "ADMIN_TOKEN=a-token-of-the-tests"

func (n *network) tell(t testing.TB, admin string, words ...string) string {
	t.Helper()
	path, err := buildEdge()
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(t, program(t, "ip", "iproute2"), append([]string{"netns", "exec", n.edge, path}, words...)...)
	cmd.Env = []string{config.Prefix + admin, config.Prefix + adminToken, "HOME=" + t.TempDir()}
	return run(t, cmd, "")
}

func (n *network) backendState(t testing.TB, admin, addr string) gateway.BackendInfo {
	t.Helper()
	var said struct{ Backends []gateway.BackendInfo }
	text := n.tell(t, admin, "show", "backends", "--json")
	if err := json.NewDecoder(bytes.NewReader([]byte(text))).Decode(&said); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	for _, i := range said.Backends {
		if i.Address == addr {
			return i
		}
	}
	t.Fatalf("no %s in %s", addr, text)
	return gateway.BackendInfo{}
}

// TestProxyHeaderOverTheNetwork: from an address that is trusted it is believed and handed on, and demanded; from another
// one of the same network it is refused, and the client is who connects.
func TestProxyHeaderOverTheNetwork(t *testing.T) {
	n := newNetwork(t)
	ip(t, "-n", n.client, "addr", "add", "10.77.1.3/24", "dev", "uplink")
	l := within(t, n.backend, func() (net.Listener, error) { return net.Listen("tcp", "10.77.2.2:8080") })
	serveOn(t, l, func(c net.Conn) { echo(c.(*net.TCPConn)) })
	cmd, ports := edgeCommand(t, ":{0} edge.test -> 10.77.2.2:8080 mode=pass proxy=v1", []string{"PROXY_FROM=10.77.1.2/32", "HELLO_TIMEOUT=500ms"}, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, ports)
	hello := clientHello(t, nil)
	const header = "PROXY TCP4 203.0.113.9 198.51.100.1 4711 443\r\n"
	for _, tt := range []struct {
		name, from, says, client, outcome string
	}{
		{"trusted", "10.77.1.2", header, "203.0.113.9:4711", "ok"},
		{"trusted, without", "10.77.1.2", "", "", "bad_proxy"},
		{"stranger", "10.77.1.3", header, "", "bad_proxy"},
		{"stranger, without", "10.77.1.3", "", "10.77.1.3", "ok"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := within(t, n.client, func() (net.Conn, error) {
				d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(tt.from)}}
				return d.Dial("tcp", fmt.Sprintf("10.77.1.1:%d", e.ports[0]))
			})
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			_, _ = c.Write(append([]byte(tt.says), hello...))
			if tt.outcome == "ok" {
				want := header
				if tt.says == "" {
					want = fmt.Sprintf("PROXY TCP4 10.77.1.3 10.77.1.1 %s %d\r\n", portOf(c.LocalAddr().String()), e.ports[0])
				}
				got := make([]byte, len(want)+len(hello))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != want+string(hello) {
					t.Errorf("the backend hears %q, %v; want %q and the hello", got[:min(len(got), len(want))], err, want)
				}
			}
			if tt.outcome != "ok" {
				_, _ = io.Copy(io.Discard, c)
			}
			_ = c.Close()
			l := e.lineOf(t, c)
			l.expect(t, logLine{Outcome: tt.outcome})
			if host, _, _ := net.SplitHostPort(l.Client); l.Client != tt.client && host != tt.client && tt.outcome == "ok" {
				t.Errorf("the client is %s, want %s", l.Client, tt.client)
			}
		})
	}
}
