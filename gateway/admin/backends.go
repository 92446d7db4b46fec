// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tlsnat/tlsnat/gateway"
)

// backendGauges bounds the backends that have time series of their own: the first by address. A range of 50,000 ports must
// not become as many.
const backendGauges = 1000

// BackendsAnswer is GET /api/v1/backends: those that are not up come first.
type BackendsAnswer struct {
	Total    int                   `json:"total"`
	Counts   gateway.BackendCounts `json:"counts"`
	Backends []gateway.BackendInfo `json:"backends"`
}

// BackendOrderAnswer is POST /api/v1/backends/drain?backend=ADDRESS, and the same with maintain and ready: the addresses
// that are meant.
type BackendOrderAnswer struct {
	Backends []string `json:"backends"`
}

var orderTexts = map[gateway.BackendOrder]string{
	gateway.DrainBackend:    "gives a backend no new connections",
	gateway.MaintainBackend: "the same, without checks, and with on-down=cut its connections end",
	gateway.ReadyBackend:    "takes both back",
}

func (s *Server) backends(limit int) BackendsAnswer {
	infos, total := s.gateway.Backends(limit)
	return BackendsAnswer{total, s.gateway.BackendCounts(), list(infos)}
}

// orderBackend does what an operator says about a backend.
func (s *Server) orderBackend(w http.ResponseWriter, r *http.Request, order gateway.BackendOrder) {
	names, err := s.gateway.OrderBackend(r.URL.Query().Get("backend"), order)
	if err != nil {
		status := http.StatusNotFound
		if errors.Is(err, gateway.ErrOrders) {
			status = http.StatusConflict
		}
		at := strings.LastIndex(err.Error(), ": ") // what was asked for may have one, too
		fail(w, status, err.Error()[:at], err.Error()[at+2:])
		return
	}
	answerJSON(w, http.StatusOK, BackendOrderAnswer{names})
}

var (
	backendStatesDesc  = desc("backends", "Backend addresses, by their state.", "state")
	backendOthersDesc  = desc("backends_others", "Backend addresses that have no series of their own, being more than "+strconv.Itoa(backendGauges)+": backend=\""+otherBackends+"\" has their sums.")
	backendWaitingDesc = desc("backend_queue_connections", "Connections that wait for a backend with room (max-conns=).")
	backendUpDesc      = desc("backend_up", "1 while the backend gets new connections.", "backend")
	backendStateDesc   = desc("backend_state", "1 for the state that the backend is in.", "backend", "state")
	backendOpenDesc    = desc("backend_connections_open", "Connections to the backend that are open or being made.", "backend")
	backendTotalDesc   = desc("backend_connections_total", "Connections to the backend that were made.", "backend")
	backendBrokenDesc  = desc("backend_connect_failures_total", "Connects to the backend that failed.", "backend")
	backendCheckDesc   = desc("backend_check_duration_seconds", "How long the last check of the backend took.", "backend", "check")
	backendCheckUpDesc = desc("backend_check_up", "1 while the check finds the backend fit.", "backend", "check")
	backendDescs       = []*prometheus.Desc{backendStatesDesc, backendOthersDesc, backendWaitingDesc, backendUpDesc, backendStateDesc, backendOpenDesc,
		backendTotalDesc, backendBrokenDesc, backendCheckDesc, backendCheckUpDesc}
)

// otherBackends is a label that no address is like.
const otherBackends = "others"

// collectBackends sends what is known about backends.
func (s *Server) collectBackends(send sender) {
	counts := s.gateway.BackendCounts()
	for _, state := range gateway.StateWords {
		send(backendStatesDesc, prometheus.GaugeValue, float64(counts.States[state]), state)
	}
	send(backendWaitingDesc, prometheus.GaugeValue, float64(counts.Waiting))
	infos, others := s.gateway.BackendsInOrder(backendGauges)
	for i := range infos {
		collectBackend(send, &infos[i])
	}
	send(backendOthersDesc, prometheus.GaugeValue, float64(others.Backends))
	if others.Backends > 0 {
		collectConnects(send, otherBackends, others)
	}
}

func collectBackend(send sender, b *gateway.BackendInfo) {
	send(backendUpDesc, prometheus.GaugeValue, number(b.State == gateway.StateWords[0]), b.Address)
	for _, state := range gateway.StateWords {
		send(backendStateDesc, prometheus.GaugeValue, number(b.State == state), b.Address, state)
	}
	collectConnects(send, b.Address, gateway.BackendSums{Open: b.Open, Total: b.Total, Failures: b.Failures})
	for i, c := range b.Checks {
		same := func(o gateway.CheckInfo) bool { return o.Check == c.Check }
		if slices.IndexFunc(b.Checks, same) == i && !c.At.IsZero() {
			send(backendCheckDesc, prometheus.GaugeValue, c.TookMS/float64(time.Second/time.Millisecond), b.Address, c.Check)
			send(backendCheckUpDesc, prometheus.GaugeValue, number(c.Up), b.Address, c.Check)
		}
	}
}

func collectConnects(send sender, backend string, n gateway.BackendSums) {
	send(backendOpenDesc, prometheus.GaugeValue, float64(n.Open), backend)
	send(backendTotalDesc, prometheus.CounterValue, float64(n.Total), backend)
	send(backendBrokenDesc, prometheus.CounterValue, float64(n.Failures), backend)
}
