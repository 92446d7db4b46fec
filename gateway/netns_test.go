// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// network is three machines: a client and a backend that know each other only through the one between them.
type network struct{ client, edge, backend string }

// newNetwork makes the machines of network namespaces, which end with the test.
func newNetwork(t testing.TB) *network {
	t.Helper()
	testkit.Needs(t, testkit.Root)
	if os.Geteuid() != 0 {
		missing(t, "network namespaces need root")
	}
	program(t, "ip", "iproute2")
	prefix := fmt.Sprintf("tlsnat%d", os.Getpid())
	n := &network{prefix + "c", prefix + "e", prefix + "b"}
	for _, ns := range []string{n.client, n.edge, n.backend} {
		if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
			missing(t, fmt.Sprintf("network namespaces can't be made here: %v: %s", err, out))
		}
		t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
		ip(t, "-n", ns, "link", "set", "dev", "lo", "up")
	}
	n.connect(t, n.client, 1)
	n.connect(t, n.backend, 2)
	return n
}

// connect puts a cable between a machine and the one in the middle, which is its gateway to everybody else.
func (n *network) connect(t testing.TB, ns string, number int) {
	t.Helper()
	ip(t, "link", "add", "uplink", "netns", ns, "type", "veth", "peer", "name", fmt.Sprint("down", number), "netns", n.edge)
	for i, at := range []struct{ ns, dev string }{{n.edge, fmt.Sprint("down", number)}, {ns, "uplink"}} {
		ip(t, "-n", at.ns, "link", "set", "dev", at.dev, "up")
		ip(t, "-n", at.ns, "addr", "add", fmt.Sprintf("10.77.%d.%d/24", number, i+1), "dev", at.dev)
		ip(t, "-n", at.ns, "addr", "add", fmt.Sprintf("fd77:%d::%d/64", number, i+1), "dev", at.dev, "nodad")
	}
	ip(t, "-n", ns, "route", "add", "default", "via", fmt.Sprintf("10.77.%d.1", number))
	ip(t, "-n", ns, "-6", "route", "add", "default", "via", fmt.Sprintf("fd77:%d::1", number))
}

func ip(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// within runs f on a thread that is on one of the machines. What it listens on and connects to stays there.
func within[T any](t testing.TB, ns string, f func() (T, error)) T {
	t.Helper()
	var got T
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread is no use to anybody else, and ends
		var file *os.File
		if file, err = os.Open(filepath.Join("/run/netns", ns)); err != nil {
			return
		}
		defer file.Close()
		if err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err == nil {
			got, err = f()
		}
	}()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// transparentRoutes types what the program prints for source=transparent.
func (n *network) transparentRoutes(t testing.TB) {
	t.Helper()
	path, err := buildEdge()
	if err != nil {
		t.Fatal(err)
	}
	recipe := run(t, command(t, path, "firewall", "--transparent"), "")
	cmd := command(t, program(t, "ip", "iproute2"), "netns", "exec", n.edge, "sh")
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(recipe), &out, &out
	launch(t, cmd)
	if err := cmd.Wait(); err != nil {
		missing(t, fmt.Sprintf("the routes can't be set here: %v: %s", err, out.Bytes()))
	}
}

// TestBackendSeesTheClientsAddress: with source=transparent and the routes that the program prints. Without them check
// says what is missing.
func TestBackendSeesTheClientsAddress(t *testing.T) {
	program(t, "nft", "nftables")
	n := newNetwork(t)
	const rules = ":{0} -> 10.77.2.2:8080 mode=tcp source=transparent; :{1} -> [fd77:2::2]:8080 mode=tcp source=transparent"
	check := func() string {
		cmd, _ := edgeCommand(t, rules, nil, "ip", "netns", "exec", n.edge)
		cmd.Args[len(cmd.Args)-1] = "check"
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		launch(t, cmd)
		_ = cmd.Wait()
		return out.String()
	}
	if out := check(); !strings.Contains(out, "tlsnat firewall --transparent") {
		t.Errorf("check does not say that routes are missing: %s", out)
	}
	n.transparentRoutes(t)
	if out := check(); strings.Contains(out, "transparent") {
		t.Errorf("check complains: %s", out)
	}
	for _, at := range []string{"10.77.2.2:8080", "[fd77:2::2]:8080"} {
		l := within(t, n.backend, func() (net.Listener, error) { return net.Listen("tcp", at) })
		serveOn(t, l, func(c net.Conn) {
			_, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).IP.String()+"\n")
			_, _ = io.Copy(c, c)
			_ = c.(*net.TCPConn).CloseWrite()
		})
	}
	cmd, ports := edgeCommand(t, rules, nil, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, ports)
	for i, want := range []struct{ edge, client string }{{"10.77.1.1", "10.77.1.2"}, {"fd77:1::1", "fd77:1::2"}} {
		c := within(t, n.client, func() (net.Conn, error) {
			return net.DialTimeout("tcp", net.JoinHostPort(want.edge, fmt.Sprint(e.ports[i])), patience)
		})
		_ = c.SetDeadline(time.Now().Add(patience))
		seen := make([]byte, len(want.client)+1)
		if _, err := io.ReadFull(c, seen); err != nil || string(seen) != want.client+"\n" {
			t.Errorf("the backend sees %q, want %s: %v\n%s", seen, want.client, err, e.log.text())
		}
		exchange(t, c, random(1, 1<<20))
		_ = c.Close()
	}
}

// listenFastOpen listens on the machine in the middle, and takes data with the SYN.
func (n *network) listenFastOpen(t testing.TB, at string) net.Listener {
	t.Helper()
	return within(t, n.edge, func() (net.Listener, error) {
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("3"), 0o600); err != nil {
			return nil, err
		}
		config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16) }), err)
		}}
		config.SetMultipathTCP(false)
		return config.Listen(t.Context(), "tcp", at)
	})
}

// TestFirstBytesGoWithTheSYN: to a backend that has given out a cookie (RFC 7413).
func TestFirstBytesGoWithTheSYN(t *testing.T) {
	n := newNetwork(t)
	l := n.listenFastOpen(t, "127.0.0.1:8080")
	serveOn(t, l, func(c net.Conn) { echo(c.(*net.TCPConn)) })
	cmd, ports := edgeCommand(t, ":{0} -> 127.0.0.1:8080 mode=tcp proxy=v1 fastopen=on", nil, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, ports)
	for range 3 {
		c := within(t, n.client, func() (net.Conn, error) { return net.Dial("tcp", fmt.Sprintf("10.77.1.1:%d", e.ports[0])) })
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(c, "hello")
		want := fmt.Sprintf("PROXY TCP4 10.77.1.2 10.77.1.1 %s %d\r\nhello", portOf(c.LocalAddr().String()), e.ports[0])
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
		_ = c.Close()
	}
	counters := within(t, n.edge, func() ([]byte, error) { return os.ReadFile("/proc/thread-self/net/netstat") })
	if opened := counter(t, string(counters), "TCPFastOpenActive"); opened == 0 {
		t.Error("no SYN had data")
	}
}

// TestFirstBytesComeWithTheSYN: from a client that was given a cookie, on a port with fastopen=on.
func TestFirstBytesComeWithTheSYN(t *testing.T) {
	n := newNetwork(t)
	for _, ns := range []string{n.client, n.edge} {
		within(t, ns, func() (any, error) { return nil, os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("3"), 0o600) })
	}
	l := within(t, n.backend, func() (net.Listener, error) { return net.Listen("tcp", "10.77.2.2:8080") })
	serveOn(t, l, func(c net.Conn) { echo(c.(*net.TCPConn)) })
	cmd, ports := edgeCommand(t, ":{0} -> 10.77.2.2:8080 mode=tcp fastopen=on", nil, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, ports)
	early := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) }), err)
	}}
	early.SetMultipathTCP(false)
	for i := range 4 { // the first one only gets the cookie
		c := within(t, n.client, func() (net.Conn, error) { return early.Dial("tcp", fmt.Sprintf("10.77.1.1:%d", e.ports[0])) })
		_ = c.SetDeadline(time.Now().Add(patience))
		if err := trade(c, random(uint64(i), 1000)); err != nil {
			t.Errorf("%v\n%s", err, e.log.text())
		}
		_ = c.Close()
	}
	counters := within(t, n.edge, func() ([]byte, error) { return os.ReadFile("/proc/thread-self/net/netstat") })
	if taken := counter(t, string(counters), "TCPFastOpenPassive"); taken == 0 {
		t.Error("no SYN had data")
	}
}

// TestFastOpenFailsOver: that the kernel takes bytes for a backend with a cookie says nothing about whether it is there.
func TestFastOpenFailsOver(t *testing.T) {
	n := newNetwork(t)
	doomed, other := n.listenFastOpen(t, "127.0.0.2:8080"), n.listenFastOpen(t, "127.0.0.3:8080")
	for _, l := range []net.Listener{doomed, other} {
		serveOn(t, l, func(c net.Conn) { echo(c.(*net.TCPConn)) })
	}
	cmd, ports := edgeCommand(t, ":{0} -> 127.0.0.2:8080 127.0.0.3:8080 mode=tcp proxy=v1 fastopen=on; "+
		":{1} edge.test -> 127.0.0.2:8080 127.0.0.3:8080 mode=pass fastopen=on", []string{"LOOPS=1"}, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, ports)
	hello := clientHello(t, nil)
	ask := func(i int) logLine {
		c := within(t, n.client, func() (net.Conn, error) { return net.Dial("tcp", fmt.Sprintf("10.77.1.1:%d", e.ports[i])) })
		_ = c.SetDeadline(time.Now().Add(patience))
		says, want := "hello", fmt.Sprintf("PROXY TCP4 10.77.1.2 10.77.1.1 %s %d\r\nhello", portOf(c.LocalAddr().String()), e.ports[i])
		if i == 1 {
			says, want = string(hello), string(hello)
		}
		_, _ = io.WriteString(c, says)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
		_ = c.Close()
		return e.lineOf(t, c)
	}
	for range 4 {
		ask(0) // for the cookies
	}
	_ = doomed.Close()
	for i := range 2 {
		for range 4 {
			ask(i).expect(t, logLine{Outcome: "ok", Backend: "127.0.0.3:8080"})
		}
	}
	e.becomes(t, "127.0.0.2:8080", "ejected")
	counters := within(t, n.edge, func() ([]byte, error) { return os.ReadFile("/proc/thread-self/net/netstat") })
	if opened := counter(t, string(counters), "TCPFastOpenActive"); opened == 0 {
		t.Error("no SYN had data")
	}
}

// counter is a value of /proc/net/netstat: lines of names and lines of numbers.
func counter(t testing.TB, text, name string) int {
	t.Helper()
	lines := strings.Split(text, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		if at := slices.Index(strings.Fields(lines[i]), name); at >= 0 {
			n, err := strconv.Atoi(strings.Fields(lines[i+1])[at])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}
