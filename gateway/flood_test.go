// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// TestFloodsOfRecordsHarmNobody: a client that sends ten thousand KeyUpdates or empty records is cut off when its budget
// is spent, one that sends records of a byte without end is carried; and who exchanges messages beside it hardly
// notices either.
func TestFloodsOfRecordsHarmNobody(t *testing.T) {
	testkit.Needs(t, testkit.Timing)
	const many = 10_000
	b := start(t, ":{0} edge.test -> "+echoServer(t), "LOOPS=1", "LOG_LEVEL=info")
	other := b.dialTLS(t, 0, nil)
	quiet := p99(echoTimes(t, other, func() bool { return false }))
	for _, flood := range []struct {
		name    string
		record  func(*penman) []byte
		outcome string // what it ends with; "": it ends when it is over
	}{
		{"KeyUpdates", func(p *penman) []byte { return p.update(true) }, "tls_error"},
		{"empty records", func(p *penman) []byte { return p.data(nil) }, "tls_error"},
		{"records of a byte", func(p *penman) []byte { return p.data([]byte("x")) }, ""},
	} {
		t.Run(flood.name, func(t *testing.T) {
			p := dialPenman(t, b, 0, func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 })
			var all [][]byte
			for range many {
				all = append(all, flood.record(p))
			}
			bytes := slices.Concat(all...)
			began := cpuTime(t)
			var writing sync.WaitGroup
			over := make(chan struct{})
			writing.Go(func() {
				defer close(over)
				_, _ = p.TCPConn.Write(bytes)
				if flood.outcome == "" {
					p.read(t, many)
				} else {
					_, _, _ = p.readAll()
				}
				_ = p.Close()
			})
			times := echoTimes(t, other, func() bool {
				select {
				case <-over:
					return false
				default:
					return true
				}
			})
			writing.Wait()
			if late := p99(times); late > max(10*quiet, 50*time.Millisecond) {
				t.Errorf("p99 of an echo beside it is %v, without it %v", late, quiet)
			}
			l := b.lineOf(t, p)
			if flood.outcome != "" && l.Outcome != flood.outcome || flood.outcome == "" && l.BytesUp != many {
				t.Errorf("line: %s", l)
			}
			t.Logf("p99 of an echo %v, without the flood %v; %v of CPU time for clients, gateway and backend", p99(times), quiet, cpuTime(t)-began)
		})
	}
}
