// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/certs/rsasign"
)

// FuzzLoadPEM holds for any bytes as the one file of a directory: what is served matches its key, each certificate
// above the leaf is the issuer of one before it, and what is served, written as PEM again, is served the same.
func FuzzLoadPEM(f *testing.F) {
	inter := authority(f, authority(f, nil, "Root"), "Intermediate")
	id := leaf(f, inter, "a.example", "*.b.example")
	ed := issue(f, nil, ask{names: []string{"a.example"}, key: edKey(f)})
	f.Add([]byte(id.certPEM() + inter.certPEM() + id.keyPEM(f)))
	f.Add([]byte(ed.keyPEM(f) + ed.certPEM() + inter.certPEM() + id.certPEM() + id.keyPEM(f)))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := parseAll(data)
		var again [][]byte
		for _, c := range served(s) {
			text := asPEM(t, c)
			if _, err := tls.X509KeyPair(text, text); err != nil {
				t.Fatalf("served, but crypto/tls says: %v", err)
			}
			if !inOneChain(t, c.TLS().Certificate) {
				t.Fatal("served, but with a chain that is none")
			}
			if len(c.Names)+len(c.Addrs) == 0 {
				t.Fatal("served, but for no name")
			}
			again = append(again, text)
		}
		if first, second := picture(s), picture(parseAll(again...)); first != second {
			t.Fatalf("served first:\n%s\nand then:\n%s", first, second)
		}
	})
}

func inOneChain(t *testing.T, chain [][]byte) bool {
	var below []*x509.Certificate
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && !slices.ContainsFunc(below, func(b *x509.Certificate) bool { return bytes.Equal(b.RawIssuer, c.RawSubject) }) {
			return false
		}
		below = append(below, c)
	}
	return true
}

func TestFuzzSeedsAreThere(t *testing.T) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzLoadPEM")
	if err != nil || len(seeds) < 8 {
		t.Errorf("%d seeds, %v", len(seeds), err)
	}
}

func parseAll(contents ...[]byte) *Store {
	var files []*file
	var r report
	for _, data := range contents {
		f := &file{path: "x.pem", name: "x.pem"}
		f.parse(bytes.Clone(data))
		files = append(files, f)
	}
	return index(assemble(files, noon, &r), noon, &r)
}

// served are the certificates of a store, each once.
func served(s *Store) (certs []*Certificate) {
	for _, e := range s.Entries() {
		for _, c := range e.Served(noon) {
			if !slices.Contains(certs, c) {
				certs = append(certs, c)
			}
		}
	}
	return certs
}

func asPEM(t *testing.T, c *Certificate) []byte {
	var b strings.Builder
	for _, der := range c.TLS().Certificate {
		b.WriteString(pemText("CERTIFICATE", der))
	}
	key := c.TLS().PrivateKey
	if fast, ok := key.(*rsasign.Key); ok {
		key = fast.PrivateKey
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	b.WriteString(pemText("PRIVATE KEY", secret))
	return []byte(b.String())
}

// picture is everything that clients get of a store.
func picture(s *Store) string {
	b := strings.Builder{}
	for i, line := range serves(s) {
		b.WriteString(line + "\n")
		for _, c := range s.Entries()[i].Served(noon) {
			for _, der := range c.TLS().Certificate {
				b.WriteString(pemText("CERTIFICATE", der))
			}
		}
	}
	return b.String()
}
