// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
	"github.com/tlsnat/tlsnat/gateway/config"
)

func (p *program) run(args []string) int {
	if !p.noArguments("run", args) {
		return exitUsage
	}
	// A log collector that ends must not take the gateway with it: without this the runtime ends a process that writes to a
	// closed pipe on its standard output or error. And SIGUSR1 and SIGUSR2 mean something to other servers only.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGUSR1, syscall.SIGUSR2)
	// A hook that has renewed a certificate sends SIGHUP at any time, also while this one starts: then it reloads afterwards.
	hangups := make(chan os.Signal, 1) // one that comes during a reload leads to another one
	signal.Notify(hangups, syscall.SIGHUP)
	config, problems := p.config()
	if config == nil {
		p.complain(problems)
		return exitInput
	}
	e, err := p.open(config)
	if errors.Is(err, errStopped) {
		return exitOK
	}
	if err != nil {
		return p.cannot(err)
	}
	e.hangups = hangups
	if e.admin, err = startAdmin(config.Settings, e.Gateway); err != nil {
		e.Drain(cancelled())
		return p.cannot(err)
	}
	gateway.LogProblems(e.Logger(), problems.Lines())
	e.Logger().Info("running", zap.String("version", buildVersion()), zap.Strings("listen", e.listens()), zap.String("admin", e.admin.Addr()), zap.String("admin_socket", e.admin.Socket()))
	return p.serve(e)
}

// cannot prints why the gateway can't run. Whoever reads that may have stopped reading: it is not waited for.
func (p *program) cannot(err error) int {
	printed := make(chan struct{})
	go func() {
		fmt.Fprintln(p.err, err)
		close(printed)
	}()
	select {
	case <-printed:
	case <-time.After(gateway.LastLines):
	}
	return exitCannot
}

// edge is a gateway that listens, and what can end it.
type edge struct {
	*gateway.Gateway
	config  *config.Config
	admin   *admin.Server
	signals chan os.Signal
	hangups chan os.Signal // nil: they end the process, as the end of its terminal should
}

// errStopped is that a signal came before anybody was served.
var errStopped = errors.New("stopped while it started")

// open makes a gateway and lets it listen. From here on the signals are ours: one that ends the process does so at once
// while the start waits for something, such as DNS.
func (p *program) open(config *config.Config) (*edge, error) {
	if err := harden(); err != nil {
		return nil, err
	}
	e := &edge{config: config, signals: make(chan os.Signal, 4)}
	signal.Notify(e.signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	var err error
	if e.Gateway, err = gateway.New(config, p.err); err != nil {
		return nil, err
	}
	started := make(chan error, 1)
	go func() { started <- e.Start() }()
	select {
	case err := <-started:
		return e, err
	case <-e.signals:
		return nil, errStopped
	}
}

// listens are the ports of the map, as ranges; of a map with very many the first.
func (e *edge) listens() (all []string) {
	const enough = 32 // for a line that is read
	listens := e.Status().Listens
	all = append(all, listens[:min(enough, len(listens))]...)
	if len(listens) > enough {
		all = append(all, fmt.Sprintf("and %d more", len(listens)-enough))
	}
	return all
}

// serve waits for the end: SIGTERM, SIGINT and the admin's drain let connections end, one more or SIGQUIT stop now.
func (p *program) serve(e *edge) int {
	defer e.admin.Close()
	notify("READY=1\nSTATUS=listening on " + strings.Join(e.listens(), " "))
	for {
		select {
		case err := <-e.Failed():
			return p.cannot(err)
		case <-e.hangups:
			e.reload()
		case s := <-e.signals:
			e.drain(s)
			return exitOK
		case <-e.admin.DrainAsked():
			e.drain(apiCall{})
			return exitOK
		}
	}
}

// reload reads map and certificates again. What is wrong with them is in the log.
func (e *edge) reload() {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	notify(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000))
	e.Reload()
	notify("READY=1\nSTATUS=listening on " + strings.Join(e.listens(), " "))
}

// drain lets connections end until the deadline, or until a signal says that it's enough. Load balancers hear of it first,
// and get TLSNAT_SHUTDOWN_DELAY to stop sending.
func (e *edge) drain(why fmt.Stringer) {
	settings := &e.config.Settings
	notify("STOPPING=1")
	e.admin.Retire()
	patience := settings.DrainTimeout
	if why == syscall.SIGQUIT || !e.linger(why, settings.ShutdownDelay) {
		patience = 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	e.Logger().Info("draining", zap.Stringer("reason", why), zap.Stringer("deadline", patience))
	go func() {
		select {
		case <-e.signals:
			cancel()
		case <-ctx.Done():
		}
	}()
	e.Drain(ctx)
}

// linger goes on accepting for as long. A signal, or a loop that fails, ends it, and the drain as well: false.
func (e *edge) linger(why fmt.Stringer, delay time.Duration) bool {
	if delay <= 0 {
		return true
	}
	e.Logger().Info("shutting down: /readyz fails from now on, connections are still accepted", zap.Stringer("reason", why), zap.Stringer("delay", delay))
	select {
	case <-time.After(delay):
		return true
	case <-e.signals:
	case <-e.Failed():
	}
	return false
}

func cancelled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// harden keeps key material out of core dumps, also of those that go to a program (core_pattern with a pipe, which
// RLIMIT_CORE does not stop), and the memory away from other processes of the same user.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: prctl(PR_SET_DUMPABLE): %w", err)
	}
	return nil
}

// notify tells systemd how things stand (sd_notify(3)); elsewhere it does nothing.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = conn.Write([]byte(state))
}
