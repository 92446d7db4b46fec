// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
)

// backend says what becomes of a backend of the running gateway.
func (p *program) backend(args []string) int {
	said := map[gateway.BackendOrder]string{
		gateway.DrainBackend:    "gets no new connections; 'tlsnat show backends' says how many are left",
		gateway.MaintainBackend: "is in maintenance: no new connections, no checks",
		gateway.ReadyBackend:    "is ready",
	}
	if len(args) != 2 || said[gateway.BackendOrder(args[0])] == "" {
		fmt.Fprintln(p.err, "tlsnat backend: write tlsnat backend drain|maintain|ready ADDRESS, with an address as 'tlsnat show backends' has it")
		return exitUsage
	}
	c, err := p.client()
	if err != nil {
		return p.cannot(err)
	}
	order := gateway.BackendOrder(args[0])
	a, err := c.OrderBackend(context.Background(), args[1], order)
	if err != nil {
		return p.refused(err)
	}
	for _, name := range a.Backends {
		fmt.Fprintln(p.out, shown(name), said[order])
	}
	return exitOK
}

// refused says why an answer is none. What the gateway does not know, or can't read, the user has written.
func (p *program) refused(err error) int {
	if e, ok := errors.AsType[*admin.Error](err); ok && (e.Status == http.StatusNotFound || e.Status == http.StatusBadRequest) {
		fmt.Fprintln(p.err, e)
		return exitInput
	}
	return p.cannot(err)
}

func showBackends(w io.Writer, a admin.BackendsAnswer) {
	row(w, "BACKEND", "STATE", "FOR", "OPEN", "TOTAL", "FAILED", "RULES", "CHECK", "REASON")
	for _, b := range a.Backends {
		name := b.Address
		if len(b.Names) > 0 {
			name += " (" + strings.Join(b.Names, " ") + ")"
		}
		row(w, name, stateOf(&b), since(time.Since(b.Since).Milliseconds()), b.Open, b.Total, b.Failures, b.Rules, checksOf(&b), b.Reason)
	}
	more(w, len(a.Backends), a.Total)
	if a.Counts.Waiting > 0 {
		fmt.Fprintf(w, "\n%s for a backend with room\n", count(int(a.Counts.Waiting), "connection")+" wait")
	}
}

func stateOf(b *gateway.BackendInfo) string {
	if b.Warming {
		return b.State + " (slow start)"
	}
	return b.State
}

// checksOf says what each check found last.
func checksOf(b *gateway.BackendInfo) string {
	var all []string
	for _, c := range b.Checks {
		result := fmt.Sprintf("%.1f ms", c.TookMS)
		switch {
		case c.At.IsZero():
			result = "not yet"
		case c.Error != "":
			result = "failed"
		}
		all = append(all, c.Check+" "+result)
	}
	return strings.Join(all, ", ")
}

// askTime is how long explain waits for a gateway: it works without one.
const askTime = time.Second

// states is what the running gateway says of its backends.
type states struct {
	backends map[string]gateway.BackendInfo // by address
	all      bool                           // there are no others
	err      error                          // why nothing is known
}

// states asks the gateway that the settings name, if there is one.
func (p *program) states() (s states) {
	c, err := p.client()
	if err != nil {
		return states{err: err}
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	const enough = 10_000
	a, err := c.Backends(ctx, enough)
	if err != nil {
		return states{err: err}
	}
	s.backends, s.all = map[string]gateway.BackendInfo{}, len(a.Backends) == a.Total
	for _, b := range a.Backends {
		s.backends[b.Address] = b
	}
	return s
}

// state is how the backend with that address is now; of a name all its addresses. Nothing is said where no gateway
// answers.
func (s *states) state(address string) string {
	if b, ok := s.backends[address]; ok {
		return describe(&b)
	}
	host := address[:max(strings.LastIndexByte(address, ':'), 0)]
	var all []string
	for _, b := range s.backends {
		if slices.Contains(b.Names, host) || slices.Contains(b.Names, strings.TrimPrefix(address, "srv:")) {
			all = append(all, b.Address+" is "+describe(&b))
		}
	}
	if len(all) == 0 && strings.HasPrefix(address, "srv:") {
		return "leads to no address"
	}
	slices.Sort(all)
	if len(all) == 0 && s.all {
		return "the running gateway does not know it" // its map is another one, or it is a port of a range that nobody has used
	}
	return some(all)
}

func describe(b *gateway.BackendInfo) string {
	s := stateOf(b) + ", " + count(int(b.Open), "connection") + " open"
	if b.Reason != "" {
		s += " (" + b.Reason + ")"
	}
	return s
}
