// SPDX-License-Identifier: Apache-2.0

// Package admin shows how a gateway is doing: a page for people, metrics for Prometheus, health checks for load
// balancers, JSON for programs.
//
//	a, err := admin.Start(settings, g, version)
//	...
//	select {
//	case <-a.DrainAsked():
//		a.Retire()
//		g.Drain(ctx)
//	}
//	a.Close()
//
//	GET  /                    the page
//	GET  /metrics             Prometheus
//	GET  /healthz  /readyz    200; /readyz is 503 while the gateway drains
//	GET  /api/v1/             what there is
//	GET  /api/v1/status  /api/v1/map  /api/v1/conns  /api/v1/backends  /api/v1/certs  /api/v1/generations
//	POST /api/v1/backends/drain?backend=ADDRESS   and /maintain, /ready
//	POST /api/v1/drain        what SIGTERM does
//	POST /api/v1/reload       what SIGHUP does, with an answer
//
// It listens on TCP, and on a Unix socket. Orders (POST) come by the socket, whose mode says who may give them, or with the
// token: as "Authorization: Bearer TOKEN", or as the password of Basic authentication, which is what a browser can ask its
// user for. If the settings have no token, one is made in the state directory, the address is a loopback one, and who may
// connect to that may look; with TLSNAT_ADMIN_TOKEN everything but the health checks demands it.
//
// It does not speak TLS, and except for drain, reload and the states of backends it changes nothing.
package admin

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
)

const (
	// Connections to the socket at once: a handful of commands.
	maxSocketClients = 32
	// Answers being written at once. With fewer, readers on slow networks would disturb each other; each may be megabytes.
	maxAnswers = 16
	// Answers being made at once, and how long a place rests after each when others wait, as a multiple of the time that it
	// took and at most: so who asks without end gets half a core, and the loops and health checks the rest.
	maxMaking, restAfter, longestRest = 2, 3, 100 * time.Millisecond
	// Nothing that is asked here has a body, and no client needs longer for a few lines of header.
	headerTime = 5 * time.Second
	// The slowest reader of the longest answer.
	answerTime = 30 * time.Second
	// Prometheus asks every 15 s, as a rule, and keeps its connection.
	idleTime = 30 * time.Second
	// Browsers send less than 2 KiB, cookies of other programs on this host's name included as a rule.
	maxHeader = 8 << 10
)

// Server is the admin of one gateway. A nil Server is one that was switched off.
type Server struct {
	gateway   *gateway.Gateway
	version   string
	http      *http.Server
	addr      netip.AddrPort     // not valid: it does not listen on TCP
	secret    *[sha256.Size]byte // of the token; nil: there is none, so nobody has it
	open      bool               // no token is needed to look
	tokenPath string             // of the token that was made; "": it was set
	tcp, unix *clients           // nil: it does not listen there
	socket    *socket
	kept      *reserve
	making    chan struct{} // has an entry for each answer that is being made
	waiting   atomic.Int32  // requests for a place in it
	orders    orders

	draining   atomic.Bool
	drainOnce  sync.Once
	drainAsked chan struct{}
}

// Start listens on TLSNAT_ADMIN and TLSNAT_ADMIN_SOCKET and serves until Close. With both off it returns nil, which is a
// Server too. The version is what it says is running.
func Start(s config.Settings, g *gateway.Gateway, version string) (*Server, error) {
	if path, _ := s.AdminSocketAt(s.Admin); s.Admin == "off" && path == "" {
		return nil, nil
	}
	a := &Server{gateway: g, version: version, open: s.AdminToken == "", drainAsked: make(chan struct{}), making: make(chan struct{}, maxMaking)}
	l, err := a.listenTCP(s)
	if err != nil {
		return nil, err
	}
	at := s.Admin
	if l != nil {
		at = a.Addr()
	}
	if a.socket, err = openSocket(s, at, func(text string) { g.Logger().Warn(text) }); err != nil {
		if l != nil {
			_ = l.Close()
		}
		return nil, err
	}
	a.kept = newReserve(config.AdminSpares)
	a.http = &http.Server{Handler: a.routes(), ReadHeaderTimeout: headerTime, ReadTimeout: headerTime, WriteTimeout: answerTime,
		IdleTimeout: idleTime, MaxHeaderBytes: maxHeader, ErrorLog: a.errorLog(), DisableGeneralOptionsHandler: true, ConnContext: withClient,
		ConnState: noteIdle}
	if a.socket != nil {
		a.unix = newClients(a.socket, maxSocketClients, a.kept)
		go func() { _ = a.http.Serve(a.unix) }()
	}
	if l != nil {
		a.useToken(s)
		a.tcp = newClients(l, config.AdminClients(), a.kept)
		go func() { _ = a.http.Serve(a.tcp) }()
	}
	return a, nil
}

// listenTCP listens on the address; nil: it is off.
func (s *Server) listenTCP(settings config.Settings) (net.Listener, error) {
	if settings.Admin == "off" {
		return nil, nil
	}
	l, err := net.Listen("tcp", settings.Admin)
	if err != nil {
		return nil, fmt.Errorf("%sADMIN=%s: %w; %s", config.Prefix, settings.Admin, reason(err), hint(err))
	}
	s.addr = l.Addr().(*net.TCPAddr).AddrPort()
	if s.open && !s.addr.Addr().IsLoopback() {
		_ = l.Close()
		return nil, fmt.Errorf("%sADMIN=%s is not a loopback address, and then %sADMIN_TOKEN has to be set", config.Prefix, settings.Admin, config.Prefix)
	}
	return l, nil
}

// useToken takes the token that is set, or the one in the state directory. Without either nobody gives orders over TCP.
func (s *Server) useToken(settings config.Settings) {
	token := settings.AdminToken
	if token == "" {
		var err error
		if token, err = settings.MakeAdminToken(); err != nil || token == "" {
			s.gateway.Logger().Warn("there is no token, so nobody can give orders over TCP: set "+config.Prefix+"ADMIN_TOKEN", zap.Error(err))
			return
		}
		s.tokenPath = settings.AdminTokenPath()
	}
	sum := sha256.Sum256([]byte(token))
	s.secret = &sum
}

// noteIdle tells a client that its answer is written.
func noteIdle(c net.Conn, state http.ConnState) {
	if n, ok := c.(*client); ok && state == http.StateIdle {
		n.answered()
	}
}

// errorLog is the gateway's log for what package log writes to: what the HTTP server can't tell anybody else.
func (s *Server) errorLog() *log.Logger {
	l, err := zap.NewStdLogAt(s.gateway.Logger(), zap.WarnLevel)
	if err != nil {
		return log.Default() // never: it's about levels that don't exist
	}
	return l
}

// reason is err without the address, which the message has already.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func hint(err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return "another program or a rule of the map listens there ('ss -ltnp' shows which): stop it, or set another address, or 'off'"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return "this machine does not have the address; set one of its own, or 'off'"
	case errors.Is(err, syscall.EACCES):
		return "ports below 1024 need a right; set a higher port"
	}
	return "set another address, or 'off'"
}

// Addr is the address that it listens on, empty if it's off.
func (s *Server) Addr() string {
	if s == nil || !s.addr.IsValid() {
		return ""
	}
	return s.addr.String()
}

// Socket is the path of the socket that it listens on, empty if there is none.
func (s *Server) Socket() string {
	if s == nil || s.socket == nil {
		return ""
	}
	return s.socket.path
}

// TokenPath is the file with the token that was made, empty if one was set or none is needed.
func (s *Server) TokenPath() string {
	if s == nil {
		return ""
	}
	return s.tokenPath
}

// DrainAsked is closed when somebody has asked for a drain. It's up to the caller to do it.
func (s *Server) DrainAsked() <-chan struct{} {
	if s == nil {
		return nil
	}
	return s.drainAsked
}

// Retire is to be called before the gateway drains: from here on /readyz says no, and connections are not kept alive,
// so that load balancers look again and find out.
func (s *Server) Retire() {
	if s == nil {
		return
	}
	s.draining.Store(true)
	s.http.SetKeepAlivesEnabled(false)
}

// Close ends it at once.
func (s *Server) Close() error {
	if s == nil {
		return nil
	}
	defer s.kept.close()
	return s.http.Close()
}

// routes is who answers what. Health checks come from machines that know no token and use any name.
func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", thePage)
	mux.Handle("GET /metrics", s.bounded(s.metrics()))
	s.api(mux)

	all := http.NewServeMux()
	all.HandleFunc("GET /healthz", s.healthz)
	all.HandleFunc("GET /readyz", s.readyz)
	own := http.NewCrossOriginProtection()
	own.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refuse(w, r, http.StatusForbidden, "A page of another site has asked for this", "use the admin's own page, tlsnat or curl")
	}))
	all.Handle("/", own.Handler(s.guard(mux)))
	return harmless(all)
}

// bounded is for answers that take time to make and to write: few are made at once, in memory, and few are written.
func (s *Server) bounded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.waiting.Add(1)
		select {
		case s.making <- struct{}{}:
			s.waiting.Add(-1)
		case <-r.Context().Done(): // it has lost its place meanwhile
			s.waiting.Add(-1)
			return
		}
		made := &madeAnswer{header: w.Header()}
		func() {
			defer s.made(time.Now())
			next.ServeHTTP(made, r)
		}()
		if n := clientOf(r); n != nil {
			n.answers()
		}
		made.send(w)
	})
}

// made gives the place of an answer to the next one, after a rest.
func (s *Server) made(began time.Time) {
	if s.waiting.Load() == 0 {
		<-s.making
		return
	}
	time.AfterFunc(min(restAfter*time.Since(began), longestRest), func() { <-s.making })
}

// madeAnswer is an answer that is not sent yet.
type madeAnswer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (m *madeAnswer) Header() http.Header { return m.header }

func (m *madeAnswer) WriteHeader(code int) {
	if m.code == 0 {
		m.code = code
	}
}

func (m *madeAnswer) Write(p []byte) (int, error) { return m.body.Write(p) }

func (m *madeAnswer) send(w http.ResponseWriter) {
	w.WriteHeader(cmp.Or(m.code, http.StatusOK))
	_, _ = w.Write(m.body.Bytes())
}

// Health checks come without a token, so nobody knows from whom: their connections are not kept.
func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Connection", "close")
	answer(w, http.StatusOK, "ok")
}

func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Connection", "close")
	if s.isDraining() {
		answer(w, http.StatusServiceUnavailable, "draining")
		return
	}
	answer(w, http.StatusOK, "ready")
}

func (s *Server) isDraining() bool { return s.draining.Load() || s.gateway.Draining() }

func answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text + "\n"))
}

// refuse is for who may not ask: in JSON where programs do.
func refuse(w http.ResponseWriter, r *http.Request, status int, wrong, instead string) {
	if strings.HasPrefix(r.URL.Path, apiPath) {
		fail(w, status, wrong, instead)
		return
	}
	answer(w, status, wrong+": "+instead+".")
}

// harmless keeps other sites from using answers in a browser in any way. The page relaxes it for itself.
func harmless(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Content-Type-Options", "nosniff")
		next.ServeHTTP(w, r)
	})
}

// guard lets through who may look, and of those who may give orders. Who could open the socket may do both.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		looks := r.Method == http.MethodGet || r.Method == http.MethodHead
		switch {
		case bySocket(r):
			next.ServeHTTP(w, r)
		case !s.knows(r.Host):
			refuse(w, r, http.StatusMisdirectedRequest, "This address answers to "+s.Addr()+" and localhost only", "name one of them in the request")
		case looks && s.open, s.trusts(r):
			next.ServeHTTP(w, r)
		case looks:
			s.demandToken(w, r)
		default:
			s.refuseOrder(w, r)
		}
	})
}

func bySocket(r *http.Request) bool {
	n := clientOf(r)
	return n != nil && n.peer != nil
}

func (s *Server) demandToken(w http.ResponseWriter, r *http.Request) {
	w.Header().Add("WWW-Authenticate", `Bearer realm="tlsnat"`)
	w.Header().Add("WWW-Authenticate", `Basic realm="tlsnat: any name, and the token as password", charset="UTF-8"`)
	refuse(w, r, http.StatusUnauthorized, "This needs the token", "send Authorization: Bearer TOKEN, or any name with the token as password")
}

// knows says whether the name that a request is for may be ours. On loopback it must be a loopback one: a web site may
// have its own name lead to 127.0.0.1 and then read, in the visitor's browser, what is here (DNS rebinding). On other
// addresses the token keeps it out, and the name may be any.
func (s *Server) knows(hostport string) bool {
	if !s.addr.Addr().IsLoopback() {
		return true
	}
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]")
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap().IsLoopback()
	}
	return host == "" || strings.EqualFold(host, "localhost") // without a name (HTTP/1.0) it's no browser
}

// trusts says whether the request has the token. Hashes are compared, which have one length whatever was sent.
func (s *Server) trusts(r *http.Request) bool {
	if s.secret == nil {
		return false
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		if _, token, ok = r.BasicAuth(); !ok {
			return false
		}
	}
	sum := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(sum[:], s.secret[:]) == 1
}
