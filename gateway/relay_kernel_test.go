// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/ktls"
	"github.com/tlsnat/tlsnat/gateway/record"
)

// With KTLS_EAGER every half that may go to the kernel goes there with its first byte, so that tests that know nothing of
// it run over kernel halves: package ktls/vm has them do so.
func init() {
	if os.Getenv("KTLS_EAGER") != "" {
		kernelWorth = 0
	}
}

// EagerToRekey: it does so, and follows KeyUpdates there.
var EagerToRekey = sync.OnceValue(func() bool { return os.Getenv("KTLS_EAGER") != "" && probeKernel().Rekey })

// needKernel skips the test where the kernel has no TLS, and fails it where it has to have it: in the VM.
func needKernel(t *testing.T) *ktls.Support {
	t.Helper()
	k := probeKernel()
	if k.Absent != nil && os.Getenv("KTLS_REQUIRED") != "" {
		t.Fatal(k)
	}
	if k.Absent != nil {
		t.Skip(k)
	}
	return k
}

// spoken is what is spoken on a socket, and who opens and seals it.
type spoken struct {
	tls    bool
	rx, tx carrier
}

var allSpoken = []spoken{{}, {true, stays, stays}, {true, stays, inKernel}, {true, inKernel, stays}, {true, inKernel, inKernel}}

func (s spoken) String() string {
	if !s.tls {
		return "raw"
	}
	names := map[carrier]string{stays: "user", inKernel: "kernel"}
	return names[s.rx] + "/" + names[s.tx]
}

// TestKTLSJoinsAllPairs of reading and writing halves, with both versions and by turns every cipher, both ways at once: what is said
// arrives, in pieces of any size, and each end of a stream is carried over while the other goes on.
func TestKTLSJoinsAllPairs(t *testing.T) {
	k := needKernel(t)
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=tcp")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	suites := []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256,
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256}
	for i, client := range allSpoken {
		for j, backend := range allSpoken {
			t.Run(fmt.Sprintf("%s to %s", client, backend), func(t *testing.T) {
				for n, suite := range suites {
					if os.Getenv("KTLS_FULL") == "" && n%3 != (i+j)%3 {
						continue // one of each version; every cipher has its turn with every half
					}
					rng := rand.New(rand.NewPCG(seed, uint64(100*i+10*j+n)))
					r := s.stage(t, k, suite, client, backend)
					r.converse(t, rng)
					if t.Failed() {
						t.Fatalf("with %s", tls.CipherSuiteName(suite))
					}
				}
			})
		}
	}
}

// stage makes a connection whose halves are as they are wanted.
func (s *still) stage(t *testing.T, k *ktls.Support, suite uint16, client, backend spoken) *rehearsal {
	t.Helper()
	near, far := tcpPair(t)
	ours, theirs := tcpPair(t)
	c := newConn(s.loop, s.listener, near, netip.MustParseAddrPort("192.0.2.7:4711"))
	s.loop.conns[c] = struct{}{}
	plain := s.listener.rules.plain
	c.enter(&route{use: new(usage), rule: plain.rule, idle: plain.idle, linger: plain.linger, kernel: k, kernelRX: true})
	c.backend = socket{owner: c, fd: ours, writable: true}
	c.dial = &dialling{backend: &backend0}
	for _, sock := range []*socket{&c.client, &c.backend} {
		if err := s.loop.watch(sock); err != nil {
			t.Fatal(err)
		}
	}
	r := &rehearsal{s, c, &party{fd: far, salt: 17}, &party{fd: theirs, salt: 99}}
	r.speak(t, suite, client, &c.client, r.client, record.Server)
	r.speak(t, suite, backend, &c.backend, r.backend, record.Client)
	c.stage = c.greet()
	return r
}

var backend0 backend

// speak gives the socket and the party at its other end their keys, and the kernel what it is to carry.
func (r *rehearsal) speak(t *testing.T, suite uint16, as spoken, s *socket, p *party, role record.Role) {
	t.Helper()
	if !as.tls {
		return
	}
	in, out := keysFor(t, suite)
	s.tls, p.tls = &session{}, &session{}
	s.tls.reader.Init(in, 0, role)
	s.tls.writer.Init(out, 0)
	p.tls.reader.Init(out, 0, record.Client+record.Server-role)
	p.tls.writer.Init(in, 0)
	s.tls.rx, s.tls.tx = stays, stays
	if as.tx == inKernel {
		s.tls.tx = inUser
		r.c.transferFrom(s).back().sealInKernel()
	}
	if as.rx == inKernel {
		r.c.transferFrom(s).openInKernel()
	}
	if s.tls.rx != as.rx || s.tls.tx != as.tx {
		t.Fatalf("%s became %s", as, spoken{true, s.tls.rx, s.tls.tx})
	}
}

// converse has both parties say and hear at random, end when they have said enough, and hear to the end.
func (r *rehearsal) converse(t *testing.T, rng *rand.Rand) {
	t.Helper()
	parties := []*party{r.client, r.backend}
	enough := []int{rng.IntN(200 << 10), rng.IntN(200 << 10)}
	deadline := time.Now().Add(30 * time.Second)
	for !r.client.over || !r.backend.over || r.c.stage != over {
		for i, p := range parties {
			if p.sent < enough[i] {
				if len(p.sealed) < 64<<10 {
					p.say(1 + rng.IntN(1<<rng.IntN(16)))
				}
			} else if rng.IntN(4) == 0 {
				p.end()
			}
			p.flush()
			r.goRound()
			if !p.over && rng.IntN(2) == 0 {
				p.hear(t, 1+rng.IntN(64<<10), parties[1-i])
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("it's stuck at %s: up %d of %d bytes (over: %v), down %d of %d (over: %v)", r.c.stage,
				r.backend.got, r.client.sent, r.backend.over, r.client.got, r.backend.sent, r.client.over)
		}
		// The kernel's TLS writes behind our back when there's room again.
		_, _ = unix.Poll([]unix.PollFd{{Fd: r.loop.poll.fd, Events: unix.POLLIN}, {Fd: int32(r.client.fd), Events: unix.POLLIN},
			{Fd: int32(r.backend.fd), Events: unix.POLLIN}}, 1)
	}
	if c := r.c; r.client.got != r.backend.sent || r.backend.got != r.client.sent || c.report.outcome != OK ||
		c.report.up != int64(r.client.sent) || c.report.down != int64(r.backend.sent) {
		t.Errorf("%s (%s): up %d of %d bytes, down %d of %d", c.report.outcome, c.report.err, r.backend.got, r.client.sent, r.client.got, r.backend.sent)
	}
	_, _ = unix.Close(r.client.fd), unix.Close(r.backend.fd)
}

// tcpPair is a connection over loopback of which the loop has one end; the kernel's TLS goes with TCP only.
func tcpPair(t *testing.T) (ours int32, theirs int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	return int32(descriptor(t, accepted)), descriptor(t, dialled)
}

// descriptor is a non-blocking one of the connection's, for ourselves.
func descriptor(t *testing.T, c net.Conn) (fd int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(number uintptr) { fd, err = unix.FcntlInt(number, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	return fd
}
