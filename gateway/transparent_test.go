// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net"
	"testing"
	"time"
)

// TestClientsAddressDoesNotEjectABackend: with source=transparent a connect may fail because of where the client is. The
// backend is out only if a connect from our own address fails as well.
func TestClientsAddressDoesNotEjectABackend(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := chooser(t, ":1 -> "+l.Addr().String()+" mode=tcp source=transparent eject=3")
	c.dial = &dialling{}
	s := c.servers()[0]
	fail := func(n int) {
		for range n {
			c.blame(s, "no answer in time")
		}
	}
	wait := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("never: " + what)
			}
		}
	}
	fail(50)
	wait("it was found out", func() bool { return !s.doubt.Load() })
	if !s.usable() || s.broken.Load() != 50 {
		t.Errorf("it is %s after %d failures of clients on its network", s.word(), s.broken.Load())
	}
	s.inRow.Store(0)
	_ = l.Close()
	fail(2)
	if s.doubt.Load() || !s.usable() {
		t.Error("two failures are not three")
	}
	fail(1)
	wait("it is ejected", func() bool { return s.word() == "ejected" })
	wait("its reason is there", func() bool { return s.reason() != "" })
	if why := s.reason(); why != "connects fail, from clients' addresses (no answer in time) and from our own: connection refused" {
		t.Errorf("the reason is %q", why)
	}
}
