// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/natmap"
)

// FuzzProxyHeader: what stands at the start of a connection is judged the same however it is cut into segments, and as
// the codec judges it; nothing behind the header is touched.
func FuzzProxyHeader(f *testing.F) {
	s := newStill(f, ":443 edge.test -> reject")
	f.Fuzz(func(t *testing.T, b, cuts []byte) {
		if len(b) > 64<<10 {
			return // more than a socket takes at once
		}
		agreesWithCodec(t, b)
		whole := s.verdict(t, [][]byte{b}, false)
		if together := s.verdict(t, [][]byte{b}, true); together != whole {
			t.Errorf("with the FIN at once: %s\notherwise:            %s", together, whole)
		}
		if pieces := s.verdict(t, pieces(b, cuts), false); pieces != whole {
			t.Errorf("in pieces: %s\nwhole:     %s", pieces, whole)
		}
	})
}

// pieces cuts b as cuts says.
func pieces(b, cuts []byte) (all [][]byte) {
	for i := 0; i < len(cuts) && len(b) > 0; i++ {
		n := min(1+int(cuts[i]), len(b))
		all = append(all, b[:n])
		b = b[n:]
	}
	return append(all, b)
}

// verdict is what becomes of a connection from a trusted address that sends these pieces and ends.
func (s *still) verdict(t *testing.T, pieces [][]byte, finAtOnce bool) string {
	t.Helper()
	c, client := s.accept(t)
	c.stage = readingProxy
	for i, piece := range pieces {
		if n, err := unix.Write(client, piece); n != len(piece) && c.stage < lingering {
			t.Fatalf("%d of %d bytes: %v", n, len(piece), err)
		}
		if finAtOnce && i == len(pieces)-1 {
			break
		}
		c.ready(&c.client, unix.EPOLLIN)
		if c.client.readable && c.stage <= readingHello {
			t.Fatalf("after %d of %d pieces bytes are left unread, and nobody will come back for them", i+1, len(pieces))
		}
	}
	_ = unix.Shutdown(client, unix.SHUT_WR)
	c.ready(&c.client, unix.EPOLLIN|unix.EPOLLRDHUP)
	if c.stage != over {
		t.Fatalf("the client has left, and the connection is at %s", c.stage)
	}
	answer := available(client)
	_ = unix.Close(client)
	r := &c.report
	if r.outcome == BadHello && r.stage == readingHello {
		answer, r.err = nil, "" // one letter is enough for an answer in plain HTTP, more of them may speak against it
	}
	return fmt.Sprintf("%s at %s: %s; from %s to %s, local %v, probe %v, name %q; answer %q",
		r.outcome, r.stage, r.err, r.source, r.target, r.local, r.probe, r.sni, answer)
}

// agreesWithCodec holds proxyHeaderLen, which judges bytes as they arrive, against go-proxyproto, which has all.
func agreesWithCodec(t *testing.T, b []byte) {
	t.Helper()
	n, err := proxyHeaderLen(b)
	under := bytes.NewReader(b)
	reader := bufio.NewReaderSize(under, len(b)+16)
	h, codecErr := proxyproto.Read(reader)
	used := len(b) - reader.Buffered() - under.Len()
	switch {
	case codecErr == nil && h.Command.IsProxy() && h.TransportProtocol.IsDatagram(): // what came by TCP is none
		if err == nil && n > 0 {
			t.Errorf("a header for datagrams is one of %d bytes", n)
		}
	case codecErr == nil && (err != nil || n != used):
		t.Errorf("the codec reads a header of %d bytes, we say %d, %v", used, n, err)
	case n > 0 && n <= len(b):
		again, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(b[:n]), n))
		if (err == nil) != (codecErr == nil) || err == nil && !again.EqualsTo(h) {
			t.Errorf("of the header alone: %v, %v; with what follows: %v, %v", again, err, h, codecErr)
		}
	}
	for k := range min(len(b), 120) {
		switch m, early := proxyHeaderLen(b[:k]); {
		case early != nil && err == nil:
			t.Errorf("%d of %d bytes are refused (%v), and all of them are not", k, len(b), early)
		case early == nil && m > 0 && m != n:
			t.Errorf("after %d bytes the header has %d, in the end %d", k, m, n)
		}
	}
}

// FuzzProxyHeaderOut: what a backend is told is read back the same.
func FuzzProxyHeaderOut(f *testing.F) {
	f.Fuzz(func(t *testing.T, src, dst []byte, ports uint32, name, alpn string, version uint16) {
		from, ok := netip.AddrFromSlice(src)
		to, ok2 := netip.AddrFromSlice(dst)
		if !ok || !ok2 || len(name) > 255 || len(alpn) > 255 { // what a ClientHello can say
			return
		}
		r := report{id: uint64(ports) << 20, version: version, sni: name, negotiated: alpn,
			source: netip.AddrPortFrom(from.Unmap(), uint16(ports>>16)), target: netip.AddrPortFrom(to.Unmap(), uint16(ports))}
		for _, v := range []natmap.ProxyVersion{natmap.ProxyV1, natmap.ProxyV2} {
			c := &conn{route: &route{proxy: v}, dial: &dialling{backend: &backend{}}, report: r}
			isReadBack(t, wholePreface(t, c), &r, v)
		}
	})
}

func wholePreface(t *testing.T, c *conn) []byte {
	t.Helper()
	p, err := c.preface()
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.after(0)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func isReadBack(t *testing.T, b []byte, r *report, version natmap.ProxyVersion) {
	t.Helper()
	if n, err := proxyHeaderLen(b); n != len(b) || err != nil {
		t.Fatalf("%q has %d bytes, we say %d, %v", b, len(b), n, err)
	}
	h, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(b), len(b)))
	if err != nil {
		t.Fatalf("%q: %v", b, err)
	}
	src, dst, ok := h.TCPAddrs()
	if !ok || !sameAddr(src, r.source) || !sameAddr(dst, r.target) {
		t.Errorf("from %v to %v, want from %v to %v", h.SourceAddr, h.DestinationAddr, r.source, r.target)
	}
	if version != natmap.ProxyV2 {
		return
	}
	tlvs, err := h.TLVs()
	if err != nil {
		t.Fatal(err)
	}
	got := map[proxyproto.PP2Type]string{}
	for _, tlv := range tlvs {
		got[tlv.Type] = string(tlv.Value)
	}
	if got[proxyproto.PP2_TYPE_AUTHORITY] != r.sni || got[proxyproto.PP2_TYPE_ALPN] != r.negotiated || got[proxyproto.PP2_TYPE_UNIQUE_ID] != r.idText() {
		t.Errorf("TLVs %q, want name %q, ALPN %q, id %s", got, r.sni, r.negotiated, r.idText())
	}
	if _, ok := got[proxyproto.PP2_TYPE_SSL]; ok != (r.version != 0) {
		t.Errorf("TLVs %q, TLS version %#x", got, r.version)
	}
	sum := got[proxyproto.PP2_TYPE_CRC32C]
	zeroed := bytes.Replace(b, []byte("\x03\x00\x04"+sum), []byte("\x03\x00\x04\x00\x00\x00\x00"), 1)
	if want := crc32.Checksum(zeroed, crc32.MakeTable(crc32.Castagnoli)); len(sum) != 4 || binary.BigEndian.Uint32([]byte(sum)) != want {
		t.Errorf("checksum %x, want %08x", sum, want)
	}
}

// sameAddr: IPv4 may have become IPv6, when the other address was.
func sameAddr(a *net.TCPAddr, want netip.AddrPort) bool {
	got := a.AddrPort()
	return got.Port() == want.Port() && got.Addr().Unmap() == want.Addr().Unmap().WithZone("")
}

// FuzzRelay: whatever the two ends do and in whatever order, each gets exactly what the other has sent, nobody is left
// waiting for an edge that was missed, and the connection is over when both have ended.
func FuzzRelay(f *testing.F) {
	s := newStill(f, ":1 -> 127.0.0.1:2 mode=tcp")
	f.Fuzz(func(t *testing.T, kind byte, acts []byte) {
		if len(acts) > 300 {
			return
		}
		r := s.rehearse(t, kind)
		for len(acts) >= 2 {
			r.act(t, acts[0], 1<<(acts[1]%18)+int(acts[1])/18)
			acts = acts[2:]
		}
		r.end(t)
	})
}

// rehearsal is a connection between two parties that do what the fuzzer says.
type rehearsal struct {
	*still
	c               *conn
	client, backend *party
}

// party is one of them.
type party struct {
	fd           int
	tls          *session // nil: it speaks as it is
	sealed       []byte   // what the socket has not taken yet
	raw          []byte   // what it has read and not opened
	sent, got    int
	dataSince    bool // data was sent since the last KeyUpdate
	ending, over bool
	salt         byte // tells the two directions apart
}

// kinds are what the client speaks: nothing, TLS 1.3, TLS 1.2 with and without a nonce in its records.
var kinds = []uint16{0, tls.TLS_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256}

func (s *still) rehearse(t *testing.T, kind byte) *rehearsal {
	c, client := s.accept(t)
	ours, far := pair(t)
	small := 2048 << (kind >> 4 & 7)
	for _, fd := range []int{client, far, int(ours), int(c.client.fd)} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, small)
	}
	r := &rehearsal{s, c, &party{fd: client, salt: 17}, &party{fd: far, salt: 99}}
	c.enter(s.listener.rules.plain)
	c.backend = socket{owner: c, fd: ours, writable: true}
	c.dial = &dialling{backend: &backend{}}
	if err := s.loop.watch(&c.backend); err != nil {
		t.Fatal(err)
	}
	if suite := kinds[int(kind)%len(kinds)]; suite != 0 {
		up, down := keysFor(t, suite)
		c.client.tls, r.client.tls = &session{}, &session{}
		c.client.tls.reader.Init(up, 0, record.Server)
		c.client.tls.writer.Init(down, 0)
		r.client.tls.reader.Init(down, 0, record.Client)
		r.client.tls.writer.Init(up, 0)
	}
	c.stage = c.greet()
	return r
}

func keysFor(t *testing.T, suite uint16) (up, down record.Keys) {
	var err error
	if suite>>8 != 0x13 {
		up, down, err = record.KeyBlock(suite, make([]byte, 48), make([]byte, 32), make([]byte, 32))
	} else {
		size := 32
		if suite == tls.TLS_AES_256_GCM_SHA384 {
			size = 48
		}
		if up, err = record.TrafficKeys(suite, bytes.Repeat([]byte{1}, size)); err == nil {
			down, err = record.TrafficKeys(suite, bytes.Repeat([]byte{2}, size))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return up, down
}

// act is one act of one party; then the loop goes round.
func (r *rehearsal) act(t *testing.T, what byte, n int) {
	who, other := r.client, r.backend
	if what&1 != 0 {
		who, other = other, who
	}
	switch what >> 1 % 8 {
	case 0, 1, 2:
		who.say(n)
	case 3, 4, 5:
		who.hear(t, n, other)
	case 6:
		who.updateKeys(n%2 == 0)
	case 7:
		who.end()
	}
	who.flush()
	r.goRound()
}

// goRound is what loop.run does, for as long as there is news.
func (s *still) goRound() {
	for more := true; more; {
		s.loop.tick()
		more = s.loop.poll.look() || len(s.loop.later) > 0
		for i := range s.loop.poll.n {
			s.loop.dispatch(&s.loop.poll.events[i])
		}
		s.loop.looks.sure = s.loop.now
		s.loop.fireTimers()
		s.loop.serveLater()
	}
}

// at is the byte at a place of what a party says.
func (p *party) at(i int) byte { return byte(i) ^ byte(i>>8) ^ byte(i>>16)*3 ^ p.salt }

func (p *party) say(n int) {
	if p.ending {
		return
	}
	if p.tls != nil {
		n = min(n, record.MaxPlaintext)
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = p.at(p.sent + i)
	}
	if p.tls == nil {
		if m, err := unix.Write(p.fd, b); err == nil {
			p.sent += m
		}
		return
	}
	w := &p.tls.writer
	slot := make([]byte, w.Prefix()+n+w.Suffix())
	copy(slot[w.Prefix():], b)
	p.sealed = append(p.sealed, slot[:w.Seal(slot, n)]...)
	p.sent += n
	p.dataSince = true
}

// updateKeys is a KeyUpdate; too many of them without data between would be a violation.
func (p *party) updateKeys(request bool) {
	if p.tls != nil && !p.ending && p.dataSince {
		p.sealed = p.tls.writer.AppendKeyUpdate(p.sealed, request)
		p.dataSince = false
	}
}

func (p *party) end() {
	if !p.ending && p.tls != nil {
		p.sealed = p.tls.writer.AppendAlert(p.sealed, record.AlertCloseNotify)
	}
	p.ending = true
}

// flush writes what was sealed, and the FIN behind it.
func (p *party) flush() {
	if m, err := unix.Write(p.fd, p.sealed); err == nil {
		p.sealed = p.sealed[m:]
	}
	if p.ending && len(p.sealed) == 0 {
		_ = unix.Shutdown(p.fd, unix.SHUT_WR)
	}
}

// hear reads up to n bytes and holds them against what the other has said.
func (p *party) hear(t *testing.T, n int, other *party) {
	t.Helper()
	b := make([]byte, n)
	m, err := unix.Read(p.fd, b)
	if err != nil {
		return
	}
	if p.tls == nil {
		p.compare(t, b[:m], other)
		p.over = m == 0
		return
	}
	p.raw = append(p.raw, b[:m]...)
	for !p.over {
		rec, used, err := p.tls.reader.Next(p.raw)
		if err != nil {
			t.Fatalf("the client can't read on after %d bytes: %v", p.got, err)
		}
		if used == 0 {
			break
		}
		p.compare(t, rec.Data, other)
		p.raw = p.raw[used:]
		p.over = rec.Kind == record.CloseNotify
	}
	if m == 0 && !p.over {
		t.Fatalf("the stream ended after %d bytes without close_notify", p.got)
	}
}

func (p *party) compare(t *testing.T, b []byte, other *party) {
	t.Helper()
	for i, x := range b {
		if x != other.at(p.got+i) {
			t.Fatalf("byte %d of %d is wrong", p.got+i, other.sent)
		}
	}
	p.got += len(b)
}

// end lets both end, and everything arrive.
func (r *rehearsal) end(t *testing.T) {
	for idle := 0; !r.client.over || !r.backend.over || r.c.stage != over; idle++ {
		for _, p := range []*party{r.client, r.backend} {
			other := r.client
			if p == other {
				other = r.backend
			}
			before := p.got
			p.end()
			p.flush()
			r.goRound()
			if !p.over {
				p.hear(t, 64<<10, other)
			}
			if p.got != before {
				idle = 0
			}
			r.goRound()
		}
		if idle > 20 {
			t.Fatalf("it's stuck at %s: up %d of %d bytes (over: %v), down %d of %d (over: %v)", r.c.stage,
				r.backend.got, r.client.sent, r.backend.over, r.client.got, r.backend.sent, r.client.over)
		}
	}
	if c := r.c; r.client.got != r.backend.sent || r.backend.got != r.client.sent || c.report.outcome != OK ||
		c.report.up != int64(r.client.sent) || c.report.down != int64(r.backend.sent) {
		t.Errorf("%s (%s): up %d of %d bytes, down %d of %d", c.report.outcome, c.report.err, r.backend.got, r.client.sent, r.client.got, r.backend.sent)
	}
	_, _ = unix.Close(r.client.fd), unix.Close(r.backend.fd)
}

func TestEveryFuzzTargetHasSeeds(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var source []byte
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		source = append(source, text...)
	}
	targets := 0
	for line := range strings.Lines(string(source)) {
		name, ok := strings.CutPrefix(line, "func Fuzz")
		if !ok {
			continue
		}
		targets++
		name, _, _ = strings.Cut(name, "(")
		seeds, err := os.ReadDir(filepath.Join("testdata", "fuzz", "Fuzz"+name))
		if err != nil || len(seeds) == 0 {
			t.Errorf("no seeds for Fuzz%s: %v", name, err)
		}
	}
	if targets == 0 {
		t.Error("no fuzz targets found")
	}
}
