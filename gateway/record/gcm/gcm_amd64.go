// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package gcm

import (
	"crypto/cipher"
	"crypto/subtle"
	"errors"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// missing names the first feature that this processor, or the operating system for its registers, lacks.
func missing() (why string) {
	for _, f := range []struct {
		has  bool
		name string
	}{
		{cpu.X86.HasAVX2, "AVX2"},
		{cpu.X86.HasBMI2, "BMI2"},
		{cpu.X86.HasAES, "AES"},
		{cpu.X86.HasAVX512F, "AVX-512"},
		{cpu.X86.HasAVX512DQ, "AVX-512 DQ"},
		{cpu.X86.HasAVX512BW, "AVX-512 BW"},
		{cpu.X86.HasAVX512VL, "AVX-512 VL"},
		{cpu.X86.HasAVX512VAES, "VAES"},
		{cpu.X86.HasAVX512VPCLMULQDQ, "VPCLMULQDQ"},
	} {
		if !f.has {
			return "the processor has no " + f.name
		}
	}
	return ""
}

// aead is laid out for gcm_amd64.s, which explains it. The powers of H are as secret as the keys: who has
// H forges tags.
type aead struct {
	powers [20][16]byte // H^20/x … H/x, their bytes reversed
	keys   [15][16]byte // round keys; AES-128 has 11
	rounds uint32       // 10 or 14; 0 when wiped
}

// crypt seals or opens n bytes from src to dst, which is src or does not overlap it, and writes the tag of
// the ciphertext and the additional data. It reads 12 bytes of nonce and writes 16 of tag.
//
//go:noescape
func crypt(a *aead, dst, src *byte, n int, nonce *byte, data *byte, dataLen int, tag *byte, opening bool)

// setUp expands a key of 16 or 32 bytes, as a.rounds says, and computes the powers of H.
//
//go:noescape
func setUp(a *aead, key *byte)

func newAEAD(key []byte) cipher.AEAD {
	a := &aead{rounds: 10}
	if len(key) == 32 {
		a.rounds = 14
	}
	setUp(a, unsafe.SliceData(key))
	return a
}

func (a *aead) NonceSize() int { return nonceSize }

func (a *aead) Overhead() int { return tagSize }

// Wipe overwrites the keys. Using a after it panics, rather than seal with keys that everybody knows.
func (a *aead) Wipe() { *a = aead{} }

// maxText is where the 32-bit counter would come round: it begins at 2 (SP 800-38D 5.2.1.1).
const maxText = (1<<32 - 2) * 16

// Seal is [cipher.AEAD]'s.
func (a *aead) Seal(dst, nonce, plaintext, data []byte) []byte {
	a.check(nonce)
	n := len(plaintext)
	if uint64(n) > maxText {
		panic("gcm: message too large")
	}
	whole, out := extend(dst, n+tagSize)
	checkOverlap(out, plaintext, data)
	crypt(a, &out[0], unsafe.SliceData(plaintext), n, &nonce[0], unsafe.SliceData(data), len(data), &out[n], false)
	return whole
}

var errOpen = errors.New("gcm: message authentication failed")

// Open is [cipher.AEAD]'s.
func (a *aead) Open(dst, nonce, ciphertext, data []byte) ([]byte, error) {
	a.check(nonce)
	n := len(ciphertext) - tagSize
	if n < 0 || uint64(n) > maxText {
		return nil, errOpen
	}
	whole, out := extend(dst, n)
	checkOverlap(out, ciphertext, data)
	var tag [tagSize]byte
	crypt(a, unsafe.SliceData(out), unsafe.SliceData(ciphertext), n, &nonce[0], unsafe.SliceData(data), len(data), &tag[0], true)
	if subtle.ConstantTimeCompare(tag[:], ciphertext[n:]) != 1 {
		clear(tag[:]) // the right one, for a forger
		clear(out)
		return nil, errOpen
	}
	return whole, nil
}

func (a *aead) check(nonce []byte) {
	if a.rounds == 0 {
		panic("gcm: used after Wipe")
	}
	if len(nonce) != nonceSize {
		panic("gcm: incorrect nonce length")
	}
}

// extend appends n bytes to dst, whose contents do not matter, and returns the whole and these.
func extend(dst []byte, n int) (whole, out []byte) {
	total := len(dst) + n
	if cap(dst) >= total {
		whole = dst[:total]
	} else {
		whole = make([]byte, total)
		copy(whole, dst)
	}
	return whole, whole[len(dst):]
}

// checkOverlap panics unless out and text begin at the same place or have nothing in common, and if out
// would overwrite the additional data.
func checkOverlap(out, text, data []byte) {
	if overlap(out, text) && &out[0] != &text[0] {
		panic("gcm: invalid buffer overlap of output and input")
	}
	if overlap(out, data) {
		panic("gcm: invalid buffer overlap of output and additional data")
	}
}

func overlap(a, b []byte) bool {
	from, of := uintptr(unsafe.Pointer(unsafe.SliceData(a))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return len(a) > 0 && len(b) > 0 && from < of+uintptr(len(b)) && of < from+uintptr(len(a))
}
