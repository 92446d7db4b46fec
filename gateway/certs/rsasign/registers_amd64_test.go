// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package rsasign

import (
	"encoding/binary"
	"runtime"
	"runtime/debug"
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

//go:noinline
func deepen() byte {
	var frame [64 << 10]byte
	for i := range frame {
		frame[i] = byte(i)
	}
	return frame[len(frame)/3]
}

//go:noinline
func plant(k *Key) {
	q := k.q
	runtime.KeepAlive(&q)
}

// TestNoSecretIsLeftOnTheStack: neither a prime, an exponent, nor what the message is modulo a prime, whole or in part.
func TestNoSecretIsLeftOnTheStack(t *testing.T) {
	accelerated(t)
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would give back what deepen makes
	k := accelerate(newKey(t, 2048))
	message := [256]byte{9: 7, 100: 3, 255: 1}
	w := new(work)
	k.reduce(w, &message)
	k.fillTable(w)
	k.raise(w)
	secret := map[uint64]string{}
	for i, name := range []string{"p", "q"} {
		for d := range digits {
			secret[k.primes.m[i][d]] = "a digit of " + name
			secret[w.power[i][d]] = "a digit of the result modulo " + name
		}
		for _, limb := range k.exponents[i] {
			secret[limb] = "a part of the exponent modulo " + name
		}
		for _, limb := range w.power[i].limbs() {
			secret[limb] = "a part of the result modulo " + name
		}
	}
	for _, limb := range k.q {
		secret[limb] = "a part of q"
	}
	delete(secret, 0)
	found := func(stack []byte) (what string, n int) {
		for i := 0; i+8 <= len(stack); i += 8 {
			if name := secret[binary.NativeEndian.Uint64(stack[i:])]; name != "" {
				what, n = name, n+1
			}
		}
		return what, n
	}
	left := make([]byte, 8<<10)
	deepen()
	plant(k)
	registers.Below(left)
	if _, n := found(left); n < len(k.q) {
		t.Errorf("of what was planted %d words are found", n)
	}
	deepen() // overwrites what was planted
	k.power(&message)
	registers.Below(left)
	if what, n := found(left); n > 0 {
		t.Errorf("%d words are left, such as %s", n, what)
	}
}
