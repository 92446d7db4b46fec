// SPDX-License-Identifier: Apache-2.0

// Package gateway runs connections from their first byte to their last: it listens, reads the ClientHello, ends TLS or
// leaves it alone, and carries bytes to a backend.
//
//	settings, err := gateway.ReadSettings(os.Environ())
//	config, problems := gateway.ReadConfig(settings)
//	g, err := gateway.New(config, os.Stderr)
//	err = g.Start()
//	...
//	g.Drain(ctx)
//
// It does not parse arguments, does not print and does not end the process; package main does. The map is package
// natmap, the ClientHello package sni, records and keys gateway/record, certificates gateway/certs.
package gateway

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/ktls"
)

// Gateway is a running gateway.
type Gateway struct {
	holds    atomic.Int32 // orders for which nothing is accepted (HoldAccepts)
	settings config.Settings
	started  time.Time
	log      *zap.Logger
	lines    *lineBuffer
	loops    []*loop
	tickets  ticketKeeper
	demo     *demo
	kernel   *ktls.Support // nil when nobody may use it
	house    *gatehouse
	keeper   *keeper

	current    atomic.Pointer[generation]
	open       atomic.Int64 // connections
	maxConns   atomic.Int64
	reloads    reloader
	ports      listening
	waiting    atomic.Int64 // connections for which no backend has room, on all loops
	idBase     uint64
	draining   atomic.Bool
	complained atomic.Int64 // when the last complaint was logged, in unix seconds

	stop   context.CancelFunc
	failed chan error
	ended  sync.WaitGroup

	shortages shortages
}

// New makes a gateway that logs to out. Nothing listens yet.
func New(c *config.Config, out io.Writer) (*Gateway, error) {
	keys, err := certs.NewTickets(nil)
	if err != nil {
		return nil, fmt.Errorf("make session ticket keys: %w", err)
	}
	g := &Gateway{settings: c.Settings, started: time.Now(), failed: make(chan error, 1), tickets: ticketKeeper{keys: keys}}
	g.demo, g.house, g.ports.layout = newDemo(), newGatehouse(), &layout{}
	if c.Settings.KTLS != "off" {
		g.kernel = probeKernel()
	}
	g.keeper = newKeeper(g)
	g.idBase, g.reloads.seed = newIDBase(), maphash.MakeSeed()
	g.loops = make([]*loop, c.Settings.Loops)
	for i := range g.loops {
		if g.loops[i], err = newLoop(g, i); err != nil {
			return nil, fmt.Errorf("make an event loop: %w", err)
		}
	}
	g.lines = newLineBuffer(out)
	g.log = newLogger(&g.settings, g.lines)
	g.lines.lost = func(lines uint64) { // nothing is written before g.log is used
		g.log.Warn("log lines were lost: what the log is written to did not take them", zap.Uint64("count", lines))
	}
	g.current.Store(g.newGeneration(c, nil))
	g.maxConns.Store(g.connectionLimit(g.ports.next(c.Map, maySteer(c.Map) == nil)))
	return g, nil
}

// newIDBase makes the upper part of connection numbers: different in each run, so that two runs' logs don't mix.
func newIDBase() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:])
	return binary.BigEndian.Uint64(b[:]) << 36
}

// connectionLimit is TLSNAT_MAX_CONNS, or what memory and the limit of open files allow: two descriptors a connection, when
// listeners, pipes and what else a process has open are taken off.
func (g *Gateway) connectionLimit(l *layout) int64 {
	if g.settings.MaxConns > 0 {
		return int64(g.settings.MaxConns)
	}
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1000
	}
	n := (int64(min(r.Cur, 1<<24)) - int64(l.reserved(len(g.loops)))) / 2
	return max(1, min(n, int64(g.settings.Memory/leastPerConn)))
}

// Start opens every port of the map and begins to accept. If one can't be opened none is, and the error is about all
// that failed, joined *ListenErrors.
func (g *Gateway) Start() error {
	gen := g.current.Load()
	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	for _, p := range gen.resolve(ctx) {
		g.log.Warn(p)
	}
	if err := g.listen(gen); err != nil {
		cancel()
		return err
	}
	if g.kernel != nil {
		g.log.Info("kernel TLS", zap.Stringer("ktls", g.kernel))
	}
	g.keeper.adopt(gen)
	for _, l := range g.loops {
		go l.run()
	}
	g.ended.Go(func() { trim(ctx) })
	if g.settings.Watch == "on" {
		g.noteFiles() // now: a change after Start is noticed
		g.ended.Go(func() { g.watch(ctx) })
	}
	g.ended.Go(g.demo.serve)
	return nil
}

// listen opens the ports of the first generation. All are probed before the first is opened: later our own sockets
// would be in the way.
func (g *Gateway) listen(gen *generation) error {
	o, err := g.openPorts(gen)
	if err != nil {
		return err
	}
	wide := g.wideRules(gen, o)
	for _, ln := range o.opened {
		ln.loop.adopt(ln)
	}
	for _, l := range g.loops {
		l.serveWide(wide)
	}
	g.maxConns.Store(g.connectionLimit(o.layout))
	return g.steer(o)
}

// Failed delivers the error that ended a loop. It never happens on a healthy kernel.
func (g *Gateway) Failed() <-chan error { return g.failed }

func (g *Gateway) fail(err error) {
	g.log.Error("an event loop ended", zap.Error(err))
	select {
	case g.failed <- err:
	default:
	}
}

// complain logs a warning, at most one a second: what goes wrong ten thousand times a second is said once.
func (g *Gateway) complain(what, msg string, err error, where string) {
	now := time.Now().Unix()
	if last := g.complained.Load(); last == now || !g.complained.CompareAndSwap(last, now) {
		return
	}
	g.log.Warn(msg, zap.String("failed", what), zap.String("listen", where), zap.Error(err))
}

// trusts says whether connections from the address begin with a PROXY header that is believed.
func (g *Gateway) trusts(a netip.Addr) bool { return g.settings.Trusts(a) }

// Open is how many connections are open.
func (g *Gateway) Open() int64 { return g.open.Load() }

// Draining says whether Drain was called: then health checks should fail.
func (g *Gateway) Draining() bool { return g.draining.Load() }

// Drain ends the gateway gently: new connections are refused, those that are established go on until they end by
// themselves or ctx is done; then they are cut, with outcome "drained". It returns when everything is closed and
// logged.
func (g *Gateway) Drain(ctx context.Context) {
	if g.draining.Swap(true) {
		return
	}
	g.eachListener((*listener).lastCalls)
	select {
	case <-time.After(lastCall):
	case <-ctx.Done():
	}
	for _, l := range g.loops {
		l.post(func() {
			for _, ln := range l.listeners {
				ln.close()
			}
			l.stopping = true
		})
	}
	g.finish(ctx)
}

func (g *Gateway) eachListener(do func(*listener)) {
	for _, l := range g.loops {
		l.post(func() {
			for _, ln := range l.listeners {
				do(ln)
			}
		})
	}
}

// finish waits for the loops to end, cutting their connections when ctx is done.
func (g *Gateway) finish(ctx context.Context) {
	if !g.loopsEnd(ctx) {
		g.cutRest()
	}
	g.stop()
	g.reloads.one.Lock() // one that runs comes to its end
	_ = g.ports.steering.Close()
	g.reloads.one.Unlock()
	g.keeper.close()
	g.demo.close()
	g.ended.Wait()
	g.lines.close()
}

// loopsEnd waits for the loops to end, and says whether all have before ctx was done.
func (g *Gateway) loopsEnd(ctx context.Context) bool {
	for _, l := range g.loops {
		select {
		case <-l.done:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
