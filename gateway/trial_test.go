// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// TestTrialShakesHands: an ejected server of a tls:// backend is back when it answers a handshake, whatever it says; that it can
// be connected to is not enough, and not less.
func TestTrialShakesHands(t *testing.T) {
	serve := func(handle func(net.Conn)) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for c, err := l.Accept(); err == nil; c, err = l.Accept() {
				go func() {
					handle(c)
					_ = c.Close()
				}()
			}
		}()
		return l.Addr().String()
	}
	hung := serve(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	refuses := serve(func(c net.Conn) {
		_, _ = c.Read(make([]byte, 4096))
		_, _ = c.Write([]byte{21, 3, 3, 0, 2, 2, 112}) // a fatal alert, unrecognized_name
		_, _ = io.Copy(io.Discard, c)
	})
	answers := httptest.NewTLSServer(nil)
	defer answers.Close()
	for name, c := range map[string]struct {
		addr string
		tls  bool
		back bool
	}{
		"hung":               {hung, true, false},
		"hung, and no TLS":   {hung, false, true},
		"shakes hands":       {answers.Listener.Addr().String(), true, true},
		"answers with alert": {refuses, true, true},
		"leaves":             {serve(func(net.Conn) {}), true, false},
		"nobody":             {fmt.Sprintf("127.0.0.1:%d", testkit.Port(t)), true, false},
	} {
		scheme := ""
		if c.tls {
			scheme = "tls://"
		}
		s := newStill(t, ":1 -> "+scheme+c.addr+" mode=tcp"+map[bool]string{true: " backend-verify=off"}[c.tls])
		r := s.listener.rules.plain
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		err := r.trial(r.backends[0], s.keeper.server(netip.MustParseAddrPort(c.addr), ""))(ctx)
		cancel()
		if (err == nil) != c.back {
			t.Errorf("%s: %v", name, err)
		}
	}
}
