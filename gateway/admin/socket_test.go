// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// TestOnlyTheSocketGetsItsMode: what others put in its place, in a directory that they can write to, stays what it is.
func TestOnlyTheSocketGetsItsMode(t *testing.T) {
	dir := testkit.Dir(t)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("key"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, make := range map[string]func(path string) error{
		"link":      func(path string) error { return os.Symlink(secret, path) },
		"hard link": func(path string) error { return os.Link(filepath.Join(dir, "sock"), path) },
		"file":      func(path string) error { return os.Rename(secret, path) },
		"nothing":   func(string) error { return nil },
	} {
		path := filepath.Join(dir, "it")
		if err := make(path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Stat(path)
		if _, err := setSocketMode(int(d.Fd()), "it"); err == nil {
			t.Errorf("%s: it was taken for the socket", name)
		}
		if after, err := os.Stat(path); err == nil && after.Mode() != before.Mode() {
			t.Errorf("%s: its mode is %v now", name, after.Mode())
		}
		if name == "file" {
			_ = os.Rename(path, secret)
		}
		_ = os.Remove(path)
	}
	if err := os.Chmod(filepath.Join(dir, "sock"), 0o600); err != nil { // as with umask 077
		t.Fatal(err)
	}
	st, err := setSocketMode(int(d.Fd()), "sock")
	if info, statErr := os.Stat(filepath.Join(dir, "sock")); err != nil || statErr != nil || info.Mode().Perm() != socketMode || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		t.Errorf("the socket itself: %v, %v", info.Mode(), err)
	}
}
