// SPDX-License-Identifier: Apache-2.0

//go:build !amd64 || purego

package rsasign

func missing() (why string) { return "no implementation for this platform" }

func multiply(result, a, b *pair, m *moduli) { panic("rsasign: no implementation for this platform") }

func choose(result *pair, table *[entries]pair, first, second uint64) {
	panic("rsasign: no implementation for this platform")
}
