// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// line is the last line of the log that has these words; nil if there is none.
func (b *bed) line(words ...string) map[string]any {
	var found map[string]any
next:
	for l := range strings.Lines(b.log.text()) {
		for _, w := range words {
			if !strings.Contains(l, w) {
				continue next
			}
		}
		found = nil
		_ = json.Unmarshal([]byte(l), &found)
	}
	return found
}

func (b *bed) awaitLine(t *testing.T, words ...string) map[string]any {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if l := b.line(words...); l != nil {
			return l
		}
		if time.Now().After(deadline) {
			t.Fatalf("no line with %q in\n%s", words, b.log.text())
		}
	}
}

// TestOrdersOverTCPNeedTheToken, also on loopback, where anybody may look. What is answered says where the token is.
func TestOrdersOverTCPNeedTheToken(t *testing.T) {
	b := start(t)
	backends, _ := b.gateway.Backends(1)
	paths := []string{"reload", "drain"}
	for _, o := range gateway.BackendOrders {
		paths = append(paths, "backends/"+string(o)+"?backend="+backends[0].Address)
	}
	for _, path := range paths {
		for name, header := range map[string]string{"nothing": "", "a wrong one": "Bearer wrong", "an empty one": "Bearer ", "its file": "Bearer " + b.admin.TokenPath()} {
			response, body := b.ask(t, "POST", "/api/v1/"+path, func(r *http.Request) {
				if header != "" {
					r.Header.Set("Authorization", header)
				}
			})
			if response.StatusCode != http.StatusUnauthorized || !strings.Contains(body, b.admin.TokenPath()) || !strings.Contains(body, b.admin.Socket()) {
				t.Errorf("POST %s with %s: %s: %s", path, name, response.Status, body)
			}
		}
	}
	mustNotDrain(t, b)
	if s := get[gateway.Status](t, b, "status"); s.Generation != 1 || b.line(`"result":"refused"`, `"by":"nobody"`, `"peer":"127.0.0.1:`) == nil {
		t.Errorf("generation %d, and the log is\n%s", s.Generation, b.log.text())
	}
	info, err := os.Stat(b.admin.TokenPath())
	if err != nil || info.Mode() != 0o600 || len(b.token(t)) < 26 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	for _, path := range append(paths[2:], "reload") {
		if response, body := b.ask(t, "POST", "/api/v1/"+path, b.trusted(t)); response.StatusCode != http.StatusOK {
			t.Errorf("POST %s with the token: %s: %s", path, response.Status, body)
		}
	}
	if l := b.awaitLine(t, `"msg":"order"`, `"order":"reload"`, `"result":"done"`); l["by"] != "token" || l["peer"] == "" {
		t.Error(l)
	}
	_, metrics := b.ask(t, "GET", "/metrics", nil)
	if want := fmt.Sprintf("tlsnat_admin_orders_total{result=\"refused\"} %d\n", 4*len(paths)); !strings.Contains(metrics, want) {
		t.Errorf("no %q", want)
	}
}

// TestTokenThatOthersCanReadIsNone: then nobody has it, and the log says what to do.
func TestTokenThatOthersCanReadIsNone(t *testing.T) {
	state := t.TempDir()
	b := start(t)
	file := filepath.Join(state, "admin-token")
	if err := os.WriteFile(file, []byte("known-to-all\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := admin.Start(config.Settings{Admin: "127.0.0.1:0", State: state, AdminSocket: "off"}, b.gateway, "")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	r, _ := http.NewRequest("POST", "http://"+a.Addr()+"/api/v1/drain", nil)
	r.Header.Set("Authorization", "Bearer known-to-all")
	response, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	response.Body.Close()
	if response.StatusCode != http.StatusUnauthorized || !strings.Contains(string(body), "TLSNAT_ADMIN_TOKEN") {
		t.Errorf("%s: %s", response.Status, body)
	}
	b.awaitLine(t, "nobody can give orders over TCP", "not a file that only its owner may read")
}

// TestSocketTakesOrders without a token, from those who may open it; the log says who that was.
func TestSocketTakesOrders(t *testing.T) {
	b := start(t, "ADMIN_TOKEN="+token)
	info, err := os.Stat(b.admin.Socket())
	if err != nil || info.Mode() != 0o660|os.ModeSocket {
		t.Fatalf("%v, %v", info, err)
	}
	c, err := admin.NewSocketClient(t.Context(), b.admin.Socket())
	if err != nil {
		t.Fatal(err)
	}
	if r, err := c.Reload(t.Context()); err != nil || !r.OK {
		t.Errorf("%+v, %v", r, err)
	}
	if a, err := c.Map(t.Context(), 10); err != nil || a.Total != 3 {
		t.Errorf("%+v, %v", a, err)
	}
	l := b.awaitLine(t, `"msg":"order"`, `"order":"reload"`, `"by":"socket"`)
	if l["uid"] != float64(os.Getuid()) || l["gid"] != float64(os.Getgid()) || l["pid"] != float64(os.Getpid()) || l["result"] != "done" || l["level"] != "info" {
		t.Error(l)
	}
	if _, err := c.OrderBackend(t.Context(), "no \u202esuch", gateway.DrainBackend); err == nil {
		t.Error("there is such a backend")
	}
	if l := b.awaitLine(t, `"order":"backends/drain"`); l["result"] != "failed" || l["backend"] != `no \u202esuch` || l["level"] != "warn" {
		t.Error(l)
	}
	_ = b.admin.Close()
	if _, err := os.Lstat(b.admin.Socket()); err == nil {
		t.Error("the socket is still there")
	}
}

// TestSocketsOfTwoGateways: of one that is gone the next one takes the place, of one that runs nobody does, and a file that
// is no socket stays.
func TestSocketsOfTwoGateways(t *testing.T) {
	b := start(t)
	dir := testkit.Dir(t)
	path := filepath.Join(dir, "admin.sock")
	at := func(path string) (*admin.Server, error) {
		return admin.Start(config.Settings{Admin: "off", AdminSocket: path}, b.gateway, "")
	}
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	_ = dead.Close()
	first, err := at(path)
	if err != nil {
		t.Fatalf("in the place of one that is gone: %v", err)
	}
	defer first.Close()
	if second, err := at(path); err == nil {
		_ = second.Close()
		t.Error("two listen on one socket")
	} else if !strings.Contains(err.Error(), "another gateway listens there") || !strings.Contains(err.Error(), "another path") {
		t.Error(err)
	}
	if _, err := admin.NewSocketClient(t.Context(), path); err != nil {
		t.Errorf("and the first one is gone: %v", err)
	}
	file := filepath.Join(dir, "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if a, err := at(file); err == nil {
		_ = a.Close()
		t.Error("a file became a socket")
	} else if text, _ := os.ReadFile(file); string(text) != "x" || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("%v, %q", err, text)
	}
	long := filepath.Join(dir, strings.Repeat("long-", 30))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	a, err := at(filepath.Join(long, "admin.sock"))
	if err != nil {
		t.Fatalf("a path that no socket address has room for: %v", err)
	}
	defer a.Close()
	if _, err := admin.NewSocketClient(t.Context(), filepath.Join(long, "admin.sock")); err != nil {
		t.Error(err)
	}
}

// TestSecondGatewayStartsWithoutASocket where somebody else has the one that it would take, and says so.
func TestSecondGatewayStartsWithoutASocket(t *testing.T) {
	b := start(t)
	state := testkit.Dir(t)
	t.Setenv("RUNTIME_DIRECTORY", state)
	at := freePort(t)
	_, port, _ := net.SplitHostPort(at)
	first, err := net.Listen("unix", filepath.Join(state, "admin-"+port+".sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := admin.Start(config.Settings{Admin: at, State: state}, b.gateway, "")
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if second.Socket() != "" || second.TokenPath() == "" {
		t.Errorf("the socket is %q, the token in %q", second.Socket(), second.TokenPath())
	}
	b.awaitLine(t, "there is no socket for orders", "another gateway listens there")
}

// TestHealthIsAnsweredWhateverOthersDo: thousands of clients that are silent, that send half a request, that keep their
// connection, and that ask for much and read nothing.
func TestHealthIsAnsweredWhateverOthersDo(t *testing.T) {
	b := start(t)
	const each = 300 // four times that is several times the places there are
	for range each {
		for _, said := range []string{"", "GET /heal", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"} {
			c, err := net.Dial("tcp", b.admin.Addr())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, said)
		}
	}
	var slowest time.Duration
	for range 20 {
		for _, path := range []string{"/healthz", "/readyz"} {
			began := time.Now()
			response, body := b.ask(t, "GET", path, func(r *http.Request) { r.Close = false })
			slowest = max(slowest, time.Since(began))
			if response.StatusCode != http.StatusOK || !response.Close {
				t.Errorf("%s: %s, kept %v: %s", path, response.Status, !response.Close, body)
			}
		}
	}
	t.Logf("the slowest took %s", slowest)
	if slowest > 5*time.Second {
		t.Errorf("a health check took %s", slowest)
	}
	_, metrics := b.ask(t, "GET", "/metrics", nil)
	if strings.Contains(metrics, "tlsnat_admin_connections_shed_total{listener=\"tcp\"} 0\n") {
		t.Error("nobody lost a place")
	}
}

// TestPlaceOfTheGreedyIsTaken: who has many connections loses the oldest of them, who has one keeps it.
func TestPlaceOfTheGreedyIsTaken(t *testing.T) {
	b := start(t)
	modest, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", b.admin.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer modest.Close()
	var greedy []net.Conn
	for range config.AdminClients() + 20 {
		c, err := net.Dial("tcp", b.admin.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		greedy = append(greedy, c)
	}
	_ = greedy[0].SetReadDeadline(time.Now().Add(patience))
	if _, err := greedy[0].Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the first of many: %v", err)
	}
	_, _ = io.WriteString(modest, "GET /readyz HTTP/1.0\r\n\r\n")
	_ = modest.SetReadDeadline(time.Now().Add(patience))
	if answer, err := io.ReadAll(modest); err != nil || !strings.Contains(string(answer), "200 OK") {
		t.Errorf("the only one of its address: %q, %v", answer, err)
	}
}
