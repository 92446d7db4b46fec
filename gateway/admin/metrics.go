// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tlsnat/tlsnat/gateway"
)

const (
	// Certificates that have a gauge of their own, the first to expire: those are the ones to worry about, and a
	// directory of 100,000 must not become 100,000 time series.
	certGauges = 1000
)

// metrics answers scrapes. Nothing is counted here: what the loops have counted is read when somebody asks.
func (s *Server) metrics() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(s, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorLog: s.errorLog()})
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tlsnat_"+name, help, labels, nil)
}

var (
	outcomesDesc   = desc("connections_total", "Connections that ended, by how.", "outcome")
	cutShortDesc   = desc("streams_cut_short_total", "Streams of TLS that ended without a close_notify, as anybody on the way can make them end, by whose they were: client or backend.", "side")
	bytesDesc      = desc("bytes_total", "Bytes carried, without TLS around them: up is client to backend.", "direction")
	handshakesDesc = desc("handshakes_total", "TLS handshakes with clients that were finished, by what was agreed on.", "version", "group", "resumed")
	reloadsDesc    = desc("config_reloads_total", "Attempts to read the configuration again, by result.", "result")
	portsDesc      = desc("ports", "Ports that are listened on, by how: with a socket of their own on each loop, or steered (sk_lookup) to one that they share.", "how")
	loopConnsDesc  = desc("loop_connections_accepted_total", "Connections accepted by each event loop.", "loop")
	loopSlowDesc   = desc("loop_slow_rounds_total", "Rounds of each event loop that took more than 10 ms: its connections waited as long.", "loop")
	loopLongDesc   = desc("loop_longest_round_seconds", "The longest round of each event loop since the start; 0 while none has taken a millisecond.", "loop")
	loopLagDesc    = desc("loop_lag_seconds", "The longest round of each event loop in the last one or two minutes: connections waited as long. 0 when none took a millisecond.", "loop")
	ktlsDesc       = desc("ktls_halves_total", "Directions of TLS connections that streamed and went to the kernel: tx is what is sent.", "direction")
	fallbackDesc   = desc("ktls_fallbacks_total", "Directions of TLS connections that streamed and stayed in user space, by why.", "reason")
	shortagesDesc  = desc("shortages_total", "What could not be done because this process or its machine lacks something, by what it lacks and what failed. It counts against nobody else.", "lack", "failed")
	refusedDesc    = desc("refused_total", "Connections that were turned away, by the limit that they met.", "reason")
	entriesDesc    = desc("table_entries", "Entries of what grows with what clients do, and of the lists of the map.", "table")
	tableLimitDesc = desc("table_entries_limit", "Entries that the table can have; 0 while it is not needed.", "table")
	certDesc       = desc("certificate_not_after_timestamp_seconds", "When the certificate expires, of the "+strconv.Itoa(certGauges)+" that expire first.", "name", "key", "file")
	buildDesc      = desc("build_info", "Always 1; the labels say what is running.", "version", "go_version")
)

var labelledDescs = []*prometheus.Desc{outcomesDesc, cutShortDesc, bytesDesc, handshakesDesc, reloadsDesc, shortagesDesc, refusedDesc, entriesDesc, tableLimitDesc, ktlsDesc,
	fallbackDesc, portsDesc, loopConnsDesc, loopSlowDesc, loopLongDesc, loopLagDesc, certDesc, buildDesc}

// sender takes one number.
type sender func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string)

// plainMetrics are those without labels.
var plainMetrics = []struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*gateway.Status) float64
}{
	{desc("connections_accepted_total", "Connections accepted."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.Connections.Accepted) }},
	{desc("connections_open", "Connections that are open."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Connections.Open) }},
	{desc("connections_limit", "Connections that may be open at once; further ones end with outcome limited."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Connections.Limit) }},
	{desc("memory_lent_bytes", "Memory that holds what destinations have not taken yet."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Memory.Used) }},
	{desc("memory_lent_limit_bytes", "How much that may be in all (TLSNAT_MEMORY); each loop has an equal part."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Memory.Limit) }},
	{desc("tasks_running", "Checks, lookups and tries of ejected backends that are in progress."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Tasks.Running) }},
	{desc("tasks_waiting", "Checks, lookups and tries that are due and wait for others to end."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Tasks.Waiting) }},
	{desc("probe_connections_total", "Connections that left without a byte, as load balancers' probes do. They are among those with outcome ok."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.Connections.Probes) }},
	{desc("spliced_bytes_total", "Part of tlsnat_bytes_total that splice(2) moved without user space."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.Bytes.Spliced) }},
	{desc("handshakes_waiting", "ClientHellos that wait for their turn to shake hands."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Handshakes.Queued) }},
	{desc("handshakes_silent_total", "TLS handshakes that ended because the client never answered."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.Handshakes.Silent) }},
	{desc("accept_pauses_total", "Times that accepting rested, being out of descriptors or memory."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.AcceptPauses) }},
	{desc("log_lines_dropped_total", "Log lines lost because whatever they are written to did not take them: too slow, full or gone."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.LinesDropped) }},
	{desc("bandwidth_pauses_total", "Times that a stream waited for its bandwidth="), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.Gate.Paused) }},
	{desc("log_lines_withheld_total", "Connections without a line of their own in the log, because their client had many like it. They are counted there."), prometheus.CounterValue,
		func(s *gateway.Status) float64 { return float64(s.Gate.Unlogged) }},
	{desc("draining", "1 while the gateway drains."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return number(s.Draining) }},
	{desc("config_generation", "Number of the configuration that new connections get."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Generation) }},
	{desc("config_generations", "Configurations that connections run under: the current one, and older ones until their last connection ends."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Generations) }},
	{desc("config_reload_timestamp_seconds", "When it was tried last to read the configuration again; 0: never."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 {
			if s.Reloads.Last == nil {
				return 0
			}
			return seconds(s.Reloads.Last.At)
		}},
	{desc("config_reload_success_timestamp_seconds", "When the configuration was read last without an error."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return seconds(s.Reloads.Since) }},
	{desc("config_reload_ok", "0 when the last attempt to read the configuration failed, and the one before is still served."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return number(s.Reloads.Last == nil || s.Reloads.Last.OK) }},
	{desc("config_unusable_files", "Errors about single files (certificates, CAs, lists) of the configuration: the rest is served, and what was read from them before."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Unusable) }},
	{desc("listening_sockets", "Sockets that listen on the ports of the map, on all loops."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Listening.Sockets) }},
	{desc("certificates", "Certificates that are served."), prometheus.GaugeValue,
		func(s *gateway.Status) float64 { return float64(s.Certificates) }},
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Describe and Collect make the Server a prometheus.Collector.
func (s *Server) Describe(to chan<- *prometheus.Desc) {
	for _, d := range slices.Concat(labelledDescs, backendDescs, durationDescs, adminDescs) {
		to <- d
	}
	for i := range plainMetrics {
		to <- plainMetrics[i].desc
	}
}

// Collect reads everything once.
func (s *Server) Collect(to chan<- prometheus.Metric) {
	status := s.status()
	var send sender = func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	for _, m := range plainMetrics {
		send(m.desc, m.kind, m.value(&status))
	}
	for outcome, n := range status.Connections.Outcomes {
		send(outcomesDesc, prometheus.CounterValue, float64(n), outcome)
	}
	for side, n := range status.Connections.CutShort {
		send(cutShortDesc, prometheus.CounterValue, float64(n), side)
	}
	send(bytesDesc, prometheus.CounterValue, float64(status.Bytes.Up), "up")
	send(bytesDesc, prometheus.CounterValue, float64(status.Bytes.Down), "down")
	for _, k := range status.Handshakes.Kinds {
		send(handshakesDesc, prometheus.CounterValue, float64(k.Count), k.Version, k.Group, strconv.FormatBool(k.Resumed))
	}
	send(reloadsDesc, prometheus.CounterValue, float64(status.Reloads.OK), "ok")
	send(reloadsDesc, prometheus.CounterValue, float64(status.Reloads.Failed), "error")
	send(portsDesc, prometheus.GaugeValue, float64(status.Ports-status.Listening.Steered), "socket")
	send(portsDesc, prometheus.GaugeValue, float64(status.Listening.Steered), "steered")
	for i, l := range status.PerLoop {
		loop := strconv.Itoa(i)
		send(loopConnsDesc, prometheus.CounterValue, float64(l.Accepted), loop)
		send(loopSlowDesc, prometheus.CounterValue, float64(l.SlowRounds), loop)
		send(loopLongDesc, prometheus.GaugeValue, l.LongestRound/1000, loop)
		send(loopLagDesc, prometheus.GaugeValue, l.Lag/1000, loop)
	}
	send(ktlsDesc, prometheus.CounterValue, float64(status.Kernel.TX), "tx")
	send(ktlsDesc, prometheus.CounterValue, float64(status.Kernel.RX), "rx")
	for reason, n := range status.Kernel.Fallbacks {
		send(fallbackDesc, prometheus.CounterValue, float64(n), reason)
	}
	for _, x := range s.gateway.Shortages() {
		send(shortagesDesc, prometheus.CounterValue, float64(x.Count), x.Of, x.In)
	}
	for reason, n := range status.Gate.Refused {
		send(refusedDesc, prometheus.CounterValue, float64(n), reason)
	}
	for _, t := range status.Gate.Tables {
		send(entriesDesc, prometheus.GaugeValue, float64(t.Entries), t.Name)
		send(tableLimitDesc, prometheus.GaugeValue, float64(t.Limit), t.Name)
	}
	s.collectCerts(send)
	s.collectBackends(send)
	s.collectDurations(to, &status)
	s.collectAdmin(send)
	send(buildDesc, prometheus.GaugeValue, 1, s.version, runtime.Version())
}

// collectCerts tells certificates apart by their first name, key and file. If that's not enough the one that expires
// first counts.
func (s *Server) collectCerts(send sender) {
	type labels struct{ name, key, file string }
	seen := map[labels]bool{}
	for _, c := range s.gateway.Certificates(certGauges) {
		l := labels{firstName(&c), c.KeyType, strings.ToValidUTF8(c.File, "?")} // a path may be any bytes, a label not
		if !seen[l] {
			seen[l] = true
			send(certDesc, prometheus.GaugeValue, float64(c.NotAfter.Unix()), l.name, l.key, l.file)
		}
	}
}

func firstName(c *gateway.CertInfo) string {
	switch {
	case len(c.Names) > 0:
		return c.Names[0]
	case len(c.Addrs) > 0:
		return c.Addrs[0].String()
	}
	return ""
}
