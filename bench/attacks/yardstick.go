// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// haproxyConfig has one thread, as the gateway has one loop here, and waits for clients as long as it does.
const haproxyConfig = `
global
	nbthread 1
	maxconn 8000
	ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
	mode tcp
	timeout connect 10s
	timeout client 10s
	timeout server 10s
	backlog 4096
frontend edge
	bind {listen} ssl crt {pem}
	default_backend echo
backend echo
	server one {echo}
`

// haproxy runs HAProxy in the gateway's place, with its certificate and an echo backend.
func (s *stage) haproxy() (*edge, error) {
	path, err := tool("haproxy")
	if err != nil {
		return nil, err
	}
	back, err := s.echo()
	if err != nil {
		return nil, err
	}
	p, err := port()
	if err != nil {
		return nil, err
	}
	e := &edge{stage: s, addrs: []string{fmt.Sprintf("127.0.0.1:%d", p)}}
	config, err := s.write("haproxy.cfg", strings.NewReplacer("{listen}", e.addrs[0], "{pem}", s.path("certs/a.pem"), "{echo}", back).Replace(haproxyConfig))
	if err != nil {
		return nil, err
	}
	e.cmd = exec.Command(path, "-db", "-q", "-f", config)
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := e.cmd.Start(); err != nil {
		return nil, err
	}
	s.atEnd(func() error {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait()
		return nil
	})
	return e, until(func() error {
		_, err := e.honest("", 0, "a.example")
		return err
	})
}

// beside measures the gateway, and HAProxy if it is installed, and prints both figures. Only the gateway's decides.
func (s *stage) beside(e *edge, what string, measure func(*edge) (time.Duration, error)) (time.Duration, error) {
	ours, err := measure(e)
	if err != nil {
		return 0, err
	}
	theirs := "HAProxy is not installed"
	if h, err := s.haproxy(); err == nil {
		if d, err := measure(h); err == nil {
			theirs = "HAProxy: " + round(d)
		} else {
			theirs = "HAProxy: " + err.Error()
		}
	} else if !errors.Is(err, errSkip) {
		return 0, err
	}
	fmt.Printf("      %s: %s (%s)\n", what, round(ours), theirs)
	return ours, nil
}

// round is a time in three digits or so.
func round(d time.Duration) string {
	if d > 10*time.Millisecond {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Microsecond).String()
}
