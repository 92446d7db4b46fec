// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// patience is how long a test waits for what has to happen. It's never reached on a machine that is merely slow.
const patience = 60 * time.Second

const token = "a-token-of-the-test"

// bed is a gateway with its admin:
//
//	tls   localhost    -> demo, with a certificate that it made itself
//	tls   refused.test -> reject
//	plain              -> an echo server, mode=tcp
type bed struct {
	gateway    *gateway.Gateway
	admin      *admin.Server
	log        *logBook
	state      string
	tls, plain string // addresses of the ports
}

func start(t *testing.T, settings ...string) *bed {
	t.Helper()
	return startWith(t, "{tls} localhost -> demo; {tls} refused.test -> reject; {plain} -> "+echoServer(t)+" mode=tcp", settings...)
}

// startWith has another map, in which {tls} and {plain} are the ports.
func startWith(t *testing.T, rules string, settings ...string) *bed {
	t.Helper()
	return startAs(t, settings, func(b *bed) string {
		return "MAP=" + strings.NewReplacer("{tls}", b.tls, "{plain}", b.plain).Replace(rules)
	})
}

// startFrom reads its map from a file, which write has written when the ports are known.
func startFrom(t *testing.T, file string, write func(*bed)) *bed {
	t.Helper()
	return startAs(t, nil, func(b *bed) string {
		write(b)
		return "MAP_FILE=" + file
	})
}

func startAs(t *testing.T, settings []string, setMap func(*bed) string) *bed {
	t.Helper()
	log := &logBook{}
	b := &bed{log: log}
	t.Cleanup(func() {
		if text := log.text(); strings.Contains(text, "panic") {
			t.Error(text)
		}
	})
	var config *config.Config
	for range 10 { // a port that was free may be taken before the gateway has it
		b.tls, b.plain = freePort(t), freePort(t)
		b.state = t.TempDir()
		config = read(t, append(settings, "STATE="+b.state, "LOOPS=2", "ADMIN_TOKEN="+token,
			setMap(b))...)
		var err error
		if b.gateway, err = gateway.New(config, log); err != nil {
			t.Fatal(err)
		}
		if err = b.gateway.Start(); err == nil {
			break
		} else if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { b.gateway.Drain(over()) })
	s := config.Settings
	if !slices.ContainsFunc(settings, func(kv string) bool { return strings.HasPrefix(kv, "ADMIN_TOKEN=") }) {
		s.AdminToken = ""
	}
	if !slices.ContainsFunc(settings, func(kv string) bool { return strings.HasPrefix(kv, "ADMIN=") }) {
		s.Admin = "127.0.0.1:0"
	}
	var err error
	if b.admin, err = admin.Start(s, b.gateway, "v0.0.0-test"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.admin.Close() })
	return b
}

// logBook is what the gateway logged.
type logBook struct {
	mu    sync.Mutex
	lines bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lines.Write(p)
}

func (b *logBook) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lines.String()
}

func read(t *testing.T, settings ...string) *config.Config {
	t.Helper()
	var environ []string
	for _, kv := range settings {
		environ = append(environ, config.Prefix+kv)
	}
	s, err := config.ReadSettings(environ)
	if err != nil {
		t.Fatal(err)
	}
	config, problems := config.Read(s)
	if config == nil {
		t.Fatal(problems)
	}
	return config
}

func over() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func freePort(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", testkit.Port(t))
}

func echoServer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().String()
}

// echo opens a connection to the plain port and has n bytes come back over it.
func (b *bed) echo(t *testing.T, n int) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", b.plain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, n))
		sent <- err
	}()
	if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	return c
}

// hello opens a TLS connection.
func (b *bed) hello(t *testing.T, name string, change func(*tls.Config)) (*tls.Conn, error) {
	t.Helper()
	raw, err := net.Dial("tcp", b.tls)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	_ = raw.SetDeadline(time.Now().Add(patience))
	config := &tls.Config{ServerName: name, InsecureSkipVerify: true} // who is there is not what is tested here
	if change != nil {
		change(config)
	}
	c := tls.Client(raw, config)
	return c, c.Handshake()
}

// shake opens a TLS connection to the demo, asks it something and returns the connection.
func (b *bed) shake(t *testing.T, change func(*tls.Config)) *tls.Conn {
	t.Helper()
	c, err := b.hello(t, "localhost", change)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	return c
}

func (b *bed) url(path string) string { return "http://" + b.admin.Addr() + path }

// ask makes a request on a connection of its own.
func (b *bed) ask(t *testing.T, method, path string, change func(*http.Request)) (*http.Response, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, b.url(path), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	if change != nil {
		change(r)
	}
	response, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// trusted gives a request the token that the admin has made itself.
func (b *bed) trusted(t *testing.T) func(*http.Request) {
	t.Helper()
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+b.token(t)) }
}

func (b *bed) token(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(b.admin.TokenPath())
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func get[T any](t *testing.T, b *bed, what string) (v T) {
	t.Helper()
	response, body := b.ask(t, "GET", "/api/v1/"+what, nil)
	if response.StatusCode != http.StatusOK || response.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%s: %s, %s: %s", what, response.Status, response.Header.Get("Content-Type"), body)
	}
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatalf("%s: %v: %s", what, err, body)
	}
	return v
}

type conns struct {
	Total       int64               `json:"total"`
	Connections []gateway.OpenConn  `json:"connections"`
	Ended       []gateway.EndedConn `json:"ended"`
}

type rules struct {
	Total int                `json:"total"`
	Rules []gateway.RuleInfo `json:"rules"`
}

// await asks for the status until it's as it should be.
func (b *bed) await(t *testing.T, what string, as func(*gateway.Status) bool) gateway.Status {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		s := get[gateway.Status](t, b, "status")
		if as(&s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s; the status is %+v", what, s)
		}
	}
}

func ended(c *gateway.ConnectionCounts) (n uint64) {
	for _, count := range c.Outcomes {
		n += count
	}
	return n
}

// mixed is traffic of every kind: what ends is over, and two connections stay open.
func (b *bed) mixed(t *testing.T) {
	t.Helper()
	cache := tls.NewLRUClientSessionCache(1)
	old := func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }
	plain := func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }
	again := func(c *tls.Config) { c.ClientSessionCache = cache }
	for _, change := range []func(*tls.Config){old, plain, again, again} {
		_ = b.shake(t, change).Close()
	}
	for _, name := range []string{"refused.test", "unknown.test"} {
		c, err := b.hello(t, name, nil)
		if err == nil {
			t.Fatalf("%s shook hands", name)
		}
		_ = c.NetConn().Close()
	}
	_ = b.echo(t, 1<<20).Close()
	b.echo(t, 3000)
	b.shake(t, nil)
	b.await(t, "everything to be over but two", func(s *gateway.Status) bool { return ended(&s.Connections) == 7 })
}

func TestNumbersAddUp(t *testing.T) {
	b := start(t)
	b.mixed(t)
	s := get[gateway.Status](t, b, "status")
	if s.Connections.Accepted != 9 || s.Connections.Open != 2 {
		t.Errorf("accepted %d, open %d; want 9 and 2", s.Connections.Accepted, s.Connections.Open)
	}
	for outcome, want := range map[string]uint64{"ok": 5, "denied": 1, "unknown_name": 1, "idle": 0} {
		if got, there := s.Connections.Outcomes[outcome]; got != want || !there {
			t.Errorf("outcome %s: %d, want %d", outcome, got, want)
		}
	}
	if s.Handshakes.Full != 4 || s.Handshakes.Resumed != 1 {
		t.Errorf("handshakes: %d full, %d resumed; want 4 and 1", s.Handshakes.Full, s.Handshakes.Resumed)
	}
	kinds := map[string]uint64{}
	for _, k := range s.Handshakes.Kinds {
		kinds[fmt.Sprint(k.Version, " ", k.Group, " ", k.Resumed)] += k.Count
	}
	for kind, want := range map[string]uint64{"1.2 X25519 false": 1, "1.3 P-256 false": 1, "1.3 X25519MLKEM768 false": 2, "1.3 X25519MLKEM768 true": 1} {
		if kinds[kind] != want {
			t.Errorf("handshakes of %s: %d, want %d; all: %v", kind, kinds[kind], want, kinds)
		}
	}
}

// An open connection's bytes count, too: a stream that runs for a day shows all day.
func TestBytesAreThoseOfTheConnections(t *testing.T) {
	b := start(t)
	b.mixed(t)
	var up, down int64
	all := get[conns](t, b, "conns")
	for _, c := range all.Connections {
		up, down = up+c.Up, down+c.Down
	}
	for _, c := range all.Ended {
		up, down = up+c.Up, down+c.Down
	}
	s := get[gateway.Status](t, b, "status")
	if s.Bytes.Up != uint64(up) || s.Bytes.Down != uint64(down) {
		t.Errorf("status says %d up and %d down, the connections %d and %d", s.Bytes.Up, s.Bytes.Down, up, down)
	}
	if least := int64(1<<20 + 3000); up < least || down < least {
		t.Errorf("%d up and %d down; the echoes alone are %d", up, down, least)
	}
}

func TestConnectionsAreShownAsTheyAre(t *testing.T) {
	b := start(t)
	b.mixed(t)
	all := get[conns](t, b, "conns")
	if all.Total != 2 || len(all.Connections) != 2 {
		t.Fatalf("%d of %d connections, want 2 of 2", len(all.Connections), all.Total)
	}
	terminated, echoed := all.Connections[0], all.Connections[1] // the newest first
	if terminated.SNI != "localhost" || terminated.TLS != "1.3" || terminated.Mode != "terminate" || terminated.Backend != "demo" || terminated.Stage != "relay" {
		t.Errorf("terminated: %+v", terminated)
	}
	if echoed.Up != 3000 || echoed.Down != 3000 || echoed.Mode != "tcp" || echoed.Listen != b.plain || echoed.Rule == "" || echoed.TLS != "" {
		t.Errorf("echoed: %+v", echoed)
	}
	if echoed.AgeMS < terminated.AgeMS || echoed.IdleMS > echoed.AgeMS || !echoed.Client.IsValid() || echoed.Client != echoed.Peer {
		t.Errorf("echoed: %+v", echoed)
	}
	if len(all.Ended) != 7 || all.Ended[0].AgoMS > all.Ended[6].AgoMS {
		t.Fatalf("ended: %+v", all.Ended)
	}
	i := slices.IndexFunc(all.Ended, func(c gateway.EndedConn) bool { return c.SNI == "unknown.test" })
	if i < 0 || all.Ended[i].Outcome != "unknown_name" || all.Ended[i].Error == "" {
		t.Errorf("ended: %+v", all.Ended)
	}
	for query, want := range map[string]int{"name=unknown.test": 1, "listen=" + b.plain: 1, "listen=" + b.tls: 6, "backend=demo": 4, "client=192.0.2.0/24": 0} {
		if some := get[conns](t, b, "conns?"+query); len(some.Ended) != want {
			t.Errorf("%s: %d of the connections that ended, want %d: %+v", query, len(some.Ended), want, some.Ended)
		}
	}
}

// A load balancer's probes are connections that nobody wants to read about.
func TestProbesAreCountedApart(t *testing.T) {
	b := start(t)
	for range 3 {
		c, err := net.Dial("tcp", b.tls)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	s := b.await(t, "three probes", func(s *gateway.Status) bool { return s.Connections.Probes == 3 })
	if s.Connections.Outcomes["ok"] != 3 || s.Connections.Accepted != 3 {
		t.Errorf("%+v", s.Connections)
	}
	if all := get[conns](t, b, "conns"); len(all.Ended) != 0 {
		t.Errorf("ended: %+v", all.Ended)
	}
}

func TestRulesCountTheirConnections(t *testing.T) {
	b := start(t)
	b.mixed(t)
	all := get[rules](t, b, "map")
	if all.Total != 3 || len(all.Rules) != 3 {
		t.Fatalf("%+v", all)
	}
	for i, want := range []struct{ open, total uint64 }{{1, 5}, {0, 1}, {1, 2}} {
		if r := all.Rules[i]; r.Open != want.open || r.Total != want.total || r.Rule != "TLSNAT_MAP:1" {
			t.Errorf("rule %d: %+v, want open %d, total %d", i, r, want.open, want.total)
		}
	}
	if r := all.Rules[2]; r.Listen != b.plain || len(r.Backends) != 1 || r.Options[0].Key != "mode" || r.Options[0].From == "" {
		t.Errorf("%+v", r)
	}
}

func TestCertificatesAndGenerations(t *testing.T) {
	b := start(t)
	certificates := get[struct {
		Total        int                `json:"total"`
		Certificates []gateway.CertInfo `json:"certificates"`
	}](t, b, "certs")
	if certificates.Total != 1 || len(certificates.Certificates) != 1 {
		t.Fatalf("%+v", certificates)
	}
	if c := certificates.Certificates[0]; !slices.Contains(c.Names, "localhost") || c.NotAfter.Before(time.Now()) || c.KeyType != "ECDSA P-256" || c.File == "" {
		t.Errorf("%+v", c)
	}
	generations := get[struct {
		Generations []gateway.GenerationInfo `json:"generations"`
	}](t, b, "generations").Generations
	if len(generations) != 1 || generations[0].Number != 1 || generations[0].Rules != 3 || generations[0].Certificates != 1 || time.Since(generations[0].Since) > time.Hour {
		t.Errorf("%+v", generations)
	}
}

func TestListsAreBounded(t *testing.T) {
	b := start(t)
	for range 3 {
		b.echo(t, 1)
	}
	if all := get[conns](t, b, "conns?limit=2"); all.Total != 3 || len(all.Connections) != 2 {
		t.Errorf("%d of %d connections, want 2 of 3", len(all.Connections), all.Total)
	}
	if all := get[rules](t, b, "map?limit=1"); all.Total != 3 || len(all.Rules) != 1 {
		t.Errorf("%d of %d rules, want 1 of 3", len(all.Rules), all.Total)
	}
	for _, limit := range []string{"1001", "-1", "x", "99999999999999999999"} {
		if response, body := b.ask(t, "GET", "/api/v1/conns?limit="+limit, nil); response.StatusCode != http.StatusBadRequest || !strings.Contains(body, "from 0 to 1000") {
			t.Errorf("limit=%s: %s: %s", limit, response.Status, body)
		}
	}
}

// Prometheus' own rules for names, units and help texts; and the numbers are the status's.
func TestMetricsAreWhatPrometheusExpects(t *testing.T) {
	b := start(t)
	b.mixed(t)
	s := get[gateway.Status](t, b, "status")
	_, text := b.ask(t, "GET", "/metrics", nil)
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "tlsnat_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	for _, line := range []string{
		"tlsnat_connections_accepted_total 9",
		"tlsnat_connections_open 2",
		`tlsnat_connections_total{outcome="ok"} 5`,
		`tlsnat_connections_total{outcome="unknown_name"} 1`,
		`tlsnat_connections_total{outcome="internal"} 0`,
		`tlsnat_handshakes_total{group="X25519MLKEM768",resumed="true",version="1.3"} 1`,
		`tlsnat_handshakes_total{group="X25519",resumed="false",version="1.2"} 1`,
		fmt.Sprintf(`tlsnat_bytes_total{direction="up"} %v`, float64(s.Bytes.Up)),
		fmt.Sprintf(`tlsnat_bytes_total{direction="down"} %v`, float64(s.Bytes.Down)),
		"tlsnat_draining 0", "tlsnat_config_generation 1", "tlsnat_certificates 1", "tlsnat_log_lines_dropped_total 0",
	} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("no line %q in\n%s", line, ours(text))
		}
	}
	for _, pattern := range []string{`(?m)^tlsnat_certificate_not_after_timestamp_seconds\{file=".*",key="ECDSA P-256",name="localhost"\} \d`,
		`(?m)^tlsnat_build_info\{go_version="go.*",version="v0.0.0-test"\} 1$`, `(?m)^go_goroutines \d`, `(?m)^process_open_fds \d`} {
		if !regexp.MustCompile(pattern).MatchString(text) {
			t.Errorf("nothing matches %s in\n%s", pattern, ours(text))
		}
	}
	if n := strings.Count(text, "tlsnat_connections_total{"); n != len(s.Connections.Outcomes) || n != 19 {
		t.Errorf("%d outcomes in the metrics, %d in the status, 19 in the contract", n, len(s.Connections.Outcomes))
	}
}

func ours(metrics string) string {
	return strings.Join(regexp.MustCompile(`(?m)^tlsnat_.*$`).FindAllString(metrics, -1), "\n")
}

// Nothing that is counted may get lost or be counted twice while others count.
func TestNumbersAddUpWhileTheyChange(t *testing.T) {
	b := start(t)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range 25 {
				c, err := net.Dial("tcp", b.plain)
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(patience))
				if _, err = io.WriteString(c, "ping"); err == nil {
					_, err = io.ReadFull(c, make([]byte, 4))
				}
				if err != nil {
					t.Error(err)
				}
				_ = c.Close()
			}
		})
	}
	done := make(chan struct{})
	go func() {
		clients.Wait()
		close(done)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		s := get[gateway.Status](t, b, "status")
		if ended(&s.Connections) > s.Connections.Accepted {
			t.Fatalf("more ended than were accepted: %+v", s.Connections)
		}
		for _, r := range get[rules](t, b, "map").Rules {
			if r.Open > r.Total {
				t.Fatalf("more open than there ever were: %+v", r)
			}
		}
		get[conns](t, b, "conns")
	}
	s := b.await(t, "the end of all connections", func(s *gateway.Status) bool { return s.Connections.Open == 0 })
	if ended(&s.Connections) != 100 || s.Connections.Accepted != 100 || s.Bytes.Up != 400 || s.Bytes.Down != 400 {
		t.Errorf("%+v %+v", s.Connections, s.Bytes)
	}
}

func TestTokenIsDemandedForAllButHealth(t *testing.T) {
	b := start(t, "ADMIN_TOKEN="+token)
	bearer := func(token string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
	}
	basic := func(password string) func(*http.Request) {
		return func(r *http.Request) { r.SetBasicAuth("operator", password) }
	}
	paths := []string{"/", "/metrics", "/api/v1/status", "/api/v1/map", "/api/v1/conns", "/api/v1/certs", "/api/v1/generations", "/no/such/page"}
	for _, path := range paths {
		for name, change := range map[string]func(*http.Request){
			"nothing": nil, "wrong": bearer("wrong"), "empty": bearer(""), "shorter": bearer(token[1:]), "longer": bearer(token + "x"),
			"wrong password": basic("wrong"), "another scheme": func(r *http.Request) { r.Header.Set("Authorization", token) },
		} {
			if response, _ := b.ask(t, "GET", path, change); response.StatusCode != http.StatusUnauthorized || len(response.Header["Www-Authenticate"]) != 2 {
				t.Errorf("GET %s with %s: %s, %v", path, name, response.Status, response.Header)
			}
		}
		for name, change := range map[string]func(*http.Request){"bearer": bearer(token), "basic": basic(token)} {
			if response, _ := b.ask(t, "GET", path, change); (response.StatusCode == http.StatusOK) != (path != "/no/such/page") {
				t.Errorf("GET %s with the token as %s: %s", path, name, response.Status)
			}
		}
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if response, _ := b.ask(t, "GET", path, nil); response.StatusCode != http.StatusOK {
			t.Errorf("GET %s without a token: %s", path, response.Status)
		}
	}
	if response, _ := b.ask(t, "POST", "/api/v1/drain", nil); response.StatusCode != http.StatusUnauthorized {
		t.Errorf("POST /api/v1/drain without a token: %s", response.Status)
	}
	mustNotDrain(t, b)
}

func mustNotDrain(t *testing.T, b *bed) {
	t.Helper()
	select {
	case <-b.admin.DrainAsked():
		t.Fatal("and a drain was asked for")
	default:
	}
}

// A web site whose name leads to 127.0.0.1 must not read in its visitor's browser what is here (DNS rebinding).
func TestForeignNamesAreRefusedOnLoopback(t *testing.T) {
	b := start(t)
	_, port, _ := net.SplitHostPort(b.admin.Addr())
	named := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
	for _, path := range []string{"/", "/metrics", "/api/v1/conns"} {
		for _, host := range []string{"rebound.example", "rebound.example:" + port, "localhost.rebound.example", "192.0.2.1:" + port, "127.0.0.1.rebound.example"} {
			if response, _ := b.ask(t, "GET", path, named(host)); response.StatusCode != http.StatusMisdirectedRequest {
				t.Errorf("GET %s of %s: %s", path, host, response.Status)
			}
		}
		for _, host := range []string{"localhost", "LOCALHOST:" + port, "127.0.0.1:" + port, "[::1]:" + port, "[::1]", "127.1.2.3:80"} {
			if response, _ := b.ask(t, "GET", path, named(host)); response.StatusCode != http.StatusOK {
				t.Errorf("GET %s of %s: %s", path, host, response.Status)
			}
		}
	}
	if response, _ := b.ask(t, "GET", "/readyz", named("gateway-7.pool.example")); response.StatusCode != http.StatusOK {
		t.Errorf("a load balancer's health check: %s", response.Status)
	}
}

func TestOffLoopbackDemandsAToken(t *testing.T) {
	b := start(t, "ADMIN=0.0.0.0:0", "ADMIN_TOKEN="+token)
	_, port, _ := net.SplitHostPort(b.admin.Addr())
	reach := func(change func(*http.Request)) int {
		response, _ := b.ask(t, "GET", "/api/v1/status", func(r *http.Request) {
			r.URL.Host, r.Host = "127.0.0.1:"+port, "edge.example"
			change(r)
		})
		return response.StatusCode
	}
	if status := reach(func(*http.Request) {}); status != http.StatusUnauthorized {
		t.Errorf("without the token: %d", status)
	}
	if status := reach(func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }); status != http.StatusOK {
		t.Errorf("with the token: %d", status)
	}
	if a, err := admin.Start(config.Settings{Admin: "0.0.0.0:0"}, b.gateway, ""); err == nil {
		_ = a.Close()
		t.Error("it started without a token off loopback")
	}
}

// A page of another site can make its visitor's browser send a POST here, though not read the answer.
func TestOtherSitesCannotDrain(t *testing.T) {
	b := start(t)
	for name, change := range map[string]func(*http.Request){
		"Sec-Fetch-Site: cross-site": func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") },
		"Sec-Fetch-Site: same-site":  func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "same-site") },
		"a foreign Origin":           func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") },
		"Origin: null":               func(r *http.Request) { r.Header.Set("Origin", "null") },
	} {
		if response, _ := b.ask(t, "POST", "/api/v1/drain", change); response.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s", name, response.Status)
		}
	}
	if response, _ := b.ask(t, "GET", "/api/v1/drain", nil); response.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %s", response.Status)
	}
	mustNotDrain(t, b)
}

// keeper is a client that keeps its connection.
func (b *bed) keeper(t *testing.T) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", b.admin.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "GET /api/v1/ HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(c)
	response, err := http.ReadResponse(answers, nil)
	if err != nil || response.StatusCode != http.StatusOK || response.Close {
		t.Fatalf("%+v, %v", response, err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	return c, answers
}

func TestDrainIsPassedOnAndHealthFailsFirst(t *testing.T) {
	b := start(t)
	open := b.echo(t, 10)
	_, kept := b.keeper(t)
	for range 2 { // asking twice is no mistake
		if response, body := b.ask(t, "POST", "/api/v1/drain", b.trusted(t)); response.StatusCode != http.StatusAccepted || body != `{"draining":true}`+"\n" {
			t.Fatalf("%s: %s", response.Status, body)
		}
	}
	<-b.admin.DrainAsked()
	b.admin.Retire()
	if n, err := kept.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a connection was kept: %d, %v", n, err)
	}
	if b.gateway.Draining() {
		t.Error("the gateway drained before health checks failed")
	}
	for path, want := range map[string]int{"/readyz": http.StatusServiceUnavailable, "/healthz": http.StatusOK} {
		if response, _ := b.ask(t, "GET", path, func(r *http.Request) { r.Close = false }); response.StatusCode != want || !response.Close {
			t.Errorf("%s: %s, Connection: %v", path, response.Status, response.Header["Connection"])
		}
	}

	drained := make(chan struct{})
	go func() {
		b.gateway.Drain(t.Context())
		close(drained)
	}()
	if s := get[gateway.Status](t, b, "status"); !s.Draining || s.Connections.Open != 1 {
		t.Errorf("%+v", s)
	}
	if _, err := io.WriteString(open, "more"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 4)); err != nil {
		t.Errorf("an open connection was cut by the drain: %v", err)
	}
	_ = open.Close()
	<-drained
}

// The loops are asked for connections, and after a drain there are none left to answer.
func TestAnswersWhenTheLoopsAreGone(t *testing.T) {
	b := start(t)
	b.echo(t, 1)
	b.gateway.Drain(over())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	open, _, missing, err := b.gateway.Conns(ctx, gateway.ConnQuery{Limit: 10})
	if ended, without := b.gateway.Ended(ctx, gateway.ConnQuery{}, 10); len(open)+len(ended)+len(missing)+len(without) != 0 || ctx.Err() != nil || err != nil {
		t.Errorf("%v, %v, %v, %v", open, ended, ctx.Err(), err)
	}
	if all := get[conns](t, b, "conns"); len(all.Connections) != 0 || all.Total != 0 || all.Connections == nil {
		t.Errorf("%+v", all)
	}
	if s := get[gateway.Status](t, b, "status"); s.Connections.Outcomes["drained"] != 1 {
		t.Errorf("%+v", s)
	}
}

func TestPortInUseSaysWhatToDo(t *testing.T) {
	b := start(t)
	_, err := admin.Start(config.Settings{Admin: b.admin.Addr()}, b.gateway, "")
	if err == nil {
		t.Fatal("two admins on one port")
	}
	for _, part := range []string{"TLSNAT_ADMIN=" + b.admin.Addr(), "address already in use", "ss -ltnp", "'off'"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in %q", part, err)
		}
	}
}

func TestOffDoesNothing(t *testing.T) {
	a, err := admin.Start(config.Settings{Admin: "off"}, nil, "")
	if err != nil || a.Addr() != "" || a.DrainAsked() != nil || a.Close() != nil {
		t.Fatalf("%v, %v", a, err)
	}
	a.Retire()
}

// What the page may do is in its policy, and it does with less than others: no server but its own, no inline handlers.
func TestPageIsOneFileUnderAStrictPolicy(t *testing.T) {
	b := start(t)
	response, html := b.ask(t, "GET", "/", nil)
	policy := response.Header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'", "frame-ancestors 'none'",
		"base-uri 'none'", "form-action 'none'", "require-trusted-types-for 'script'"} {
		if !strings.Contains(policy, part) {
			t.Errorf("%s is not in %s", part, policy)
		}
	}
	if strings.Contains(policy, "unsafe") || strings.Contains(policy, "*") {
		t.Error(policy)
	}
	for header, want := range map[string]string{"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff",
		"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"} {
		if got := response.Header.Get(header); got != want {
			t.Errorf("%s: %q, want %q", header, got, want)
		}
	}
	withoutNamespaces := strings.ReplaceAll(html, "http://www.w3.org/2000/svg", "")
	if m := regexp.MustCompile(`(?i)\w+://[\w.]+|src=|@import|url\(|innerHTML|insertAdjacent|\son\w+=|\sstyle=`).FindString(withoutNamespaces); m != "" {
		t.Errorf("the page has %q", m)
	}
}

// The script runs under that policy, and what it shows are the gateway's numbers.
func TestPageShowsTheGatewayInABrowser(t *testing.T) {
	chromium := program(t, "chromium")
	b := start(t)
	b.mixed(t)
	cmd := exec.CommandContext(t.Context(), chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--no-default-browser-check",
		"--user-data-dir="+profile(t), "--virtual-time-budget=4000", "--dump-dom", b.url("/"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(os.Environ(), "HOME="+profile(t), "TMPDIR="+profile(t))
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, complaints.String())
	}
	dom := string(out)
	for _, want := range []string{`id="state" role="status">running<`, `id="open">2<`, `9 in all`, `>unknown_name<`, `>refused.test<`,
		`>localhost<`, b.plain, "X25519MLKEM768", "ECDSA P-256", "tlsnat v0.0.0-test", ">relay<"} {
		if !strings.Contains(dom, want) {
			t.Errorf("%q is not on the page", want)
		}
	}
	if t.Failed() {
		t.Log(dom[max(0, strings.Index(dom, "<body")):], complaints.String())
	}
}

func program(t *testing.T, name string) string {
	t.Helper()
	return testkit.Program(t, name, name)
}

// The JSON of the API is read by programs that are not built with this module: its names are a promise.
func TestNamesInTheAPIStay(t *testing.T) {
	b := start(t)
	b.mixed(t)
	for what, want := range map[string]string{
		"status":      "accept_pauses backend_handshakes bytes certificates connections draining gate generation generations handshakes ktls listen listening log_lines_dropped loops memory per_loop ports reloads rules started tasks times unusable_files version",
		"map":         "generation listening rules total",
		"conns":       "connections ended total",
		"certs":       "certificates total",
		"backends":    "backends counts total",
		"generations": "generations",
	} {
		if got := keys(get[map[string]any](t, b, what)); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	all := get[struct{ Connections, Ended []map[string]any }](t, b, "conns")
	if got, want := keys(all.Connections[0]), "age_ms backend bytes_down bytes_up client id idle_ms listen mode peer rule sni stage tls"; got != want {
		t.Errorf("open: %s, want %s", got, want)
	}
	i := slices.IndexFunc(all.Ended, func(c map[string]any) bool { return c["sni"] == "unknown.test" })
	if got, want := keys(all.Ended[i]), "ago_ms bytes_down bytes_up client duration_ms error id listen outcome peer sni stage"; got != want {
		t.Errorf("ended: %s, want %s", got, want)
	}
}

func keys(m map[string]any) string {
	var all []string
	for k := range m {
		all = append(all, k)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}
