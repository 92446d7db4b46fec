// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
)

// chart is a picture of panels; each panel has a scale of its own, from zero.
type chart struct {
	file   string
	title  string
	panels []row
}

var charts = []chart{
	{"cpu.svg", "CPU time of the gateway for a unit of work; shorter is better", []row{
		{"full handshake + echo", "Handshake/ecdsa", cpuPerOp},
		{"resumed handshake + echo", "Handshake/resumed", cpuPerOp},
		{"echo of 256 B", "Echo/256B", cpuPerOp},
		{"echo of 256 B, 4,000 connections", "Crowd/4000", cpuPerOp},
		{"bulk, backend to client", "Bulk/down", cpuPerGiB},
		{"bulk, client to backend", "Bulk/up", cpuPerGiB},
		{"mode=pass, bulk down", "Passthrough/pass-down", cpuPerGiB},
		{"mode=tcp, bulk down", "Passthrough/tcp-down", cpuPerGiB},
	}},
	{"memory.svg", "Memory a connection adds (PSS); shorter is better", []row{
		{"idle, 4,000 connections", "Idle/4000", memory},
		{"half a ClientHello, 4,000 connections", "HalfHello/4000", memory},
	}},
	{"latency.svg", "p99 of a 256 B echo on an established connection; shorter is better", []row{
		{"nothing else to do", "Latency/quiet", tail},
		{"beside 4 streams of 50 MiB/s", "Latency/bulk", tail},
		{"beside hellos at half capacity", "Latency/half", tail},
		{"beside hellos at twice capacity", "Latency/twice", tail},
	}},
}

// The measures of the picture, in pixels. Two panels beside each other fit the width of a page on GitHub (880).
const (
	panelWidth = 440
	barLeft    = 66  // room for the longest name
	barMost    = 290 // leaves room for the value behind the longest bar
	barStep    = 19
	barHeight  = 13
	headHeight = 30
	titleSpace = 34
)

// style draws on no background, in colours that carry on white and on GitHub's dark page.
const style = `<style>
text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.t{font-size:14px;font-weight:600}.h{font-weight:600}.n{text-anchor:end}.d{fill:#59636e}
.us{fill:#0a7d6c}.them{fill:#afb8c1}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.d{fill:#9198a1}.us{fill:#2fbfa5}.them{fill:#57606a}}
</style>
`

// draw is the whole SVG. A gateway that was not measured at all has no bar; one that does not do a panel's work has a dash.
func (c chart) draw(m *measured) []byte {
	names := m.present()
	panelHeight := headHeight + barStep*len(names) + 12
	height := titleSpace + panelHeight*((len(c.panels)+1)/2)
	var out bytes.Buffer
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img" aria-label="%[3]s">`+"\n",
		2*panelWidth, height, escape(c.title))
	out.WriteString(style)
	fmt.Fprintf(&out, `<text class="t" x="0" y="18">%s</text>`+"\n", escape(c.title))
	for i, p := range c.panels {
		fmt.Fprintf(&out, `<g transform="translate(%d,%d)">`+"\n", i%2*panelWidth, titleSpace+i/2*panelHeight)
		p.drawPanel(&out, m, names)
		out.WriteString("</g>\n")
	}
	out.WriteString("</svg>\n")
	return out.Bytes()
}

func (p row) drawPanel(out *bytes.Buffer, m *measured, names []string) {
	fmt.Fprintf(out, `<text class="h" x="0" y="18">%s<tspan class="d" dx="6">%s</tspan></text>`+"\n", escape(p.title), escape(p.unit))
	longest := 0.0
	for _, name := range names {
		v, _ := m.median(key{p.workload, name, p.metric})
		longest = max(longest, v)
	}
	for i, name := range names {
		y := headHeight + i*barStep
		fmt.Fprintf(out, `<text class="n" x="%d" y="%d">%s</text>`, barLeft-6, y+11, escape(name))
		v, ok := m.median(key{p.workload, name, p.metric})
		if !ok {
			fmt.Fprintf(out, `<text class="d" x="%d" y="%d">–</text>`+"\n", barLeft, y+11)
			continue
		}
		width := 1.0 // zero is seen, too
		if longest > 0 {
			width = max(1, v/longest*barMost)
		}
		fmt.Fprintf(out, `<rect class="%s" x="%d" y="%d" width="%.1f" height="%d" rx="2"/>`, barClass(name), barLeft, y, width, barHeight)
		fmt.Fprintf(out, `<text x="%.1f" y="%d">%s</text>`+"\n", barLeft+width+6, y+11, p.show(v))
	}
}

func barClass(name string) string {
	if name == us {
		return "us"
	}
	return "them"
}

func escape(s string) string {
	var out bytes.Buffer
	xml.EscapeText(&out, []byte(s))
	return out.String()
}
