// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// TestHeldLockDoesNotKeepItFromStarting: whoever may read the socket's directory can hold its lock for ever.
func TestHeldLockDoesNotKeepItFromStarting(t *testing.T) {
	dir := testkit.Dir(t)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	l, err := listenUnix(filepath.Join(dir, "admin.sock"))
	if err == nil {
		_ = l.Close()
		t.Fatal("it has the lock that somebody else holds")
	}
	if !strings.Contains(err.Error(), "another process holds it") {
		t.Error(err)
	}
}
