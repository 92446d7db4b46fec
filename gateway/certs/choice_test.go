// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/tls"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// filesServed are the files of what a name is served with, so long after noon.
func filesServed(s *Store, name string, after time.Duration) string {
	var files []string
	for _, c := range s.ForName(name).Served(noon.Add(after)) {
		files = append(files, strings.TrimSuffix(filepath.Base(c.CertFile), ".pem"))
	}
	return strings.Join(files, " ")
}

// TestCertificateIsChosenWhenTheClientComes: nothing is read again, time goes on, and the other certificate is served.
func TestCertificateIsChosenWhenTheClientComes(t *testing.T) {
	dir := t.TempDir()
	ca := authority(t, nil, "Root")
	put(t, dir, "root.crt", ca.certPEM())
	for file, a := range map[string]ask{
		"old":       {names: []string{"a.example"}, from: -time.Hour, to: 8 * time.Second},
		"new":       {names: []string{"a.example"}, from: 4 * time.Second, to: days},
		"short":     {names: []string{"b.example"}, from: -time.Second, to: 5 * time.Second}, // began last, ends first
		"long":      {names: []string{"b.example"}, from: -time.Hour, to: days},
		"ec":        {names: []string{"c.example"}, from: -time.Hour, to: time.Hour},
		"rsa":       {names: []string{"c.example"}, from: -time.Hour, to: days, key: rsaKey(t)},
		"exact":     {names: []string{"x.wild.example"}, from: -time.Hour, to: time.Hour},
		"wild":      {names: []string{"*.wild.example"}, from: -time.Hour, to: 2 * time.Hour},
		"wild-next": {names: []string{"*.wild.example"}, from: 2 * time.Hour, to: 3 * time.Hour},
	} {
		id := issue(t, ca, a)
		put(t, dir, file+".pem", id.certPEM(), id.keyPEM(t))
	}
	s, problems := Load(dir, noon)
	if got := strings.Join(messages(dir, problems), "\n"); strings.Contains(got, "new.pem") || strings.Contains(got, "old.pem") {
		t.Errorf("a certificate that lies ready is no reason to complain:\n%s", got)
	}
	for _, c := range []struct {
		name  string
		after time.Duration
		want  string
	}{
		{"a.example", 0, "old"},
		{"a.example", 3999 * time.Millisecond, "old"},
		{"a.example", 4 * time.Second, "new"},
		{"a.example", 8 * time.Second, "new"},
		{"a.example", 0, "old"}, // the clock was set back
		{"a.example", 2 * days, "new"},
		{"b.example", 0, "short"},
		{"b.example", 5 * time.Second, "long"},
		{"c.example", 0, "ec rsa"},
		{"c.example", time.Hour, "rsa ec"}, // a client without RSA is shown at least an expired one
		{"c.example", 2 * days, "ec rsa"},
		{"x.wild.example", 0, "exact"},
		{"x.wild.example", time.Hour, "wild"},
		{"x.wild.example", 2 * time.Hour, "wild-next"},
		{"x.wild.example", 4 * time.Hour, "exact"},
		{"y.wild.example", 2 * time.Hour, "wild-next"},
	} {
		if got := filesServed(s, c.name, c.after); got != c.want {
			t.Errorf("%s after %v: %q is served, not %q", c.name, c.after, got, c.want)
		}
	}
	when, next := s.ForName("a.example").Next(noon)
	if !when.Equal(noon.Add(4*time.Second)) || len(next) != 1 || filepath.Base(next[0].CertFile) != "new.pem" {
		t.Errorf("next: %v %v", when, next)
	}
	if when, next := s.ForName("a.example").Next(noon.Add(time.Minute)); next != nil || !when.IsZero() {
		t.Errorf("next after the last change: %v %v", when, next)
	}
	all := s.Served(noon.Add(time.Hour))
	if !slices.ContainsFunc(all, func(c *Certificate) bool { return filepath.Base(c.CertFile) == "new.pem" }) ||
		slices.ContainsFunc(all, func(c *Certificate) bool { return filepath.Base(c.CertFile) == "old.pem" }) {
		t.Errorf("served in all: %v", all)
	}
}

// TestOneEntryWithItsOwnWildcard: a certificate for a wildcard and a name under it is one choice.
func TestOneEntryWithItsOwnWildcard(t *testing.T) {
	dir := t.TempDir()
	id := leaf(t, nil, "*.a.example", "www.a.example")
	put(t, dir, "a.pem", id.certPEM(), id.keyPEM(t))
	if e := loadClean(t, dir).Only(); e == nil || !e.fixed() {
		t.Errorf("%+v", e)
	}
}

func TestChoiceByTimeAllocatesNothing(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{"1.pem", "2.pem"} {
		id := leaf(t, nil, "a.example")
		put(t, dir, file, id.certPEM(), id.keyPEM(t))
	}
	s, _ := Load(dir, noon)
	e, chi := s.ForName("a.example"), &tls.ClientHelloInfo{}
	if n := testing.AllocsPerRun(100, func() { _, _ = e.Select(chi) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
