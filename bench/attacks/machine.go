// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"
)

// Attacks by the machine: it lacks something, stands still, or has files that are no good.
var machineAttacks = []attack{
	{"out-of-descriptors", "a gateway without descriptors can't say so, or cuts healthy connections", outOfDescriptors},
	{"stalled-readers-take-all-pipes", "streams that nobody reads take every descriptor", stalledReaders},
	{"process-that-stood-still", "a process that stood still drops what came meanwhile as idle", stoodStill},
	{"hangup-during-the-start", "SIGHUP ends a gateway that is just starting", hangupDuringStart},
	{"unusable-files-beside-good-ones", "one file that is no good takes every other certificate along", unusableFiles},
	{"fifo-among-the-files", "check and run wait for ever on a file that is a pipe", fifoAmongFiles},
	{"service-variables-of-kubernetes", "variables that Kubernetes makes for a service called tlsnat stop the start", kubernetesVariables},
}

const sigterm = syscall.SIGTERM

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrUnexpectedEOF)
}

func outOfDescriptors(s *stage) error {
	limiter, err := tool("prlimit")
	if err != nil {
		return err
	}
	e, err := s.startThrough([]string{limiter, "--nofile=256"}, ":{0} -> {echo} mode=tcp check=tcp every=1s on-down=cut", "MAX_CONNS=100000")
	if err != nil {
		return err
	}
	healthy, err := e.dial(0)
	if err != nil {
		return err
	}
	defer healthy.Close()
	if err := echoes(healthy, []byte("before")); err != nil {
		return err
	}
	for range 400 {
		c, err := net.DialTimeout("tcp", e.addrs[0], time.Second)
		if err != nil {
			break
		}
		defer c.Close()
	}
	time.Sleep(3 * time.Second) // some checks fail for want of a descriptor
	if err := echoes(healthy, []byte("after")); err != nil {
		return fmt.Errorf("a healthy connection: %w", err)
	}
	return e.ready()
}

func stalledReaders(s *stage) error {
	limiter, err := tool("prlimit")
	if err != nil {
		return err
	}
	back, err := s.flood()
	if err != nil {
		return err
	}
	e, err := s.startThrough([]string{limiter, "--nofile=1024"}, ":{0} -> "+back+" mode=tcp")
	if err != nil {
		return err
	}
	for range 380 {
		c, err := e.dialSlow("", 0)
		if err != nil {
			return err
		}
		defer c.Close()
	}
	if err := e.quiet(); err != nil { // once nobody takes anything any more
		return err
	}
	if strings.Contains(e.said(), "too many open files") {
		return errors.New("it ran out of descriptors: " + tail(e.said()))
	}
	return e.ready()
}

// flood is a backend that sends for as long as anybody takes it.
func (s *stage) flood() (string, error) {
	b := make([]byte, 1<<20)
	return s.serve(func(c net.Conn) {
		_ = c.(*net.TCPConn).SetWriteBuffer(smallBuffer)
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
}

// smallBuffer is what the sockets of stalled streams ask for. With the kernel's own sizes some hundred streams take all the memory
// that TCP may have on a machine. Then it drops segments of everybody, also those that ask the gateway whether it is ready.
const smallBuffer = 16 << 10

// dialSlow connects a client that takes no more than a little before it reads. Its window has to be small from the start.
func (e *edge) dialSlow(from string, i int) (net.Conn, error) {
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			_ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, smallBuffer)
		})
	}}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	return d.Dial("tcp", e.addrs[i])
}

func stoodStill(s *stage) error {
	e, err := s.start(":{0} -> {echo} mode=tcp idle=1s")
	if err != nil {
		return err
	}
	for range s.scaled(3, 10) {
		c, err := e.dial(0)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := echoes(c, []byte("a")); err != nil {
			return err
		}
		go func() {
			time.Sleep(200 * time.Millisecond)
			_, _ = c.Write([]byte("b"))
		}()
		if err := e.standStill(1700 * time.Millisecond); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			return fmt.Errorf("what came while the process stood still was dropped: %w", err)
		}
	}
	return nil
}

// standStill stops the process for a while.
func (e *edge) standStill(d time.Duration) error {
	if err := e.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(d)
	return e.cmd.Process.Signal(syscall.SIGCONT)
}

func hangupDuringStart(s *stage) error {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0") // a name server that never answers: the start waits for it
	if err != nil {
		return err
	}
	defer silent.Close()
	e, err := s.prepare(":{0} -> name.test:1 mode=tcp", "RESOLVER="+silent.LocalAddr().String())
	if err != nil {
		return err
	}
	if err := e.launch(); err != nil {
		return err
	}
	time.Sleep(time.Second)
	if strings.Contains(e.said(), `"running"`) {
		return errors.New("the start was over before the signal came")
	}
	if err := e.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		return err
	}
	if err := e.awaitRunning(); err != nil {
		return fmt.Errorf("after SIGHUP: %w", err)
	}
	return nil
}

func unusableFiles(s *stage) error {
	for name, text := range map[string]string{
		"broken.pem":   "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"half.pem":     "-----BEGIN CERTIFICATE-----\nMIIB",
		"empty.pem":    "",
		"keystore.p12": "\x30\x82\x01\x00",
		".#a.pem":      "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"a.pem~":       "garbage",
	} {
		if _, err := s.write("certs/"+name, text); err != nil {
			return err
		}
	}
	e, err := s.start(":{0} a.example -> {echo}")
	if err != nil {
		return err
	}
	if _, err := e.honest("", 0, "a.example"); err != nil {
		return err
	}
	if err := s.certificate("b", "b.example"); err != nil {
		return err
	}
	if err := e.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		return err
	}
	_, err = e.await(func(l line) bool { return strings.HasPrefix(l.str("msg"), "reloaded") })
	if err != nil {
		return err
	}
	_, err = e.honest("", 0, "a.example")
	return err
}

func fifoAmongFiles(s *stage) error {
	if err := syscall.Mkfifo(s.path("certs/pipe.pem"), 0o600); err != nil {
		return err
	}
	e, err := s.start(":{0} a.example -> demo")
	if err != nil {
		return err
	}
	_, err = e.dial(0)
	return err
}

func kubernetesVariables(s *stage) error {
	e, err := s.prepare(":{0} -> demo cert=a.example", "SERVICE_HOST=10.0.0.1", "SERVICE_PORT=443", "PORT=tcp://10.0.0.1:443",
		"PORT_443_TCP=tcp://10.0.0.1:443", "PORT_443_TCP_PROTO=tcp", "PORT_443_TCP_PORT=443", "PORT_443_TCP_ADDR=10.0.0.1", "SERVICE_PORT_HTTPS=443")
	if err != nil {
		return err
	}
	if err := e.launch(); err != nil {
		return err
	}
	return e.awaitRunning()
}
