// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/ktls"
)

// needKernelTLS skips the test where the kernel has no TLS, and fails it where it has to have it: in the VM.
func needKernelTLS(t *testing.T) *ktls.Support {
	t.Helper()
	k := ktls.Probe()
	if k.Absent != nil && os.Getenv("KTLS_REQUIRED") != "" {
		t.Fatal(k)
	}
	if k.Absent != nil {
		t.Skip(k)
	}
	return k
}

// kernelPath is what the log says of a connection both of whose directions streamed.
func kernelPath(k *ktls.Support, version uint16) string {
	if version == tls.VersionTLS13 && !k.Rekey {
		return "ktls+user"
	}
	return "ktls"
}

// TestKTLSCarriesBulkBothWays with every version and cipher that a Go client can ask for: 16 or 64 MiB each way at once, and
// the kernel counts the sockets.
func TestKTLSCarriesBulkBothWays(t *testing.T) {
	k := needKernelTLS(t)
	b := start(t, ":{0} edge.test -> "+serve(t, talkBack))
	for _, s := range []suite{{"1.2", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "", ""}, {"1.2", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "", ""},
		{"1.2", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "", ""}, {"1.3", "TLS_AES_128_GCM_SHA256", "", ""}} {
		t.Run(s.name, func(t *testing.T) {
			before, was := ktls.Stat(), b.gateway.Status()
			c := b.dialTLS(t, 0, goSuite(s))
			version := c.ConnectionState().Version
			_ = c.SetDeadline(time.Time{})
			if err := pour(c, 1, 2); err != nil {
				t.Error(err)
			}
			_ = c.Close()
			l := b.lineOf(t, c.NetConn())
			if l.Outcome != "ok" || l.Path != kernelPath(k, version) || l.BytesUp != int64(bulkSize) || l.BytesDown != int64(bulkSize) {
				t.Errorf("line: %s", l)
			}
			after, now := ktls.Stat(), b.gateway.Status()
			if after["TlsTxSw"] == before["TlsTxSw"] || after["TlsDecryptError"] != before["TlsDecryptError"] {
				t.Errorf("the kernel counted %v, and before %v", after, before)
			}
			if l.Path == "ktls" && now.Bytes.Spliced-was.Bytes.Spliced < uint64(2*bulkSize*8/10) {
				t.Errorf("%d of %d bytes were spliced", now.Bytes.Spliced-was.Bytes.Spliced, 2*bulkSize)
			}
		})
	}
}

// bulkSize is 16 MiB, or 64 MiB where time allows: an emulated machine takes 10 s for those.
var bulkSize = map[bool]int{false: 16 << 20, true: 64 << 20}[os.Getenv("KTLS_FULL") != ""]

// stream is bulkSize bytes that look random, made as they are read.
func stream(seed byte) io.Reader { return &bulk{block: random(uint64(seed), 1<<20+1), left: bulkSize} }

type bulk struct {
	block    []byte
	at, left int
}

func (b *bulk) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.block[b.at:])
	n = min(n, b.left)
	b.at, b.left = (b.at+n)%len(b.block), b.left-n
	return n, nil
}

// talkBack is the backend's part of pour.
func talkBack(c *net.TCPConn) {
	if pour(c, 2, 1) == nil {
		_ = c.CloseWrite()
	}
}

// pour sends one stream, ends it, and reads the other, which has to arrive whole.
func pour(c interface {
	net.Conn
	CloseWrite() error
}, send, expect byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{c}, stream(send), make([]byte, 128<<10))
		sent <- errors.Join(err, c.CloseWrite())
	}()
	n, err := io.CopyBuffer(&comparer{want: stream(expect)}, struct{ io.Reader }{c}, make([]byte, 128<<10))
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if n != int64(bulkSize) {
		return fmt.Errorf("%d of %d bytes arrived", n, bulkSize)
	}
	return nil
}

// comparer takes what want brings, and nothing else.
type comparer struct {
	want io.Reader
	at   int
}

func (c *comparer) Write(p []byte) (int, error) {
	b := make([]byte, len(p))
	n, _ := io.ReadFull(c.want, b)
	if !bytes.Equal(b[:n], p) {
		return 0, fmt.Errorf("other bytes than were sent, from %d on", c.at)
	}
	c.at += n
	return n, nil
}

// TestKTLSShortExchangesStayInUserSpace: the kernel is for streams.
func TestKTLSShortExchangesStayInUserSpace(t *testing.T) {
	b := start(t, ":{0} edge.test -> "+echoServer(t))
	c := b.dialTLS(t, 0, nil)
	for range 10 {
		exchange(t, c, random(1, 50<<10))
	}
	_ = c.Close()
	l := b.lineOf(t, c.NetConn())
	s := b.gateway.Status().Kernel
	if l.Path != "user" || s.TX+s.RX != 0 {
		t.Errorf("%+v, line: %s", s, l)
	}
	for reason, n := range s.Fallbacks {
		if n != 0 {
			t.Errorf("%s was counted", reason)
		}
	}
}

// TestKTLSOffIsOff: by the setting or by the rule, nothing is tried, counted or said.
func TestKTLSOffIsOff(t *testing.T) {
	for name, c := range map[string]struct{ option, setting string }{"setting": {"", "KTLS=off"}, "rule": {" ktls=off", "KTLS=auto"}} {
		t.Run(name, func(t *testing.T) {
			b := start(t, ":{0} edge.test -> "+echoServer(t)+c.option, c.setting)
			conn := b.dialTLS(t, 0, nil)
			exchange(t, conn, random(1, 4<<20))
			_ = conn.Close()
			l := b.lineOf(t, conn.NetConn())
			s := b.gateway.Status().Kernel
			for _, n := range s.Fallbacks {
				s.TX += n
			}
			if l.Path != "user" || s.TX+s.RX != 0 {
				t.Errorf("%+v, line: %s", s, l)
			}
			if n := b.said("kernel TLS"); name == "setting" && n != 0 {
				t.Errorf("the log speaks of it %d times", n)
			}
		})
	}
}

// TestKTLSReceivesOnlyIfMendedOrTold: a kernel that has faults in its parser sees no record of a stranger's, unless the
// setting or the rule says so. Where it may not, it still seals.
func TestKTLSReceivesOnlyIfMendedOrTold(t *testing.T) {
	k := needKernelTLS(t)
	for _, c := range []struct {
		option, setting string
		told            bool
	}{{"", "KTLS=auto", false}, {" ktls=auto", "KTLS=auto", false}, {" ktls=rx", "KTLS=auto", true}, {"", "KTLS=rx", true}, {" ktls=rx", "KTLS=off", false}} {
		t.Run(c.setting+c.option, func(t *testing.T) {
			b := start(t, ":{0} edge.test -> "+echoServer(t)+c.option, c.setting)
			conn := b.dialTLS(t, 0, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
			exchange(t, conn, random(1, 8<<20))
			_ = conn.Close()
			l, s := b.lineOf(t, conn.NetConn()), b.gateway.Status().Kernel
			want := gateway.KernelCounts{TX: 1, RX: 1}
			switch {
			case c.setting == "KTLS=off":
				want.TX, want.RX = 0, 0
			case !c.told && !k.Mended:
				want.RX = 0
			}
			kept := s.Fallbacks["old_kernel"]
			if s.TX != want.TX || s.RX != want.RX || kept != want.TX-want.RX {
				t.Errorf("%d halves were sealed and %d opened in the kernel, and %d kept from it, line: %s", s.TX, s.RX, kept, l)
			}
		})
	}
}

// said is how many lines have this message.
func (b *bed) said(msg string) (n int) {
	for _, l := range b.log.all() {
		if l.Msg == msg {
			n++
		}
	}
	return n
}

// TestKTLSAbsentIsOneLine: a kernel that has none is told of once, counted for each stream, and everything works.
func TestKTLSAbsentIsOneLine(t *testing.T) {
	if ktls.Probe().Absent == nil {
		t.Skip("this kernel has TLS")
	}
	b := start(t, ":{0} edge.test -> "+serve(t, talkBack))
	c := b.dialTLS(t, 0, nil)
	if err := pour(c, 1, 2); err != nil {
		t.Error(err)
	}
	_ = c.Close()
	if l := b.lineOf(t, c.NetConn()); l.Path != "user" || l.Outcome != "ok" {
		t.Errorf("line: %s", l)
	}
	if n := b.said("kernel TLS"); n != 1 {
		t.Errorf("the log speaks of it %d times", n)
	}
	if n := b.gateway.Status().Kernel.Fallbacks["no_module"]; n != 2 {
		t.Errorf("%d halves are counted, and both streamed", n)
	}
}

// intoKernel has a connection stream both ways until its halves are where they go.
func (b *bed) intoKernel(t *testing.T, c net.Conn) {
	t.Helper()
	exchange(t, c, random(1, 8<<20))
	if b.gateway.Status().Kernel.TX == 0 {
		t.Fatal("it streamed, and is not in the kernel")
	}
}

// TestKTLSHoldsNothingBack: once a connection has streamed, a single byte goes through at once, both ways.
func TestKTLSHoldsNothingBack(t *testing.T) {
	needKernelTLS(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		b := start(t, ":{0} edge.test -> "+echoServer(t))
		c := b.dialTLS(t, 0, func(c *tls.Config) { c.MaxVersion = version })
		b.intoKernel(t, c)
		began := time.Now()
		const messages = 200
		for i := range messages {
			exchange(t, c, random(uint64(i), 1+i%3))
		}
		// A timer of the kernel's would make each take 40 ms and more.
		if each := time.Since(began) / messages; each > 20*time.Millisecond {
			t.Errorf("%s: a byte takes %v there and back", tls.VersionName(version), each)
		}
		_ = c.Close()
		if l := b.lineOf(t, c.NetConn()); l.Outcome != "ok" || !strings.HasPrefix(l.Path, "ktls") {
			t.Errorf("line: %s", l)
		}
	}
}

// TestKTLSFollowsKeyUpdates: a client that changes its keys is read on. One that wants ours changed too gets what it
// wants from a kernel that can, and otherwise, instead of the next data, the end, said in words.
func TestKTLSFollowsKeyUpdates(t *testing.T) {
	k := needKernelTLS(t)
	w := newWitness(t)
	b := start(t, ":{0} edge.test -> "+w.addr)
	p := dialPenman(t, b, 0, nil)
	backend := w.next(t)
	const size = 8 << 20
	sent := make(chan error, 1)
	go func() {
		_, err := backend.conn.Write(random(1, size))
		sent <- err
	}()
	p.read(t, size)
	if err := <-sent; err != nil || b.gateway.Status().Kernel.TX == 0 {
		t.Fatalf("it streamed, and is not in the kernel (%v)", err)
	}
	for range 3 {
		p.write(t, p.update(false))
		p.write(t, p.data([]byte("after")))
	}
	backend.wait(t, 3*len("after"))
	p.write(t, append(p.update(true), p.data([]byte("asked"))...))
	backend.wait(t, len("asked")+3*len("after"))
	if _, err := backend.conn.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if k.Rekey {
		p.read(t, size+len("answer"))
		if p.updates != 1 {
			t.Errorf("the keys were changed %d times", p.updates)
		}
		return
	}
	_, alert, err := p.readAll()
	backend.end(t)
	l := b.lineOf(t, p)
	if alert != "internal_error" || err != io.EOF || !errors.Is(backend.err, unix.ECONNRESET) {
		t.Errorf("the client saw %q and %v, the backend %v", alert, err, backend.err)
	}
	if l.Outcome != "rekey_failed" || l.Alert != "internal_error" || !strings.Contains(l.Error, "ktls=off") || l.Path != "ktls+user" {
		t.Errorf("line: %s", l)
	}
}

// TestKTLSFloodsEnd: records without data cost their budget and no more, and data in records of a byte each goes through.
// Meanwhile others are served.
func TestKTLSFloodsEnd(t *testing.T) {
	needKernelTLS(t)
	b := start(t, ":{0} edge.test -> "+echoServer(t), "LOOPS=1")
	other := b.dialTLS(t, 0, nil)
	flood := func(payload []byte, n int) *penman {
		p := dialPenman(t, b, 0, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
		const size = 4 << 20
		go func() { // into the kernel first
			for range size >> 14 {
				_, _ = p.TCPConn.Write(p.data(make([]byte, 1<<14)))
			}
		}()
		p.read(t, size)
		var all []byte
		for range n {
			all = append(all, p.data(payload)...)
		}
		go func() { _, _ = p.TCPConn.Write(all) }()
		return p
	}
	p := flood(nil, 10_000)
	_, alert, _ := p.readAll()
	if l := b.lineOf(t, p); l.Outcome != "tls_error" || alert != "unexpected_message" || l.Path != "ktls" {
		t.Errorf("empty records: alert %q, %s", alert, l)
	}
	p = flood([]byte("x"), 10_000)
	p.read(t, 4<<20+10_000)
	_ = p.Close()
	if l := b.lineOf(t, p); l.Path != "ktls" || l.BytesUp != 4<<20+10_000 {
		t.Errorf("records of a byte: %s", l)
	}
	exchange(t, other, []byte("still served"))
}
