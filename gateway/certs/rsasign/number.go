// SPDX-License-Identifier: Apache-2.0

package rsasign

import (
	"encoding/binary"
	"math/big"
	"math/bits"
)

func numberOf(x *big.Int) (n number) {
	rest, digit, mask := new(big.Int).Set(x), new(big.Int), big.NewInt(digitMask)
	for d := range digits {
		n[d] = digit.And(rest, mask).Uint64()
		rest.Rsh(rest, digitBits)
	}
	return n
}

func limbsOf(x *big.Int) (l limbs) {
	var b [primeBits / 8]byte
	x.FillBytes(b[:])
	for i := range l {
		l[i] = binary.BigEndian.Uint64(b[len(b)-8*(i+1):])
	}
	clear(b[:])
	return l
}

// reduceOnce subtracts m, if n is not less.
func (n *number) reduceOnce(m *number) {
	var less number
	var borrow int64
	for d := range digits {
		difference := int64(n[d]) - int64(m[d]) + borrow
		less[d], borrow = uint64(difference)&digitMask, difference>>digitBits
	}
	keep := uint64(borrow) // all ones if n is less
	for d := range digits {
		n[d] = n[d]&keep | less[d]&^keep
	}
	clear(less[:])
}

// limbs are the same number, which is below 2^1024.
func (n *number) limbs() (l limbs) {
	for d := range digits {
		at := d * digitBits
		l[at/64] |= n[d] << (at % 64)
		if at%64 > 64-digitBits && at/64+1 < len(l) {
			l[at/64+1] |= n[d] >> (64 - at%64)
		}
	}
	return l
}

// multiplied is a*b + c, big-endian.
func multiplied(a, b, c *limbs) *[2 * primeBits / 8]byte {
	var product [2 * len(limbs{})]uint64
	copy(product[:], c[:])
	for i, x := range a {
		var carry uint64
		for j, y := range b {
			high, low := bits.Mul64(x, y)
			var c1, c2 uint64
			low, c1 = bits.Add64(low, product[i+j], 0)
			low, c2 = bits.Add64(low, carry, 0)
			product[i+j], carry = low, high+c1+c2
		}
		for at := i + len(b); at < len(product); at++ {
			product[at], carry = bits.Add64(product[at], carry, 0)
		}
	}
	out := new([2 * primeBits / 8]byte)
	for i, limb := range product {
		binary.BigEndian.PutUint64(out[len(out)-8*(i+1):], limb)
	}
	return out
}
