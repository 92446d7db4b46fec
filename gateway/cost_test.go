// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// edge is the program in a process of its own, as an operator runs it. Its bed has ports and log, and no gateway.
type edge struct {
	bed
	cmd *exec.Cmd
	pid int
}

// buildDir is where the program is built, once for all tests.
var buildDir string

func TestMain(m *testing.M) {
	code := runAll(m)
	if buildDir != "" {
		_ = os.RemoveAll(buildDir)
	}
	os.Exit(code)
}

// buildEdge builds the program as it's shipped: what it costs is measured without the race detector.
var buildEdge = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "tlsnat-test-")
	if err != nil {
		return "", err
	}
	buildDir = dir
	path := filepath.Join(dir, "tlsnat")
	if out, err := exec.Command("go", "build", "-o", path, "../cmd/tlsnat").CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// edgeCommand is the program with this map and these settings, which are written as for start. A wrapper, such as
// strace, may come before it.
func edgeCommand(t testing.TB, mapText string, settings []string, wrapper ...string) (*exec.Cmd, []int) {
	t.Helper()
	path, err := buildEdge()
	if err != nil {
		t.Fatal(err)
	}
	text, ports := fillPorts(t, mapText)
	words := append(wrapper, path, "run")
	cmd := command(t, words[0], words[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), config.Prefix + "MAP=" + text,
		config.Prefix + "CERTS=" + pki(t).directory(t), config.Prefix + "ADMIN=off", config.Prefix + "LOG_LEVEL=debug"}
	for _, kv := range settings {
		cmd.Env = append(cmd.Env, config.Prefix+kv)
	}
	return cmd, ports
}

// runEdge starts the program and waits until it listens. It's killed with the test if it runs still.
func runEdge(t testing.TB, mapText string, settings ...string) *edge {
	t.Helper()
	cmd, ports := edgeCommand(t, mapText, settings)
	return startEdge(t, cmd, ports)
}

func startEdge(t testing.TB, cmd *exec.Cmd, ports []int) *edge {
	t.Helper()
	e := &edge{bed: bed{ports: ports, log: newLogBook()}, cmd: cmd}
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(testkit.Dir(t), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+ready.LocalAddr().String())
	cmd.Stderr = e.log
	launch(t, cmd)
	e.pid = cmd.Process.Pid
	_ = ready.SetReadDeadline(time.Now().Add(patience))
	said := make([]byte, 256)
	n, err := ready.Read(said)
	if err != nil || !bytes.HasPrefix(said[:n], []byte("READY=1")) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("it does not start: %q, %v\n%s", said[:n], err, e.log.text())
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return e
}

// signal sends one.
func (e *edge) signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := e.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// exit waits for the end of the process and returns its exit code.
func (e *edge) exit(t testing.TB) int {
	t.Helper()
	timer := time.AfterFunc(patience, func() { _ = e.cmd.Process.Signal(syscall.SIGABRT) }) // it says where it hangs
	defer timer.Stop()
	err := e.cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	}
	return e.cmd.ProcessState.ExitCode()
}

// pss is the process's share of memory, in bytes.
func (e *edge) pss(t testing.TB) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", e.pid))
	if err != nil {
		e.unseen(t, err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "Pss:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatalf("no Pss in\n%s", b)
	return 0
}

// unseen is a process that can't be looked into: it hides itself from everybody but root.
func (e *edge) unseen(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, os.ErrPermission) {
		missing(t, fmt.Sprintf("%v: only root may look into the process", err))
	}
	t.Fatal(err)
}

// descriptors counts those of the process that are of a kind: "socket:", "pipe:".
func (e *edge) descriptors(t testing.TB, kind string) (n int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", e.pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		e.unseen(t, err)
	}
	for _, entry := range entries {
		if link, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil && strings.HasPrefix(link, kind) {
			n++
		}
	}
	return n
}

// restingSockets counts the sockets of a process without connections, once the number stays the same.
func (e *edge) restingSockets(t testing.TB) int {
	t.Helper()
	n := -1
	for same := 0; same < 10; time.Sleep(10 * time.Millisecond) {
		was := n
		if n = e.descriptors(t, "socket:"); n == was {
			same++
		} else {
			same = 0
		}
	}
	return n
}

// crowd opens n connections, some at a time, and closes them with the test.
func crowd[T io.Closer](t testing.TB, n int, open func() (T, error)) []T {
	t.Helper()
	const atOnce = 16
	var (
		mu      sync.Mutex
		all     = make([]T, 0, n)
		failed  error
		workers sync.WaitGroup
	)
	for i := range atOnce {
		workers.Go(func() {
			for j := i; j < n; j += atOnce {
				c, err := open()
				mu.Lock()
				if err == nil {
					all = append(all, c)
				} else {
					failed = errors.Join(failed, err)
				}
				stop := failed != nil
				mu.Unlock()
				if stop {
					return
				}
			}
		})
	}
	workers.Wait()
	t.Cleanup(func() { closeAll(all) })
	if failed != nil {
		t.Fatal(failed)
	}
	return all
}

func closeAll[T io.Closer](all []T) {
	for _, c := range all {
		_ = c.Close()
	}
}

// TestIdleConnectionsCostLittle: 4,000 terminated connections that have exchanged data and are quiet cost at most
// 2.5 KiB each, and two descriptors.
func TestIdleConnectionsCostLittle(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	const n, limit = 4000, 2560
	e := runEdge(t, ":{0} edge.test -> "+echoServer(t), "LOOPS=2")
	open := func() (*tls.Conn, error) {
		raw, err := net.DialTimeout("tcp", e.addr(0), patience)
		if err != nil {
			return nil, err
		}
		c := tls.Client(raw, clientConfig(t, nil))
		_ = c.SetDeadline(time.Now().Add(patience))
		if err := trade(c, []byte("data echoed once")); err != nil {
			_ = c.Close()
			return nil, err
		}
		return c, nil
	}
	closeAll(crowd(t, 64, open)) // what every process needs once
	before, sockets := e.pss(t), e.restingSockets(t)
	conns := crowd(t, n, open)
	cost := int64(limit + 1)
	for began := time.Now(); cost > limit && time.Since(began) < patience; time.Sleep(time.Second) {
		cost = (e.pss(t) - before) / n // once they are parked and the garbage is gone
	}
	t.Logf("%d bytes a connection", cost)
	if cost > limit {
		t.Errorf("an idle connection costs %d bytes, want at most %d", cost, limit)
	}
	if got := e.descriptors(t, "socket:") - sockets; got != 2*n {
		t.Errorf("%d connections have %d sockets, want two each", n, got)
	}
	if pipes := e.descriptors(t, "pipe:"); pipes > 2 {
		t.Errorf("%d pipes", pipes)
	}
	for _, c := range conns[:50] { // they are awake at once
		if err := trade(c, []byte("still there?")); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHalfHellosCostLittle: 10,000 clients that say half of their hello cost at most 3 KiB each, and all of them are
// gone at the hello timeout.
func TestHalfHellosCostLittle(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	const n, limit, timeout = 10_000, 3 << 10, 6 * time.Second
	needDescriptors(t, n+500)
	e := runEdge(t, ":{0} edge.test -> "+echoServer(t), "LOOPS=2", "MAX_CONNS=12000", "HELLO_TIMEOUT="+timeout.String())
	hello := clientHello(t, nil)
	before, sockets := e.pss(t), e.restingSockets(t)
	began := time.Now()
	crowd(t, n, func() (net.Conn, error) {
		c, err := net.DialTimeout("tcp", e.addr(0), patience)
		if err == nil {
			_, err = c.Write(hello[:len(hello)/2])
		}
		return c, err
	})
	got := 0
	for got < n && time.Since(began) < timeout {
		got = e.descriptors(t, "socket:") - sockets
	}
	cost := (e.pss(t) - before) / n
	t.Logf("%d bytes a connection, all there after %v", cost, time.Since(began))
	if cost > limit {
		t.Errorf("half a hello costs %d bytes, want at most %d", cost, limit)
	}
	if got != n {
		t.Errorf("%d connections have %d sockets, want one each", n, got)
	}
	for range 100 { // the others are counted: no source fills the log
		l := e.next(t)
		if l.Outcome != "hello_timeout" || l.DurationMS < float64(timeout.Milliseconds()) || l.DurationMS > float64(timeout.Milliseconds())+5000 {
			t.Fatalf("line: %s", l)
		}
	}
	settles(t, "sockets", sockets, func() int { return e.descriptors(t, "socket:") })
}

// needDescriptors skips a test that needs more than a process may have.
func needDescriptors(t testing.TB, n int) {
	t.Helper()
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || r.Cur < uint64(n) {
		missing(t, fmt.Sprintf("%d descriptors are allowed, and %d needed: ulimit -n", r.Cur, n))
	}
}

// TestSpliceCarriesBulk: what isn't decrypted doesn't come to user space. The log says so, the counter says so, and the
// kernel does.
func TestSpliceCarriesBulk(t *testing.T) {
	const size = 48 << 20
	x := newCrossing(t)
	for _, w := range ways[2:4] {
		t.Run(w.name, func(t *testing.T) {
			before := x.gateway.Status().Bytes
			client, backend := x.cross(t, w)
			bulkBothWays(t, client, backend, size)
			l := x.lineOf(t, client.tcp)
			now := x.gateway.Status().Bytes
			if l.Path != "splice" || l.Outcome != "ok" || l.BytesDown != size {
				t.Errorf("line: %s", l)
			}
			if spliced := now.Spliced - before.Spliced; spliced < 2*size*9/10 || spliced > now.Up+now.Down-before.Up-before.Down {
				t.Errorf("%d of %d bytes were spliced", spliced, 2*size)
			}
		})
	}
	t.Run("small messages are copied", func(t *testing.T) {
		before := x.gateway.Status().Bytes.Spliced
		client, backend := x.cross(t, ways[3])
		for range 20 {
			for _, pair := range [][2]*end{{client, backend}, {backend, client}} {
				pair[0].send(t, []byte("a small message"))
				if _, err := io.ReadFull(pair[1], make([]byte, 15)); err != nil {
					t.Fatal(err)
				}
			}
		}
		client.finish()
		backend.finish()
		if l := x.lineOf(t, client.tcp); l.Path != "user" || x.gateway.Status().Bytes.Spliced != before {
			t.Errorf("line: %s", l)
		}
	})
}

// bulkBothWays sends so many bytes each way at the same time and compares what arrives.
func bulkBothWays(t *testing.T, client, backend *end, size int) {
	t.Helper()
	up, down := random(1, size), random(2, size)
	var sending sync.WaitGroup
	sending.Go(func() { client.send(t, up); client.finish() })
	sending.Go(func() { backend.send(t, down); backend.finish() })
	got := inBackground(func() { backend.expect(t, up, fin) })
	client.expect(t, down, fin)
	<-got
	sending.Wait()
}

// TestKernelSeesSplice counts the system calls of the process from outside.
func TestKernelSeesSplice(t *testing.T) {
	strace := program(t, "strace", "strace")
	backend := echoServer(t)
	e := runEdge(t, fmt.Sprintf(":{0} -> %[1]s mode=tcp\n:{1} edge.test -> %[1]s mode=pass", backend), "LOOPS=2")
	counts := filepath.Join(t.TempDir(), "counts")
	cmd := command(t, strace, "-f", "-c", "-e", "trace=splice", "-o", counts, "-p", strconv.Itoa(e.pid))
	said := newMatcher("attached")
	cmd.Stderr = said
	launch(t, cmd)
	if !said.wait(patience) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		missing(t, "strace can't attach to a process: "+said.String())
	}
	hello := clientHello(t, nil)
	const size = 16 << 20
	for i := range 2 {
		c := e.dial(t, i)
		data := random(3, size)
		if i == 1 {
			copy(data, hello)
		}
		exchange(t, c, data)
		_ = c.Close()
		e.lineOf(t, c)
	}
	e.signal(t, syscall.SIGTERM)
	if code := e.exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	_ = cmd.Wait()
	table, err := os.ReadFile(counts)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) < 5 || f[len(f)-1] != "splice" {
			continue
		}
		calls, err := strconv.Atoi(f[3])
		if err != nil || calls < 2*2*2*size>>20 { // in and out of a pipe of 1 MiB, both ways, two connections
			t.Errorf("too few calls of splice for %d MiB:\n%s", 4*size>>20, table)
		}
		return
	}
	t.Errorf("splice was not called:\n%s", table)
}

// matcher is a writer that waits for a word.
type matcher struct {
	mu   sync.Mutex
	text []byte
	word string
	seen chan struct{}
}

func newMatcher(word string) *matcher { return &matcher{word: word, seen: make(chan struct{})} }

func (m *matcher) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	had := bytes.Contains(m.text, []byte(m.word))
	m.text = append(m.text, p...)
	if !had && bytes.Contains(m.text, []byte(m.word)) {
		close(m.seen)
	}
	return len(p), nil
}

func (m *matcher) wait(d time.Duration) bool {
	select {
	case <-m.seen:
		return true
	case <-time.After(d):
		return false
	}
}

func (m *matcher) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.text)
}

// TestIdlePassthroughHoldsNoPipe: pipes belong to the loop, and are lent for as long as bytes are in them.
func TestIdlePassthroughHoldsNoPipe(t *testing.T) {
	const n, idlePipes = 64, 16
	e := runEdge(t, ":{0} -> "+echoServer(t)+" mode=tcp", "LOOPS=1")
	before := e.descriptors(t, "pipe:")
	data := random(4, 3<<20)
	conns := crowd(t, n, func() (net.Conn, error) {
		c, err := net.DialTimeout("tcp", e.addr(0), patience)
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(patience))
			err = trade(c, data)
		}
		return c, err
	})
	if pipes := e.descriptors(t, "pipe:") - before; pipes > 2*idlePipes {
		t.Errorf("%d connections that are idle after streaming hold %d ends of pipes; the loop keeps %d", n, pipes, 2*idlePipes)
	} else if pipes == 0 {
		t.Error("no pipe at all: nothing was spliced")
	}
	if sockets := e.descriptors(t, "socket:"); sockets < 2*n {
		t.Errorf("%d sockets: the connections are gone", sockets)
	}
	for _, c := range conns {
		if err := trade(c, data[:100]); err != nil {
			t.Fatalf("an idle connection after streaming: %v", err)
		}
	}
}

// TestAcceptSurvivesRunningOutOfDescriptors: clients wait, nothing spins, and it goes on when there are descriptors
// again.
func TestAcceptSurvivesRunningOutOfDescriptors(t *testing.T) {
	const room, n = 20, 60
	e := runEdge(t, ":{0} edge.test -> "+echoServer(t), "MAX_CONNS=1000", "HELLO_TIMEOUT=1m", "LOOPS=2")
	sockets := e.restingSockets(t)
	limit := uint64(e.descriptors(t, "") + room)
	if err := unix.Prlimit(e.pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
		t.Fatal(err)
	}
	in := crowd(t, n, func() (net.Conn, error) { return net.DialTimeout("tcp", e.addr(0), patience) })
	settles(t, "free descriptors", 0, func() int { return int(limit) - e.descriptors(t, "") })
	e.log.take(t, func(l logLine) bool { return l.Level == "warn" && strings.Contains(l.text, "too many open files") })
	spent := e.cpu(t)
	time.Sleep(time.Second)
	if spent = e.cpu(t) - spent; spent > 100*time.Millisecond {
		t.Errorf("out of descriptors it spends %v of CPU in a second", spent)
	}
	if got := e.descriptors(t, "socket:") - sockets; got >= n {
		t.Errorf("%d connections with descriptors for about %d", got, room)
	}
	closeAll(in[:n-room/2]) // some of them are in, the others wait; for those that stay there is room then
	for _, c := range in[n-room/2:] {
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(c)
		if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 400 ")) {
			t.Fatalf("one that had to wait: %q, %v", answer, err)
		}
	}
}

// cpu is how much CPU time the process has used.
func (e *edge) cpu(t testing.TB) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^e.pid<<3|2), &ts); err != nil { // CPUCLOCK_SCHED of the process, see clock_getcpuclockid(3)
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
