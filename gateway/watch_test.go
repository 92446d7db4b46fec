// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestWatchKnowsWhatOthersHaveRead: after a reload that somebody has asked for there is nothing to do, whether or not it
// has succeeded; what changes behind it is read once it has come to rest, and once.
func TestWatchKnowsWhatOthersHaveRead(t *testing.T) {
	file, port := filepath.Join(t.TempDir(), "edge.natmap"), unused(t)
	write := func(what string) {
		t.Helper()
		if err := os.WriteFile(file, fmt.Appendf(nil, "127.0.0.1:%d -> 127.0.0.1:1 mode=tcp %s\n", port, what), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	g := configured(t, "MAP_FILE="+file, "LOOPS=1")
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Drain(t.Context()) })
	g.settings.Watch = "on" // only now: here it is the test that looks
	g.noteFiles()
	before := uint64(0)
	look := func() (changed bool) {
		changed, before = g.changed(before)
		return changed
	}
	quiet := func(after string) {
		t.Helper()
		for range 3 {
			if look() {
				t.Errorf("after %s there is nothing to read", after)
			}
		}
	}
	quiet("the start")
	for i, rule := range []string{"idle=1m", "idle=no time"} {
		write(rule)
		if r := g.Reload(); r.OK != (i == 0) {
			t.Errorf("reload with %q: %+v", rule, r)
		}
		quiet("somebody's reload with " + rule)
	}
	write("idle=2m ")
	if look() {
		t.Error("a change is read before it has come to rest")
	}
	if !look() {
		t.Error("a change is not read")
	}
	if r := g.Reload(); !r.OK {
		t.Errorf("%+v", r)
	}
	quiet("its own reload")
}
