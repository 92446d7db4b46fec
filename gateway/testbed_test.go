// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// patience is how long a test waits for what has to happen. It's never reached on a machine that is merely slow.
const patience = 60 * time.Second

// beside has a test run beside others: one that mostly waits, owns everything that it touches, measures nothing, and asks
// for nothing to be done within a fraction of a second, as a check with every=100ms does. They
// run when all others have ended, and what they leave behind is looked at when all of them have.
func beside(t *testing.T) {
	t.Helper()
	t.Parallel()
	besides.Store(true)
}

// besides says that tests run beside each other now.
var besides atomic.Bool

// runAll runs the tests, and looks at what is left of the process behind them.
func runAll(m *testing.M) (code int) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		_ = flag.Set("test.parallel", "8") // more than there are processors: they wait
	}
	if err := testkit.Claim(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil { // package net keeps its epoll for good
		_ = l.Close()
	}
	goroutines, descriptors := runtime.NumGoroutine(), openDescriptors()
	if code = m.Run(); code != 0 || !besides.Load() {
		return code
	}
	if n := settled(goroutines, runtime.NumGoroutine); n > goroutines {
		fmt.Fprintf(os.Stderr, "the tests have left goroutines: %d, and before them there were %d\n", n, goroutines)
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		return 1
	}
	if n := settled(descriptors, openDescriptors); n > descriptors {
		fmt.Fprintf(os.Stderr, "the tests have left descriptors: %d, and before them there were %d:\n", n, descriptors)
		entries, _ := os.ReadDir("/proc/self/fd")
		for _, e := range entries {
			what, _ := os.Readlink("/proc/self/fd/" + e.Name())
			fmt.Fprintln(os.Stderr, e.Name(), what)
		}
		return 1
	}
	return 0
}

// bed is a running gateway, its log, and certificates for edge.test and *.wild.test. When it ends it looks at the
// goroutines and descriptors of the whole process, unless it is one of a test that runs beside others.
type bed struct {
	gateway *gateway.Gateway
	ports   []int // what stands for {0}, {1}, … in the map
	log     *logBook
	certs   string // TLSNAT_CERTS

	stopped bool
	faults  bool // the test makes some: connections may end with internal
}

// start runs a gateway with this map, in which {0}, {1}, … stand for free ports and {0-4} for five in a row. Settings
// are written without their prefix: "IDLE_TIMEOUT=1s". It ends with the test, and what it leaves behind is an error.
func start(t testing.TB, mapText string, settings ...string) *bed {
	t.Helper()
	b := &bed{log: newLogBook(), certs: pki(t).directory(t)}
	mapText, b.ports = fillPorts(t, mapText)
	// Whatever the kernel: that it opens what is received is tested where it can.
	environ := []string{config.Prefix + "KTLS=rx", config.Prefix + "MAP=" + mapText, config.Prefix + "CERTS=" + b.certs,
		config.Prefix + "STATE=" + t.TempDir(), config.Prefix + "LOG_LEVEL=debug", config.Prefix + "LOOPS=2"}
	for _, kv := range settings {
		environ = append(environ, config.Prefix+kv)
	}
	s, err := config.ReadSettings(environ)
	if err != nil {
		t.Fatal(err)
	}
	config, problems := config.Read(s)
	if config == nil {
		t.Fatalf("%v\n%s", problems, mapText)
	}
	goroutines, descriptors := runtime.NumGoroutine(), openDescriptors()
	if b.gateway, err = gateway.New(config, b.log); err != nil {
		t.Fatal(err)
	}
	if err := b.gateway.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.stop(t)
		b.audit(t)
		if besides.Load() {
			return
		}
		settles(t, "goroutines", goroutines, runtime.NumGoroutine)
		settles(t, "descriptors", descriptors, openDescriptors)
	})
	return b
}

// stop drains the gateway. Connections that are still open after some seconds are cut.
func (b *bed) stop(t testing.TB) {
	if b.stopped {
		return
	}
	b.stopped = true
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	b.gateway.Drain(ctx)
	select {
	case err := <-b.gateway.Failed():
		t.Errorf("an event loop ended: %v", err)
	default:
	}
}

// outcomes is the closed list of how a connection ends.
var outcomes = strings.Fields(`ok client_reset backend_reset idle lifetime drained bad_proxy bad_hello hello_timeout
	unknown_name denied limited handshake_failed client_cert_refused no_backend connect_failed tls_error rekey_failed internal`)

// audit holds the log against what was accepted: a line for each connection, or its part of a count, with an outcome
// of the closed list, and none that is the gateway's own fault.
func (b *bed) audit(t testing.TB) {
	t.Helper()
	ids := map[string]bool{}
	unlogged := uint64(0)
	for _, l := range b.log.all() {
		unlogged += l.Count
		if l.Msg != "connection" {
			continue
		}
		if ids[l.ID] {
			t.Errorf("two lines for one connection: %s", l)
		}
		ids[l.ID] = true
		if !slices.Contains(outcomes, l.Outcome) || l.Outcome == "internal" && !b.faults {
			t.Errorf("outcome %q: %s", l.Outcome, l)
		}
	}
	status := b.gateway.Status()
	b.auditTimes(t, &status)
	if n := status.Connections.Accepted; n != uint64(len(ids))+unlogged {
		t.Errorf("%d connections were accepted, %d are in the log and %d are counted there", n, len(ids), unlogged)
	}
	for _, n := range status.Connections.Outcomes {
		status.Connections.Accepted -= n
	}
	if n := status.Connections; n.Accepted != 0 || n.Open != 0 {
		t.Errorf("after the end %d connections have no outcome, and %d are open", n.Accepted, n.Open)
	}
}

// auditTimes holds the log against what was measured: what a line has a time of was counted once.
func (b *bed) auditTimes(t testing.TB, s *gateway.Status) {
	t.Helper()
	var lines struct{ handshakes, connects, encrypted uint64 }
	for _, l := range b.log.all() {
		if l.TLS != "" {
			lines.handshakes++
		}
		if l.Msg == "connection" && l.Backend != "" {
			lines.connects++
		}
		if l.BackendTLS != "" {
			lines.encrypted++
		}
	}
	times := &s.Times
	if n := times.Handshake.Count + times.Resumed.Count; n != lines.handshakes || n != s.Handshakes.Full+s.Handshakes.Resumed {
		t.Errorf("%d handshakes were measured, %+v counted, and %d are in the log", n, s.Handshakes, lines.handshakes)
	}
	if times.Connect.Count != lines.connects || times.Connection.Count != lines.connects {
		t.Errorf("%d connects and %d connections were measured, %d are in the log", times.Connect.Count, times.Connection.Count, lines.connects)
	}
	counted := uint64(0)
	for _, e := range s.Encryptions {
		if e.Result == "ok" {
			counted += e.Count
		}
	}
	if n := times.BackendHandshake.Count; n != lines.encrypted || n != counted {
		t.Errorf("%d handshakes with backends were measured, %d counted, and %d are in the log", n, counted, lines.encrypted)
	}
}

// conns are the newest connections that are open, at most limit of them.
func (b *bed) conns(t testing.TB, limit int) []gateway.OpenConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	open, _, missing, err := b.gateway.Conns(ctx, gateway.ConnQuery{Limit: limit})
	if err != nil || len(missing) > 0 {
		t.Fatal(err, missing)
	}
	return open
}

// addr is where the gateway listens on the i-th port of its map.
func (b *bed) addr(i int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(b.ports[i])) }

// line waits for a connection's line that matches, and takes it: the next call finds another one.
func (b *bed) line(t testing.TB, match func(logLine) bool) logLine {
	t.Helper()
	return b.log.take(t, func(l logLine) bool { return l.Msg == "connection" && match(l) })
}

// next waits for the line of any connection whose line was not taken yet.
func (b *bed) next(t testing.TB) logLine {
	t.Helper()
	return b.line(t, func(logLine) bool { return true })
}

// lineOf waits for the line of the connection whose client's end c is.
func (b *bed) lineOf(t testing.TB, c net.Conn) logLine {
	t.Helper()
	return b.line(t, func(l logLine) bool { return l.isOf(c) })
}

// isOf says whether the line is that of a client's connection. Its port alone does not tell: connections to different
// ports may share it.
func (l *logLine) isOf(c net.Conn) bool {
	return l.Peer == c.LocalAddr().String() && portOf(l.Listen) == portOf(c.RemoteAddr().String())
}

// dial connects to the i-th port.
func (b *bed) dial(t testing.TB, i int) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", b.addr(i), patience)
	if err != nil {
		t.Fatalf("%v\n%s", err, b.log.text())
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// dialTLS shakes hands on the i-th port as a client that trusts the test's CA and asks for edge.test; change, which
// may be nil, makes it another one.
func (b *bed) dialTLS(t testing.TB, i int, change func(*tls.Config)) *tls.Conn {
	t.Helper()
	c := tls.Client(b.dial(t, i), clientConfig(t, change))
	if err := c.Handshake(); err != nil {
		t.Fatalf("handshake: %v", err)
	}
	return c
}

func clientConfig(t testing.TB, change func(*tls.Config)) *tls.Config {
	config := &tls.Config{RootCAs: pki(t).roots(), ServerName: "edge.test"}
	if change != nil {
		change(config)
	}
	return config
}

// logLine is a line of the log, for connections the one that the contract describes.
type logLine struct {
	Level, Msg, ID, Outcome, Listen, Client, Peer, SNI, ALPN, TLS, Cipher, Group, JA4, Rule, Mode, Backend, Path, Stage,
	Alert, Error, Refused string
	DecidedBy     string `json:"decided_by"`
	CutShort      string `json:"cut_short"`
	Count         uint64 // of connections that have no line of their own
	Resumed       *bool
	AlertReceived string `json:"alert_received"`

	BackendTLS           string  `json:"backend_tls"`
	BackendCipher        string  `json:"backend_cipher"`
	BackendResumed       bool    `json:"backend_resumed"`
	BackendHandshakeMS   float64 `json:"backend_handshake_ms"`
	BackendAlert         string  `json:"backend_alert"`
	BackendAlertReceived string  `json:"backend_alert_received"`

	BytesUp     int64   `json:"bytes_up"`
	BytesDown   int64   `json:"bytes_down"`
	HandshakeMS float64 `json:"handshake_ms"`
	ConnectMS   float64 `json:"connect_ms"`
	DurationMS  float64 `json:"duration_ms"`

	text  string
	taken bool
}

func (l logLine) String() string { return l.text }

// resumed says whether the line says so; a line that says nothing about it is none of a TLS session.
func (l logLine) resumed() bool { return l.Resumed != nil && *l.Resumed }

// logBook is where the gateway under test logs to.
type logBook struct {
	mu    sync.Mutex
	news  *sync.Cond
	rest  []byte // the beginning of a line
	lines []logLine
}

func newLogBook() *logBook {
	b := &logBook{}
	b.news = sync.NewCond(&b.mu)
	return b
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rest = append(b.rest, p...)
	for {
		text, rest, whole := bytes.Cut(b.rest, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		l := logLine{text: string(text)}
		if err := json.Unmarshal(text, &l); err != nil {
			l.Msg = "not JSON: " + err.Error()
		}
		b.lines, b.rest = append(b.lines, l), rest
		b.news.Broadcast()
	}
}

func (b *logBook) all() []logLine {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

// take waits for a line that matches and was not taken before.
func (b *logBook) take(t testing.TB, match func(logLine) bool) logLine {
	t.Helper()
	late := false
	timer := time.AfterFunc(patience, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		late = true
		b.news.Broadcast()
	})
	defer timer.Stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		for i := range b.lines {
			if l := &b.lines[i]; !l.taken && match(*l) {
				l.taken = true
				return *l
			}
		}
		if late {
			t.Fatalf("no such line in the log:\n%s", b.text())
		}
		b.news.Wait()
	}
}

// text is the end of the log.
func (b *logBook) text() string {
	var s strings.Builder
	for _, l := range b.lines[max(0, len(b.lines)-20):] {
		fmt.Fprintln(&s, l.text)
	}
	return s.String()
}

// settles waits until count is back at what it was. Pipes that package net keeps for its own splicing go with the
// garbage.
func settles(t testing.TB, what string, was int, count func() int) {
	n := settled(was, count)
	if n <= was {
		return
	}
	t.Errorf("%s: %d, and before the gateway there were %d", what, n, was)
	if what == "goroutines" {
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	}
}

// settled is what count comes to, once it is back at what it was or enough time has passed.
func settled(was int, count func() int) (n int) {
	for deadline := time.Now().Add(15 * time.Second); ; runtime.GC() {
		if n = count(); n <= was || time.Now().After(deadline) {
			return n
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func openDescriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

var portMark = regexp.MustCompile(`\{(\d+)(?:-(\d+))?\}`)

// fillPorts puts free ports in place of {0}, {1}, … and of ranges like {0-4}.
func fillPorts(t testing.TB, text string) (string, []int) {
	t.Helper()
	ports := map[int]int{}
	for _, m := range portMark.FindAllStringSubmatch(text, -1) {
		lo, _ := strconv.Atoi(m[1])
		hi, err := strconv.Atoi(m[2])
		if err != nil {
			hi = lo
		}
		if _, ok := ports[lo]; ok {
			continue
		}
		for i, port := range freePorts(t, hi-lo+1) {
			ports[lo+i] = port
		}
	}
	text = portMark.ReplaceAllStringFunc(text, func(s string) string {
		m := portMark.FindStringSubmatch(s)
		lo, _ := strconv.Atoi(m[1])
		if m[2] == "" {
			return strconv.Itoa(ports[lo])
		}
		hi, _ := strconv.Atoi(m[2])
		return fmt.Sprintf("%d-%d", ports[lo], ports[hi])
	})
	list := make([]int, len(ports))
	for i := range list {
		if list[i] = ports[i]; list[i] == 0 {
			t.Fatalf("the ports of the map are not numbered from 0 on: {%d} is missing", i)
		}
	}
	return text, list
}

// freePorts are n ports in a row on which nobody listens, and which no other test run takes.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	return testkit.Ports(t, n)
}

// serve runs handle for each connection to a free port until the test ends, and returns the address. handle need not
// close the connection.
func serve(t testing.TB, handle func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, func(c net.Conn) { handle(c.(*net.TCPConn)) })
	return l.Addr().String()
}

func serveOn(t testing.TB, l net.Listener, handle func(net.Conn)) {
	var running sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			running.Go(func() {
				handle(c)
				mu.Lock()
				defer mu.Unlock()
				delete(open, c)
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
}

// echo sends back what it gets, and ends its stream when the other one has ended.
func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// echoServer is the address of a backend that sends back what it gets.
func echoServer(t testing.TB) string { return serve(t, echo) }

// exchange sends data and reads as much back, which has to be the same.
func exchange(t testing.TB, c net.Conn, data []byte) {
	t.Helper()
	if err := trade(c, data); err != nil {
		t.Fatal(err)
	}
}

// trade is exchange for goroutines that are not the test's own.
func trade(c net.Conn, data []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- err
	}()
	got := make([]byte, len(data))
	n, err := io.ReadFull(c, got)
	if err != nil {
		_ = c.Close() // ends the write, too
		return fmt.Errorf("read: %w after %d of %d bytes; write: %w", err, n, len(data), <-sent)
	}
	if err := <-sent; err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("%d bytes came back, but not those that were sent", n)
	}
	return nil
}

// program is the path of a program from a Debian package. Tests that need one are of the tier "peers".
func program(t testing.TB, name, pack string) string {
	t.Helper()
	return testkit.Program(t, name, pack)
}

func missing(t testing.TB, what string) {
	t.Helper()
	testkit.Missing(t, "%s", what)
}

// command is a program that ends with the test: killed if need be, also when the test's process dies first. Start it
// with launch.
func command(t testing.TB, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// launches are carried out by one thread that lives as long as the tests: Pdeathsig is bound to the thread that
// forked, not to its process.
var launches = make(chan func())

func init() {
	go func() {
		runtime.LockOSThread()
		for launch := range launches {
			launch()
		}
	}()
}

// launch starts cmd.
func launch(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	failed := make(chan error)
	launches <- func() { failed <- cmd.Start() }
	if err := <-failed; err != nil {
		t.Fatalf("start %s: %v", cmd.Path, err)
	}
}

// run runs cmd to its end and returns what it wrote; an exit code that is not 0 ends the test.
func run(t testing.TB, cmd *exec.Cmd, stdin string) string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	launch(t, cmd)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s\n%s", cmd, err, out.Bytes(), errs.Bytes())
	}
	return out.String()
}

// server runs cmd until the test ends, and waits until it accepts connections on addr (a path is a Unix socket).
func server(t testing.TB, cmd *exec.Cmd, addr string) {
	t.Helper()
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	launch(t, cmd)
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() { <-ended })
	network := "tcp"
	if filepath.IsAbs(addr) {
		network = "unix"
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial(network, addr); err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-ended:
			t.Fatalf("%s ended: %s", cmd, said.Bytes())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen on %s", cmd, addr)
		}
	}
}

// underRace says whether the race detector is on, which makes everything many times slower.
var underRace = func() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}()

// random is n bytes that look random, the same for the same seed.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = mathrand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// authority is the test's CA with an intermediate, and the leaves that it has signed.
type authority struct {
	root, middle *identity
	leaves       map[string]*identity // by file name
}

// identity is a certificate with its key.
type identity struct {
	*x509.Certificate
	key crypto.Signer
}

var makePKI = sync.OnceValues(newAuthority)

// pki is the same for all tests: RSA keys take long to make.
func pki(t testing.TB) *authority {
	t.Helper()
	a, err := makePKI()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newAuthority() (*authority, error) {
	a := &authority{leaves: map[string]*identity{}}
	var err error
	if a.root, err = issue(nil, "tlsnat test root", ecdsaKey); err != nil {
		return nil, err
	}
	if a.middle, err = issue(a.root, "tlsnat test intermediate", ecdsaKey); err != nil {
		return nil, err
	}
	edge, wild := []string{"edge.test"}, []string{"*.wild.test", "*.b.wild.test"}
	for _, leaf := range []struct {
		file  string
		key   func() (crypto.Signer, error)
		names []string
	}{{"edge-ecdsa", ecdsaKey, edge}, {"edge-rsa", rsaKey, edge}, {"wild-ecdsa", ecdsaKey, wild}, {"wild-rsa", rsaKey, wild}} {
		if a.leaves[leaf.file], err = issue(a.middle, leaf.file, leaf.key, leaf.names...); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func ecdsaKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }
func rsaKey() (crypto.Signer, error)   { return rsa.GenerateKey(rand.Reader, 2048) }

// issue makes a certificate, signed by by or by itself: a leaf if it has names, else a CA.
func issue(by *identity, cn string, newKey func() (crypto.Signer, error), names ...string) (*identity, error) {
	return issueWith(by, cn, newKey, time.Now().Add(-time.Hour), time.Now().Add(90*24*time.Hour), names...)
}

// issueFor makes a certificate that is valid from one time to another.
func issueFor(by *identity, from, to time.Time, names ...string) (*identity, error) {
	return issueWith(by, "dated", ecdsaKey, from, to, names...)
}

func issueWith(by *identity, cn string, newKey func() (crypto.Signer, error), from, to time.Time, names ...string) (*identity, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: cn}, DNSNames: names,
		NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if len(names) == 0 {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.KeyUsage, template.ExtKeyUsage = x509.KeyUsageCertSign, nil
	}
	id := &identity{template, key}
	if by == nil {
		by = id
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.Certificate, key.Public(), by.key)
	if err != nil {
		return nil, err
	}
	id.Certificate, err = x509.ParseCertificate(der)
	return id, err
}

func (a *authority) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.root.Certificate)
	return pool
}

func (id *identity) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: id.Raw})
}

func (id *identity) keyPEM() []byte {
	der, err := x509.MarshalPKCS8PrivateKey(id.key)
	if err != nil {
		panic(err) // an ECDSA or RSA key always can
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// chainPEM is a leaf with the intermediate behind it, as a server has to send it.
func (a *authority) chainPEM(leaf string) []byte {
	return append(a.leaves[leaf].pem(), a.middle.pem()...)
}

// rootFile writes the CA's certificate where curl and openssl can read it.
func (a *authority) rootFile(t testing.TB) string { return writeFile(t, "root.pem", a.root.pem()) }

// directory writes a TLSNAT_CERTS with every leaf: chain and key in one file.
func (a *authority) directory(t testing.TB) string {
	dir := t.TempDir()
	for name := range a.leaves {
		if err := os.WriteFile(filepath.Join(dir, name+".pem"), append(a.chainPEM(name), a.leaves[name].keyPEM()...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// writeFile writes a file that lives as long as the test.
func writeFile(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
