// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tlsnat/tlsnat/gateway/certs/rsasign"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

const (
	// maxChain is how many certificates go to a client: crypto/tls clients verify no chain of more than 100
	// signatures in all, OpenSSL ones stop at a depth of 100, and no public chain is longer than five.
	maxChain = 16

	// maxChecks bounds the signatures that are checked for one chain, since any number of certificates may
	// carry the name of an issuer.
	maxChecks = 64
)

// pairing joins what the files hold: which key is for which certificate, and which certificate signed which.
type pairing struct {
	files     []*file
	keys      map[string][]*key  // by public key
	leaves    map[string][]*cert // the places where a certificate with a key stands, by its DER
	cas       map[string][]*cert // CA certificates of all files, by subject
	links     map[[2]*x509.Certificate]link
	before    map[[2]*x509.Certificate]link // of the store before
	had       map[string]*file              // files of the store before, by path
	used      map[*cert]bool                // goes out with some leaf of the same file
	judged    map[*x509.Certificate]bool    // intermediates that have been looked at
	certified map[string]bool               // public keys that stand in a certificate
	issuing   map[string]bool               // names of issuers: an old root may lack the mark of a CA
	now       time.Time
	*report
}

// assemble makes pairs, each with its chain, in order of file and line.
func assemble(files []*file, now time.Time, r *report) []*Certificate {
	return newPairing(files, now, r).pairs()
}

func newPairing(files []*file, now time.Time, r *report) *pairing {
	return &pairing{
		files: files, now: now, report: r,
		keys:      make(map[string][]*key),
		leaves:    make(map[string][]*cert),
		cas:       make(map[string][]*cert),
		links:     make(map[[2]*x509.Certificate]link),
		used:      make(map[*cert]bool),
		judged:    make(map[*x509.Certificate]bool),
		certified: make(map[string]bool),
		issuing:   make(map[string]bool),
	}
}

func (p *pairing) pairs() (certs []*Certificate) {
	for _, der := range p.collect() {
		if c := p.certificate(p.leaves[der]); c != nil {
			certs = append(certs, c)
		}
	}
	p.warnStrays()
	p.reportLoneCerts()
	return certs
}

// collect fills the maps and gives the leaves in the order in which they were found.
func (p *pairing) collect() (order []string) {
	for _, f := range p.files {
		*p.report = append(*p.report, f.problems...)
		for _, k := range f.keys {
			p.keys[k.pub] = append(p.keys[k.pub], k)
		}
	}
	interned := make(map[string]*x509.Certificate)
	for _, f := range p.files {
		if p.had[f.path] == f { // first, so that what is known of their signatures is found by their addresses
			for _, c := range f.certs {
				interned[string(c.Raw)] = c.Certificate
			}
		}
	}
	for _, f := range p.files {
		for _, c := range f.certs {
			der := string(c.Raw)
			if same := interned[der]; same != nil {
				c.Certificate = same // an intermediate stands in many files: keep it once
			}
			interned[der] = c.Certificate
			p.certified[c.pub] = true
			if !selfIssued(c.Certificate) {
				p.issuing[string(c.RawIssuer)] = true
			}
			if c.IsCA {
				p.cas[string(c.RawSubject)] = append(p.cas[string(c.RawSubject)], c)
			}
			if len(p.keys[c.pub]) == 0 {
				continue
			}
			if p.leaves[der] == nil {
				order = append(order, der)
			}
			p.leaves[der] = append(p.leaves[der], c)
		}
	}
	return order
}

// certificate makes the pair of a leaf that stands in one or more files; nil if it cannot be served.
func (p *pairing) certificate(places []*cert) *Certificate {
	leaf, notes := places[0], report(nil)
	kind, name, refusal := judge(leaf.Certificate)
	if refusal != "" {
		p.fail(leaf.at(), "ask for a certificate with an ECDSA P-256 key", "not served: %s", refusal)
		p.markUsed(leaf.file.certs)
		return nil
	}
	chain := p.chain(leaf, &notes)
	for _, other := range places[1:] { // certbot's cert.pem and fullchain.pem hold the same leaf
		var otherNotes report
		if c := p.chain(other, &otherNotes); len(c) > len(chain) || len(c) == len(chain) && len(otherNotes) < len(notes) {
			leaf, chain, notes = other, c, otherNotes
		}
	}
	*p.report = append(*p.report, notes...)
	k := p.keyFor(leaf)
	c := &Certificate{
		Issuer: commonName(leaf.Issuer), KeyType: name, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
		CertFile: leaf.file.path, KeyFile: k.file.path, kind: kind, line: leaf.line,
		pair: tls.Certificate{PrivateKey: k.fastest(), Leaf: leaf.Certificate},
	}
	for _, link := range chain {
		c.pair.Certificate = append(c.pair.Certificate, link.Raw)
	}
	if !p.names(c, leaf) {
		return nil
	}
	p.warnUnfit(leaf, chain)
	p.warnIntermediates(chain[1:])
	return c
}

// fastest is the key in the form that signs fastest.
func (k *key) fastest() crypto.Signer {
	if k.fast == nil {
		k.fast = k.Signer
		if key, ok := k.Signer.(*rsa.PrivateKey); ok {
			k.fast = rsasign.Signer(key)
		}
	}
	return k.fast
}

// remember takes over what the store before knows of its files: they are parsed, and their signatures checked.
func (p *pairing) remember(before *Store) {
	if before != nil {
		p.before, p.had = before.links, before.files
	}
}

// keyFor prefers the key in the same file, then the one in the same directory: only the file name differs.
func (p *pairing) keyFor(leaf *cert) *key {
	keys := p.keys[leaf.pub]
	for _, k := range keys {
		if k.file == leaf.file {
			return k
		}
	}
	for _, k := range keys {
		if filepath.Dir(k.file.path) == filepath.Dir(leaf.file.path) {
			return k
		}
	}
	return keys[0]
}

// chain is the leaf and the certificates that lead from it towards a root: all that its file has, in the order of
// the file if that is a possible one (RFC 5246, 7.4.2), then what other files have, short of the root.
func (p *pairing) chain(leaf *cert, notes *report) []*cert {
	members, checks := []*cert{leaf}, maxChecks
	for i := 0; i < len(members) && len(members) < maxChain; i++ {
		member := members[i]
		if selfIssued(member.Certificate) {
			continue
		}
		issuers, doubt := p.issuers(member, leaf.file, &checks)
		for _, issuer := range issuers {
			if known := slices.ContainsFunc(members, issuer.sameAs); !known && len(members) < maxChain &&
				(issuer.file == leaf.file || !selfIssued(issuer.Certificate)) {
				members = append(members, issuer)
			}
		}
		switch {
		case doubt != "":
			notes.warn(member.at(), "ask its CA for another one", "%s", doubt)
		case len(issuers) == 0 && i == 0:
			warnMissing(leaf, notes)
		}
	}
	p.markUsed(members)
	for _, c := range members[1:] {
		if c.file == leaf.file && selfIssued(c.Certificate) {
			notes.warn(c.at(), "remove it", "the root %.80q is sent with each handshake: clients have it or do not believe it", commonName(c.Subject))
		}
	}
	return inOrder(leaf, members, notes)
}

// sameAs may compare pointers: equal certificates have been made one.
func (c *cert) sameAs(other *cert) bool { return c.Certificate == other.Certificate }

// issuers are the certificates of the leaf's file that signed c; if it has none, the best one of all files. The
// doubt says what speaks against the signature that was found, or why one that should be it is not.
func (p *pairing) issuers(c *cert, home *file, checks *int) (issuers []*cert, doubt string) {
	var found, refused string
	for _, candidate := range home.certs {
		if l := p.link(c, candidate, checks); l.signed {
			issuers, found = append(issuers, candidate), l.doubt
		} else if l.doubt != "" {
			refused = l.doubt
		}
	}
	if len(issuers) > 0 {
		return issuers, found
	}
	// Elsewhere a CA of the same name may well be another one: that is no reason to doubt.
	var best *cert
	for _, candidate := range p.cas[string(c.RawIssuer)] {
		if candidate.file == home || best != nil && !fresher(candidate.Certificate, best.Certificate, p.now) {
			continue
		}
		if l := p.link(c, candidate, checks); l.signed {
			best, found = candidate, l.doubt
		}
	}
	if best != nil {
		return []*cert{best}, found
	}
	return nil, refused
}

// fresher prefers what is valid now, then what was issued last.
func fresher(a, b *x509.Certificate, now time.Time) bool {
	if va, vb := validAt(a, now), validAt(b, now); va != vb {
		return va
	}
	if !a.NotBefore.Equal(b.NotBefore) {
		return a.NotBefore.After(b.NotBefore)
	}
	return a.NotAfter.After(b.NotAfter)
}

func validAt(c *x509.Certificate, now time.Time) bool {
	return !now.Before(c.NotBefore) && !now.After(c.NotAfter)
}

// link is what is known of one certificate being signed by another.
type link struct {
	signed bool
	doubt  string
}

// link checks child's signature with issuer's key, once for every two certificates.
func (p *pairing) link(child, issuer *cert, checks *int) link {
	if child.Certificate == issuer.Certificate || !bytes.Equal(child.RawIssuer, issuer.RawSubject) {
		return link{}
	}
	pair := [2]*x509.Certificate{child.Certificate, issuer.Certificate}
	l, known := p.links[pair]
	if !known {
		if l, known = p.before[pair]; known && l.doubt == "" { // a doubt names a file and a line
			p.links[pair] = l
			return l
		}
		if *checks > 0 {
			*checks--
			l = checkLink(child.Certificate, issuer.Certificate, issuer.at())
			p.links[pair] = l
		}
	}
	return l
}

// checkLink believes a signature that Go has no code for: the gateway only sends the chain on, clients check it.
func checkLink(child, issuer *x509.Certificate, at place) link {
	name := commonName(issuer.Subject)
	if key, ok := issuer.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > maxRSABits {
		return link{doubt: fmt.Sprintf("its issuer %.80q, %s, has a key of %d bits, which clients refuse", name, at, key.N.BitLen())}
	}
	err := child.CheckSignatureFrom(issuer)
	var insecure x509.InsecureAlgorithmError
	switch {
	case err == nil:
		return link{signed: true}
	case errors.As(err, &insecure):
		return link{signed: true, doubt: fmt.Sprintf("is signed with %v, which clients refuse", x509.SignatureAlgorithm(insecure))}
	case errors.Is(err, x509.ErrUnsupportedAlgorithm):
		return link{signed: true}
	case errors.As(err, new(x509.ConstraintViolationError)):
		return link{doubt: fmt.Sprintf("names as its issuer %.80q, but that one, %s, is not a CA", name, at)}
	}
	return link{doubt: fmt.Sprintf("names as its issuer %.80q, but that one, %s, did not sign it", name, at)}
}

func (p place) String() string { return fmt.Sprintf("%s:%d", printable.Quoted(p.file), p.line) }

// warnMissing is for a leaf alone. Whether the issuer of an intermediate is a root, which clients have, or one
// more intermediate cannot be seen from the certificates; a leaf that a root itself issued is left to private CAs.
func warnMissing(leaf *cert, notes *report) {
	hint := "append it to the file, or if it is a root put it into one of its own"
	if urls := leaf.IssuingCertificateURL; len(urls) > 0 && len(urls[0]) < 200 && !strings.ContainsFunc(urls[0], notURL) {
		hint += "; it is at " + urls[0]
	}
	notes.warn(leaf.at(), hint, "the certificate of its issuer %.80q is missing: clients that do not know it refuse the chain",
		commonName(leaf.Issuer))
}

func notURL(r rune) bool { return r <= ' ' || r >= 0x7f || r == '"' || r == '\'' || r == '`' }

// inOrder keeps the order of the file when each certificate comes after one that it signed.
func inOrder(leaf *cert, members []*cert, notes *report) []*cert {
	var chain []*cert
	for _, c := range leaf.file.certs {
		if slices.Contains(members, c) {
			chain = append(chain, c)
		}
	}
	if !possibleOrder(chain, leaf) {
		notes.warn(leaf.at(), "write the leaf first, then each issuer after what it signed",
			"the chain is not in order; it is served in order")
		return members
	}
	for _, c := range members {
		if c.file != leaf.file {
			chain = append(chain, c)
		}
	}
	return chain
}

func possibleOrder(chain []*cert, leaf *cert) bool {
	if chain[0] != leaf {
		return false
	}
	for i, c := range chain[1:] {
		if !slices.ContainsFunc(chain[:i+1], func(below *cert) bool { return bytes.Equal(below.RawIssuer, c.RawSubject) }) {
			return false
		}
	}
	return true
}

func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

func (p *pairing) markUsed(certs []*cert) {
	for _, c := range certs {
		p.used[c] = true
	}
}

// names fills in what the certificate serves, from its subjectAltName alone: clients have stopped to look at the
// common name (RFC 9525, 2). It reports whether that is anything.
func (p *pairing) names(c *Certificate, leaf *cert) bool {
	for _, ip := range leaf.IPAddresses {
		if addr, ok := netip.AddrFromSlice(ip); ok {
			c.Addrs = append(c.Addrs, addr.Unmap())
		}
	}
	for _, name := range leaf.DNSNames {
		lower := strings.TrimSuffix(strings.ToLower(name), ".")
		if !servable(lower) {
			p.warn(leaf.at(), `write names like "www.example" or "*.example" into the request`, "its name %.80q is none that a client can ask for", name)
			continue
		}
		c.Names = append(c.Names, lower)
	}
	cn := strings.ToLower(leaf.Subject.CommonName)
	isHost := servable(cn) && (!leaf.IsCA || strings.Contains(cn, ".")) // a CA may be called "root"
	if len(leaf.DNSNames)+len(leaf.IPAddresses) == 0 && isHost {
		p.warn(leaf.at(), "ask for one with a subjectAltName", "has no subjectAltName: it is served for its common name %.80q, but today's clients refuse it", cn)
		c.Names = []string{cn}
	}
	c.Names, c.Addrs = unique(c.Names, strings.Compare), unique(c.Addrs, netip.Addr.Compare)
	switch {
	case len(c.Names)+len(c.Addrs) > 0:
		return true
	case leaf.IsCA:
		p.warn(leaf.at(), "keep the key of a CA away from the edge", "the private key of the CA %.80q is here", commonName(leaf.Subject))
	default:
		p.fail(leaf.at(), "ask for one with a subjectAltName", "not served: the certificate holds no name and no address")
	}
	return false
}

func unique[T comparable](list []T, compare func(a, b T) int) []T {
	slices.SortFunc(list, compare)
	return slices.Compact(list)
}

// servable is a host name in lower case, or one below a wildcard that is the whole first label.
func servable(name string) bool {
	name = strings.TrimPrefix(name, "*.")
	if len(name) == 0 || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 || strings.ContainsFunc(label, notHost) {
			return false
		}
	}
	_, err := netip.ParseAddr(name)
	return err != nil // an address belongs into an iPAddress entry; no client asks for it by name (RFC 6066, 3)
}

func notHost(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_')
}

func (p *pairing) warnPurpose(leaf *cert) {
	if !forServers(leaf.Certificate) {
		p.warn(leaf.at(), "ask for one with the extended key usage serverAuth", "is not for servers: clients refuse it")
	}
}

// warnIntermediates names an intermediate that clients refuse, or soon will, once, however many leaves it signed.
func (p *pairing) warnIntermediates(chain []*cert) {
	for _, c := range chain {
		if selfIssued(c.Certificate) || p.judged[c.Certificate] {
			continue
		}
		p.judged[c.Certificate] = true
		name := commonName(c.Subject)
		switch left := c.NotAfter.Sub(p.now); {
		case left < 0:
			p.warn(c.at(), "put the CA's new one there", "the intermediate %.80q expired %s", name, day(c.NotAfter))
		case left < soon:
			p.warn(c.at(), "put the CA's new one there", "the intermediate %.80q expires %s, %s", name, in(left), day(c.NotAfter))
		case p.now.Before(c.NotBefore):
			p.warn(c.at(), "check the clock of this machine", "the intermediate %.80q is not valid before %s", name, day(c.NotBefore))
		}
		if !forServers(c.Certificate) {
			p.warn(c.at(), "ask the CA for one with the extended key usage serverAuth", "the intermediate %.80q is not for servers: clients refuse what it signed", name)
		}
	}
}

// warnStrays names certificates that stand beside a leaf and lead from it nowhere.
func (p *pairing) warnStrays() {
	for _, places := range p.leaves {
		for _, leaf := range places {
			for _, c := range leaf.file.certs {
				if len(p.keys[c.pub]) == 0 && !p.isForServer(c) && !p.used[c] {
					p.used[c] = true
					p.warn(c.at(), "remove it, or replace it by the certificate that is missing",
						"%.80q is no part of the chain of a certificate in this file", commonName(c.Subject))
				}
			}
		}
	}
}

// reportLoneCerts is about certificates without a key and keys without a certificate.
func (p *pairing) reportLoneCerts() {
	explained, seen := make(map[*key]bool), make(map[*x509.Certificate]bool)
	for _, f := range p.files {
		for _, c := range f.certs {
			if len(p.keys[c.pub]) == 0 && p.isForServer(c) && !seen[c.Certificate] {
				seen[c.Certificate] = true
				p.reportLoneCert(c, explained)
			}
		}
	}
	for _, f := range p.files {
		for _, k := range f.keys {
			if !p.certified[k.pub] && !explained[k] {
				p.warn(k.at(), "put the certificate that its CA returned beside it, or remove the key", "no certificate is for this private key")
			}
		}
	}
}

// isForServer tells a certificate that wants a key from one of a CA. openssl req -x509 marks what it makes as a CA,
// but no real CA is named like a host; and a root of version 1 has no mark, but somebody it signed.
func (p *pairing) isForServer(c *cert) bool {
	named := len(c.DNSNames)+len(c.IPAddresses) > 0
	return (named || !c.IsCA) && !p.issuing[string(c.RawSubject)]
}

func (p *pairing) reportLoneCert(c *cert, explained map[*key]bool) {
	if _, _, refusal := judge(c.Certificate); refusal != "" {
		p.fail(c.at(), "ask for a certificate with an ECDSA P-256 key", "not served: %s", refusal)
		return
	}
	beside := p.beside(c.file)
	for _, f := range beside {
		if len(f.keys) > 0 {
			k := f.keys[0]
			explained[k] = true
			p.fail(c.at(), "put the key there that the certificate was requested with",
				"the key at %s is not its key: the certificate for %s is not served", place{f.name, k.line}, title(c.Certificate))
			return
		}
	}
	for _, f := range beside {
		if f.broken {
			p.fail(c.at(), "", "the certificate for %s is not served: its key should be in %s, which cannot be used", title(c.Certificate), printable.Quoted(f.name))
			return
		}
	}
	n := 0
	for _, keys := range p.keys {
		n += len(keys)
	}
	p.fail(c.at(), "put its key beside it, as "+printable.Quoted(stem(filepath.Base(c.file.path)))+".key",
		"the certificate for %s has no private key: none of the %d keys here is for it", title(c.Certificate), n)
}

// beside are the files in which one would look for a certificate's key: itself, its namesake, and in a directory
// of its own the only other file with keys.
func (p *pairing) beside(home *file) []*file {
	found := []*file{home}
	var sharing []*file
	for _, f := range p.files {
		switch {
		case f == home || filepath.Dir(f.path) != filepath.Dir(home.path):
		case stem(f.path) == stem(home.path):
			found = append(found, f)
		case filepath.Dir(f.name) != "." && (len(f.keys) > 0 || f.broken):
			sharing = append(sharing, f)
		}
	}
	if len(found) == 1 && len(sharing) == 1 {
		found = append(found, sharing[0])
	}
	return found
}
