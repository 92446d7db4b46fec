// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"github.com/tlsnat/tlsnat/gateway"
)

// Client asks the admin of a running gateway.
//
//	c, err := admin.NewClient("127.0.0.1:9180", "")
//	answer, err := c.Map(ctx, 100)
//
// Its errors say what to do about them. It speaks plain HTTP, as the admin does.
type Client struct {
	base  string
	token string
}

// NewClient makes a client for the admin at addr, as TLSNAT_ADMIN has it; token is empty where none is set. An admin that
// listens on every address is asked on loopback.
func NewClient(addr, token string) (*Client, error) {
	if addr == "off" {
		return nil, fmt.Errorf("the admin is switched off (%sADMIN=off), so there is nobody to ask", gateway.Prefix)
	}
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("%sADMIN=%s: not an address with a port; write 127.0.0.1:9180 or [::1]:9180", gateway.Prefix, addr)
	}
	if ap.Addr().IsUnspecified() {
		loopback := netip.IPv6Loopback()
		if ap.Addr().Is4() {
			loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		ap = netip.AddrPortFrom(loopback, ap.Port())
	}
	return &Client{"http://" + ap.String(), token}, nil
}

// Status is how the gateway is doing.
func (c *Client) Status(ctx context.Context) (a StatusAnswer, err error) {
	return a, c.ask(ctx, http.MethodGet, "status", nil, &a)
}

// Map is at most limit rules of the map that is served.
func (c *Client) Map(ctx context.Context, limit int) (a MapAnswer, err error) {
	return a, c.ask(ctx, http.MethodGet, "map", limited(limit), &a)
}

// Conns are the newest open connections that the query is about, and the last that ended. With a query's After set to the
// Next of an answer it is about those that come behind.
func (c *Client) Conns(ctx context.Context, q gateway.ConnQuery) (a ConnsAnswer, err error) {
	v := limited(q.Limit)
	if q.Client.IsValid() {
		v.Set("client", q.Client.String())
	}
	for _, p := range [...][2]string{{"after", q.After}, {"listen", q.Listen}, {"name", q.Name}, {"rule", q.Rule}, {"backend", q.Backend}, {"stage", q.Stage}} {
		if p[1] != "" {
			v.Set(p[0], p[1])
		}
	}
	return a, c.ask(ctx, http.MethodGet, "conns", v, &a)
}

// Index is what can be asked for.
func (c *Client) Index(ctx context.Context) (a IndexAnswer, err error) {
	return a, c.ask(ctx, http.MethodGet, "", nil, &a)
}

// Certs is at most limit certificates.
func (c *Client) Certs(ctx context.Context, limit int) (a CertsAnswer, err error) {
	return a, c.ask(ctx, http.MethodGet, "certs", limited(limit), &a)
}

// Generations are the configurations in use.
func (c *Client) Generations(ctx context.Context) (a GenerationsAnswer, err error) {
	return a, c.ask(ctx, http.MethodGet, "generations", nil, &a)
}

// Backends is at most limit backends, those that are not up first.
func (c *Client) Backends(ctx context.Context, limit int) (a BackendsAnswer, err error) {
	return a, c.ask(ctx, http.MethodGet, "backends", limited(limit), &a)
}

// OrderBackend says what becomes of a backend: see gateway.OrderBackend. That there is none of this name is an *Error with
// status 404; no further order can be remembered is one with 409.
func (c *Client) OrderBackend(ctx context.Context, backend string, order gateway.BackendOrder) (a BackendOrderAnswer, err error) {
	return a, c.ask(ctx, http.MethodPost, "backends/"+string(order), url.Values{"backend": {backend}}, &a)
}

// Reload has the gateway read its configuration again. A configuration with errors is no error here: the answer has
// them.
func (c *Client) Reload(ctx context.Context) (a gateway.Reloaded, err error) {
	return a, c.ask(ctx, http.MethodPost, "reload", nil, &a)
}

// Drain has the gateway end as SIGTERM does.
func (c *Client) Drain(ctx context.Context) (a DrainAnswer, err error) {
	return a, c.ask(ctx, http.MethodPost, "drain", nil, &a)
}

// Error is what the admin answered instead of what it was asked for.
type Error struct {
	Status int // of HTTP
	ErrorAnswer
}

func (e *Error) Error() string { return e.ErrorAnswer.Error + ": " + e.Instead }

func limited(n int) url.Values { return url.Values{"limit": {fmt.Sprint(n)}} }

// maxAnswer bounds an answer: 10,000 rules with long lists of backends.
const maxAnswer = 64 << 20

// ask sends a request and reads the JSON that answers it.
func (c *Client) ask(ctx context.Context, method, name string, query url.Values, into any) error {
	request, err := http.NewRequestWithContext(ctx, method, c.base+"/api/v1/"+name+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	if c.token != "" {
		request.Header.Set("Authorization", "Bearer "+c.token)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return c.unreachable(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read the answer of %s: %w", c.base, err)
	}
	switch {
	case response.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("the admin at %s demands its token: set %sADMIN_TOKEN to the one that the gateway has", c.base, gateway.Prefix)
	case !strings.HasPrefix(response.Header.Get("Content-Type"), "application/json"):
	case response.StatusCode < http.StatusBadRequest || response.StatusCode == http.StatusUnprocessableEntity:
		return json.Unmarshal(body, into)
	default:
		e := &Error{Status: response.StatusCode}
		return cmp.Or(json.Unmarshal(body, &e.ErrorAnswer), error(e))
	}
	return fmt.Errorf("the admin at %s answered %s: %.200s", c.base, response.Status, strings.TrimSpace(string(body)))
}

// unreachable says in an operator's words that nobody answered.
func (c *Client) unreachable(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return fmt.Errorf("no gateway answers at %s: %w; is it running, and is %sADMIN here what it is there?", c.base, op.Err, gateway.Prefix)
	}
	return fmt.Errorf("ask %s: %w", c.base, err)
}
