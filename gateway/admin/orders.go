// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

// Orders at once. They are an operator's or a script's; a reload takes seconds, and others wait for it.
const maxOrders = 8

// What an order may need of descriptors: a reload reads one file at a time, and DNS needs two.
const orderDescriptors = 4

// orders is who has ordered what.
type orders struct {
	running atomic.Int32
	results [orderResults]atomic.Uint64

	mu       sync.Mutex
	logged   time.Time // when a refusal was logged last
	unlogged int       // refusals since
}

const (
	orderDone = iota
	orderFailed
	orderRefused
	orderResults
)

var (
	orderWords = [orderResults]string{"done", "failed", "refused"}
	ordersDesc = desc("admin_orders_total", "Orders by POST, by result: refused are those without the token.", "result")
	shedDesc   = desc("admin_connections_shed_total", "Connections to the admin that were closed because others came, by where.", "listener")
	openDesc   = desc("admin_connections_open", "Connections to the admin that are open, by where.", "listener")
	spareDesc  = desc("admin_descriptors_spare", "Descriptors that the admin keeps in reserve. Fewer than "+fmt.Sprint(config.AdminSpares)+": the process has run out of them.")
	adminDescs = []*prometheus.Desc{ordersDesc, shedDesc, openDesc, spareDesc}
)

// status notes the status of an answer.
type status struct {
	http.ResponseWriter
	code int
}

func (s *status) WriteHeader(code int) {
	s.code = code
	s.ResponseWriter.WriteHeader(code)
}

func (s *status) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// order carries out an order and logs it: who, from where, what, and what came of it.
func (s *Server) order(name string, handle http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if s.orders.running.Add(1) > maxOrders {
			s.orders.running.Add(-1)
			fail(w, http.StatusServiceUnavailable, fmt.Sprintf("%d orders are being carried out", maxOrders), "wait until they are done")
			return
		}
		defer s.orders.running.Add(-1)
		if n := clientOf(r); n != nil {
			defer n.keep()()
		}
		if s.kept.needed() { // clients that wait must not get what the order needs
			defer s.gateway.HoldAccepts()()
		}
		if s.kept.spend(orderDescriptors) {
			defer s.kept.refill()
		}
		noted := &status{w, http.StatusOK}
		handle(noted, r)
		level, result := zapcore.InfoLevel, orderDone
		if noted.code >= http.StatusBadRequest {
			level, result = zapcore.WarnLevel, orderFailed
		}
		s.orders.results[result].Add(1)
		s.gateway.Logger().Log(level, "order", append(s.whoOrders(name, r), zap.String("result", orderWords[result]), zap.Int("status", noted.code))...)
	}
}

// whoOrders says who has sent an order, from where, and what it is about.
func (s *Server) whoOrders(name string, r *http.Request) []zap.Field {
	fields := []zap.Field{zap.String("order", name)}
	if backend := r.URL.Query().Get("backend"); backend != "" {
		fields = append(fields, zap.String("backend", printable.Text(backend, maxShown)))
	}
	if n := clientOf(r); n != nil && n.peer != nil {
		return append(fields, zap.String("by", "socket"), zap.Uint32("uid", n.peer.Uid), zap.Uint32("gid", n.peer.Gid), zap.Int32("pid", n.peer.Pid))
	}
	by := "nobody"
	if s.trusts(r) {
		by = "token"
	}
	return append(fields, zap.String("by", by), zap.String("peer", r.RemoteAddr))
}

// maxShown is how much of a stranger's text the log has.
const maxShown = 128

// refuseOrder answers somebody who may not give orders, and logs it: a line a second, since anybody can ask.
func (s *Server) refuseOrder(w http.ResponseWriter, r *http.Request) {
	s.orders.results[orderRefused].Add(1)
	s.logRefusal(r)
	if !s.open {
		s.demandToken(w, r)
		return
	}
	w.Header().Set("WWW-Authenticate", `Bearer realm="tlsnat"`) // not Basic: the page asks for it itself
	instead := "send Authorization: Bearer TOKEN with the one in " + s.tokenPath
	if s.secret == nil {
		instead = "set " + config.Prefix + "ADMIN_TOKEN and start it again: it could not make a token itself, the log says why"
	}
	if s.socket != nil {
		instead += "; or use the tlsnat command, or curl --unix-socket " + s.socket.path
	}
	refuse(w, r, http.StatusUnauthorized, "Orders need the token", instead)
}

func (s *Server) logRefusal(r *http.Request) {
	o := &s.orders
	o.mu.Lock()
	defer o.mu.Unlock()
	if time.Since(o.logged) < time.Second {
		o.unlogged++
		return
	}
	fields := append(s.whoOrders(printable.Text(r.Method+" "+r.URL.Path, maxShown), r), zap.String("result", orderWords[orderRefused]))
	if o.unlogged > 0 {
		fields = append(fields, zap.Int("unlogged", o.unlogged))
	}
	o.logged, o.unlogged = time.Now(), 0
	s.gateway.Logger().Warn("order", fields...)
}

// collectAdmin sends what is known of the admin itself.
func (s *Server) collectAdmin(send sender) {
	for i, word := range orderWords {
		send(ordersDesc, prometheus.CounterValue, float64(s.orders.results[i].Load()), word)
	}
	for _, c := range [...]struct {
		name string
		of   *clients
	}{{"tcp", s.tcp}, {"socket", s.unix}} {
		shed, open := uint64(0), 0
		if c.of != nil {
			shed = c.of.shed.Load()
			c.of.mu.Lock()
			open = len(c.of.open)
			c.of.mu.Unlock()
		}
		send(shedDesc, prometheus.CounterValue, float64(shed), c.name)
		send(openDesc, prometheus.GaugeValue, float64(open), c.name)
	}
	send(spareDesc, prometheus.GaugeValue, float64(s.kept.left()))
}
