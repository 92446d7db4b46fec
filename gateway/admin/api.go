// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
)

// Loops answer within a millisecond, as a rule. One that doesn't for this long is left out.
const loopTime = 2 * time.Second

// A reload reads every file and looks up every backend; it may take longer than other answers.
const reloadTime = 2 * time.Minute

// How many entries a list has when nobody says (?limit=), and at most.
const (
	someConns, maxConns     = 100, 1000
	someEntries, maxEntries = 1000, 10_000
	someEnded               = 32
)

// StatusAnswer is GET /api/v1/status.
type StatusAnswer struct {
	Version string `json:"version"`
	gateway.Status
}

// MapAnswer is GET /api/v1/map: the rules in the map's order, and how many there are in all.
type MapAnswer struct {
	Generation uint64             `json:"generation"`
	Total      int                `json:"total"`
	Rules      []gateway.RuleInfo `json:"rules"`
}

// ConnsAnswer is GET /api/v1/conns.
type ConnsAnswer struct {
	Total       int64               `json:"total"`       // open
	Connections []gateway.OpenConn  `json:"connections"` // the newest first
	Ended       []gateway.EndedConn `json:"ended"`       // the last few, the latest first
}

// CertsAnswer is GET /api/v1/certs: the certificate that expires first comes first.
type CertsAnswer struct {
	Total        int                `json:"total"`
	Certificates []gateway.CertInfo `json:"certificates"`
}

// GenerationsAnswer is GET /api/v1/generations: the current one first.
type GenerationsAnswer struct {
	Generations []gateway.GenerationInfo `json:"generations"`
}

// DrainAnswer is POST /api/v1/drain.
type DrainAnswer struct {
	Draining bool `json:"draining"`
}

// api adds what programs ask for.
func (s *Server) api(mux *http.ServeMux) {
	get := func(name string, normal, most int, ask func(ctx context.Context, limit int) any) {
		mux.HandleFunc("GET /api/v1/"+name, func(w http.ResponseWriter, r *http.Request) {
			limit, err := limitOf(r, normal, most)
			if err != nil {
				answer(w, http.StatusBadRequest, err.Error())
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), loopTime)
			defer cancel()
			answerJSON(w, http.StatusOK, ask(ctx, limit))
		})
	}
	g := s.gateway
	get("status", 0, 0, func(context.Context, int) any {
		return StatusAnswer{s.version, s.status()}
	})
	get("map", someEntries, maxEntries, func(_ context.Context, limit int) any {
		status := g.Status()
		return MapAnswer{status.Generation, status.Rules, g.Rules(limit)}
	})
	get("conns", someConns, maxConns, func(ctx context.Context, limit int) any {
		return ConnsAnswer{g.Status().Connections.Open, list(g.Conns(ctx, limit)), list(g.Ended(ctx, someEnded))}
	})
	get("certs", someEntries, maxEntries, func(_ context.Context, limit int) any {
		return CertsAnswer{g.Status().Certificates, g.Certificates(limit)}
	})
	get("generations", 0, 0, func(ctx context.Context, _ int) any { return GenerationsAnswer{g.Generations(ctx)} })
	mux.HandleFunc("POST /api/v1/reload", s.reload)
	get("backends", someEntries, maxEntries, func(_ context.Context, limit int) any { return s.backends(limit) })
	mux.HandleFunc("POST /api/v1/backends/{order}", s.orderBackend)
	mux.HandleFunc("POST /api/v1/drain", s.drain)
}

func (s *Server) status() gateway.Status {
	status := s.gateway.Status()
	status.Draining = s.isDraining()
	return status
}

// drain passes the wish on. The answer is on its way before that, whole: the process may end at once.
func (s *Server) drain(w http.ResponseWriter, _ *http.Request) {
	answerJSON(w, http.StatusAccepted, DrainAnswer{true})
	_ = http.NewResponseController(w).Flush()
	s.drainOnce.Do(func() { close(s.drainAsked) })
}

// reload reads the configuration again. A configuration with errors changes nothing, and is answered with 422.
func (s *Server) reload(w http.ResponseWriter, _ *http.Request) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(reloadTime))
	r := s.gateway.Reload()
	status := http.StatusOK
	if !r.OK {
		status = http.StatusUnprocessableEntity
	}
	answerJSON(w, status, r)
}

func limitOf(r *http.Request, normal, most int) (int, error) {
	text := r.URL.Query().Get("limit")
	if text == "" {
		return normal, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > most {
		return 0, fmt.Errorf("limit=%.20q: write a number from 0 to %d", text, most)
	}
	return n, nil
}

// list makes an empty list of none, where JSON would say null.
func list[T any](all []T) []T {
	if all == nil {
		return []T{}
	}
	return all
}

func answerJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		answer(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}
