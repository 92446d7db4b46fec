// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Authority is a file of CA certificates that a peer's certificate is verified against. Its fields are for reading.
type Authority struct {
	File  string
	Certs []*x509.Certificate // none: nobody is verified
	Pool  *x509.CertPool      // the same
}

// signs says whether others may be verified by c (RFC 5280, 4.2.1.9). Version 1 has no mark of a CA.
func signs(c *x509.Certificate) bool { return c.Version < 3 || c.BasicConstraintsValid && c.IsCA }

// NoAuthority is what a file stands for that cannot be used: no certificate is verified by it.
func NoAuthority(dir, name string) *Authority {
	return &Authority{File: filepath.Join(dir, name+".pem"), Pool: x509.NewCertPool()}
}

// LoadAuthority reads NAME.pem out of dir and reports everything that is wrong with it at once, sorted by line. It is
// nil if nothing in the file is a certificate that can be trusted to sign others.
func LoadAuthority(dir, name string, now time.Time) (*Authority, []Problem) {
	var r report
	path := filepath.Join(dir, name+".pem")
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		r.fail(place{file: path}, "put the CA's certificate there, in PEM", "does not exist")
		return nil, r
	}
	f := readFile(dir, path, nil)
	r = append(r, f.problems...)
	a := &Authority{File: path, Pool: x509.NewCertPool()}
	for _, k := range f.keys {
		r.warn(k.at(), "remove it: whoever has it can be anybody whom this CA may sign for", "holds a private key, which is not needed")
	}
	for _, c := range f.certs {
		switch {
		case !signs(c.Certificate) && !selfIssued(c.Certificate):
			r.fail(c.at(), "put the certificate of the CA that signed it here", "is the certificate of a server or a client, not of a CA")
			continue
		case now.After(c.NotAfter):
			r.warn(c.at(), "ask the CA for its new one", "the CA's certificate expired on %s, so nothing that it signed is accepted", c.NotAfter.UTC().Format(time.DateOnly))
		case now.Before(c.NotBefore):
			r.warn(c.at(), "check this machine's clock", "the CA's certificate is not valid before %s", c.NotBefore.UTC().Format(time.DateOnly))
		}
		a.Certs = append(a.Certs, c.Certificate)
		a.Pool.AddCert(c.Certificate)
	}
	if len(f.certs) == 0 && !f.broken {
		r.fail(place{file: path}, "put the CA's certificate here, in PEM", "holds no certificate")
	}
	if len(a.Certs) == 0 {
		a = nil
	}
	return a, r.sorted()
}
