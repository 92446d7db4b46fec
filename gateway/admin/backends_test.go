// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
)

// TestBackendsAreShownAndTakenOut over the API; the metrics follow, and other sites can't.
func TestBackendsAreShownAndTakenOut(t *testing.T) {
	b := start(t)
	b.echo(t, 100)
	only := func() gateway.BackendInfo {
		t.Helper()
		a := get[admin.BackendsAnswer](t, b, "backends")
		if a.Total != 1 || len(a.Backends) != 1 {
			t.Fatalf("%+v, want one backend", a)
		}
		return a.Backends[0]
	}
	backend := only()
	if backend.State != "up" || backend.Open != 1 || backend.Total != 1 || backend.Rules != 1 {
		t.Errorf("%+v", backend)
	}
	order := func(what, address string, change func(*http.Request)) (int, string) {
		response, body := b.ask(t, "POST", "/api/v1/backends/"+what+"?backend="+url.QueryEscape(address), func(r *http.Request) {
			b.trusted(t)(r)
			if change != nil {
				change(r)
			}
		})
		return response.StatusCode, body
	}
	if code, body := order("drain", backend.Address, nil); code != http.StatusOK || body != `{"backends":["`+backend.Address+`"]}`+"\n" {
		t.Errorf("%d: %s", code, body)
	}
	if i := only(); i.State != "draining" || i.Open != 1 {
		t.Errorf("%+v", i)
	}
	_, metrics := b.ask(t, "GET", "/metrics", nil)
	for _, line := range []string{
		`tlsnat_backend_up{backend="` + backend.Address + `"} 0`,
		`tlsnat_backend_connections_open{backend="` + backend.Address + `"} 1`,
		`tlsnat_backends{state="draining"} 1`, `tlsnat_backends{state="up"} 0`, `tlsnat_backend_queue_connections 0`,
	} {
		if !strings.Contains(metrics, "\n"+line+"\n") {
			t.Errorf("no line %q in\n%s", line, ours(metrics))
		}
	}
	for _, c := range []struct {
		order, address string
		change         func(*http.Request)
		want           int
	}{
		{"drain", "192.0.2.1:1", nil, http.StatusNotFound},
		{"explode", backend.Address, nil, http.StatusNotFound},
		{"ready", backend.Address, func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }, http.StatusForbidden},
	} {
		if code, body := order(c.order, c.address, c.change); code != c.want {
			t.Errorf("%s %s: %d: %s", c.order, c.address, code, body)
		}
	}
	if i := only(); i.State != "draining" {
		t.Errorf("%+v", i)
	}
	if code, _ := order("ready", backend.Address, nil); code != http.StatusOK || only().State != "up" {
		t.Errorf("%d, %+v", code, only())
	}
}
