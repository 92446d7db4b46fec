// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// read is a file below dir.
func read(t testing.TB, dir, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// askCA runs tlsnat csr in a directory, where TLSNAT_CERTS is certs.
func askCA(t testing.TB, dir string, args ...string) result {
	t.Helper()
	return finish(t, command(t, dir, []string{"TLSNAT_CERTS=certs"}, append([]string{"csr"}, args...)...))
}

func emptyCerts(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "certs"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestOpenSSLVerifiesTheRequest: names, addresses, subject and signature, for each kind of key; the key beside it is the
// request's, and nobody else may read it.
func TestOpenSSLVerifiesTheRequest(t *testing.T) {
	openssl := needs(t, "openssl")
	say := func(dir string, args ...string) string {
		cmd := exec.Command(openssl, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	for kind, c := range map[string]struct {
		args []string
		key  string
	}{
		"ECDSA":    {nil, "NIST CURVE: P-256"},
		"RSA 2048": {[]string{"--rsa", "2048"}, "Public-Key: (2048 bit)"},
		"RSA 3072": {[]string{"--rsa", "3072"}, "Public-Key: (3072 bit)"},
		"RSA 4096": {[]string{"--rsa", "4096"}, "Public-Key: (4096 bit)"},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := emptyCerts(t)
			r := askCA(t, dir, append(c.args, "www.example.com", "--org", "Bücher & Söhne GmbH", "--unit", "Edge", "--country", "de", "*.example.com", "bücher.example",
				"--state", "Hessen", "--city", "Frankfurt am Main", "--street", "Zeil 1", "--postal-code", "60313", "--email", "hostmaster@example.com",
				"--serial-number", "HRB 12345", "--business-category", "Private Organization", "--jurisdiction-country", "DE", "--jurisdiction-state", "Hessen", "192.0.2.1", "2001:db8::1")...)
			if r.code != 0 {
				t.Fatal(r)
			}
			got := say(dir, "req", "-in", "certs/www.example.com.csr", "-noout", "-text", "-verify", "-nameopt", "utf8,sep_comma_plus_space")
			for _, want := range []string{"verify OK", c.key,
				"C=DE, ST=Hessen, L=Frankfurt am Main, street=Zeil 1, postalCode=60313, O=Bücher & Söhne GmbH, OU=Edge, CN=www.example.com, serialNumber=HRB 12345, " +
					"businessCategory=Private Organization, jurisdictionC=DE, jurisdictionST=Hessen, emailAddress=hostmaster@example.com",
				"DNS:www.example.com, DNS:*.example.com, DNS:xn--bcher-kva.example, IP Address:192.0.2.1, IP Address:2001:DB8:0:0:0:0:0:1"} {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in\n%s", want, got)
				}
			}
			if of, with := say(dir, "req", "-in", "certs/www.example.com.csr", "-noout", "-pubkey"), say(dir, "pkey", "-in", "certs/www.example.com.key", "-pubout"); of != with {
				t.Errorf("the request is for another key:\n%s%s", of, with)
			}
			if info, err := os.Stat(filepath.Join(dir, "certs/www.example.com.key")); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("the key's file: %v, %v", info, err)
			}
			if strings.Contains(r.out+r.err, "PRIVATE") {
				t.Error("the key is printed")
			}
		})
	}
}

// TestAnswerOfTheCAIsServed: put beside the key as the command says. Until then check says that it is missing.
func TestAnswerOfTheCAIsServed(t *testing.T) {
	dir := emptyCerts(t)
	if r := askCA(t, dir, "api.bank.example", "192.0.2.1"); r.code != 0 || !strings.Contains(r.out, "certs/api.bank.example.crt") {
		t.Fatal(r)
	}
	environ := []string{"TLSNAT_CERTS=certs", "TLSNAT_MAP=:443 api.bank.example -> 10.0.0.1:80"}
	if r := finish(t, command(t, dir, environ, "check")); !strings.Contains(r.err, "certs/api.bank.example.key:1: no certificate is for this private key") {
		t.Error(r)
	}
	block, _ := pem.Decode(read(t, dir, "certs/api.bank.example.csr"))
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || request.CheckSignature() != nil {
		t.Fatal(err)
	}
	leaf, root := signed(t, request)
	write(t, dir, map[string][]byte{"certs/api.bank.example.crt": leaf, "certs/root.crt": root})
	if r := finish(t, command(t, dir, environ, "check")); r.String() != "exit 0\nok: 1 rule on 1 port, 1 certificate\n" {
		t.Error(r)
	}
}

// signed is what a CA makes of a request, and the CA's own certificate.
func signed(t testing.TB, request *x509.CertificateRequest) (leaf, root []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(2160 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: request.Subject, DNSNames: request.DNSNames, IPAddresses: request.IPAddresses,
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	issue := func(template *x509.Certificate, public any) []byte {
		der, err := x509.CreateCertificate(rand.Reader, template, ca, public, key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	return issue(template, request.PublicKey), issue(ca, key.Public())
}

// TestCSRNeverOverwrites a key, a request, or what a link in their place leads to; and leaves no half of a pair behind.
func TestCSRNeverOverwrites(t *testing.T) {
	for _, name := range []string{"a.example.key", "a.example.csr"} {
		dir := emptyCerts(t)
		write(t, dir, map[string][]byte{"certs/" + name: []byte("mine")})
		r := askCA(t, dir, "a.example")
		if r.code != exitInput || !strings.Contains(r.err, "certs/"+name+": file already exists; nothing is ever overwritten") {
			t.Error(r)
		}
		files, err := os.ReadDir(filepath.Join(dir, "certs"))
		if err != nil || len(files) != 1 || string(read(t, dir, "certs/"+name)) != "mine" {
			t.Errorf("%v, %v", files, err)
		}
	}
	dir := emptyCerts(t)
	if err := os.Symlink("elsewhere", filepath.Join(dir, "certs/a.example.key")); err != nil {
		t.Fatal(err)
	}
	if r := askCA(t, dir, "a.example"); r.code != exitInput {
		t.Error(r)
	}
	if _, err := os.Stat(filepath.Join(dir, "certs/elsewhere")); !os.IsNotExist(err) {
		t.Errorf("a link was followed: %v", err)
	}
}

// TestEachRequestHasAKeyOfItsOwn: two for the same name, under different names of files.
func TestEachRequestHasAKeyOfItsOwn(t *testing.T) {
	dir := emptyCerts(t)
	for _, out := range []string{"certs/one", "certs/two"} {
		if r := askCA(t, dir, "a.example", "--out", out); r.code != 0 {
			t.Fatal(r)
		}
	}
	if bytes.Equal(read(t, dir, "certs/one.key"), read(t, dir, "certs/two.key")) {
		t.Error("the same key twice")
	}
}
