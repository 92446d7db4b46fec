// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package gcm

import (
	"testing"

	"github.com/tlsnat/tlsnat/gateway/testkit/registers"
)

// TestNoKeyIsLeftInARegister: neither round keys, powers of H nor text, whichever way the code was taken. General and mask
// registers hold addresses and lengths only.
func TestNoKeyIsLeftInARegister(t *testing.T) {
	skipUnaccelerated(t)
	left := new(registers.State)
	for _, keySize := range keySizes {
		r := random(11)
		key, text := randomBytes(r, keySize), randomBytes(r, 4112)
		nonce, data, tag := randomBytes(r, nonceSize), randomBytes(r, 13), new([tagSize]byte)
		a := &aead{rounds: uint32(keySize/4 + 6)}

		registers.Fill()
		setUp(a, &key[0])
		registers.Read(left)
		if err := left.Vectors(); err != nil {
			t.Errorf("setUp with %d bytes: %v", keySize, err)
		}
		for _, n := range []int{0, 1, 63, 64, 255, 256, 257, 511, 512, 4112} {
			for _, opening := range []bool{false, true} {
				registers.Fill()
				crypt(a, &text[0], &text[0], n, &nonce[0], &data[0], len(data), &tag[0], opening)
				registers.Read(left)
				if err := left.Vectors(); err != nil {
					t.Errorf("crypt of %d bytes with a key of %d, opening %v: %v", n, keySize, opening, err)
				}
			}
		}
	}
}
