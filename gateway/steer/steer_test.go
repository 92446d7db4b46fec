// SPDX-License-Identifier: Apache-2.0

package steer

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// lookup is struct bpf_sk_lookup of linux/bpf.h.
type lookup struct {
	Cookie     uint64 // of the socket that the program has named
	Family     uint32
	Protocol   uint32
	RemoteIP4  [4]byte
	RemoteIP6  [16]byte
	RemotePort [4]byte
	LocalIP4   [4]byte
	LocalIP6   [16]byte
	LocalPort  uint32
	Interface  uint32
	_          uint32
}

func able(t testing.TB) {
	t.Helper()
	if err := Probe(); err != nil {
		testkit.Missing(t, "can't steer here: %s", Reason(err))
	}
}

// listen makes a listening socket, and its cookie (SO_COOKIE).
func listen(t testing.TB) (fd int32, cookie uint64) {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(s) })
	cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err := errors.Join(err, unix.SetsockoptInt(s, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0), unix.Listen(s, 1)); err != nil {
		t.Fatal(err)
	}
	return int32(s), cookie
}

// ask runs the program about a packet to an address and port, as the kernel does.
func ask(t testing.TB, p *ebpf.Program, to netip.AddrPort, protocol uint32) uint64 {
	t.Helper()
	in := lookup{Family: unix.AF_INET6, Protocol: protocol, LocalPort: uint32(to.Port())}
	binary.BigEndian.PutUint16(in.RemotePort[:], 1234)
	if to.Addr().Is4() {
		in.Family, in.LocalIP4 = unix.AF_INET, to.Addr().As4()
	} else {
		in.LocalIP6 = to.Addr().As16()
	}
	var out lookup
	verdict, err := p.Run(&ebpf.RunOptions{Context: in, ContextOut: &out})
	if err != nil {
		t.Fatal(err)
	}
	if verdict != verdictPass {
		t.Errorf("%s: verdict %d", to, verdict)
	}
	return out.Cookie
}

// steered is what the spans say, found one by one.
func steered(spans []Span, to netip.AddrPort) int {
	for _, addr := range []netip.Addr{to.Addr(), {}} {
		for _, s := range spans {
			if s.Addr == addr && s.Lo <= to.Port() && to.Port() <= s.Hi {
				return s.To
			}
		}
	}
	return Own
}

var addrs = []netip.Addr{{}, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::1"),
	netip.MustParseAddr("2001:db8::1:0:0:1"), netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:ffff::1")}

// TestProgramSaysWhatTheSpansSay: about the ends of each span, what is beside them, and ports by chance, on addresses
// that have spans and on others.
func TestProgramSaysWhatTheSpansSay(t *testing.T) {
	able(t)
	fds, cookies := make([]int32, 3), make([]uint64, 3)
	for i := range fds {
		fds[i], cookies[i] = listen(t)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 20 {
		spans, ports := chanceSpans(r, round)
		p, err := load(spans, fds)
		if err != nil {
			t.Fatalf("%v: %+v", spans, err)
		}
		for range 20 {
			ports = append(ports, uint16(r.Uint32()))
		}
		for _, a := range addrs[1:] {
			for _, port := range ports {
				to, want := netip.AddrPortFrom(a, port), uint64(0)
				if n := steered(spans, to); n != Own {
					want = cookies[n]
				}
				if got := ask(t, p, to, unix.IPPROTO_TCP); got != want {
					t.Fatalf("%v: %s goes to socket %d, want %d of %v", spans, to, got, want, cookies)
				}
			}
		}
		if len(spans) > 0 && ask(t, p, netip.AddrPortFrom(addrs[1], spans[0].Lo), unix.IPPROTO_UDP) != 0 {
			t.Error("UDP is steered")
		}
		_ = p.Close()
	}
}

// chanceSpans are some that don't overlap on an address, and the ports at their ends.
func chanceSpans(r *rand.Rand, most int) (spans []Span, ports []uint16) {
	for _, a := range addrs[:5] {
		var cuts []int
		for range 2 * r.IntN(most+1) {
			cuts = append(cuts, r.IntN(1<<16))
		}
		slices.Sort(cuts)
		cuts = slices.Compact(cuts)
		for i := 0; i+1 < len(cuts); i += 2 {
			lo, hi := uint16(cuts[i]), uint16(cuts[i+1])
			if r.IntN(3) == 0 {
				hi = lo
			}
			spans = append(spans, Span{a, lo, hi, r.IntN(4) - 1})
			ports = append(ports, lo-1, lo, lo+1, hi-1, hi, hi+1)
		}
	}
	return spans, ports
}

// TestVeryManySpans: a program for as many as it has room for is taken by the kernel, and more are an error.
func TestVeryManySpans(t *testing.T) {
	able(t)
	fd, cookie := listen(t)
	var spans []Span
	for i := range 9000 {
		spans = append(spans, Span{Lo: uint16(7 * i), Hi: uint16(7*i + 2)})
	}
	p, err := load(spans, []int32{fd})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, port := range []uint16{0, 7, 8, 9, 10, 7 * 8999, 7*8999 + 2, 7*8999 + 3} {
		if got := ask(t, p, netip.AddrPortFrom(addrs[1], port), unix.IPPROTO_TCP); (got == cookie) != (port%7 <= 2) {
			t.Errorf("port %d goes to socket %d", port, got)
		}
	}
	spans = nil
	for i := range 20000 {
		spans = append(spans, Span{Lo: uint16(3 * i), Hi: uint16(3 * i)})
	}
	if _, err := Load(spans, []int32{fd}); err == nil {
		t.Error("20,000 spans were taken")
	}
}

// TestClosedListenerIsSteeredToNoMore: then the kernel looks for itself, and refuses.
func TestClosedListenerIsSteeredToNoMore(t *testing.T) {
	able(t)
	fd, cookie := listen(t)
	p, err := load([]Span{{Lo: 1, Hi: 9}}, []int32{fd})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	to := netip.AddrPortFrom(addrs[1], 5)
	if got := ask(t, p, to, unix.IPPROTO_TCP); got != cookie {
		t.Fatalf("socket %d, want %d", got, cookie)
	}
	if err := unix.Shutdown(int(fd), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, p, to, unix.IPPROTO_TCP); got != 0 {
		t.Errorf("socket %d, which listens no more", got)
	}
}

func TestListeningFindsEverybody(t *testing.T) {
	for _, c := range []struct{ network, addr string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}, {"tcp4", ":0"}, {"tcp6", ":0"}, {"tcp", ":0"}} {
		l, err := net.Listen(c.network, c.addr)
		if err != nil {
			t.Logf("%s %s: %v", c.network, c.addr, err) // no IPv6 here
			continue
		}
		at := l.Addr().(*net.TCPAddr).AddrPort()
		all, err := Listening()
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(s Socket) bool { return s.Port == at.Port() && s.Addr.Unmap() == at.Addr().Unmap() })
		if i < 0 {
			t.Errorf("%s on %s is not among %v", c.network, at, all)
		} else if want := c.network == "tcp6"; all[i].Only != want && all[i].Addr.Is6() {
			t.Errorf("%s on %s: IPv6 only: %v", c.network, at, all[i].Only)
		}
		_ = l.Close()
	}
}

func TestWhoseConnectionsMeet(t *testing.T) {
	every, four, six := netip.Addr{}, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, c := range []struct {
		theirs string
		only   bool
		ours   netip.Addr
		meet   bool
	}{
		{"192.0.2.9", false, every, true},
		{"192.0.2.9", false, four, false},
		{"192.0.2.1", false, four, true},
		{"::ffff:192.0.2.1", false, four, true},
		{"0.0.0.0", false, four, true},
		{"0.0.0.0", false, six, false},
		{"::", false, four, true},
		{"::", true, four, false},
		{"::", true, six, true},
		{"2001:db8::1", false, six, true},
	} {
		if got := (Socket{netip.MustParseAddr(c.theirs), 1, c.only}).Meets(c.ours); got != c.meet {
			t.Errorf("%s (IPv6 only: %v) and %s: %v", c.theirs, c.only, c.ours, got)
		}
	}
}

// BenchmarkProgram is what a new connection of the network namespace pays, by how many spans there are: in the kernel,
// without what leads to the program.
func BenchmarkProgram(b *testing.B) {
	able(b)
	fd, _ := listen(b)
	for _, c := range []struct {
		name  string
		spans int
		port  uint32
	}{{"steered", 1, 1001}, {"left", 1, 9}, {"steered-of-1000", 1000, 30031}} {
		b.Run(c.name, func(b *testing.B) {
			var spans []Span
			for i := range c.spans {
				spans = append(spans, Span{Lo: uint16(1000 + 50*i), Hi: uint16(1000 + 50*i + 40)})
			}
			p, err := load(spans, []int32{fd})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			in := lookup{Family: unix.AF_INET, Protocol: unix.IPPROTO_TCP, LocalIP4: [4]byte{192, 0, 2, 1}, LocalPort: c.port}
			b.ResetTimer()
			if _, err := p.Run(&ebpf.RunOptions{Context: in, Repeat: uint32(b.N)}); err != nil {
				b.Fatal(err)
			}
		})
	}
}
