// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

// Loops answer within a millisecond, as a rule. One that doesn't for this long is left out, and named.
const loopTime = 100 * time.Millisecond

// surveyTime is the same for what each of so many connections is asked: a loop looks at 256 in 100 µs, and lets its traffic
// have as much time.
func surveyTime(open int64) time.Duration {
	const each = time.Microsecond
	return loopTime + time.Duration(open)*each
}

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

// MapAnswer is GET /api/v1/map: the rules in the map's order, how many there are in all, and how their ports are listened
// on.
type MapAnswer struct {
	Generation uint64                  `json:"generation"`
	Total      int                     `json:"total"`
	Rules      []gateway.RuleInfo      `json:"rules"`
	Listening  gateway.ListeningStatus `json:"listening"`
}

// ConnsAnswer is GET /api/v1/conns.
type ConnsAnswer struct {
	Total       int64               `json:"total"`                   // open
	Connections []gateway.OpenConn  `json:"connections"`             // the newest first
	Next        string              `json:"next,omitempty"`          // where the following ones begin; "": there are none
	Ended       []gateway.EndedConn `json:"ended"`                   // the last few with outcome ok and the last few without, the latest first
	Missing     []int               `json:"loops_missing,omitempty"` // event loops that did not answer in time: theirs are not told of
}

// CertsAnswer is GET /api/v1/certs: the certificate that expires first comes first.
type CertsAnswer struct {
	Total        int                `json:"total"`
	Certificates []gateway.CertInfo `json:"certificates"`
}

// GenerationsAnswer is GET /api/v1/generations: the current one first.
type GenerationsAnswer struct {
	Generations []gateway.GenerationInfo `json:"generations"`
	Missing     []int                    `json:"loops_missing,omitempty"` // event loops that did not answer in time: oldest_ms is without theirs
}

// DrainAnswer is POST /api/v1/drain.
type DrainAnswer struct {
	Draining bool `json:"draining"`
}

// IndexAnswer is GET /api/v1/: what can be asked for.
type IndexAnswer struct {
	Version   string     `json:"version"`
	Endpoints []Endpoint `json:"endpoints"`
}

// Endpoint is one of them.
type Endpoint struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Query  string `json:"query,omitempty"` // "limit=0-1000"; what is in there may be left out, but for backend=
	Does   string `json:"does"`

	handle func(http.ResponseWriter, *http.Request)
}

const apiPath = "/api/v1/"

// lists is an endpoint that tells at most so many things.
func (s *Server) lists(name string, normal, most int, does string, ask func(ctx context.Context, limit int) any) Endpoint {
	e := s.reads(name, does, nil)
	e.Query = fmt.Sprintf("limit=0-%d", most)
	e.handle = func(w http.ResponseWriter, r *http.Request) {
		limit, err := limitOf(r, normal, most)
		if err != nil {
			fail(w, http.StatusBadRequest, err.Error(), fmt.Sprintf("write limit= with a number from 0 to %d, or leave it out", most))
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), loopTime)
		defer cancel()
		answerJSON(w, http.StatusOK, ask(ctx, limit))
	}
	return e
}

// reads is an endpoint that tells one thing.
func (s *Server) reads(name, does string, ask func(ctx context.Context) any) Endpoint {
	return Endpoint{Method: http.MethodGet, Path: apiPath + name, Does: does, handle: func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), surveyTime(s.gateway.Open()))
		defer cancel()
		answerJSON(w, http.StatusOK, ask(ctx))
	}}
}

// does is an endpoint that changes something.
func does(name, what string, handle func(http.ResponseWriter, *http.Request)) Endpoint {
	return Endpoint{Method: http.MethodPost, Path: apiPath + name, Does: what, handle: handle}
}

// endpoints are all there are.
func (s *Server) endpoints() []Endpoint {
	g := s.gateway
	all := []Endpoint{
		s.reads("status", "how the gateway is doing, counts since its start", func(context.Context) any { return StatusAnswer{s.version, s.status()} }),
		s.lists("map", someEntries, maxEntries, "the rules that are served", func(_ context.Context, limit int) any {
			status := g.Status()
			return MapAnswer{status.Generation, status.Rules, g.Rules(limit), status.Listening}
		}),
		s.connsEndpoint(),
		s.lists("backends", someEntries, maxEntries, "the addresses that backends lead to, those that are not up first",
			func(_ context.Context, limit int) any { return s.backends(limit) }),
		s.lists("certs", someEntries, maxEntries, "the certificates that are served, the first to expire first", func(_ context.Context, limit int) any {
			return CertsAnswer{g.Status().Certificates, list(g.Certificates(limit))}
		}),
		s.reads("generations", "the configurations that connections run under, the current one first",
			func(ctx context.Context) any {
				all, missing := g.Generations(ctx)
				return GenerationsAnswer{all, missing}
			}),
		does("reload", "reads map, certificates and other files again, as SIGHUP does", s.order("reload", s.reload)),
		does("drain", "ends the gateway as SIGTERM does", s.order("drain", s.drain)),
	}
	for _, o := range gateway.BackendOrders {
		e := does("backends/"+string(o), orderTexts[o], s.order("backends/"+string(o), func(w http.ResponseWriter, r *http.Request) { s.orderBackend(w, r, o) }))
		e.Query = "backend=ADDRESS"
		all = append(all, e)
	}
	return all
}

// api adds what programs ask for, and what to say to those who ask for something else.
func (s *Server) api(mux *http.ServeMux) {
	all := s.endpoints()
	methods, paths := map[string]string{}, []string{}
	for _, e := range all {
		methods[e.Path], paths = e.Method, append(paths, e.Method+" "+e.Path)
		handler := http.Handler(http.HandlerFunc(e.strictly))
		if e.Method == http.MethodGet {
			handler = s.bounded(handler)
		}
		mux.Handle(e.Method+" "+e.Path, handler)
	}
	mux.HandleFunc("GET "+apiPath+"{$}", func(w http.ResponseWriter, _ *http.Request) {
		answerJSON(w, http.StatusOK, IndexAnswer{s.version, all})
	})
	mux.HandleFunc("/api/", func(w http.ResponseWriter, r *http.Request) {
		if method := methods[r.URL.Path]; method != "" {
			w.Header().Set("Allow", method)
			fail(w, http.StatusMethodNotAllowed, r.Method+" is not what "+r.URL.Path+" is for", "write "+method+" "+r.URL.Path)
			return
		}
		fail(w, http.StatusNotFound, fmt.Sprintf("there is no %.100q", r.URL.Path), "write one of "+strings.Join(paths, ", ")+"; GET "+apiPath+" says what they do")
	})
}

// strictly answers requests whose parameters are all known: a typing slip would else be answered with everything.
func (e *Endpoint) strictly(w http.ResponseWriter, r *http.Request) {
	known, _ := url.ParseQuery(e.Query)
	for key := range r.URL.Query() {
		if known.Has(key) {
			continue
		}
		instead := "leave it out: " + e.Path + " has none"
		if e.Query != "" {
			instead = "write " + strings.ReplaceAll(e.Query, "&", ", ")
		}
		fail(w, http.StatusBadRequest, fmt.Sprintf("there is no parameter %.60q", key), instead)
		return
	}
	e.handle(w, r)
}

// connsEndpoint asks for connections: of one client, or the following ones.
func (s *Server) connsEndpoint() Endpoint {
	e := s.reads("conns", "open connections, the newest first, and the last that ended; next in the answer is after for the following ones", nil)
	e.Query = fmt.Sprintf("limit=0-%d&after=NEXT&client=ADDRESS|PREFIX&listen=LISTEN&name=NAME&rule=FILE:LINE&backend=ADDRESS&stage=STAGE", maxConns)
	e.handle = func(w http.ResponseWriter, r *http.Request) {
		q, instead, err := connQuery(r)
		if err != nil {
			fail(w, http.StatusBadRequest, err.Error(), instead)
			return
		}
		s.answerConns(w, r, q)
	}
	return e
}

// answerConns asks the loops for both lists at once: they have the time once.
func (s *Server) answerConns(w http.ResponseWriter, r *http.Request, q gateway.ConnQuery) {
	total := s.gateway.Open()
	ctx, cancel := context.WithTimeout(r.Context(), surveyTime(total))
	defer cancel()
	a := ConnsAnswer{Total: total}
	var without []int
	var both sync.WaitGroup
	both.Go(func() { a.Ended, without = s.gateway.Ended(ctx, q, someEnded) })
	open, next, missing, err := s.gateway.Conns(ctx, q)
	both.Wait()
	if err != nil {
		fail(w, http.StatusBadRequest, err.Error(), "write after= as it stood in next, or leave it out to begin with the newest")
		return
	}
	a.Connections, a.Next, a.Ended = list(open), next, list(a.Ended)
	a.Missing = slices.Compact(slices.Sorted(slices.Values(append(missing, without...))))
	answerJSON(w, http.StatusOK, a)
}

// connQuery reads what a request is about; instead says what to write if that can't be read.
func connQuery(r *http.Request) (q gateway.ConnQuery, instead string, err error) {
	v := r.URL.Query()
	q = gateway.ConnQuery{After: v.Get("after"), Listen: v.Get("listen"), Name: strings.ToLower(v.Get("name")), Rule: v.Get("rule"),
		Backend: v.Get("backend"), Stage: v.Get("stage")}
	if q.Limit, err = limitOf(r, someConns, maxConns); err != nil {
		return q, fmt.Sprintf("write limit= with a number from 0 to %d, or leave it out", maxConns), err
	}
	if q.Stage != "" && !slices.Contains(gateway.StageWords, q.Stage) {
		return q, "write stage= with one of " + strings.Join(gateway.StageWords, ", "), fmt.Errorf("stage=%.60q: there is no such stage", q.Stage)
	}
	if client := v.Get("client"); client != "" {
		if q.Client, err = ParsePrefix(client); err != nil {
			return q, "write an address or a prefix, such as client=192.0.2.7 or client=192.0.2.0/24", fmt.Errorf("client=%.60q: not an address", client)
		}
	}
	return q, "", nil
}

// ParsePrefix reads an address, which is meant alone and may stand in brackets, or a prefix.
func ParsePrefix(s string) (netip.Prefix, error) { return config.ParsePrefix(strings.Trim(s, "[]")) }

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

// ErrorAnswer is what every status from 400 on has in it, but for a reload of a configuration with errors (gateway.Reloaded):
// what is wrong, and what to do instead.
type ErrorAnswer struct {
	Error   string `json:"error"`
	Instead string `json:"instead"`
}

func fail(w http.ResponseWriter, status int, wrong, instead string) {
	answerJSON(w, status, ErrorAnswer{wrong, instead})
}

func limitOf(r *http.Request, normal, most int) (int, error) {
	text := r.URL.Query().Get("limit")
	if text == "" {
		return normal, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > most {
		return 0, fmt.Errorf("limit=%.20q is not a number from 0 to %d", text, most)
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
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // rules have a > in them, and no browser takes this for a page
	if err := e.Encode(v); err != nil {
		fail(w, http.StatusInternalServerError, err.Error(), "please report it")
		return
	}
	text := printable.JSON(b.Bytes())
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	_, _ = w.Write(text)
}
