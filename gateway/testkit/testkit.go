// SPDX-License-Identifier: Apache-2.0

// Package testkit is for tests only: it says which of them run on this machine, and hands out ports that no other test
// run takes.
//
// `go test ./...` runs what any machine can run in two minutes. What needs more names its tier:
//
//	testkit.Needs(t, testkit.Peers)
//
// and runs when TLSNAT_TEST has it, as in TLSNAT_TEST=peers,root, or TLSNAT_TEST=all. With TLSNAT_CI=1 every tier runs,
// and a test that lacks something fails instead of being skipped.
package testkit

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Tier is what a test needs beyond a machine with Go.
type Tier string

// The tiers. The list is closed: a word in TLSNAT_TEST that is not in it fails every test that asks.
const (
	Peers  Tier = "peers"  // programs of other projects: curl, openssl, nginx, …
	Root   Tier = "root"   // rights: network namespaces, other users
	Slow   Tier = "slow"   // more than a few seconds
	Timing Tier = "timing" // a quiet machine: times, memory or CPU are measured
)

var tiers = []Tier{Peers, Root, Slow, Timing}

// Needs skips the test unless the tier is switched on.
func Needs(t testing.TB, tier Tier) {
	t.Helper()
	on, err := switchedOn(os.Getenv("TLSNAT_TEST"), tier)
	if err != nil {
		t.Fatal(err)
	}
	if !on && !mustRun() {
		t.Skipf("runs with TLSNAT_TEST=%s, or TLSNAT_TEST=all", tier)
	}
}

// On says whether the tier is switched on, for preparations that only its tests need.
func On(tier Tier) bool {
	on, _ := switchedOn(os.Getenv("TLSNAT_TEST"), tier)
	return on || mustRun()
}

// switchedOn says whether a list like "peers,root" has the tier.
func switchedOn(list string, tier Tier) (bool, error) {
	on := false
	for word := range strings.SplitSeq(list, ",") {
		switch word = strings.TrimSpace(word); {
		case word == "":
		case word == "all", word == string(tier):
			on = true
		case !slices.Contains(tiers, Tier(word)):
			return false, fmt.Errorf("TLSNAT_TEST: there is no tier %q; write all, or some of %v", word, tiers)
		}
	}
	return on, nil
}

func mustRun() bool { return os.Getenv("TLSNAT_CI") != "" }

// Missing skips a test that lacks something. Where everything has to be there (TLSNAT_CI), the test fails.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if mustRun() {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// Program is the path of another project's program, which is in the Debian package pack.
func Program(t testing.TB, name, pack string) string {
	t.Helper()
	Needs(t, Peers)
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/usr/local/sbin") {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	Missing(t, "%s is not installed (Debian package %s)", name, pack)
	return ""
}

// Dir is a new directory with a short path, for Unix sockets: their addresses have room for 107 bytes, and t.TempDir,
// which has the test's name in it, may take more. It goes when the test ends.
func Dir(t testing.TB) string {
	t.Helper()
	parent := os.TempDir()
	if len(parent) > longestParent {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

const longestParent = 70 // leaves room for "/t", the ten digits of os.MkdirTemp, and names of files

// Ports that tests listen on are chosen before the program under test opens them. Two test runs at once must not choose
// the same ones, so each process claims a block of them: it holds the UDP port of the block's first number, which nobody
// else needs. The blocks lie below the ports that the kernel gives to outgoing connections (32768 and more).
const (
	firstBlock = 10000
	blockSize  = 2750 // a run of package gateway takes some 1,500
	blocks     = 8
)

var (
	portsMu sync.Mutex
	claim   net.PacketConn // held until the process ends
	block   int            // its first port
	last    int            // the port that was handed out last
)

// claimPatience is how long a run waits for others to end when all blocks are taken.
const claimPatience = 2 * time.Minute

// Claim takes a block of ports for this process. It is called by Ports; a program that counts its open descriptors
// calls it first.
func Claim() error {
	portsMu.Lock()
	defer portsMu.Unlock()
	return claimLocked()
}

func claimLocked() error {
	if claim != nil {
		return nil
	}
	for end := time.Now().Add(claimPatience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for i := range blocks {
			first := firstBlock + (os.Getpid()+i)%blocks*blockSize
			if c, err := net.ListenPacket("udp4", fmt.Sprintf("127.0.0.1:%d", first)); err == nil {
				claim, block, last = c, first, first
				return nil
			}
		}
	}
	return fmt.Errorf("all %d blocks of test ports are taken: are so many tests running?", blocks)
}

// FixedPort waits until no other test run uses the port, and keeps it for this test: of a program that is started without
// settings the port is what its manual says. It says whether anybody listens there who is no test.
func FixedPort(t testing.TB, port int) (taken bool) {
	t.Helper()
	for end := time.Now().Add(claimPatience); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.ListenPacket("udp4", fmt.Sprintf("127.0.0.1:%d", port)) // the claim; nobody needs that
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
			return !free(port)
		}
		if time.Now().After(end) {
			t.Fatalf("other tests keep port %d: %v", port, err)
		}
	}
}

// Ports are n ports in a row, n < 2,750, on which nobody listens. None is handed out a second time before the others of
// the block were.
func Ports(t testing.TB, n int) []int {
	t.Helper()
	portsMu.Lock()
	defer portsMu.Unlock()
	if err := claimLocked(); err != nil {
		t.Fatal(err)
	}
	var ports []int
	for range 2 * blockSize {
		if last++; last >= block+blockSize {
			last, ports = block+1, nil
		}
		if !free(last) {
			ports = nil
			continue
		}
		if ports = append(ports, last); len(ports) == n {
			return ports
		}
	}
	t.Fatalf("no %d free ports in a row", n)
	return nil
}

// Port is one of Ports.
func Port(t testing.TB) int {
	t.Helper()
	return Ports(t, 1)[0]
}

func free(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return false
	}
	_ = l.Close()
	return true
}
