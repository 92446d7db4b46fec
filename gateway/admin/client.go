// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
)

// Client asks the admin of a running gateway.
//
//	c, err := admin.Connect(ctx, settings)
//	answer, err := c.Map(ctx, 100)
//
// Its errors say what to do about them. It speaks plain HTTP, as the admin does, and never through a proxy: what it sends is
// for the gateway alone.
type Client struct {
	base  string
	token func(order bool) (string, error) // that it shows; "": none
	http  *http.Client
}

// newClient makes a client that reaches the admin by dial. A redirect is an answer like others: a token does not go on
// to elsewhere.
func newClient(base string, token func(bool) (string, error), dial func(context.Context, string, string) (net.Conn, error)) *Client {
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{base, token, &http.Client{Transport: &http.Transport{Proxy: nil, DialContext: dial, DisableKeepAlives: true}, CheckRedirect: stay}}
}

// NewClient makes a client for the admin at addr, as TLSNAT_ADMIN has it; token is empty where none is set. An admin that
// listens on every address is asked on loopback.
func NewClient(addr, token string) (*Client, error) {
	return newTCPClient(addr, func(netip.AddrPort) func(bool) (string, error) {
		return func(bool) (string, error) { return token, nil }
	})
}

func newTCPClient(addr string, token func(netip.AddrPort) func(bool) (string, error)) (*Client, error) {
	if addr == "off" {
		return nil, fmt.Errorf("the admin is switched off (%sADMIN=off), so there is nobody to ask", config.Prefix)
	}
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("%sADMIN=%s: not an address with a port; write 127.0.0.1:9180 or [::1]:9180", config.Prefix, addr)
	}
	if ap.Addr().IsUnspecified() {
		loopback := netip.IPv6Loopback()
		if ap.Addr().Is4() {
			loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		ap = netip.AddrPortFrom(loopback, ap.Port())
	}
	return newClient("http://"+ap.String(), token(ap), nil), nil
}

// NewSocketClient makes a client for the admin whose socket is at path. That somebody listens there is found out now.
func NewSocketClient(ctx context.Context, path string) (*Client, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return dialUnix(ctx, path) }
	c, err := dial(ctx, "", "")
	if err != nil {
		return nil, fmt.Errorf("no gateway answers at %s: %w", path, reason(err))
	}
	_ = c.Close()
	return newClient("http://localhost", func(bool) (string, error) { return "", nil }, dial), nil
}

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, reason(err)
	}
	defer d.Close()
	return (&net.Dialer{}).DialContext(ctx, "unix", reachable(path, d))
}

// Connect makes a client for the gateway that the settings are those of: by its socket, where one is, else by TCP.
func Connect(ctx context.Context, s config.Settings) (*Client, error) {
	if _, err := netip.ParseAddrPort(s.Admin); err != nil && s.Admin != "off" {
		return NewClient(s.Admin, "") // which says what is wrong with it
	}
	var forbidden error
	for _, path := range s.AdminSockets() {
		c, err := NewSocketClient(ctx, path)
		if err == nil {
			return c, nil
		}
		if s.Admin == "off" {
			return nil, fmt.Errorf("%w; is it running, and is %sADMIN_SOCKET here what it is there?", err, config.Prefix)
		}
		if errors.Is(err, fs.ErrPermission) {
			forbidden = err
		}
	}
	return newTCPClient(s.Admin, func(at netip.AddrPort) func(bool) (string, error) {
		return func(order bool) (string, error) {
			if s.AdminToken != "" || !order {
				return s.AdminToken, nil
			}
			return ownToken(&s, at, forbidden)
		}
	})
}

// ownToken is the token that the gateway has made, for an order over TCP. It goes to no other user's program: one that
// listens where the gateway did, when it is gone, would give orders with it later.
func ownToken(s *config.Settings, at netip.AddrPort, forbidden error) (string, error) {
	if !at.Addr().IsLoopback() {
		return "", nil
	}
	token, err := s.OwnAdminToken()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return "", forbidden // nil: it is asked without one, and says what to do
	case err != nil:
		return "", err
	}
	uid, found := listenerOf(at)
	if found && uid != 0 && uid != os.Geteuid() {
		return "", fmt.Errorf("user %d listens at %s, not yours (%d): the token is not shown to it", uid, at, os.Geteuid())
	}
	return token, nil
}

// listenerOf is the user who listens on TCP at an address, as the kernel's tables have it (proc_net_tcp.txt).
func listenerOf(at netip.AddrPort) (uid int, found bool) {
	const listening = "0A"
	for _, file := range [...]string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 8 || f[3] != listening || !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", at.Port())) {
				continue
			}
			if n, err := strconv.Atoi(f[7]); err == nil && (!found || n != 0) {
				uid, found = n, true // of several the one that is not root's: it may be the one that answers
			}
		}
	}
	return uid, found
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
	token, err := c.token(method != http.MethodGet)
	if err != nil {
		return err
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return c.unreachable(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read the answer of %s: %w", c.base, err)
	}
	switch {
	case response.StatusCode == http.StatusUnauthorized && method == http.MethodGet:
		return fmt.Errorf("the admin at %s demands its token: set %sADMIN_TOKEN to the one that the gateway has", c.base, config.Prefix)
	case response.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("the admin at %s takes orders with its token only: run this as the user that the gateway runs as, or as root with its %sADMIN_SOCKET, or set %sADMIN_TOKEN", c.base, config.Prefix, config.Prefix)
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
		return fmt.Errorf("no gateway answers at %s: %w; is it running, and is %sADMIN here what it is there?", c.base, op.Err, config.Prefix)
	}
	return fmt.Errorf("ask %s: %w", c.base, err)
}
