// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// expect compares what want says of a line; what it leaves out may be anything.
func (l logLine) expect(t testing.TB, want logLine) {
	t.Helper()
	for field, w := range reflect.ValueOf(want).Fields() {
		if !field.IsExported() || w.IsZero() {
			continue
		}
		if got := reflect.ValueOf(l).FieldByIndex(field.Index); !reflect.DeepEqual(got.Interface(), w.Interface()) {
			t.Errorf("%s is not %v: %s", field.Name, reflect.Indirect(w), l)
		}
	}
}

// A suite, under the name that is logged and the one that OpenSSL has for it. Suites of TLS 1.2 go with one kind of
// certificate, those of 1.3 with each.
type suite struct{ version, name, openssl, kind string }

var suites = []suite{
	{"1.2", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDSA"},
	{"1.2", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDSA"},
	{"1.2", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDSA"},
	{"1.2", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "ECDHE-RSA-AES128-GCM-SHA256", "RSA"},
	{"1.2", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "ECDHE-RSA-AES256-GCM-SHA384", "RSA"},
	{"1.2", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-RSA-CHACHA20-POLY1305", "RSA"},
	{"1.3", "TLS_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256", "ECDSA"},
	{"1.3", "TLS_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384", "ECDSA"},
	{"1.3", "TLS_CHACHA20_POLY1305_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "ECDSA"},
	{"1.3", "TLS_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256", "RSA"},
	{"1.3", "TLS_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384", "RSA"},
	{"1.3", "TLS_CHACHA20_POLY1305_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "RSA"},
}

func (s suite) String() string { return s.kind + "_" + s.name }

// opensslArgs make s_client offer this suite only, and accept only this kind of certificate.
func (s suite) opensslArgs() []string {
	if s.version == "1.2" {
		return []string{"-tls1_2", "-cipher", s.openssl}
	}
	sigalgs := map[string]string{"ECDSA": "ECDSA+SHA256", "RSA": "RSA-PSS+SHA256"}
	return []string{"-tls1_3", "-ciphersuites", s.openssl, "-sigalgs", sigalgs[s.kind]}
}

func (s suite) curlArgs() []string {
	if s.version == "1.2" {
		return []string{"--tls-max", "1.2", "--ciphers", s.openssl}
	}
	return []string{"--tlsv1.3", "--tls13-ciphers", s.openssl}
}

// answerer answers the first line, ends its stream, and waits for the other one's end.
func answerer(c *net.TCPConn) {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	_, _ = io.WriteString(c, "you said "+line)
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c)
}

// sClient runs openssl s_client against the i-th port. It sends a line to an answerer, and returns what s_client
// printed.
func (b *bed) sClient(t testing.TB, i int, args ...string) string {
	t.Helper()
	args = append([]string{"s_client", "-connect", b.addr(i), "-servername", "edge.test", "-CAfile", pki(t).rootFile(t),
		"-verify_return_error", "-ign_eof"}, args...)
	out := run(t, command(t, program(t, "openssl", "openssl"), args...), "hello\n")
	if !strings.Contains(out, "you said hello") {
		t.Fatalf("no answer came back:\n%s", out)
	}
	return out
}

func TestOpenSSLOverEverySuiteAndGroup(t *testing.T) {
	beside(t)
	groups := []struct{ openssl, shown, logged string }{
		{"X25519:P-256", "X25519", "X25519"}, // in TLS 1.2 the list is that of the certificate's curve as well
		{"P-256", "prime256v1", "P-256"},
	}
	b := start(t, ":{0} edge.test -> "+serve(t, answerer))
	for _, s := range suites {
		for _, g := range groups {
			t.Run(s.String()+"_"+g.logged, func(t *testing.T) {
				out := b.sClient(t, 0, append(s.opensslArgs(), "-groups", g.openssl)...)
				for _, want := range []string{"Verification: OK", "Peer signature type: " + s.kind, "Server Temp Key: ", g.shown, s.openssl} {
					if !strings.Contains(out, want) {
						t.Errorf("s_client does not say %q:\n%s", want, out)
					}
				}
				b.next(t).expect(t, logLine{Level: "info", Outcome: "ok", SNI: "edge.test", TLS: s.version, Cipher: s.name,
					Group: g.logged, Resumed: new(false), Mode: "terminate", Path: "user", BytesUp: 6, BytesDown: 15})
			})
		}
	}
}

// TestHelloRetryRequest: the client's key share is for a group that is not offered here, so it's asked for another.
func TestHelloRetryRequest(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+serve(t, answerer))
	b.sClient(t, 0, "-tls1_3", "-groups", "X448:P-256") // a share for X448, which is not offered
	b.next(t).expect(t, logLine{Outcome: "ok", TLS: "1.3", Group: "P-256", BytesUp: 6, BytesDown: 15})
}

// curl fetches https://NAME:PORT/ through the i-th port, with the test's CA and no other.
func (b *bed) curl(t testing.TB, i int, name string, args ...string) *exec.Cmd {
	t.Helper()
	_, port, _ := net.SplitHostPort(b.addr(i))
	url := "https://" + net.JoinHostPort(name, port) + "/"
	return command(t, program(t, "curl", "curl"), append([]string{"-q", "--silent", "--show-error", "--fail", "--noproxy", "*",
		"--max-time", "120", "--cacert", pki(t).rootFile(t), "--resolve", fmt.Sprintf("%s:%s:127.0.0.1", name, port), url}, args...)...)
}

func TestCurlOverEverySuite(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test *.wild.test -> demo")
	for i, s := range suites {
		name := []string{"edge.test", "a.wild.test"}[i%2]
		t.Run(s.String(), func(t *testing.T) {
			var answer struct{ Message, SNI, TLS, Cipher, ID string }
			out := run(t, b.curl(t, 0, name, append(s.curlArgs(), "--include")...), "")
			_, body, _ := strings.Cut(out, "\r\n\r\n")
			if err := json.Unmarshal([]byte(body), &answer); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if answer.Message != "tlsnat works" || answer.SNI != name || answer.TLS != "TLSv"+s.version || answer.Cipher != s.name {
				t.Errorf("the demo was told %+v", answer)
			}
			b.next(t).expect(t, logLine{Outcome: "ok", ID: answer.ID, SNI: name, TLS: s.version, Cipher: s.name,
				Backend: "demo", BytesDown: int64(len(out))})
		})
	}
}

// TestOpenSSLResumes: with the ticket of the session before, three times in a row, since a ticket that a resumed
// session brings has to be as good as the first.
func TestOpenSSLResumes(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> "+serve(t, answerer))
	for _, s := range suites {
		t.Run(s.String(), func(t *testing.T) {
			ticket := filepath.Join(t.TempDir(), "session.pem")
			for i := range 3 {
				args, reused := append(s.opensslArgs(), "-sess_out", ticket), i > 0
				if reused {
					args = append(args, "-sess_in", ticket)
				}
				if out := b.sClient(t, 0, args...); strings.Contains(out, "Reused, TLSv") != reused {
					t.Errorf("run %d: resumed should be %v:\n%s", i, reused, out)
				}
				b.next(t).expect(t, logLine{Outcome: "ok", TLS: s.version, Cipher: s.name, Resumed: &reused, BytesUp: 6, BytesDown: 15})
			}
		})
	}
}

// joined is a connection whose writes go out together, when it is read from. So a client's Finished and the data
// behind it arrive in one piece.
type joined struct {
	net.Conn
	held []byte
}

func (c *joined) Write(p []byte) (int, error) {
	c.held = append(c.held, p...)
	return len(p), nil
}

func (c *joined) Read(p []byte) (int, error) {
	if len(c.held) > 0 {
		if _, err := c.Conn.Write(c.held); err != nil {
			return 0, err
		}
		c.held = nil
	}
	return c.Conn.Read(p)
}

// TestDataBehindTheFinishedOfAResumedSession: the master secret of a resumed TLS 1.2 session is in the ticket only,
// and what comes in one piece with the Finished was read during the handshake.
func TestDataBehindTheFinishedOfAResumedSession(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	for _, s := range suites {
		if s.version == "1.3" && s.kind == "RSA" || s.version == "1.3" && s.name != suites[6].name {
			continue // crypto/tls chooses the suite of 1.3 itself
		}
		t.Run(s.String(), func(t *testing.T) {
			config := clientConfig(t, goSuite(s))
			config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			for i := range 3 {
				c := tls.Client(&joined{Conn: b.dial(t, 0)}, config)
				data := random(uint64(i), 40_000)
				if _, err := c.Write(data); err != nil { // the handshake first
					t.Fatal(err)
				}
				got := make([]byte, len(data))
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("not what was sent: %v", err)
				}
				_ = c.Close()
				_, _ = c.NetConn().Read(make([]byte, 1)) // sends what Close has written
				b.lineOf(t, c).expect(t, logLine{Outcome: "ok", TLS: s.version, Resumed: new(i > 0), BytesUp: 40_000, BytesDown: 40_000})
			}
		})
	}
}

// goSuite makes a Go client offer that suite of TLS 1.2, or TLS 1.3.
func goSuite(s suite) func(*tls.Config) {
	return func(c *tls.Config) {
		c.MinVersion, c.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
		if s.version == "1.2" {
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			for _, known := range tls.CipherSuites() {
				if known.Name == s.name {
					c.CipherSuites = []uint16{known.ID}
				}
			}
		}
	}
}

// oneTicket is a session cache that offers its ticket to every server.
type oneTicket struct{ session *tls.ClientSessionState }

func (o *oneTicket) Get(string) (*tls.ClientSessionState, bool) { return o.session, o.session != nil }
func (o *oneTicket) Put(_ string, s *tls.ClientSessionState)    { o.session = s }

// TestTicketIsNoGoodForAnotherName: what a client was shown for one name says nothing about another.
func TestTicketIsNoGoodForAnotherName(t *testing.T) {
	b := start(t, ":{0} edge.test *.wild.test -> "+echoServer(t))
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cache := &oneTicket{}
		for _, visit := range []struct {
			name    string
			resumed bool
		}{{"edge.test", false}, {"edge.test", true}, {"a.wild.test", false}, {"a.wild.test", true}} {
			c := b.dialTLS(t, 0, func(c *tls.Config) {
				c.MaxVersion, c.ServerName, c.ClientSessionCache = version, visit.name, cache
				c.InsecureSkipVerify = true // a client that doesn't care, so that it's up to the server
			})
			exchange(t, c, []byte("hello"))
			_ = c.Close()
			b.lineOf(t, c).expect(t, logLine{Outcome: "ok", SNI: visit.name, Resumed: &visit.resumed, BytesUp: 5})
		}
	}
}

func TestGroupsOfGoClients(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	for _, g := range []struct {
		version uint16
		group   tls.CurveID
		logged  string
	}{
		{tls.VersionTLS13, tls.X25519MLKEM768, "X25519MLKEM768"}, {tls.VersionTLS13, tls.X25519, "X25519"},
		{tls.VersionTLS13, tls.CurveP256, "P-256"}, {tls.VersionTLS12, tls.X25519, "X25519"}, {tls.VersionTLS12, tls.CurveP256, "P-256"},
	} {
		c := b.dialTLS(t, 0, func(c *tls.Config) { c.MaxVersion, c.CurvePreferences = g.version, []tls.CurveID{g.group} })
		exchange(t, c, random(1, 100_000))
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Group: g.logged, BytesUp: 100_000, BytesDown: 100_000, Path: "user"})
	}
}

// TestCertificateSuitsTheClient: of the two certificates for a name each client gets the one that it can verify, and
// those that can verify both get the cheaper one.
func TestCertificateSuitsTheClient(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+serve(t, answerer))
	for _, c := range []struct {
		name, kind string
		args       []string
	}{
		{"both 1.3", "ECDSA", []string{"-tls1_3"}},
		{"both 1.2", "ECDSA", []string{"-tls1_2"}},
		{"RSA only 1.3", "RSA", []string{"-tls1_3", "-sigalgs", "RSA-PSS+SHA256"}},
		{"RSA only 1.2", "RSA", []string{"-tls1_2", "-sigalgs", "RSA-PSS+SHA256:RSA+SHA256"}},
		{"PKCS#1 only 1.2", "RSA", []string{"-tls1_2", "-sigalgs", "RSA+SHA256"}},
		{"suites for RSA only", "RSA", []string{"-tls1_2", "-cipher", "ECDHE-RSA-AES128-GCM-SHA256"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if out := b.sClient(t, 0, c.args...); !strings.Contains(out, "Peer signature type: "+c.kind) {
				t.Errorf("the certificate is not %s:\n%s", c.kind, out)
			}
			b.next(t).expect(t, logLine{Outcome: "ok"})
		})
	}
}

// TestOldVersionIsRefused: min-tls= holds for its rule, TLSNAT_MIN_TLS for the others.
func TestOldVersionIsRefused(t *testing.T) {
	b := start(t, ":{0} edge.test -> demo\n:{1} edge.test -> demo min-tls=1.2", "MIN_TLS=1.3")
	c := tls.Client(b.dial(t, 0), clientConfig(t, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }))
	if err := c.Handshake(); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("a client of TLS 1.2 sees %v", err)
	}
	_ = c.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "handshake_failed", SNI: "edge.test", Alert: "protocol_version", Stage: "handshake"})
	d := b.dialTLS(t, 1, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
	_ = d.Close()
	b.lineOf(t, d).expect(t, logLine{Outcome: "ok", TLS: "1.2"})
}

// chromiumArgs make it fetch one page and print its document. It trusts the test's keys and no others. Its sandbox is
// off, since it refuses to start with it for root.
func chromiumArgs(t testing.TB, url string) []string {
	var pins []string
	for _, leaf := range []string{"edge-ecdsa", "edge-rsa"} {
		sum := sha256.Sum256(pki(t).leaves[leaf].RawSubjectPublicKeyInfo)
		pins = append(pins, base64.StdEncoding.EncodeToString(sum[:]))
	}
	return []string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
		"--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--user-data-dir=" + t.TempDir(),
		"--host-resolver-rules=MAP * 127.0.0.1", "--ignore-certificate-errors-spki-list=" + strings.Join(pins, ","), "--dump-dom", url}
}

func TestChromium(t *testing.T) {
	beside(t)
	chromium := program(t, "chromium", "chromium")
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, "<title>x</title><p>%s %s, served in plain HTTP</p>", r.Method, r.Host)
	}))
	t.Cleanup(page.Close)
	b := start(t, ":{0} edge.test -> "+page.Listener.Addr().String()+" alpn=http/1.1")
	_, port, _ := net.SplitHostPort(b.addr(0))
	cmd := command(t, chromium, chromiumArgs(t, "https://edge.test:"+port+"/")...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.SysProcAttr.Setpgid = true
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if out := run(t, cmd, ""); !strings.Contains(out, "<p>GET edge.test:"+port+", served in plain HTTP</p>") {
		t.Fatalf("not the page: %s", out)
	}
	l := b.line(t, func(l logLine) bool { return l.BytesDown > 0 })
	l.expect(t, logLine{SNI: "edge.test", ALPN: "http/1.1", TLS: "1.3", Group: "X25519MLKEM768", Mode: "terminate", Path: "user"})
}

// returnBody answers a request with its own body: what went up has to come down.
func returnBody(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

func TestNode(t *testing.T) {
	node := program(t, "node", "nodejs")
	backend := httptest.NewServer(http.HandlerFunc(returnBody))
	t.Cleanup(backend.Close)
	b := start(t, ":{0} edge.test -> "+backend.Listener.Addr().String())
	_, port, _ := net.SplitHostPort(b.addr(0))
	body := random(1, 3<<20)
	sum := sha256.Sum256(body)
	for _, version := range []string{"1.2", "1.3"} {
		t.Run(version, func(t *testing.T) {
			var answers []struct {
				Status           int
				SHA256, Protocol string
				Reused           bool
			}
			out := run(t, command(t, node, "testdata/client.js", "https://edge.test:"+port+"/", "127.0.0.1", pki(t).rootFile(t),
				"TLSv"+version), string(body))
			if err := json.Unmarshal([]byte(out), &answers); err != nil || len(answers) != 2 {
				t.Fatalf("%v: %s", err, out)
			}
			for i, a := range answers {
				if a.Status != 200 || a.SHA256 != hex.EncodeToString(sum[:]) || a.Protocol != "TLSv"+version || a.Reused != (i > 0) {
					t.Errorf("request %d: %+v", i, a)
				}
				l := b.next(t)
				l.expect(t, logLine{Outcome: "ok", TLS: version, Resumed: new(i > 0)})
				if l.BytesUp < int64(len(body)) || l.BytesDown < int64(len(body)) {
					t.Errorf("bytes are missing: %s", l)
				}
			}
		})
	}
}

// fill writes the file in testdata to a directory, with what vars say in place of {name}.
func fill(t testing.TB, name string, vars map[string]string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var pairs []string
	for k, v := range vars {
		pairs = append(pairs, "{"+k+"}", v)
	}
	return writeFile(t, name, []byte(strings.NewReplacer(pairs...).Replace(string(text))))
}

// webServer is an nginx: files over HTTP and over HTTPS, GET and PUT, one that demands a PROXY header, and two that say
// what they have seen of TLS 1.2 and 1.3.
type webServer struct{ dir, plain, tls, proxy, seen12, seen13 string }

func nginx(t testing.TB) *webServer {
	t.Helper()
	path := program(t, "nginx", "nginx")
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "files"), 0o755); err != nil {
		t.Fatal(err)
	}
	ports := freePorts(t, 5)
	vars := map[string]string{"dir": dir, "chain": writeFile(t, "chain.pem", pki(t).chainPEM("wild-rsa")),
		"key": writeFile(t, "key.pem", pki(t).leaves["wild-rsa"].keyPEM())}
	for i, name := range []string{"plain", "tls", "proxy", "seen12", "seen13"} {
		vars[name] = strconv.Itoa(ports[i])
	}
	conf := fill(t, "nginx.conf", vars)
	server(t, command(t, path, "-c", conf, "-p", dir, "-e", "stderr"), "127.0.0.1:"+vars["plain"])
	at := func(name string) string { return "127.0.0.1:" + vars[name] }
	return &webServer{filepath.Join(dir, "files"), at("plain"), at("tls"), at("proxy"), at("seen12"), at("seen13")}
}

// makeFile writes n bytes that look random and nowhere repeat, and returns their SHA-256.
func makeFile(t testing.TB, path string, n int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	block := random(2, 1<<20)
	for i := int64(0); i < n; i += int64(len(block)) {
		binary.LittleEndian.PutUint64(block[i>>20%1000*512:], uint64(i))
		if _, err := io.MultiWriter(f, sum).Write(block[:min(int64(len(block)), n-i)]); err != nil {
			t.Fatal(err)
		}
	}
	return hex.EncodeToString(sum.Sum(nil))
}

func fileSum(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// TestNginxBulkBothWays: curl downloads and uploads 1 GiB at the same time, and every bit is the same at the other end.
func TestNginxBulkBothWays(t *testing.T) {
	web := nginx(t)
	size := int64(1 << 30)
	if testing.Short() || underRace {
		size = 64 << 20
	}
	for _, mode := range []struct {
		name, rule, sni string
		line            logLine
		size            int64
	}{
		{"terminate", ":{0} edge.test -> " + web.plain, "edge.test", logLine{Mode: "terminate", TLS: "1.3", Path: "user"}, size},
		{"pass", ":{0} a.wild.test -> " + web.tls + " mode=pass", "a.wild.test", logLine{Mode: "pass", Path: "splice"}, size / 4},
	} {
		t.Run(mode.name, func(t *testing.T) {
			sum := makeFile(t, filepath.Join(web.dir, "down"), mode.size)
			b := start(t, mode.rule)
			began := time.Now()
			hash := sha256.New()
			down, up := b.curl(t, 0, mode.sni), b.curl(t, 0, mode.sni, "--upload-file", filepath.Join(web.dir, "down"))
			for i, cmd := range []*exec.Cmd{down, up} {
				url := slices.IndexFunc(cmd.Args, func(a string) bool { return strings.HasPrefix(a, "https://") })
				cmd.Args[url] += []string{"down", "up"}[i]
				cmd.Stderr = os.Stderr
			}
			down.Stdout = hash
			launch(t, down)
			launch(t, up)
			if err := errors.Join(down.Wait(), up.Wait()); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			t.Logf("%d MiB down and as much up in %v: %.0f MiB/s in all", mode.size>>20, took, float64(2*mode.size>>20)/took.Seconds())
			if got := hex.EncodeToString(hash.Sum(nil)); got != sum {
				t.Errorf("downloaded %s, not %s", got, sum)
			}
			if got := fileSum(t, filepath.Join(web.dir, "up")); got != sum {
				t.Errorf("uploaded %s, not %s", got, sum)
			}
			mode.line.Outcome = "ok"
			b.line(t, func(l logLine) bool { return l.BytesDown >= mode.size }).expect(t, mode.line)
			b.line(t, func(l logLine) bool { return l.BytesUp >= mode.size }).expect(t, mode.line)
		})
	}
}

// TestFullDuplex: both directions of one connection carry different streams at the same time.
func TestFullDuplex(t *testing.T) {
	size := 64 << 20
	if testing.Short() || underRace {
		size = 16 << 20
	}
	up, down := random(3, size), random(4, size)
	type result struct {
		bytes   []byte
		in, out error
	}
	received := make(chan result, 1)
	backend := serve(t, func(c *net.TCPConn) {
		var both sync.WaitGroup
		var r result
		both.Go(func() { r.bytes, r.in = io.ReadAll(c) })
		both.Go(func() {
			_, err := c.Write(down)
			r.out = errors.Join(err, c.CloseWrite())
		})
		both.Wait()
		received <- r
	})
	b := start(t, ":{0} edge.test -> "+backend+"\n:{1} -> "+backend+" mode=tcp")
	type duplex interface {
		net.Conn
		CloseWrite() error
	}
	for name, dial := range map[string]func() duplex{
		"TLS 1.3": func() duplex { return b.dialTLS(t, 0, nil) },
		"TLS 1.2": func() duplex { return b.dialTLS(t, 0, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }) },
		"tcp":     func() duplex { return b.dial(t, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			c := dial()
			sent := make(chan error, 1)
			go func() {
				_, err := c.Write(up)
				sent <- errors.Join(err, c.CloseWrite())
			}()
			got, err := io.ReadAll(c)
			if err := errors.Join(err, <-sent); err != nil {
				t.Fatal(err)
			}
			r := <-received
			if diff := difference(r.bytes, up); diff != "" || r.in != nil || r.out != nil {
				t.Errorf("up: %s; the backend's reading ended with %v, its writing with %v", diff, r.in, r.out)
			}
			if diff := difference(got, down); diff != "" {
				t.Errorf("down: %s", diff)
			}
			b.lineOf(t, c).expect(t, logLine{Outcome: "ok", BytesUp: int64(size), BytesDown: int64(size)})
		})
	}
}

// TestPassLeavesTLSAlone: the client sees the certificate of the backend, and agrees with it on something that isn't
// even offered here.
func TestPassLeavesTLSAlone(t *testing.T) {
	openssl := program(t, "openssl", "openssl")
	addr := fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0])
	leaf := pki(t).leaves["wild-ecdsa"]
	server(t, command(t, openssl, "s_server", "-accept", addr, "-cert", writeFile(t, "leaf.pem", leaf.pem()),
		"-cert_chain", writeFile(t, "chain.pem", pki(t).middle.pem()), "-key", writeFile(t, "key.pem", leaf.keyPEM()),
		"-cipher", "ECDHE-ECDSA-AES256-SHA384", "-tls1_2", "-rev"), addr)
	b := start(t, ":{0} *.wild.test -> "+addr+" mode=pass\n:{0} edge.test -> "+echoServer(t))
	out := run(t, command(t, openssl, "s_client", "-connect", b.addr(0), "-servername", "a.wild.test", "-CAfile",
		pki(t).rootFile(t), "-verify_return_error", "-verify_hostname", "a.wild.test", "-alpn", "custom"), "hello\n")
	for _, want := range []string{"Verification: OK", "ECDHE-ECDSA-AES256-SHA384", "CN = wild-ecdsa"} {
		if !strings.Contains(out, want) {
			t.Errorf("s_client does not say %q:\n%s", want, out)
		}
	}
	l := b.next(t)
	l.expect(t, logLine{Outcome: "ok", SNI: "a.wild.test", ALPN: "custom", Mode: "pass", Backend: addr})
	if l.TLS != "" || l.Cipher != "" || l.Resumed != nil || len(l.JA4) != 36 {
		t.Errorf("what the line says of TLS: %s", l)
	}
}

// TestServerSpeaksFirst: nothing waits for the client, who waits for the greeting.
func TestServerSpeaksFirst(t *testing.T) {
	backend := serve(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "220 mail.test ESMTP\r\n")
		echo(c)
	})
	b := start(t, ":{0} -> "+backend+" mode=tcp\n:{1} edge.test -> "+backend)
	for i, dial := range []func() net.Conn{
		func() net.Conn { return b.dial(t, 0) },
		func() net.Conn { return b.dialTLS(t, 1, nil) },
	} {
		c := dial()
		greeting := make([]byte, 21)
		if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != "220 mail.test ESMTP\r\n" {
			t.Fatalf("%q, %v", greeting, err)
		}
		exchange(t, c, []byte("EHLO me\r\n"))
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Mode: []string{"tcp", "terminate"}[i], BytesUp: 9, BytesDown: 30})
	}
}

// TestGreetingIsNotWaitedFor: a backend that speaks first hears of its connection at once, not when the kernel has lost
// its patience with the acknowledgement that could go along with data (200 ms).
func TestGreetingIsNotWaitedFor(t *testing.T) {
	backend := mailScript.serve(t)
	b := start(t, fmt.Sprintf(":{0} -> %[1]s mode=tcp\n:{1} edge.test -> %[1]s\n:{2} edge.test -> %[1]s starttls=smtp", backend))
	for name, greet := range map[string]func(){
		"tcp":       func() { _, _ = b.dial(t, 0).Read(make([]byte, 1)) },
		"terminate": func() { _, _ = b.dialTLS(t, 1, nil).Read(make([]byte, 1)) },
		"starttls": func() {
			c := b.dial(t, 2)
			say(t, c, "STARTTLS\r\n", "220 edge.test ESMTP\r\n"+tlsAnswer)
			say(t, tls.Client(c, clientConfig(t, nil)), "EHLO me\r\n", mailScript.answers["EHLO"])
		},
	} {
		best := patience
		for range 5 {
			began := time.Now()
			greet()
			best = min(best, time.Since(began))
		}
		if best > 150*time.Millisecond {
			t.Errorf("%s: the quickest of five greetings came after %v", name, best)
		}
	}
}

// postgres runs a server with an empty database, as the user that it demands not to be root, and returns its port.
// Settings are written KEY=VALUE; a VALUE in PEM becomes the path of a file with it.
func postgres(t testing.TB, settings ...string) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(found) == 0 {
		missing(t, "postgres is not installed (Debian package postgresql)")
	}
	bin, port := filepath.Dir(found[len(found)-1]), strconv.Itoa(freePorts(t, 1)[0])
	dir, err := os.MkdirTemp("", "tlsnat") // not below t.TempDir, which another user may not enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	as := unprivileged(t, dir)
	data := filepath.Join(dir, "data")
	initdb := command(t, filepath.Join(bin, "initdb"), "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8")
	initdb.SysProcAttr.Credential, initdb.Dir = as, dir
	run(t, initdb, "")
	args := []string{"-D", data, "-k", dir, "-p", port, "-h", "127.0.0.1", "-F"}
	for _, s := range settings {
		args = append(args, "-c", fileFor(t, as, dir, s))
	}
	cmd := command(t, filepath.Join(bin, "postgres"), args...)
	cmd.SysProcAttr.Credential, cmd.Dir = as, dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) } // a fast shutdown, which removes its shared memory
	server(t, cmd, "127.0.0.1:"+port)
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // it accepts connections before it takes any
		if err := command(t, filepath.Join(bin, "pg_isready"), "-q", "-h", "127.0.0.1", "-p", port).Run(); err == nil {
			return port
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// fileFor writes a value in PEM to a file in dir, for whom the server runs as, and puts its path in its place.
func fileFor(t testing.TB, as *syscall.Credential, dir, setting string) string {
	t.Helper()
	key, value, _ := strings.Cut(setting, "=")
	if !strings.HasPrefix(value, "-----BEGIN") {
		return setting
	}
	path := filepath.Join(dir, strings.Trim(key, "-")+".pem")
	if err := os.WriteFile(path, []byte(value), 0o600); err != nil {
		t.Fatal(err)
	}
	if as != nil {
		if err := os.Chown(path, int(as.Uid), int(as.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	return key + "=" + path
}

// unprivileged is nil, or for root somebody else, who gets the directory.
func unprivileged(t testing.TB, dir string) *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	who, err := user.Lookup("postgres")
	if err != nil {
		who, err = user.Lookup("nobody")
	}
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(who.Uid)
	gid, _ := strconv.Atoi(who.Gid)
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func TestPostgreSQLBehindTCP(t *testing.T) {
	beside(t)
	psql := program(t, "psql", "postgresql-client")
	port := postgres(t)
	rows := 400_000
	if testing.Short() || underRace {
		rows = 50_000
	}
	b := start(t, ":{0} -> 127.0.0.1:"+port+" mode=tcp")
	_, edge, _ := net.SplitHostPort(b.addr(0))
	query := func(stdin string, sql ...string) string {
		args := []string{"-h", "127.0.0.1", "-p", edge, "-U", "tester", "-d", "postgres", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"}
		for _, s := range sql {
			args = append(args, "-c", s)
		}
		return run(t, command(t, psql, args...), stdin)
	}
	if out := query("", "select 6 * 7", "show port"); out != "42\n"+port+"\n" {
		t.Errorf("psql says %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "ok", Mode: "tcp", Backend: "127.0.0.1:" + port})

	var table strings.Builder
	for i := range rows {
		fmt.Fprintf(&table, "%d\t%x\n", i, random(uint64(i), 16))
	}
	query(table.String(), "create table big (n int, text text)", "copy big from stdin")
	up := b.next(t)
	up.expect(t, logLine{Outcome: "ok"})
	if out := query("", "copy (select * from big order by n) to stdout"); out != table.String() {
		t.Errorf("%d bytes came back of a table of %d, or not the same", len(out), table.Len())
	}
	down := b.next(t)
	down.expect(t, logLine{Outcome: "ok"})
	if up.BytesUp < int64(table.Len()) || down.BytesDown < int64(table.Len()) {
		t.Errorf("bytes are missing:\n%s\n%s", up, down)
	}
}

// gate lets nobody through until so many have come, or it's clear that they never will.
type gate struct {
	mu   sync.Mutex
	left int
	open context.Context
	lift context.CancelFunc
}

func newGate(t testing.TB, n int) *gate {
	g := &gate{left: n}
	g.open, g.lift = context.WithTimeout(t.Context(), patience)
	t.Cleanup(g.lift)
	return g
}

func (g *gate) pass() {
	g.mu.Lock()
	if g.left--; g.left == 0 {
		g.lift()
	}
	g.mu.Unlock()
	<-g.open.Done()
}

// TestTwoHundredAtOnce: no connection gets on before all of them are there, and each gets its own bytes back.
func TestTwoHundredAtOnce(t *testing.T) {
	crowd := newGate(t, 200)
	heldEcho := serve(t, func(c *net.TCPConn) { crowd.pass(); echo(c) })
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		crowd.pass()
		returnBody(w, r)
	}))
	t.Cleanup(web.Close)
	leaf, err := tls.X509KeyPair(pki(t).chainPEM("wild-ecdsa"), pki(t).leaves["wild-ecdsa"].keyPEM())
	if err != nil {
		t.Fatal(err)
	}
	secure := serve(t, func(c *net.TCPConn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{leaf}})
		crowd.pass()
		_, _ = io.Copy(s, s)
		_ = s.CloseWrite()
	})
	b := start(t, fmt.Sprintf(`
		:{0} edge.test   -> %s
		:{0} *.wild.test -> %s
		:{0} p.wild.test -> %s mode=pass
		:{0} d.wild.test -> demo
		:{1}             -> %s mode=tcp`, web.Listener.Addr(), heldEcho, secure, heldEcho))
	speak := func(name string, version uint16) func([]byte) error {
		return func(data []byte) error { return b.tradeTLS(t, name, version, data) }
	}
	kinds := []struct {
		name  string
		n     int
		visit func([]byte) error
		line  logLine
	}{
		{"curl", 40, nil, logLine{SNI: "edge.test", Mode: "terminate"}},
		{"Go, TLS 1.2", 40, speak("a.wild.test", tls.VersionTLS12), logLine{TLS: "1.2", SNI: "a.wild.test"}},
		{"Go, TLS 1.3", 40, speak("b.wild.test", tls.VersionTLS13), logLine{TLS: "1.3", SNI: "b.wild.test"}},
		{"pass", 30, speak("p.wild.test", tls.VersionTLS13), logLine{SNI: "p.wild.test", Mode: "pass"}},
		{"tcp", 30, func(data []byte) error { return b.tradeTCP(1, data) }, logLine{Mode: "tcp"}},
		{"demo", 20, func([]byte) error { return b.askDemo(t, crowd) }, logLine{SNI: "d.wild.test", Backend: "demo"}},
	}
	var visits sync.WaitGroup
	for i, kind := range kinds {
		for j := range kind.n {
			data := random(uint64(i*1000+j), 128<<10+j)
			visit := kind.visit
			if visit == nil {
				visit = b.startCurl(t, data)
			}
			visits.Go(func() {
				if err := visit(data); err != nil {
					t.Errorf("%s: %v", kind.name, err)
				}
			})
		}
	}
	visits.Wait()
	for _, kind := range kinds {
		for range kind.n {
			kind.line.Outcome = "ok"
			b.line(t, func(l logLine) bool { return l.SNI == kind.line.SNI }).expect(t, kind.line)
		}
	}
}

// startCurl starts a curl that posts data. What is returned waits for its end.
func (b *bed) startCurl(t testing.TB, data []byte) func([]byte) error {
	t.Helper()
	cmd := b.curl(t, 0, "edge.test", "--data-binary", "@-")
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &out, &errs
	launch(t, cmd)
	return func([]byte) error {
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%w: %s", err, errs.Bytes())
		}
		if !bytes.Equal(out.Bytes(), data) {
			return fmt.Errorf("%d bytes of %d came back, or others", out.Len(), len(data))
		}
		return nil
	}
}

func (b *bed) tradeTCP(i int, data []byte) error {
	c, err := net.Dial("tcp", b.addr(i))
	if err != nil {
		return err
	}
	defer c.Close()
	return trade(c, data)
}

func (b *bed) tradeTLS(t testing.TB, name string, version uint16, data []byte) error {
	c, err := tls.Dial("tcp", b.addr(0), clientConfig(t, func(c *tls.Config) { c.ServerName, c.MinVersion, c.MaxVersion = name, version, version }))
	if err != nil {
		return err
	}
	defer c.Close()
	return errors.Join(trade(c, data), farewell(c))
}

// farewell ends a conversation as it should be: whoever closes while the other side still has its close_notify to
// send resets the connection.
func farewell(c *tls.Conn) error {
	err := c.CloseWrite()
	_, end := c.Read(make([]byte, 1))
	if end != io.EOF {
		err = errors.Join(err, end)
	}
	return errors.Join(err, c.Close())
}

// askDemo asks the demo for its answer, once the others are there.
func (b *bed) askDemo(t testing.TB, crowd *gate) error {
	c, err := tls.Dial("tcp", b.addr(0), clientConfig(t, func(c *tls.Config) { c.ServerName = "d.wild.test" }))
	crowd.pass()
	if err != nil {
		return err
	}
	defer c.Close()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: d.wild.test\r\nConnection: close\r\n\r\n")
	answer, err := io.ReadAll(c)
	if err != nil || !bytes.Contains(answer, []byte(`"tlsnat works"`)) || !bytes.Contains(answer, []byte(c.LocalAddr().String())) {
		return fmt.Errorf("%w: %s", err, answer)
	}
	return nil
}

const (
	proxySource = "192.0.2.7:4711"
	proxyTarget = "198.51.100.1:443"
)

// proxyHeader formats a header that says that a client at src came to dst.
func proxyHeader(t testing.TB, version byte, src, dst string, tlvs ...proxyproto.TLV) []byte {
	t.Helper()
	from, to := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	h := proxyproto.HeaderProxyFromAddrs(version, net.TCPAddrFromAddrPort(from), net.TCPAddrFromAddrPort(to))
	if err := h.SetTLVs(tlvs); err != nil {
		t.Fatal(err)
	}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// localHeader is what a load balancer sends that checks for itself.
func localHeader(t testing.TB) []byte {
	h := proxyproto.Header{Version: 2, Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// checksummed is a v2 header whose CRC32C (its last TLV) is right if flip is 0.
func checksummed(t testing.TB, flip byte) []byte {
	b := proxyHeader(t, 2, proxySource, proxyTarget, proxyproto.TLV{Type: proxyproto.PP2_TYPE_NOOP, Value: make([]byte, 300)},
		proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("other.test")},
		proxyproto.TLV{Type: proxyproto.PP2_TYPE_CRC32C, Value: make([]byte, 4)})
	binary.BigEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	b[len(b)-1] ^= flip
	return b
}

// inPieces is a connection whose first bytes are written in pieces of a size; 0: together with what follows.
type inPieces struct {
	*net.TCPConn
	first []byte
	size  int
}

func (c *inPieces) Write(p []byte) (int, error) {
	first := c.first
	c.first = nil
	if c.size == 0 && len(first) > 0 {
		n, err := c.TCPConn.Write(append(first, p...))
		return max(0, n-len(first)), err
	}
	for piece := range slices.Chunk(first, max(1, c.size)) {
		if _, err := c.TCPConn.Write(piece); err != nil {
			return 0, err
		}
	}
	return c.TCPConn.Write(p)
}

// TestProxyHeaderIsBelieved: from an address of TLSNAT_PROXY_FROM, however it arrives, for each mode.
func TestProxyHeaderIsBelieved(t *testing.T) {
	leaf, err := tls.X509KeyPair(pki(t).chainPEM("wild-rsa"), pki(t).leaves["wild-rsa"].keyPEM())
	if err != nil {
		t.Fatal(err)
	}
	secure := serve(t, func(c *net.TCPConn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{leaf}})
		_, _ = io.Copy(s, s)
		_ = s.CloseWrite()
	})
	b := start(t, ":{0} edge.test -> "+echoServer(t)+"\n:{0} a.wild.test -> "+secure+" mode=pass\n:{1} -> "+echoServer(t)+" mode=tcp",
		"PROXY_FROM=10.0.0.0/8,127.0.0.1/32")
	const v6 = "[2001:db8::7]:4711"
	for _, h := range []struct {
		name   string
		header []byte
		client string // "": the peer
		level  string
	}{
		{"v1", proxyHeader(t, 1, proxySource, proxyTarget), proxySource, "info"},
		{"v1 IPv6", proxyHeader(t, 1, v6, "[2001:db8::1]:443"), v6, "info"},
		{"v1 UNKNOWN", []byte("PROXY UNKNOWN\r\n"), "", "info"},
		{"v1 UNKNOWN with addresses", []byte("PROXY UNKNOWN 192.0.2.7 192.0.2.1 4000 443\r\n"), "", "info"},
		{"v2", proxyHeader(t, 2, proxySource, proxyTarget), proxySource, "info"},
		{"v2 IPv6", proxyHeader(t, 2, v6, "[2001:db8::1]:443"), v6, "info"},
		{"v2 with TLVs", checksummed(t, 0), proxySource, "info"},
		{"v2 LOCAL", localHeader(t), "", "info"},
		{"v2 UNSPEC", []byte(unspec), "", "info"},
		{"v2 UNSPEC with something in it", []byte(unspec[:14] + "\x00\x0c" + "xxxxxxxxxxxx"), "", "info"},
	} {
		for _, pieces := range []struct {
			name string
			size int
		}{{"with the hello", 0}, {"alone", 4096}, {"byte by byte", 1}} {
			t.Run(h.name+" "+pieces.name, func(t *testing.T) {
				for _, name := range []string{"edge.test", "a.wild.test", ""} {
					raw := &inPieces{b.dial(t, bit(name == "")), slices.Clone(h.header), pieces.size}
					c, want := net.Conn(raw), logLine{Level: h.level, Outcome: "ok", SNI: name, Client: h.client}
					if name != "" {
						c = tls.Client(raw, clientConfig(t, func(c *tls.Config) { c.ServerName = name }))
					}
					data := []byte("what follows")
					if _, err := c.Write(data); err != nil {
						t.Fatal(err)
					}
					_ = c.(interface{ CloseWrite() error }).CloseWrite()
					if data, err := io.ReadAll(c); err != nil || string(data) != "what follows" {
						t.Fatalf("%q came back, %v", data, err)
					}
					_ = c.Close()
					if h.client == "" {
						want.Client = c.LocalAddr().String()
					}
					if name != "a.wild.test" { // there TLS is part of the bytes
						want.BytesUp, want.BytesDown = 12, 12
					}
					b.lineOf(t, c).expect(t, want)
				}
			})
		}
	}
}

// unspec is a header of version 2 with the command PROXY that says nothing of the client.
const unspec = "\r\n\r\n\x00\r\nQUIT\n\x21\x00\x00\x00"

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestLoadBalancerProbesAreNoErrors: empty connections, with and without a header.
func TestLoadBalancerProbesAreNoErrors(t *testing.T) {
	b := start(t, ":{0} edge.test -> demo", "PROXY_FROM=127.0.0.0/8")
	for _, said := range [][]byte{nil, localHeader(t), proxyHeader(t, 1, proxySource, proxyTarget)} {
		c := b.dial(t, 0)
		_, _ = c.Write(said)
		_ = c.CloseWrite()
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("after %q: %d, %v", said, n, err)
		}
		l := b.lineOf(t, c)
		l.expect(t, logLine{Level: "debug", Outcome: "ok"})
		if l.Error != "" || l.Alert != "" {
			t.Errorf("a probe is called an error: %s", l)
		}
	}
}

// TestProxyHeaderFromStrangersIsRefused: and not taken for a hello. A port whose bytes are not looked at carries it.
func TestProxyHeaderFromStrangersIsRefused(t *testing.T) {
	beside(t)
	for _, settings := range [][]string{nil, {"PROXY_FROM=10.0.0.0/8,192.0.2.0/24"}} {
		b := start(t, ":{0} edge.test -> demo\n:{1} -> "+echoServer(t)+" mode=tcp", settings...)
		for _, header := range [][]byte{proxyHeader(t, 1, proxySource, proxyTarget), proxyHeader(t, 2, proxySource, proxyTarget), localHeader(t)} {
			c := b.dial(t, 0)
			_, _ = c.Write(header)
			got, err := io.ReadAll(c)
			if err != nil || len(got) != 7 || got[0] != 21 {
				t.Errorf("%q and %v, not an alert", got, err)
			}
			_ = c.Close()
			b.lineOf(t, c).expect(t, logLine{Outcome: "bad_proxy", Client: c.LocalAddr().String(), Stage: "hello"})
			d := b.dial(t, 1)
			exchange(t, d, header)
			_ = d.Close()
			b.lineOf(t, d).expect(t, logLine{Outcome: "ok", Client: d.LocalAddr().String(), BytesUp: int64(len(header))})
		}
	}
}

// TestTrustedAddressHasToSendAHeader: one that is whole and right, before the hello's time-out.
func TestTrustedAddressHasToSendAHeader(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> demo\n:{1} -> "+echoServer(t)+" mode=tcp", "PROXY_FROM=127.0.0.1", "HELLO_TIMEOUT=1s")
	v2 := proxyHeader(t, 2, proxySource, proxyTarget)
	changed := func(at int, to byte) []byte {
		b := slices.Clone(v2)
		b[at] = to
		return b
	}
	for name, said := range map[string][]byte{
		"a hello":                  {22, 3, 1, 0, 100, 1, 0, 0, 96},
		"HTTP":                     []byte("GET / HTTP/1.1\r\n\r\n"),
		"v1 without an end":        append([]byte("PROXY TCP4 "), bytes.Repeat([]byte{'1'}, 200)...),
		"v1 without addresses":     []byte("PROXY TCP4\r\n"),
		"v1 with a bad address":    []byte("PROXY TCP4 192.0.2.777 192.0.2.1 1 2\r\n"),
		"v2 of 60,000 bytes":       changed(14, 0xea),
		"v2 of another version":    changed(12, 0x31),
		"v2 of an unknown command": changed(12, 0x22),
		"v2 too short for TCP4":    append(changed(15, 4)[:16], 1, 2, 3, 4),
		"v2 with a wrong checksum": checksummed(t, 1),
	} {
		t.Run(name, func(t *testing.T) {
			for i := range 2 {
				c := b.dial(t, i)
				_, _ = c.Write(said)
				if got, err := io.ReadAll(c); len(got) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%q, %v", got, err)
				}
				_ = c.Close()
				b.lineOf(t, c).expect(t, logLine{Level: "info", Outcome: "bad_proxy", Client: c.LocalAddr().String(), Stage: "proxy_header"})
			}
		})
	}
	var stuck []net.Conn
	for _, part := range [][]byte{[]byte("PROXY TCP4 192."), v2[:10], v2[:20]} {
		c := b.dial(t, 0)
		_, _ = c.Write(part)
		stuck = append(stuck, c)
	}
	for _, c := range stuck {
		if got, err := io.ReadAll(c); len(got) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q, %v", got, err)
		}
		l := b.lineOf(t, c)
		l.expect(t, logLine{Outcome: "hello_timeout", Stage: "proxy_header"})
		if l.DurationMS < 900 || l.DurationMS > 30_000 {
			t.Errorf("not after a second: %s", l)
		}
	}
}

// greeted is a PROXY header that a backend got.
type greeted struct {
	raw    []byte
	header *proxyproto.Header
}

// receiver is a backend that demands a PROXY header, tells it, and echoes.
func receiver(t testing.TB) (string, <-chan greeted) {
	t.Helper()
	got := make(chan greeted, 16)
	return serve(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		raw, err := readProxyHeader(r)
		if err != nil {
			got <- greeted{raw: fmt.Append(nil, err)}
			return
		}
		header, _ := proxyproto.Read(bufio.NewReader(bytes.NewReader(raw)))
		got <- greeted{raw, header}
		_, _ = io.Copy(c, r)
		_ = c.CloseWrite()
	}), got
}

// readProxyHeader takes the header's own bytes off r.
func readProxyHeader(r *bufio.Reader) ([]byte, error) {
	start, err := r.Peek(16)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(start, proxyproto.SIGV1) {
		return r.ReadBytes('\n')
	}
	raw := make([]byte, 16+int(binary.BigEndian.Uint16(start[14:])))
	_, err = io.ReadFull(r, raw)
	return raw, err
}

// tlvs checks the checksum and returns what stands behind the addresses.
func (g greeted) tlvs(t testing.TB) map[proxyproto.PP2Type]string {
	t.Helper()
	if g.header == nil {
		t.Fatalf("no header: %q", g.raw)
	}
	list, err := g.header.TLVs()
	if err != nil {
		t.Fatal(err)
	}
	all := map[proxyproto.PP2Type]string{}
	for _, tlv := range list {
		all[tlv.Type] = string(tlv.Value)
	}
	sum := all[proxyproto.PP2_TYPE_CRC32C]
	at := bytes.LastIndex(g.raw, []byte("\x03\x00\x04"+sum))
	if len(sum) != 4 || at < 0 {
		t.Fatalf("no checksum in %q", g.raw)
	}
	zeroed := slices.Clone(g.raw)
	clear(zeroed[at+3 : at+7])
	if crc32.Checksum(zeroed, crc32.MakeTable(crc32.Castagnoli)) != binary.BigEndian.Uint32([]byte(sum)) {
		t.Errorf("wrong checksum in %q", g.raw)
	}
	delete(all, proxyproto.PP2_TYPE_CRC32C)
	return all
}

// TestProxyHeaderToBackend: it comes first, it tells what the edge knows, and its bytes are not counted as traffic.
func TestProxyHeaderToBackend(t *testing.T) {
	addr, got := receiver(t)
	b := start(t, strings.ReplaceAll(`
		:{0} edge.test   -> ADDR proxy=v1
		:{0} *.wild.test -> ADDR proxy=v2 alpn=h2,http/1.1
		:{1}             -> ADDR proxy=v2 mode=tcp
		:{2}             -> ADDR proxy=v1 mode=tcp`, "ADDR", addr))
	plain := func(c net.Conn) string {
		from, to := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
		return fmt.Sprintf("PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n", from.Port, to.Port)
	}
	t.Run("v1", func(t *testing.T) {
		for _, dial := range []func() net.Conn{
			func() net.Conn { return b.dialTLS(t, 0, nil) },
			func() net.Conn { return b.dial(t, 2) },
		} {
			c := dial()
			exchange(t, c, []byte("data"))
			if g := <-got; string(g.raw) != plain(c) {
				t.Errorf("%q, not %q", g.raw, plain(c))
			}
			_ = c.Close()
			b.lineOf(t, c).expect(t, logLine{Outcome: "ok", BytesUp: 4, BytesDown: 4})
		}
	})
	t.Run("v2 terminate", func(t *testing.T) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			c := b.dialTLS(t, 0, func(c *tls.Config) {
				c.ServerName, c.NextProtos, c.MaxVersion = "a.wild.test", []string{"http/1.1", "h2"}, version
			})
			exchange(t, c, []byte("data"))
			g := <-got
			all := g.tlvs(t)
			_ = c.Close()
			l := b.lineOf(t, c)
			l.expect(t, logLine{Outcome: "ok", ALPN: "h2", BytesUp: 4})
			state := c.ConnectionState()
			ssl, err := tlvparse.SSL(proxyproto.TLV{Type: proxyproto.PP2_TYPE_SSL, Value: []byte(all[proxyproto.PP2_TYPE_SSL])})
			spoken, _ := ssl.SSLVersion()
			cipher, _ := ssl.SSLCipher()
			if err != nil || !ssl.ClientSSL() || ssl.Verified() || spoken != "TLSv"+l.TLS || cipher != tls.CipherSuiteName(state.CipherSuite) {
				t.Errorf("what it says of TLS: %v, %v", ssl, err)
			}
			delete(all, proxyproto.PP2_TYPE_SSL)
			if want := map[proxyproto.PP2Type]string{proxyproto.PP2_TYPE_AUTHORITY: "a.wild.test", proxyproto.PP2_TYPE_ALPN: "h2",
				proxyproto.PP2_TYPE_UNIQUE_ID: l.ID}; !reflect.DeepEqual(all, want) {
				t.Errorf("%q, not %q", all, want)
			}
			if g.header.SourceAddr.String() != c.LocalAddr().String() || g.header.DestinationAddr.String() != b.addr(0) {
				t.Errorf("from %v to %v", g.header.SourceAddr, g.header.DestinationAddr)
			}
		}
	})
	t.Run("v2 tcp", func(t *testing.T) {
		c := b.dial(t, 1)
		exchange(t, c, []byte("data"))
		all := (<-got).tlvs(t)
		_ = c.Close()
		l := b.lineOf(t, c)
		l.expect(t, logLine{Outcome: "ok", BytesUp: 4, BytesDown: 4})
		if want := map[proxyproto.PP2Type]string{proxyproto.PP2_TYPE_UNIQUE_ID: l.ID}; !reflect.DeepEqual(all, want) {
			t.Errorf("%q, not %q", all, want)
		}
	})
}

// TestIPv6ClientsAreServed: on the same port as the others, and the backend is told their address as it is.
func TestIPv6ClientsAreServed(t *testing.T) {
	if l, err := net.Listen("tcp", "[::1]:0"); err != nil {
		missing(t, "this machine has no IPv6 on loopback")
	} else {
		_ = l.Close()
	}
	addr, got := receiver(t)
	b := start(t, ":{0} -> "+addr+" mode=tcp proxy=v1\n:{1} edge.test -> "+addr+" proxy=v2")
	for i := range 2 {
		c, err := net.Dial("tcp", fmt.Sprintf("[::1]:%d", b.ports[i]))
		if err != nil {
			t.Fatal(err)
		}
		spoken := c
		if i == 1 {
			spoken = tls.Client(c, clientConfig(t, nil))
		}
		exchange(t, spoken, []byte("data"))
		if h := (<-got).header; h == nil || h.SourceAddr.String() != c.LocalAddr().String() || h.DestinationAddr.String() != c.RemoteAddr().String() {
			t.Errorf("the backend was told %+v", h)
		}
		_ = spoken.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Client: c.LocalAddr().String(), BytesUp: 4, BytesDown: 4})
	}
}

// TestProxyHeaderIsHandedOn: behind a load balancer the backend is told of the client, not of the load balancer; and
// of nobody when the load balancer looks for itself.
func TestProxyHeaderIsHandedOn(t *testing.T) {
	addr, got := receiver(t)
	b := start(t, ":{0} -> "+addr+" mode=tcp proxy=v2\n:{1} -> "+addr+" mode=tcp proxy=v1", "PROXY_FROM=127.0.0.1")
	for _, h := range []struct {
		header   []byte
		src, dst string
	}{
		{proxyHeader(t, 1, proxySource, proxyTarget), proxySource, proxyTarget},
		{proxyHeader(t, 2, "[2001:db8::7]:1", "[2001:db8::1]:2"), "[2001:db8::7]:1", "[2001:db8::1]:2"},
		{localHeader(t), "", ""},
	} {
		for i := range 2 {
			c := b.dial(t, i)
			_, _ = c.Write(h.header)
			exchange(t, c, []byte("data"))
			g := <-got
			switch {
			case g.header == nil:
				t.Errorf("no header: %q", g.raw)
			case h.src == "" && i == 0 && !g.header.Command.IsLocal(), h.src == "" && i == 1 && string(g.raw) != "PROXY UNKNOWN\r\n":
				t.Errorf("a client is told of: %q", g.raw)
			case h.src != "" && (g.header.SourceAddr.String() != h.src || g.header.DestinationAddr.String() != h.dst):
				t.Errorf("from %v to %v, not from %s to %s", g.header.SourceAddr, g.header.DestinationAddr, h.src, h.dst)
			}
			if i == 0 {
				g.tlvs(t)
			}
			_ = c.Close()
			b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Peer: c.LocalAddr().String(), BytesUp: 4})
		}
	}
}

// TestHAProxyTakesOurHeader: it refuses those whose checksum is wrong.
func TestHAProxyTakesOurHeader(t *testing.T) {
	path := program(t, "haproxy", "haproxy")
	port := strconv.Itoa(freePorts(t, 1)[0])
	server(t, command(t, path, "-db", "-f", fill(t, "haproxy.cfg", map[string]string{"port": port, "tls": strconv.Itoa(freePorts(t, 1)[0]),
		"pem": writeFile(t, "haproxy.pem", append(pki(t).chainPEM("edge-ecdsa"), pki(t).leaves["edge-ecdsa"].keyPEM()...))})), "127.0.0.1:"+port)
	b := start(t, ":{0} edge.test -> 127.0.0.1:"+port+" proxy=v1\n:{0} *.wild.test -> 127.0.0.1:"+port+" proxy=v2")
	v1 := run(t, b.curl(t, 0, "edge.test"), "")
	l := b.next(t)
	l.expect(t, logLine{Outcome: "ok", SNI: "edge.test"})
	if want := fmt.Sprintf("127.0.0.1 %s %d authority= id=\n", portOf(l.Peer), b.ports[0]); v1 != want {
		t.Errorf("%q, not %q", v1, want)
	}
	v2 := run(t, b.curl(t, 0, "a.wild.test"), "")
	l = b.next(t)
	l.expect(t, logLine{Outcome: "ok", SNI: "a.wild.test"})
	if want := fmt.Sprintf("127.0.0.1 %s %d authority=a.wild.test id=%s\n", portOf(l.Peer), b.ports[0], l.ID); v2 != want {
		t.Errorf("%q, not %q", v2, want)
	}
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

func TestNginxTakesOurHeader(t *testing.T) {
	web := nginx(t)
	b := start(t, ":{0} edge.test -> "+web.proxy+" proxy=v1\n:{0} *.wild.test -> "+web.proxy+" proxy=v2")
	for _, name := range []string{"edge.test", "a.wild.test"} {
		out := run(t, b.curl(t, 0, name), "")
		l := b.next(t)
		l.expect(t, logLine{Outcome: "ok", SNI: name})
		if want := fmt.Sprintf("127.0.0.1 %s 127.0.0.1 %d\n", portOf(l.Peer), b.ports[0]); out != want {
			t.Errorf("%q, not %q", out, want)
		}
	}
}

// named is a backend that says its name and nothing else.
func named(t testing.TB, name string) string { return serve(t, sayer(name)) }

func sayer(name string) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		_, _ = io.WriteString(c, name)
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	}
}

// visit reads all that the i-th port says, and returns it with the connection's line.
func (b *bed) visit(t testing.TB, i int) (string, logLine) {
	t.Helper()
	c := b.dial(t, i)
	said, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("%v\n%s", err, b.log.text())
	}
	_ = c.Close()
	return string(said), b.lineOf(t, c)
}

// refusing is an address where nobody listens.
func refusing(t testing.TB) string { return fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0]) }

// TestTurnsFollowWeights: one loop takes turns exactly; several each do so for themselves.
func TestTurnsFollowWeights(t *testing.T) {
	b := start(t, fmt.Sprintf(":{0} -> %s/weight=3 %s %s/weight=2 %s/backup mode=tcp", named(t, "a"), named(t, "b"), named(t, "c"),
		named(t, "backup")), "LOOPS=1")
	var turns strings.Builder
	for range 12 {
		said, l := b.visit(t, 0)
		l.expect(t, logLine{Outcome: "ok", Mode: "tcp"})
		turns.WriteString(said)
	}
	if got := turns.String(); got[:6] != got[6:] || strings.Count(got, "a") != 6 || strings.Count(got, "b") != 2 || strings.Contains(got, "aaa") {
		t.Errorf("turns %q: not 3:1:2, or not evenly mixed", got)
	}
}

// TestNextBackendIsTried: when one refuses, and only when all the others have does a backup get work.
func TestNextBackendIsTried(t *testing.T) {
	beside(t)
	living := named(t, "living")
	b := start(t, fmt.Sprintf(":{0} -> %s %s %s/backup mode=tcp\n:{1} -> %s %s %s/backup mode=tcp\n:{2} edge.test -> %s %s/backup",
		refusing(t), living, named(t, "backup"), refusing(t), refusing(t), named(t, "backup"), refusing(t), refusing(t)))
	for range 6 {
		said, l := b.visit(t, 0)
		if l.expect(t, logLine{Outcome: "ok", Backend: living}); said != "living" {
			t.Errorf("%q answered", said)
		}
		said, l = b.visit(t, 1)
		if l.expect(t, logLine{Outcome: "ok"}); said != "backup" {
			t.Errorf("%q answered", said)
		}
	}
	c := b.dialTLS(t, 2, nil)
	if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "internal error") {
		t.Errorf("with no backend left the client sees %v", err)
	}
	_ = c.Close()
	l := b.lineOf(t, c)
	l.expect(t, logLine{Level: "warn", Outcome: "connect_failed", SNI: "edge.test", TLS: "1.3", Alert: "internal_error", Stage: "connect"})
	if strings.Count(l.Error, "refused") != 2 {
		t.Errorf("not both are blamed: %s", l)
	}
}

// TestSilentBackendIsGivenUp: one that doesn't answer at all gets its part of the time, and the next one is tried.
func TestSilentBackendIsGivenUp(t *testing.T) {
	beside(t)
	silent := silentServer(t, "127.0.0.1:0")
	b := start(t, fmt.Sprintf(":{0} -> %s %s/backup mode=tcp connect=2s", silent, named(t, "living")))
	said, l := b.visit(t, 0)
	l.expect(t, logLine{Outcome: "ok"})
	if said != "living" || l.ConnectMS < 500 || l.ConnectMS > 20_000 {
		t.Errorf("%q answered: %s", said, l)
	}
}

// silentServer is an address whose backlog is full: the kernel drops further SYNs.
func silentServer(t testing.TB, at string) string {
	t.Helper()
	want := netip.MustParseAddrPort(at)
	family, sa := syscall.AF_INET6, syscall.Sockaddr(&syscall.SockaddrInet6{Port: int(want.Port()), Addr: want.Addr().As16()})
	if want.Addr().Is4() {
		family, sa = syscall.AF_INET, &syscall.SockaddrInet4{Port: int(want.Port()), Addr: want.Addr().As4()}
	}
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		t.Cleanup(func() { _ = syscall.Close(fd) })
		err = errors.Join(syscall.Bind(fd, sa), syscall.Listen(fd, 0))
	}
	if err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := 0
	switch name := name.(type) {
	case *syscall.SockaddrInet4:
		port = name.Port
	case *syscall.SockaddrInet6:
		port = name.Port
	}
	addr := netip.AddrPortFrom(want.Addr(), uint16(port)).String()
	for range 16 {
		c, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	t.Fatal("its backlog is never full")
	return ""
}

func TestUnixSocketBackend(t *testing.T) {
	dir := testkit.Dir(t)
	path := filepath.Join(dir, "app.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, func(c net.Conn) {
		_, _ = io.Copy(c, c)
		_ = c.(*net.UnixConn).CloseWrite()
	})
	b := start(t, ":{0} edge.test -> unix:"+path+"\n:{1} -> unix:"+filepath.Join(dir, "none.sock")+" unix:"+path+"/backup mode=tcp")
	for i, dial := range []func() net.Conn{
		func() net.Conn { return b.dialTLS(t, 0, nil) },
		func() net.Conn { return b.dial(t, 1) },
	} {
		c := dial()
		exchange(t, c, random(1, 4<<20))
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: "unix:" + path, BytesUp: 4 << 20,
			Path: []string{"user", "splice"}[i]})
	}
}

// TestPortsAreTranslated: ranges that go along, distances, and the same port at another address.
func TestPortsAreTranslated(t *testing.T) {
	beside(t)
	ports := freePorts(t, 9)
	for _, port := range ports[3:6] {
		for _, addr := range []string{"127.0.0.1", "127.0.0.2"} {
			l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", addr, port))
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, l, func(c net.Conn) { sayer(l.Addr().String())(c.(*net.TCPConn)) })
		}
	}
	lo, mid, hi := ports[0], ports[3], ports[6]
	for rule, want := range map[string]func(i int) string{
		fmt.Sprintf(":%d-%d -> 127.0.0.1:%d-%d mode=tcp", lo, lo+2, mid, mid+2): func(i int) string { return fmt.Sprintf("127.0.0.1:%d", mid+i) },
		fmt.Sprintf(":%d-%d -> 127.0.0.2:+3 mode=tcp", lo, lo+2):                func(i int) string { return fmt.Sprintf("127.0.0.2:%d", mid+i) },
		fmt.Sprintf(":%d-%d -> 127.0.0.1:-3 mode=tcp", hi, hi+2):                func(i int) string { return fmt.Sprintf("127.0.0.1:%d", mid+i) },
		fmt.Sprintf(":%d-%d -> 127.0.0.1:%d mode=tcp", lo, lo+2, mid+1):         func(int) string { return fmt.Sprintf("127.0.0.1:%d", mid+1) },
		fmt.Sprintf("127.0.0.3:%d-%d -> 127.0.0.2:= mode=tcp", mid, mid+2):      func(i int) string { return fmt.Sprintf("127.0.0.2:%d", mid+i) },
	} {
		t.Run(rule, func(t *testing.T) {
			b := start(t, rule)
			host, span, _ := strings.Cut(strings.Fields(rule)[0], ":")
			first, _, _ := strings.Cut(span, "-")
			lo, _ := strconv.Atoi(first)
			for i := range 3 {
				c, err := net.Dial("tcp", net.JoinHostPort(host, strconv.Itoa(lo+i)))
				if err != nil {
					t.Fatal(err)
				}
				said, err := io.ReadAll(c)
				_ = c.Close()
				if string(said) != want(i) || err != nil {
					t.Errorf("port %d led to %q (%v), not %s", lo+i, said, err, want(i))
				}
				b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: want(i), Listen: net.JoinHostPort(host, strconv.Itoa(lo+i))})
			}
		})
	}
}

// TestNamesDecide: exact before the longest wildcard before none, in any case; and what no rule serves is refused.
func TestNamesDecide(t *testing.T) {
	b := start(t, fmt.Sprintf(`
		:{0} a.wild.test     -> %s
		:{0} *.wild.test     -> %s
		:{0} *.b.wild.test   -> %s
		:{0} no.wild.test    -> reject
		:{1}                 -> %s cert=x.wild.test
		:{2}                 -> demo`, named(t, "exact"), named(t, "wildcard"), named(t, "longer"), named(t, "any")))
	for name, want := range map[string]string{"a.wild.test": "exact", "A.WILD.test": "exact", "z.wild.test": "wildcard",
		"z.b.wild.test": "longer", "b.wild.test": "wildcard"} {
		c := b.dialTLS(t, 0, func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = name, true })
		if said, err := io.ReadAll(c); string(said) != want || err != nil {
			t.Errorf("%s led to %q (%v), not %s", name, said, err, want)
		}
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", SNI: strings.ToLower(name), Rule: "TLSNAT_MAP:" + map[string]string{"exact": "2", "wildcard": "3", "longer": "4"}[want]})
	}
	for _, refused := range []struct{ name, alert, outcome string }{
		{"other.test", "unrecognized name", "unknown_name"}, {"wild.test", "unrecognized name", "unknown_name"},
		{"", "unrecognized name", "unknown_name"}, {"no.wild.test", "access denied", "denied"},
		{"z.a.wild.test", "unrecognized name", "unknown_name"}, // a rule has it, but no certificate: *.wild.test is one label there
	} {
		c := tls.Client(b.dial(t, 0), clientConfig(t, func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = refused.name, true }))
		if err := c.Handshake(); err == nil || !strings.Contains(err.Error(), refused.alert) {
			t.Errorf("%q: the client sees %v", refused.name, err)
		}
		_ = c.Close()
		l := b.lineOf(t, c)
		l.expect(t, logLine{Outcome: refused.outcome, Alert: strings.ReplaceAll(refused.alert, " ", "_")})
		if l.SNI != refused.name || len(l.JA4) != 36 {
			t.Errorf("who was refused? %s", l)
		}
	}
}

// TestClientWithoutAName: sees the certificate of cert=; where that's not said and there are several, none.
func TestClientWithoutAName(t *testing.T) {
	b := start(t, ":{0} -> demo cert=x.wild.test\n:{1} -> demo")
	nameless := func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = "", true }
	c := b.dialTLS(t, 0, nameless)
	if leaf := c.ConnectionState().PeerCertificates[0]; leaf.VerifyHostname("x.wild.test") != nil {
		t.Errorf("the certificate is for %v", leaf.DNSNames)
	}
	if _, err := c.ConnectionState().PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pki(t).roots(), Intermediates: intermediates(c)}); err != nil {
		t.Errorf("the chain: %v", err)
	}
	_ = c.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "ok", TLS: "1.3"})
	d := tls.Client(b.dial(t, 1), clientConfig(t, nameless))
	if err := d.Handshake(); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("the client sees %v", err)
	}
	_ = d.Close()
	b.lineOf(t, d).expect(t, logLine{Outcome: "unknown_name", Alert: "unrecognized_name"})
}

func intermediates(c *tls.Conn) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, cert := range c.ConnectionState().PeerCertificates[1:] {
		pool.AddCert(cert)
	}
	return pool
}

// TestALPNIsAgreedOn: the rule's preference counts; nothing in common is an error, nothing asked for is none.
func TestALPNIsAgreedOn(t *testing.T) {
	b := start(t, ":{0} edge.test -> demo alpn=h2,http/1.1\n:{1} edge.test -> demo")
	for _, c := range []struct {
		port    int
		offered []string
		agreed  string
	}{{0, []string{"http/1.1", "h2"}, "h2"}, {0, []string{"x", "http/1.1"}, "http/1.1"}, {0, nil, ""}, {1, []string{"h2"}, ""}} {
		conn := b.dialTLS(t, c.port, func(config *tls.Config) { config.NextProtos = c.offered })
		if got := conn.ConnectionState().NegotiatedProtocol; got != c.agreed {
			t.Errorf("%v: %q, not %q", c.offered, got, c.agreed)
		}
		_ = conn.Close()
		l := b.lineOf(t, conn)
		if l.expect(t, logLine{Outcome: "ok"}); l.ALPN != c.agreed {
			t.Errorf("alpn is not %q: %s", c.agreed, l)
		}
	}
	c := tls.Client(b.dial(t, 0), clientConfig(t, func(c *tls.Config) { c.NextProtos = []string{"smtp"} }))
	if err := c.Handshake(); err == nil || !strings.Contains(err.Error(), "no application protocol") {
		t.Errorf("the client sees %v", err)
	}
	_ = c.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "handshake_failed", ALPN: "smtp", Alert: "no_application_protocol"})
}

func TestRedirectToHTTPS(t *testing.T) {
	curl := program(t, "curl", "curl")
	b := start(t, ":{0} -> redirect\n:{1} -> redirect https-port=8443")
	for i, want := range []string{"https://edge.test/a/b?c=d", "https://edge.test:8443/a/b?c=d"} {
		_, port, _ := net.SplitHostPort(b.addr(i))
		out := run(t, command(t, curl, "-q", "--silent", "--noproxy", "*", "--output", "/dev/null", "--resolve", "edge.test:"+port+":127.0.0.1",
			"--write-out", "%{http_code} %{redirect_url}", "http://edge.test:"+port+"/a/b?c=d"), "")
		if out != "308 "+want {
			t.Errorf("%q, not to %s", out, want)
		}
		b.next(t).expect(t, logLine{Outcome: "ok", Mode: "redirect"})
	}
}
