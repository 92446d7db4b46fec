// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"net/netip"

	"github.com/tlsnat/tlsnat/gateway/config"
)

// Lent memory belongs to the sources of its connections. While less than half of a loop's part is in use, nobody counts how
// much each of them holds: it costs nothing then. From half on memoryHolders does. A source may hold as much as is free
// besides, so that one source alone stops at half. Beyond that its flows read little at a time, and its new connections
// are refused once seven eighths are in use: the last eighth is for sources that hold less. When everything is in use, a
// newcomer from such a source takes the place of a stream that stands still, of the source that holds the most.
type memoryHolders struct {
	sources map[netip.Prefix]*memoryHolder
	counted map[*conn]memoryClaim
	largest *memoryHolder // that holds the most, as far as is known: one that others have fallen below is found late
}

// memoryHolder is a source that holds lent memory.
type memoryHolder struct {
	source netip.Prefix
	bytes  int
	conns  map[*conn]struct{}
}

// memoryClaim is what a connection was counted with.
type memoryClaim struct {
	holder *memoryHolder
	bytes  int
}

// compared is how many sources, or connections of one, are compared to find the largest: so the work is bounded, and with Go's
// random order of maps another sample is seen each time.
const compared = 64

// memoryUsed is how much is lent, and lies in pipes.
func (l *loop) memoryUsed() int { return l.lent.out + l.lent.piped }

// watchHolders begins to count by source when memory becomes scarce, and ends it when an eighth more than half is free again.
func (l *loop) watchHolders() {
	switch used, half := l.memoryUsed(), l.lent.share/2; {
	case l.lent.holders == nil && used >= half && used > 0:
		l.lent.holders = &memoryHolders{sources: map[netip.Prefix]*memoryHolder{}, counted: map[*conn]memoryClaim{}}
		(&survey{loop: l, ctx: context.Background(), see: (*conn).countMemory, done: func() {}}).begin()
	case l.lent.holders != nil && used < half-l.lent.share/8:
		l.lent.holders = nil
	}
}

// keeps is how much lent memory the flow holds.
func (f *flow) keeps() int { return cap(f.lent) + cap(f.carry) + f.inPipe }

// countMemory counts what the connection holds for its source, while memory is scarce.
func (c *conn) countMemory() {
	h := c.loop.lent.holders
	if h == nil {
		return
	}
	n, was := c.up.keeps()+c.down.keeps(), h.counted[c]
	if n == was.bytes {
		return
	}
	x := was.holder
	if x == nil {
		x = h.holder(sourceOf(c))
	}
	x.bytes += n - was.bytes
	if n > 0 {
		h.counted[c] = memoryClaim{x, n}
		x.conns[c] = struct{}{}
	} else {
		delete(h.counted, c)
		delete(x.conns, c)
	}
	h.rank(x)
}

// holder is the one of a source.
func (h *memoryHolders) holder(source netip.Prefix) *memoryHolder {
	x := h.sources[source]
	if x == nil {
		x = &memoryHolder{source: source, conns: map[*conn]struct{}{}}
		h.sources[source] = x
	}
	return x
}

// rank takes note of a change: who holds nothing is forgotten, and who holds more than the largest is that now.
func (h *memoryHolders) rank(x *memoryHolder) {
	if len(x.conns) == 0 {
		delete(h.sources, x.source)
		if h.largest == x {
			h.largest = nil
			h.findLargest()
		}
		return
	}
	if h.largest == nil || x.bytes > h.largest.bytes {
		h.largest = x
	}
}

// findLargest compares the largest with some others.
func (h *memoryHolders) findLargest() {
	n := 0
	for _, x := range h.sources {
		if h.largest == nil || x.bytes > h.largest.bytes {
			h.largest = x
		}
		if n++; n == compared {
			return
		}
	}
}

// holdsTooMuch says whether the source holds as much as is free besides. Where little is free that is soon said, so it has to be
// half of what the largest holds, too.
func (l *loop) holdsTooMuch(source netip.Prefix) bool {
	h := l.lent.holders
	if h == nil {
		return false
	}
	x := h.sources[source]
	return x != nil && x.bytes >= l.lent.share-l.memoryUsed() && x.bytes >= h.largest.bytes/2
}

// memoryFull says whether the connection may keep no more than it must: the loop's part is used up, or the source's is.
func (c *conn) memoryFull() bool {
	return c.loop.memoryFull() || c.loop.lent.holders != nil && c.loop.holdsTooMuch(sourceOf(c))
}

// lacksMemory says whether there is no memory for a newcomer.
func (l *loop) lacksMemory(newcomer *conn) bool {
	used := l.memoryUsed()
	switch source := sourceOf(newcomer); {
	case used < l.lent.share-l.lent.share/8:
		return false
	case l.holdsTooMuch(source):
		return true
	case used < l.lent.share:
		return false
	default:
		return !l.takeMemoryBack(source)
	}
}

// takeMemoryBack ends a stream that stands still, for a newcomer from another source than that which holds the most. It says
// whether there was one.
func (l *loop) takeMemoryBack(newcomers netip.Prefix) bool {
	h := l.lent.holders
	if h == nil {
		return false
	}
	h.findLargest()
	if h.largest == nil || h.largest.source == newcomers {
		return false
	}
	still := h.largest.stillest()
	if still == nil || l.now-still.active < int64(parkAfter) {
		return false // it moves
	}
	still.refused(refusedMemory)
	still.cut(refusedMemory.outcome(), "it stood still, and its source holds the most of the loop's part of "+config.Prefix+"MEMORY")
	return true
}

// stillest is the connection that has moved nothing for longest, of some of the holder's.
func (x *memoryHolder) stillest() (still *conn) {
	n := 0
	for c := range x.conns {
		if still == nil || c.active < still.active {
			still = c
		}
		if n++; n == compared {
			break
		}
	}
	return still
}
