// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/tlsnat/tlsnat/docs"
	"github.com/tlsnat/tlsnat/natmap"
)

// help prints a page of the documents, or what their tables say about a word.
func (p *program) help(args []string) int {
	if len(args) == 0 {
		fmt.Fprint(p.out, usage, "\n", topicList())
		return exitOK
	}
	if len(args) > 1 {
		fmt.Fprintf(p.err, "tlsnat help: takes one topic, but got %q\n", args)
		return exitUsage
	}
	topic := strings.TrimSuffix(args[0], "=")
	text, isPage := docs.Page(topic)
	rows := docs.Rows(topic)
	switch {
	case isPage:
		fmt.Fprint(p.out, text)
	case len(rows) > 0:
		p.printRows(rows)
	default:
		fmt.Fprintf(p.err, "tlsnat help: there is no topic %q; %s\n\n%s", args[0], suggestTopic(topic), topicList())
		return exitUsage
	}
	return exitOK
}

// topicList is every page with its title.
func topicList() string {
	var b strings.Builder
	b.WriteString("Topics of 'tlsnat help TOPIC'. An option, a setting, an outcome or a metric is a topic as well.\n\n")
	for _, t := range docs.Topics() {
		fmt.Fprintf(&b, "  %-16s  %s\n", t.Name, t.Title)
	}
	return b.String()
}

func suggestTopic(slip string) string {
	var names []string
	for _, t := range docs.Topics() {
		names = append(names, t.Name)
	}
	for _, o := range natmap.OptionDocs() {
		names = append(names, o.Key)
	}
	if near := natmap.Nearest(slip, names); near != "" {
		return "did you mean " + near + "?"
	}
	return "these are there:"
}

// printRows prints each row with the names of its columns.
func (p *program) printRows(rows []docs.Row) {
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	for i, r := range rows {
		if i > 0 {
			fmt.Fprintln(w)
		}
		for n, cell := range r.Cells {
			if cell != "" && n < len(r.Names) {
				fmt.Fprintf(w, "%s\t%s\n", r.Names[n], strings.ReplaceAll(cell, "`", ""))
			}
		}
		fmt.Fprintf(w, "read on\ttlsnat help %s\n", r.Topic)
	}
	w.Flush()
}
