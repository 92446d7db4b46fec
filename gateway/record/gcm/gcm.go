// SPDX-License-Identifier: Apache-2.0

// Package gcm is AES-GCM (NIST SP 800-38D) for the records of TLS: keys of 128 or 256 bits, nonces of
// 12 bytes, tags of 16.
//
//	aead, err := gcm.New(key)
//	sealed := aead.Seal(record[:0], nonce, record, header) // in place, if record has room for 16 bytes more
//	record, err = aead.Open(sealed[:0], nonce, sealed, header)
//
// On processors that work on four AES blocks an instruction (VAES and VPCLMULQDQ with AVX-512: Intel's
// servers from 2021, AMD's from 2022) an implementation of its own, in assembly, is two to three times as
// fast as the standard library's. Everywhere else, with the build tag purego, in FIPS 140-3 mode, and if
// the implementation and the standard library should ever disagree at the start, New is exactly
// [crypto/aes] and [crypto/cipher]; [Accelerated] tells which.
//
// Results, errors, panics and rules for overlapping buffers are those of [cipher.NewGCM]: they may
// overlap exactly or not at all, and what failed to open is cleared. Time depends on lengths only.
//
// It has no other length of nonce or tag, no AES-192, and no state: that no nonce serves twice under a
// key, and that a key is changed in time (RFC 8446 5.5), is up to the caller. There is no point of
// preemption inside a message (some 80 µs a MiB): it is for records, not for files.
package gcm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
)

const (
	nonceSize = 12
	tagSize   = 16
)

// New returns AES-GCM under a key of 16 or 32 bytes; others are an [aes.KeySizeError]. It is safe for
// concurrent use. Accelerated, it has a method Wipe that overwrites the keys, after which using it
// panics; the standard library's has none.
func New(key []byte) (cipher.AEAD, error) {
	if len(key) != 16 && len(key) != 32 {
		return nil, aes.KeySizeError(len(key))
	}
	if unused == "" {
		return newAEAD(key), nil
	}
	return newStandard(key)
}

func newStandard(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// Accelerated tells whether New returns the implementation of this package, and if it doesn't, why not.
func Accelerated() (ok bool, why string) { return unused == "", unused }

// unused is why the standard library serves instead; it is empty if it doesn't.
var unused = "not tested yet"

// Not where unused is declared: the self-test reaches other variables of the package through an interface,
// which the order of their initialisation doesn't see.
func init() { unused = choose() }

func choose() (why string) {
	if why := missing(); why != "" {
		return why
	}
	if fips140.Enabled() {
		return "FIPS 140-3 mode"
	}
	if !agrees(newAEAD) {
		return "self-test failed: its results differ from the standard library's"
	}
	return ""
}

// agrees tells whether what is sealed is what the standard library seals, byte for byte, and opens again,
// in place, and does not open once it is forged. Silent corruption is the worst that a gateway can do, so
// it is looked for where it would be done: on this processor, in this process. The lengths take every way
// through the code: no text, part of a block, of a register, of a chunk, one chunk and several, with an
// end and without, and counters beyond a byte. It takes some 20 µs.
func agrees(fresh func(key []byte) cipher.AEAD) bool {
	text := make([]byte, 4112+13)
	for i := range text {
		text[i] = byte(i*i>>4 ^ i*7)
	}
	for _, keySize := range []int{16, 32} {
		key, nonce := text[100:100+keySize], text[200:200+nonceSize]
		standard, err := newStandard(key)
		if err != nil {
			return false
		}
		for i, n := range []int{0, 1, 16, 63, 240, 241, 256, 511, 1401, 4112} {
			data := text[n : n+[]int{5, 13, 0}[i%3]]
			if !agreesOn(fresh(key), standard, message{nonce, text[:n], data}) {
				return false
			}
		}
	}
	return true
}

type message struct{ nonce, text, data []byte }

func agreesOn(ours, standard cipher.AEAD, m message) bool {
	want := standard.Seal(nil, m.nonce, m.text, m.data)
	got := append(make([]byte, 0, len(want)), m.text...)
	got = ours.Seal(got[:0], m.nonce, got, m.data)
	if !bytes.Equal(got, want) {
		return false
	}
	opened, err := ours.Open(got[:0], m.nonce, got, m.data)
	if err != nil || !bytes.Equal(opened, m.text) {
		return false
	}
	want[len(want)/2] ^= 1
	_, err = ours.Open(want[:0], m.nonce, want, m.data)
	return err != nil
}
