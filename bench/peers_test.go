// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// door is one of the ports that a gateway listens on. All lead to the one backend.
type door string

const (
	ecdsaDoor door = "ecdsa" // TLS ends here, certificate ECDSA P-256 for ecdsa.test
	rsaDoor   door = "rsa"   // TLS ends here, certificate RSA-2048 for rsa.test
	passDoor  door = "pass"  // routed on the server name ecdsa.test, bytes untouched
	tcpDoor   door = "tcp"   // bytes untouched and unread
)

// peer is a program that does the gateway's work, set up for its best at it: one worker, no log, AES-128-GCM, X25519, session tickets.
type peer struct {
	name    string
	from    string   // the variable that names another binary
	called  []string // what the binary is called where it is installed
	doors   []door
	asked   []string       // arguments that make it tell its version
	version *regexp.Regexp // the lines of the answer that matter
	// setUp writes what the program reads into s.dir and returns its arguments.
	setUp func(s site) ([]string, error)

	binary  string
	missing error // why there is no binary
}

// site is where a peer is to run.
type site struct {
	dir     string
	binary  string
	core    int             // that it is pinned to
	backend string          // host:port
	loops   int             // event loops; 0: one. Only tlsnat is asked for it
	encrypt bool            // the backend is a gateway that ends TLS as ecdsa.test: only tlsnat is asked for it
	manual  bool            // set up as the peer's manual has it, not told what work is to come: only haproxy is asked for it
	full    bool            // a map of 10,000 rules, with checks and limits: only tlsnat is asked for it
	bulk    bool            // the work to come is bulk: for a peer that has to be set up for the one or the other
	at      map[door]string // host:port to listen on
	port    map[door]string
	pem     map[door]string // file with certificate and key
}

// direct is no gateway: the load speaks plain TCP to the backend. It shows what the load, the backend and the machine cost by themselves.
var direct = &peer{name: "direct", doors: []door{ecdsaDoor, rsaDoor, passDoor, tcpDoor}}

// peers are in the order of the tables.
var peers = []*peer{direct, tlsnat, haproxy, nginx, hitch, stunnel}

// find looks for the binary: the variable first, then the path, then where Debian keeps servers.
func (p *peer) find() {
	if p == direct {
		return
	}
	if p.binary = os.Getenv(p.from); p.binary != "" {
		p.binary, p.missing = filepath.Abs(p.binary)
		return
	}
	if p == tlsnat {
		p.binary, p.missing = buildGateway()
		return
	}
	for _, name := range p.called {
		for _, try := range []string{name, "/usr/sbin/" + name, "/usr/local/sbin/" + name} {
			if path, err := exec.LookPath(try); err == nil {
				p.binary = path
				return
			}
		}
	}
	p.missing = fmt.Errorf("%s is not installed (or name it with %s=/path)", p.called[0], p.from)
}

// words is the peer's version and that of its TLS library, in one line.
func (p *peer) words() string {
	if p == direct {
		return "no gateway"
	}
	if p.missing != nil {
		return "missing: " + strings.ReplaceAll(p.missing.Error(), "\n", " ")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	answer := exec.CommandContext(ctx, p.binary, p.asked...)
	answer.Env = cleanEnv()
	text, _ := answer.CombinedOutput()
	var lines []string
	for _, line := range p.version.FindAllString(string(text), 3) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	if lines == nil {
		return "version unknown"
	}
	return strings.Join(lines, ", ")
}

func (p *peer) has(d door) bool { return slices.Contains(p.doors, d) }

// gateway is a peer that runs; direct has no process.
type gateway struct {
	*process
	peer *peer
	at   map[door]string
}

// open starts a peer in a directory of its own, in front of a backend, and waits until its doors are open. Directory and backend are given, the rest of
// the site is made here.
func (p *peer) open(s site) (*gateway, error) {
	s.binary, s.at, s.port, s.pem = p.binary, map[door]string{}, map[door]string{}, certificates
	if p == direct {
		for _, d := range p.doors {
			s.at[d] = s.backend
		}
		return &gateway{peer: p, at: s.at}, nil
	}
	if err := s.chooseAddresses(p.doors); err != nil {
		return nil, err
	}
	args, err := p.setUp(s)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(p.binary, args...)
	cmd.Dir = s.dir
	cmd.Env = append(cleanEnv(), p.settings(s)...)
	run, err := start(s.core, cmd, filepath.Join(s.dir, "log"))
	if err != nil {
		return nil, err
	}
	g := &gateway{process: run, peer: p, at: s.at}
	if err := g.waitOpen(); err != nil {
		g.stop()
		return nil, err
	}
	return g, nil
}

// settings is what a peer is told by its environment: only tlsnat is.
func (p *peer) settings(s site) []string {
	if p == tlsnat {
		return tlsnatSettings(s)
	}
	return nil
}

func (g *gateway) waitOpen() error {
	for _, addr := range g.at {
		for tries := 0; ; tries++ {
			c, err := net.DialTimeout("tcp", addr, time.Second)
			if err == nil {
				c.Close()
				break
			}
			select {
			case <-g.ended:
				return fmt.Errorf("%s ended at once: %s", g.peer.name, g.lastWords())
			case <-time.After(20 * time.Millisecond):
			}
			if tries == 500 {
				return fmt.Errorf("%s does not listen on %s: %s", g.peer.name, addr, g.lastWords())
			}
		}
	}
	return nil
}

func (g *gateway) close() {
	if g.process != nil {
		g.stop()
	}
}

// cleanEnv is the environment without what concerns this run: tlsnat refuses TLSNAT_ variables that it does not know.
func cleanEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "TLSNAT_") || strings.HasPrefix(kv, "BENCH_") || strings.HasPrefix(kv, "NOTIFY_SOCKET=")
	})
}

// chooseAddresses gives each door a loopback address on which nobody listens just now. It is not the one that connections on loopback come from, so that
// none of them gets the port before the gateway does.
func (s site) chooseAddresses(doors []door) error {
	for _, d := range doors {
		l, err := net.Listen("tcp", "127.0.0.2:0")
		if err != nil {
			return err
		}
		defer l.Close() // all stay open until each has its own
		s.at[d] = l.Addr().String()
		_, s.port[d], _ = net.SplitHostPort(s.at[d])
	}
	return nil
}

// fill writes a peer's settings file: text with {name} replaced.
func (s site) fill(name, text string) (string, error) {
	buffer := "16384"
	if s.bulk {
		buffer = "65536" // a tenth to a fifth less time for haproxy and nginx, which would hold twice the memory for it when idle
	}
	pairs := []string{"{dir}", s.dir, "{backend}", s.backend, "{buffer}", buffer, "{fds}", strconv.Itoa(here.fds), "{half-fds}", strconv.Itoa(here.fds/2 - 500)}
	if host, port, err := net.SplitHostPort(s.backend); err == nil {
		pairs = append(pairs, "{backend-host}", host, "{backend-port}", port)
	}
	for d, addr := range s.at {
		pairs = append(pairs, "{"+string(d)+"}", addr, "{"+string(d)+"-port}", s.port[d])
	}
	for d, file := range s.pem {
		pairs = append(pairs, "{"+string(d)+"-pem}", file)
	}
	path := filepath.Join(s.dir, name)
	return path, os.WriteFile(path, []byte(strings.NewReplacer(pairs...).Replace(text)), 0o644)
}

// certificates are made once for a run: files with a certificate and its key, by door.
var certificates = map[door]string{}

func makeCertificates(dir string) error {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	return errors.Join(makeCertificate(dir, ecdsaDoor, ec, ec.Public()), makeCertificate(dir, rsaDoor, rs, rs.Public()))
}

func makeCertificate(dir string, d door, key, public any) error {
	name := string(d) + ".test"
	form := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name, "*." + name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	cert, err := x509.CreateCertificate(rand.Reader, form, form, public, key)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: cert})
	pem.Encode(&text, &pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	certificates[d] = filepath.Join(dir, name+".pem")
	return os.WriteFile(certificates[d], text.Bytes(), 0o600)
}
