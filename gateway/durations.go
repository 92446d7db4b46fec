// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"math"
	"sync/atomic"
	"time"
)

// span is a part of a connection's story whose time is counted: the times that its line in the log has. The list is
// closed.
type span uint8

const (
	handshakeSpan        span = iota // with a client, in full: handshake_ms
	resumedSpan                      // the same, of a resumed session
	connectSpan                      // until a backend was reached: connect_ms
	backendHandshakeSpan             // backend_handshake_ms
	connectionSpan                   // from accept to the end, of those that reached a backend: duration_ms
	spans
)

// Durations are counted in buckets whose bounds are powers of 2^(1/4), in seconds: what Prometheus calls schema 2 of
// native histograms. A quantile that is read from them is off by 9 % at most.
const (
	DurationSchema = 2
	perOctave      = 1 << DurationSchema
	// From 2^-20 s, which is 0.95 µs, and what is shorter counts as nothing; a loop's clock goes on once a round.
	shortestOctave = -20
	// To 2^22 s, which is 48 days; what is longer counts as that.
	longestOctave = 22
)

// ZeroDuration is the bound, in seconds, up to which a duration counts as zero.
const ZeroDuration = 1.0 / (1 << -shortestOctave)

// stopwatch counts durations in one loop. It is read from elsewhere.
type stopwatch struct {
	buckets [(longestOctave-shortestOctave)*perOctave + 1]atomic.Uint64 // the first is for zero
	sum     atomic.Int64                                                // nanoseconds
}

func (w *stopwatch) note(ns int64) {
	w.buckets[bucketOf(ns)].Add(1)
	w.sum.Add(max(ns, 0))
}

// The mantissas of 2^(1/4), 2^(2/4) and 2^(3/4), rounded as client_golang has them: bounds have to agree to the bit.
var quarters = [perOctave - 1]uint64{mantissa(2 * 0.5946035575013605), mantissa(2 * 0.7071067811865475), mantissa(2 * 0.8408964152537144)}

func mantissa(f float64) uint64 { return math.Float64bits(f) & (1<<52 - 1) }

// bucketOf is the index of the bucket for a number of nanoseconds. The exponent and the mantissa of a float64 are its
// octave and its place in there.
func bucketOf(ns int64) int {
	if ns <= 0 {
		return 0
	}
	bits := math.Float64bits(float64(ns) * 1e-9)
	place, octave := bits&(1<<52-1), int(bits>>52)-1023
	if octave < shortestOctave {
		return 0
	}
	i := (octave - shortestOctave) * perOctave
	if place > 0 {
		i++ // upper bounds belong to their bucket
	}
	for _, q := range quarters {
		if place > q {
			i++
		}
	}
	return min(i, (longestOctave-shortestOctave)*perOctave)
}

// Durations are times that were counted, all loops together.
type Durations struct {
	Count   uint64
	Sum     time.Duration
	Zero    uint64        // of up to ZeroDuration
	Buckets map[int]int64 // by the index that Prometheus gives them: the n-th is for more than 2^((n-1)/4) s, up to 2^(n/4) s
}

// AtMost is how many took up to 2^octave seconds.
func (d *Durations) AtMost(octave int) uint64 {
	n := d.Zero
	for i, count := range d.Buckets {
		if i <= octave*perOctave {
			n += uint64(count)
		}
	}
	return n
}

// Quantile is the time that a part q of them, from 0 to 1, did not exceed; 0 if there are none.
func (d *Durations) Quantile(q float64) time.Duration {
	rank := uint64(math.Ceil(q * float64(d.Count)))
	n := d.Zero
	for i := shortestOctave * perOctave; i <= longestOctave*perOctave; i++ {
		if n >= rank {
			break
		}
		if n += uint64(d.Buckets[i]); n >= rank {
			return time.Duration(math.Exp2((float64(i)-0.5)/perOctave) * float64(time.Second)) // the middle of the bucket
		}
	}
	return 0
}

// SpanTimes are the durations of what takes time in connections' stories.
type SpanTimes struct {
	Handshake, Resumed Durations // with clients, in full and resumed; the wait for a turn included
	Connect            Durations // until a backend was reached, all that were tried before included
	BackendHandshake   Durations // with tls:// backends
	Connection         Durations // from accept to the end, of connections that reached a backend
}

// SpanTimes sums what the loops have counted.
func (g *Gateway) SpanTimes() SpanTimes {
	return SpanTimes{g.durations(handshakeSpan), g.durations(resumedSpan), g.durations(connectSpan), g.durations(backendHandshakeSpan),
		g.durations(connectionSpan)}
}

func (g *Gateway) durations(s span) Durations {
	d := Durations{Buckets: map[int]int64{}}
	for _, l := range g.loops {
		w := &l.counters.spans[s]
		d.Sum += time.Duration(w.sum.Load())
		for i := range w.buckets {
			n := w.buckets[i].Load()
			d.Count += n
			switch {
			case i == 0:
				d.Zero += n
			case n > 0:
				d.Buckets[i+shortestOctave*perOctave] += int64(n)
			}
		}
	}
	return d
}

// TimeStatus is what there is to say in short about durations.
type TimeStatus struct {
	Count  uint64  `json:"count"`
	MeanMS float64 `json:"mean_ms"`
	P50MS  float64 `json:"p50_ms"`
	P99MS  float64 `json:"p99_ms"`
}

// TimesStatus has the same parts as SpanTimes.
type TimesStatus struct {
	Handshake        TimeStatus `json:"handshake"`
	Resumed          TimeStatus `json:"handshake_resumed"`
	Connect          TimeStatus `json:"connect"`
	BackendHandshake TimeStatus `json:"backend_handshake"`
	Connection       TimeStatus `json:"connection"`
}

func (g *Gateway) times() TimesStatus {
	t := g.SpanTimes()
	return TimesStatus{t.Handshake.status(), t.Resumed.status(), t.Connect.status(), t.BackendHandshake.status(), t.Connection.status()}
}

func (d *Durations) status() TimeStatus {
	ms := func(d time.Duration) float64 { return math.Round(float64(d)/float64(time.Microsecond)) / 1000 }
	return TimeStatus{d.Count, ms(d.Sum / time.Duration(max(d.Count, 1))), ms(d.Quantile(0.5)), ms(d.Quantile(0.99))}
}

const (
	// A round of a loop that takes longer than this is looked at: whoever waits for the loop begins to notice.
	noticedRound = int64(time.Millisecond)
	// The longest round is known for windows of so long: that of the current one and that of the one before are the
	// lag, so that whoever asks once a minute misses none.
	lagWindow = int64(time.Minute)
)

// lag is how long the connections of a loop had to wait for it, lately: for each of two windows its number and the
// longest round in it, in one word, so that they can be read together.
type lag [2]atomic.Uint64

const lagBits = 40 // of microseconds: 12 days

func (g *lag) note(took, now int64) {
	window := uint64(now / lagWindow)
	slot := &g[window&1]
	longest := uint64(took / int64(time.Microsecond))
	if was := slot.Load(); was>>lagBits != window || was&(1<<lagBits-1) < longest {
		slot.Store(window<<lagBits | longest)
	}
}

// longest is the lag at a time, in loop nanoseconds as that is.
func (g *lag) longest(now int64) (longest int64) {
	window := uint64(now / lagWindow)
	for i := range g {
		word := g[i].Load()
		if w := word >> lagBits; word != 0 && (w == window || w+1 == window) {
			longest = max(longest, int64(word&(1<<lagBits-1))*int64(time.Microsecond))
		}
	}
	return longest
}

// noteRound measures how long the others had to wait for this round: the loop's lag.
func (l *loop) noteRound() {
	if took := l.clock() - l.now; took > noticedRound {
		l.counters.slow(took, l.now)
	}
}

// slowRound is longer than anything a loop does should take.
const slowRound = int64(10 * time.Millisecond)

func (n *counters) slow(took, now int64) {
	if took > slowRound {
		n.slowRounds.Add(1)
	}
	if took > n.longestRound.Load() {
		n.longestRound.Store(took)
	}
	n.lag.note(took, now)
}
