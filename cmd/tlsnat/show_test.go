// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
)

// TestShowConnsOfSomebody: those of a client, and a page at a time.
func TestShowConnsOfSomebody(t *testing.T) {
	r := runGateway(t)
	for range 3 {
		echo(t, r.dial(t), "x")
	}
	shown := func(args ...string) (a admin.ConnsAnswer) {
		t.Helper()
		out, code := r.ask(t, append([]string{"show", "conns", "--json"}, args...)...)
		if err := json.Unmarshal([]byte(out), &a); err != nil || code != exitOK {
			t.Fatalf("%q: exit code %d, %v: %s", args, code, err, out)
		}
		return a
	}
	backend := r.backend.Addr().String()
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"--client", "127.0.0.1"}, 3}, {[]string{"--client", "127.0.0.0/8", "--stage", "relay"}, 3}, {[]string{"--client", "192.0.2.7"}, 0},
		{[]string{"--backend", backend, "--name", "api.bank.example"}, 3}, {[]string{"--name", "www.bank.example"}, 0}, {[]string{"--rule", "edge.natmap:9"}, 0},
	} {
		if a := shown(c.args...); len(a.Connections) != c.want || a.Total != 3 {
			t.Errorf("%q: %d of %d connections, want %d", c.args, len(a.Connections), a.Total, c.want)
		}
	}
	if out, code := r.ask(t, "show", "conns", "--stage", "lunch"); code != exitInput || !strings.Contains(out, "write stage= with one of") {
		t.Errorf("exit code %d: %s", code, out)
	}
	page := shown("--limit", "2")
	if rest := shown("--limit", "2", "--after", page.Next); len(page.Connections) != 2 || len(rest.Connections) != 1 || rest.Next != "" {
		t.Errorf("%d and %d connections", len(page.Connections), len(rest.Connections))
	}
	if out, code := r.ask(t, "show", "conns", "--limit", "2"); code != exitOK || !strings.Contains(out, "2 shown, 3 open") || !strings.Contains(out, "--after "+page.Next) {
		t.Errorf("exit code %d: %s", code, out)
	}
	for _, args := range [][]string{{"show", "conns", "--client", "me"}, {"show", "map", "--client", "127.0.0.1"}} {
		if out, code := r.ask(t, args...); code != exitUsage || !strings.Contains(out, "--client ADDRESS|PREFIX") {
			t.Errorf("%q: exit code %d: %s", args, code, out)
		}
	}
	if out, code := r.ask(t, "show", "conns", "--limit", "1001"); code != exitInput || !strings.Contains(out, "write limit= with a number from 0 to 1000") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// TestShowMapTellsHowPortsAreListenedOn where ranges are wide, and why they are not steered.
func TestShowMapTellsHowPortsAreListenedOn(t *testing.T) {
	for _, c := range []struct {
		is   gateway.ListeningStatus
		want string
	}{
		{gateway.ListeningStatus{Sockets: 6}, ""},
		{gateway.ListeningStatus{Sockets: 4, Steered: 50_000}, "\n50000 ports are steered; 4 sockets for all ports and loops\n"},
		{gateway.ListeningStatus{Sockets: 1000, Beside: 500, Reason: "the right is missing"},
			"\n500 ports of wide ranges not steered, but with a socket on each loop: the right is missing\n"},
	} {
		var out strings.Builder
		showMap(&out, admin.MapAnswer{Listening: c.is})
		if _, behind, _ := strings.Cut(out.String(), "RULE\n"); behind != c.want {
			t.Errorf("%+v: %q, want %q", c.is, behind, c.want)
		}
	}
}

// TestShowIsWatched on a terminal, where each table takes the place of the one before.
func TestShowIsWatched(t *testing.T) {
	r := runGateway(t)
	terminal, side := openTerminal(t, 120)
	cmd := command(t, r.dir, []string{"TLSNAT_ADMIN=" + r.admin}, "show", "conns", "--watch")
	cmd.Stdout = side
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	side.Close()
	_ = terminal.SetReadDeadline(time.Now().Add(patience))
	text := bufio.NewReader(terminal)
	read := func(until byte) string {
		t.Helper()
		s, err := text.ReadString(until)
		if err != nil {
			t.Fatalf("%q, %v", s, err)
		}
		return s
	}
	if first := read('\n'); !strings.HasPrefix(first, "\x1b[H\x1b[2JID ") {
		t.Errorf("%q", first)
	}
	echo(t, r.dial(t), "x")
	for table := ""; !strings.Contains(table, "api.bank.example"); {
		table = read('J')
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, text) // ends with EIO when the other side is closed
	if err := cmd.Wait(); err != nil {
		t.Errorf("Ctrl-C: %v", err)
	}
}

// TestExplainKnowsTheRunningGateway: whose map may be another one.
func TestExplainKnowsTheRunningGateway(t *testing.T) {
	r := runGateway(t)
	_, port, _ := net.SplitHostPort(r.backend.Addr().String())
	explain := func(admin, backend string) string {
		t.Helper()
		environ := []string{"TLSNAT_MAP=:443 api.bank.example -> " + backend, "TLSNAT_CERTS=certs", "TLSNAT_ADMIN=" + admin}
		a := finish(t, command(t, r.dir, environ, "explain", "--port", "443", "--sni", "api.bank.example"))
		if a.code != exitOK {
			t.Fatal(a)
		}
		return a.out
	}
	for _, c := range []struct{ admin, backend, want string }{
		{r.admin, "127.0.0.1:" + port, "up, 0 connections open"},
		{r.admin, "192.0.2.9:80", "the running gateway does not know it"},
		{"127.0.0.1:1", "192.0.2.9:80", "not known: no gateway answers at http://127.0.0.1:1"},
		{"off", "192.0.2.9:80", "not known: the admin is switched off"},
	} {
		if out := explain(c.admin, c.backend); !strings.Contains(out, c.want) {
			t.Errorf("%s, %s: want %q in\n%s", c.admin, c.backend, c.want, out)
		}
	}
}
