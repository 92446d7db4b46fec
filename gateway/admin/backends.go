// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tlsnat/tlsnat/gateway"
)

// backendGauges bounds the backends that have time series of their own: those that are not up come first, and a range of
// 50,000 ports must not become as many.
const backendGauges = 1000

// BackendsAnswer is GET /api/v1/backends: those that are not up come first.
type BackendsAnswer struct {
	Total    int                   `json:"total"`
	Counts   gateway.BackendCounts `json:"counts"`
	Backends []gateway.BackendInfo `json:"backends"`
}

// BackendOrderAnswer is POST /api/v1/backends/drain?backend=ADDRESS, and the same with maintain and ready: the addresses
// that are meant. Unknown is answered with 404, and Error says why.
type BackendOrderAnswer struct {
	Backends []string `json:"backends"`
	Error    string   `json:"error,omitempty"`
}

func (s *Server) backends(limit int) BackendsAnswer {
	infos, total := s.gateway.Backends(limit)
	return BackendsAnswer{total, s.gateway.BackendCounts(), list(infos)}
}

// orderBackend does what an operator says about a backend.
func (s *Server) orderBackend(w http.ResponseWriter, r *http.Request) {
	names, err := s.gateway.OrderBackend(r.URL.Query().Get("backend"), gateway.BackendOrder(r.PathValue("order")))
	if err != nil {
		answerJSON(w, http.StatusNotFound, BackendOrderAnswer{[]string{}, err.Error()})
		return
	}
	answerJSON(w, http.StatusOK, BackendOrderAnswer{Backends: names})
}

var (
	backendStatesDesc  = desc("backends", "Backend addresses, by their state.", "state")
	backendWaitingDesc = desc("backend_queue_connections", "Connections that wait for a backend with room (max-conns=).")
	backendUpDesc      = desc("backend_up", "1 while the backend gets new connections, of the first 1000.", "backend")
	backendOpenDesc    = desc("backend_connections_open", "Connections to the backend that are open or being made.", "backend")
	backendTotalDesc   = desc("backend_connections_total", "Connections to the backend that were made.", "backend")
	backendBrokenDesc  = desc("backend_connect_failures_total", "Connects to the backend that failed.", "backend")
	backendCheckDesc   = desc("backend_check_duration_seconds", "How long the last check of the backend took.", "backend", "check")
	backendDescs       = []*prometheus.Desc{backendStatesDesc, backendWaitingDesc, backendUpDesc, backendOpenDesc, backendTotalDesc, backendBrokenDesc, backendCheckDesc}
)

// collectBackends sends what is known about backends, in the order of their states.
func (s *Server) collectBackends(send func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
	counts := s.gateway.BackendCounts()
	for _, state := range gateway.StateWords {
		send(backendStatesDesc, prometheus.GaugeValue, float64(counts.States[state]), state)
	}
	send(backendWaitingDesc, prometheus.GaugeValue, float64(counts.Waiting))
	infos, _ := s.gateway.Backends(backendGauges)
	for _, b := range infos {
		send(backendUpDesc, prometheus.GaugeValue, number(b.State == gateway.StateWords[0]), b.Address)
		send(backendOpenDesc, prometheus.GaugeValue, float64(b.Open), b.Address)
		send(backendTotalDesc, prometheus.CounterValue, float64(b.Total), b.Address)
		send(backendBrokenDesc, prometheus.CounterValue, float64(b.Failures), b.Address)
		for i, c := range b.Checks {
			same := func(o gateway.CheckInfo) bool { return o.Check == c.Check }
			if slices.IndexFunc(b.Checks, same) == i && !c.At.IsZero() {
				send(backendCheckDesc, prometheus.GaugeValue, c.TookMS/float64(time.Second/time.Millisecond), b.Address, c.Check)
			}
		}
	}
}
