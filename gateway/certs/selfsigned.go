// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	selfSignedCert = "self-signed.crt"
	selfSignedKey  = "self-signed.key"

	// selfSignedLife stays below the 398 days after which browsers refuse a certificate.
	selfSignedLife = 397 * 24 * time.Hour

	// selfSignedLeft is when it is made anew: whoever has told a client to believe it gets a week of both.
	selfSignedLeft = 7 * 24 * time.Hour
)

// SelfSigned is a store of one certificate that nobody has signed, for names and addresses of this machine. It is
// made once and kept in dir, as self-signed.crt (mode 0644, for curl --cacert) and self-signed.key (0600); dir is
// made with mode 0700 if it does not exist. It is made anew for other names, without its key, or in its last week.
//
// It is its own CA, so that one may tell a client to believe it; but a critical name constraint (RFC 5280,
// 4.2.1.10) keeps its key from making certificates that such a client would believe for other names.
func SelfSigned(dir string, names []string, now time.Time) (*Store, error) {
	hosts, addrs, err := hostsAndAddrs(names)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory for the self-signed certificate: %w", err)
	}
	unlock, err := lock(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if s := loadSelfSigned(dir, now); s.serves(hosts, addrs, now) {
		return s, nil
	}
	if err := makeSelfSigned(dir, hosts, addrs, now); err != nil {
		return nil, err
	}
	if s := loadSelfSigned(dir, now); s.serves(hosts, addrs, now) {
		return s, nil
	}
	return nil, fmt.Errorf("read back the self-signed certificate in %s: it is not what was written", dir)
}

func hostsAndAddrs(names []string) (hosts []string, addrs []netip.Addr, err error) {
	for i, name := range names {
		if addr, err := netip.ParseAddr(name); err == nil && addr.Zone() == "" {
			addrs = append(addrs, addr.Unmap())
			continue
		}
		host := strings.TrimSuffix(strings.ToLower(name), ".")
		if !servable(host) {
			return nil, nil, fmt.Errorf("name %d of the self-signed certificate: %q is no host name and no address; write one like \"localhost\" or \"127.0.0.1\"", i+1, name)
		}
		hosts = append(hosts, host)
	}
	if len(names) == 0 {
		return nil, nil, errors.New("names of the self-signed certificate: none; write at least \"localhost\"")
	}
	return unique(hosts, strings.Compare), unique(addrs, netip.Addr.Compare), nil
}

// lock keeps two processes from mixing one's key with the other's certificate.
func lock(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the directory of the self-signed certificate: %w", err)
	}
	for {
		err = syscall.Flock(int(d.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { d.Close() }, nil // closing unlocks
}

// loadSelfSigned reads the two files; what is wrong with them is a reason to make them anew, not to complain.
func loadSelfSigned(dir string, now time.Time) *Store {
	var r report
	files := readAll(dir, []string{filepath.Join(dir, selfSignedCert), filepath.Join(dir, selfSignedKey)}, nil)
	return index(assemble(files, now, &r), now, &r)
}

// serves reports whether the store is one certificate for exactly these, valid for long enough.
func (s *Store) serves(hosts []string, addrs []netip.Addr, now time.Time) bool {
	e := s.Only()
	return e != nil && slices.Equal(e.Names, hosts) && slices.Equal(e.Addrs, addrs) &&
		!now.Before(e.Served(now)[0].NotBefore) && e.Served(now)[0].NotAfter.Sub(now) >= selfSignedLeft
}

func makeSelfSigned(dir string, hosts []string, addrs []netip.Addr, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	template := selfSignedTemplate(hosts, addrs, now)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("make a self-signed certificate: %w", err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the key: %w", err)
	}
	// If only the first of the two gets written they do not fit each other, and are made anew.
	if err := writePEM(filepath.Join(dir, selfSignedKey), 0o600, "PRIVATE KEY", secret); err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, selfSignedCert), 0o644, "CERTIFICATE", der)
}

func selfSignedTemplate(hosts []string, addrs []netip.Addr, now time.Time) *x509.Certificate {
	t := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"tlsnat self-signed"}},
		NotBefore:             now.Add(-time.Hour), // for clients whose clock is a little behind
		NotAfter:              now.Add(selfSignedLife - time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		DNSNames:              hosts,

		PermittedDNSDomainsCritical: true,
	}
	for _, host := range hosts {
		t.PermittedDNSDomains = append(t.PermittedDNSDomains, strings.TrimPrefix(host, "*."))
	}
	for _, addr := range addrs {
		ip := net.IP(addr.AsSlice())
		t.IPAddresses = append(t.IPAddresses, ip)
		t.PermittedIPRanges = append(t.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())})
	}
	// A constraint speaks only about its own sort of name: where none is permitted, all must be excluded.
	if len(hosts) == 0 {
		t.ExcludedDNSDomains = []string{""}
	}
	if len(addrs) == 0 {
		t.ExcludedIPRanges = []*net.IPNet{
			{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
		}
	}
	return t
}

// writePEM replaces a file as a whole: a reader sees the old one or the new one.
//
//	openat(.name-*, O_EXCL) fchmod write fsync close rename
func writePEM(path string, mode fs.FileMode, typ string, der []byte) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // its mode is 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is nothing of that name
	var text bytes.Buffer
	pem.Encode(&text, &pem.Block{Type: typ, Bytes: der})
	_, err = f.Write(text.Bytes())
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
