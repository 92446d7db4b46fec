// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"math"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/tlsnat/tlsnat/gateway"
)

// The classic buckets, for a Prometheus that is not set up for native histograms: few, and bounds that the native ones
// have too, so that both come from one count. Bounds are powers of two of a second, by their exponents.
var (
	briefOctaves = []int{-12, -10, -8, -6, -4, -2, 0, 2} // from 0.24 ms to 4 s, times four each
	longOctaves  = []int{-6, -2, 2, 6, 10, 14}           // from 16 ms to 4 h 33 min, times sixteen each
)

var (
	handshakeTimeDesc  = desc("handshake_duration_seconds", "How long TLS handshakes with clients took, the wait for their turn included.", "resumed")
	encryptionTimeDesc = desc("backend_handshake_duration_seconds", "How long TLS handshakes with tls:// backends took.")
	connectTimeDesc    = desc("backend_connect_duration_seconds", "How long it took to reach a backend, with the backends that failed before it.")
	connTimeDesc       = desc("connection_duration_seconds", "How long connections lasted that reached a backend, from accept to the end.")
	encryptionsDesc    = desc("backend_handshakes_total", "TLS handshakes with tls:// backends, by what became of them.", "result", "resumed")
	durationDescs      = []*prometheus.Desc{handshakeTimeDesc, encryptionTimeDesc, connectTimeDesc, connTimeDesc, encryptionsDesc}
)

// collectDurations sends times, and handshakes with backends.
func (s *Server) collectDurations(to chan<- prometheus.Metric, status *gateway.Status) {
	times := s.gateway.SpanTimes()
	send := func(d *prometheus.Desc, times *gateway.Durations, octaves []int, labels ...string) {
		to <- newHistogram(d, times, status.Started, octaves, labels...)
	}
	send(handshakeTimeDesc, &times.Handshake, briefOctaves, "false")
	send(handshakeTimeDesc, &times.Resumed, briefOctaves, "true")
	send(encryptionTimeDesc, &times.BackendHandshake, briefOctaves)
	send(connectTimeDesc, &times.Connect, briefOctaves)
	send(connTimeDesc, &times.Connection, longOctaves)
	for _, e := range status.Encryptions {
		to <- prometheus.MustNewConstMetric(encryptionsDesc, prometheus.CounterValue, float64(e.Count), e.Result, strconv.FormatBool(e.Resumed))
	}
}

// histogram is a native one that has classic buckets as well.
type histogram struct {
	prometheus.Metric
	classic []*dto.Bucket
}

func newHistogram(d *prometheus.Desc, times *gateway.Durations, since time.Time, octaves []int, labels ...string) prometheus.Metric {
	native := prometheus.MustNewConstNativeHistogram(d, times.Count, times.Sum.Seconds(), times.Buckets, nil, times.Zero,
		gateway.DurationSchema, gateway.ZeroDuration, since, labels...)
	h := histogram{Metric: native}
	for _, octave := range octaves {
		bound, count := math.Exp2(float64(octave)), times.AtMost(octave)
		h.classic = append(h.classic, &dto.Bucket{UpperBound: &bound, CumulativeCount: &count})
	}
	return h
}

func (h histogram) Write(out *dto.Metric) error {
	err := h.Metric.Write(out)
	out.Histogram.Bucket = h.classic
	return err
}
