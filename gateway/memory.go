// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"math"
	"os"
	"runtime"
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
	// Go collects garbage when the heap has doubled, but not below 4 MiB: a handshake leaves 47 KiB behind, so that a gateway
	// with few connections would collect after every eighty. With this much counted in it is every seven hundred, which
	// saves 6 % of a handshake.
	headroomBytes = 16 << 20
)

// headroom is memory that counts as in use and is never touched: it takes address space only. There is none where
// somebody has told the collector what to do, by GOGC or GOMEMLIMIT.
func headroom() []byte {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return nil
	}
	return make([]byte, headroomBytes)
}

// trim gives back what a crowd has left behind. The garbage collector keeps as much as is in use once more, so that it
// has time until the next collection; in a gateway that has gone quiet that is most of its memory, for nothing:
// of 4,000 idle connections two thirds (bench, Idle).
func trim(ctx context.Context) {
	room := headroom()
	defer runtime.KeepAlive(room)
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
