// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

// client is who to ask about the running gateway: the admin that the settings name. What is wrong with other settings does
// not matter here.
func (p *program) client() (*admin.Client, error) {
	s, err := config.ReadSettings(p.environ)
	for _, e := range joined(err) {
		if wrong, ok := errors.AsType[*config.SettingError](e); ok && (strings.HasPrefix(wrong.Key, config.Prefix+"ADMIN_TOKEN") || wrong.Key == "CREDENTIALS_DIRECTORY") {
			return nil, e
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	return admin.Connect(ctx, s)
}

// view is a thing to show: how to get it, and how it looks as a table.
type view struct {
	get   func(ctx context.Context, c *admin.Client, q gateway.ConnQuery) (any, error)
	table func(w io.Writer, answer any)
}

// viewOf makes a view of typed functions.
func viewOf[T any](get func(*admin.Client, context.Context, gateway.ConnQuery) (T, error), table func(io.Writer, T)) view {
	return view{
		get:   func(ctx context.Context, c *admin.Client, q gateway.ConnQuery) (any, error) { return get(c, ctx, q) },
		table: func(w io.Writer, answer any) { table(w, answer.(T)) },
	}
}

// listOf is a view of what is asked for by nothing but a number.
func listOf[T any](get func(*admin.Client, context.Context, int) (T, error), table func(io.Writer, T)) view {
	return viewOf(func(c *admin.Client, ctx context.Context, q gateway.ConnQuery) (T, error) {
		return get(c, ctx, q.Limit)
	}, table)
}

var views = map[string]view{
	"map":      listOf((*admin.Client).Map, showMap),
	"conns":    viewOf((*admin.Client).Conns, showConns),
	"backends": listOf((*admin.Client).Backends, showBackends),
	"certs":    listOf((*admin.Client).Certs, showCerts),
	"generations": listOf(func(c *admin.Client, ctx context.Context, _ int) (admin.GenerationsAnswer, error) {
		return c.Generations(ctx)
	}, showGenerations),
}

// sight is what somebody wants to see, and how.
type sight struct {
	view
	query         gateway.ConnQuery
	asJSON, watch bool
}

// readSight reads the arguments of show. Which connections are meant can be said of connections only.
func readSight(args []string) (s sight, ok bool) {
	what := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		what, args = args[0], args[1:]
	}
	s.view, ok = views[what]
	flags := flag.NewFlagSet("show", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.BoolVar(&s.asJSON, "json", false, "")
	flags.BoolVar(&s.watch, "watch", false, "")
	flags.IntVar(&s.query.Limit, "limit", 100, "")
	if what == "conns" {
		flags.Func("client", "", func(v string) (err error) {
			s.query.Client, err = admin.ParsePrefix(v)
			return err
		})
		for name, to := range map[string]*string{"listen": &s.query.Listen, "name": &s.query.Name, "rule": &s.query.Rule, "backend": &s.query.Backend,
			"stage": &s.query.Stage, "after": &s.query.After} {
			flags.StringVar(to, name, "", "")
		}
	}
	return s, ok && flags.Parse(args) == nil && flags.NArg() == 0
}

// show prints tables of the running gateway, as a switch does.
func (p *program) show(args []string) int {
	s, ok := readSight(args)
	if !ok {
		fmt.Fprintf(p.err, "tlsnat show: write tlsnat show %s [--json] [--watch] [--limit N];\n"+
			"of conns [--client ADDRESS|PREFIX] [--listen LISTEN] [--name NAME] [--rule FILE:LINE] [--backend ADDRESS] [--stage STAGE] [--after NEXT]\n",
			strings.Join(slices.Sorted(maps.Keys(views)), "|"))
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for first := true; ; first = false {
		switch err := p.showOnce(ctx, s); {
		case ctx.Err() != nil:
			return exitOK
		case err != nil && first:
			return p.refused(err)
		case err != nil:
			fmt.Fprintln(p.err, err) // it may be back for the next look
		case !s.watch:
			return exitOK
		}
		const again = 2 * time.Second
		select {
		case <-ctx.Done():
			return exitOK
		case <-time.After(again):
		}
	}
}

// showOnce prints it. Who watches sees each table where the one before stood on a terminal, and behind a blank line
// elsewhere; JSON is a line each.
func (p *program) showOnce(ctx context.Context, s sight) error {
	c, err := p.client()
	if err != nil {
		return err
	}
	answer, err := s.get(ctx, c, s.query)
	if err != nil {
		return err
	}
	if s.asJSON {
		text, err := json.Marshal(answer)
		if err == nil {
			_, err = p.out.Write(append(printable.JSON(text), '\n'))
		}
		return err
	}
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	s.table(w, answer)
	w.Flush()
	before, after := "", ""
	switch {
	case s.watch && p.onTerminal():
		before = "\x1b[H\x1b[2J" // cursor home, erase the screen (ECMA-48, CUP and ED)
	case s.watch:
		after = "\n"
	}
	_, err = fmt.Fprint(p.out, before, text.String(), after)
	return err
}

// row writes the cells of a line of a table. What comes from clients has nothing in it that a terminal obeys.
func row(w io.Writer, cells ...any) {
	for i, cell := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		text := fmt.Sprint(cell)
		if text == "" {
			text = "-"
		}
		fmt.Fprint(w, shown(text))
	}
	fmt.Fprintln(w)
}

// printable is a cell of a table. What is longer than a name can be is cut: nobody reads it there, and --json has it.
func shown(s string) string { return printable.Text(s, 1024) }

func showMap(w io.Writer, a admin.MapAnswer) {
	row(w, "LISTEN", "NAME", "TO", "MODE", "OPEN", "TOTAL", "RULE")
	for _, r := range a.Rules {
		to := strings.Join(r.Backends, " ")
		if to == "" {
			to = r.Action
		}
		name := r.Name
		if r.Protocol != "" {
			name = strings.TrimSpace("alpn:" + r.Protocol + " " + name)
		}
		row(w, r.Listen, name, to, r.Mode, r.Open, r.Total, r.Rule)
	}
	more(w, len(a.Rules), a.Total)
	showListening(w, a.Listening)
}

// showListening says of wide port ranges how they are listened on. Of other ports there is nothing to say.
func showListening(w io.Writer, l gateway.ListeningStatus) {
	if l.Steered > 0 {
		fmt.Fprintf(w, "\n%s are steered; %s for all ports and loops\n", count(l.Steered, "port"), count(l.Sockets, "socket"))
	}
	if l.Beside > 0 {
		fmt.Fprintf(w, "\n%s of wide ranges not steered, but with a socket on each loop: %s\n", count(l.Beside, "port"), shown(l.Reason))
	}
}

func showConns(w io.Writer, a admin.ConnsAnswer) {
	row(w, "ID", "CLIENT", "LISTEN", "SNI", "TLS", "BACKEND", "STAGE", "UP", "DOWN", "AGE", "IDLE", "RULE")
	for _, c := range a.Connections {
		row(w, c.ID, c.Client, c.Listen, c.SNI, c.TLS, c.Backend, c.Stage, size(c.Up), size(c.Down), since(c.AgeMS), since(c.IdleMS), c.Rule)
	}
	if a.Next != "" {
		fmt.Fprintf(w, "\n%d shown, %d open; --limit shows more, and --after %s those that come behind\n", len(a.Connections), a.Total, a.Next)
	}
	missing(w, a.Missing)
}

func showCerts(w io.Writer, a admin.CertsAnswer) {
	row(w, "NAMES", "KEY", "EXPIRES", "IN", "ISSUER", "FILE")
	for _, c := range a.Certificates {
		names := strings.Join(c.Names, " ")
		for _, addr := range c.Addrs {
			names += " " + addr.String()
		}
		days := int(time.Until(c.NotAfter).Hours() / 24)
		row(w, strings.TrimSpace(names), c.KeyType, c.NotAfter.UTC().Format(time.DateOnly), count(days, "day"), c.Issuer, c.File)
	}
	more(w, len(a.Certificates), a.Total)
}

// missing says that loops have not answered.
func missing(w io.Writer, loops []int) {
	if len(loops) > 0 {
		fmt.Fprintf(w, "\n%s did not answer in time: what belongs to loops %v is missing\n", count(len(loops), "event loop"), loops)
	}
}

func showGenerations(w io.Writer, a admin.GenerationsAnswer) {
	row(w, "GENERATION", "SINCE", "RULES", "CERTIFICATES", "OPEN", "OLDEST")
	for _, g := range a.Generations {
		number := fmt.Sprint(g.Number)
		if g.Current {
			number += " (current)"
		}
		row(w, number, g.Since.Local().Format(time.DateTime), g.Rules, g.Certificates, g.Open, since(g.OldestMS))
	}
	for _, g := range a.Generations {
		writeChanges(w, fmt.Sprintf("\ngeneration %d changed:\n", g.Number), g.Added, g.Removed)
	}
	missing(w, a.Missing)
}

// writeChanges lists rules that came and went, under a heading if there are any.
func writeChanges(w io.Writer, heading string, added, removed []string) {
	if len(added)+len(removed) > 0 {
		fmt.Fprint(w, heading)
	}
	for _, r := range removed {
		fmt.Fprintln(w, "  - "+shown(r))
	}
	for _, r := range added {
		fmt.Fprintln(w, "  + "+shown(r))
	}
}

func more(w io.Writer, shown, total int) {
	if shown < total {
		fmt.Fprintf(w, "\n%d of %d; --limit shows more\n", shown, total)
	}
}

func size(n int64) string {
	switch {
	case n < 10<<10:
		return fmt.Sprint(n)
	case n < 10<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

func since(ms int64) string {
	d := time.Duration(ms) * time.Millisecond
	if d < 10*time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

// reload has the running gateway read its map and certificates again, and says what came of it.
func (p *program) reload(args []string) int {
	if !p.noArguments("reload", args) {
		return exitUsage
	}
	c, err := p.client()
	if err != nil {
		return p.cannot(err)
	}
	r, err := c.Reload(context.Background())
	if err != nil {
		return p.cannot(err)
	}
	for _, problem := range r.Problems {
		fmt.Fprintln(p.err, problem)
	}
	if !r.OK {
		fmt.Fprintf(p.err, "not reloaded: generation %d is still served\n", r.Generation)
		return exitInput
	}
	if r.Unusable > 0 {
		defer fmt.Fprintf(p.err, "reloaded, but not all: %s of single files, see above; what was read from them before is still served\n", count(r.Unusable, "error"))
	}
	fmt.Fprintf(p.out, "reloaded in %s: generation %d, %s\n", since(r.TookMS), r.Generation, changes(r))
	writeChanges(p.out, "", r.Added, r.Removed)
	if r.Unusable > 0 {
		return exitInput
	}
	return exitOK
}

func changes(r gateway.Reloaded) string {
	if len(r.Added)+len(r.Removed) == 0 {
		return "the same rules"
	}
	return fmt.Sprintf("%s added, %d removed", count(len(r.Added), "rule"), len(r.Removed))
}
