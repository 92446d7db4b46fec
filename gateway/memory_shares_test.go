// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// floodAddr is the address of a backend that sends for as long as anybody takes it.
func floodAddr(t *testing.T) string {
	t.Helper()
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = backend.Close() })
	flood := make([]byte, 1<<20)
	go func() {
		for c, err := backend.Accept(); err == nil; c, err = backend.Accept() {
			go func() {
				defer c.Close()
				for {
					if _, err := c.Write(flood); err != nil {
						return
					}
				}
			}()
		}
	}()
	return backend.Addr().String()
}

// withMemory is a running gateway whose loop may lend so many bytes, and the address of a rule with a flood behind it. It ends
// with the test.
func withMemory(t *testing.T, share int) (*Gateway, string) {
	t.Helper()
	addr := "127.0.0.1:" + strconv.Itoa(testkit.Port(t))
	g := configured(t, "MAP="+addr+" -> "+floodAddr(t)+" mode=tcp", "LOOPS=1")
	g.loops[0].lent.share = share
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		now, cancel := context.WithCancel(context.Background())
		cancel()
		g.Drain(now)
	})
	return g, addr
}

// TestOneSourceFillsItsShareOfMemory and no more: beside its stalled streams, new connections of other addresses are
// served.
func TestOneSourceFillsItsShareOfMemory(t *testing.T) {
	const share = 1 << 20
	g, addr := withMemory(t, share)
	dialFrom := func(source string) (*net.TCPConn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { _ = c.Close() })
		return c.(*net.TCPConn), c.SetDeadline(time.Now().Add(time.Minute))
	}
	const stalled = 72 // at 16 KiB each they would fill everything; at leastRead they need less than the eighths from half on
	for range stalled {
		c, err := dialFrom("127.0.0.3")
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadBuffer(4 << 10)
	}
	settled := func() bool {
		used := g.Status().Memory.Used
		time.Sleep(50 * time.Millisecond)
		return used >= share/2 && used == g.Status().Memory.Used
	}
	for end := time.Now().Add(20 * time.Second); !settled() && time.Now().Before(end); {
	}
	if used := g.Status().Memory.Used; used < share/2 || used >= share {
		t.Errorf("one source holds %d bytes of %d", used, share)
	}
	for i := range 5 {
		c, err := dialFrom(fmt.Sprintf("127.0.0.%d", 100+i))
		if err == nil {
			_, err = io.CopyN(io.Discard, c, 1<<20)
		}
		if err != nil {
			t.Fatalf("honest client %d of 5 is not served: %v", i+1, err)
		}
	}
}

// holding is a gateway that stands still, with a connection of each source that holds so many bytes.
func holding(t *testing.T, share int, held map[string]int) (*still, map[string]*conn) {
	t.Helper()
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	s.loop.lent.share = share
	conns := map[string]*conn{}
	for source, n := range held {
		c := s.newcomer(t, source)
		c.enter(s.listener.rules.plain)
		c.stage = relaying
		c.down.hold(s.loop, make([]byte, n))
		conns[source] = c
	}
	s.loop.noteMemory()
	s.loop.runPosted()
	return s, conns
}

// newcomer is a connection of a source that has just come.
func (s *still) newcomer(t *testing.T, source string) *conn {
	c, client := s.accept(t)
	t.Cleanup(func() {
		if c.stage != over {
			c.finish(OK, "")
		}
		_ = unix.Close(client)
	})
	c.report.source = netip.AddrPortFrom(netip.MustParseAddr(source), 1)
	return c
}

// TestMemoryIsTakenFromWhoHoldsTheMost when nothing else helps: of streams that stand still, and for another source.
func TestMemoryIsTakenFromWhoHoldsTheMost(t *testing.T) {
	s, conns := holding(t, 128<<10, map[string]int{"192.0.2.1": 64 << 10, "192.0.2.2": 32 << 10, "192.0.2.3": 32 << 10})
	if !s.loop.lacksMemory(s.newcomer(t, "192.0.2.9")) {
		t.Error("memory was taken from a stream that moves")
	}
	for _, c := range conns {
		c.active = s.loop.now - int64(parkAfter)
	}
	if !s.loop.lacksMemory(s.newcomer(t, "192.0.2.1")) {
		t.Error("whoever holds the most has got more")
	}
	if s.loop.lacksMemory(s.newcomer(t, "192.0.2.9")) {
		t.Error("a newcomer is turned away, though a source with a lot stands still")
	}
	r := &conns["192.0.2.1"].report
	if conns["192.0.2.1"].stage != over || r.outcome != Limited || r.refusal != refusedMemory {
		t.Errorf("the stream of the largest holder is at %s, with outcome %v", conns["192.0.2.1"].stage, r.outcome)
	}
	if conns["192.0.2.2"].stage == over || conns["192.0.2.3"].stage == over {
		t.Error("a stream of a source with less was ended")
	}
	if used := s.loop.memoryUsed(); used != 64<<10 {
		t.Errorf("%d bytes are in use", used)
	}
}

// TestShareOfMemory: who holds as much as is free besides reads little, and others read on; when there is enough again nobody
// counts.
func TestShareOfMemory(t *testing.T) {
	s, conns := holding(t, 128<<10, map[string]int{"192.0.2.1": 64 << 10, "2001:db8::1": 512})
	for source, want := range map[string]int{"192.0.2.1": leastRead, "2001:db8::1": maxPlain} {
		if got := conns[source].portion(); got != want {
			t.Errorf("%s may read %d at a time, want %d", source, got, want)
		}
	}
	for source, want := range map[string]bool{"192.0.2.1": true, "2001:db8::2": false} { // the /64 is one source, and holds little
		if got := s.newcomer(t, source).memoryFull(); got != want {
			t.Errorf("memory is full for %s: %v", source, got)
		}
	}
	s.loop.lent.piped = 52 << 10 // more than seven eighths
	for source, want := range map[string]bool{"192.0.2.1": true, "198.51.100.1": false} {
		if got := s.loop.lacksMemory(s.newcomer(t, source)); got != want {
			t.Errorf("the last eighth is denied to %s: %v", source, got)
		}
	}
	s.loop.lent.piped = 0
	conns["192.0.2.1"].finish(OK, "")
	if h := s.loop.lent.holders; len(h.sources) != 1 || len(h.counted) != 1 || h.largest == nil || h.largest.bytes != 512 {
		t.Errorf("of who has gone is left: %+v", h)
	}
	s.loop.noteMemory()
	if s.loop.lent.holders != nil {
		t.Error("it is still counted, with nearly everything free")
	}
}
