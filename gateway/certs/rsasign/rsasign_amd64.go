// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package rsasign

import "golang.org/x/sys/cpu"

// missing names the first feature that this processor, or the operating system for its registers, lacks.
func missing() (why string) {
	for _, f := range []struct {
		has  bool
		name string
	}{
		{cpu.X86.HasAVX512F, "AVX-512"},
		{cpu.X86.HasAVX512DQ, "AVX-512 DQ"},
		{cpu.X86.HasAVX512IFMA, "AVX-512 IFMA"},
	} {
		if !f.has {
			return "the processor has no " + f.name
		}
	}
	return ""
}

// multiply sets result, which may be a or b, to a*b/R modulo each of the moduli. It is less than twice the modulus, if a
// and b are less than 64 times that, or a less than R and b less than the modulus.
//
//go:noescape
func multiply(result, a, b *pair, m *moduli)

// choose copies from the table: the first half from one entry, the second half from another.
//
//go:noescape
func choose(result *pair, table *[entries]pair, first, second uint64)
