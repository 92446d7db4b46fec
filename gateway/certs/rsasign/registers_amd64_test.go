// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package rsasign

import (
	"testing"

	"golang.org/x/sys/cpu"

	"github.com/tlsnat/tlsnat/gateway/testkit/registers"
)

// TestNoDigitIsLeftInARegister: what multiply and choose have read is the primes and what is made of them. The operands
// have a bit in each digit, so that no register is zero by chance.
func TestNoDigitIsLeftInARegister(t *testing.T) {
	accelerated(t)
	if !cpu.X86.HasAVX512BW {
		t.Skip("the processor has no AVX-512 BW, to see the registers with")
	}
	k := accelerate(newKey(t, 2048))
	w := new(work)
	for i := range w.table {
		w.table[i] = k.toR
	}
	left := new(registers.State)

	registers.Fill()
	multiply(&w.x, &k.toR, &k.highToR, &k.primes)
	registers.Read(left)
	if err := left.All(); err != nil {
		t.Error("multiply: ", err)
	}

	registers.Fill()
	choose(&w.x, &w.table, 3, 5)
	registers.Read(left)
	if err := left.All(); err != nil {
		t.Error("choose: ", err)
	}
	if w.x != k.toR {
		t.Error("choose copied something else")
	}
}
