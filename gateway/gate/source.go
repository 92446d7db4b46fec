// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/tlsnat/tlsnat/natmap"
)

// keys make a number of a source: of an IPv4 address, and of the first 64 bits of an IPv6 address, since a customer has
// all addresses of a /64 (RFC 6177, section 2). The seeds are secret, so that nobody can choose sources that meet in a
// table.
type keys [2]uint64

func newKeys() keys { return natmap.NewKeys() }

// Key returns the number under which the tables know a source. Limits with different scopes count apart.
func (k *keys) Key(scope uint64, a netip.Addr) uint64 {
	family, source := uint64(6), uint64(0)
	if a = a.Unmap(); a.Is4() {
		b := a.As4()
		family, source = 4, uint64(binary.BigEndian.Uint32(b[:]))
	} else {
		b := a.As16()
		source = binary.BigEndian.Uint64(b[:8])
	}
	return mix(mix(source^k[0], k[1])^scope, k[1]^family<<32)
}

// mix is one step of wyhash: a product of 64 by 64 bits, folded.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// Prefix64 is the source of an address as people write it: an IPv4 address alone, or the /64 of an IPv6 address.
func Prefix64(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	p, _ := a.Prefix(min(64, a.BitLen()))
	return p
}

// A Usage says how full a table is.
type Usage struct {
	Entries, Limit int // sources
	Bytes          int
}

const (
	// A source is looked for among this many, which lie in two lines of the cache.
	connWays = 16
	rateWays = 8

	countBits = 20
	// MaxConns bounds a limit of connections for one source: what countBits can count.
	MaxConns = 1<<countBits - 1

	// rateSlots bounds the sources whose rate is remembered: 4 MiB.
	rateSlots = 1 << 18
)

// Conns counts the connections that sources have open. A source is in it as long as it has one, so that it has no more
// entries than there are connections, and room for twice as many; it never grows.
//
// A count is exact as long as the few sources that share a place in the table find room there. When sixteen sources
// that have connections open meet on one place, which with the table half full is one in 250, the next one takes over
// the smallest count: it is given too many then, never too few.
//
// Loops count without waiting for each other, by compare and swap of one word that is source and count at once. Two
// first connections of one source, made on two loops in the same microsecond, can be counted in two entries; each of
// them can then reach the limit.
type Conns struct {
	keys
	slots []atomic.Uint64 // 44 bits of the key, 20 bits of count
}

// NewConns makes a table for so many connections at once.
func NewConns(most int) *Conns {
	size := 1 << bits.Len(uint(2*max(most, connWays)-1))
	return &Conns{newKeys(), make([]atomic.Uint64, size)}
}

// Enter counts one more connection of a source, unless it has limit of them already. The slot is to be given to Leave
// when the connection ends.
func (t *Conns) Enter(key uint64, limit int) (slot uint32, ok bool) {
	for {
		i, old := t.find(key)
		count := old & MaxConns
		if count >= uint64(limit) {
			return 0, false
		}
		if t.slots[i].CompareAndSwap(old, key&^MaxConns|(count+1)) {
			return uint32(i), true
		}
	}
}

// find returns the slot of a source and what is in it, or one that it can have: the first free one, or the one with
// the smallest count.
func (t *Conns) find(key uint64) (at int, word uint64) {
	first := int(key*connWays) & (len(t.slots) - 1)
	at, word = first, t.slots[first].Load()
	for i := first; i < first+connWays; i++ {
		w := t.slots[i].Load()
		if count := w & MaxConns; count > 0 && (w^key)&^MaxConns == 0 {
			return i, w
		} else if count < word&MaxConns {
			at, word = i, w
		}
	}
	return at, word
}

// Leave takes back what Enter has counted.
func (t *Conns) Leave(slot uint32) { t.slots[slot].Add(^uint64(0)) }

// Usage counts the sources that have connections open.
func (t *Conns) Usage() Usage {
	u := Usage{Limit: len(t.slots), Bytes: 8 * len(t.slots)}
	for i := range t.slots {
		if t.slots[i].Load()&MaxConns > 0 {
			u.Entries++
		}
	}
	return u
}

// A Rate is how often something may happen: N times at once, and from then on N times in Per.
type Rate struct {
	N   int
	Per time.Duration
}

// Rates limits how often sources connect. It remembers of each the time when it will have paid for what it had (the
// generic cell rate algorithm, ITU-T I.371): a source whose time is past is as good as forgotten, and its place is
// free.
//
// The table never grows. A newcomer that finds no free place among its eight takes the place of the source that has
// paid soonest, and its debt with it. So a source can't get rid of its debt by crowding itself out: when it comes back
// it takes over a debt that is no smaller than the one it left. The price is that a newcomer may have to wait while
// more sources than the table has room for use up their rates.
//
// Loops take without waiting for each other, by compare and swap. Two loops that make an entry for one source in the
// same microsecond can make two of it, and let through one connection more for each loop beyond the first.
type Rates struct {
	keys
	slots []rateSlot
}

type rateSlot struct {
	key  atomic.Uint64
	paid atomic.Int64
}

// NewRates makes a table.
func NewRates() *Rates { return &Rates{newKeys(), make([]rateSlot, rateSlots)} }

// Take says whether a source may connect at now (nanoseconds of any clock that does not go back), and counts it if it
// may. One that may not is not counted: it gets its rate, however often it tries.
func (t *Rates) Take(key uint64, now int64, r Rate) bool {
	s := t.find(key)
	for {
		paid := s.paid.Load()
		next := max(paid, now) + int64(r.Per)/int64(r.N)
		if next > now+int64(r.Per) {
			return false
		}
		if s.paid.CompareAndSwap(paid, next) {
			return true
		}
	}
}

// find returns the slot of a source, one that was somebody else's if need be.
func (t *Rates) find(key uint64) *rateSlot {
	first := int(key*rateWays) & (len(t.slots) - 1)
	ways := t.slots[first : first+rateWays]
	for {
		soonest := &ways[0]
		was := soonest.key.Load()
		for i := range ways {
			s := &ways[i]
			k := s.key.Load()
			if k == key {
				return s
			}
			if s.paid.Load() < soonest.paid.Load() {
				soonest, was = s, k
			}
		}
		if soonest.key.CompareAndSwap(was, key) {
			return soonest
		}
	}
}

// Usage counts the sources that still pay at now.
func (t *Rates) Usage(now int64) Usage {
	u := Usage{Limit: len(t.slots), Bytes: 16 * len(t.slots)}
	for i := range t.slots {
		if t.slots[i].paid.Load() > now {
			u.Entries++
		}
	}
	return u
}
