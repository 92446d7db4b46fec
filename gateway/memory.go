// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// Memory is given back when so little was allocated for so long: no handshakes, and by then idle connections are
	// parked (see parkAfter).
	quietBytes = 256 << 10
	quietTicks = 4
	trimTick   = time.Second
	// and when as much was allocated since the last time: twice the heap below which Go collects nothing at all.
	worthTrimming = 8 << 20
)

// trim gives back what a crowd has left behind. The garbage collector keeps as much as is in use once more, so that it
// has time until the next collection; in a gateway that has gone quiet that is most of its memory, for nothing:
// of 4,000 idle connections two thirds (bench, Idle).
func trim(ctx context.Context) {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var last, trimmed uint64
	quiet := 0
	for tick := time.NewTicker(trimTick); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
		}
		metrics.Read(sample)
		now := sample[0].Value.Uint64()
		quiet++
		if now-last > quietBytes {
			quiet = 0
		}
		last = now
		if quiet >= quietTicks && now-trimmed > worthTrimming {
			debug.FreeOSMemory()
			trimmed = now
		}
	}
}
