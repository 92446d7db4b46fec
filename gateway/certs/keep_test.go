// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestUnchangedFilesAreNotParsedAgain: not when they are what they were, nor when only their content is.
func TestUnchangedFilesAreNotParsedAgain(t *testing.T) {
	dir := t.TempDir()
	names := many(t, dir, 40)
	past := time.Now().Add(-time.Hour)
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for i, f := range files {
		if i%2 == 0 {
			continue // of these the times are too young to be believed
		}
		if err := os.Chtimes(f, past, past); err != nil {
			t.Fatal(err)
		}
	}
	one := loadClean(t, dir)
	two, problems := Reload(dir, noon, one)
	if len(problems) > 0 {
		t.Fatal(messages(dir, problems))
	}
	for _, name := range names {
		a, b := one.ForName(name).all[0], two.ForName(name).all[0]
		if a.pair.Leaf != b.pair.Leaf || a.pair.PrivateKey != b.pair.PrivateKey {
			t.Errorf("%s was parsed again", name)
		}
	}
	if len(two.links) != len(one.links) || len(two.links) == 0 {
		t.Errorf("%d signatures are known, before %d", len(two.links), len(one.links))
	}
	renewed := leaf(t, nil, names[0])
	put(t, dir, "0.pem", renewed.certPEM(), renewed.keyPEM(t))
	if err := os.Chmod(filepath.Join(dir, "1.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	three, problems := Reload(dir, noon, two)
	if !three.ForName(names[0]).all[0].pair.Leaf.Equal(renewed.Certificate) {
		t.Error("a renewed certificate is not read")
	}
	if said := strings.Join(messages(dir, problems), "\n"); !strings.Contains(said, "1.pem: the private key can be read by others") {
		t.Errorf("a changed mode is not noticed: %s", said)
	}
}

func BenchmarkReload(b *testing.B) {
	dir := b.TempDir()
	many(b, dir, 2000)
	s := loadClean(b, dir)
	b.ReportAllocs()
	for b.Loop() {
		s, _ = Reload(dir, noon, s)
	}
}
