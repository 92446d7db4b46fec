// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// noon is when all tests take place.
var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

const days = 24 * time.Hour

// identity is a certificate with its key, and a CA if it signs others.
type identity struct {
	*x509.Certificate
	key crypto.Signer
}

// ask is what a test wants of a certificate; the zero value is a leaf for 90 days that began 30 days ago.
type ask struct {
	cn       string
	names    []string
	key      crypto.Signer
	from, to time.Duration // relative to noon
	change   func(*x509.Certificate)
}

func issue(t testing.TB, by *identity, a ask) *identity {
	t.Helper()
	if a.key == nil {
		a.key = ecKey(t)
	}
	if a.to == 0 {
		a.from, a.to = -30*days, 60*days
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<61))
	serial.SetBit(serial, 62, 1) // all of one length, so that line numbers are known
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: a.cn}, DNSNames: a.names,
		NotBefore: noon.Add(a.from), NotAfter: noon.Add(a.to), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if a.change != nil {
		a.change(template)
	}
	id := &identity{template, a.key}
	if by == nil {
		by = id
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.Certificate, a.key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	if id.Certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return id
}

// authority has an Ed25519 key: its signatures are all of one length, so the line numbers in its files are known.
func authority(t testing.TB, by *identity, cn string) *identity {
	return issue(t, by, ask{cn: cn, key: edKey(t), from: -300 * days, to: 3000 * days, change: func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid = true, true
		c.KeyUsage = x509.KeyUsageCertSign
		c.ExtKeyUsage = nil
	}})
}

func leaf(t testing.TB, by *identity, names ...string) *identity {
	return issue(t, by, ask{names: names})
}

func ecKey(t testing.TB) crypto.Signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func edKey(t testing.TB) crypto.Signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// rsaKey is the same for all tests, as it takes long to make.
func rsaKey(t testing.TB) crypto.Signer {
	key, err := madeRSA()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var madeRSA = sync.OnceValues(func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func (id *identity) certPEM() string { return pemText("CERTIFICATE", id.Raw) }

func (id *identity) keyPEM(t testing.TB) string {
	der, err := x509.MarshalPKCS8PrivateKey(id.key)
	if err != nil {
		t.Fatal(err)
	}
	return pemText("PRIVATE KEY", der)
}

func pemText(typ string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}))
}

// put writes a file that only its owner can read, and the directories it needs.
func put(t testing.TB, dir, name string, parts ...string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Join(parts, "")), 0o600); err != nil {
		t.Fatal(err)
	}
}

// messages are the problems as printed, with DIR for the directory.
func messages(dir string, problems []Problem) (lines []string) {
	for _, p := range problems {
		kind := "error "
		if p.Warning {
			kind = "warning "
		}
		lines = append(lines, kind+strings.ReplaceAll(p.Error(), dir, "DIR"))
	}
	return lines
}

// serves is each entry as "names addrs = key types".
func serves(s *Store) (lines []string) {
	for _, e := range s.Entries() {
		var what, types []string
		what = append(what, e.Names...)
		for _, a := range e.Addrs {
			what = append(what, a.String())
		}
		for _, c := range e.Served(noon) {
			types = append(types, c.KeyType)
		}
		lines = append(lines, strings.Join(what, " ")+" = "+strings.Join(types, ", "))
	}
	return lines
}

// loadClean loads a directory in which nothing must be wrong.
func loadClean(t testing.TB, dir string) *Store {
	t.Helper()
	s, problems := Load(dir, noon)
	if len(problems) > 0 {
		t.Fatalf("problems:\n%s", strings.Join(messages(dir, problems), "\n"))
	}
	return s
}

// program is the path of another project's program.
func program(t testing.TB, name string) string {
	t.Helper()
	return testkit.Program(t, name, name)
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
