// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

var update = flag.Bool("update", false, "let every client speak again, and write testdata/hellos and testdata/fuzz")

// client is a program that is made to connect to a TLS server on loopback. $ADDR,
// $PORT and $DIR in its arguments are the server's address, its port, and an
// empty directory. A client that is not live only speaks with -update.
type client struct {
	name   string // of its hello in testdata/hellos
	live   bool
	run    []string
	dial   func(addr string) error // instead of run: crypto/tls itself
	serve  uint16                  // highest version of the server, 0 for TLS 1.3
	resume bool                    // the hello that counts is the last, not the first
}

const nodeConnect = `const tls = require('tls');
const s = tls.connect({host: '127.0.0.1', port: $PORT, servername: 'edge.example', rejectUnauthorized: false,
  ALPNProtocols: ['http/1.1']}, () => s.end()); s.on('error', () => {});`

const javaConnect = `import javax.net.ssl.*; import java.net.*; import java.security.cert.X509Certificate;
public class Connect { public static void main(String[] a) throws Exception {
  SSLContext c = SSLContext.getInstance("TLS");
  c.init(null, new TrustManager[]{new X509TrustManager() {
    public void checkClientTrusted(X509Certificate[] x, String s) {}
    public void checkServerTrusted(X509Certificate[] x, String s) {}
    public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; } }}, null);
  SSLSocket s = (SSLSocket) c.getSocketFactory().createSocket(new Socket("127.0.0.1", $PORT), "edge.example", $PORT, true);
  SSLParameters p = s.getSSLParameters(); p.setApplicationProtocols(new String[]{"h2", "http/1.1"}); s.setSSLParameters(p);
  s.startHandshake(); s.close(); } }`

var chromium = []string{"chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
	"--disable-background-networking", "--disable-component-update", "--disable-sync", "--ignore-certificate-errors",
	"--user-data-dir=$DIR", "--host-resolver-rules=MAP edge.example 127.0.0.1"}

var openssl = []string{"openssl", "s_client", "-connect", "$ADDR", "-servername", "edge.example"}

func with(command []string, more ...string) []string {
	return append(append([]string(nil), command...), more...)
}

func shell(command []string) string { return strings.Join(command, " ") + " </dev/null" }

var clients = []client{
	{name: "curl", live: true, run: []string{"curl", "-sk", "--resolve", "edge.example:$PORT:127.0.0.1", "https://edge.example:$PORT/"}},
	{name: "curl-address", run: []string{"curl", "-sk", "https://$ADDR/"}},
	{name: "openssl", live: true, run: openssl},
	{name: "openssl-tls12", live: true, run: with(openssl, "-tls1_2")},
	{name: "openssl-tls13", live: true, run: with(openssl, "-tls1_3")},
	{name: "openssl-postgresql", run: with(openssl, "-alpn", "postgresql")},
	{name: "openssl-tls10", run: with(openssl, "-tls1", "-cipher", "ALL@SECLEVEL=0"), serve: tls.VersionTLS12},
	{name: "openssl-tls12-ticket", resume: true, run: []string{"sh", "-c",
		shell(with(openssl, "-tls1_2", "-sess_out", "$DIR/s")) + "; " + shell(with(openssl, "-tls1_2", "-sess_in", "$DIR/s"))}},
	{name: "openssl-tls13-ticket", resume: true, run: []string{"sh", "-c",
		"sleep 1 | " + strings.Join(with(openssl, "-tls1_3", "-sess_out", "$DIR/s"), " ") + "; " +
			shell(with(openssl, "-tls1_3", "-sess_in", "$DIR/s"))}},
	{name: "wget-gnutls", run: []string{"wget", "-q", "--tries=1", "--no-check-certificate", "-O/dev/null", "https://localhost:$PORT/"}},
	{name: "node", run: []string{"node", "-e", nodeConnect}},
	{name: "java", run: []string{"sh", "-c", "cat > $DIR/Connect.java <<'END'\n" + javaConnect + "\nEND\njava $DIR/Connect.java"}},
	{name: "chromium-pq", run: with(chromium, "https://edge.example:$PORT/")},
	// The post-quantum group can no longer be switched off alone; TLS 1.2 has none.
	{name: "chromium-tls12", run: with(chromium, "--ssl-version-max=tls1.2", "https://edge.example:$PORT/")},
	{name: "go-pq", live: true, dial: dialGo(&tls.Config{NextProtos: []string{"h2", "http/1.1"}}, 1)},
	{name: "go-classic", live: true, dial: dialGo(&tls.Config{CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}, 1)},
	{name: "go-psk", live: true, resume: true, dial: dialGo(&tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(1)}, 2)},
}

// dialGo connects n times with one configuration, and takes in the tickets.
func dialGo(config *tls.Config, n int) func(addr string) error {
	config.ServerName, config.InsecureSkipVerify = "edge.example", true
	return func(addr string) error {
		for range n {
			conn, err := tls.Dial("tcp", addr, config)
			if err != nil {
				return err
			}
			if _, err := io.ReadAll(conn); err != nil {
				return err
			}
			conn.Close()
		}
		return nil
	}
}

// TestInstalledClientsAgree lets the clients of this machine say hello, and
// reads what they say as crypto/tls reads it.
func TestInstalledClientsAgree(t *testing.T) {
	for _, c := range clients {
		if !c.live && !*update {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			hellos := c.speak(t)
			for _, b := range hellos {
				checkAgreement(t, b)
			}
			b := hellos[0]
			if c.resume {
				b = hellos[len(hellos)-1]
			}
			var (
				p Parser
				h Hello
			)
			if err := p.Parse(b, &h); err != nil {
				t.Fatal(err)
			}
			if h.Resumes() != c.resume {
				t.Errorf("Resumes() = %v, want %v", h.Resumes(), c.resume)
			}
			if *update {
				writeFile(t, filepath.Join("testdata", "hellos", c.name+".bin"), b[:p.Len()])
			}
		})
	}
}

// speak runs the client and returns the start of what it sent on each connection.
func (c client) speak(t *testing.T) [][]byte {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var hellos [][]byte
	done := make(chan struct{})
	go func() {
		defer close(done)
		hellos = serveAndRecord(ln, serverConfig(c.serve))
	}()
	if c.dial != nil {
		err = c.dial(ln.Addr().String())
	} else {
		err = c.execute(t, ln.Addr().(*net.TCPAddr))
	}
	ln.Close()
	<-done
	if len(hellos) == 0 {
		t.Fatalf("%s did not connect: %v", c.name, err)
	}
	return hellos
}

// execute runs the program. What it thinks of the server does not matter.
func (c client) execute(t *testing.T, addr *net.TCPAddr) error {
	testkit.Program(t, c.run[0], c.run[0])
	dir, err := os.MkdirTemp("", "sni-client")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	replace := strings.NewReplacer("$ADDR", addr.String(), "$PORT", fmt.Sprint(addr.Port), "$DIR", dir)
	args := make([]string, len(c.run))
	for i, a := range c.run {
		args[i] = replace.Replace(a)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = time.Second
	return cmd.Run()
}

// serveAndRecord completes a handshake on each connection until ln is closed.
func serveAndRecord(ln net.Listener, config *tls.Config) [][]byte {
	var (
		wg   sync.WaitGroup
		sent []*recorder
	)
	for {
		conn, err := ln.Accept()
		if err != nil {
			break
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		r := &recorder{Conn: conn}
		sent = append(sent, r)
		wg.Go(func() {
			defer conn.Close()
			server := tls.Server(r, config)
			if server.Handshake() == nil {
				server.Close()
			}
		})
	}
	wg.Wait()
	var hellos [][]byte
	for _, r := range sent {
		if len(r.read) > 0 {
			hellos = append(hellos, r.read)
		}
	}
	return hellos
}

// recorder keeps what is read from a connection.
type recorder struct {
	net.Conn
	read []byte
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.read = append(r.read, b[:n]...)
	return n, err
}

var serverCertificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"edge.example", "localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func serverConfig(maxVersion uint16) *tls.Config {
	return &tls.Config{MaxVersion: maxVersion, Certificates: []tls.Certificate{serverCertificate()},
		NextProtos: []string{"h2", "http/1.1", "postgresql"}}
}

func writeFile(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(name)
	if err == nil && bytes.Equal(old, data) {
		return
	}
	if err = os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
