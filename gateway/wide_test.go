// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/steer"
)

// wideEdge is a gateway on the machine in the middle of a network, whose map is a file.
type wideEdge struct {
	*edge
	*network
	file string
}

// newWideNetwork is a network on whose machine in the middle ports can be steered.
func newWideNetwork(t testing.TB) *network {
	t.Helper()
	if err := steer.Probe(); err != nil {
		missing(t, "can't steer here: "+steer.Reason(err))
	}
	return newNetwork(t)
}

// startWide runs the program on the machine in the middle; words come before it, such as those that take rights from it.
func (n *network) startWide(t testing.TB, mapText string, words ...string) *wideEdge {
	t.Helper()
	w := &wideEdge{network: n, file: writeFile(t, "edge.natmap", []byte(mapText))}
	cmd, _ := edgeCommand(t, "", []string{"MAP_FILE=" + w.file, "LOOPS=2"}, append([]string{program(t, "ip", "iproute2"), "netns", "exec", n.edge}, words...)...)
	w.edge = startEdge(t, cmd, nil)
	return w
}

// reload puts another map in the place of the one before, and waits until it is served, or refused.
func (w *wideEdge) reload(t testing.TB, mapText string) bool {
	t.Helper()
	if err := os.WriteFile(w.file, []byte(mapText), 0o600); err != nil {
		t.Fatal(err)
	}
	w.signal(t, syscall.SIGHUP)
	return w.log.take(t, func(l logLine) bool { return l.Msg == "reloaded" || strings.HasPrefix(l.Msg, "not reloaded") }).Msg == "reloaded"
}

// sayPort serves ports of the backend: each hears a byte or the end, says its number, then sends back what it gets.
func (n *network) sayPort(t testing.TB, host string, ports ...int) {
	t.Helper()
	for _, port := range ports {
		l := within(t, n.backend, func() (net.Listener, error) { return net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port))) })
		serveOn(t, l, func(c net.Conn) {
			_, _ = c.Read(make([]byte, 1))
			fmt.Fprintf(c, "%s %5d\n", host, port)
			_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
			_ = c.(*net.TCPConn).CloseWrite()
		})
	}
}

// dial connects from the client's machine.
func (n *network) dial(t testing.TB, host string, port int) (net.Conn, error) {
	t.Helper()
	var refused error
	c := within(t, n.client, func() (net.Conn, error) {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(port)), patience)
		refused = err
		return c, nil
	})
	if c != nil {
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
	}
	return c, refused
}

// reaches connects, and finds this backend behind the port.
func (w *wideEdge) reaches(t testing.TB, host string, port int, backend string, backendPort int) net.Conn {
	t.Helper()
	c, err := w.dial(t, host, port)
	if err != nil {
		t.Fatalf("%v\n%s", err, w.log.text())
	}
	_, _ = c.Write([]byte{0})
	want := fmt.Sprintf("%s %5d\n", backend, backendPort)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("port %d of %s leads to %q, want %q: %v\n%s", port, host, got, want, err, w.log.text())
	}
	return c
}

func (w *wideEdge) refuses(t testing.TB, host string, port int) {
	t.Helper()
	began := time.Now()
	c, err := w.dial(t, host, port)
	if err == nil {
		_ = c.Close()
		t.Errorf("port %d of %s is open", port, host)
	} else if !errors.Is(err, unix.ECONNREFUSED) || time.Since(began) > time.Second {
		t.Errorf("port %d of %s is not refused at once: %v after %v", port, host, err, time.Since(began))
	}
}

const (
	edge4, edge6 = "10.77.1.1", "fd77:1::1"
	backend4     = "10.77.2.2"
)

// TestWideRangeCostsAFewSockets: 50,000 ports of which each leads to its own of the backend, in both families, and is
// in the log with its number; on all loops.
func TestWideRangeCostsAFewSockets(t *testing.T) {
	n := newWideNetwork(t)
	ports := []int{10000, 59999}
	for range 12 {
		ports = append(ports, 10001+rand.IntN(49990))
	}
	n.sayPort(t, backend4, ports...)
	w := n.startWide(t, ":10000-59999 -> "+backend4+":= mode=tcp")
	if fds := w.descriptors(t, ""); fds > 40 {
		t.Errorf("%d descriptors for 50,000 ports", fds)
	}
	came := make([]net.Conn, len(ports))
	for i, port := range ports {
		came[i] = w.reaches(t, []string{edge4, edge6}[i%2], port, backend4, port)
		_ = came[i].Close()
	}
	for i, port := range ports {
		if l := w.lineOf(t, came[i]); l.Listen != fmt.Sprintf(":%d", port) {
			t.Errorf("port %d: %s", port, l)
		}
	}
	for _, port := range []int{9999, 60000} {
		w.refuses(t, edge4, port)
		w.refuses(t, edge6, port)
	}
	loops := map[uint64]int{}
	const many = 100
	for range many {
		_ = w.reaches(t, edge4, ports[0], backend4, ports[0]).Close()
	}
	for range many {
		id, err := strconv.ParseUint(w.next(t).ID, 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		loops[id%2]++ // see nextID
	}
	if loops[0] < many/5 || loops[1] < many/5 {
		t.Errorf("connections on the loops: %v", loops)
	}
	w.signal(t, syscall.SIGTERM)
	if code := w.exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, port := range ports[:3] {
		w.refuses(t, edge4, port)
	}
}

// TestNarrowPortInAWideRangeIsItsOwn: of the same address, where the range's listener tells them apart, and of another,
// that has a socket.
func TestNarrowPortInAWideRangeIsItsOwn(t *testing.T) {
	n := newWideNetwork(t)
	n.sayPort(t, backend4, 10050, 10051, 1, 2, 3)
	w := n.startWide(t, ":10000-19999 -> "+backend4+":= mode=tcp; "+edge4+":10050 -> "+backend4+":1 mode=tcp; ["+edge6+"]:10000-10099 -> "+backend4+":2 mode=tcp\n"+
		":20000-20100 -> "+backend4+":3 mode=tcp")
	w.reaches(t, edge4, 10050, backend4, 1)
	w.reaches(t, edge4, 10051, backend4, 10051)
	w.reaches(t, edge6, 10050, backend4, 2)
	w.reaches(t, edge6, 20100, backend4, 3)
	if !w.reload(t, ":10000-19999 -> "+backend4+":= mode=tcp") {
		t.Fatalf("not reloaded: %s", w.log.text())
	}
	w.reaches(t, edge4, 10050, backend4, 10050)
	w.reaches(t, edge6, 10050, backend4, 10050)
	w.refuses(t, edge6, 20100)
	if !w.reload(t, ":10000-19999 -> "+backend4+":= mode=tcp; "+edge4+":10050 -> "+backend4+":1 mode=tcp") {
		t.Fatalf("not reloaded: %s", w.log.text())
	}
	w.reaches(t, edge4, 10050, backend4, 1)
	w.reaches(t, edge6, 10050, backend4, 10050)
}

// TestWideRangesReloadUnderLoad: ranges come, go and change, and no client of a port that stays is refused, reset, or led
// to where it does not belong.
func TestWideRangesReloadUnderLoad(t *testing.T) {
	n := newWideNetwork(t)
	stay := []int{20000, 20001, 29999}
	n.sayPort(t, backend4, append(stay, 7)...)
	rest := backend4 + ":= mode=tcp\n"
	maps := []string{
		":10000-59999 -> " + rest,
		":15000-39999 -> " + rest,
		":20000-29999 -> " + rest + edge4 + ":10000-19999 -> " + rest,
		":20000-30100 -> " + rest + edge4 + ":25000 -> " + backend4 + ":7 mode=tcp\n",
	}
	w := n.startWide(t, maps[0])
	done := make(chan struct{})
	var served atomic.Int64
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			within(t, n.client, func() (struct{}, error) {
				for {
					select {
					case <-done:
						return struct{}{}, nil
					default:
					}
					host, port := []string{edge4, edge6}[i%2], stay[int(served.Load())%len(stay)]
					if err := hears(host, port, fmt.Sprintf("%s %5d\n", backend4, port)); err != nil {
						t.Errorf("port %d of %s: %v", port, host, err)
						return struct{}{}, nil
					}
					served.Add(1)
				}
			})
		})
	}
	for i := range 12 {
		if !w.reload(t, maps[(i+1)%len(maps)]) {
			t.Errorf("reload %d: %s", i, w.log.text())
		}
	}
	close(done)
	clients.Wait()
	t.Logf("%d connections during 12 reloads", served.Load())
	if served.Load() < 100 {
		t.Errorf("only %d connections were made", served.Load())
	}
}

// hears connects, and hears these words and the end.
func hears(host string, port int, words string) error {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(port)), patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	_ = c.(*net.TCPConn).CloseWrite()
	got, err := io.ReadAll(c)
	if err == nil && string(got) != words {
		err = fmt.Errorf("%q, want %q", got, words)
	}
	return err
}

// TestRangeThatLosesItsFirstPortLosesNobody: a client of a port that stays, whose last word of TCP's handshake has been
// lost when a reload takes out the very port to which the sockets are bound.
func TestRangeThatLosesItsFirstPortLosesNobody(t *testing.T) {
	n := newWideNetwork(t)
	n.sayPort(t, backend4, 10500)
	w := n.startWide(t, ":10000-10999 -> "+backend4+":= mode=tcp")
	nft := func(words string) {
		t.Helper()
		cmd := exec.Command(program(t, "ip", "iproute2"), append([]string{"netns", "exec", n.client, program(t, "nft", "nftables")}, strings.Fields(words)...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft %s: %v: %s", words, err, out)
		}
	}
	nft("add table ip lossy")
	nft("add chain ip lossy out { type filter hook output priority 0 ; }")
	nft("add rule ip lossy out tcp dport 10500 tcp flags ack / syn,ack drop")
	c, err := w.dial(t, edge4, 10500)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.file, []byte(":10001-10999 -> "+backend4+":= mode=tcp"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.signal(t, syscall.SIGHUP)
	nft("delete table ip lossy")
	w.log.take(t, func(l logLine) bool { return l.Msg == "reloaded" })
	if _, err := c.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%s %5d\n", backend4, 10500)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Errorf("%q, %v\n%s", got, err, w.log.text())
	}
	w.refuses(t, edge4, 10000)
}

// TestRemovedWideRangeIsRefusedAtOnce: and who is connected goes on.
func TestRemovedWideRangeIsRefusedAtOnce(t *testing.T) {
	n := newWideNetwork(t)
	n.sayPort(t, backend4, 10000, 10500, 20500)
	w := n.startWide(t, ":10000-10999 -> "+backend4+":= mode=tcp; :20000-20999 -> "+backend4+":= mode=tcp")
	open := w.reaches(t, edge4, 10500, backend4, 10500)
	first := w.reaches(t, edge4, 10000, backend4, 10000)
	if !w.reload(t, ":20000-20999 -> "+backend4+":= mode=tcp") {
		t.Fatalf("not reloaded: %s", w.log.text())
	}
	for _, port := range []int{10000, 10001, 10500, 10999} {
		w.refuses(t, edge4, port)
	}
	w.reaches(t, edge4, 20500, backend4, 20500)
	exchange(t, open, []byte("its range is gone, the connection is not"))
	exchange(t, first, []byte("nor that on the port to which the listener was bound"))
	if !w.reload(t, ":9 -> "+backend4+":1 mode=tcp") {
		t.Fatalf("not reloaded: %s", w.log.text())
	}
	w.refuses(t, edge4, 20500)
	exchange(t, open, []byte("nothing is steered any more"))
}

// unableToSteer are the words before a command that take from root what steering needs.
func unableToSteer(t testing.TB) []string {
	return []string{program(t, "setpriv", "util-linux"), "--bounding-set", "-sys_admin,-cap_39"} // cap_39: CAP_BPF, which setpriv of Debian 12 knows by number
}

// TestWideRangeWithoutTheRight: has a socket for each port and loop; the log says so, why, and what they are.
func TestWideRangeWithoutTheRight(t *testing.T) {
	n := newWideNetwork(t)
	n.sayPort(t, backend4, 10000, 10499)
	w := n.startWide(t, ":10000-10499 -> "+backend4+":= mode=tcp", unableToSteer(t)...)
	said := w.log.take(t, func(l logLine) bool { return strings.Contains(l.Msg, "wide port ranges") })
	if said.Level != "warn" || !strings.Contains(said.text, `"sockets":1000`) || !strings.Contains(said.text, "CAP_BPF and CAP_NET_ADMIN") {
		t.Errorf("the log says %s", said)
	}
	if fds := w.descriptors(t, ""); fds < 1000 {
		t.Errorf("%d descriptors", fds)
	}
	for _, port := range []int{10000, 10499} {
		c := w.reaches(t, edge6, port, backend4, port)
		_ = c.Close()
		if l := w.lineOf(t, c); l.Listen != fmt.Sprintf(":%d", port) {
			t.Errorf("port %d: %s", port, l)
		}
	}
	w.refuses(t, edge4, 10500)
}

// TestWideRangeBeyondTheFileLimit: is an error that says what to do, of run and of check.
func TestWideRangeBeyondTheFileLimit(t *testing.T) {
	n := newWideNetwork(t)
	for _, c := range []struct {
		verb  string
		words []string
		code  int
		says  string
	}{
		{"run", unableToSteer(t), 3, "50000 ports of the map take 100000 sockets for 2 loops, and the limit of open files is 4096; raise it .*CAP_BPF and CAP_NET_ADMIN"},
		{"check", unableToSteer(t), 3, "50000 ports of the map take 100000 sockets for 2 loops, and the limit of open files is 4096; raise it .*CAP_BPF and CAP_NET_ADMIN"},
		{"check", nil, 0, "^ok: 1 rule on 50000 ports"},
	} {
		words := append([]string{program(t, "ip", "iproute2"), "netns", "exec", n.edge, program(t, "prlimit", "util-linux"), "--nofile=4096"}, c.words...)
		cmd, _ := edgeCommand(t, ":10000-59999 -> 10.0.0.1:= mode=tcp", []string{"LOOPS=2"}, words...)
		cmd.Args[len(cmd.Args)-1] = c.verb
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		launch(t, cmd)
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != c.code || !regexp.MustCompile(c.says).Match(out.Bytes()) {
			t.Errorf("%s: exit code %d, want %d; it says %s", c.verb, code, c.code, out.Bytes())
		}
	}
}

// TestWideRangeNeedsNoRoot: but two rights.
func TestWideRangeNeedsNoRoot(t *testing.T) {
	n := newWideNetwork(t)
	n.sayPort(t, backend4, 12345)
	path, err := buildEdge()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Dir(path), filepath.Dir(t.TempDir())} { // root's own otherwise
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	state := t.TempDir()
	if err := os.Chown(state, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	const rights = "-all,+net_admin,+cap_39" // CAP_BPF
	cmd, _ := edgeCommand(t, ":10000-59999 -> "+backend4+":= mode=tcp", []string{"LOOPS=2", "CERTS=", "STATE=" + state},
		program(t, "ip", "iproute2"), "netns", "exec", n.edge, program(t, "setpriv", "util-linux"), "--reuid", "65534", "--clear-groups",
		"--inh-caps", rights, "--ambient-caps", rights, "--bounding-set", rights)
	w := &wideEdge{network: n, edge: &edge{bed: bed{log: newLogBook()}, cmd: cmd}}
	cmd.Stderr = w.log
	launch(t, cmd)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	w.log.take(t, func(l logLine) bool { return strings.Contains(l.text, `"msg":"running"`) })
	w.reaches(t, edge4, 12345, backend4, 12345)
}

// TestPortOfAnotherProgramIsNotSteered: it is an error, as with a socket of our own; and one that comes later is told of.
func TestPortOfAnotherProgramIsNotSteered(t *testing.T) {
	n := newWideNetwork(t)
	other := within(t, n.edge, func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:12345") })
	cmd, _ := edgeCommand(t, ":10000-19999 -> "+backend4+":= mode=tcp", nil, program(t, "ip", "iproute2"), "netns", "exec", n.edge)
	var out bytes.Buffer
	cmd.Stderr = &out
	launch(t, cmd)
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 3 || !strings.Contains(out.String(), "listen on :12345: address already in use; another program listens there") {
		t.Errorf("exit code %d: %s", code, out.Bytes())
	}
	n.sayPort(t, backend4, 20001)
	w := n.startWide(t, ":20000-29999 -> "+backend4+":= mode=tcp")
	if w.reload(t, ":10000-29999 -> "+backend4+":= mode=tcp") {
		t.Error("a range with another program's port was taken")
	}
	w.reaches(t, edge4, 20001, backend4, 20001)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if !w.reload(t, ":10000-29999 -> "+backend4+":= mode=tcp") {
		t.Errorf("not reloaded: %s", w.log.text())
	}
	late := within(t, n.edge, func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:12346") })
	defer late.Close()
	if !w.reload(t, ":10000-29999 -> "+backend4+":= mode=tcp idle=1m") {
		t.Errorf("not reloaded: %s", w.log.text())
	}
	w.log.take(t, func(l logLine) bool {
		return strings.Contains(l.Msg, "another program listens") && l.Listen == ":12346"
	})
}

// TestAdminInsideARangeIsAnError: it would never be reached.
func TestAdminInsideARangeIsAnError(t *testing.T) {
	for _, c := range []struct {
		admin, listen string
		taken         bool
	}{
		{"127.0.0.1:9180", ":9000-9999", true},
		{"127.0.0.1:9180", "127.0.0.1:9180", true},
		{"127.0.0.1:9180", "192.0.2.1:9000-9999", false},
		{"127.0.0.1:9180", ":9181-9999", false},
		{"off", ":9000-9999", false},
	} {
		s, err := config.ReadSettings([]string{config.Prefix + "ADMIN=" + c.admin, config.Prefix + "CERTS=" + t.TempDir(),
			config.Prefix + "MAP=" + c.listen + " -> 10.0.0.1:1 mode=tcp"})
		if err != nil {
			t.Fatal(err)
		}
		_, problems := config.Read(s)
		if got := strings.Contains(problems.String(), "the map listens there, too"); got != c.taken {
			t.Errorf("%s and %s: %s", c.admin, c.listen, problems)
		}
	}
}

// TestStatusTellsWhatIsSteered: of the ports that are served now.
func TestStatusTellsWhatIsSteered(t *testing.T) {
	if err := steer.Probe(); err != nil {
		missing(t, "can't steer here: "+steer.Reason(err))
	}
	v := startLive(t, ":{0-69} -> "+echoServer(t)+" mode=tcp")
	if l := v.gateway.Status().Listening; l != (gateway.ListeningStatus{Sockets: 2, Steered: 70}) {
		t.Errorf("%+v", l)
	}
	v.reload(t, ":{3} -> 127.0.0.1:1 mode=tcp; :{5} -> 127.0.0.1:1 mode=tcp")
	if l := v.gateway.Status().Listening; l != (gateway.ListeningStatus{Sockets: 2, Steered: 2}) {
		t.Errorf("after a reload %+v", l)
	}
}

// TestKTLSCarriesSteeredConnections: a socket that came by way of a sockmap's listener is like any other.
func TestKTLSCarriesSteeredConnections(t *testing.T) {
	k := needKernelTLS(t)
	if err := steer.Probe(); err != nil {
		missing(t, "can't steer here: "+steer.Reason(err))
	}
	b := start(t, ":{0-69} edge.test -> "+serve(t, talkBack))
	c := b.dialTLS(t, 37, nil)
	_ = c.SetDeadline(time.Time{})
	if err := pour(c, 1, 2); err != nil {
		t.Error(err)
	}
	_ = c.Close()
	if l := b.lineOf(t, c.NetConn()); l.Outcome != "ok" || l.Path != kernelPath(k, c.ConnectionState().Version) || l.Listen != fmt.Sprintf(":%d", b.ports[37]) {
		t.Errorf("line: %s", l)
	}
}
