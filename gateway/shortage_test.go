// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// shortages is how often something could not be done for want of something.
func (b *bed) shortages(of, in string) (n uint64) {
	for _, s := range b.gateway.Status().Shortages {
		if s.Of == of && s.In == in {
			n += s.Count
		}
	}
	return n
}

// linesWith is how many lines of the log have these words.
func (b *bed) linesWith(words string) (n int) {
	for _, l := range b.log.all() {
		if strings.Contains(l.text, words) {
			n++
		}
	}
	return n
}

// TestNoFreePortIsNoBackendsFault: where source= has no port left checks say nothing, on-down=cut cuts nobody, a new client
// is told whose lack it is, and the backend is used again as soon as there is a port.
func TestNoFreePortIsNoBackendsFault(t *testing.T) {
	backend := echoServer(t)
	ports := freePorts(t, 8)
	b := start(t, fmt.Sprintf(":{0} -> %s mode=tcp source=127.0.0.3:%d-%d check=tcp every=100ms fall=1 on-down=cut eject=1", backend, ports[0], ports[7]))
	held := b.dial(t, 0)
	exchange(t, held, []byte("a"))
	var taken []net.Listener
	for _, p := range ports { // but for those that connections have already
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.3:%d", p)); err == nil {
			taken = append(taken, l)
		}
	}
	from := b.shortages("ports", "check")
	until(t, "checks are short of ports", func() bool { return b.shortages("ports", "check") > from+5 })
	refused := b.turnedAway(t, 0)
	refused.expect(t, logLine{Outcome: "connect_failed"})
	if !strings.Contains(refused.Error, "this machine has no free port") {
		t.Errorf("the line does not say whose lack it is: %s", refused)
	}
	exchange(t, held, []byte("b"))
	if x := b.backend(t, backend); x.State != "up" || x.Failures != 0 || !x.Checks[0].Up {
		t.Errorf("it counts against the backend: %+v", x)
	}
	for _, l := range taken {
		_ = l.Close()
	}
	var c net.Conn = b.dial(t, 0)
	exchange(t, c, []byte("c"))
	if said := b.linesWith("tlsnat lacks ports"); said == 0 || said > 4 {
		t.Errorf("the log says so %d times", said)
	}
}

// lower sets the limit of open files of a process to what it has open, and raise sets it back.
func (e *edge) lower(t *testing.T) (raise func()) {
	t.Helper()
	var was, low unix.Rlimit
	if err := unix.Prlimit(e.pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	low.Max = was.Max
	if err := unix.Prlimit(e.pid, unix.RLIMIT_NOFILE, &low, nil); err != nil { // a limit of 0 is about new descriptors only
		t.Fatal(err)
	}
	return func() { _ = unix.Prlimit(e.pid, unix.RLIMIT_NOFILE, &was, nil) }
}

// TestNoDescriptorIsNobodysFault: out of descriptors checks say nothing, nobody is cut, clients wait in the kernel's queue,
// and all goes on when there are some.
func TestNoDescriptorIsNobodysFault(t *testing.T) {
	for _, check := range []string{"tcp", "http:/"} {
		t.Run(check[:3], func(t *testing.T) {
			backend := serve(t, func(c *net.TCPConn) {
				defer c.Close()
				for lines := bufio.NewScanner(c); lines.Scan(); {
					if lines.Text() == "" { // the end of a request
						_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					}
				}
			})
			e := runEdge(t, fmt.Sprintf(":{0} -> %s mode=tcp check=%s every=100ms fall=1 on-down=cut eject=1", backend, check))
			held := e.dial(t, 0)
			ask := func(c net.Conn) {
				_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				if line, err := bufio.NewReader(c).ReadString('\n'); err != nil {
					t.Fatalf("%q, %v\n%v", line, err, e.log.all())
				}
			}
			ask(held)
			raise := e.lower(t)
			lacks := func(in string) {
				e.log.take(t, func(l logLine) bool {
					return l.Msg == "tlsnat lacks descriptors: that counts against nobody else" && strings.Contains(l.text, `"failed":"`+in+`"`)
				})
			}
			lacks("check")
			late := e.dial(t, 0)
			lacks("accept")
			time.Sleep(300 * time.Millisecond) // three checks
			raise()
			ask(late)
			ask(held)
			if e.linesWith("gets no new connections") > 0 {
				t.Errorf("the backend was taken out: %v", e.log.all())
			}
		})
	}
}

// TestProcessThatStoodStillBlamesNobody: an answer that came while the process did not run is seen before the time of the
// check is said to be over.
func TestProcessThatStoodStillBlamesNobody(t *testing.T) {
	const every = 200 * time.Millisecond
	var e *edge
	var mu sync.Mutex
	asked := make(chan struct{}, 100)
	backend := serve(t, func(c *net.TCPConn) {
		defer c.Close()
		if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line == "" {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if e != nil {
			_ = unix.Kill(e.pid, unix.SIGSTOP)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			time.Sleep(2 * every)
			_ = unix.Kill(e.pid, unix.SIGCONT)
		} else {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		}
		select {
		case asked <- struct{}{}:
		default:
		}
	})
	running := runEdge(t, fmt.Sprintf(":{0} -> %s mode=tcp check=http:/ every=%v fall=1", backend, every))
	mu.Lock()
	e = running
	mu.Unlock()
	for range 4 {
		<-asked
	}
	mu.Lock()
	e = nil
	mu.Unlock()
	<-asked
	if running.linesWith("gets no new connections") > 0 {
		t.Errorf("the backend was taken out: %v", running.log.all())
	}
}

// slowSocket listens on a Unix socket with room for two who wait, and takes one in 10 ms.
func slowSocket(t testing.TB) string {
	t.Helper()
	path := filepath.Join(testkit.Dir(t), "app.sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	done := make(chan struct{})
	all.Go(func() {
		for {
			conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			if err != nil {
				return
			}
			select {
			case <-done:
				_ = unix.Close(conn)
				return
			case <-time.After(10 * time.Millisecond):
			}
			all.Go(func() {
				defer unix.Close(conn)
				b := make([]byte, 8)
				if n, err := unix.Read(conn, b); err == nil && n > 0 {
					_, _ = unix.Write(conn, b[:n])
				}
			})
		}
	})
	t.Cleanup(func() {
		close(done)
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // which wakes accept
		all.Wait()
		_ = unix.Close(fd)
	})
	return path
}

// TestBusyUnixSocketIsWaitedFor: connect(2) says EAGAIN where TCP would wait. Its server is neither ejected nor down, and
// everybody is served in the end.
func TestBusyUnixSocketIsWaitedFor(t *testing.T) {
	path := slowSocket(t)
	b := start(t, ":{0} -> unix:"+path+" mode=tcp check=tcp every=500ms fall=1 eject=1 connect=30s")
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			c, err := net.Dial("tcp", b.addr(0))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			said := strconv.Itoa(i + 10)
			_, _ = io.WriteString(c, said)
			got := make([]byte, 2)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != said {
				t.Errorf("client %d got %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
	if x := b.backend(t, "unix:"+path); x.Failures != 0 || x.State != "up" {
		t.Errorf("it counts against the backend: %+v", x)
	}
}

// TestUnixSocketThatStaysBusy: the connection ends when connect= is over, and its line says why.
func TestUnixSocketThatStaysBusy(t *testing.T) {
	path := filepath.Join(testkit.Dir(t), "app.sock")
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(l, 0); err != nil {
		t.Fatal(err)
	}
	full, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	b := start(t, ":{0} -> unix:"+path+" mode=tcp eject=1 connect=300ms\n:{1} -> unix:"+path+" "+echoServer(t)+" mode=tcp eject=1")
	began := time.Now()
	line := b.turnedAway(t, 0)
	line.expect(t, logLine{Outcome: "connect_failed"})
	if !strings.Contains(line.Error, "its queue of connections is full") || strings.Count(line.Error, "unix:") != 1 {
		t.Errorf("it does not say why, once: %s", line)
	}
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("it was waited for %v", took)
	}
	for range 2 { // one of them has its turn at the full one
		c := b.dial(t, 1)
		exchange(t, c, []byte("the other one is free"))
	}
	if x := b.backend(t, "unix:"+path); x.Failures != 0 || x.State != gateway.StateWords[0] {
		t.Errorf("it counts against the backend: %+v", x)
	}
}
