// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// TestGenerationIsListedThatBeganDuringTheSwap: a connection that a loop accepts after a reload has made its generation the
// current one, and before the loop serves that, runs under the generation before, which is listed until it has ended.
func TestGenerationIsListedThatBeganDuringTheSwap(t *testing.T) {
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	go func() {
		for c, err := backend.Accept(); err == nil; c, err = backend.Accept() {
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	addr := fmt.Sprintf("127.0.0.1:%d", testkit.Port(t))
	file := filepath.Join(t.TempDir(), "edge.natmap")
	write := func(options string) {
		if err := os.WriteFile(file, fmt.Appendf(nil, "%s -> %s mode=tcp %s", addr, backend.Addr(), options), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	g := configured(t, "MAP_FILE="+file, "LOOPS=1")
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { g.Drain(t.Context()) }()
	held, release := make(chan struct{}), make(chan struct{})
	g.loops[0].post(func() { close(held); <-release })
	<-held
	c, err := net.Dial("tcp", addr) // it waits to be accepted
	if err != nil {
		t.Fatal(err)
	}
	write("idle=1h")
	reloaded := make(chan Reloaded)
	go func() { reloaded <- g.Reload() }()
	for g.current.Load().number == 1 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond) // until the reload waits for the loop; if it does not yet, the test shows less and is right
	close(release)
	if r := <-reloaded; !r.OK {
		t.Fatal(r.Problems)
	}
	echo := func() {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	echo()
	all := listed(t, g)
	open := int64(0)
	for _, i := range all {
		open += i.Open
	}
	if open != 1 {
		t.Errorf("a connection is open, and what is listed has %d: %+v", open, all)
	}
	_ = c.Close()
	for deadline := time.Now().Add(time.Minute); len(listed(t, g)) != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("its last connection has ended, and it is listed yet: %+v", listed(t, g))
		}
	}
}

// listed are the generations that are in use.
func listed(t *testing.T, g *Gateway) []GenerationInfo {
	t.Helper()
	all, _ := g.Generations(t.Context())
	return all
}
