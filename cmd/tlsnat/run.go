// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
)

func (p *program) run(args []string) int {
	if !p.noArguments("run", args) {
		return exitUsage
	}
	config, problems := p.config()
	if config == nil {
		p.complain(problems)
		return exitInput
	}
	// A log collector that ends must not take the gateway with it. Without this the runtime ends a process that
	// writes to a closed pipe on its standard output or error.
	signal.Ignore(syscall.SIGPIPE)
	e, err := p.open(config)
	if err != nil {
		return p.cannot(err)
	}
	if e.admin, err = startAdmin(config.Settings, e.Gateway); err != nil {
		e.Drain(cancelled())
		return p.cannot(err)
	}
	e.hangups = make(chan os.Signal, 1) // one that comes during a reload leads to another one
	signal.Notify(e.hangups, syscall.SIGHUP)
	gateway.LogProblems(e.Logger(), problems.Lines())
	e.Logger().Info("running", zap.String("version", buildVersion()), zap.Strings("listen", e.listens()), zap.String("admin", e.admin.Addr()))
	return p.serve(e)
}

// cannot prints why the gateway can't run.
func (p *program) cannot(err error) int {
	fmt.Fprintln(p.err, err)
	return exitCannot
}

// edge is a gateway that listens, and what can end it.
type edge struct {
	*gateway.Gateway
	config  *gateway.Config
	admin   *admin.Server
	signals chan os.Signal
	hangups chan os.Signal // nil: they end the process, as the end of its terminal should
}

// open makes a gateway and lets it listen. From here on the signals are ours.
func (p *program) open(config *gateway.Config) (*edge, error) {
	if err := harden(); err != nil {
		return nil, err
	}
	e := &edge{config: config, signals: make(chan os.Signal, 4)}
	signal.Notify(e.signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	var err error
	if e.Gateway, err = gateway.New(config, p.err); err != nil {
		return nil, err
	}
	return e, e.Start()
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

// drain lets connections end until the deadline, or until a signal says that it's enough.
func (e *edge) drain(why fmt.Stringer) {
	patience := e.config.Settings.DrainTimeout
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if why == syscall.SIGQUIT {
		cancel()
	}
	notify("STOPPING=1")
	e.admin.Retire()
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
