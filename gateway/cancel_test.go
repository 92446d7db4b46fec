// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"io"
	"net"
	"strconv"
	"testing"
	"time"
)

const cancelRequest = "\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x01keys"

// TestCancelRequestIsNoWayIn: exactly the packet reaches the backend, then the end; what either side says besides goes
// nowhere.
func TestCancelRequestIsNoWayIn(t *testing.T) {
	w := newWitness(t)
	b := start(t, ":{0} -> "+w.addr+" starttls=postgres cert=edge.test\n:{1} -> "+w.addr+" starttls=postgres cert=edge.test proxy=v1\n:{2} -> "+w.addr+
		" starttls=postgres mode=pass", "HELLO_TIMEOUT=500ms")
	for i := range 3 {
		for _, behind := range []string{"", "select 1", cancelRequest} {
			for _, leaves := range []bool{false, true} {
				c := b.dial(t, i)
				_, _ = io.WriteString(c, cancelRequest+behind)
				y := w.next(t)
				y.wait(t, len(cancelRequest))
				_, _ = io.WriteString(c, behind)
				if leaves {
					_ = c.CloseWrite()
				}
				if _, err := io.WriteString(y.conn, "what a server would say"); err != nil && !leaves {
					t.Error(err)
				}
				if leaves { // the client's end is the backend's
					y.end(t)
				} else {
					time.Sleep(10 * time.Millisecond)
				}
				_ = y.conn.CloseWrite()
				if said, _ := io.ReadAll(c); len(said) > 0 {
					t.Errorf("port %d: the client hears %q", i, said)
				}
				y.end(t)
				want := cancelRequest
				if i == 1 {
					want = "PROXY TCP4 127.0.0.1 127.0.0.1 " + strconv.Itoa(int(c.LocalAddr().(*net.TCPAddr).Port)) + " " + strconv.Itoa(b.ports[i]) + "\r\n" + want
				}
				if string(y.data) != want {
					t.Errorf("port %d: the backend hears %q, want %q", i, y.data, want)
				}
				_ = y.conn.Close()
				_ = c.Close()
				b.lineOf(t, c).expect(t, logLine{Outcome: "ok", BytesUp: 16})
			}
		}
	}
}

// TestCancelRequestIsBoundedInTime: a backend that does not end the connection does not keep it open.
func TestCancelRequestIsBoundedInTime(t *testing.T) {
	w := newWitness(t)
	b := start(t, ":{0} -> "+w.addr+" starttls=postgres cert=edge.test", "HELLO_TIMEOUT=300ms")
	c := b.dial(t, 0)
	_, _ = io.WriteString(c, cancelRequest)
	y := w.next(t)
	y.end(t)
	_ = y.conn.Close()
	if said, err := io.ReadAll(c); err == nil || len(said) > 0 {
		t.Errorf("the client hears %q, %v", said, err)
	}
	b.lineOf(t, c).expect(t, logLine{Outcome: "idle", Stage: "cancel_request", BytesUp: 16})
}

// TestCancelRequestIsEncrypted to a backend that is spoken to in TLS: the secret in it is what ends somebody's query.
func TestCancelRequestIsEncrypted(t *testing.T) {
	leaf, err := tls.X509KeyPair(pki(t).chainPEM("edge-ecdsa"), pki(t).leaves["edge-ecdsa"].keyPEM())
	if err != nil {
		t.Fatal(err)
	}
	for scheme, asked := range map[string]string{"tls+postgres://": "\x00\x00\x00\x08\x04\xd2\x16\x2f", "tls://": ""} {
		heard := make(chan string, 1)
		addr := serve(t, func(c *net.TCPConn) {
			said := make([]byte, len(asked))
			if _, _ = io.ReadFull(c, said); string(said) != asked {
				heard <- "in the clear: " + string(said)
				return
			}
			if asked != "" {
				_, _ = io.WriteString(c, "S")
			}
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{leaf}})
			got := make([]byte, 64)
			n, _ := io.ReadAtLeast(s, got, 16)
			heard <- string(got[:n])
			_, _ = io.WriteString(s, "what a server would say")
			_ = s.Close()
		})
		b := start(t, ":{0} -> "+scheme+addr+" starttls=postgres cert=edge.test"+verifiesBackends, trusting(t))
		c := b.dial(t, 0)
		_, _ = io.WriteString(c, cancelRequest+"select 1")
		if got := <-heard; got != cancelRequest {
			t.Errorf("%s: the backend hears %q", scheme, got)
		}
		if said, _ := io.ReadAll(c); len(said) > 0 {
			t.Errorf("%s: the client hears %q", scheme, said)
		}
		_ = c.Close()
		b.lineOf(t, c).expect(t, logLine{Outcome: "ok", BackendTLS: "1.3", BytesUp: 16})
	}
}
