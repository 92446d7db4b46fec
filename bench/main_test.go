// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

var (
	short     bool   // every crowd and every batch is small
	runDir    string // removed when the run ends
	backendAt string // where the one backend listens
)

func TestMain(m *testing.M) {
	os.Exit(prepare(m))
}

// prepare is everything around the benchmarks: errands branch off here, the others get cores, certificates, peers and a backend.
func prepare(m *testing.M) int {
	var err error
	if here, err = lookAround(); err != nil {
		return complain(err)
	}
	if text := os.Getenv(errandVariable); text != "" {
		if err := runErrand(text); err != nil {
			return complain(err)
		}
		return 0
	}
	flag.Parse()
	short = testing.Short() || os.Getenv("BENCH_SHORT") != ""
	if runDir, err = os.MkdirTemp("", "tlsnat-bench-"); err != nil {
		return complain(err)
	}
	defer os.RemoveAll(runDir)
	// nginx and hitch may change their user, and must still reach the files.
	if err := os.Chmod(runDir, 0o755); err != nil {
		return complain(err)
	}
	if err := makeCertificates(runDir); err != nil {
		return complain(err)
	}
	for _, p := range peers {
		if benchmarks() || testkit.On(testkit.Peers) {
			p.find()
		} else if p != direct {
			p.missing = errors.New("runs with TLSNAT_TEST=peers, or TLSNAT_TEST=all") // building the gateway alone takes a minute
		}
	}
	go launcher()
	if err := settleHere(here.loadCore); err != nil {
		return complain(err)
	}
	back, at, err := errand{Do: "backend"}.send(runDir)
	if err != nil {
		return complain(err)
	}
	defer back.recall()
	backendAt = at
	if benchmarks() {
		introduce()
	}
	return m.Run()
}

// benchmarks says whether any were asked for.
func benchmarks() bool { return flag.Lookup("test.bench").Value.String() != "" }

func complain(err error) int {
	fmt.Fprintln(os.Stderr, "bench:", err)
	return 1
}

// introduce prints what the figures depend on, as configuration lines of the benchmark format. The load average is no such line: rounds that differ in it
// are to be compared nevertheless.
func introduce() {
	fmt.Printf("cores: gateway %d, load %d, of %d\n", here.gatewayCore, here.loadCore, runtime.NumCPU())
	if here.gatewayCore == here.loadCore {
		fmt.Println("note: one core only: gateway, load and backend share it; CPU time per unit still counts, throughput and latency do not")
	}
	fmt.Printf("kernel: %s\n", firstWord("/proc/sys/kernel/osrelease"))
	fmt.Printf("# loadavg: %s\n", firstWord("/proc/loadavg"))
	fmt.Printf("go: %s\n", runtime.Version())
	fmt.Printf("short: %v\n", short)
	for _, p := range peers {
		fmt.Printf("peer-%s: %s\n", p.name, p.words())
	}
}

func firstWord(file string) string {
	text, err := os.ReadFile(file)
	words := strings.Fields(string(text))
	if err != nil || len(words) == 0 {
		return "unknown"
	}
	return words[0]
}

// work is one case of a benchmark.
type work struct {
	name string
	door door
	bulk bool
}

// inTurns does the work with each peer in turn, so that all meet the same weather. Their order is another one each time: who comes after direct finds a core
// that has slept for a second, and pays up to a tenth for that.
func inTurns(b *testing.B, w work, run func(b *testing.B, g *gateway)) {
	order := slices.Clone(peers)
	rand.Shuffle(len(order), func(i, k int) { order[i], order[k] = order[k], order[i] })
	for _, p := range order {
		if p.missing != nil || !p.has(w.door) {
			continue
		}
		b.Run("peer="+p.name+"/"+w.name, func(b *testing.B) {
			run(b, p.openFor(b, w.bulk))
		})
	}
}

// openFor starts a peer for a test or a benchmark and ends it with that.
func (p *peer) openFor(t testing.TB, bulk bool) *gateway {
	t.Helper()
	return p.openAt(t, site{backend: backendAt, bulk: bulk, core: here.gatewayCore})
}

// openAt does that where the site says.
func (p *peer) openAt(t testing.TB, s site) *gateway {
	t.Helper()
	dir, err := os.MkdirTemp(runDir, p.name+"-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.dir = dir
	g, err := p.open(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.close)
	return g
}

// bill is what a number of units cost, and how long each took where that was timed.
type bill struct {
	units int
	took  []time.Duration
	cpu   time.Duration
	wall  time.Duration
}

func (sum *bill) add(took []time.Duration) {
	sum.units += len(took)
	sum.took = append(sum.took, took...)
}

// cpuPerUnit is in nanoseconds.
func (sum *bill) cpuPerUnit() float64 { return float64(sum.cpu) / float64(sum.units) }

// A round is a piece of work that adds its units to the bill.
type round func(sum *bill) error

// measure repeats a round for the benchmark's time, after one that warms everything up and is not on the bill.
func (g *gateway) measure(b *testing.B, r round) *bill {
	b.Helper()
	return alternate(b, []*gateway{g}, []round{r}, 1)[0]
}

// alternate does that with several gateways, a round of each in turn, so that what the machine does meanwhile concerns all alike; each has so many turns at
// least, and is billed for its own.
func alternate(b *testing.B, gateways []*gateway, rounds []round, turns int) []*bill {
	b.Helper()
	sums := make([]*bill, len(gateways))
	for i, g := range gateways {
		if err := rounds[i](new(bill)); err != nil {
			g.fatal(b, err)
		}
		sums[i] = new(bill)
	}
	runtime.GC()
	for b.Loop() {
		for k := range turns * len(gateways) {
			i := k % len(gateways)
			g := gateways[i]
			cpu, began := g.cpuNow(b), time.Now()
			if err := rounds[i](sums[i]); err != nil {
				g.fatal(b, err)
			}
			sums[i].wall += time.Since(began)
			sums[i].cpu += g.cpuNow(b) - cpu
		}
	}
	return sums
}

func (g *gateway) cpuNow(b *testing.B) time.Duration {
	if g.process == nil {
		return 0
	}
	spent, err := g.cpu()
	if err != nil {
		b.Fatal(err)
	}
	return spent
}

func (g *gateway) fatal(t testing.TB, err error) {
	t.Helper()
	if g.process == nil {
		t.Fatal(err)
	}
	t.Fatalf("%v; last words of %s: %s", err, g.peer.name, g.lastWords())
}

// reportPerOp reports a bill whose units are operations.
func (g *gateway) reportPerOp(b *testing.B, sum *bill) {
	n := float64(sum.units)
	b.ReportMetric(float64(sum.wall)/n, "ns/op")
	if g.process != nil {
		b.ReportMetric(float64(sum.cpu)/n, "cpu-ns/op")
		g.reportSize(b)
	}
}

// reportPerGiB reports a bill whose units are bytes.
func (g *gateway) reportPerGiB(b *testing.B, sum *bill) {
	b.ReportMetric(float64(sum.units)/(1<<20)/sum.wall.Seconds(), "MiB/s")
	b.ReportMetric(0, "ns/op") // a round is no unit; zero keeps it out
	if g.process != nil {
		b.ReportMetric(sum.cpu.Seconds()/float64(sum.units)*(1<<30), "cpu-s/GiB")
		g.reportSize(b)
	}
}

func (g *gateway) reportSize(b *testing.B) {
	if g.process == nil {
		return
	}
	size, err := g.pss()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(size), "pss-B")
}

func (sum *bill) reportLatency(b *testing.B) {
	took := slices.Sorted(slices.Values(sum.took))
	b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
	b.ReportMetric(float64(took[len(took)*99/100]), "p99-ns")
}
