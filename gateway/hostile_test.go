// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/record"
)

// TestHelloInAnyShapeIsRead: however a hello is cut into segments and records, and however long it is.
func TestHelloInAnyShapeIsRead(t *testing.T) {
	beside(t)
	backend := serve(t, func(c *net.TCPConn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pki(t).leaves["edge-ecdsa"].certificate(pki(t))}})
		_, _ = io.Copy(s, s)
	})
	b := start(t, fmt.Sprintf(":{0} edge.test -> %s\n:{1} edge.test -> %s mode=pass", echoServer(t), backend))
	shapes := map[string]func([]byte) [][]byte{
		"whole":               func(h []byte) [][]byte { return [][]byte{h} },
		"a byte at a time":    func(h []byte) [][]byte { return slices.Collect(slices.Chunk(h, 1)) },
		"12 records":          func(h []byte) [][]byte { return [][]byte{bytes.Join(inRecords(h, 12), nil)} },
		"12 records, delayed": func(h []byte) [][]byte { return inRecords(h, 12) },
	}
	hellos := map[string]func(*tls.Config){
		"post-quantum": func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768, tls.X25519} },
		"classic":      func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} },
		"TLS 1.2":      func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"17 KiB":       func(c *tls.Config) { c.NextProtos = manyProtocols(17 << 10) },
	}
	for i, mode := range []string{"terminate", "pass"} {
		for shape, cut := range shapes {
			for hello, change := range hellos {
				t.Run(mode+"/"+shape+"/"+hello, func(t *testing.T) {
					raw := b.dial(t, i)
					c := tls.Client(&reshaped{Conn: raw, cut: cut}, clientConfig(t, change))
					exchange(t, c, []byte("hello?"))
					_ = c.Close()
					l := b.lineOf(t, raw)
					if l.Outcome != "ok" || l.SNI != "edge.test" || l.JA4 == "" || l.Mode != mode {
						t.Errorf("line: %s", l)
					}
					if want := "X25519MLKEM768"; mode == "terminate" && hello == "post-quantum" && l.Group != want {
						t.Errorf("group %q, want %s", l.Group, want)
					}
				})
			}
		}
	}
}

// TestPlainHTTPIsAnsweredInPlainHTTP: also when the request is longer than what is read of it.
func TestPlainHTTPIsAnsweredInPlainHTTP(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	for name, request := range map[string]string{
		"GET":          "GET /path HTTP/1.1\r\nHost: edge.test\r\n\r\n",
		"HEAD":         "HEAD / HTTP/1.0\r\n\r\n",
		"POST 150 KiB": "POST /upload HTTP/1.1\r\nHost: edge.test\r\nContent-Length: 153600\r\n\r\n" + strings.Repeat("x", 150<<10),
		"half a line":  "OPTIO",
	} {
		t.Run(name, func(t *testing.T) {
			c := b.dial(t, 0)
			if _, err := io.WriteString(c, request); err != nil {
				t.Fatal(err)
			}
			method, _, _ := strings.Cut(request, " ")
			answer, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(answer.Body)
			if err != nil || answer.StatusCode != 400 || !answer.Close || strings.Contains(string(body), "https://") == (method == "HEAD") {
				t.Errorf("%v %q, %v", answer, body, err)
			}
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after the answer: %v, want the end of the stream", err)
			}
			_ = c.Close()
			l := b.lineOf(t, c)
			if l.Outcome != "bad_hello" || l.Stage != "hello" || l.Error != "plain HTTP on a TLS port" {
				t.Errorf("line: %s", l)
			}
		})
	}
}

// TestWhatIsNoHelloIsRefused with the alert that fits, or without a word where TLS is not spoken at all.
func TestWhatIsNoHelloIsRefused(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	noise := make([]byte, 4096)
	_, _ = rand.Read(noise)
	noise[0] = 0xfe
	hello := clientHello(t, nil)
	for name, c := range map[string]struct {
		send  []byte
		alert record.Alert // 0: none
	}{
		"noise":                 {noise, 0},
		"SSH":                   {[]byte("SSH-2.0-OpenSSH_9.2\r\n"), 0},
		"zeros":                 {make([]byte, 512), 0},
		"SSLv2":                 {unhex(t, "802e0100020015000000100100800200800300800400800500800600400700c0"), record.AlertProtocolVersion},
		"version 9":             {[]byte{22, 9, 1, 0, 200}, record.AlertProtocolVersion},
		"empty record":          {[]byte{22, 3, 1, 0, 0}, record.AlertUnexpectedMessage},
		"record of 65535 bytes": {[]byte{22, 3, 1, 255, 255}, record.AlertRecordOverflow},
		"hello of 16 MiB":       {[]byte{22, 3, 1, 64, 0, 1, 255, 255, 255}, record.AlertIllegalParameter},
		"ServerHello":           {[]byte{22, 3, 1, 0, 100, 2, 0, 0, 96}, record.AlertUnexpectedMessage},
		"an alert first":        {[]byte{21, 3, 1, 0, 2, 1, 0}, record.AlertUnexpectedMessage},
		"a fatal alert first":   {[]byte{21, 3, 1, 0, 2, 2, 40}, 0},
		"CCS first":             {[]byte{20, 3, 3, 0, 1, 1}, record.AlertUnexpectedMessage},
		"data first":            {[]byte{23, 3, 3, 0, 2, 1, 2}, record.AlertUnexpectedMessage},
		"heartbeat first":       {[]byte{24, 3, 2, 0, 3, 1, 0x40, 0}, record.AlertUnexpectedMessage},
		"unknown record first":  {[]byte{99, 3, 3, 0, 1, 1}, record.AlertUnexpectedMessage},
		"broken extensions":     {append(hello[:len(hello)-1:len(hello)-1], 0x77, 0, 0), record.AlertDecodeError},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "broken extensions" {
				c.send[4]++ // the record claims a byte more than the message has
				c.send = c.send[:5+int(binary.BigEndian.Uint16(c.send[3:]))]
				c.send[8]++
			}
			conn := b.dial(t, 0)
			if _, err := conn.Write(c.send); err != nil {
				t.Fatal(err)
			}
			_ = conn.CloseWrite()
			answer, err := io.ReadAll(conn)
			if err != nil {
				t.Error(err)
			}
			l := b.lineOf(t, conn)
			if l.Outcome != "bad_hello" || l.Error == "" || l.Stage != "hello" {
				t.Errorf("line: %s", l)
			}
			if c.alert == 0 {
				if len(answer) > 0 || l.Alert != "" {
					t.Errorf("answered %x (%s) to what speaks no TLS", answer, l.Alert)
				}
				return
			}
			if want := []byte{21, 3, 3, 0, 2, 2, byte(c.alert)}; !bytes.Equal(answer, want) || l.Alert != c.alert.String() {
				t.Errorf("answer %x, alert %q; want %x, %s", answer, l.Alert, want, c.alert)
			}
		})
	}
}

// TestSlowHelloIsClosed at HELLO_TIMEOUT, whether the client is silent or drips.
func TestSlowHelloIsClosed(t *testing.T) {
	beside(t)
	const timeout = 700 * time.Millisecond
	b := start(t, ":{0} edge.test -> "+echoServer(t), "HELLO_TIMEOUT="+timeout.String(), "PROXY_FROM=127.0.0.9")
	hello := clientHello(t, nil)
	for name, c := range map[string]struct {
		from  string
		send  []byte
		stage string
	}{
		"silence":                     {"127.0.0.1", nil, "hello"},
		"half a hello":                {"127.0.0.1", hello[:len(hello)/2], "hello"},
		"all but a byte":              {"127.0.0.1", hello[:len(hello)-1], "hello"},
		"half a PROXY header":         {"127.0.0.9", []byte("PROXY TCP4 192.0.2.1"), "proxy_header"},
		"PROXY header, half a hello":  {"127.0.0.9", append([]byte("PROXY UNKNOWN\r\n"), hello[:77]...), "hello"},
		"no PROXY header, in silence": {"127.0.0.9", nil, "proxy_header"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := dialFrom(t, c.from, b.addr(0))
			if _, err := conn.Write(c.send); err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Read(make([]byte, 1)); err == nil {
				t.Errorf("read %d bytes", n)
			}
			l := b.lineOf(t, conn)
			checkTimeout(t, l, timeout)
			if l.Outcome != "hello_timeout" || l.Stage != c.stage || l.Error == "" {
				t.Errorf("line: %s", l)
			}
		})
	}
	t.Run("dripping", func(t *testing.T) {
		conn := b.dial(t, 0)
		drip := time.NewTicker(timeout / 10)
		defer drip.Stop()
		for _, x := range hello {
			if _, err := conn.Write([]byte{x}); err != nil {
				break
			}
			<-drip.C
		}
		l := b.lineOf(t, conn)
		checkTimeout(t, l, timeout)
		if l.Outcome != "hello_timeout" {
			t.Errorf("line: %s", l)
		}
	})
}

// checkTimeout: a timeout is never early, and late by two ticks of the wheel and what a busy machine adds.
func checkTimeout(t *testing.T, l logLine, timeout time.Duration) {
	t.Helper()
	late := l.DurationMS - float64(timeout.Milliseconds())
	if late < 0 || late > 2500 {
		t.Errorf("ended after %.0f ms, want %v", l.DurationMS, timeout)
	}
}

// TestProbesAreNoErrors: port scans and health checks come and go without a byte.
func TestProbesAreNoErrors(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "PROXY_FROM=127.0.0.9")
	for _, from := range []string{"127.0.0.1", "127.0.0.9"} {
		for how, leave := range map[string]func(*net.TCPConn){
			"FIN":   func(c *net.TCPConn) { _ = c.CloseWrite() },
			"close": func(c *net.TCPConn) { _ = c.Close() },
			"reset": reset,
		} {
			t.Run(from+"/"+how, func(t *testing.T) {
				c := dialFrom(t, from, b.addr(0))
				leave(c)
				l := b.lineOf(t, c)
				if l.Level != "debug" || l.Outcome != "ok" {
					t.Errorf("line: %s", l)
				}
			})
		}
	}
}

// TestClientLeavesItsHelloHalfSaid: what it was is told.
func TestClientLeavesItsHelloHalfSaid(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "PROXY_FROM=127.0.0.9")
	hello := clientHello(t, nil)
	for _, c := range []struct {
		name, from string
		send       []byte
		leave      func(*net.TCPConn)
		outcome    string
	}{
		{"FIN", "127.0.0.1", hello[:100], func(c *net.TCPConn) { _ = c.CloseWrite() }, "bad_hello"},
		{"reset", "127.0.0.1", hello[:100], reset, "client_reset"},
		{"FIN in a PROXY header", "127.0.0.9", []byte("PROXY TCP4 "), func(c *net.TCPConn) { _ = c.CloseWrite() }, "bad_proxy"},
		{"reset in a PROXY header", "127.0.0.9", []byte("PROXY TCP4 "), reset, "client_reset"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dialFrom(t, c.from, b.addr(0))
			if _, err := conn.Write(c.send); err != nil {
				t.Fatal(err)
			}
			waitDelivered(t, conn)
			c.leave(conn)
			if l := b.lineOf(t, conn); l.Outcome != c.outcome {
				t.Errorf("want %s: %s", c.outcome, l)
			}
		})
	}
}

// TestProxyHeaderInManySegmentsIsRead: a v2 header with TLVs has some hundred bytes, and need not come at once.
func TestProxyHeaderInManySegmentsIsRead(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "PROXY_FROM=127.0.0.9")
	header := append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11"), 3000>>8, 3000&0xff)
	header = append(header, 192, 0, 2, 1, 192, 0, 2, 2, 0x12, 0x34, 0x01, 0xbb)
	header = append(append(header, 0xea, (3000-15)>>8, (3000-15)&0xff), make([]byte, 3000-15)...) // a TLV of somebody's own
	for _, at := range []int{1, 11, 15, 16, 20, 150, 700, len(header) - 1, len(header), len(header) + 5} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			conn := dialFrom(t, "127.0.0.9", b.addr(0))
			cut := func(hello []byte) [][]byte {
				all := append(slices.Clone(header), hello...)
				return [][]byte{all[:at], all[at:]}
			}
			c := tls.Client(&reshaped{Conn: conn, cut: cut, apart: true}, clientConfig(t, nil))
			exchange(t, c, []byte("hello?"))
			_ = c.Close()
			if l := b.lineOf(t, conn); l.Outcome != "ok" || l.Client != "192.0.2.1:4660" {
				t.Errorf("line: %s", l)
			}
		})
	}
}

// TestBrokenHandshakeIsTold: each way not to finish a handshake has its outcome, stage and words.
func TestBrokenHandshakeIsTold(t *testing.T) {
	beside(t)
	const timeout = time.Second
	b := start(t, ":{0} edge.test -> "+echoServer(t), "HELLO_TIMEOUT="+timeout.String())
	// saidHello leaves the client where it has the server's first flight.
	saidHello := func(t *testing.T) *net.TCPConn {
		c := b.dial(t, 0)
		if _, err := c.Write(clientHello(t, nil)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 600)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	say := func(p ...byte) func(*testing.T) *net.TCPConn {
		return func(t *testing.T) *net.TCPConn {
			c := saidHello(t)
			_, _ = c.Write(p)
			return c
		}
	}
	shake := func(change func(*tls.Config)) func(*testing.T) *net.TCPConn {
		return func(t *testing.T) *net.TCPConn {
			c := b.dial(t, 0)
			if err := tls.Client(c, clientConfig(t, change)).Handshake(); err == nil {
				t.Error("the handshake did not fail")
			}
			return c
		}
	}
	for name, c := range map[string]struct {
		do                       func(*testing.T) *net.TCPConn
		outcome, alert, received string
		words                    string
		late                     bool
	}{
		"FIN after ServerHello": {func(t *testing.T) *net.TCPConn { c := saidHello(t); _ = c.CloseWrite(); return c },
			"handshake_failed", "", "", "left during the handshake", false},
		"reset after ServerHello": {func(t *testing.T) *net.TCPConn { c := saidHello(t); reset(c); return c },
			"client_reset", "", "", "reset during the handshake", false},
		"silence after ServerHello": {saidHello, "handshake_failed", "", "", "TLSNAT_HELLO_TIMEOUT", true},
		"half a Finished, silence":  {say(23, 3, 3, 0, 53, 1, 2), "handshake_failed", "", "", "TLSNAT_HELLO_TIMEOUT", true},
		"alert instead of Finished": {say(21, 3, 3, 0, 2, 2, 42), "handshake_failed", "", "bad_certificate", "refused: bad_certificate", false},
		"garbage instead of it":     {say(append([]byte{99, 3, 3, 0, 9}, make([]byte, 9)...)...), "handshake_failed", "bad_record_mac", "", "", false},
		"forged Finished":           {say(append([]byte{23, 3, 3, 0, 53}, make([]byte, 53)...)...), "handshake_failed", "bad_record_mac", "", "", false},
		"untrusting client": {shake(func(c *tls.Config) { c.RootCAs = nil }),
			"handshake_failed", "", "bad_certificate", "the client refused", false},
		"TLS 1.1 at most": {shake(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }),
			"handshake_failed", "protocol_version", "", "version", false},
		"CBC only": {shake(func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}), "handshake_failed", "handshake_failure", "", "cipher suite", false},
		"no shared group": {shake(func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.SecP384r1MLKEM1024} }),
			"handshake_failed", "handshake_failure", "", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			conn := c.do(t)
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
			l := b.lineOf(t, conn)
			if l.Outcome != c.outcome || l.Alert != c.alert || l.AlertReceived != c.received || !strings.Contains(l.Error, c.words) {
				t.Errorf("want %s, alert %q, alert_received %q, %q: %s", c.outcome, c.alert, c.received, c.words, l)
			}
			if l.SNI != "edge.test" || l.JA4 == "" || l.Stage != "handshake" || l.Rule == "" {
				t.Errorf("line: %s", l)
			}
			if c.late {
				checkTimeout(t, l, timeout)
			}
		})
	}
}

// violation is a breach of the record protocol after the handshake, and the alert for it.
type violation struct {
	only  uint16 // TLS version; 0: any
	send  func(*penman) []byte
	alert record.Alert // 0: none
	fin   bool         // the client's FIN follows
}

var violations = map[string]violation{
	"bad MAC": {0, func(p *penman) []byte {
		r := p.data([]byte("forged"))
		r[len(r)-1] ^= 1
		return r
	}, record.AlertBadRecordMAC, false},
	"a record twice": {0, func(p *penman) []byte {
		r := p.data([]byte("again"))
		return append(r, r...)
	}, record.AlertBadRecordMAC, false},
	"too long": {0, func(*penman) []byte { return append([]byte{23, 3, 3, 0x41, 0x19}, make([]byte, 99)...) },
		record.AlertRecordOverflow, false},
	// The kernel judges a header once 13 bytes are there, so more follows.
	"too short": {0, func(p *penman) []byte {
		return append([]byte{23, 3, 3, 0, 3, 1, 2, 3}, p.data([]byte("behind it"))...)
	}, record.AlertBadRecordMAC, false},
	"change_cipher_spec": {0, func(p *penman) []byte {
		return append([]byte{20, 3, 3, 0, 1, 1}, p.data([]byte("behind it"))...)
	}, record.AlertUnexpectedMessage, false},
	"plain HTTP": {0, func(*penman) []byte { return []byte("GET / HTTP/1.1\r\n\r\n") }, record.AlertProtocolVersion, false},
	"empty records": {0, func(p *penman) (all []byte) {
		for range 300 {
			all = append(all, p.data(nil)...)
		}
		return all
	}, record.AlertUnexpectedMessage, false},
	"KeyUpdate storm": {tls.VersionTLS13, func(p *penman) (all []byte) {
		for range 1100 {
			all = append(all, p.update(true)...)
			all = append(all, p.data([]byte("x"))...)
		}
		return all
	}, record.AlertUnexpectedMessage, false},
	"KeyUpdate without data": {tls.VersionTLS13, func(p *penman) (all []byte) {
		for range 1025 {
			all = append(all, p.update(false)...)
		}
		return all
	}, record.AlertUnexpectedMessage, false},
	"malformed KeyUpdate": {tls.VersionTLS13, func(p *penman) []byte { return p.record(22, []byte{24, 0, 0, 1, 7}) },
		record.AlertIllegalParameter, false},
	"a second ClientHello": {tls.VersionTLS13, func(p *penman) []byte { return p.record(22, []byte{1, 0, 0, 4, 3, 3, 0, 0}) },
		record.AlertUnexpectedMessage, false},
	"renegotiation": {tls.VersionTLS12, func(p *penman) []byte { return p.record(22, []byte{1, 0, 0, 4, 3, 3, 0, 0}) },
		record.AlertNoRenegotiation, false},
	"only padding": {tls.VersionTLS13, func(p *penman) []byte { return p.record(0, make([]byte, 100)) }, record.AlertUnexpectedMessage, false},
	"unknown type": {tls.VersionTLS13, func(p *penman) []byte { return p.record(99, []byte("?")) }, record.AlertUnexpectedMessage, false},
	"half a record, FIN": {0, func(p *penman) []byte {
		r := p.data(make([]byte, 1000))
		return r[:len(r)/2]
	}, record.AlertDecodeError, true},
	"half a header, FIN": {0, func(*penman) []byte { return []byte{23, 3, 3} }, record.AlertDecodeError, true},
	"a bad record, FIN":  {0, func(*penman) []byte { return append([]byte{23, 3, 3, 0, 40}, make([]byte, 40)...) }, record.AlertBadRecordMAC, true},
	"an alert":           {0, func(p *penman) []byte { return p.record(21, []byte{2, byte(record.AlertInternalError)}) }, 0, false},
	"an alert, FIN":      {0, func(p *penman) []byte { return p.record(21, []byte{2, byte(record.AlertInternalError)}) }, 0, true},
}

// TestViolationIsAnsweredWithItsAlert: the client sees why, the backend has what came before and then a reset, so
// that it does not take a half for the whole, and the line says it.
func TestViolationIsAnsweredWithItsAlert(t *testing.T) {
	w := newWitness(t)
	b := start(t, ":{0} edge.test -> "+w.addr)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for name, v := range violations {
			if v.only != 0 && v.only != version {
				continue
			}
			for _, together := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%s/together=%v", tls.VersionName(version), name, together), func(t *testing.T) {
					p := dialPenman(t, b, 0, func(c *tls.Config) { c.MaxVersion = version })
					violate(t, b, p, w.next(t), v, together)
				})
			}
		}
	}
}

func violate(t *testing.T, b *bed, p *penman, got *testimony, v violation, together bool) {
	before := bytes.Repeat([]byte("what came before. "), 700)
	send := p.data(before)
	if !together {
		p.write(t, send)
		got.wait(t, len(before))
		send = nil
	}
	p.write(t, append(send, v.send(p)...))
	if v.fin {
		_ = p.CloseWrite()
	}
	data, alert, err := p.readAll()
	want := ""
	if v.alert != 0 {
		want = v.alert.String()
	}
	// The kernel opens a record of any type before it looks at that, and takes one of nothing but padding for damaged.
	inKernel := os.Getenv("KTLS_EAGER") != "" && p.version == tls.VersionTLS12 || gateway.EagerToRekey()
	if inKernel && (strings.Contains(t.Name(), "change_cipher_spec") || strings.Contains(t.Name(), "only_padding")) {
		want = "bad_record_mac"
	}
	if alert != want || len(data) != 0 || err != io.EOF {
		t.Errorf("the client saw the alert %q and %v (%d bytes), want %q and the end", alert, err, len(data), want)
	}
	_ = p.Close()
	got.end(t)
	if !errors.Is(got.err, unix.ECONNRESET) {
		t.Errorf("the backend's stream ended with %v, want a reset", got.err)
	}
	if !bytes.HasPrefix(got.data, before) {
		t.Errorf("the backend got %d bytes, want the %d that came before at least", len(got.data), len(before))
	}
	l := b.lineOf(t, p)
	if l.Outcome != "tls_error" || l.Alert != want || l.Stage != "relay" || l.Error == "" || l.BytesUp != int64(len(got.data)) {
		t.Errorf("want tls_error, alert %q: %s", want, l)
	}
	if (l.AlertReceived == "internal_error") != (v.alert == 0) {
		t.Errorf("alert_received %q: %s", l.AlertReceived, l)
	}
}

// TestDataBeforeAViolationReachesASlowBackend: what it has not taken yet when the client breaks the protocol.
func TestDataBeforeAViolationReachesASlowBackend(t *testing.T) {
	beside(t)
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	shrink(t, backend.(*net.TCPListener), 4096)
	b := start(t, ":{0} edge.test -> "+backend.Addr().String())
	for range 3 {
		p := dialPenman(t, b, 0, nil)
		c, err := backend.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		const size = 12 << 20
		sent := make(chan error, 1)
		go func() {
			for range size / 16384 {
				if _, err := p.TCPConn.Write(p.data(make([]byte, 16384))); err != nil {
					sent <- err
					return
				}
			}
			_, err := p.TCPConn.Write([]byte{20, 3, 3, 0, 1, 1})
			sent <- err
		}()
		n, err := io.Copy(io.Discard, &slowReader{c, 8 << 10})
		if n != size || !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the backend got %d of %d bytes, then %v", n, size, err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		if _, alert, _ := p.readAll(); alert != "unexpected_message" {
			t.Errorf("the client saw the alert %q", alert)
		}
		_ = c.Close()
		if l := b.lineOf(t, p); l.Outcome != "tls_error" || l.BytesUp != size {
			t.Errorf("line: %s", l)
		}
	}
}

// TestUpdateRequestAfterTheEndIsNoError: a client may ask for new keys when our stream to it is over already, and go
// on with its own.
func TestUpdateRequestAfterTheEndIsNoError(t *testing.T) {
	w := newWitness(t)
	b := start(t, ":{0} edge.test -> "+w.addr)
	p := dialPenman(t, b, 0, nil)
	got := w.next(t)
	_ = got.conn.CloseWrite()
	if _, alert, err := p.readAll(); err != io.EOF || alert != "close_notify" {
		t.Fatalf("%v, %v", alert, err)
	}
	p.write(t, p.update(true))
	p.write(t, p.data([]byte("still here")))
	p.write(t, p.record(21, []byte{1, 0}))
	got.end(t)
	if got.err != io.EOF || string(got.data) != "still here" {
		t.Errorf("the backend got %q, %v", got.data, got.err)
	}
	_ = p.CloseWrite()
	if l := b.lineOf(t, p); l.Outcome != "ok" {
		t.Errorf("line: %s", l)
	}
}

// TestDataWithTheFinishedIsNotLost: what comes in the same segment as the end of the handshake.
func TestDataWithTheFinishedIsNotLost(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	cache := tls.NewLRUClientSessionCache(1)
	first := dialPenman(t, b, 0, func(c *tls.Config) { c.MaxVersion, c.ClientSessionCache = tls.VersionTLS12, cache })
	_ = first.Close()
	b.lineOf(t, first)
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.3": nil,
		"TLS 1.2": func(c *tls.Config) { c.MaxVersion, c.ClientSessionCache = tls.VersionTLS12, cache },
	} {
		for _, records := range []int{1, 3, 10} {
			for _, extra := range []int{0, 2, 500} {
				t.Run(fmt.Sprintf("%s/%d records and %d bytes", name, records, extra), func(t *testing.T) {
					p := shakeHands(t, b.dial(t, 0), clientConfig(t, change), manner{true, first.master})
					if len(p.held) == 0 {
						t.Fatal("the Finished is gone already")
					}
					var want []byte
					all := p.held
					for i := range records {
						data := bytes.Repeat([]byte{byte(i)}, 700)
						want = append(want, data...)
						all = append(all, p.data(data)...)
					}
					last := p.data(make([]byte, 600))
					want = append(want, make([]byte, 600)...)
					p.write(t, append(all, last[:extra]...))
					if extra > 0 {
						p.read(t, 700*records)
					}
					p.write(t, last[extra:])
					p.write(t, p.record(21, []byte{1, 0}))
					if _, _, err := p.readAll(); err != io.EOF || !bytes.Equal(p.all, want) {
						t.Errorf("%d of %d bytes came back, then %v", len(p.all), len(want), err)
					}
					_ = p.Close()
					if l := b.lineOf(t, p); l.Outcome != "ok" || l.BytesUp != int64(len(want)) || l.resumed() != (name == "TLS 1.2") {
						t.Errorf("line: %s", l)
					}
				})
			}
		}
	}
}

// TestConnectionsBeyondMaxConnsAreTurnedAway, and those that are in are not disturbed.
func TestConnectionsBeyondMaxConnsAreTurnedAway(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t), "MAX_CONNS=3")
	var in []*tls.Conn
	for range 3 {
		in = append(in, b.dialTLS(t, 0, nil))
	}
	for range 5 {
		c, err := net.Dial("tcp", b.addr(0))
		if err == nil { // the reset can be there before the dialler has looked
			_, err = c.Read(make([]byte, 1))
			_ = c.Close()
		}
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("one too many: %v, want a reset", err)
		}
		if l := b.next(t); l.Outcome != "limited" || !strings.Contains(l.Error, "TLSNAT_MAX_CONNS") {
			t.Errorf("line: %s", l)
		}
	}
	for _, c := range in {
		exchange(t, c, []byte("still there"))
	}
	_ = in[0].Close()
	b.lineOf(t, in[0])
	exchange(t, b.dialTLS(t, 0, nil), []byte("room again"))
}

// TestForgedLengthCostsNoMemory: what a length field claims is not believed until it has arrived.
func TestForgedLengthCostsNoMemory(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	t.Run("hello", func(t *testing.T) {
		const n = 1000
		conns := make([]*net.TCPConn, 0, n)
		for range n {
			conns = append(conns, b.dial(t, 0))
		}
		cost := heapGrowth(t, func() {
			for _, c := range conns {
				_, _ = c.Write([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xf0, 3, 3})
			}
			b.settle(t)
		})
		if cost/n > 1024 {
			t.Errorf("a forged hello of 16 KiB costs %d bytes", cost/n)
		}
	})
	t.Run("record", func(t *testing.T) {
		const n = 200
		conns := make([]*penman, 0, n)
		for range n {
			p := dialPenman(t, b, 0, nil)
			p.write(t, p.data([]byte("x")))
			p.read(t, 1)
			conns = append(conns, p)
		}
		cost := heapGrowth(t, func() {
			for _, c := range conns {
				c.write(t, []byte{23, 3, 3, 0x40, 0x11, 1, 2, 3})
			}
			b.settle(t)
		})
		if cost/n > 1024 {
			t.Errorf("a forged record of 16 KiB costs %d bytes", cost/n)
		}
	})
}

// heapGrowth is by how much the live heap has grown after do.
func heapGrowth(t *testing.T, do func()) int64 {
	t.Helper()
	live := func() int64 {
		var m runtime.MemStats
		for range 3 { // what finalizers and pools hold on to goes with the second
			runtime.GC()
		}
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := live()
	do()
	return live() - before
}

// settle waits until the gateway has dealt with what was sent to it before. A loop takes 128 events a round, and
// answers once a round.
func (b *bed) settle(t *testing.T) {
	t.Helper()
	for range 32 {
		b.conns(t, 1)
	}
}

// penman is a TLS client that shakes hands by crypto/tls and writes every record after that by hand: what crypto/tls
// would never send.
type penman struct {
	*net.TCPConn
	version uint16
	keys    record.Keys // what it writes with
	seq     uint64
	reader  record.Reader
	raw     []byte // received, not opened
	all     []byte // opened
	held    []byte // a Finished that was not sent yet
	master  []byte // of a TLS 1.2 session
	updates int    // how often the gateway went over to new keys
	warning string // the last alert that ended nothing
}

// dialPenman shakes hands on the i-th port.
func dialPenman(t testing.TB, b *bed, i int, change func(*tls.Config)) *penman {
	t.Helper()
	return shakeHands(t, b.dial(t, i), clientConfig(t, change), manner{})
}

// manner is how a penman shakes hands.
type manner struct {
	hold   bool   // the client's last flight is not sent, but kept
	master []byte // of the TLS 1.2 session that is resumed
}

// shakeHands takes the keys over once crypto/tls is done.
func shakeHands(t testing.TB, raw *net.TCPConn, config *tls.Config, how manner) *penman {
	t.Helper()
	var log bytes.Buffer
	w := &recordwise{Conn: raw}
	config.KeyLogWriter = &log
	c := tls.Client(w, config)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	p := &penman{TCPConn: raw, version: c.ConnectionState().Version, held: w.pending}
	if !how.hold {
		p.write(t, p.held)
		p.held = nil
	}
	var in record.Keys
	var err error
	suite, secrets := c.ConnectionState().CipherSuite, keyLog(t, log.String())
	if p.version == tls.VersionTLS13 {
		p.keys, err = record.TrafficKeys(suite, secrets["CLIENT_TRAFFIC_SECRET_0"])
		if err == nil {
			in, err = record.TrafficKeys(suite, secrets["SERVER_TRAFFIC_SECRET_0"])
		}
		p.reader.Init(in, 0, record.Client)
	} else {
		if !c.ConnectionState().DidResume { // crypto/tls logs no master secret for a session that it resumes
			how.master = secrets["CLIENT_RANDOM"]
		}
		p.master = how.master
		p.keys, in, err = record.KeyBlock(suite, p.master, w.clientRandom, w.serverRandom)
		p.reader.Init(in, 1, record.Client)
		p.seq = 1
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func keyLog(t testing.TB, text string) map[string][]byte {
	secrets := map[string][]byte{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 3 {
			secrets[f[0]] = unhex(t, f[2])
		}
	}
	return secrets
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// data is a record of application data.
func (p *penman) data(b []byte) []byte { return p.record(23, b) }

// update is a KeyUpdate; what is written after it is under the next keys.
func (p *penman) update(request bool) []byte {
	ask := byte(0)
	if request {
		ask = 1
	}
	r := p.record(22, []byte{24, 0, 0, 1, ask})
	p.keys.Update()
	p.seq = 0
	return r
}

// record seals any payload as any type (RFC 8446, section 5.2; RFC 5246, section 6.2.3.3).
func (p *penman) record(typ byte, payload []byte) []byte {
	aead := p.aead()
	nonce := make([]byte, 12)
	copy(nonce, p.keys.IV())
	var seq [8]byte
	binary.BigEndian.PutUint64(seq[:], p.seq)
	for i, x := range seq {
		nonce[4+i] ^= x
	}
	p.seq++
	if p.version == tls.VersionTLS13 {
		header := []byte{23, 3, 3, 0, 0}
		binary.BigEndian.PutUint16(header[3:], uint16(len(payload)+1+16))
		return aead.Seal(header, nonce, append(slices.Clone(payload), typ), slices.Clone(header))
	}
	var explicit []byte
	if len(p.keys.IV()) == 4 {
		explicit = seq[:]
	}
	header := []byte{typ, 3, 3, 0, 0}
	binary.BigEndian.PutUint16(header[3:], uint16(len(explicit)+len(payload)+16))
	aad := append(slices.Clone(seq[:]), typ, 3, 3, byte(len(payload)>>8), byte(len(payload)))
	return aead.Seal(append(header, explicit...), nonce, payload, aad)
}

func (p *penman) aead() cipher.AEAD {
	if p.keys.Suite() == tls.TLS_CHACHA20_POLY1305_SHA256 || strings.Contains(tls.CipherSuiteName(p.keys.Suite()), "CHACHA20") {
		a, err := chacha20poly1305.New(p.keys.Key())
		if err != nil {
			panic(err) // a key has the right length
		}
		return a
	}
	block, err := aes.NewCipher(p.keys.Key())
	if err != nil {
		panic(err) // the same
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES has blocks of 16 bytes
	}
	return a
}

func (p *penman) write(t testing.TB, b []byte) {
	t.Helper()
	if _, err := p.TCPConn.Write(b); err != nil {
		t.Fatal(err)
	}
}

// step opens what is there, and else reads more. done is when nothing more can come: alert (none: "") and err say why.
func (p *penman) step() (done bool, alert string, err error) {
	rec, n, err := p.reader.Next(p.raw)
	switch {
	case err != nil:
		return true, "", err
	case n == 0:
		buf := make([]byte, 64<<10)
		m, err := p.TCPConn.Read(buf)
		p.raw = append(p.raw, buf[:m]...)
		return err != nil, p.warning, err
	}
	p.raw = p.raw[n:]
	p.all = append(p.all, rec.Data...)
	if rec.Kind == record.KeyUpdate {
		p.updates++
	}
	if rec.Kind == record.Ignored && rec.Alert != 0 {
		p.warning = rec.Alert.String()
	}
	if rec.Kind == record.CloseNotify || rec.Kind == record.AlertReceived {
		_, err := io.Copy(io.Discard, p.TCPConn)
		if err == nil {
			err = io.EOF
		}
		return true, rec.Alert.String(), err
	}
	return false, "", nil
}

// readAll reads to the end: the data that was not read before, the alert, and how the stream ended: io.EOF for a FIN.
func (p *penman) readAll() (data []byte, alert string, err error) {
	from := len(p.all)
	for {
		done, alert, err := p.step()
		if done {
			return p.all[from:], alert, err
		}
	}
}

// read waits until n bytes were read in all.
func (p *penman) read(t testing.TB, n int) {
	t.Helper()
	for len(p.all) < n {
		if done, alert, err := p.step(); done {
			t.Fatalf("after %d of %d bytes: %v, %v", len(p.all), n, alert, err)
		}
	}
}

// recordwise hands crypto/tls one record at a time, so that nothing behind the handshake is swallowed, and keeps back
// what it writes until it wants to read.
type recordwise struct {
	net.Conn
	left                       int
	header                     []byte
	pending                    []byte
	clientRandom, serverRandom []byte
}

func (c *recordwise) Write(b []byte) (int, error) {
	if c.clientRandom == nil {
		c.clientRandom = slices.Clone(b[11:43])
	}
	c.pending = append(c.pending, b...)
	return len(b), nil
}

func (c *recordwise) Read(b []byte) (int, error) {
	if len(c.pending) > 0 {
		if _, err := c.Conn.Write(c.pending); err != nil {
			return 0, err
		}
		c.pending = nil
	}
	if c.left > 0 {
		n, err := c.Conn.Read(b[:min(len(b), c.left)])
		if c.left -= n; len(c.header) == 5 && c.header[0] == 22 && n >= 38 && b[0] == 2 {
			c.serverRandom = slices.Clone(b[6:38])
		}
		c.header = nil
		return n, err
	}
	n, err := io.ReadFull(c.Conn, b[:5])
	if err == nil {
		c.header = slices.Clone(b[:5])
		c.left = int(b[3])<<8 | int(b[4])
	}
	return n, err
}

// reshaped sends a client's first flight in pieces.
type reshaped struct {
	net.Conn
	cut   func([]byte) [][]byte
	apart bool // one only when the one before was read
	sent  bool
}

func (c *reshaped) Write(b []byte) (int, error) {
	if c.sent {
		return c.Conn.Write(b)
	}
	c.sent = true
	for i, piece := range c.cut(b) {
		if c.apart && i > 0 {
			time.Sleep(20 * time.Millisecond) // nothing tells when the gateway has read
		}
		if _, err := c.Conn.Write(piece); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// stalled stops a client between the server's flight and its answer.
type stalled struct {
	net.Conn
	asked, resume chan struct{}
	done          chan error
	wrote         bool
}

func (c *stalled) Write(b []byte) (int, error) {
	if c.wrote {
		select {
		case <-c.asked:
		default:
			close(c.asked)
		}
		<-c.resume
	}
	c.wrote = true
	return c.Conn.Write(b)
}

// clientHello is what crypto/tls says first.
func clientHello(t testing.TB, change func(*tls.Config)) []byte {
	t.Helper()
	var first captured
	_ = tls.Client(&first, clientConfig(t, change)).Handshake()
	return first.b
}

type captured struct {
	net.Conn
	b []byte
}

func (c *captured) Write(b []byte) (int, error) {
	c.b = append(c.b, b...)
	return len(b), nil
}
func (c *captured) Read([]byte) (int, error) { return 0, io.EOF }
func (c *captured) Close() error             { return nil }

// inRecords cuts a message that lies in one record or several into n records.
func inRecords(b []byte, n int) (records [][]byte) {
	header := slices.Clone(b[:3])
	var message []byte
	for len(b) > 0 {
		size := int(binary.BigEndian.Uint16(b[3:]))
		message = append(message, b[5:5+size]...)
		b = b[5+size:]
	}
	for piece := range slices.Chunk(message, (len(message)+n-1)/n) {
		r := binary.BigEndian.AppendUint16(slices.Clone(header), uint16(len(piece)))
		records = append(records, append(r, piece...))
	}
	return records
}

// manyProtocols is an ALPN list of so many bytes.
func manyProtocols(size int) (list []string) {
	for n := 0; n < size; n += 201 {
		list = append(list, fmt.Sprintf("%0200d", n))
	}
	return list
}

// certificate is a leaf in the form that a server of crypto/tls takes.
func (id *identity) certificate(a *authority) tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{id.Raw, a.middle.Raw}, PrivateKey: id.key, Leaf: id.Certificate}
}

// dialFrom connects from one of the loopback's addresses.
func dialFrom(t testing.TB, from, to string) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// reset closes with RST.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// waitDelivered waits until the other side's kernel has everything.
func waitDelivered(t testing.TB, c syscall.Conn) {
	t.Helper()
	for deadline := time.Now().Add(patience); unsentBytes(t, c) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("what was sent is not acknowledged")
		}
	}
}

func unsentBytes(t testing.TB, c syscall.Conn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// shrink makes the receive buffers small of what the listener is going to accept.
func shrink(t testing.TB, l *net.TCPListener, size int) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, size) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// slowReader reads little at a time, and gives the sender time to fill the socket in between.
type slowReader struct {
	io.Reader
	n int
}

func (r *slowReader) Read(p []byte) (int, error) {
	runtime.Gosched()
	return r.Reader.Read(p[:min(len(p), r.n)])
}

// witness is a backend that says nothing, and tells exactly what it was sent and how that ended.
type witness struct {
	addr  string
	conns chan *testimony
}

type testimony struct {
	conn *net.TCPConn
	data []byte
	err  error // io.EOF: FIN
	more chan struct{}
	n    atomic.Int64
}

func newWitness(t testing.TB) *witness {
	w := &witness{conns: make(chan *testimony, 64)}
	w.addr = serve(t, func(c *net.TCPConn) {
		y := &testimony{conn: c, more: make(chan struct{})}
		w.conns <- y
		defer close(y.more)
		buf := make([]byte, 64<<10)
		for {
			n, err := c.Read(buf)
			y.data = append(y.data, buf[:n]...)
			y.n.Add(int64(n))
			if err != nil {
				y.err = err
				return
			}
		}
	})
	return w
}

// next is the next connection that the backend has accepted.
func (w *witness) next(t testing.TB) *testimony {
	t.Helper()
	select {
	case y := <-w.conns:
		return y
	case <-time.After(patience):
		t.Fatal("no connection reached the backend")
		return nil
	}
}

// wait waits until n bytes have arrived.
func (y *testimony) wait(t testing.TB, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); y.n.Load() < int64(n); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d bytes reached the backend", y.n.Load(), n)
		}
	}
}

// end waits for the end of the stream; from then on data and err stand.
func (y *testimony) end(t testing.TB) {
	t.Helper()
	select {
	case <-y.more:
	case <-time.After(patience):
		t.Fatalf("the backend's stream does not end (%d bytes so far)", y.n.Load())
	}
}
