// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// process is a running program and what it has written.
type process struct {
	cmd    *exec.Cmd
	out    *lines
	err    *lines
	ended  chan struct{}
	status error
}

// lines collects what is written line by line, and tells who waits.
type lines struct {
	mu    sync.Mutex
	all   []string
	news  chan struct{} // closed when there is more
	ended bool
}

func collect(r io.Reader) *lines {
	l := &lines{news: make(chan struct{})}
	go func() {
		s := bufio.NewScanner(r)
		for more := true; more; {
			more = s.Scan()
			l.mu.Lock()
			if more {
				l.all = append(l.all, s.Text())
			}
			l.ended = !more
			close(l.news)
			l.news = make(chan struct{})
			l.mu.Unlock()
		}
	}()
	return l
}

// await is the first line that has the words.
func (l *lines) await(t testing.TB, words ...string) string {
	t.Helper()
	late := time.After(patience)
	for next := 0; ; {
		l.mu.Lock()
		all, news, ended := l.all, l.news, l.ended
		l.mu.Unlock()
		for ; next < len(all); next++ {
			if hasAll(all[next], words) {
				return all[next]
			}
		}
		if ended {
			t.Fatalf("no line has %q:\n%s", words, strings.Join(all, "\n"))
		}
		select {
		case <-news:
		case <-late:
			t.Fatalf("no line has %q in time:\n%s", words, strings.Join(all, "\n"))
		}
	}
}

// text is everything so far.
func (l *lines) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.all, "\n")
}

func hasAll(line string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(line, w) {
			return false
		}
	}
	return true
}

// launch starts a command and collects what it writes.
func launch(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	out, outEnd, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, errEnd, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = outEnd, errEnd
	p := &process{cmd: cmd, out: collect(out), err: collect(stderr), ended: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	outEnd.Close()
	errEnd.Close()
	go func() {
		p.status = cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-p.ended
		out.Close()
		stderr.Close()
	})
	return p
}

func (p *process) signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// exit waits for the end and returns the code.
func (p *process) exit(t testing.TB) int {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatal("it doesn't end")
	}
	return p.cmd.ProcessState.ExitCode()
}

// running is a gateway that forwards api.bank.example to a backend of the test.
type running struct {
	*process
	port    int
	id      identity
	backend net.Listener
	admin   string
	dir     string
}

// runGateway starts "tlsnat run". The backend sends back what it gets.
func runGateway(t testing.TB, settings ...string) *running {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	r := &running{port: freePort(t), backend: l, id: issue(t, -time.Hour, 90*24*time.Hour, "api.bank.example")}
	r.dir = write(t, t.TempDir(), map[string][]byte{"certs/api.crt": r.id.cert, "certs/api.key": r.id.key})
	r.writeMap(t, "alpn=h2")
	environ := append([]string{"TLSNAT_MAP_FILE=edge.natmap", "TLSNAT_CERTS=certs", "TLSNAT_ADMIN=127.0.0.1:0"}, settings...)
	r.process = launch(t, command(t, r.dir, environ, "run"))
	var line struct{ Admin string }
	if err := json.Unmarshal([]byte(r.err.await(t, `"msg":"running"`)), &line); err != nil {
		t.Fatal(err)
	}
	r.admin = line.Admin
	return r
}

func (r *running) dial(t testing.TB) *tls.Conn {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", fmt.Sprintf("127.0.0.1:%d", r.port),
		&tls.Config{ServerName: "api.bank.example", RootCAs: r.id.pool(), NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// echo sends a word and waits for it.
func echo(t testing.TB, c net.Conn, word string) {
	t.Helper()
	if _, err := io.WriteString(c, word); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != word {
		t.Fatalf("%q, %v", got, err)
	}
}

// refused waits until nobody listens any more.
func (r *running) refused(t testing.TB) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", r.port), time.Second)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if err == nil {
			c.Close()
		}
		if time.Since(began) > patience {
			t.Fatalf("new connections are not refused: %v", err)
		}
	}
}

func TestTermLetsConnectionsEndAndExitsZero(t *testing.T) {
	r := runGateway(t)
	c := r.dial(t)
	echo(t, c, "before")
	r.signal(t, syscall.SIGTERM)
	r.err.await(t, `"msg":"draining"`, `"reason":"terminated"`)
	r.refused(t)
	echo(t, c, "after")
	c.Close()
	if code := r.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	r.err.await(t, `"msg":"connection"`, `"outcome":"ok"`, `"sni":"api.bank.example"`, `"bytes_up":11`, `"bytes_down":11`)
}

func TestSecondSignalEndsTheDrain(t *testing.T) {
	r := runGateway(t, "TLSNAT_DRAIN_TIMEOUT=1h")
	c := r.dial(t)
	echo(t, c, "x")
	r.signal(t, syscall.SIGTERM)
	r.err.await(t, `"msg":"draining"`)
	r.signal(t, syscall.SIGTERM)
	if code := r.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	r.err.await(t, `"outcome":"drained"`)
}

func TestQuitStopsNow(t *testing.T) {
	r := runGateway(t, "TLSNAT_DRAIN_TIMEOUT=1h")
	echo(t, r.dial(t), "x")
	r.signal(t, syscall.SIGQUIT)
	if code := r.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	r.err.await(t, `"outcome":"drained"`)
}

func TestDrainIsAskedForOverTheAdmin(t *testing.T) {
	r := runGateway(t)
	response := r.order(t, "drain")
	r.err.await(t, `"msg":"draining"`, `"reason":"POST /api/v1/drain"`)
	if code := r.exit(t); code != exitOK {
		t.Errorf("status %s, exit code %d", response.Status, code)
	}
}

// TestReloadByEveryWay: SIGHUP, the command and the API put a changed map in force, and say so.
func TestReloadByEveryWay(t *testing.T) {
	r := runGateway(t)
	old := r.dial(t)
	r.writeMap(t, "drain=1h")
	r.signal(t, syscall.SIGHUP)
	r.err.await(t, `"msg":"reloaded"`, `"generation":2`)
	echo(t, old, "x")
	echo(t, r.dial(t), "y")

	r.writeMap(t, "drain=2h")
	out, code := r.ask(t, "reload")
	if code != exitOK || !hasAll(out, []string{"generation 3", "1 rule added, 1 removed", "drain=2h", "drain=1h"}) {
		t.Errorf("exit code %d: %s", code, out)
	}
	r.writeMap(t, "drain=soon")
	out, code = r.ask(t, "reload")
	if code != exitInput || !hasAll(out, []string{"edge.natmap:1", "generation 3 is still served"}) {
		t.Errorf("a broken map: exit code %d: %s", code, out)
	}
	response := r.order(t, "reload")
	var answer struct {
		OK         bool
		Generation int
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil || answer.OK || answer.Generation != 3 || response.StatusCode != 422 {
		t.Errorf("a broken map over the API: %s, %+v, %v", response.Status, answer, err)
	}
	echo(t, r.dial(t), "z")
}

// TestShow: tables of the running gateway.
func TestShow(t *testing.T) {
	r := runGateway(t)
	echo(t, r.dial(t), "x")
	for what, words := range map[string][]string{
		"map":         {"LISTEN", fmt.Sprint(":", r.port), "api.bank.example", r.backend.Addr().String(), "terminate", "edge.natmap:1"},
		"conns":       {"CLIENT", "api.bank.example", "1.3", "relay"},
		"certs":       {"EXPIRES", "api.bank.example", "ECDSA P-256", "certs/api.crt"},
		"backends":    {"STATE", r.backend.Addr().String(), "up"},
		"generations": {"1 (current)"},
	} {
		if out, code := r.ask(t, "show", what); code != exitOK || !hasAll(out, words) {
			t.Errorf("show %s: exit code %d, want %q in\n%s", what, code, words, out)
		}
		out, code := r.ask(t, "show", what, "--json")
		if code != exitOK || !json.Valid([]byte(out)) {
			t.Errorf("show %s --json: exit code %d, %s", what, code, out)
		}
	}
	if out, code := r.ask(t, "show", "weather"); code != exitUsage || !strings.Contains(out, "show backends|certs|conns|generations|map") {
		t.Errorf("exit code %d: %s", code, out)
	}
	r.admin = "127.0.0.1:1"
	if out, code := r.ask(t, "show", "map"); code != exitCannot || !strings.Contains(out, "no gateway answers at http://127.0.0.1:1") {
		t.Errorf("nobody there: exit code %d: %s", code, out)
	}
}

// ask runs another command against the running gateway.
func (r *running) ask(t testing.TB, args ...string) (string, int) {
	t.Helper()
	cmd := command(t, r.dir, []string{"TLSNAT_ADMIN=" + r.admin}, args...)
	out, _ := cmd.CombinedOutput()
	return string(out), cmd.ProcessState.ExitCode()
}

// order sends an order over TCP, with the token that the gateway has made.
func (r *running) order(t testing.TB, what string) *http.Response {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(r.dir, ".cache/tlsnat/admin-token"))
	if err != nil {
		t.Fatal(err)
	}
	request, err := http.NewRequest("POST", "http://"+r.admin+"/api/v1/"+what, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	return response
}

// writeMap changes the option of the map's rule.
func (r *running) writeMap(t testing.TB, option string) {
	t.Helper()
	write(t, r.dir, map[string][]byte{"edge.natmap": fmt.Appendf(nil, ":%d api.bank.example -> %s %s\n", r.port, r.backend.Addr(), option)})
}

// TestGoneLogReaderIsNoEnd closes the pipe that the log goes to: the next line would end a process that doesn't mind
// SIGPIPE.
func TestGoneLogReaderIsNoEnd(t *testing.T) {
	id := issue(t, -time.Hour, 90*24*time.Hour, "api.bank.example")
	dir := write(t, t.TempDir(), map[string][]byte{"certs/api.crt": id.cert, "certs/api.key": id.key})
	r := &running{port: freePort(t), id: id}
	cmd := command(t, dir, []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", r.port), "TLSNAT_CERTS=certs", "TLSNAT_ADMIN=off"}, "run")
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := bufio.NewReader(log).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	log.Close()
	for range 3 { // each has its line in the log; the second follows the first one's
		c := r.dial(t)
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if answer, err := io.ReadAll(c); err != nil || !strings.Contains(string(answer), "tlsnat works") {
			t.Fatalf("%q, %v", answer, err)
		}
		c.Close()
	}
}

func TestSystemdIsTold(t *testing.T) {
	socket := filepath.Join(testkit.Dir(t), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.SetDeadline(time.Now().Add(patience))
	told := func() string {
		b := make([]byte, 4096)
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	r := runGateway(t, "NOTIFY_SOCKET="+socket)
	if got := told(); !strings.HasPrefix(got, "READY=1\n") || !strings.Contains(got, fmt.Sprint(r.port)) {
		t.Errorf("at the start: %q", got)
	}
	r.signal(t, syscall.SIGTERM)
	if got := told(); got != "STOPPING=1" {
		t.Errorf("at the end: %q", got)
	}
}

// TestKeysStayOutOfCoreDumps looks at the two things that keep them out: the limit, which holds where the kernel
// writes a file, and the mark on the process, which holds where it pipes into a program. The kernel gives the files
// in /proc of a process so marked to root; and root can still read how much memory it takes.
func TestKeysStayOutOfCoreDumps(t *testing.T) {
	r := runGateway(t)
	proc := fmt.Sprintf("/proc/%d/", r.cmd.Process.Pid)
	limits, err := os.ReadFile(proc + "limits")
	if err != nil || !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("%v\n%s", err, limits)
	}
	if os.Geteuid() == 0 {
		if _, err := os.ReadFile(proc + "smaps_rollup"); err != nil {
			t.Errorf("root can't measure it: %v", err)
		}
		r = runGatewayAsNobody(t)
		proc = fmt.Sprintf("/proc/%d/", r.cmd.Process.Pid)
	}
	info, err := os.Stat(proc + "mem")
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("the process may be dumped: its memory belongs to uid %d, %v", info.Sys().(*syscall.Stat_t).Uid, err)
	}
}

// runGatewayAsNobody serves the demo, which needs no certificate.
func runGatewayAsNobody(t *testing.T) *running {
	t.Helper()
	r := &running{port: freePort(t)}
	cmd := command(t, "/", []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", r.port), "TLSNAT_ADMIN=off",
		"TLSNAT_STATE=" + openDir(t, nobody)}, "run")
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	r.process = launch(t, cmd)
	r.err.await(t, `"msg":"running"`)
	return r
}

// openDir is a directory that a user owns, and that everyone may enter (t.TempDir's parents are closed).
func openDir(t *testing.T, uid int) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tlsnat-open-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.Chown(dir, uid, -1), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestUnreadableCertificatesSayWhatToDo has a directory, then a map, that the user may not read.
func TestUnreadableFilesSayWhatToDo(t *testing.T) {
	uid := os.Geteuid()
	if uid == 0 {
		uid = nobody
	}
	dir := openDir(t, uid)
	id := issue(t, -time.Hour, 90*24*time.Hour, "api.bank.example")
	write(t, dir, map[string][]byte{"certs/api.crt": id.cert, "certs/api.key": id.key, "edge.natmap": []byte(":443 -> 10.0.0.1:80\n")})
	if err := errors.Join(os.Chmod(filepath.Join(dir, "certs"), 0), os.Chmod(filepath.Join(dir, "edge.natmap"), 0)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(filepath.Join(dir, "certs"), 0o700) })
	cmd := command(t, dir, []string{"TLSNAT_MAP_FILE=edge.natmap", "TLSNAT_CERTS=certs"}, "check")
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	r := finish(t, cmd)
	if r.code != exitInput || strings.Count(r.err, "\n") != 2 || !strings.Contains(r.err, "edge.natmap: permission denied; make the file readable") ||
		!hasAll(r.err, []string{"certs: user ", "may not read it", "run: chown"}) {
		t.Error(r)
	}
}

func TestTakenPortIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	r := ask(t, []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo; 192.0.2.1:%d -> demo", port, freePort(t))}, "run")
	if r.code != exitCannot || r.out != "" || strings.Count(r.err, "\n") != 2 ||
		!hasAll(r.err, []string{fmt.Sprintf("listen on :%d: address already in use; another program listens there", port), "192.0.2.1", "does not have the address"}) {
		t.Error(r)
	}
}

func TestTakenAdminPortIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := ask(t, []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", freePort(t)), "TLSNAT_ADMIN=" + l.Addr().String()}, "run")
	if r.code != exitCannot || !hasAll(r.err, []string{"TLSNAT_ADMIN=" + l.Addr().String(), "address already in use"}) {
		t.Error(r)
	}
}

// TestWarningsDoNotKeepFromRunning has an expired certificate: it is in the log, and served.
func TestWarningsDoNotKeepFromRunning(t *testing.T) {
	id := issue(t, -48*time.Hour, -24*time.Hour, "api.bank.example")
	dir := write(t, t.TempDir(), map[string][]byte{"certs/api.crt": id.cert, "certs/api.key": id.key})
	p := launch(t, command(t, dir, []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", freePort(t)), "TLSNAT_CERTS=certs", "TLSNAT_ADMIN=off"}, "run"))
	line := p.err.await(t, "expired")
	if !json.Valid([]byte(line)) || !hasAll(line, []string{`"level":"warn"`, "certs/api.crt:1: the certificate for api.bank.example expired"}) {
		t.Error(line)
	}
	p.err.await(t, `"msg":"running"`)
}
