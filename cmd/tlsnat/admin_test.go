// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// TestCommandsUseTheSocket: with TCP switched off they need nothing else, and the log says who it was.
func TestCommandsUseTheSocket(t *testing.T) {
	dir := write(t, t.TempDir(), map[string][]byte{})
	settings := []string{fmt.Sprintf("TLSNAT_MAP=:%d -> 127.0.0.1:1 mode=tcp", freePort(t)), "TLSNAT_ADMIN=off", "TLSNAT_ADMIN_SOCKET=" + filepath.Join(dir, "x.sock")}
	p := launch(t, command(t, dir, settings, "run"))
	p.err.await(t, `"msg":"running"`, `"admin":""`, `"admin_socket":"`+filepath.Join(dir, "x.sock"))
	for _, args := range [][]string{{"show", "map"}, {"reload"}, {"backend", "drain", "127.0.0.1:1"}} {
		if r := finish(t, command(t, dir, settings, args...)); r.code != exitOK {
			t.Errorf("tlsnat %q: %s", args, r)
		}
	}
	p.err.await(t, `"msg":"order"`, `"order":"backends/drain"`, `"backend":"127.0.0.1:1"`, fmt.Sprintf(`"by":"socket","uid":%d,"gid":%d,"pid":`, os.Getuid(), os.Getgid()), `"result":"done"`)
	if r := finish(t, command(t, dir, settings[1:2], "reload")); r.code != exitCannot || !strings.Contains(r.err, "switched off") {
		t.Error(r)
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t)
	if r := finish(t, command(t, dir, settings, "reload")); r.code != exitCannot || !hasAll(r.err, []string{"no gateway answers at", "x.sock"}) {
		t.Error(r)
	}
}

// TestCommandsGoWithoutASocket: by TCP with the token that was made, as another user they don't.
func TestCommandsGoWithoutASocket(t *testing.T) {
	r := runGateway(t, "TLSNAT_ADMIN_SOCKET=off")
	if out, code := r.ask(t, "reload"); code != exitOK {
		t.Errorf("exit code %d: %s", code, out)
	}
	cmd := command(t, t.TempDir(), []string{"TLSNAT_ADMIN=" + r.admin}, "reload")
	if a := finish(t, cmd); a.code != exitCannot || !strings.Contains(a.err, "TLSNAT_ADMIN_TOKEN") {
		t.Error(a)
	}
	file := write(t, t.TempDir(), map[string][]byte{"token": []byte("of the operator\r\n")})
	s := runGateway(t, "TLSNAT_ADMIN_SOCKET=off", "TLSNAT_ADMIN_TOKEN_FILE="+file+"/token")
	for _, c := range []struct {
		setting string
		code    int
	}{{"TLSNAT_ADMIN_TOKEN=of the operator", exitOK}, {"TLSNAT_ADMIN_TOKEN_FILE=" + file + "/token", exitOK}, {"TLSNAT_ADMIN_TOKEN=x", exitCannot}, {"TLSNAT_ADMIN_TOKEN_FILE=/nowhere", exitCannot}} {
		if a := finish(t, command(t, t.TempDir(), []string{"TLSNAT_ADMIN=" + s.admin, c.setting}, "reload")); a.code != c.code {
			t.Errorf("%s: %s", c.setting, a)
		}
	}
}

// TestTokenIsNotShownToAProxy: what http_proxy names hears nothing of what is asked of a gateway.
func TestTokenIsNotShownToAProxy(t *testing.T) {
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	asked := make(chan struct{})
	go func() {
		if c, err := proxy.Accept(); err == nil {
			c.Close()
			close(asked)
		}
	}()
	// An address that nobody has (RFC 5737): loopback ones go past proxies anyway.
	environ := []string{"TLSNAT_ADMIN=192.0.2.1:9180", "TLSNAT_ADMIN_TOKEN=secret"}
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"} {
		environ = append(environ, name+"=http://"+proxy.Addr().String())
	}
	cmd := command(t, t.TempDir(), environ, "reload")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	select {
	case <-asked:
		t.Error("the proxy was asked")
	case <-ended:
	case <-time.After(500 * time.Millisecond): // it tries to connect; a proxy would have been asked at once
	}
	_ = cmd.Process.Kill()
	<-ended
}

// TestShutdownDelayLetsLoadBalancersNotice: /readyz fails first, and clients are still served until the delay is over.
func TestShutdownDelayLetsLoadBalancersNotice(t *testing.T) {
	r := runGateway(t, "TLSNAT_SHUTDOWN_DELAY=1h")
	r.signal(t, syscall.SIGTERM)
	r.err.await(t, `"msg":"shutting down`, `"delay":"1h0m0s"`)
	response, err := http.Get("http://" + r.admin + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("/readyz: %s", response.Status)
	}
	echo(t, r.dial(t), "who comes late")
	r.signal(t, syscall.SIGTERM)
	if code := r.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	r.err.await(t, `"outcome":"drained"`)

	r = runGateway(t, "TLSNAT_SHUTDOWN_DELAY=200ms")
	r.signal(t, syscall.SIGTERM)
	r.err.await(t, `"msg":"draining"`)
	if code := r.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// TestHungLogReaderDoesNotKeepItFromEnding: nobody reads what it writes any more, and the pipe is full.
func TestHungLogReaderDoesNotKeepItFromEnding(t *testing.T) {
	dir := write(t, t.TempDir(), map[string][]byte{})
	at := freePort(t)
	cmd := command(t, dir, []string{fmt.Sprintf("TLSNAT_MAP=:%d -> 127.0.0.1:1 mode=tcp", at), "TLSNAT_ADMIN=off", "TLSNAT_LOG_LEVEL=debug"}, "run")
	log, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if _, err := unix.FcntlInt(end.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = end
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end.Close()
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	for n, began := 0, time.Now(); n < 40; { // each has a line of 300 bytes and more
		if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", at)); err == nil {
			c.Close()
			n++
		} else if time.Since(began) > patience {
			t.Fatal(err)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("SIGTERM does not end it")
	}
	if code := cmd.ProcessState.ExitCode(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// silentDNS is a server that never answers: the start waits for it.
func silentDNS(t *testing.T) (addr string, asked <-chan struct{}) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	heard := make(chan struct{})
	go func() {
		if _, _, err := c.ReadFrom(make([]byte, 512)); err == nil {
			close(heard)
		}
	}()
	return c.LocalAddr().String(), heard
}

// TestSignalsWhileItStarts: a reload waits until it runs, an end does not, and what is meant for other servers is nothing.
func TestSignalsWhileItStarts(t *testing.T) {
	start := func() *process {
		dns, asked := silentDNS(t)
		p := launch(t, command(t, t.TempDir(), []string{fmt.Sprintf("TLSNAT_MAP=:%d -> back.test:1 mode=tcp", freePort(t)), "TLSNAT_ADMIN=off", "TLSNAT_RESOLVER=" + dns}, "run"))
		select {
		case <-asked:
		case <-time.After(patience):
			t.Fatal("nobody asked the DNS server")
		}
		return p
	}
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		p := start()
		p.signal(t, s)
		if code := p.exit(t); code != exitOK || strings.Contains(p.err.text(), `"msg":"running"`) {
			t.Errorf("%v: exit code %d\n%s", s, code, p.err.text())
		}
	}
	p := start()
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE} {
		p.signal(t, s)
	}
	p.err.await(t, `"msg":"running"`)
	p.err.await(t, `"msg":"reloaded"`)
}

// TestAdminAnswersWithoutDescriptors: when connections have taken all of them, health, metrics and orders go on.
func TestAdminAnswersWithoutDescriptors(t *testing.T) {
	dir := write(t, t.TempDir(), map[string][]byte{})
	at := freePort(t)
	cmd := command(t, dir, []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", at), "TLSNAT_ADMIN=127.0.0.1:0", "TLSNAT_MAX_CONNS=100000", "TLSNAT_LOOPS=1"}, "run")
	cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", "ulimit -n 150 && exec " + tlsnat + " run"}
	p := launch(t, cmd)
	var line struct{ Admin, Admin_socket string }
	if err := json.Unmarshal([]byte(p.err.await(t, `"msg":"running"`)), &line); err != nil {
		t.Fatal(err)
	}
	for range 300 {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", at))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	p.err.await(t, "too many open files")
	for range 30 { // more than are in reserve: they come back
		for _, path := range []string{"/readyz", "/metrics", "/api/v1/status"} {
			response, err := http.Get("http://" + line.Admin + path)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err != nil || response.StatusCode != http.StatusOK {
				t.Fatalf("%s: %s: %.200s, %v", path, response.Status, body, err)
			}
			if path == "/metrics" && !strings.Contains(string(body), "\ntlsnat_accept_pauses_total ") {
				t.Errorf("%.500s", body)
			}
		}
	}
	r := &running{process: p, admin: line.Admin, dir: dir}
	if response := r.order(t, "reload"); response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(response.Body)
		t.Errorf("reload over TCP: %s: %s", response.Status, text)
	}
	if out, code := r.ask(t, "reload"); code != exitOK {
		t.Errorf("reload over the socket: exit code %d: %s", code, out)
	}
}

// TestServiceCalledTlsnatIsNoSetting: Kubernetes' and Docker's variables are passed over, a slip is not.
func TestServiceCalledTlsnatIsNoSetting(t *testing.T) {
	m := "TLSNAT_MAP=:9443 -> 127.0.0.1:1 mode=tcp"
	service := []string{m, "TLSNAT_ADMIN=off", "TLSNAT_PORT=tcp://10.96.0.12:443", "TLSNAT_SERVICE_HOST=10.96.0.12", "TLSNAT_SERVICE_PORT=443", "TLSNAT_SERVICE_PORT_HTTPS=443",
		"TLSNAT_PORT_443_TCP=tcp://10.96.0.12:443", "TLSNAT_PORT_443_TCP_PROTO=tcp", "TLSNAT_PORT_443_TCP_PORT=443", "TLSNAT_PORT_443_TCP_ADDR=10.96.0.12",
		"TLSNAT_ADMIN_SERVICE_HOST=fd00::1", "TLSNAT_ADMIN_PORT=tcp://[fd00::1]:9180", "TLSNAT_ADMIN_PORT_9180_TCP=tcp://[fd00::1]:9180", "TLSNAT_EDGE_PORT_53_UDP=udp://10.0.0.1:53"}
	if r := ask(t, service, "check"); r.code != exitOK {
		t.Error(r)
	}
	for _, slip := range []string{"TLSNAT_MAPFILE=x", "TLSNAT_PORT=443", "TLSNAT_SERVICE_PORT=https", "TLSNAT_SERVICE_HOST=edge", "TLSNAT_PORT_443=tcp", "TLSNAT_ADMIN_PORT=9180"} {
		if r := ask(t, []string{m, "TLSNAT_ADMIN=off", slip}, "check"); r.code != exitInput || !strings.Contains(r.err, "there is no such setting") {
			t.Errorf("%s: %s", slip, r)
		}
	}
}

// TestStateOfSomebodyElseIsNotTaken: in /tmp anybody may have made the directory first.
func TestStateOfSomebodyElseIsNotTaken(t *testing.T) {
	shared := openDir(t, os.Getuid())
	if err := os.Chmod(shared, 0o1777); err != nil {
		t.Fatal(err)
	}
	demo := func(state string) *process {
		p := launch(t, command(t, t.TempDir(), []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", freePort(t)), "TLSNAT_ADMIN=off", "TLSNAT_STATE=" + state}, "run"))
		return p
	}
	mine, open, link := filepath.Join(shared, "mine"), filepath.Join(shared, "open"), filepath.Join(shared, "link")
	for _, err := range []error{os.Mkdir(mine, 0o755), os.Mkdir(open, 0o700), os.Chmod(open, 0o777), os.Symlink(mine, link)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(state, why string) {
		t.Helper()
		p := demo(state)
		if code := p.exit(t); code != exitInput || !strings.Contains(p.err.text(), why) {
			t.Errorf("%s: exit code %d: %s", state, code, p.err.text())
		}
	}
	refused(open, "others may write to")
	p := demo(mine)
	p.err.await(t, `"msg":"running"`)
	if info, err := os.Stat(mine); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if os.Geteuid() != 0 {
		return
	}
	theirs := filepath.Join(shared, "theirs")
	for _, err := range []error{os.Mkdir(theirs, 0o700), os.Chown(theirs, nobody, nobody), os.Lchown(link, nobody, nobody)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	refused(theirs, "belongs to uid 65534")
	refused(link, "is a symbolic link of uid 65534")
}

// TestUnitReloadsByCommand: systemd hears of a map that is broken. And what ends it from outside starts it again.
func TestUnitReloadsByCommand(t *testing.T) {
	for _, want := range []string{"\nExecReload=" + tlsnat + " reload\n", "\nRestart=always\n", "\nRuntimeDirectory=tlsnat\n"} {
		if !strings.Contains(unit(t), want) {
			t.Errorf("no line %q", strings.TrimSpace(want))
		}
	}
	state, runtime := t.TempDir(), t.TempDir()
	m := write(t, t.TempDir(), map[string][]byte{"edge.natmap": fmt.Appendf(nil, ":%d -> 127.0.0.1:1 mode=tcp\n", freePort(t))})
	environ := []string{"TLSNAT_MAP_FILE=" + m + "/edge.natmap", "TLSNAT_ADMIN=127.0.0.1:0", "STATE_DIRECTORY=" + state, "RUNTIME_DIRECTORY=" + runtime, "TLSNAT_ADMIN_SOCKET=" + runtime + "/admin.sock"}
	p := launch(t, command(t, "/", environ, "run"))
	p.err.await(t, `"msg":"running"`)
	if r := finish(t, command(t, "/", environ, "reload")); r.code != exitOK {
		t.Error(r)
	}
	write(t, m, map[string][]byte{"edge.natmap": []byte("nonsense\n")})
	if r := finish(t, command(t, "/", environ, "reload")); r.code == exitOK {
		t.Error(r)
	}
}

// TestAlertsAreUnderstood by Prometheus.
func TestAlertsAreUnderstood(t *testing.T) {
	testkit.Needs(t, testkit.Peers)
	if out, err := exec.Command(needs(t, "promtool"), "check", "rules", filepath.Join(root, "docs/alerts.yml")).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
