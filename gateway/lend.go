// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"math/bits"
)

// lender lends memory to connections whose destination is full, and takes it back. Sizes are powers of two, so that
// a stuck connection costs at most twice what it holds.
type lender struct {
	free  [21 + 1][][]byte // by the logarithm of the size; up to 2 MiB: what was in a pipe, and an alert behind it
	kept  int              // bytes in free
	out   int              // bytes that are lent
	piped int              // bytes that lie in pipes, for a destination that is full
	share int              // of TLSNAT_MEMORY: the loop's part (budget.go)

	holders *memoryHolders // by source, while memory is scarce; nil: it is not
}

const (
	smallestLoan = 9       // 512 B
	keepAtMost   = 8 << 20 // what is given back beyond this goes to the garbage collector
)

// lend returns an empty slice with room for n bytes. Give it back with giveBack.
func (l *loop) lend(n int) []byte {
	class := max(bits.Len(uint(n-1)), smallestLoan)
	d := &l.lent
	d.out += 1 << class
	if free := d.free[class]; len(free) > 0 {
		b := free[len(free)-1]
		d.free[class] = free[:len(free)-1]
		d.kept -= cap(b)
		return b
	}
	return make([]byte, 0, 1<<class)
}

// giveBack takes what lend returned; nil is fine.
func (l *loop) giveBack(b []byte) {
	d := &l.lent
	d.out -= cap(b)
	if cap(b) == 0 || d.kept+cap(b) > keepAtMost {
		return
	}
	class := bits.Len(uint(cap(b))) - 1
	d.free[class] = append(d.free[class], b[:0])
	d.kept += cap(b)
}
