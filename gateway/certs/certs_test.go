// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

func TestExactBeatsWildcardAndWildcardIsOneLabel(t *testing.T) {
	dir := t.TempDir()
	ca := authority(t, nil, "Root")
	for file, names := range map[string][]string{"wild": {"*.bank.example"}, "exact": {"API.bank.example", "bank.example"}} {
		id := leaf(t, ca, names...)
		put(t, dir, file+".pem", id.certPEM(), id.keyPEM(t))
	}
	put(t, dir, "root.crt", ca.certPEM())
	s := loadClean(t, dir)
	for name, file := range map[string]string{
		"api.bank.example":                        "exact.pem",
		"api.bank.example.":                       "exact.pem",
		"bank.example":                            "exact.pem",
		"pay.bank.example":                        "wild.pem",
		"*.bank.example":                          "wild.pem",
		"a.b.bank.example":                        "",
		strings.Repeat("a", 63) + ".bank.example": "wild.pem",
		strings.Repeat("a", 64) + ".bank.example": "",
		".bank.example":                           "",
		"example":                                 "",
		"":                                        "",
		".":                                       "",
	} {
		got := ""
		if e := s.ForName(name); e != nil {
			got = filepath.Base(e.Served(noon)[0].CertFile)
		}
		if got != file {
			t.Errorf("%q is served by %q, not %q", name, got, file)
		}
	}
	if s.Only() != nil {
		t.Error("Only guesses between two")
	}
}

func TestAddressIsServedByItsCertificate(t *testing.T) {
	dir := t.TempDir()
	id := issue(t, nil, ask{names: []string{"localhost"}, change: func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("2001:db8::1")}
	}})
	put(t, dir, "a.pem", id.certPEM(), id.keyPEM(t))
	s := loadClean(t, dir)
	for _, addr := range []string{"192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "2001:db8::1%eth0"} {
		if e := s.ForAddr(netip.MustParseAddr(addr)); e == nil || e != s.Only() || e != s.ForName("localhost") {
			t.Errorf("%s: %v", addr, e)
		}
	}
	if s.ForAddr(netip.MustParseAddr("192.0.2.2")) != nil || s.ForAddr(netip.Addr{}) != nil {
		t.Error("another address is served")
	}
}

func TestNilStoreServesNothing(t *testing.T) {
	var s *Store
	if s.ForName("a") != nil || s.ForAddr(netip.IPv6Loopback()) != nil || s.Only() != nil || s.Entries() != nil {
		t.Error("it does")
	}
}

func TestKeyTypesOfOneNameAreOneEntry(t *testing.T) {
	dir := t.TempDir()
	ca := authority(t, nil, "Root")
	put(t, dir, "root.crt", ca.certPEM())
	rsa := issue(t, ca, ask{names: []string{"a.example", "b.example"}, key: rsaKey(t)})
	ec := issue(t, ca, ask{names: []string{"b.example", "a.example"}})
	ed := issue(t, ca, ask{names: []string{"b.example"}, key: edKey(t)})
	put(t, dir, "1.pem", rsa.certPEM(), rsa.keyPEM(t))
	put(t, dir, "2.pem", ec.certPEM(), ec.keyPEM(t))
	s := loadClean(t, dir)
	if got := serves(s); len(got) != 1 || got[0] != "a.example b.example = ECDSA P-256, RSA 2048" || s.Only() == nil {
		t.Errorf("entries: %q", got)
	}
	put(t, dir, "3.pem", ed.certPEM(), ed.keyPEM(t))
	s = loadClean(t, dir)
	want := []string{"a.example = ECDSA P-256, RSA 2048", "b.example = ECDSA P-256, Ed25519, RSA 2048"}
	if got := serves(s); !slices.Equal(got, want) || s.Only() != nil {
		t.Errorf("entries: %q", got)
	}
}

func TestClientGetsTheFirstCertificateThatItCanUse(t *testing.T) {
	dir := t.TempDir()
	ca := authority(t, nil, "Root")
	rsa := issue(t, ca, ask{names: []string{"a.example"}, key: rsaKey(t)})
	ec := issue(t, ca, ask{names: []string{"a.example"}})
	put(t, dir, "root.crt", ca.certPEM())
	put(t, dir, "rsa.pem", rsa.certPEM(), rsa.keyPEM(t))
	put(t, dir, "ec.pem", ec.certPEM(), ec.keyPEM(t))
	entry := loadClean(t, dir).Only()
	both := []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	for _, c := range []struct {
		version uint16
		suites  []uint16
		name    string
		want    *identity
	}{
		{tls.VersionTLS13, both, "a.example", ec},
		{tls.VersionTLS12, both, "a.example", ec},
		{tls.VersionTLS12, both[1:], "a.example", rsa},
		{tls.VersionTLS12, both[1:], "chosen-by-a-rule.example", rsa},
		{tls.VersionTLS12, both[:1], "a.example", ec},
	} {
		got, err := shake(t, &tls.Config{GetCertificate: entry.Select},
			&tls.Config{ServerName: c.name, MaxVersion: c.version, CipherSuites: c.suites, InsecureSkipVerify: true})
		if err != nil || !got.Equal(c.want.Certificate) {
			t.Errorf("%s, suites %x: %v %v", tls.VersionName(c.version), c.suites, got.Subject, err)
		}
	}
	got, err := shake(t, &tls.Config{GetCertificate: entry.Select}, &tls.Config{ServerName: "a.example", RootCAs: pool(ca), Time: func() time.Time { return noon }})
	if err != nil || got == nil {
		t.Error(err)
	}
}

func pool(ids ...*identity) *x509.CertPool {
	p := x509.NewCertPool()
	for _, id := range ids {
		p.AddCert(id.Certificate)
	}
	return p
}

// shake is the leaf that a client sees.
func shake(t *testing.T, server, client *tls.Config) (*x509.Certificate, error) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go tls.Server(b, server).Handshake()
	c := tls.Client(a, client)
	a.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.Handshake(); err != nil {
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0], nil
}

func TestSingleCertificateIsGivenWithoutAsking(t *testing.T) {
	dir := t.TempDir()
	id := leaf(t, nil, "a.example")
	put(t, dir, "a.pem", id.certPEM(), id.keyPEM(t))
	e := loadClean(t, dir).Only()
	if c, err := e.Select(nil); err != nil || c != e.Served(noon)[0].TLS() || c.Leaf == nil {
		t.Errorf("%v %v", c, err)
	}
	if n := testing.AllocsPerRun(100, func() { e.Select(nil) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A directory as certbot leaves it, one as Kubernetes mounts it, one as a CA's mail suggests, and what lies about.
func TestUsualLayoutsLoadWithoutComplaint(t *testing.T) {
	dir := t.TempDir()
	root := authority(t, nil, "Root")
	inter := authority(t, root, "Intermediate")
	certbot, k8s, mail, split := leaf(t, inter, "certbot.example"), leaf(t, inter, "k8s.example"), leaf(t, inter, "mail.example"), leaf(t, inter, "split.example")

	put(t, dir, "certbot/cert.pem", certbot.certPEM())
	put(t, dir, "certbot/chain.pem", inter.certPEM())
	put(t, dir, "certbot/fullchain.pem", certbot.certPEM(), inter.certPEM())
	put(t, dir, "certbot/privkey.pem", certbot.keyPEM(t))
	put(t, dir, "certbot/README", "This directory contains your keys and certificates.")

	put(t, dir, "k8s/..2026_06_01/tls.crt", k8s.certPEM(), inter.certPEM())
	put(t, dir, "k8s/..2026_06_01/tls.key", k8s.keyPEM(t))
	put(t, dir, "k8s/..2026_06_01/ca.crt", root.certPEM())
	symlink(t, dir, "..2026_06_01", "k8s/..data")
	for _, f := range []string{"tls.crt", "tls.key", "ca.crt"} {
		symlink(t, dir, "..data/"+f, "k8s/"+f)
	}

	put(t, dir, "mail_example.CRT", "subject=mail.example\r\n\r\n", strings.ReplaceAll(mail.certPEM(), "\n", "\r\n"))
	put(t, dir, "mail_example.key", "\ufeff", mail.keyPEM(t))
	put(t, dir, "ca-bundle.crt", inter.certPEM(), root.certPEM())

	put(t, dir, "certs/split.crt", split.certPEM())
	put(t, dir, "private/any-name-will-do.key", "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n", split.keyPEM(t))
	put(t, dir, "lost+found/x.pem", "nonsense")
	put(t, dir, ".hidden.pem", "nonsense")
	put(t, dir, "too/deep/x.pem", "nonsense")
	put(t, dir, "notes.txt", "nonsense")

	s := loadClean(t, dir)
	want := []string{"certbot.example = ECDSA P-256", "k8s.example = ECDSA P-256", "mail.example = ECDSA P-256", "split.example = ECDSA P-256"}
	if got := serves(s); !slices.Equal(got, want) {
		t.Errorf("entries: %q", got)
	}
	for _, e := range s.Entries() {
		c := e.Served(noon)[0]
		opts := x509.VerifyOptions{DNSName: e.Names[0], Roots: pool(root), Intermediates: x509.NewCertPool(), CurrentTime: noon}
		for _, der := range c.TLS().Certificate[1:] {
			above, _ := x509.ParseCertificate(der)
			opts.Intermediates.AddCert(above)
		}
		if _, err := c.TLS().Leaf.Verify(opts); err != nil || len(c.TLS().Certificate) != 2 || c.Issuer != "Intermediate" {
			t.Errorf("%s: chain of %d, %v", e.Names[0], len(c.TLS().Certificate), err)
		}
	}
	c := s.ForName("split.example").Served(noon)[0]
	if c.CertFile != filepath.Join(dir, "certs/split.crt") || c.KeyFile != filepath.Join(dir, "private/any-name-will-do.key") {
		t.Errorf("files: %s %s", c.CertFile, c.KeyFile)
	}
}

func symlink(t *testing.T, dir, target, name string) {
	t.Helper()
	if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func TestStoreIsASnapshot(t *testing.T) {
	dir := t.TempDir()
	old, renewed := leaf(t, nil, "a.example"), leaf(t, nil, "a.example")
	put(t, dir, "a.pem", old.certPEM(), old.keyPEM(t))
	before := loadClean(t, dir)
	put(t, dir, "a.pem", renewed.certPEM(), renewed.keyPEM(t))
	after := loadClean(t, dir)
	if !before.Only().Served(noon)[0].TLS().Leaf.Equal(old.Certificate) || !after.Only().Served(noon)[0].TLS().Leaf.Equal(renewed.Certificate) {
		t.Error("a reload changed the store in use")
	}
}

// many is a store of n names, half of them wildcards, and names that it serves.
func many(t testing.TB, dir string, n int) (names []string) {
	inter := authority(t, authority(t, nil, "Root"), "Intermediate")
	chain := inter.certPEM()
	for i := range n {
		name := fmt.Sprintf("host-%d.example.net", i)
		asked := name
		if i%2 == 1 {
			name, asked = fmt.Sprintf("*.zone-%d.example.net", i), fmt.Sprintf("www.zone-%d.example.net", i)
		}
		id := leaf(t, inter, name)
		if i%4 < 2 {
			put(t, dir, fmt.Sprintf("%d.pem", i), id.certPEM(), chain, id.keyPEM(t))
		} else {
			put(t, dir, fmt.Sprintf("%d.crt", i), id.certPEM(), chain)
			put(t, dir, fmt.Sprintf("%d.key", i), id.keyPEM(t))
		}
		names = append(names, asked)
	}
	return names
}

// The limit is for the CPU time, so that it holds on one core and does not depend on what else the machine does.
func TestTwoThousandCertificatesLoadWithinASecondAndAHalf(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	if raceEnabled || testing.Short() {
		t.Skip("the race detector makes it ten times slower")
	}
	dir := t.TempDir()
	names := many(t, dir, 2000)
	before := cpuTime(t)
	s := loadClean(t, dir)
	if took := cpuTime(t) - before; took > 1500*time.Millisecond {
		t.Errorf("took %v", took)
	}
	if len(s.Entries()) != len(names) {
		t.Errorf("%d entries", len(s.Entries()))
	}
}

func cpuTime(t *testing.T) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestLookupAllocatesNothing(t *testing.T) {
	dir := t.TempDir()
	names := many(t, dir, 20)
	s := loadClean(t, dir)
	addr := netip.MustParseAddr("::ffff:192.0.2.1")
	if n := testing.AllocsPerRun(100, func() {
		for _, name := range names {
			if s.ForName(name) == nil {
				t.Fatal(name)
			}
		}
		s.ForName("nobody.example")
		s.ForAddr(addr)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkForName(b *testing.B) {
	for _, n := range []int{2, 200, 2000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := b.TempDir()
			names := many(b, dir, n)
			s := loadClean(b, dir)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if s.ForName(names[i%n]) == nil {
					b.Fatal("not found")
				}
			}
		})
	}
}

func BenchmarkSelectOfTwo(b *testing.B) {
	dir := b.TempDir()
	rsa := issue(b, nil, ask{names: []string{"a.example"}, key: rsaKey(b)})
	ec := leaf(b, nil, "a.example")
	put(b, dir, "rsa.pem", rsa.certPEM(), rsa.keyPEM(b))
	put(b, dir, "ec.pem", ec.certPEM(), ec.keyPEM(b))
	e := loadClean(b, dir).Only()
	chi := &tls.ClientHelloInfo{
		SupportedVersions: []uint16{tls.VersionTLS13}, SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256, tls.PSSWithSHA256},
	}
	b.ReportAllocs()
	for b.Loop() {
		e.Select(chi)
	}
}

func BenchmarkLoad(b *testing.B) {
	dir := b.TempDir()
	many(b, dir, 2000)
	b.Run("ecdsa-2000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			Load(dir, noon)
		}
	})
	rsaDir := b.TempDir()
	for i := range 200 { // one key: what it costs to read it is the same
		id := issue(b, nil, ask{names: []string{fmt.Sprintf("host-%d.example", i)}, key: rsaKey(b)})
		put(b, rsaDir, fmt.Sprintf("%d.pem", i), id.certPEM(), id.keyPEM(b))
	}
	b.Run("rsa-200", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			Load(rsaDir, noon)
		}
	})
}
