// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// patience is how long an attack waits for what has to happen. A machine that is merely slow never reaches it.
const patience = 30 * time.Second

// stage is where one attack happens: a directory, certificates, backends and gateways. All of it ends with the attack.
type stage struct {
	binary string
	dir    string
	full   bool // at full scale
	roots  *x509.CertPool
	ends   []func() error
}

func newStage(binary, dir string, full bool) (*stage, error) {
	own, err := os.MkdirTemp(dir, "attack-")
	if err != nil {
		return nil, err
	}
	s := &stage{binary: binary, dir: own, full: full, roots: x509.NewCertPool()}
	if err := os.Chmod(own, 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(s.path("certs"), 0o755); err != nil {
		return nil, err
	}
	return s, s.certificate("a", "a.example", "*.a.example")
}

func (s *stage) path(name string) string { return filepath.Join(s.dir, name) }

// atEnd has f called when the attack is over, the last one first.
func (s *stage) atEnd(f func() error) { s.ends = append(s.ends, f) }

func (s *stage) close() error {
	var errs []error
	for i := len(s.ends) - 1; i >= 0; i-- {
		errs = append(errs, s.ends[i]())
	}
	return errors.Join(errs...)
}

// scaled is small, or at full scale full.
func (s *stage) scaled(small, full int) int {
	if s.full {
		return full
	}
	return small
}

// write writes a file of the stage, and returns its path.
func (s *stage) write(name, text string) (string, error) {
	path := s.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// certificate writes certs/NAME.pem, self-signed for the names, which the stage's clients trust.
func (s *stage) certificate(file string, names ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	form := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: file}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(60 * 24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, form, form, key.Public(), key)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	_ = pem.Encode(&text, &pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	s.roots.AppendCertsFromPEM(text.Bytes())
	_, err = s.write("certs/"+file+".pem", text.String())
	return err
}

// port is one on which nobody listens.
func port() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// serve runs handle for each connection to a new port of loopback, and returns the address.
func (s *stage) serve(handle func(net.Conn)) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s.atEnd(l.Close)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
	return l.Addr().String(), nil
}

// echo is a backend that sends back what it gets.
func (s *stage) echo() (string, error) {
	return s.serve(func(c net.Conn) { _, _ = io.Copy(c, c) })
}

// edge is a running gateway.
type edge struct {
	stage *stage
	cmd   *exec.Cmd
	addrs []string // what stands for {0}, {1}, … in its map
	admin string   // host:port
	env   []string
	ended chan struct{}

	mu    sync.Mutex
	text  bytes.Buffer // standard error
	lines []line
	news  chan struct{} // closed when a line comes
}

// line is one of the log.
type line map[string]any

func (l line) str(key string) string { return fmt.Sprint(l[key]) }

// start runs the gateway with a map in which {0}, {1}, … stand for free ports, and {echo} for a backend that sends back what it
// gets. Settings are written without TLSNAT_.
func (s *stage) start(mapText string, settings ...string) (*edge, error) {
	return s.startThrough(nil, mapText, settings...)
}

// startThrough is start with words before the command, as in prlimit --nofile=64.
func (s *stage) startThrough(through []string, mapText string, settings ...string) (*edge, error) {
	e, err := s.prepare(mapText, settings...)
	if err != nil {
		return nil, err
	}
	if err := e.launch(through...); err != nil {
		return nil, err
	}
	return e, e.awaitRunning()
}

// awaitRunning waits until the gateway says that it serves.
func (e *edge) awaitRunning() error {
	return until(func() error {
		if strings.Contains(e.said(), "running") {
			return nil
		}
		return fmt.Errorf("the gateway does not start:\n%s", tail(e.said()))
	})
}

// prepare is start without running anything.
func (s *stage) prepare(mapText string, settings ...string) (*edge, error) {
	e := &edge{stage: s, ended: make(chan struct{}), news: make(chan struct{})}
	if strings.Contains(mapText, "{echo}") {
		back, err := s.echo()
		if err != nil {
			return nil, err
		}
		mapText = strings.ReplaceAll(mapText, "{echo}", back)
	}
	for i := 0; strings.Contains(mapText, fmt.Sprintf("{%d}", i)); i++ {
		p, err := port()
		if err != nil {
			return nil, err
		}
		mapText = strings.ReplaceAll(mapText, fmt.Sprintf("{%d}", i), strconv.Itoa(p))
		e.addrs = append(e.addrs, fmt.Sprintf("127.0.0.1:%d", p))
	}
	p, err := port()
	if err != nil {
		return nil, err
	}
	e.admin = fmt.Sprintf("127.0.0.1:%d", p)
	e.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "TLSNAT_MAP=" + mapText, "TLSNAT_CERTS=" + s.path("certs"),
		"TLSNAT_STATE=" + s.path("state"), "TLSNAT_ADMIN=" + e.admin, "TLSNAT_LOOPS=1"}
	for _, kv := range settings {
		e.env = append(e.env, "TLSNAT_"+kv)
	}
	return e, nil
}

// launch starts the process; through holds words before it.
func (e *edge) launch(through ...string) error {
	args := append(through, e.stage.binary, "run")
	e.cmd = exec.Command(args[0], args[1:]...)
	e.cmd.Env, e.cmd.Dir = e.env, e.stage.dir
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := e.cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := e.cmd.Start(); err != nil {
		return err
	}
	go func() {
		e.read(out)
		_ = e.cmd.Wait()
		close(e.ended)
	}()
	e.stage.atEnd(e.stop)
	return nil
}

func (e *edge) read(out io.Reader) {
	for r := bufio.NewReaderSize(out, 1<<20); ; {
		text, err := r.ReadBytes('\n')
		e.mu.Lock()
		e.text.Write(text)
		l := line{}
		if json.Unmarshal(text, &l) == nil {
			e.lines = append(e.lines, l)
		}
		close(e.news)
		e.news = make(chan struct{})
		e.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// stop ends the process at once. A crash, or a fault that it logged itself, is an error of the attack.
func (e *edge) stop() error {
	select {
	case <-e.ended:
	default:
		_ = e.cmd.Process.Signal(syscall.SIGCONT)
		_ = e.cmd.Process.Signal(syscall.SIGQUIT)
		select {
		case <-e.ended:
		case <-time.After(patience):
			_ = e.cmd.Process.Kill()
			return errors.New("SIGQUIT does not end the gateway")
		}
	}
	for _, bad := range []string{"a fault of tlsnat", "panic:", "fatal error:"} {
		if strings.Contains(e.said(), bad) {
			return fmt.Errorf("the gateway said %q:\n%s", bad, tail(e.said()))
		}
	}
	return nil
}

func (e *edge) said() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.text.String()
}

func tail(text string) string { return text[max(0, len(text)-2000):] }

// await waits for a line of the log.
func (e *edge) await(match func(line) bool) (line, error) {
	timeout := time.After(patience)
	for seen := 0; ; {
		e.mu.Lock()
		fresh, news := e.lines[seen:], e.news
		seen = len(e.lines)
		e.mu.Unlock()
		for _, l := range fresh {
			if match(l) {
				return l, nil
			}
		}
		select {
		case <-news:
		case <-e.ended:
			return nil, fmt.Errorf("the gateway has ended:\n%s", tail(e.said()))
		case <-timeout:
			return nil, fmt.Errorf("no such line in the log:\n%s", tail(e.said()))
		}
	}
}

// outcome waits for the line of the connection whose client has this address, and returns its outcome.
func (e *edge) outcome(client net.Addr) (string, error) {
	l, err := e.lineOf(client)
	return l.str("outcome"), err
}

func (e *edge) lineOf(client net.Addr) (line, error) {
	return e.await(func(l line) bool { return l.str("msg") == "connection" && l.str("peer") == client.String() })
}

// dial connects to the i-th port of the map.
func (e *edge) dial(i int) (net.Conn, error) { return e.dialFrom("", i) }

// dialFrom connects from an address of loopback; "" is any.
func (e *edge) dialFrom(from string, i int) (net.Conn, error) {
	d := net.Dialer{Timeout: patience}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	c, err := d.Dial("tcp", e.addrs[i])
	if err == nil {
		err = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// client is the config of an honest client.
func (s *stage) client(name string) *tls.Config {
	return &tls.Config{RootCAs: s.roots, ServerName: name}
}

// honest is a client that wants an echo over TLS; it returns how long that took.
func (e *edge) honest(from string, i int, name string) (time.Duration, error) {
	began := time.Now()
	raw, err := e.dialFrom(from, i)
	if err != nil {
		return 0, err
	}
	defer raw.Close()
	c := tls.Client(raw, e.stage.client(name))
	err = echoes(c, []byte("are you there?"))
	return time.Since(began), err
}

// echoes says whether what is sent comes back.
func echoes(c net.Conn, data []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- err
	}()
	got := make([]byte, len(data))
	n, err := io.ReadFull(c, got)
	if err != nil {
		return fmt.Errorf("%d of %d bytes came back: %w", n, len(data), err)
	}
	if err := <-sent; err != nil {
		return err
	}
	if !bytes.Equal(got, data) {
		return errors.New("other bytes came back")
	}
	return nil
}

// get asks the admin, with a deadline.
func (e *edge) get(path string, within time.Duration) (int, string, error) {
	return e.ask(http.MethodGet, path, within)
}

func (e *edge) ask(method, path string, within time.Duration) (int, string, error) {
	req, err := http.NewRequest(method, "http://"+e.admin+path, nil)
	if err != nil {
		return 0, "", err
	}
	req.Close = true
	client := http.Client{Timeout: within, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	return r.StatusCode, string(text), err
}

// cpu is the processor time that the gateway has used.
func (e *edge) cpu() (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	user, err1 := strconv.Atoi(fields[11]) // utime and stime are the 14th and 15th field of proc_pid_stat(5)
	system, err2 := strconv.Atoi(fields[12])
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	return time.Duration(user+system) * tick, errors.Join(err1, err2)
}

// quiet says whether the gateway uses next to no processor time: an event loop that spins uses all there is.
func (e *edge) quiet() error {
	const span = 500 * time.Millisecond
	for tries := 0; ; tries++ {
		before, err := e.cpu()
		if err != nil {
			return err
		}
		time.Sleep(span)
		after, err := e.cpu()
		switch {
		case err != nil:
			return err
		case after-before <= span/10:
			return nil
		case tries == 9:
			return fmt.Errorf("the gateway still uses %v of processor time in %v", after-before, span)
		}
	}
}

// tool is the path of another project's program.
func tool(name string) (string, error) {
	for _, try := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(try); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s is not installed", errSkip, name)
}
