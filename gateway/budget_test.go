// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPipeOfAStalledStreamIsTakenBack: a stream that nobody reads keeps no descriptors for longer than a moment, and no
// byte of it is lost or comes twice.
func TestPipeOfAStalledStreamIsTakenBack(t *testing.T) {
	r := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp").rehearse(t, 0x70)
	for i := 0; r.c.down.pipe == nil; i++ {
		if i > 1000 {
			t.Fatal("the stream is not spliced")
		}
		r.c.down.splice = !r.c.down.stuck() // as a stream is
		r.backend.say(64 << 10)
		r.goRound()
	}
	held := r.c.down.inPipe + len(r.c.down.out)
	if r.loop.lent.piped != r.c.down.inPipe || r.loop.pipes.out != 1 {
		t.Errorf("%d bytes are in a pipe, and %d are counted, in %d pipes", r.c.down.inPipe, r.loop.lent.piped, r.loop.pipes.out)
	}
	r.started = r.started.Add(-parkAfter - 2<<tickShift) // time passes
	r.goRound()
	if r.c.down.pipe != nil || r.loop.pipes.out != 0 || r.loop.lent.piped != 0 {
		t.Errorf("it keeps its pipe: %d are out", r.loop.pipes.out)
	}
	if len(r.c.down.out) != held {
		t.Errorf("%d bytes are kept, want %d", len(r.c.down.out), held)
	}
	r.end(t)
	if r.loop.lent.out != 0 || r.loop.lent.piped != 0 {
		t.Errorf("at the end %d bytes are lent, and %d in pipes", r.loop.lent.out, r.loop.lent.piped)
	}
}

// TestPipesHaveABound: streams beyond it are copied, and complete.
func TestPipesHaveABound(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	s.loop.pipes.most = 1
	first, second := s.rehearse(t, 0x70), s.rehearse(t, 0x70)
	for range 100 {
		for _, r := range []*rehearsal{first, second} {
			r.backend.say(64 << 10)
			r.goRound()
		}
	}
	if s.loop.pipes.out > 1 {
		t.Errorf("%d pipes are out", s.loop.pipes.out)
	}
	if !first.c.down.stuck() || !second.c.down.stuck() {
		t.Error("they do not stand still")
	}
	first.end(t)
	second.end(t)
}

// TestHalfARecordStaysWithTheKernel when memory is full, and is carried when its rest comes.
func TestHalfARecordStaysWithTheKernel(t *testing.T) {
	for kind := range byte(3) {
		r := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp").rehearse(t, 0x70|kind+1)
		r.loop.lent.share = 0
		r.client.say(16384)
		whole := r.client.sealed
		for _, end := range []int{3, 100, 9000} {
			r.client.sealed = whole[:end]
			r.client.flush()
			r.goRound()
			whole = whole[end:]
			if n := r.loop.lent.out; n > 512 {
				t.Fatalf("%d bytes are kept of half a record", n)
			}
		}
		r.client.sealed = whole
		r.client.flush()
		r.goRound()
		r.backend.hear(t, 64<<10, r.client)
		if r.backend.got != 16384 {
			t.Errorf("%d bytes of 16384 arrived", r.backend.got)
		}
		r.end(t)
	}
}

// TestMemoryHasABound: streams that nobody reads fill their part and little more; who reads is served all the same, who comes
// from the same address is turned away by name, and when they have gone everything is back.
func TestMemoryHasABound(t *testing.T) {
	const share = 1 << 20
	g, addr := withMemory(t, share)
	l := g.loops[0]
	dial := func() *net.TCPConn {
		c, err := net.Dial("tcp", addr)
		if errors.Is(err, unix.ECONNRESET) {
			return nil // turned away before the dial returned
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		return c.(*net.TCPConn)
	}
	reader := dial()
	read := func() {
		t.Helper()
		if _, err := io.CopyN(io.Discard, reader, 4<<20); err != nil {
			t.Fatalf("who reads is not served: %v", err)
		}
	}
	read()
	var stalled []*net.TCPConn
	refused := func() uint64 { return l.counters.refused[refusedMemory].Load() }
	for len(stalled) < 400 && refused() == 0 {
		c := dial()
		if c == nil {
			break
		}
		_ = c.SetReadBuffer(4 << 10)
		stalled = append(stalled, c)
		time.Sleep(5 * time.Millisecond)
	}
	for deadline := time.Now().Add(10 * time.Second); refused() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if refused() == 0 {
		t.Fatalf("%d streams that nobody reads, and nobody was turned away; %d of %d bytes are used", len(stalled), g.Status().Memory.Used, share)
	}
	read()
	read()
	if used := g.Status().Memory.Used; used > share+int64(len(stalled))*leastPerConn {
		t.Errorf("%d streams use %d bytes of %d", len(stalled), used, share)
	}
	for _, c := range stalled {
		_ = c.Close()
	}
	_ = reader.Close()
	for deadline := time.Now().Add(time.Minute); g.Status().Memory.Used != 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are used after all have gone", g.Status().Memory.Used)
		}
	}
}
