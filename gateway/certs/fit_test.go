// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"
	"strings"
	"testing"
)

// TestWhatClientsRefuseIsWorthAWarning: each of them is served, with one warning that names the reason.
func TestWhatClientsRefuseIsWorthAWarning(t *testing.T) {
	root := authority(t, nil, "Root")
	clientsOnly := issue(t, root, ask{cn: "For clients", key: edKey(t), from: -300 * days, to: 3000 * days, change: func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}})
	brief := issue(t, root, ask{cn: "Brief", key: edKey(t), from: -300 * days, to: 10 * days, change: func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
	}})
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	feature := func(ids ...int) func(*x509.Certificate) {
		value, err := asn1.Marshal(ids)
		if err != nil {
			t.Fatal(err)
		}
		return func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{{Id: oidTLSFeature, Value: value}} }
	}
	for _, c := range []struct {
		name string
		by   *identity
		ask
		want string
	}{
		{"nothing wrong", root, ask{}, ""},
		{"must-staple", root, ask{change: feature(5)}, "stapled OCSP answer"},
		{"must-staple v2", root, ask{change: feature(17)}, "stapled OCSP answer"},
		{"another feature", root, ask{change: feature(7)}, ""},
		{"a key that may not sign", root, ask{key: rsaKey(t), change: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }}, "may not sign"},
		{"no key usage", root, ask{change: func(c *x509.Certificate) { c.KeyUsage = 0 }}, ""},
		{"for clients", root, ask{change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }}, "is not for servers: clients"},
		{"for any purpose", root, ask{change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }}, ""},
		{"ten years", root, ask{from: -days, to: 3649 * days}, "is valid for 3650 days"},
		{"a CA as a server", root, ask{change: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }}, "is the certificate of a CA"},
		{"a critical extension", root, ask{change: func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}}, "critical extension 1.2.3"},
		{"Ed25519 alone", root, ask{key: edKey(t)}, "browsers do not take Ed25519"},
		{"P-521 alone", root, ask{key: p521}, "Chrome does not take ECDSA P-521"},
		{"an intermediate for clients", clientsOnly, ask{}, `the intermediate "For clients" is not for servers`},
		{"an intermediate that ends soon", brief, ask{}, `the intermediate "Brief" expires in 10 days`},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			c.names = []string{"a.example"}
			id := issue(t, c.by, c.ask)
			put(t, dir, "root.crt", root.certPEM())
			put(t, dir, "a.pem", id.certPEM(), c.by.certPEM(), id.keyPEM(t))
			s, problems := Load(dir, noon)
			got := slices.DeleteFunc(messages(dir, problems), func(m string) bool { return strings.Contains(m, "the root") })
			if c.want == "" && len(got) > 0 || c.want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], "warning ") || !strings.Contains(got[0], c.want)) {
				t.Errorf("said %q, want %q", got, c.want)
			}
			if s.ForName("a.example") == nil {
				t.Error("it is not served")
			}
		})
	}
}

// TestSHA1IsSaidOnce: with the issuer there and without it. Go signs with SHA-1 no more, so openssl does.
func TestSHA1IsSaidOnce(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return dir + "/" + name }
	run(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "60", "-subj", "/CN=Root", "-keyout", at("ca.secret"), "-out", at("ca.crt"))
	run(t, "openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a", "-addext", "subjectAltName=DNS:a.example", "-keyout", at("a.key"), "-out", at("a.csr"))
	run(t, "openssl", "x509", "-req", "-sha1", "-days", "30", "-copy_extensions", "copy", "-in", at("a.csr"), "-CA", at("ca.crt"), "-CAkey", at("ca.secret"), "-CAcreateserial", "-out", at("a.crt"))
	for range 2 {
		_, problems := Load(dir, noon)
		n := 0
		for _, p := range problems {
			if strings.Contains(p.Msg, "SHA1-RSA, which clients refuse") {
				n++
			}
		}
		if n != 1 {
			t.Errorf("said %d times: %q", n, messages(dir, problems))
		}
		run(t, "rm", at("ca.crt"))
		put(t, dir, "ca.crt", authority(t, nil, "Another").certPEM())
	}
}
