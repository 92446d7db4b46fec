// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
)

// TestEveryErrorSaysWhatToDoInstead, in JSON, whoever asks what.
func TestEveryErrorSaysWhatToDoInstead(t *testing.T) {
	b := start(t, "ADMIN_TOKEN="+token)
	trusted := func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
	for _, c := range []struct {
		method, path string
		change       func(*http.Request)
		status       int
		instead      string
	}{
		{"GET", "status", nil, http.StatusUnauthorized, "Authorization: Bearer"},
		{"GET", "weather", trusted, http.StatusNotFound, "GET /api/v1/status"},
		{"GET", "map/1", trusted, http.StatusNotFound, "GET /api/v1/map"},
		{"GET", "drain", trusted, http.StatusMethodNotAllowed, "POST /api/v1/drain"},
		{"POST", "conns", trusted, http.StatusMethodNotAllowed, "GET /api/v1/conns"},
		{"DELETE", "backends/drain", trusted, http.StatusMethodNotAllowed, "POST /api/v1/backends/drain"},
		{"GET", "conns?limit=1001", trusted, http.StatusBadRequest, "from 0 to 1000"},
		{"GET", "map?limit=x", trusted, http.StatusBadRequest, "from 0 to 10000"},
		{"GET", "conns?after=yesterday", trusted, http.StatusBadRequest, "next"},
		{"GET", "conns?client=me", trusted, http.StatusBadRequest, "client=192.0.2.0/24"},
		{"GET", "conns?stage=lunch", trusted, http.StatusBadRequest, "backend_queue, "},
		{"GET", "conns?stge=relay", trusted, http.StatusBadRequest, "stage=STAGE"},
		{"GET", "status?limit=3", trusted, http.StatusBadRequest, "leave it out"},
		{"POST", "backends/drain?backend=a:%20b", trusted, http.StatusNotFound, "tlsnat show backends"},
		{"POST", "backends/drain", trusted, http.StatusNotFound, "tlsnat show backends"},
		{"POST", "backends/drain?backend=192.0.2.1:1", trusted, http.StatusNotFound, "tlsnat show backends"},
		{"POST", "backends/explode?backend=192.0.2.1:1", trusted, http.StatusNotFound, "POST /api/v1/backends/drain"},
		{"POST", "reload", func(r *http.Request) {
			trusted(r)
			r.Header.Set("Origin", "https://evil.example")
		}, http.StatusForbidden, "curl"},
	} {
		response, body := b.ask(t, c.method, "/api/v1/"+c.path, c.change)
		var e admin.ErrorAnswer
		if err := json.Unmarshal([]byte(body), &e); err != nil || response.StatusCode != c.status ||
			response.Header.Get("Content-Type") != "application/json" || e.Error == "" || strings.Count(e.Error, `"`)%2 != 0 || !strings.Contains(e.Instead, c.instead) {
			t.Errorf("%s %s: %s, %v: %s", c.method, c.path, response.Status, err, body)
		}
		if c.status == http.StatusMethodNotAllowed && !strings.HasPrefix(c.instead, response.Header.Get("Allow")+" ") {
			t.Errorf("%s %s: Allow: %s", c.method, c.path, response.Header.Get("Allow"))
		}
	}
	alone := start(t)
	response, body := alone.ask(t, "GET", "/api/v1/status", func(r *http.Request) { r.Host = "rebound.example" })
	if response.StatusCode != http.StatusMisdirectedRequest || !strings.Contains(body, `"instead"`) {
		t.Errorf("%s: %s", response.Status, body)
	}
}

// TestClientAsksForEverythingThereIs: whatever the index lists has a method, and what it answers is understood.
func TestClientAsksForEverythingThereIs(t *testing.T) {
	b := start(t)
	b.mixed(t)
	var mu sync.Mutex
	asked := map[string]bool{}
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: b.admin.Addr()})
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked[r.Method+" "+r.URL.Path] = true
		mu.Unlock()
		forward.ServeHTTP(w, r)
	}))
	defer between.Close()
	c, err := admin.NewClient(between.Listener.Addr().String(), b.token(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	index, err := c.Index(ctx)
	if err != nil || len(index.Endpoints) < 10 {
		t.Fatalf("%+v, %v", index, err)
	}
	backends, err := c.Backends(ctx, 10)
	if err != nil || backends.Total != 1 {
		t.Fatalf("%+v, %v", backends, err)
	}
	for name, ask := range map[string]func() (bool, error){
		"status":      func() (bool, error) { a, err := c.Status(ctx); return a.Connections.Accepted == 9, err },
		"map":         func() (bool, error) { a, err := c.Map(ctx, 2); return a.Total == 3 && len(a.Rules) == 2, err },
		"conns":       func() (bool, error) { a, err := c.Conns(ctx, gateway.ConnQuery{Limit: 1}); return a.Next != "", err },
		"certs":       func() (bool, error) { a, err := c.Certs(ctx, 10); return a.Total == 1, err },
		"generations": func() (bool, error) { a, err := c.Generations(ctx); return len(a.Generations) > 0, err },
		"reload":      func() (bool, error) { a, err := c.Reload(ctx); return a.OK, err },
		"drain":       func() (bool, error) { a, err := c.Drain(ctx); return a.Draining, err },
	} {
		if ok, err := ask(); err != nil || !ok {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	for _, o := range gateway.BackendOrders {
		if a, err := c.OrderBackend(ctx, backends.Backends[0].Address, o); err != nil || len(a.Backends) != 1 {
			t.Errorf("%s: %+v, %v", o, a, err)
		}
	}
	for _, e := range index.Endpoints {
		if e.Does == "" || !asked[e.Method+" "+e.Path] {
			t.Errorf("the client never asks for %s %s", e.Method, e.Path)
		}
	}
	_, err = c.OrderBackend(ctx, "192.0.2.1:1", gateway.DrainBackend)
	if e, ok := errors.AsType[*admin.Error](err); !ok || e.Status != http.StatusNotFound || e.Instead == "" {
		t.Errorf("%v", err)
	}
}

// TestConnectionsAreAskedForByWhatTheyAre, and a page at a time.
func TestConnectionsAreAskedForByWhatTheyAre(t *testing.T) {
	b := start(t)
	terminated := b.shake(t, nil)
	var plain []net.Conn
	for range 4 {
		plain = append(plain, b.echo(t, 10))
	}
	backends := get[admin.BackendsAnswer](t, b, "backends")
	for query, want := range map[string]int{
		"": 5, "client=127.0.0.1": 5, "client=127.0.0.0/8": 5, "client=192.0.2.0/24": 0, "name=LOCALHOST": 1, "stage=relay": 5, "stage=hello": 0,
		"listen=" + b.plain: 4, "listen=" + b.tls: 1, "rule=TLSNAT_MAP:1": 5, "rule=TLSNAT_MAP:2": 0,
		"backend=" + backends.Backends[0].Address: 4, "backend=demo&name=localhost": 1, "backend=demo&listen=" + b.plain: 0,
	} {
		if a := get[admin.ConnsAnswer](t, b, "conns?"+query); len(a.Connections) != want || a.Total != 5 || a.Next != "" {
			t.Errorf("%s: %d connections, next %q, want %d", query, len(a.Connections), a.Next, want)
		}
	}
	c, err := admin.NewClient(b.admin.Addr(), "")
	if err != nil {
		t.Fatal(err)
	}
	var clients []string
	for q := (gateway.ConnQuery{Limit: 2, Client: netip.MustParsePrefix("127.0.0.0/8")}); ; {
		a, err := c.Conns(t.Context(), q)
		if err != nil || len(a.Connections) > 2 {
			t.Fatalf("%+v, %v", a, err)
		}
		for _, x := range a.Connections {
			clients = append(clients, x.Client.String())
		}
		if q.After = a.Next; a.Next == "" {
			break
		}
	}
	want := []string{terminated.LocalAddr().String()}
	for _, p := range plain {
		want = append(want, p.LocalAddr().String())
	}
	slices.Sort(clients)
	slices.Sort(want)
	if !slices.Equal(clients, want) {
		t.Errorf("on all pages: %v, want %v", clients, want)
	}
}

// TestEndingsThatAreNotOKAreNotPushedOut by the many that are.
func TestEndingsThatAreNotOKAreNotPushedOut(t *testing.T) {
	b := start(t)
	if _, err := b.hello(t, "unknown.test", nil); err == nil {
		t.Fatal("unknown.test shook hands")
	}
	const many = 80 // more than both loops remember
	for range many {
		_ = b.echo(t, 1).Close()
	}
	b.await(t, "the end of all", func(s *gateway.Status) bool { return ended(&s.Connections) == many+1 })
	all := get[conns](t, b, "conns").Ended
	i := slices.IndexFunc(all, func(c gateway.EndedConn) bool { return c.SNI == "unknown.test" })
	if len(all) != 33 || i < 0 || !slices.IsSortedFunc(all, func(a, b gateway.EndedConn) int { return int(a.AgoMS - b.AgoMS) }) {
		t.Errorf("%d, among them at %d the one that is not ok", len(all), i)
	}
}

// answers are the types of what the API answers, by the end of the path.
var answers = map[string]func() any{
	"": func() any { return &admin.IndexAnswer{} }, "status": func() any { return &admin.StatusAnswer{} }, "map": func() any { return &admin.MapAnswer{} },
	"conns": func() any { return &admin.ConnsAnswer{} }, "backends": func() any { return &admin.BackendsAnswer{} }, "certs": func() any { return &admin.CertsAnswer{} },
	"generations": func() any { return &admin.GenerationsAnswer{} }, "reload": func() any { return &gateway.Reloaded{} },
	"drain": func() any { return &admin.DrainAnswer{} }, "backends/drain": func() any { return &admin.BackendOrderAnswer{} },
	"backends/maintain": func() any { return &admin.BackendOrderAnswer{} }, "backends/ready": func() any { return &admin.BackendOrderAnswer{} },
	"weather": func() any { return &admin.ErrorAnswer{} },
}

// strictly decodes what has no name that the type doesn't have.
func strictly(text string, into any) error {
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

// shape is the set of names in an answer, from its outside to its inside; true for those that every element of a list has.
// The keys of what is counted by a word are one.
func shape(text string) map[string]bool {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return map[string]bool{"no JSON: " + err.Error(): true}
	}
	return names("", v)
}

var byWord = []string{".connections.outcomes", ".ktls.fallbacks", ".gate.refused", ".counts.states"}

func names(path string, v any) map[string]bool {
	all := map[string]bool{}
	switch v := v.(type) {
	case map[string]any:
		for key, inner := range v {
			if slices.Contains(byWord, path) {
				key = "*"
			}
			maps.Copy(all, names(path+"."+key, inner))
		}
	case []any:
		for i, inner := range v {
			element := names(path+"[]", inner)
			for name := range all {
				all[name] = all[name] && element[name]
			}
			for name, always := range element {
				if _, there := all[name]; !there {
					all[name] = always && i == 0
				}
			}
		}
	default:
		all[fmt.Sprintf("%s %T", path, v)] = true
	}
	return all
}
