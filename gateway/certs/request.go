// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
)

// maxCommonName is ub-common-name of RFC 5280, appendix A.1. Names that are longer stand in the SAN only, where all are.
const maxCommonName = 64

// Request is what a CA is asked to sign: names, addresses, and who asks.
type Request struct {
	Names   []string // as certificates have them: lower case, ASCII, a wildcard as *.example.com
	Addrs   []netip.Addr
	Subject pkix.Name // without a common name, which is the first of Names
	RSABits int       // 0: ECDSA P-256
}

// Write makes a key and a request for it (PKCS#10, RFC 2986), both in PEM. The key file has mode 0600. Neither of the
// two may exist: the error is then one that is fs.ErrExist, and nothing was written.
func (r *Request) Write(keyFile, requestFile string) error {
	for _, path := range []string{keyFile, requestFile} { // before an RSA key is made, which takes a while
		if _, err := os.Lstat(path); err == nil {
			return &fs.PathError{Op: "make", Path: path, Err: fs.ErrExist}
		}
	}
	key, err := r.newKey()
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r.template(), key)
	if err != nil {
		return fmt.Errorf("make a signing request: %w", err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the key: %w", err)
	}
	defer clear(secret)
	if err := makePEM(keyFile, 0o600, "PRIVATE KEY", secret); err != nil {
		return err
	}
	if err := makePEM(requestFile, 0o644, "CERTIFICATE REQUEST", der); err != nil {
		return errors.Join(err, os.Remove(keyFile)) // made here a moment ago, and nobody has it
	}
	return nil
}

func (r *Request) newKey() (crypto.Signer, error) {
	if r.RSABits > 0 {
		return rsa.GenerateKey(rand.Reader, r.RSABits)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func (r *Request) template() *x509.CertificateRequest {
	t := &x509.CertificateRequest{Subject: r.Subject, DNSNames: r.Names}
	for _, a := range r.Addrs {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	if len(r.Names) > 0 && len(r.Names[0]) <= maxCommonName {
		t.Subject.CommonName = r.Names[0]
	}
	return t
}

// makePEM writes a file that was not there.
//
//	openat(O_CREAT|O_EXCL) write fsync close
func makePEM(path string, mode fs.FileMode, kind string, der []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	defer clear(text)
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(path))
	}
	return nil
}
