// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"maps"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// nanoseconds are durations of every size, bounds of buckets and what lies beside them among them.
func nanoseconds() (all []int64) {
	r := rand.New(rand.NewPCG(1, 2))
	for octave := shortestOctave; octave < longestOctave; octave++ {
		for place := range perOctave {
			bound := int64(math.Exp2(float64(octave)+float64(place)/perOctave) * 1e9)
			all = append(all, bound-1, bound, bound+1)
		}
		least := math.Exp2(float64(octave)) * 1e9
		for range 100 {
			all = append(all, int64(least*(1+r.Float64())))
		}
	}
	return append(all, 0, 1, 2)
}

// TestDurationsFallIntoPrometheusBuckets: those that its own histograms put them into.
func TestDurationsFallIntoPrometheusBuckets(t *testing.T) {
	theirs := prometheus.NewHistogram(prometheus.HistogramOpts{NativeHistogramBucketFactor: 1.2, NativeHistogramZeroThreshold: ZeroDuration})
	g := &Gateway{loops: []*loop{{}, {}}}
	for i, ns := range nanoseconds() {
		theirs.Observe(float64(ns) * 1e-9)
		g.loops[i%2].counters.spans[connectSpan].note(ns)
	}
	var m dto.Metric
	if err := theirs.Write(&m); err != nil {
		t.Fatal(err)
	}
	h := m.GetHistogram()
	want, index, count := map[int]int64{}, 0, int64(0)
	deltas := h.GetPositiveDelta()
	for _, span := range h.GetPositiveSpan() {
		index += int(span.GetOffset())
		for range span.GetLength() {
			count, deltas = count+deltas[0], deltas[1:]
			if count > 0 {
				want[index] = count
			}
			index++
		}
	}
	ours := g.SpanTimes().Connect
	if h.GetSchema() != DurationSchema || ours.Zero != h.GetZeroCount() || !maps.Equal(ours.Buckets, want) {
		t.Errorf("schema %d, %d in zero and\n%v, want schema %d, %d in zero and\n%v", DurationSchema, ours.Zero, ours.Buckets, h.GetSchema(), h.GetZeroCount(), want)
	}
	if ours.Count != h.GetSampleCount() || math.Abs(ours.Sum.Seconds()/h.GetSampleSum()-1) > 1e-9 {
		t.Errorf("%d in %v, want %d in %v s", ours.Count, ours.Sum, h.GetSampleCount(), h.GetSampleSum())
	}
}

// TestDurationsBeyondAllBucketsAreKept in the first and in the last.
func TestDurationsBeyondAllBucketsAreKept(t *testing.T) {
	g := &Gateway{loops: []*loop{{}}}
	w := &g.loops[0].counters.spans[connectionSpan]
	for _, ns := range []int64{math.MinInt64, -1, 0, 900, math.MaxInt64} {
		w.note(ns)
	}
	d := g.SpanTimes().Connection
	if d.Count != 5 || d.Zero != 4 || d.Buckets[longestOctave*perOctave] != 1 {
		t.Errorf("%+v", d)
	}
}

func TestQuantilesAreNear(t *testing.T) {
	g := &Gateway{loops: []*loop{{}}}
	if d := g.SpanTimes().Handshake; d.Quantile(0.99) != 0 {
		t.Errorf("of none: %v", d.Quantile(0.99))
	}
	for i := range 1000 {
		g.loops[0].counters.spans[handshakeSpan].note(int64(time.Duration(i+1) * time.Millisecond))
	}
	d := g.SpanTimes().Handshake
	for q, want := range map[float64]time.Duration{0.001: time.Millisecond, 0.5: 500 * time.Millisecond, 0.99: 990 * time.Millisecond, 1: time.Second} {
		if got := d.Quantile(q); math.Abs(float64(got-want)) > 0.095*float64(want) {
			t.Errorf("quantile %v: %v, want %v within 9 %%", q, got, want)
		}
	}
	if under, over := d.AtMost(-2), d.AtMost(0); under != 250 || over != 1000 {
		t.Errorf("%d took up to 1/4 s and %d up to 1 s, want 250 and 1000", under, over)
	}
	if s := d.status(); s.Count != 1000 || s.MeanMS != 500.5 {
		t.Errorf("%+v", s)
	}
}

// TestLagIsThatOfTheLastMinutes, so that an alert ends when it is over.
func TestLagIsThatOfTheLastMinutes(t *testing.T) {
	var g lag
	const ms, minute = int64(time.Millisecond), lagWindow
	for _, step := range []struct{ took, now, want int64 }{
		{0, 5 * minute, 0}, {30 * ms, 5*minute + 1, 30}, {20 * ms, 6*minute - 1, 30}, {10 * ms, 6 * minute, 30},
		{0, 7*minute - 1, 30}, {0, 7 * minute, 10}, {0, 8 * minute, 0}, {2 * ms, 9 * minute, 2}, {5 * ms, 11 * minute, 5},
	} {
		if step.took > 0 {
			g.note(step.took, step.now)
		}
		if got := g.longest(step.now) / ms; got != step.want {
			t.Errorf("at %v the lag is %d ms, want %d", time.Duration(step.now), got, step.want)
		}
	}
}

// TestSlowRoundsAreNoticed: a loop that is held up says so.
func TestSlowRoundsAreNoticed(t *testing.T) {
	g := &Gateway{started: time.Now().Add(-time.Hour)}
	l := &loop{gw: g}
	g.loops = []*loop{l}
	l.tick()
	l.noteRound()
	if n := &l.counters; n.slowRounds.Load() != 0 {
		t.Errorf("%d slow rounds", n.slowRounds.Load())
	}
	l.now -= int64(20 * time.Millisecond)
	l.noteRound()
	if n := &l.counters; n.slowRounds.Load() != 1 || n.longestRound.Load() < int64(20*time.Millisecond) || n.lag.longest(l.clock()) < int64(20*time.Millisecond) {
		t.Errorf("%d slow rounds, the longest %v, lag %v", n.slowRounds.Load(), n.longestRound.Load(), n.lag.longest(l.clock()))
	}
}

// TestCountingDurationsAllocatesNothing, and takes no look at the clock: it is told the time.
func TestCountingDurationsAllocatesNothing(t *testing.T) {
	var w stopwatch
	if n := testing.AllocsPerRun(100, func() { w.note(123_456) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkDuration is what counting one costs. A connection has four at most.
func BenchmarkDuration(b *testing.B) {
	var w stopwatch
	ns := int64(1)
	for b.Loop() {
		ns = ns*5/2 + 1
		if ns > int64(time.Hour) {
			ns = 1
		}
		w.note(ns)
	}
}
