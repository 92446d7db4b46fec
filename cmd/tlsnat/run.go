// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/tlsnat/tlsnat/gateway"
)

func (p *program) run(args []string) int {
	if !p.noArguments("run", args) {
		return exitUsage
	}
	config, ok := p.config()
	if !ok {
		return exitInput
	}
	return p.serve(config, func(string) {})
}

func (p *program) demo(args []string) int {
	if !p.noArguments("demo", args) {
		return exitUsage
	}
	s, err := gateway.ReadSettings(p.environ)
	if err != nil {
		return p.complain(err)
	}
	if s.Map != "" || s.MapFile != "" {
		fmt.Fprintf(p.err, "tlsnat demo: a map is set; 'tlsnat run' runs it\n")
		return exitUsage
	}
	s.Map, s.Certs = gateway.DemoMap, ""
	config, problems := gateway.ReadConfig(s)
	if config == nil {
		fmt.Fprintln(p.err, problems)
		return exitInput
	}
	return p.serve(config, func(admin string) { p.welcome(s, admin) })
}

// welcome says what listens and how to try it.
func (p *program) welcome(s gateway.Settings, admin string) {
	fmt.Fprintf(p.out, "tlsnat demo: %s\n\n", gateway.DemoMap)
	fmt.Fprintf(p.out, "  try it   curl --cacert %s https://localhost:8443/\n", filepath.Join(gateway.DemoCertFile(s)))
	if admin != "" {
		fmt.Fprintf(p.out, "  look     http://%s/\n", admin)
	}
	fmt.Fprintf(p.out, "  stop     Ctrl-C\n\nA line for each connection follows. 'tlsnat help' says how to go on from here.\n\n")
}

// config reads everything, and prints every complaint.
func (p *program) config() (*gateway.Config, bool) {
	s, err := gateway.ReadSettings(p.environ)
	if err != nil {
		p.complain(err)
		return nil, false
	}
	config, problems := gateway.ReadConfig(s)
	for _, problem := range problems {
		fmt.Fprintln(p.err, problem)
	}
	return config, config != nil
}

// complain prints what the user wrote wrong.
func (p *program) complain(err error) int {
	fmt.Fprintln(p.err, err)
	return exitInput
}

// serve runs the gateway until a signal ends it: SIGTERM and SIGINT drain, a second one or SIGQUIT stop now.
func (p *program) serve(config *gateway.Config, started func(admin string)) int {
	if err := harden(); err != nil {
		fmt.Fprintln(p.err, err)
		return exitCannot
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	g, err := gateway.New(config, p.err)
	if err == nil {
		err = g.Start()
	}
	if err != nil {
		fmt.Fprintln(p.err, err)
		return exitCannot
	}
	admin, err := startAdmin(config.Settings, g)
	if err != nil {
		fmt.Fprintln(p.err, err)
		g.Drain(cancelled())
		return exitCannot
	}
	defer admin.Close()
	started(admin.address())
	notify("READY=1")
	select {
	case err := <-g.Failed():
		fmt.Fprintln(p.err, err)
		return exitCannot
	case s := <-signals:
		notify("STOPPING=1")
		p.drain(g, config.Settings, s, signals)
	}
	return exitOK
}

// drain lets connections end until the deadline, or until a second signal says that it's enough.
func (p *program) drain(g *gateway.Gateway, s gateway.Settings, first os.Signal, more <-chan os.Signal) {
	ctx, cancel := context.WithTimeout(context.Background(), s.DrainTimeout)
	defer cancel()
	if first == syscall.SIGQUIT {
		cancel()
	}
	go func() {
		select {
		case <-more:
			cancel()
		case <-ctx.Done():
		}
	}()
	g.Drain(ctx)
}

func cancelled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// harden keeps key material out of core dumps and away from debuggers.
func harden() error {
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
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

