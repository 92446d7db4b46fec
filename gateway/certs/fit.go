// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"slices"
	"time"
)

// maxLife is for how long Apple's clients accept a certificate, whoever has signed it (support.apple.com/103769).
// Public CAs have shorter bounds of their own.
const maxLife = 825 * 24 * time.Hour

// oidTLSFeature is what OCSP must-staple is asked for with (RFC 7633, 6).
var oidTLSFeature = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 24}

// warnUnfit is about certificates that clients refuse, or some of them do, whatever the chain leads to.
func (p *pairing) warnUnfit(leaf *cert, chain []*cert) {
	p.warnPurpose(leaf)
	c := leaf.Certificate
	if c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		p.warn(leaf.at(), "ask for one with the key usage digitalSignature", "its key may not sign, which TLS 1.3 and every cipher of the gateway need: clients refuse it")
	}
	if mustStaple(c) {
		p.warn(leaf.at(), "ask for one without OCSP must-staple (status_request)", "demands a stapled OCSP answer, which is not sent: GnuTLS, Firefox and others refuse it")
	}
	if life := c.NotAfter.Sub(c.NotBefore); life > maxLife {
		p.warn(leaf.at(), "ask for a shorter one", "is valid for %d days: clients of Apple refuse more than %d", life/(24*time.Hour), maxLife/(24*time.Hour))
	}
	if c.IsCA && !selfIssued(c) {
		p.warn(leaf.at(), "ask for the certificate of a server", "is the certificate of a CA: Firefox refuses it for a server")
	}
	for _, oid := range c.UnhandledCriticalExtensions {
		p.warn(leaf.at(), "ask for one without it", "has the critical extension %v, and clients refuse what they do not know", oid)
	}
	for _, c := range chain {
		p.warnSignature(c)
	}
}

// warnSignature is about hashes of the past. Nobody verifies the signature of a certificate on itself.
func (p *pairing) warnSignature(c *cert) {
	switch c.SignatureAlgorithm {
	case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.DSAWithSHA1:
		if !selfIssued(c.Certificate) {
			p.warn(c.at(), "ask its CA for another one", "is signed with %v, which clients refuse", c.SignatureAlgorithm)
		}
	}
}

// mustStaple looks for status_request (5) and status_request_v2 (17) among the features.
func mustStaple(c *x509.Certificate) bool {
	for _, e := range c.Extensions {
		var features []int
		if !e.Id.Equal(oidTLSFeature) {
			continue
		}
		_, err := asn1.Unmarshal(e.Value, &features)
		return err == nil && (slices.Contains(features, 5) || slices.Contains(features, 17))
	}
	return false
}

// forServers says whether the extended key usages of a certificate let it, or what it signs, be a server.
func forServers(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 ||
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// warnBrowsers names a certificate with a type of key that browsers do not take, if its names have no other one.
func (b *builder) warnBrowsers(c *Certificate) {
	switch key := c.pair.Leaf.PublicKey.(type) {
	case ed25519.PublicKey:
		b.warn(c.at(), "put an ECDSA P-256 certificate beside it", "browsers do not take Ed25519 certificates, and %s has no other one", title(c.pair.Leaf))
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P521() {
			b.warn(c.at(), "put an ECDSA P-256 certificate beside it", "Chrome does not take ECDSA P-521 certificates, and %s has no other one", title(c.pair.Leaf))
		}
	}
}
