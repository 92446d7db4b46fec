// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

var update = flag.Bool("update", false, "rewrite the golden files and the tables of the reference")

// patience is how long a test waits for what has to happen. It's never reached on a machine that is merely slow.
const patience = 60 * time.Second

// nobody is the user that a test becomes to be refused something; root is refused nothing.
const nobody = 65534

// tlsnat is the program under test, built once.
var tlsnat string

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "tlsnat-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	tlsnat = filepath.Join(dir, "tlsnat")
	code := 1
	if text, err := exec.Command("go", "build", "-pgo=off", "-o", tlsnat, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, text)
	} else if err := os.Chmod(dir, 0o755); err != nil { // so that nobody may run it
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// absent skips a test for want of something; where everything must be there, it fails.
func absent(t *testing.T, format string, args ...any) {
	t.Helper()
	testkit.Missing(t, format, args...)
}

// needs is the path of another project's program.
func needs(t *testing.T, name string) string {
	t.Helper()
	return testkit.Program(t, name, name)
}

// command is the program with this environment and no other. It dies with the test.
func command(t testing.TB, dir string, environ []string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, tlsnat, args...)
	cmd.Dir, cmd.Env = dir, append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, environ...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// result is what a command said before it ended.
type result struct {
	out, err string
	code     int
}

func finish(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			t.Fatal(err)
		}
	}
	return result{out.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ask runs the program until it ends.
func ask(t testing.TB, environ []string, args ...string) result {
	t.Helper()
	return finish(t, command(t, t.TempDir(), environ, args...))
}

func (r result) String() string { return fmt.Sprintf("exit %d\n%s%s", r.code, r.out, r.err) }

// freePort is a port that nobody listens on, and that no other test run takes.
func freePort(t testing.TB) int {
	t.Helper()
	return testkit.Port(t)
}

// identity is a certificate with its key, in PEM.
type identity struct{ cert, key []byte }

// issue makes a self-signed certificate for the names. Its dates are from now.
func issue(t testing.TB, from, to time.Duration, names ...string) identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, DNSNames: names,
		NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(to),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return identity{
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
	}
}

func (id identity) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(id.cert)
	return pool
}

// write puts files into a directory, made if need be.
func write(t testing.TB, dir string, files map[string][]byte) string {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if strings.HasSuffix(name, ".key") {
			mode = 0o600
		}
		if err := os.WriteFile(path, text, mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
