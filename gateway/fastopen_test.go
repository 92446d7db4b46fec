// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListenersTakeEarlyData where a rule of the port says fastopen=on, and a reload changes that on the socket that is
// there.
func TestListenersTakeEarlyData(t *testing.T) {
	mapFile := filepath.Join(t.TempDir(), "edge.natmap")
	write := func(rules string) {
		if err := os.WriteFile(mapFile, []byte(rules), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ports := make([]int, 3)
	for i := range ports {
		ports[i] = unused(t)
	}
	rules := func(first, second string) string {
		return fmt.Sprintf("127.0.0.1:%d a.test -> 127.0.0.1:1 mode=pass\n127.0.0.1:%[1]d b.test -> 127.0.0.1:1 mode=pass %s\n127.0.0.1:%d -> 127.0.0.1:1 mode=tcp %s\n127.0.0.1:%d -> 127.0.0.1:1 mode=tcp\n",
			ports[0], first, ports[1], second, ports[2])
	}
	write(rules("fastopen=on", ""))
	g := configured(t, "MAP_FILE="+mapFile, "LOOPS=2")
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Drain(t.Context()) })
	want := func(limits ...int) {
		t.Helper()
		seen := make(chan [2]int, len(ports)*len(g.loops))
		g.onLoops(func(l *loop) {
			for _, ln := range l.listeners {
				v, err := unix.GetsockoptInt(int(ln.fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN)
				if err != nil {
					v = -1
				}
				seen <- [2]int{int(ln.port), v}
			}
		})
		close(seen)
		for s := range seen {
			for i, port := range ports {
				if s[0] == port && s[1] != limits[i] {
					t.Errorf("the listener on the port with index %d takes %d, want %d", i, s[1], limits[i])
				}
			}
		}
	}
	want(earlyLimit, 0, 0)
	write(rules("", "fastopen=on"))
	if r := g.Reload(); !r.OK {
		t.Fatal(r.Problems)
	}
	want(0, earlyLimit, 0)
}

// unused is a port on which nobody listens, below those that the kernel gives to outgoing connections.
func unused(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 10000 + rand.IntN(20000)
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}
