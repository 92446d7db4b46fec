// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"net"
	"testing"
)

// TestConnectionsSpreadOverLoops: the kernel deals 2,000 connections to two loops within 20 % of each other.
func TestConnectionsSpreadOverLoops(t *testing.T) {
	const n = 2000
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp", "LOOPS=2", "LOG_LEVEL=info")
	for range n {
		c, err := net.DialTimeout("tcp", b.addr(0), patience)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	b.stop(t)
	loops := b.gateway.Status().PerLoop
	few, many := min(loops[0].Accepted, loops[1].Accepted), max(loops[0].Accepted, loops[1].Accepted)
	if few+many != n || float64(many) > 1.2*float64(few) {
		t.Errorf("%d connections came to one loop and %d to the other", few, many)
	}
}
