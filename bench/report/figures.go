// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// key names a figure: what was done, by whom, and what was measured.
type key struct {
	workload string // "Echo/256B"
	peer     string // "tlsnat"
	metric   string // "cpu-ns/op"
}

// measured is what all rounds said.
type measured struct {
	facts  map[string][]string // configuration lines, every different value in order
	values map[key][]float64   // one for each round
}

// parse reads Go's benchmark format. Lines that are neither results of a peer nor configuration are passed over, as the format wants it; "# name: value" is
// a fact of that round alone.
func parse(r io.Reader) (*measured, error) {
	m := &measured{facts: map[string][]string{}, values: map[key][]float64{}}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if strings.HasPrefix(line, "Benchmark") {
			if err := m.addResult(line); err != nil {
				return nil, fmt.Errorf("line %d: %w", n, err)
			}
		} else if name, value, ok := strings.Cut(strings.TrimPrefix(line, "# "), ": "); ok && isFactName(name) {
			if value = strings.TrimSpace(value); !slices.Contains(m.facts[name], value) {
				m.facts[name] = append(m.facts[name], value)
			}
		}
	}
	return m, lines.Err()
}

var factName = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

func isFactName(s string) bool { return factName.MatchString(s) }

// resultName is Benchmark, the workload, the peer, the case, and the number of processors if it is not one.
var resultName = regexp.MustCompile(`^Benchmark([^/]+)/peer=([^/]+)/(.+?)(?:-\d+)?$`)

func (m *measured) addResult(line string) error {
	fields := strings.Fields(line)
	name := resultName.FindStringSubmatch(fields[0])
	if name == nil || len(fields) < 2 {
		return nil // the name alone, or a benchmark of something else
	}
	if len(fields)%2 != 0 {
		return fmt.Errorf("%s: a value without its unit", fields[0])
	}
	for i := 2; i < len(fields); i += 2 {
		value, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return fmt.Errorf("%s: %w", fields[0], err)
		}
		k := key{workload: name[1] + "/" + name[3], peer: name[2], metric: fields[i+1]}
		m.values[k] = append(m.values[k], value)
	}
	return nil
}

// median of all rounds; of an even number, the mean of the middle two. ok is false where nothing was measured.
func (m *measured) median(k key) (value float64, ok bool) {
	v := slices.Sorted(slices.Values(m.values[k]))
	if len(v) == 0 {
		return 0, false
	}
	low, high := v[(len(v)-1)/2], v[len(v)/2]
	return low + (high-low)/2, true
}

// rounds is how many values the most measured figure has.
func (m *measured) rounds() int {
	most := 0
	for _, v := range m.values {
		most = max(most, len(v))
	}
	return most
}

// fact is a configuration line; where rounds differ, all of them.
func (m *measured) fact(name string) string { return strings.Join(m.facts[name], "; ") }

// us is the gateway that all others are set beside; floor is the run without a gateway.
const us, floor = "tlsnat", "direct"

// gateways in the order of their columns: us first, then those that have figures or are known to be missing.
var gateways = []string{us, "haproxy", "nginx", "hitch", "stunnel"}

// present are the gateways that were measured at all.
func (m *measured) present() []string {
	return slices.DeleteFunc(slices.Clone(gateways), func(g string) bool {
		for k := range m.values {
			if k.peer == g {
				return false
			}
		}
		return true
	})
}

// best is the best figure of the peers, us left out.
func (m *measured) best(workload string, s scale) (value float64, ok bool) {
	for _, g := range gateways {
		v, measured := m.median(key{workload, g, s.metric})
		if g == us || !measured {
			continue
		}
		if !ok || s.more == (v > value) {
			value, ok = v, true
		}
	}
	return value, ok
}

// scale is how a metric is shown.
type scale struct {
	metric string
	unit   string
	factor float64
	more   bool // more is better
}

var (
	cpuPerOp   = scale{metric: "cpu-ns/op", unit: "µs", factor: 1e-3}
	cpuPerGiB  = scale{metric: "cpu-s/GiB", unit: "s/GiB", factor: 1}
	timesBare  = scale{metric: "times-bare", unit: "", factor: 1}
	timesBest  = scale{metric: "times-best", unit: "", factor: 1}
	idleCPU    = scale{metric: "cpu-ns/conn/s", unit: "ns/s", factor: 1}
	memory     = scale{metric: "pss-B/conn", unit: "KiB", factor: 1.0 / 1024}
	files      = scale{metric: "fds/conn", unit: "", factor: 1}
	tail       = scale{metric: "p99-ns", unit: "ms", factor: 1e-6}
	middle     = scale{metric: "p50-ns", unit: "ms", factor: 1e-6}
	wall       = scale{metric: "ns/op", unit: "µs", factor: 1e-3}
	throughput = scale{metric: "MiB/s", unit: "MiB/s", factor: 1, more: true}
)

// show writes a value with three significant digits, as people write them.
func (s scale) show(v float64) string {
	v *= s.factor
	switch {
	case v == 0:
		return "0"
	case v >= 99.95:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 9.995:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
