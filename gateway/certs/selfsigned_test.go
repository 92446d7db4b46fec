// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var local = []string{"localhost", "127.0.0.1", "::1"}

func selfSigned(t testing.TB, dir string, names []string, now time.Time) *Certificate {
	t.Helper()
	s, err := SelfSigned(dir, names, now)
	if err != nil {
		t.Fatal(err)
	}
	return s.Only().Served(noon)[0]
}

func TestSelfSignedIsMadeOnceAndKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "tls")
	first := selfSigned(t, dir, local, noon)
	if !slices.Equal(first.Names, []string{"localhost"}) || !slices.Equal(first.Addrs, []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}) {
		t.Errorf("it is for %v %v", first.Names, first.Addrs)
	}
	for name, mode := range map[string]fs.FileMode{"": 0o700, selfSignedKey: 0o600, selfSignedCert: 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%q: %v %v", name, info.Mode(), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	names := []string{"::1", "LOCALHOST.", "127.0.0.1", "localhost"} // the same, in other words
	if again := selfSigned(t, dir, names, noon.Add(selfSignedLife-8*days)); !again.TLS().Leaf.Equal(first.TLS().Leaf) {
		t.Error("it was made again")
	}
	s := loadClean(t, dir)
	if s.ForName("localhost") == nil || s.ForAddr(netip.MustParseAddr("127.0.0.1")) == nil {
		t.Error("Load does not serve it")
	}
}

func TestSelfSignedIsMadeAnewWhenItMust(t *testing.T) {
	for name, spoil := range map[string]func(dir string) (names []string, now time.Time){
		"last week":   func(string) ([]string, time.Time) { return local, noon.Add(selfSignedLife - 6*days) },
		"other names": func(string) ([]string, time.Time) { return local[:2], noon },
		"clock back":  func(string) ([]string, time.Time) { return local, noon.Add(-2 * time.Hour) },
		"no key": func(dir string) ([]string, time.Time) {
			os.Remove(filepath.Join(dir, selfSignedKey))
			return local, noon
		},
		"cut short": func(dir string) ([]string, time.Time) {
			os.Truncate(filepath.Join(dir, selfSignedCert), 100)
			return local, noon
		},
		"other key": func(dir string) ([]string, time.Time) {
			other := leaf(t, nil, "localhost")
			put(t, dir, selfSignedKey, other.keyPEM(t))
			return local, noon
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			first := selfSigned(t, dir, local, noon)
			names, now := spoil(dir)
			if again := selfSigned(t, dir, names, now); again.TLS().Leaf.Equal(first.TLS().Leaf) {
				t.Error("it is the old one")
			}
		})
	}
}

func TestSelfSignedSaysWhatIsWrong(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	put(t, filepath.Dir(file), "file", "")
	for _, c := range []struct {
		dir   string
		names []string
		want  string
	}{
		{t.TempDir(), nil, `names of the self-signed certificate: none; write at least "localhost"`},
		{t.TempDir(), []string{"localhost", "not a host"}, `name 2 of the self-signed certificate: "not a host" is no host name and no address; write one like "localhost" or "127.0.0.1"`},
		{file, local, "make the directory for the self-signed certificate: mkdir " + file + ": not a directory"},
	} {
		if _, err := SelfSigned(c.dir, c.names, noon); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}

func TestSelfSignedByManyAtOnceIsOne(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	leaves := make([]*x509.Certificate, 8)
	for i := range leaves {
		all.Go(func() {
			if s, err := SelfSigned(dir, local, noon); err == nil {
				leaves[i] = s.Only().Served(noon)[0].TLS().Leaf
			}
		})
	}
	all.Wait()
	for _, l := range leaves {
		if l == nil || !l.Equal(leaves[0]) {
			t.Fatal("they differ")
		}
	}
}

func TestSelfSignedKeyCannotSpeakForOtherNames(t *testing.T) {
	for _, names := range [][]string{local, {"localhost"}, {"127.0.0.1"}} {
		c := selfSigned(t, t.TempDir(), names, noon)
		ca := &identity{c.TLS().Leaf, c.TLS().PrivateKey.(crypto.Signer)}
		forged := issue(t, ca, ask{names: []string{"bank.example"}, change: func(c *x509.Certificate) { c.IPAddresses = []net.IP{{192, 0, 2, 1}} }})
		for _, host := range []string{"bank.example", "192.0.2.1"} {
			opts := x509.VerifyOptions{DNSName: host, Roots: pool(ca), CurrentTime: noon}
			if _, err := forged.Verify(opts); err == nil || !strings.Contains(err.Error(), "constraint") {
				t.Errorf("made for %v, believed for %s: %v", names, host, err)
			}
		}
	}
}

// A client that is told to believe the certificate, and nothing else, must do so.
func TestCurlAndOpensslBelieveSelfSigned(t *testing.T) {
	c := selfSigned(t, t.TempDir(), local, time.Now())
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*c.TLS()}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, host := range []string{"localhost", "127.0.0.1"} {
		if got := run(t, "curl", "-sS", "-4", "--noproxy", "*", "--cacert", c.CertFile, "https://"+host+":"+port+"/"); got != "hello" {
			t.Errorf("%s: %q", host, got)
		}
	}
	for _, args := range [][]string{{"-verify_hostname", "localhost"}, {"-verify_ip", "::1"}} {
		args = append([]string{"verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", c.CertFile}, append(args, c.CertFile)...)
		if got := run(t, "openssl", args...); !strings.Contains(got, ": OK") {
			t.Errorf("%q", got)
		}
	}
	leaf := c.TLS().Leaf
	if _, err := leaf.Verify(x509.VerifyOptions{DNSName: "localhost", Roots: pool(&identity{Certificate: leaf})}); err != nil {
		t.Error(err)
	}
}
