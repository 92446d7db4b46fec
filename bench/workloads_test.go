// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
)

// BenchmarkHandshake is a connection from SYN to FIN, sixteen clients at once: TCP, a handshake, 256 bytes there and back.
func BenchmarkHandshake(b *testing.B) {
	for _, c := range []struct {
		name   string
		door   door
		resume bool
		change func(*tls.Config)
	}{
		{name: "ecdsa", door: ecdsaDoor},
		{name: "rsa", door: rsaDoor},
		{name: "mlkem", door: ecdsaDoor, change: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768} }},
		{name: "tls12", door: ecdsaDoor, change: speak12},
		{name: "resumed", door: ecdsaDoor, resume: true},
	} {
		inTurns(b, work{name: c.name, door: c.door}, func(b *testing.B, g *gateway) {
			w := g.way(c.door)
			if w.tls != nil && c.change != nil {
				c.change(w.tls)
			}
			if w.tls != nil && c.resume {
				w.tls.ClientSessionCache = new(firstTicket)
			}
			if _, _, err := w.visit(); err != nil {
				if refused, ok := errors.AsType[*net.OpError](err); ok && refused.Op == "remote error" && c.name == "mlkem" {
					b.Skipf("%s has no X25519MLKEM768: %v", g.peer.name, err)
				}
				g.fatal(b, err)
			}
			v, err := w.visitors(c.resume && w.tls != nil, c.change == nil)
			if err != nil {
				g.fatal(b, err)
			}
			sum := g.measure(b, visits(v))
			g.reportPerOp(b, sum)
			sum.reportLatency(b)
		})
	}
}

// speak12 offers P-256 beside X25519: in TLS 1.2 the groups are also those of the certificate's key (RFC 8422 section 5.1).
func speak12(c *tls.Config) {
	c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256}
}

// visit is one whole connection, of whatever kind; it returns how long that took.
type visit func() (time.Duration, error)

// visitors are those who come through this way: plain, or with TLS and all of them resuming or none. Whoever offers what they all do (usual) is served by
// the cheaper client.
func (w way) visitors(resume, usual bool) (visit, error) {
	call := w.visit
	if w.tls != nil && usual {
		v, err := w.visitor()
		if err == nil && resume {
			err = v.keepTicket()
		}
		if err != nil {
			return nil, err
		}
		call = v.visit
	}
	return func() (time.Duration, error) {
		resumed, took, err := call()
		if err == nil && resumed != resume {
			err = fmt.Errorf("session resumed: %v, should be %v", resumed, resume)
		}
		return took, err
	}, nil
}

// visits is a round of new connections by 16 clients at once.
func visits(v visit) round {
	times := 16
	if short {
		times = 2
	}
	took := make([]time.Duration, 16*times)
	return func(sum *bill) error {
		err := together(16, func(client int) error {
			for i := client * times; i < (client+1)*times; i++ {
				var err error
				if took[i], err = v(); err != nil {
					return err
				}
			}
			return nil
		})
		sum.add(took)
		return err
	}
}

// BenchmarkEcho is a message there and back on 64 open connections, each sending as soon as it has its answer.
func BenchmarkEcho(b *testing.B) {
	for _, size := range []struct {
		name  string
		bytes int
	}{{"256B", 256}, {"4KiB", 4096}} {
		inTurns(b, work{name: size.name, door: ecdsaDoor}, func(b *testing.B, g *gateway) {
			benchEcho(b, g, ecdsaDoor, 0, 64, size.bytes)
		})
	}
}

// BenchmarkCrowd is the same echo with more connections around: 64 busy ones among 2,000 idle ones, and 4,000 that are all busy.
func BenchmarkCrowd(b *testing.B) {
	inTurns(b, work{name: "64of2064", door: ecdsaDoor}, func(b *testing.B, g *gateway) {
		benchEcho(b, g, ecdsaDoor, here.crowd(2000), 64, 256)
	})
	inTurns(b, work{name: "4000", door: ecdsaDoor}, func(b *testing.B, g *gateway) {
		benchEcho(b, g, ecdsaDoor, 0, here.crowd(4000), 256)
	})
}

func benchEcho(b *testing.B, g *gateway, d door, idle, busy, size int) {
	s := swarmFor(b, g, d, idle+busy)
	if _, err := s.echo(s.lines, 256, 1); err != nil { // their backends are there, their tickets have been read
		g.fatal(b, err)
	}
	sum := g.measure(b, echoes(s, s.lines[idle:], size))
	g.reportPerOp(b, sum)
	sum.reportLatency(b)
}

// echoes is a round of echoes on each of some connections.
func echoes(s *swarm, busy []*line, size int) round {
	times := max(1, 4096/len(busy))
	if short {
		times = max(1, 512/len(busy))
	}
	return func(sum *bill) error {
		took, err := s.echo(busy, size, times)
		sum.add(took)
		return err
	}
}

func swarmFor(t testing.TB, g *gateway, d door, n int) *swarm {
	t.Helper()
	s, err := newSwarm()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	if err := s.join(n, g.way(d)); err != nil {
		g.fatal(t, err)
	}
	return s
}

// BenchmarkBulk moves payload over four connections: from the backend to the clients, from the clients to the backend, and both at once.
func BenchmarkBulk(b *testing.B) {
	for _, c := range []struct {
		name     string
		down, up int
	}{{"down", 1, 0}, {"up", 0, 1}, {"both", 1, 1}} {
		inTurns(b, work{name: c.name, door: ecdsaDoor, bulk: true}, func(b *testing.B, g *gateway) {
			benchBulk(b, g, ecdsaDoor, c.down, c.up)
		})
	}
}

// BenchmarkReencrypt is bulk and echo from TLS to TLS, beside the same where TLS ends (terminate). The backend is a gateway of the same kind on the load's
// core, which ends TLS in front of the usual one.
func BenchmarkReencrypt(b *testing.B) {
	if tlsnat.missing != nil {
		b.Fatal(tlsnat.missing)
	}
	for _, w := range []struct {
		name     string
		down, up int
	}{{"down", 1, 0}, {"up", 0, 1}, {"both", 1, 1}, {"echo", 0, 0}} {
		for _, how := range []string{"terminate", "reencrypt"} {
			b.Run("peer=tlsnat/"+how+"-"+w.name, func(b *testing.B) {
				s := site{backend: backendAt, bulk: w.name != "echo", core: here.gatewayCore}
				if how == "reencrypt" {
					s.backend, s.encrypt = tlsnat.openAt(b, site{backend: backendAt, core: here.loadCore}).at[ecdsaDoor], true
				}
				if g := tlsnat.openAt(b, s); w.name == "echo" {
					benchEcho(b, g, ecdsaDoor, 0, 64, 256)
				} else {
					benchBulk(b, g, ecdsaDoor, w.down, w.up)
				}
			})
		}
	}
}

// BenchmarkLoops is what a second event loop costs: echo and bulk through one loop and through two, either on both cores, which they share with the load.
func BenchmarkLoops(b *testing.B) {
	if tlsnat.missing != nil {
		b.Fatal(tlsnat.missing)
	}
	for _, w := range []string{"echo", "down", "up"} {
		for i, loops := range []string{"one", "two"} {
			b.Run("peer=tlsnat/"+loops+"-"+w, func(b *testing.B) {
				g := tlsnat.openAt(b, site{backend: backendAt, bulk: w != "echo", core: anyCore, loops: i + 1})
				switch w {
				case "echo":
					benchEcho(b, g, ecdsaDoor, 0, 64, 256)
				case "down":
					benchBulk(b, g, ecdsaDoor, 1, 0)
				case "up":
					benchBulk(b, g, ecdsaDoor, 0, 1)
				}
			})
		}
	}
}

// BenchmarkBeside sets all gateways at the same work by turns of a tenth of a second, and reports tlsnat's CPU time as a multiple of each peer's
// (times-NAME) and of the best one's (times-best). What the machine does meanwhile concerns all alike, so these are the ratios to go by on one that others
// use, too.
func BenchmarkBeside(b *testing.B) {
	if tlsnat.missing != nil {
		b.Fatal(tlsnat.missing)
	}
	for _, w := range []string{"handshake", "resumed", "rsa", "echo", "down", "up", "tcp-echo", "tcp-down", "tcp-up"} {
		b.Run("peer=tlsnat/"+w, func(b *testing.B) {
			var gateways []*gateway
			var rounds []round
			for _, p := range peers {
				if p.missing != nil || p == direct || !p.has(doorTo(w)) {
					continue
				}
				g := p.openFor(b, strings.HasSuffix(w, "down") || strings.HasSuffix(w, "up"))
				gateways, rounds = append(gateways, g), append(rounds, roundOf(b, g, w))
			}
			turns := 8
			if short {
				turns = 1
			}
			sums := alternate(b, gateways, rounds, turns)
			best := 0.0
			for i, g := range gateways {
				if times := sums[0].cpuPerUnit() / sums[i].cpuPerUnit(); i > 0 {
					best = max(best, times)
					b.ReportMetric(times, "times-"+g.peer.name)
				}
			}
			b.ReportMetric(best, "times-best")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkSwitch is what all that can be switched on costs: handshakes, echo and bulk under a map of 10,000 rules with lists, limits, checks and
// balancing, in turns with the same under four rules without options (times-bare).
func BenchmarkSwitch(b *testing.B) {
	if tlsnat.missing != nil {
		b.Fatal(tlsnat.missing)
	}
	for _, w := range []string{"handshake", "echo", "down", "up"} {
		b.Run("peer=tlsnat/"+w, func(b *testing.B) {
			var gateways []*gateway
			for _, full := range []bool{false, true} {
				gateways = append(gateways, tlsnat.openAt(b, site{backend: backendAt, core: here.gatewayCore, full: full}))
			}
			var rounds []round
			for _, g := range gateways {
				if _, err := g.settledPSS(); err != nil { // what reading the map has left behind is given back by then
					b.Fatal(err)
				}
				rounds = append(rounds, roundOf(b, g, w))
			}
			sums := alternate(b, gateways, rounds, 1)
			bare, full := sums[0], sums[1]
			if w == "down" || w == "up" {
				gateways[1].reportPerGiB(b, full)
			} else {
				gateways[1].reportPerOp(b, full)
			}
			b.ReportMetric(full.cpuPerUnit()/bare.cpuPerUnit(), "times-bare")
		})
	}
}

// doorTo is the door for a work, by the name that roundOf knows.
func doorTo(w string) door {
	switch {
	case w == "rsa":
		return rsaDoor
	case strings.HasPrefix(w, "tcp-"):
		return tcpDoor
	}
	return ecdsaDoor
}

// roundOf is a round of a work by its name, a tenth of a second or so.
func roundOf(b *testing.B, g *gateway, w string) round {
	d := doorTo(w)
	switch strings.TrimPrefix(w, "tcp-") {
	case "echo":
		s := swarmFor(b, g, d, 64)
		return echoes(s, s.lines, 256)
	case "down":
		return streams(b, g, d, 1, 0)
	case "up":
		return streams(b, g, d, 0, 1)
	}
	v, err := g.way(d).visitors(w == "resumed", true)
	if err != nil {
		g.fatal(b, err)
	}
	return visits(v)
}

func benchBulk(b *testing.B, g *gateway, d door, down, up int) {
	g.reportPerGiB(b, g.measure(b, streams(b, g, d, down, up)))
}

// streams is a round of bulk over four connections.
func streams(b *testing.B, g *gateway, d door, down, up int) round {
	size := 32 << 20
	if short {
		size = 2 << 20
	}
	s := swarmFor(b, g, d, 4)
	return func(sum *bill) error {
		sum.units += len(s.lines) * (down + up) * size
		return s.bulk(down*size, up*size)
	}
}

// BenchmarkPassthrough is bulk and echo where the gateway decrypts nothing: routed on the server name (pass), or by port alone (tcp).
func BenchmarkPassthrough(b *testing.B) {
	for _, d := range []door{passDoor, tcpDoor} {
		inTurns(b, work{name: string(d) + "-down", door: d, bulk: true}, func(b *testing.B, g *gateway) { benchBulk(b, g, d, 1, 0) })
		inTurns(b, work{name: string(d) + "-up", door: d, bulk: true}, func(b *testing.B, g *gateway) { benchBulk(b, g, d, 0, 1) })
		inTurns(b, work{name: string(d) + "-echo", door: d}, func(b *testing.B, g *gateway) { benchEcho(b, g, d, 0, 64, 256) })
	}
}

// BenchmarkManual is bulk without TLS beside HAProxy as its manual has it: splice-auto, buffers of 16 KiB, and the pipes of 64 KiB that Linux gives. Who does not know that
// HAProxy has to be told to splice always, and into larger pipes, gets this.
func BenchmarkManual(b *testing.B) {
	for _, c := range []struct {
		name     string
		down, up int
	}{{"tcp-down", 1, 0}, {"tcp-up", 0, 1}} {
		for _, p := range []*peer{tlsnat, haproxy} {
			if p.missing == nil {
				b.Run("peer="+p.name+"/"+c.name, func(b *testing.B) {
					g := p.openAt(b, site{backend: backendAt, bulk: true, manual: true, core: here.gatewayCore})
					benchBulk(b, g, tcpDoor, c.down, c.up)
				})
			}
		}
	}
}

// BenchmarkIdle keeps connections that do nothing: what each adds to memory and descriptors, and the CPU time it takes to have it for a second. The
// base is the gateway after 64 visits, with nobody connected.
func BenchmarkIdle(b *testing.B) {
	for _, p := range peers {
		if p.missing != nil || p == direct {
			continue
		}
		b.Run("peer="+p.name, func(b *testing.B) {
			g := p.openFor(b, false)
			base := g.weigh(b, 64)
			var c crowd
			b.Cleanup(func() { c.close() })
			for _, n := range []int{1000, 4000, 8000} {
				var err error
				if c, err = c.gather(here.crowd(n), g.way(ecdsaDoor)); err != nil {
					g.fatal(b, err)
				}
				b.Run(strconv.Itoa(n), func(b *testing.B) { g.benchStill(b, base, len(c)) })
			}
		})
	}
}

// BenchmarkHalfHello is the cost of 4,000 clients that have sent half a ClientHello and wait; cpu-ns/op is for accepting one and reading that half.
func BenchmarkHalfHello(b *testing.B) {
	for _, p := range peers {
		if p.missing != nil || p == direct {
			continue
		}
		b.Run("peer="+p.name+"/4000", func(b *testing.B) {
			g := p.openFor(b, false)
			base, n := g.weigh(b, 64), here.crowd(4000)
			c := make(crowd, n)
			b.Cleanup(c.close)
			cpu := g.cpuNow(b)
			for i := range c {
				var err error
				if c[i], err = net.DialTimeout("tcp", g.at[ecdsaDoor], patience); err != nil {
					g.fatal(b, err)
				}
				if _, err := c[i].Write(preparedHello[:len(preparedHello)/2]); err != nil {
					g.fatal(b, err)
				}
			}
			time.Sleep(200 * time.Millisecond) // the last of them may still be in the backlog
			cpu = g.cpuNow(b) - cpu
			g.benchStill(b, base, n)
			b.ReportMetric(float64(cpu)/float64(n), "cpu-ns/op")
			for i := range c {
				if closed(c[i]) {
					b.Fatalf("%s has closed connection %d, which was to be counted", p.name, i)
				}
			}
		})
	}
}

// closed tells whether the other side has ended a connection on which it has nothing to say.
func closed(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(-1))
	_, err := c.Read(make([]byte, 1))
	return errors.Is(err, io.EOF)
}

// weight is what a gateway holds at a moment.
type weight struct {
	pss int64
	fds int
}

func (g *gateway) weigh(b *testing.B, visits int) weight {
	b.Helper()
	for range visits {
		if _, _, err := g.way(ecdsaDoor).visit(); err != nil {
			g.fatal(b, err)
		}
	}
	var w weight
	var err error
	if w.pss, err = g.settledPSS(); err != nil {
		b.Fatal(err)
	}
	if w.fds, err = g.fds(); err != nil {
		b.Fatal(err)
	}
	return w
}

// benchStill measures a gateway that n connections do not bother.
func (g *gateway) benchStill(b *testing.B, base weight, n int) {
	now := g.weigh(b, 0)
	sum := g.measure(b, func(*bill) error {
		time.Sleep(100 * time.Millisecond)
		return nil
	})
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(sum.cpu)/float64(n)/sum.wall.Seconds(), "cpu-ns/conn/s")
	b.ReportMetric(float64(now.pss), "pss-B")
	b.ReportMetric(float64(now.pss-base.pss)/float64(n), "pss-B/conn")
	b.ReportMetric(float64(now.fds-base.fds)/float64(n), "fds/conn")
}

// BenchmarkLatency is how long 1,000 small echoes a second on 64 open connections take while the gateway has other things to do: nothing, four bulk
// streams of 50 MiB/s each, four that take what they get (then every gateway carries another amount, and the faster one leaves less of the load's core
// to those who wait for their echo), new clients at half the rate that would fill its core, and at twice that rate.
func BenchmarkLatency(b *testing.B) {
	for _, c := range []struct {
		name string
		load float64
		bulk bool
		rate float64 // of each stream, in MiB/s
	}{{name: "quiet"}, {name: "bulk", bulk: true, rate: 50}, {name: "flood", bulk: true}, {name: "half", load: 0.5}, {name: "twice", load: 2}} {
		inTurns(b, work{name: c.name, door: ecdsaDoor}, func(b *testing.B, g *gateway) {
			if c.load > 0 && g.peer == direct {
				b.Skip("direct: no gateway to shake hands with")
			}
			all, err := crowd(nil).gather(64, g.way(ecdsaDoor))
			b.Cleanup(func() { all.close() })
			if err != nil {
				g.fatal(b, err)
			}
			beside := errand{Do: "stream", Addr: g.at[ecdsaDoor], TLS: g.peer != direct, Count: 4, Rate: c.rate}
			if c.load > 0 {
				beside = errand{Do: "knock", Addr: g.at[ecdsaDoor], Rate: c.load * g.capacity(b)}
			}
			if c.bulk || c.load > 0 {
				h := sendFor(b, beside)
				b.Cleanup(func() {
					if offered, err := strconv.ParseFloat(h.recall(), 64); err == nil {
						b.ReportMetric(offered, "offered/s")
					}
				})
			}
			benchPaced(b, g, all)
		})
	}
}

func sendFor(b *testing.B, e errand) *helper {
	h, _, err := e.send(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	return h
}

func benchPaced(b *testing.B, g *gateway, all crowd) {
	const times, period = 4, 64 * time.Millisecond
	sum := g.measure(b, func(sum *bill) error {
		took, err := all.echoPaced(256, times, period)
		sum.add(took)
		return err
	})
	b.ReportMetric(0, "ns/op") // the pace is ours
	sum.reportLatency(b)
}

// capacity is how many knocks a second would fill the gateway's core, from what one costs it.
func (g *gateway) capacity(b *testing.B) float64 {
	times := 32
	if short {
		times = 4
	}
	round := func() {
		err := together(16, func(int) error {
			for range times {
				welcome, err := knock(g.at[ecdsaDoor])
				if err == nil && !welcome {
					err = errors.New("the gateway does not answer a ClientHello")
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			g.fatal(b, err)
		}
	}
	round()
	cpu := g.cpuNow(b)
	round()
	round()
	cpu = g.cpuNow(b) - cpu
	return float64(2*16*times) / cpu.Seconds()
}
