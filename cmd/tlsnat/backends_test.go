// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strconv"
	"strings"
	"testing"
)

// TestBackendIsTakenOutByCommand: over a reload, until it is ready again. The tables and explain say how it is.
func TestBackendIsTakenOutByCommand(t *testing.T) {
	r := runGateway(t)
	backend := r.backend.Addr().String()
	held := r.dial(t)
	echo(t, held, "x")
	said := func(code int, words []string, args ...string) {
		t.Helper()
		if out, got := r.ask(t, args...); got != code || !hasAll(out, words) {
			t.Errorf("tlsnat %s: exit code %d, want %q in\n%s", strings.Join(args, " "), got, words, out)
		}
	}
	explained := func(words ...string) {
		t.Helper()
		environ := []string{"TLSNAT_MAP_FILE=edge.natmap", "TLSNAT_CERTS=certs", "TLSNAT_ADMIN=" + r.admin}
		a := finish(t, command(t, r.dir, environ, "explain", "--port", strconv.Itoa(r.port), "--sni", "api.bank.example"))
		if a.code != exitOK || !hasAll(a.out, words) {
			t.Errorf("explain doesn't say %q:\n%s", words, a)
		}
	}
	explained(backend, "every connection", "up, 1 connection open")
	said(exitOK, []string{backend, "gets no new connections"}, "backend", "drain", backend)
	explained("draining, 1 connection open (an operator has said so)")
	r.writeMap(t, "drain=1h")
	said(exitOK, nil, "reload")
	said(exitOK, []string{backend, "draining"}, "show", "backends")
	echo(t, held, "goes on")
	c := r.dial(t)
	if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "internal error") {
		t.Errorf("a new connection sees %v", err)
	}
	said(exitOK, []string{"maintenance"}, "backend", "maintain", backend)
	said(exitOK, []string{backend, "is ready"}, "backend", "ready", backend)
	echo(t, r.dial(t), "y")
	said(exitInput, []string{"no backend of the map is called"}, "backend", "drain", "192.0.2.7:1")
	said(exitUsage, []string{"drain|maintain|ready"}, "backend", "stop", backend)
}
