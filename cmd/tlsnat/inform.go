// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/tlsnat/tlsnat/gateway"
)

func (p *program) check(args []string) int {
	if !p.noArguments("check", args) {
		return exitUsage
	}
	config, ok := p.config()
	if !ok {
		return exitInput
	}
	fmt.Fprintf(p.out, "ok: %d rules\n", len(config.Map.Rules))
	return exitOK
}

func (p *program) env(args []string) int {
	if !p.noArguments("env", args) {
		return exitUsage
	}
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	for _, d := range gateway.SettingDocs() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", d.Name, d.Type, d.Default, d.Doc)
	}
	_ = w.Flush()
	return exitOK
}

func (p *program) version(args []string) int {
	fmt.Fprintln(p.out, "tlsnat")
	return exitOK
}

func (p *program) explain(args []string) int { return exitOK }
