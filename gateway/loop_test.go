// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/record"
)

// still is a gateway whose loop does not run: the test brings connections their news itself.
type still struct {
	*Gateway
	*loop
	listener *listener
}

// newStill makes one for a map whose first rule has the port that is looked at.
func newStill(t testing.TB, mapText string, settings ...string) *still {
	t.Helper()
	g := configured(t, append([]string{"MAP=" + mapText, "LOOPS=1"}, settings...)...)
	gen := g.current.Load()
	port := gen.config.Map.Rules[0].Listen.Lo
	ln := &listener{loop: g.loops[0], port: port, gen: gen, rules: gen.port(netip.Addr{}, port), name: "test"}
	t.Cleanup(func() {
		g.loops[0].closeAll()
		g.lines.close()
	})
	return &still{g, g.loops[0], ln}
}

// configured makes a gateway with those settings (without the prefix), which has not been started.
func configured(t testing.TB, settings ...string) *Gateway {
	t.Helper()
	environ := []string{config.Prefix + "STATE=" + t.TempDir()}
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
	g, err := New(config, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// pair is a connection of which the loop has one end.
func pair(t testing.TB) (ours int32, theirs int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return int32(fds[0]), fds[1]
}

// accept is an accepted connection, and the client's end of it.
func (s *still) accept(t testing.TB) (*conn, int) {
	t.Helper()
	ours, theirs := pair(t)
	c := newConn(s.loop, s.listener, ours, netip.MustParseAddrPort("192.0.2.7:4711"))
	s.loop.conns[c] = struct{}{}
	if err := s.loop.watch(&c.client); err != nil {
		t.Fatal(err)
	}
	return c, theirs
}

// available is everything that can be read at once.
func available(fd int) (all []byte) {
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil {
			return all
		}
		all = append(all, buf[:n]...)
	}
}

// TestKeysAreRenewedInTime: AES-GCM keys are good for 2^24.5 records (RFC 8446, section 5.5). A stream goes over to new
// ones before that, and its client can read on.
func TestKeysAreRenewedInTime(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	c, client := s.accept(t)
	defer unix.Close(client)
	ours, backend := pair(t)
	defer unix.Close(backend)
	c.backend = socket{owner: c, fd: ours, writable: true, readable: true}
	c.enter(s.listener.rules.plain)
	keys, err := record.TrafficKeys(tls.TLS_AES_128_GCM_SHA256, bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	const last = 1<<24 - 2
	c.client.tls = &session{}
	c.client.tls.writer.Init(keys, last)
	var reader record.Reader
	reader.Init(keys, last, record.Client)
	var kinds []record.Kind
	for i := range 5 {
		message := fmt.Appendf(nil, "message %d", i)
		if _, err := unix.Write(backend, message); err != nil {
			t.Fatal(err)
		}
		c.backend.readable = true
		c.downward().pump()
		var got []byte
		for b := available(client); len(b) > 0; {
			rec, n, err := reader.Next(b)
			if err != nil || n == 0 {
				t.Fatalf("the client can't read message %d: %v", i, err)
			}
			kinds, got, b = append(kinds, rec.Kind), append(got, rec.Data...), b[n:]
		}
		if !bytes.Equal(got, message) {
			t.Errorf("%q arrived, want %q", got, message)
		}
	}
	want := []record.Kind{record.Data, record.Data, record.KeyUpdate, record.Data, record.Data, record.Data}
	if !slices.Equal(kinds, want) {
		t.Errorf("the client got %v, want %v", kinds, want)
	}
	c.finish(OK, "")
}

// TestUpdateRequestsOfAClientThatDoesNotRead cost nothing: while its stream is stuck one answer does for all of them.
func TestUpdateRequestsOfAClientThatDoesNotRead(t *testing.T) {
	r := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp").rehearse(t, 1)
	for !r.c.down.stuck() {
		r.backend.say(64 << 10)
		r.goRound()
	}
	held := len(r.c.down.out)
	const requests = 25_000 // the answers would be more than the 512 KiB that a connection may hold
	for range requests {
		r.client.say(4096)
		r.client.updateKeys(true)
		r.client.flush()
		r.goRound()
		r.backend.hear(t, 8192, r.client)
	}
	if r.backend.got != requests*4096 {
		t.Errorf("%d of %d bytes reached the backend", r.backend.got, requests*4096)
	}
	if grown := len(r.c.down.out) - held; grown > 0 {
		t.Errorf("%d requests for new keys made us hold %d bytes more", requests, grown)
	}
	r.end(t)
}

// TestQuietConnectionIsParked: without its key schedules, which are most of what it costs, and awake with the next byte,
// as often as it goes quiet.
func TestQuietConnectionIsParked(t *testing.T) {
	r := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp").rehearse(t, 1)
	for range 3 {
		r.client.say(100)
		r.client.flush()
		r.goRound()
		r.backend.hear(t, 100, r.client)
		if r.c.parked {
			t.Fatal("it is parked while bytes move")
		}
		r.started = r.started.Add(-parkAfter - 2<<tickShift) // time passes
		r.goRound()
		if !r.c.parked {
			t.Fatalf("it is not parked after %v of silence", parkAfter)
		}
	}
	r.end(t)
}

// TestAcceptRestsWhenTheKernelIsShortOfMemory: it tries again later and less and less often, and loses nobody.
func TestAcceptRestsWhenTheKernelIsShortOfMemory(t *testing.T) {
	for _, e := range []unix.Errno{unix.ENOBUFS, unix.ENOMEM, unix.EMFILE, unix.ENFILE} {
		t.Run(e.Error(), func(t *testing.T) {
			free, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := free.Addr().String()
			_ = free.Close()
			g := configured(t, "MAP="+addr+" -> redirect", "LOOPS=1")
			const failures = 6 // 5, 10, 20, 40, 80, 160 ms of rest
			var calls atomic.Int32
			g.loops[0].accept4 = func(fd int32) (int32, netip.AddrPort, unix.Errno) {
				if calls.Add(1) <= failures {
					return -1, netip.AddrPort{}, e
				}
				return sysAccept(fd)
			}
			if err := g.Start(); err != nil {
				t.Fatal(err)
			}
			defer g.Drain(t.Context())
			began := time.Now()
			for range 3 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				_ = c.SetDeadline(time.Now().Add(time.Minute))
				_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
				answer, err := io.ReadAll(c)
				if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 308 ")) {
					t.Errorf("%q, %v", answer, err)
				}
				_ = c.Close()
			}
			if took := time.Since(began); took < 300*time.Millisecond {
				t.Errorf("it did not rest: %v for %d failures", took, failures)
			}
			if n := calls.Load(); n > failures+3+2 {
				t.Errorf("accept was called %d times for %d failures and 3 connections", n, failures)
			}
			if n := g.Status().AcceptPauses; n != failures {
				t.Errorf("%d rests were counted, want %d", n, failures)
			}
		})
	}
}

// TestTimersAreOnTime: against a list of deadlines that is looked through. Nothing is due early, nothing more than two
// ticks late, whatever was moved or cleared meanwhile, and a loop that sleeps until next misses nothing.
func TestTimersAreOnTime(t *testing.T) {
	const tick = int64(1) << tickShift
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for round := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, round))
		var w wheel
		now := rng.Int64N(1 << 50)
		w.done = now >> tickShift
		conns := make([]*conn, 1+rng.IntN(60))
		for i := range conns {
			conns[i] = &conn{}
		}
		pending := map[*conn]int64{}
		set := func(c *conn) {
			deadline := now + rng.Int64N(1<<(20+rng.IntN(18))) // up to 137 s: four times round
			w.set(c, deadline)
			pending[c] = deadline
		}
		for range 300 {
			for range rng.IntN(8) {
				c := conns[rng.IntN(len(conns))]
				if rng.IntN(4) == 0 {
					w.clear(c)
					delete(pending, c)
				} else {
					set(c)
				}
			}
			now = later(rng, &w, now)
			for c := w.take(now); c != nil; c = w.take(now) {
				deadline, ok := pending[c]
				if !ok || deadline > now {
					t.Errorf("round %d: due at %d, its deadline is %d (set: %v)", round, now, deadline, ok)
				}
				delete(pending, c)
				if rng.IntN(2) == 0 {
					set(c)
				}
				if rng.IntN(4) == 0 { // the end of one may be that of another
					other := conns[rng.IntN(len(conns))]
					w.clear(other)
					delete(pending, other)
				}
			}
			first := int64(0)
			for _, deadline := range pending {
				if first == 0 || deadline < first {
					first = deadline
				}
			}
			if first != 0 && first <= now-2*tick {
				t.Fatalf("round %d: %d ns late", round, now-first)
			}
			if next := w.next(); first != 0 && (next == 0 || next > max(first, now)+2*tick) || next != 0 && next <= now-tick {
				t.Fatalf("round %d at %d: it would sleep until %d, the first deadline is %d", round, now, next, first)
			}
			if t.Failed() {
				return
			}
		}
	}
}

// later is when the loop looks at its wheel again: when it's told to, or earlier because of something else, or far too
// late.
func later(rng *rand.Rand, w *wheel, now int64) int64 {
	const tick = int64(1) << tickShift
	switch rng.IntN(8) {
	case 0:
		return now
	case 1, 2:
		return now + rng.Int64N(3*tick)
	case 3:
		return now + rng.Int64N(600*tick)
	}
	return max(now, w.next())
}

// TestTurnsAreExactAndMixed: over a round each backend has its weight, and at no point of it is one far from its share.
func TestTurnsAreExactAndMixed(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		weights := make([]int, 1+rng.IntN(8))
		total, factor := 0, 1+rng.IntN(3)
		for i := range weights {
			weights[i] = factor * (1 + rng.IntN(12))
			total += weights[i]
		}
		turns := mixTurns(weights)
		counts := make([]int, len(weights))
		for n, i := range turns {
			counts[i]++
			for j, w := range weights {
				if off := counts[j] - (n+1)*w/total; off > len(weights)/2+1 || off < -len(weights)/2-1 {
					t.Fatalf("%v: backend %d had %d of the first %d turns, in %v", weights, j, counts[j], n+1, turns)
				}
			}
		}
		divisor := 0
		for _, w := range weights {
			divisor = gcd(divisor, w)
		}
		for i, w := range weights {
			if counts[i] != w/divisor {
				t.Errorf("%v: backend %d has %d turns in %v", weights, i, counts[i], turns)
			}
		}
	}
}

// TestSmallRecordsTakeTurns: a client whose records are small, and for which more is read at a time since they were large
// before, has no longer turns than others. What its turn leaves over is opened in the next.
func TestSmallRecordsTakeTurns(t *testing.T) {
	r := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp").rehearse(t, 1)
	_ = unix.SetsockoptInt(r.client.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<20)
	_ = unix.SetsockoptInt(int(r.c.backend.fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<20)
	const records = 8000
	for range records {
		r.client.say(1)
	}
	r.c.up.batch = maxBatch - 1 // it has streamed
	r.client.flush()
	if len(r.client.sealed) > 0 {
		t.Fatalf("%d bytes did not fit into the socket", len(r.client.sealed))
	}
	turns := 0
	r.c.client.readable = true
	for before := int64(-1); r.c.up.moved != before; turns++ {
		before = r.c.up.moved
		r.tick()
		r.c.advance()
		if n := r.c.up.moved - before; before >= 0 && n > turnRecords {
			t.Fatalf("a turn has opened %d records", n)
		}
		if r.c.up.moved < records && len(r.later) != 1 {
			t.Fatalf("after %d records nobody will go on with the rest", r.c.up.moved)
		}
	}
	if r.c.up.moved != records || turns < records/turnRecords {
		t.Errorf("%d of %d records were opened in %d turns", r.c.up.moved, records, turns)
	}
	if n := cap(r.c.up.carry); n != 0 {
		t.Errorf("%d bytes are still lent", n)
	}
	r.backend.hear(t, records, r.client)
	r.end(t)
}
