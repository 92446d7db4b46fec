// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/x509"
	"slices"
	"testing"
	"time"
)

// TestAuthorityIsReadWhole: every CA of the file counts, and all that is wrong with it is told at once.
func TestAuthorityIsReadWhole(t *testing.T) {
	dir := t.TempDir()
	ca := func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	}
	root, other := issue(t, nil, ask{cn: "root", change: ca}), issue(t, nil, ask{cn: "other", change: ca})
	self := issue(t, nil, ask{cn: "self", names: []string{"self.example"}})
	server := issue(t, root, ask{cn: "server", names: []string{"a.example"}})
	put(t, dir, "two.pem", root.certPEM(), other.certPEM())
	put(t, dir, "self.pem", self.certPEM())
	put(t, dir, "server.pem", server.certPEM(), root.certPEM())
	put(t, dir, "keyed.pem", root.certPEM(), root.keyPEM(t))
	put(t, dir, "empty.pem", "")
	put(t, dir, "key.pem", root.keyPEM(t))
	for _, c := range []struct {
		name  string
		certs int // 0: there is no authority
		later time.Duration
		want  []string
	}{
		{"two", 2, 0, nil},
		{"self", 1, 0, nil},
		{"two", 2, 100 * 365 * 24 * time.Hour, []string{"warning", "warning"}},
		{"two", 2, -100 * 365 * 24 * time.Hour, []string{"warning", "warning"}},
		{"server", 1, 0, []string{"error"}},
		{"keyed", 1, 0, []string{"warning"}},
		{"empty", 0, 0, []string{"error"}},
		{"key", 0, 0, []string{"error", "warning"}},
		{"absent", 0, 0, []string{"error"}},
	} {
		a, problems := LoadAuthority(dir, c.name, noon.Add(c.later))
		n := 0
		if a != nil {
			n = len(a.Certs)
		}
		var got []string
		for _, p := range problems {
			if p.Hint == "" {
				t.Errorf("%s: %v, and what to do about it?", c.name, p)
			}
			got = append(got, map[bool]string{true: "warning", false: "error"}[p.Warning])
		}
		if n != c.certs || !slices.Equal(got, c.want) {
			t.Errorf("%s: %d certificates, %v", c.name, n, problems)
		}
	}
}
