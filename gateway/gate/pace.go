// SPDX-License-Identifier: Apache-2.0

package gate

import "time"

// A Pace limits a stream, in bytes a second. What a stream needs to remember is one number, the time up to which the
// bytes it has carried are paid for (nanoseconds).
type Pace int64

const (
	// A stream that was quiet may catch up on this much: a burst must not show. It is 3 % of what flows in three seconds.
	window = int64(100 * time.Millisecond)
	// One that was waiting all the time may catch up on more: a machine that is busy and wakes it late must not slow it
	// down.
	lateness = int64(time.Second)
	// It is not woken for less than it may carry in this time, sixty times a second,
	quantum = int64(16 * time.Millisecond)
	// nor for less than a segment (Ethernet's MSS).
	segment = 1460
)

// Room returns how many bytes may move at now. While something may move it is a segment at least: what that is too
// much is paid for by waiting longer. waited says whether the stream has had more to move ever since its room was used
// up last.
func (p Pace) Room(paid *int64, now int64, waited bool) int {
	if waited {
		*paid = max(*paid, now-lateness)
	} else {
		*paid = max(*paid, now-window)
	}
	if *paid >= now {
		return 0
	}
	return max(segment, int(float64(now-*paid)*float64(p)/float64(time.Second)))
}

// Spend counts n bytes that have moved.
func (p Pace) Spend(paid *int64, n int) {
	*paid += int64(float64(n) * float64(time.Second) / float64(p))
}

// Due returns when it is worth while to go on.
func (p Pace) Due(paid int64) int64 { return paid + quantum }
