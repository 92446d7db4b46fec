// SPDX-License-Identifier: Apache-2.0

package testkit

import (
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

func TestSwitchNamesTiers(t *testing.T) {
	for _, c := range []struct {
		list string
		tier Tier
		on   bool
		bad  bool
	}{
		{"", Peers, false, false},
		{"peers", Peers, true, false},
		{"peers", Root, false, false},
		{"peers, root", Root, true, false},
		{"all", Timing, true, false},
		{"peer", Peers, false, true},
	} {
		on, err := switchedOn(c.list, c.tier)
		if on != c.on || (err != nil) != c.bad {
			t.Errorf("TLSNAT_TEST=%q: %s is on: %v, error: %v", c.list, c.tier, on, err)
		}
	}
}

func TestPortsAreFreeAndInARow(t *testing.T) {
	ports := Ports(t, 20)
	for i, p := range ports {
		if p != ports[0]+i {
			t.Fatalf("not in a row: %v", ports)
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p)))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	for _, p := range Ports(t, 20) {
		if p <= ports[len(ports)-1] && p >= ports[0] {
			t.Errorf("port %d was handed out twice", p)
		}
	}
}

// TestTwoRunsTakeDifferentPorts: a second process claims another block than this one.
func TestTwoRunsTakeDifferentPorts(t *testing.T) {
	if os.Getenv("TESTKIT_SECOND_RUN") != "" {
		if err := Claim(); err != nil {
			t.Fatal(err)
		}
		t.Logf("block %d", block)
		return
	}
	if err := Claim(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestTwoRunsTakeDifferentPorts$", "-test.v")
	cmd.Env = append(os.Environ(), "TESTKIT_SECOND_RUN=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if text := string(out); !strings.Contains(text, "block ") || strings.Contains(text, "block "+strconv.Itoa(block)) {
		t.Errorf("this run has block %d, the other one said:\n%s", block, out)
	}
}
