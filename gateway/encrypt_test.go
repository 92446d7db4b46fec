// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// trusting is the setting under which backend-ca=root is the test's CA.
func trusting(t testing.TB) string {
	return "BACKEND_CAS=" + filepath.Dir(pki(t).rootFile(t))
}

// sServer runs openssl s_server, which sends lines back in reverse, as edge.test.
func sServer(t testing.TB, kind string, args ...string) string {
	t.Helper()
	addr := fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0])
	leaf := map[string]string{"ECDSA": "edge-ecdsa", "RSA": "edge-rsa"}[kind]
	args = append([]string{"s_server", "-rev", "-naccept", "1000", "-accept", addr, "-cert", writeFile(t, "leaf.pem", pki(t).leaves[leaf].pem()),
		"-cert_chain", writeFile(t, "middle.pem", pki(t).middle.pem()), "-key", writeFile(t, "key.pem", pki(t).leaves[leaf].keyPEM())}, args...)
	server(t, command(t, program(t, "openssl", "openssl"), args...), addr)
	return addr
}

// reverse has the i-th port's backend send a line back.
func (b *bed) reverse(t testing.TB, i int) logLine {
	t.Helper()
	c := b.dial(t, i)
	if _, err := io.WriteString(c, "edge\n"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "egde\n" {
		t.Errorf("%q, %v", got, err)
	}
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c)
	_ = c.Close()
	return b.lineOf(t, c)
}

// TestOpenSSLBackendOverEverySuite: in both versions, with and without a certificate for it.
func TestOpenSSLBackendOverEverySuite(t *testing.T) {
	beside(t)
	root := pki(t).rootFile(t)
	for i, s := range suites {
		t.Run(s.String(), func(t *testing.T) {
			args := []string{"-tls1_2", "-cipher", s.openssl}
			if s.version == "1.3" {
				args = []string{"-tls1_3", "-ciphersuites", s.openssl}
			}
			option := ""
			if i%2 == 0 {
				args = append(args, "-Verify", "3", "-CAfile", root, "-verify_return_error", "-purpose", "any")
				option = " backend-cert=edge.test"
			}
			b := start(t, ":{0} -> tls://"+sServer(t, s.kind, args...)+" mode=tcp backend-ca=root backend-name=edge.test"+option, trusting(t))
			for n := range 3 {
				l := b.reverse(t, 0)
				l.expect(t, logLine{BackendTLS: s.version, BackendCipher: s.name, Path: "user", Mode: "tcp", BytesUp: 5, BytesDown: 5})
				if l.BackendResumed != (n > 0) || l.BackendHandshakeMS <= 0 {
					t.Errorf("connection %d: %s", n+1, l)
				}
			}
		})
	}
}

// disappoint connects to the i-th port, which has no backend for it, and says what the client sees.
func (b *bed) disappoint(t testing.TB, i int) (logLine, error) {
	t.Helper()
	c := b.dialTLS(t, i, nil)
	_, err := io.Copy(io.Discard, c)
	_ = c.Close()
	return b.lineOf(t, c), err
}

// TestBackendThatWantsACertificateSaysSo: without one the alert is told apart from an unreachable backend. In TLS 1.3 it
// comes after the handshake.
func TestBackendThatWantsACertificateSaysSo(t *testing.T) {
	beside(t)
	root := pki(t).rootFile(t)
	for version, want := range map[string]logLine{
		"-tls1_2": {Outcome: "connect_failed"},
		"-tls1_3": {Outcome: "tls_error", BackendAlertReceived: "certificate_required"},
	} {
		addr := sServer(t, "ECDSA", version, "-Verify", "3", "-CAfile", root, "-verify_return_error")
		b := start(t, ":{0} edge.test -> tls://"+addr+" backend-ca=root backend-name=edge.test", trusting(t))
		l, err := b.disappoint(t, 0)
		if l.expect(t, want); !strings.Contains(l.Error, "alert") {
			t.Errorf("the client saw %v: %s", err, l)
		}
	}
}

// TestNginxResumesSessions of TLS 1.2 and 1.3, says nginx, and it hears the right name.
func TestNginxResumesSessions(t *testing.T) {
	beside(t)
	web := nginx(t)
	for version, addr := range map[string]string{"TLSv1.2": web.seen12, "TLSv1.3": web.seen13} {
		b := start(t, ":{0} -> tls://"+addr+" mode=tcp backend-ca=root backend-name=a.wild.test\n"+
			":{1} *.wild.test -> tls://"+addr+" backend-ca=root backend-name=sni", trusting(t))
		for n := range 6 {
			reused := "r"
			if n == 0 {
				reused = "."
			}
			c := b.dial(t, 0)
			if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			want := fmt.Sprintf("\r\n\r\n%s a.wild.test %s\n", reused, version)
			if !strings.HasSuffix(string(got), want) || err != nil {
				t.Errorf("request %d: %q, want %q, %v", n+1, got, want, err)
			}
			_ = c.Close()
			if l := b.lineOf(t, c); l.BackendResumed != (n > 0) {
				t.Errorf("request %d: %s", n+1, l)
			}
		}
		out := run(t, b.curl(t, 1, "b.wild.test"), "")
		if want := fmt.Sprintf(". b.wild.test %s\n", version); out != want {
			t.Errorf("%q, want %q", out, want)
		}
	}
}

// TestALPNIsOfferedToTheBackend: what was agreed on with the client, and nothing else.
func TestALPNIsOfferedToTheBackend(t *testing.T) {
	heard := make(chan []string, 1)
	addr := serve(t, func(c *net.TCPConn) {
		config := serverConfig(t, 0)
		config.GetConfigForClient = func(chi *tls.ClientHelloInfo) (*tls.Config, error) {
			heard <- chi.SupportedProtos
			return nil, nil
		}
		config.NextProtos = []string{"h2", "http/1.1"}
		s := tls.Server(c, config)
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
	b := start(t, ":{0} edge.test -> tls://"+addr+" alpn=h2,http/1.1 backend-ca=root backend-name=edge.test", trusting(t))
	for _, offered := range [][]string{{"http/1.1"}, {"h2", "http/1.1"}, nil} {
		c := b.dialTLS(t, 0, func(c *tls.Config) { c.NextProtos = offered })
		exchange(t, c, []byte("x"))
		if got := <-heard; len(got) != min(len(offered), 1) || len(got) > 0 && got[0] != offered[0] {
			t.Errorf("the client offered %q, the backend was offered %q", offered, got)
		}
		_ = c.Close()
		b.lineOf(t, c)
	}
}

// TestBackendIsVerified: why it is not accepted stands in the line, and the next one is tried.
func TestBackendIsVerified(t *testing.T) {
	beside(t)
	a := pki(t)
	good := a.leaves["edge-ecdsa"].certificate(a)
	expired, err := issue(a.middle, "expired", ecdsaKey, "edge.test")
	if err == nil {
		expired.NotAfter = time.Now().Add(-time.Minute)
		expired, err = expired.signedBy(a.middle)
	}
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := issue(nil, "stranger", ecdsaKey)
	if err != nil {
		t.Fatal(err)
	}
	strange, err := issue(stranger, "strange", ecdsaKey, "edge.test")
	if err != nil {
		t.Fatal(err)
	}
	self, err := issue(nil, "self-signed", ecdsaKey, "edge.test")
	if err != nil {
		t.Fatal(err)
	}
	lone := func(id *identity) tls.Certificate {
		return tls.Certificate{Certificate: [][]byte{id.Raw}, PrivateKey: id.key}
	}
	speaks := func(config *tls.Config) func(*net.TCPConn) {
		return func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, tls.Server(c, config)) }
	}
	shows := func(cert tls.Certificate) func(*net.TCPConn) {
		return speaks(&tls.Config{Certificates: []tls.Certificate{cert}})
	}
	living := serve(t, func(c *net.TCPConn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{good}})
		_, _ = io.WriteString(s, "living")
		_ = s.Close()
		_, _ = io.Copy(io.Discard, c)
	})
	for name, c := range map[string]struct {
		backend func(*net.TCPConn)
		words   string
		result  string
	}{
		"wrong name":  {shows(a.leaves["wild-ecdsa"].certificate(a)), "certificate is valid for *.wild.test, *.b.wild.test, not edge.test", "certificate"},
		"expired":     {shows(expired.certificate(a)), "certificate has expired", "certificate"},
		"unknown CA":  {shows(lone(strange)), "certificate signed by unknown authority", "certificate"},
		"self-signed": {shows(lone(self)), "certificate signed by unknown authority", "certificate"},
		"plain TCP": {func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "220 mail.example ESMTP\r\n")
			_, _ = io.Copy(io.Discard, c)
		}, "does not speak TLS", "no_tls"},
		"silent": {func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }, "no answer to the TLS handshake in time", "timeout"},
		"resets": {func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 100))
			reset(c)
		}, "reset by peer", "closed"},
		"leaves":  {func(c *net.TCPConn) { _, _ = io.ReadFull(c, make([]byte, 300)) }, "TLS handshake", "closed"},
		"refuses": {speaks(&tls.Config{Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}), "refused the TLS handshake with the alert protocol_version", "alert"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := serve(t, c.backend)
			const how = " backend-ca=root backend-name=edge.test connect=3s"
			b := start(t, fmt.Sprintf(":{0} edge.test -> tls://%[1]s%[3]s\n:{1} -> tls://%[1]s tls://%[2]s/backup mode=tcp%[3]s", bad, living, how), trusting(t))
			l, err := b.disappoint(t, 0)
			if err == nil || !strings.Contains(err.Error(), "internal error") {
				t.Errorf("without a backend the client saw %v", err)
			}
			if l.expect(t, logLine{Outcome: "connect_failed", Level: "warn"}); !strings.Contains(l.Error, bad+": ") || !strings.Contains(l.Error, c.words) {
				t.Errorf("want %q: %s", c.words, l)
			}
			said, l := b.visit(t, 1)
			if l.expect(t, logLine{Outcome: "ok", Backend: living}); said != "living" || !strings.Contains(l.Error, c.words) {
				t.Errorf("%q answered: %s", said, l)
			}
			for _, e := range b.gateway.Status().Encryptions {
				if want := map[string]uint64{"ok": 1, c.result: 2}[e.Result]; e.Count != want && !e.Resumed {
					t.Errorf("%d handshakes with backends ended with %s, want %d", e.Count, e.Result, want)
				}
			}
		})
	}
	t.Run("not at all", func(t *testing.T) {
		b := start(t, ":{0} -> tls://"+serve(t, func(c *net.TCPConn) {
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{lone(self)}})
			_, _ = io.WriteString(s, "anybody")
			_ = s.Close()
		})+" mode=tcp backend-verify=off")
		if said, l := b.visit(t, 0); said != "anybody" || l.Outcome != "ok" {
			t.Errorf("%q: %s", said, l)
		}
	})
	t.Run("by its address", func(t *testing.T) {
		b := start(t, ":{0} edge.test -> tls://"+living+" backend-ca=root", trusting(t))
		if l, _ := b.disappoint(t, 0); l.Outcome != "connect_failed" || !strings.Contains(l.Error, "127.0.0.1 because it doesn't contain any IP SANs") {
			t.Errorf("%s", l)
		}
	})
}

// TestReloadReadsTheBackendCAs: a CA that was renewed counts from the next connection on.
func TestReloadReadsTheBackendCAs(t *testing.T) {
	stranger, err := issue(nil, "stranger", ecdsaKey)
	if err != nil {
		t.Fatal(err)
	}
	file := writeFile(t, "corp.pem", stranger.pem())
	addr := serve(t, func(c *net.TCPConn) {
		s := tls.Server(c, serverConfig(t, 0))
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
	b := start(t, ":{0} edge.test -> tls://"+addr+" backend-ca=corp backend-name=edge.test", "BACKEND_CAS="+filepath.Dir(file))
	if l, _ := b.disappoint(t, 0); l.Outcome != "connect_failed" || !strings.Contains(l.Error, "unknown authority") {
		t.Errorf("line: %s", l)
	}
	if err := os.WriteFile(file, pki(t).root.pem(), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := b.gateway.Reload(); !r.OK {
		t.Fatalf("%+v", r)
	}
	c := b.dialTLS(t, 0, nil)
	exchange(t, c, []byte("hello"))
	_ = c.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "ok", BackendTLS: "1.3"})
}

// signedBy is the certificate again, signed as it is now.
func (id *identity) signedBy(by *identity) (*identity, error) {
	der, err := x509.CreateCertificate(nil, id.Certificate, by.Certificate, id.key.Public(), by.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &identity{cert, id.key}, err
}

// TestClientThatLeavesWhileABackendShakesHandsIsLetGo at once, and a drain does not wait either.
func TestClientThatLeavesWhileABackendShakesHandsIsLetGo(t *testing.T) {
	beside(t)
	seen := make(chan struct{}, 2)
	silent := serve(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 100))
		seen <- struct{}{}
		_, _ = io.Copy(io.Discard, c)
	})
	b := start(t, ":{0} -> tls://"+silent+" mode=tcp connect=1h backend-verify=off")
	c := b.dial(t, 0)
	<-seen
	reset(c)
	if l := b.lineOf(t, c); l.Outcome != "client_reset" || l.Stage != "backend_tls" {
		t.Errorf("line: %s", l)
	}
	c = b.dial(t, 0)
	<-seen
	b.stop(t)
	if l := b.lineOf(t, c); l.Outcome != "drained" || l.Stage != "backend_tls" {
		t.Errorf("line: %s", l)
	}
}

// TestProxyHeaderGoesBeforeTLS, as HAProxy's send-proxy has it.
func TestProxyHeaderGoesBeforeTLS(t *testing.T) {
	path := program(t, "haproxy", "haproxy")
	ports := freePorts(t, 2)
	pem := append(pki(t).chainPEM("edge-ecdsa"), pki(t).leaves["edge-ecdsa"].keyPEM()...)
	server(t, command(t, path, "-db", "-f", fill(t, "haproxy.cfg", map[string]string{"port": fmt.Sprint(ports[0]), "tls": fmt.Sprint(ports[1]),
		"pem": writeFile(t, "haproxy.pem", pem)})), fmt.Sprintf("127.0.0.1:%d", ports[0]))
	b := start(t, fmt.Sprintf(":{0} edge.test -> tls://127.0.0.1:%d proxy=v2 backend-ca=root backend-name=edge.test", ports[1]), trusting(t))
	got := run(t, b.curl(t, 0, "edge.test"), "")
	l := b.next(t)
	l.expect(t, logLine{Outcome: "ok", BackendTLS: "1.3"})
	if want := fmt.Sprintf("127.0.0.1 %s %d authority=edge.test id=%s\n", portOf(l.Peer), b.ports[0], l.ID); got != want {
		t.Errorf("%q, not %q", got, want)
	}
}

// TestDataBehindAProxyHeaderIsEncrypted: what a client sends in the same segment as its load balancer's header.
func TestDataBehindAProxyHeaderIsEncrypted(t *testing.T) {
	x := newCrossing(t, "PROXY_FROM=127.0.0.0/8")
	c := x.dial(t, 4)
	client := &end{c, c}
	up := random(1, 70_000)
	client.send(t, append([]byte("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"), up...))
	client.finish()
	backend := x.arrived(t, tls.VersionTLS13)
	backend.expect(t, up, fin)
	backend.finish()
	client.expect(t, nil, fin)
	_, _ = c.Close(), backend.tcp.Close()
	x.lineOf(t, c).expect(t, logLine{Outcome: "ok", Client: "192.0.2.1:1", BytesUp: int64(len(up))})
}

// serverPenman shakes hands as a server, and then has the keys.
func serverPenman(t testing.TB, raw *net.TCPConn, version uint16) *penman {
	t.Helper()
	_ = raw.SetDeadline(time.Now().Add(patience))
	var log bytes.Buffer
	w := &recordwise{Conn: raw}
	config := serverConfig(t, version)
	config.KeyLogWriter, config.SessionTicketsDisabled = &log, true
	s := tls.Server(w, config)
	if err := s.Handshake(); err != nil {
		t.Fatal(err)
	}
	p := &penman{TCPConn: raw, version: version}
	p.write(t, w.pending)
	var in record.Keys
	var err error
	suite, secrets := s.ConnectionState().CipherSuite, keyLog(t, log.String())
	if version == tls.VersionTLS13 {
		p.keys, err = record.TrafficKeys(suite, secrets["SERVER_TRAFFIC_SECRET_0"])
		if err == nil {
			in, err = record.TrafficKeys(suite, secrets["CLIENT_TRAFFIC_SECRET_0"])
		}
		p.reader.Init(in, 0, record.Server)
	} else {
		random := unhex(t, strings.Fields(log.String())[1])
		in, p.keys, err = record.KeyBlock(suite, secrets["CLIENT_RANDOM"], random, w.clientRandom) // which is that of the first hello it wrote
		p.reader.Init(in, 1, record.Server)
		p.seq = 1
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestViolationByABackendIsAnsweredWithItsAlert: the backend sees why, the client has what came before and then a
// reset, and the line says whose fault it was.
func TestViolationByABackendIsAnsweredWithItsAlert(t *testing.T) {
	beside(t)
	x := newCrossing(t)
	for _, w := range ways {
		for name, v := range violations {
			if w.backend == 0 || v.only != 0 && v.only != w.backend {
				continue
			}
			if name == "renegotiation" { // a server asks for it
				v.send = func(p *penman) []byte { return p.record(22, []byte{0, 0, 0, 0}) }
			}
			t.Run(w.name+"/"+name, func(t *testing.T) {
				client := x.enter(t, w)
				p := serverPenman(t, <-x.backends[w.backend], w.backend)
				before := bytes.Repeat([]byte("what came before. "), 700)
				p.write(t, append(p.data(before), v.send(p)...))
				if v.fin {
					_ = p.CloseWrite()
				}
				data, alert, err := p.readAll()
				want := ""
				if v.alert != 0 {
					want = v.alert.String()
				}
				if alert != want || len(data) != 0 || err != io.EOF {
					t.Errorf("the backend saw the alert %q and %v (%d bytes), want %q and the end", alert, err, len(data), want)
				}
				_ = p.Close()
				got, ended := client.rest()
				if !bytes.HasPrefix(got, before) || ended != rst {
					t.Errorf("the client got %d bytes, then %s", len(got), ended)
				}
				_ = client.tcp.Close()
				l := x.lineOf(t, client.tcp)
				l.expect(t, logLine{Outcome: "tls_error", BackendAlert: want, Stage: "relay"})
				if !strings.HasPrefix(l.Error, "the backend ") || l.Alert != "" || (l.BackendAlertReceived == "internal_error") != (v.alert == 0) {
					t.Errorf("line: %s", l)
				}
			})
		}
	}
}

// TestKeyUpdatesByABackend amid streams: it goes over to new keys again and again and asks for new ones.
func TestKeyUpdatesByABackend(t *testing.T) {
	x := newCrossing(t)
	for _, w := range ways {
		if w.backend != tls.VersionTLS13 {
			continue
		}
		t.Run(w.name, func(t *testing.T) {
			client := x.enter(t, w)
			p := serverPenman(t, <-x.backends[w.backend], w.backend)
			const rounds = 90 // 15 requests: nobody takes more than 16 answers in a row without data
			up, down := random(1, rounds*9000), random(2, rounds*9000)
			wrote := inBackground(func() {
				for i := range rounds {
					piece := down[i*9000:][:9000]
					out := p.data(piece[:4000])
					if i%3 == 0 {
						out = append(out, p.update(i%2 == 0)...)
					}
					if _, err := p.TCPConn.Write(append(out, p.data(piece[4000:])...)); err != nil {
						t.Error(err)
						return
					}
				}
				_, _ = p.TCPConn.Write(p.record(21, []byte{1, 0}))
				_ = p.CloseWrite()
			})
			sent := inBackground(func() {
				client.send(t, up[:len(up)/2])
				<-wrote // behind a close_notify there would be no answer
				client.send(t, up[len(up)/2:])
				client.finish()
			})
			heard := inBackground(func() { client.expect(t, down, fin) })
			got, alert, err := p.readAll()
			<-sent
			<-heard
			if !bytes.Equal(got, up) || alert != "close_notify" || err != io.EOF {
				t.Errorf("%d of %d bytes arrived, then %s, %v", len(got), len(up), alert, err)
			}
			if p.updates == 0 {
				t.Error("the gateway did not change its keys when it was asked to")
			}
			_, _ = client.tcp.Close(), p.Close()
			if l := x.lineOf(t, client.tcp); l.Outcome != "ok" {
				t.Errorf("line: %s", l)
			}
		})
	}
}

// TestSystemRootsAreAsked: without backend-ca=, SSL_CERT_FILE says whom this process trusts.
func TestSystemRootsAreAsked(t *testing.T) {
	if _, err := os.Stat("/etc/ssl/certs"); err != nil {
		missing(t, "this system has no CAs (Debian package ca-certificates)")
	}
	b := start(t, ":{0} edge.test -> tls://"+serve(t, func(c *net.TCPConn) {
		_ = tls.Server(c, serverConfig(t, 0)).Handshake()
	})+" backend-name=edge.test")
	if l, _ := b.disappoint(t, 0); l.Outcome != "connect_failed" || !strings.Contains(l.Error, "unknown authority") {
		t.Errorf("line: %s", l)
	}
}
