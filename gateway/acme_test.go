// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net"
	"slices"
	"testing"
	"time"
)

// acmeIdentifier is id-pe-acmeIdentifier (RFC 8737, section 6.1).
var acmeIdentifier = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 31}

// challengeCertificate is what a responder shows for a name (RFC 8737, section 3): signed by itself, for that name alone,
// with the digest of the key authorization in a critical extension.
func challengeCertificate(t testing.TB, name, authorization string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(authorization))
	value, err := asn1.Marshal(digest[:])
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "challenge"}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtraExtensions: []pkix.Extension{{Id: acmeIdentifier, Critical: true, Value: value}}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// validate does what a CA does with TLS-ALPN-01 (RFC 8737, section 3).
func validate(c net.Conn, name, authorization string) error {
	s := tls.Client(c, &tls.Config{ServerName: name, NextProtos: []string{"acme-tls/1"}, InsecureSkipVerify: true})
	if err := s.Handshake(); err != nil {
		return err
	}
	defer s.Close()
	state := s.ConnectionState()
	leaf := state.PeerCertificates[0]
	digest := sha256.Sum256([]byte(authorization))
	at := slices.IndexFunc(leaf.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(acmeIdentifier) && e.Critical })
	switch {
	case state.NegotiatedProtocol != "acme-tls/1":
		return fmt.Errorf("agreed on %q", state.NegotiatedProtocol)
	case !slices.Equal(leaf.DNSNames, []string{name}):
		return fmt.Errorf("certificate for %q", leaf.DNSNames)
	case at < 0 || !bytes.HasSuffix(leaf.Extensions[at].Value, digest[:]):
		return fmt.Errorf("no digest in %v", leaf.Extensions)
	}
	return nil
}

// TestACMEChallengeReachesItsResponder: a CA's TLS-ALPN-01 goes through to the backend that answers it, while the same
// name is served as ever; of names that the responder is not asked for the CA hears nothing.
func TestACMEChallengeReachesItsResponder(t *testing.T) {
	const authorization = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA.nP1qzpXGymHBrUEepNY9HCsQk7K8KhOypzEt62jcerQ"
	responder, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{challengeCertificate(t, "edge.test", authorization)}, NextProtos: []string{"acme-tls/1"}})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, responder, func(c net.Conn) { _ = c.(*tls.Conn).Handshake() })
	b := start(t, fmt.Sprintf(":{0} edge.test *.wild.test -> %s\n:{0} alpn:acme-tls/1 edge.test -> %s mode=pass", echoServer(t), responder.Addr()))
	for range 2 {
		c := b.dial(t, 0)
		if err := validate(c, "edge.test", authorization); err != nil {
			t.Error(err)
		}
		b.lineOf(t, c).expect(t, logLine{Mode: "pass", SNI: "edge.test", ALPN: "acme-tls/1", Backend: responder.Addr().String()})
		exchange(t, b.dialTLS(t, 0, nil), []byte("served as ever"))
	}
	if err := validate(b.dial(t, 0), "a.wild.test", authorization); err == nil {
		t.Error("a name without a responder has passed the challenge")
	}
	if err := validate(b.dial(t, 0), "edge.test", "of another account"); err == nil {
		t.Error("the challenge of another account was passed")
	}
}
