// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"time"
)

// Attacks on the admin: on its connections, its orders and its secrets.
var adminAttacks = []attack{
	{"health-behind-hostile-connections", "clients of the admin that hold their connections make /readyz time out", healthBehindFlood},
	{"order-without-a-token", "anybody on the machine can drain, reload or take out backends", orderWithoutToken},
	{"token-to-a-proxy", "commands send the admin's token to $HTTP_PROXY", tokenToProxy},
	{"log-reader-that-hangs", "a log that nobody reads keeps SIGTERM from ending the process", logReaderHangs},
	{"log-on-a-full-disk", "lines that are lost are not counted", logOnFullDisk},
	{"log-with-control-characters", "what strangers send reaches terminals raw", logWithControls},
}

// within is what the admin has for an answer, with room for a busy machine.
const within = 2 * time.Second

func healthBehindFlood(s *stage) error {
	e, err := s.start(":{0} -> demo cert=a.example")
	if err != nil {
		return err
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range s.scaled(1000, 10000) {
		c, err := net.DialTimeout("tcp", e.admin, time.Second)
		if err != nil {
			break // refusing more of them is right
		}
		open = append(open, c)
		switch i % 3 {
		case 0: // keeps its connection
			_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
		case 1: // never ends its request
			_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ")
		}
		if i%50 == 0 {
			if err := e.ready(); err != nil {
				return fmt.Errorf("behind %d hostile connections: %w", i, err)
			}
		}
	}
	return e.ready()
}

// ready says whether the gateway answers that it is ready, in time.
func (e *edge) ready() error {
	status, text, err := e.get("/readyz", within)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("/readyz: %d %s", status, text)
	}
	return err
}

func orderWithoutToken(s *stage) error {
	e, err := s.start(":{0} -> demo cert=a.example")
	if err != nil {
		return err
	}
	for _, path := range []string{"/api/v1/drain", "/api/v1/reload"} {
		status, _, err := e.ask(http.MethodPost, path, within)
		if err != nil {
			return err
		}
		if status != http.StatusUnauthorized && status != http.StatusForbidden {
			return fmt.Errorf("POST %s without a token is answered with %d", path, status)
		}
	}
	return e.ready()
}

func tokenToProxy(s *stage) error {
	heard := make(chan string, 1)
	proxy, err := s.serve(func(c net.Conn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		select {
		case heard <- string(b[:n]):
		default:
		}
	})
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"show", "map"}, {"reload"}, {"backend", "drain", "192.0.2.1:1"}} {
		cmd := exec.Command(s.binary, args...)
		cmd.Dir = s.dir
		cmd.Env = []string{"HOME=" + s.dir, "TLSNAT_STATE=" + s.path("state"), "TLSNAT_ADMIN=192.0.2.77:9180", "TLSNAT_ADMIN_TOKEN=secret-of-this-attack",
			"HTTP_PROXY=http://" + proxy, "http_proxy=http://" + proxy, "ALL_PROXY=http://" + proxy}
		if err := cmd.Start(); err != nil {
			return err
		}
		ended := make(chan struct{})
		go func() {
			_ = cmd.Wait()
			close(ended)
		}()
		select {
		case text := <-heard:
			_ = cmd.Process.Kill()
			<-ended
			return fmt.Errorf("tlsnat %s asked the proxy: %q", strings.Join(args, " "), text)
		case <-ended:
		case <-time.After(2 * time.Second): // the address is nobody's: it would wait for longer
			_ = cmd.Process.Kill()
			<-ended
		}
	}
	return nil
}

func logReaderHangs(s *stage) error {
	e, err := s.prepare(":{0} -> demo cert=a.example", "LOG_LEVEL=debug")
	if err != nil {
		return err
	}
	cmd := exec.Command(s.binary, "run")
	cmd.Env, cmd.Dir = e.env, s.dir
	unread, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	defer unread.Close()
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer func() {
		_ = cmd.Process.Kill()
		<-ended
	}()
	go func() {
		_, _ = cmd.Process.Wait() // not cmd.Wait, which reads the pipe to its end
		close(ended)
	}()
	if err := until(func() error { return e.ready() }); err != nil {
		return err
	}
	for range 2000 { // each makes a line: a pipe holds 64 KiB, and a line has some hundred bytes
		if c, err := e.dial(0); err == nil {
			c.Close()
		}
	}
	if err := cmd.Process.Signal(sigterm); err != nil {
		return err
	}
	select {
	case <-ended:
		return nil
	case <-time.After(patience):
		return errors.New("SIGTERM does not end it")
	}
}

// until tries f until it succeeds, for as long as there is patience.
func until(f func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func logOnFullDisk(s *stage) error {
	e, err := s.prepare(":{0} -> demo cert=a.example")
	if err != nil {
		return err
	}
	cmd := exec.Command("sh", "-c", "exec "+s.binary+" run 2>/dev/full")
	cmd.Env, cmd.Dir = e.env, s.dir
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err := until(func() error { return e.ready() }); err != nil {
		return err
	}
	for range 20 {
		if c, err := e.dial(0); err == nil {
			c.Close()
		}
	}
	return until(func() error {
		_, text, err := e.get("/metrics", within)
		if err != nil {
			return err
		}
		for l := range strings.Lines(text) {
			if strings.HasPrefix(l, "tlsnat_log_lines_dropped") && !strings.HasSuffix(strings.TrimSpace(l), " 0") {
				return nil
			}
		}
		return errors.New("no line is counted as lost, and none was written")
	})
}

func logWithControls(s *stage) error {
	e, err := s.start(":{0} -> {echo} mode=tcp", "PROXY_FROM=127.0.0.0/8", "LOG_FORMAT=console")
	if err != nil {
		return err
	}
	for _, words := range []string{"PROXY \x1b[2J\u202e\u0085\r\n", "\u009b31m"} {
		if _, err := e.says(0, words+strings.Repeat("x", 200)); err != nil && !isReset(err) {
			return err
		}
	}
	time.Sleep(200 * time.Millisecond)
	for _, bad := range []string{"\x1b[2J", "\u202e", "\u0085", "\u009b"} {
		if bytes.Contains([]byte(e.said()), []byte(bad)) {
			return fmt.Errorf("the log has the raw characters %q", bad)
		}
	}
	return nil
}
