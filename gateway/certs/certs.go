// SPDX-License-Identifier: Apache-2.0

// Package certs finds the certificate for a name.
//
//	store, problems := certs.Load("/etc/tlsnat/certs", time.Now())
//	for _, p := range problems {
//		fmt.Fprintln(os.Stderr, p)
//	}
//	config := &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
//		if e := store.ForName(strings.ToLower(chi.ServerName)); e != nil {
//			return e.Select(chi)
//		}
//		return nil, errors.New("no certificate for this name")
//	}}
//
// A directory is read like this:
//
//   - regular files and links to them named *.pem, *.crt, *.cer or *.key, in the directory itself and one level
//     below it: NAME.crt with NAME.key, certbot's live/NAME/{fullchain,privkey}.pem, a Kubernetes secret mounted
//     as NAME/{tls.crt,tls.key}. Names beginning with a dot are skipped, and with them the ..data directories
//     through which Kubernetes swaps a secret.
//   - a certificate and its key find each other by public key, so they may be named as one likes, be in one
//     file or in two. A certificate without a key is chain material if it is a CA, otherwise an error.
//   - what a certificate serves is what its subjectAltName says: names, wildcards of exactly one label
//     (RFC 6125, 6.4.3), addresses. RSA, ECDSA and Ed25519 certificates for one name stand side by side.
//   - of several certificates of one type the one that is valid when the client comes is served, and of several
//     valid ones the one that began last. So the next certificate can lie beside the present one in advance.
//
// Everything that is wrong is reported at once, as a [Problem]; one broken pair does not take the others away.
//
// The package does not verify that a chain ends in a root that clients trust, asks no CA for a certificate,
// staples no OCSP answer and watches no file: a [Store] is an immutable snapshot, and a reload is another [Load].
package certs

import (
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"
)

// Store is an immutable set of certificates, indexed by what they serve. It may be used from many goroutines.
// A nil Store serves nothing.
type Store struct {
	exact    map[string]*Entry
	wildcard map[string]*Entry // "*.a.example" is kept as ".a.example"
	addrs    map[netip.Addr]*Entry
	entries  []*Entry
	certs    []*Certificate // of all entries

	files map[string]*file              // what they were made of
	links map[[2]*x509.Certificate]link // signatures that were checked
}

// Entry is what can be served for one or more names. Which certificate is served depends on the time: see Served.
// Its fields are for reading.
type Entry struct {
	Names []string     // sorted, lower case; a wildcard is written "*.example"
	Addrs []netip.Addr // sorted; IPv4 is never IPv4-mapped IPv6

	all    []*Certificate // every certificate for the names, at least one
	under  *Entry         // of the wildcard that holds the names too; nil: there is none
	choice atomic.Pointer[choice]
}

// Certificate is one leaf with its chain and key, and where they came from. Its fields are for reading.
type Certificate struct {
	Names     []string     // every DNS name it holds, in lower case, also those that another certificate won
	Addrs     []netip.Addr // every address it holds
	Issuer    string       // the issuer's common name, or its whole name without one
	KeyType   string       // "ECDSA P-256", "Ed25519", "RSA 2048"
	NotBefore time.Time
	NotAfter  time.Time
	CertFile  string // path of the file that holds the leaf
	KeyFile   string // path of the file that holds the private key; often the same
	Kept      bool   // the files cannot be used any more: this is what they held before

	pair tls.Certificate // Leaf is set, so that no handshake parses it again
	kind kind
	line int // of the leaf in CertFile
}

// TLS is the certificate as crypto/tls wants it: chain from the leaf up, private key, parsed Leaf.
func (c *Certificate) TLS() *tls.Certificate { return &c.pair }

// maxLabel is how long a label can be (RFC 1035, section 2.3.4). What is longer is no name that a wildcard stands for.
const maxLabel = 63

// ForName is the entry for a server name in lower case; one trailing dot is ignored. An exact name beats a
// wildcard, and a wildcard stands for exactly one label. It is nil if no certificate is for that name.
func (s *Store) ForName(name string) *Entry {
	if s == nil {
		return nil
	}
	name = strings.TrimSuffix(name, ".")
	if e, ok := s.exact[name]; ok {
		return e
	}
	if dot := strings.IndexByte(name, '.'); dot > 0 && dot <= maxLabel {
		return s.wildcard[name[dot:]]
	}
	return nil
}

// ForAddr is the entry whose certificate holds the address as a subjectAltName, for clients that were given an
// address and so send no server name (RFC 6066, 3). It is nil if there is none.
func (s *Store) ForAddr(addr netip.Addr) *Entry {
	if s == nil {
		return nil
	}
	return s.addrs[addr.Unmap().WithZone("")]
}

// Only is the one entry of a store that serves one certificate, or certificates of different key types for the
// very same names. It is nil if there are several: which of them to show would be a guess.
func (s *Store) Only() *Entry {
	if s == nil || len(s.entries) != 1 {
		return nil
	}
	return s.entries[0]
}

// Entries are all entries, by their first name; those for addresses alone come last.
func (s *Store) Entries() []*Entry {
	if s == nil {
		return nil
	}
	return s.entries
}

// Served are the certificates that any entry serves to clients that come at that time, each once.
func (s *Store) Served(now time.Time) (all []*Certificate) {
	seen := make(map[*Certificate]bool)
	for _, e := range s.Entries() {
		for _, c := range e.Served(now) {
			if !seen[c] {
				seen[c] = true
				all = append(all, c)
			}
		}
	}
	return all
}

// Select is the first certificate served now that the client can use. If it can use none of them it is the first, and
// crypto/tls answers the client with handshake_failure. The error is always nil; it makes Select fit
// [tls.Config.GetCertificate].
func (e *Entry) Select(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if e.fixed() {
		return &e.all[0].pair, nil
	}
	served := e.Served(time.Now())
	if len(served) == 1 {
		return &served[0].pair, nil
	}
	// The entry was chosen, by name or by another rule. With the name in place SupportsCertificate would
	// refuse both certificates of an entry that was chosen for another reason than its names.
	asked := *chi
	asked.ServerName = ""
	for _, c := range served {
		if asked.SupportsCertificate(&c.pair) == nil {
			return &c.pair, nil
		}
	}
	return &served[0].pair, nil
}
