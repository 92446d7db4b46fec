// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"strings"
)

// table is a section of the report: a row for each piece of work.
type table struct {
	title string
	rows  []row
}

type row struct {
	title    string
	workload string
	scale
}

var sections = []table{
	{"CPU time of the gateway", []row{
		{"full handshake + 256 B echo, ECDSA P-256", "Handshake/ecdsa", cpuPerOp},
		{"the same, RSA-2048", "Handshake/rsa", cpuPerOp},
		{"the same, X25519MLKEM768", "Handshake/mlkem", cpuPerOp},
		{"the same, TLS 1.2", "Handshake/tls12", cpuPerOp},
		{"resumed handshake + 256 B echo", "Handshake/resumed", cpuPerOp},
		{"echo of 256 B, 64 connections", "Echo/256B", cpuPerOp},
		{"echo of 4 KiB, 64 connections", "Echo/4KiB", cpuPerOp},
		{"echo of 256 B, 64 busy and 2,000 idle", "Crowd/64of2064", cpuPerOp},
		{"echo of 256 B, 4,000 connections", "Crowd/4000", cpuPerOp},
		{"bulk, backend to client", "Bulk/down", cpuPerGiB},
		{"bulk, client to backend", "Bulk/up", cpuPerGiB},
		{"bulk, both at once", "Bulk/both", cpuPerGiB},
		{"`mode=pass` bulk down", "Passthrough/pass-down", cpuPerGiB},
		{"`mode=pass` bulk up", "Passthrough/pass-up", cpuPerGiB},
		{"`mode=pass` echo of 256 B", "Passthrough/pass-echo", cpuPerOp},
		{"`mode=tcp` bulk down", "Passthrough/tcp-down", cpuPerGiB},
		{"`mode=tcp` bulk up", "Passthrough/tcp-up", cpuPerGiB},
		{"`mode=tcp` echo of 256 B", "Passthrough/tcp-echo", cpuPerOp},
		{"`mode=tcp` bulk down, HAProxy as its manual has it", "Manual/tcp-down", cpuPerGiB},
		{"`mode=tcp` bulk up, HAProxy as its manual has it", "Manual/tcp-up", cpuPerGiB},
		{"half a ClientHello accepted", "HalfHello/4000", cpuPerOp},
		{"an idle connection, of 8,000", "Idle/8000", idleCPU},
	}},
	{"tlsnat's CPU time as a multiple of the best peer's, all at work by turns of a tenth of a second", []row{
		{"full handshake + 256 B echo, ECDSA P-256", "Beside/handshake", timesBest},
		{"the same, RSA-2048", "Beside/rsa", timesBest},
		{"resumed handshake + 256 B echo", "Beside/resumed", timesBest},
		{"echo of 256 B, 64 connections", "Beside/echo", timesBest},
		{"bulk, backend to client", "Beside/down", timesBest},
		{"bulk, client to backend", "Beside/up", timesBest},
		{"`mode=tcp` echo of 256 B", "Beside/tcp-echo", timesBest},
		{"`mode=tcp` bulk down", "Beside/tcp-down", timesBest},
		{"`mode=tcp` bulk up", "Beside/tcp-up", timesBest},
	}},
	{"TLS to the backend, and a second event loop", []row{
		{"bulk down, TLS ends here", "Reencrypt/terminate-down", cpuPerGiB},
		{"the same, encrypted again to the backend", "Reencrypt/reencrypt-down", cpuPerGiB},
		{"bulk up, TLS ends here", "Reencrypt/terminate-up", cpuPerGiB},
		{"the same, encrypted again to the backend", "Reencrypt/reencrypt-up", cpuPerGiB},
		{"echo of 256 B, TLS ends here", "Reencrypt/terminate-echo", cpuPerOp},
		{"the same, encrypted again to the backend", "Reencrypt/reencrypt-echo", cpuPerOp},
		{"echo of 256 B, one loop on two cores", "Loops/one-echo", cpuPerOp},
		{"the same, two loops", "Loops/two-echo", cpuPerOp},
		{"bulk down, one loop on two cores", "Loops/one-down", cpuPerGiB},
		{"the same, two loops", "Loops/two-down", cpuPerGiB},
		{"bulk up, one loop on two cores", "Loops/one-up", cpuPerGiB},
		{"the same, two loops", "Loops/two-up", cpuPerGiB},
	}},
	{"A map of 10,000 rules with lists, limits, checks and balancing", []row{
		{"full handshake + 256 B echo", "Switch/handshake", cpuPerOp},
		{"times that of four rules without options", "Switch/handshake", timesBare},
		{"echo of 256 B", "Switch/echo", cpuPerOp},
		{"times that of four rules without options", "Switch/echo", timesBare},
		{"bulk down", "Switch/down", cpuPerGiB},
		{"times that of four rules without options", "Switch/down", timesBare},
		{"bulk up", "Switch/up", cpuPerGiB},
		{"times that of four rules without options", "Switch/up", timesBare},
	}},
	{"Memory and descriptors a connection adds", []row{
		{"idle, terminated, 1,000", "Idle/1000", memory},
		{"idle, terminated, 4,000", "Idle/4000", memory},
		{"idle, terminated, 8,000", "Idle/8000", memory},
		{"half a ClientHello, 4,000", "HalfHello/4000", memory},
		{"descriptors, idle", "Idle/4000", files},
		{"descriptors, half a ClientHello", "HalfHello/4000", files},
	}},
	{"Latency of a 256 B echo on an established connection, 1,000 a second on 64 of them", []row{
		{"p50, nothing else to do", "Latency/quiet", middle},
		{"p99, nothing else to do", "Latency/quiet", tail},
		{"p99, beside 4 bulk streams of 50 MiB/s each", "Latency/bulk", tail},
		{"p99, beside 4 bulk streams as fast as they go", "Latency/flood", tail},
		{"p99, beside hellos at half the gateway's capacity", "Latency/half", tail},
		{"p99, beside hellos at twice the gateway's capacity", "Latency/twice", tail},
	}},
	{"Throughput and wall time with the gateway on one core", []row{
		{"bulk, backend to client", "Bulk/down", throughput},
		{"bulk, client to backend", "Bulk/up", throughput},
		{"bulk, both at once", "Bulk/both", throughput},
		{"`mode=tcp` bulk down", "Passthrough/tcp-down", throughput},
		{"full handshake + 256 B echo", "Handshake/ecdsa", wall},
		{"p99 of that, 16 clients at once", "Handshake/ecdsa", tail},
		{"echo of 256 B, 64 connections", "Echo/256B", wall},
		{"p99 of that", "Echo/256B", tail},
	}},
}

// summary is what the repository's README shows: three figures. The rest, also what others do better, is in the report.
var summary = table{rows: []row{
	{"full handshake + 256 B echo, ECDSA P-256", "Handshake/ecdsa", cpuPerOp},
	{"bulk, backend to client", "Bulk/down", cpuPerGiB},
	{"memory of an idle connection", "Idle/4000", memory},
}}

// short is the summary with what it rests on.
func (m *measured) short() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "![%s](bench/charts/%s)\n\n", charts[0].title, charts[0].file)
	m.writeTable(&out, summary)
	var versions []string
	for _, g := range m.present() {
		if words, _, _ := strings.Cut(m.fact("peer-"+g), ","); words != "" && g != us {
			versions = append(versions, words)
		}
	}
	fmt.Fprintf(&out, "Medians of %d rounds on %s, the gateway on one core; CPU time for a unit of work unless the unit says otherwise. Beside it: %s.\n",
		m.rounds(), m.fact("cpu"), strings.Join(versions, "; "))
	return out.Bytes()
}

// tables are everything that stands between the markers of the report's README.
func (m *measured) tables() []byte {
	var out bytes.Buffer
	m.writeConditions(&out)
	for _, c := range charts {
		fmt.Fprintf(&out, "![%s](charts/%s)\n\n", c.title, c.file)
	}
	for _, t := range sections {
		m.writeTable(&out, t)
	}
	return out.Bytes()
}

// writeTable writes a section. The ratio is our figure to the best of the peers'; below 1 is better, or above 1 where more is better.
func (m *measured) writeTable(out *bytes.Buffer, t table) {
	columns := m.present()
	if t.title != "" {
		fmt.Fprintf(out, "### %s\n\n", t.title)
	}
	fmt.Fprintf(out, "| | unit | %s | no gateway | tlsnat to best peer |\n|---|---|%s\n",
		strings.Join(columns, " | "), strings.Repeat("--:|", len(columns)+2))
	for _, r := range t.rows {
		cells := []string{r.title, r.unit}
		for _, g := range append(columns, floor) {
			cells = append(cells, m.cell(r, g))
		}
		fmt.Fprintf(out, "| %s | %s |\n", strings.Join(cells, " | "), m.ratio(r))
	}
	out.WriteByte('\n')
}

// cell is a figure, bold where it is the best of all gateways, or a dash for work that the program does not do.
func (m *measured) cell(r row, gateway string) string {
	v, ok := m.median(key{r.workload, gateway, r.metric})
	if !ok {
		return "–"
	}
	if gateway == us {
		if best, ok := m.best(r.workload, r.scale); ok && v != best && r.more == (v > best) {
			return "**" + r.show(v) + "**"
		}
	}
	return r.show(v)
}

func (m *measured) ratio(r row) string {
	ours, measured := m.median(key{r.workload, us, r.metric})
	best, known := m.best(r.workload, r.scale)
	if !measured || !known || best <= 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", ours/best)
}

func (m *measured) writeConditions(out *bytes.Buffer) {
	fmt.Fprintf(out, "Medians of %d rounds. %s; %s; Linux %s; %s. Load average when the rounds began: %s.\n\n",
		m.rounds(), m.fact("cpu"), "cores: "+m.fact("cores"), m.fact("kernel"), m.fact("go"), m.fact("loadavg"))
	if note := m.fact("note"); note != "" {
		fmt.Fprintf(out, "Note: %s.\n\n", note)
	}
	if m.fact("short") == "true" {
		out.WriteString("**This was a short round: crowds of a twentieth, few repetitions. The figures are no basis for anything.**\n\n")
	}
	for _, g := range gateways {
		if words := m.fact("peer-" + g); words != "" {
			fmt.Fprintf(out, "- %s: %s\n", g, words)
		}
	}
	out.WriteByte('\n')
}
