// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"testing"
)

const sample = `cores: gateway 0, load 1, of 2
# loadavg: 0.10
peer-haproxy: HAProxy version 2.6.12
peer-stunnel: missing: stunnel4 is not installed
goos: linux
BenchmarkEcho/peer=direct/256B
BenchmarkEcho/peer=direct/256B 30 13000 ns/op
BenchmarkEcho/peer=tlsnat/256B-2 30 15000 ns/op 11000 cpu-ns/op
BenchmarkEcho/peer=haproxy/256B 30 17000 ns/op 16000 cpu-ns/op
# loadavg: 0.30
BenchmarkEcho/peer=tlsnat/256B 30 15000 ns/op 13000 cpu-ns/op
BenchmarkEcho/peer=haproxy/256B 30 17000 ns/op 20000 cpu-ns/op
BenchmarkEcho/peer=tlsnat/256B 30 15000 ns/op 90000 cpu-ns/op
BenchmarkIdle/peer=haproxy/4000 1 4096 pss-B/conn 2 fds/conn
BenchmarkIdle/peer=tlsnat/4000 1 2048 pss-B/conn 2 fds/conn
BenchmarkLookup-2 100 5 ns/op
PASS
`

func parsed(t *testing.T, text string) *measured {
	t.Helper()
	m, err := parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMedianOfRounds(t *testing.T) {
	m := parsed(t, sample)
	for peer, want := range map[string]float64{"tlsnat": 13000, "haproxy": 18000} {
		if got, ok := m.median(key{"Echo/256B", peer, "cpu-ns/op"}); !ok || got != want {
			t.Errorf("%s: %v %v, want %v", peer, got, ok, want)
		}
	}
	if m.rounds() != 3 || m.fact("loadavg") != "0.10; 0.30" {
		t.Errorf("%d rounds, load %q", m.rounds(), m.fact("loadavg"))
	}
}

func TestTableSetsUsBesideTheBestPeer(t *testing.T) {
	text := string(parsed(t, sample).tables())
	for _, want := range []string{
		"| | unit | tlsnat | haproxy | no gateway | tlsnat to best peer |",
		"| echo of 256 B, 64 connections | µs | **13.0** | 18.0 | – | 0.72 |",
		"| idle, terminated, 4,000 | KiB | **2.00** | 4.00 | – | 0.50 |",
		"| descriptors, idle |  | 2.00 | 2.00 | – | 1.00 |",
		"| bulk, client to backend | s/GiB | – | – | – | – |",
		"- stunnel: missing: stunnel4 is not installed",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
}

func TestMoreIsBetterForThroughput(t *testing.T) {
	m := parsed(t, "BenchmarkBulk/peer=nginx/up 1 100 MiB/s\nBenchmarkBulk/peer=hitch/up 1 300 MiB/s\n")
	if best, _ := m.best("Bulk/up", throughput); best != 300 {
		t.Errorf("the best of 100 and 300 MiB/s is %v", best)
	}
}

func TestBrokenLineIsNamed(t *testing.T) {
	for _, line := range []string{"BenchmarkEcho/peer=a/b 1 5", "BenchmarkEcho/peer=a/b 1 x ns/op"} {
		if _, err := parse(strings.NewReader("goos: linux\n" + line)); err == nil || !strings.HasPrefix(err.Error(), "line 2: BenchmarkEcho/peer=a/b: ") {
			t.Errorf("%q: %v", line, err)
		}
	}
}

func TestFiguresGoBetweenTheMarkers(t *testing.T) {
	text := []byte("before\n" + figuresBegin + "old\n" + figuresEnd + "\nafter\n")
	once, err := replaceFigures(text, []byte("new\n"))
	if err != nil || string(once) != "before\n"+figuresBegin+"new\n"+figuresEnd+"\nafter\n" {
		t.Errorf("%v: %s", err, once)
	}
	if _, err := replaceFigures([]byte("no markers"), nil); err == nil {
		t.Error("a text without markers was taken")
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := replaceFigures(readme, nil); err != nil {
		t.Error(err)
	}
}

// TestChartsAreWellFormedOnBothPages also holds that every bar stays inside its panel.
func TestChartsAreWellFormedOnBothPages(t *testing.T) {
	for _, c := range charts {
		svg := c.draw(parsed(t, sample))
		for in := xml.NewDecoder(bytes.NewReader(svg)); ; {
			token, err := in.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", c.file, err)
			}
			checkBar(t, token)
		}
		if !bytes.Contains(svg, []byte("prefers-color-scheme:dark")) {
			t.Errorf("%s has no colours for a dark page", c.file)
		}
	}
}

func checkBar(t *testing.T, token xml.Token) {
	bar, ok := token.(xml.StartElement)
	if !ok || bar.Name.Local != "rect" {
		return
	}
	for _, a := range bar.Attr {
		var width float64
		if a.Name.Local != "width" {
			continue
		}
		if fmt.Sscan(a.Value, &width); width < 1 || width > barMost {
			t.Errorf("a bar %v wide", width)
		}
	}
}

func TestChartsCoverOnlyRowsOfTheTables(t *testing.T) {
	known := map[string]bool{}
	for _, s := range sections {
		for _, r := range s.rows {
			known[r.workload+r.metric] = true
		}
	}
	for _, c := range charts {
		for _, p := range c.panels {
			if !known[p.workload+p.metric] {
				t.Errorf("%s shows %s in %s, the tables do not", c.file, p.workload, p.metric)
			}
		}
	}
}

// FuzzResult: a result that is written in the benchmark format is read as the same figure, whatever stands around it.
func FuzzResult(f *testing.F) {
	if seeds, _ := os.ReadDir("testdata/fuzz/FuzzResult"); len(seeds) == 0 {
		f.Fatal("testdata/fuzz/FuzzResult has no seeds")
	}
	f.Fuzz(func(t *testing.T, workload, peer, name, unit string, value float64, procs uint8) {
		if !isWord(workload) || !isWord(peer) || !isWord(name) || !isWord(unit) || math.IsNaN(value-value) { // neither is infinity a figure
			t.Skip()
		}
		line := fmt.Sprintf("Benchmark%s/peer=%s/%s-%d\t  10\t%v %s\t1 other/op", workload, peer, name, procs, value, unit)
		m := parsed(t, "pkg: x\n"+line+"\nPASS\n")
		got, ok := m.median(key{workload + "/" + name, peer, unit})
		if !ok || got != value {
			t.Fatalf("%q was read as %v", line, m.values)
		}
	})
}

// isWord keeps to what a benchmark's name and unit may hold.
func isWord(s string) bool {
	return s != "" && len(s) < 100 && !strings.ContainsAny(s, "/ \t\r\n") && strings.Join(strings.Fields(s), "") == s && strings.ToValidUTF8(s, "") == s
}
