// SPDX-License-Identifier: Apache-2.0

// Package rsasign signs with RSA-2048 as TLS does (RSASSA-PSS and RSASSA-PKCS1-v1_5, RFC 8017), three to four times as fast as
// the standard library where the processor has AVX512-IFMA (Intel's servers from 2019, AMD's from 2022).
//
//	certificate.PrivateKey = rsasign.Signer(key)
//
// Every signature is verified by the standard library before it is given away; one that were wrong would be replaced by
// the standard library's own, and tell nobody a prime (D. Boneh, R. DeMillo, R. Lipton, "On the Importance of Checking
// Cryptographic Protocols for Faults"). Time and addresses depend on no secret.
package rsasign

import (
	"crypto"
	"crypto/fips140"
	"crypto/rsa"
	"io"
	"math/big"
	"runtime"
	"sync"
)

// Accelerated tells whether this package signs, and if it doesn't, why not: the processor, the platform, the build tag
// purego, or FIPS 140-3 mode.
func Accelerated() (ok bool, why string) { return unused == "", unused }

var unused = reason()

func reason() string {
	if fips140.Enabled() {
		return "FIPS 140-3 mode"
	}
	return missing()
}

// Signer returns a [*Key], or the key itself: on other processors, and where the key is not of 2048 bits with two primes of
// 1024.
func Signer(key *rsa.PrivateKey) crypto.Signer {
	if unused != "" || !suits(key) {
		return key
	}
	return accelerate(key)
}

func suits(key *rsa.PrivateKey) bool {
	return len(key.Primes) == 2 && key.N.BitLen() == 2*primeBits && key.Primes[0].BitLen() == primeBits &&
		key.Primes[1].BitLen() == primeBits && key.Precomputed.Dp != nil && key.Precomputed.Qinv != nil
}

// Key is a key with what this package computes with. Whatever it doesn't do, the standard library does. It is safe for
// concurrent use.
type Key struct {
	*rsa.PrivateKey
	primes    moduli
	toR       pair // R² modulo the primes: takes a number to its Montgomery form
	highToR   pair // R³: takes there what stands R times higher
	one       pair
	exponents [2]limbs // D modulo the primes less one
	inverse   pair     // 1/q modulo p, times R, in the first half
	q         limbs
}

const (
	primeBits = 1024
	digitBits = 52
	digits    = 20 // R = 2^1040
	digitMask = 1<<digitBits - 1
	// Exponents are taken five bits at a time: the table then is 12 KiB, which stays in the first cache.
	windowBits = 5
	entries    = 1 << windowBits
	pairSize   = 2 * 24 * 8
)

type (
	// number is one in digits of 52 bits, the lowest first, behind which four are zero: three registers of eight.
	number [24]uint64
	// pair is a number modulo each of the primes.
	pair [2]number
	// limbs are a number below 2^1024, the lowest first.
	limbs [primeBits / 64]uint64
)

// moduli are laid out for rsasign_amd64.s.
type moduli struct {
	m  pair
	k0 [2]uint64 // -1/m modulo 2^52
}

func accelerate(key *rsa.PrivateKey) *Key {
	k := &Key{PrivateKey: key, one: pair{{1}, {1}}}
	r := new(big.Int).Lsh(big.NewInt(1), digits*digitBits)
	digit := new(big.Int).Lsh(big.NewInt(1), digitBits)
	for i, p := range key.Primes {
		modulo := func(x *big.Int) number { return numberOf(x.Mod(x, p)) }
		k.primes.m[i] = numberOf(p)
		k.primes.k0[i] = digit.Uint64() - new(big.Int).ModInverse(p, digit).Uint64()
		k.toR[i] = modulo(new(big.Int).Mul(r, r))
		k.highToR[i] = modulo(new(big.Int).Exp(r, big.NewInt(3), p))
		k.exponents[i] = limbsOf([]*big.Int{key.Precomputed.Dp, key.Precomputed.Dq}[i])
	}
	p, q := key.Primes[0], key.Primes[1]
	inverse := new(big.Int).Mul(key.Precomputed.Qinv, r)
	k.inverse[0] = numberOf(inverse.Mod(inverse, p))
	k.q = limbsOf(q)
	return k
}

// Sign is [crypto.Signer]'s: for PSS with a salt as long as the digest, as TLS has it (RFC 8446 4.2.3), and for PKCS #1
// v1.5 of a digest. Any other wish is passed on to the standard library.
func (k *Key) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if s := k.sign(digest, opts); s != nil {
		return s, nil
	}
	return k.PrivateKey.Sign(random, digest, opts)
}

// sign returns nil for what it does not do, and for what it did wrong.
func (k *Key) sign(digest []byte, opts crypto.SignerOpts) []byte {
	hash := opts.HashFunc()
	if hash == 0 || !hash.Available() || len(digest) != hash.Size() {
		return nil
	}
	var message [2 * primeBits / 8]byte
	pss, isPSS := opts.(*rsa.PSSOptions)
	switch {
	case !isPSS:
		if !encodePKCS1v15(&message, hash, digest) {
			return nil
		}
		s := k.power(&message)
		if rsa.VerifyPKCS1v15(&k.PublicKey, hash, digest, s[:]) != nil {
			return nil
		}
		return s[:]
	case pss.SaltLength != rsa.PSSSaltLengthEqualsHash && pss.SaltLength != len(digest):
		return nil
	}
	encodePSS(&message, hash, digest)
	s := k.power(&message)
	if rsa.VerifyPSS(&k.PublicKey, hash, digest, s[:], pss) != nil {
		return nil
	}
	return s[:]
}

// work is what a signature needs. All of it is secret.
type work struct {
	x, y, power, factor pair
	table               [entries]pair
}

var works = sync.Pool{New: newWork}

func newWork() any { return new(work) }

// power is the message, big-endian, to the power of the private exponent: RSASP1 with the two primes (RFC 8017 5.2.1).
func (k *Key) power(message *[2 * primeBits / 8]byte) *[2 * primeBits / 8]byte {
	forget() // the stack grows now, not when secrets would stay in the old one
	defer forget()
	w := works.Get().(*work)
	defer func() {
		*w = work{}
		works.Put(w)
	}()
	k.reduce(w, message)
	k.fillTable(w)
	k.raise(w)
	return k.combine(w)
}

// forget overwrites the stack under the caller's frame, where compiled code has left copies that no variable names. What
// power calls takes less than 2 KiB.
//
//go:noinline
func forget() {
	var frames [2048]byte
	clear(frames[:])
	runtime.KeepAlive(&frames)
}

// reduce sets w.x to the message modulo each prime, in Montgomery form. As two numbers below R it is high*R + low.
func (k *Key) reduce(w *work, message *[2 * primeBits / 8]byte) {
	var all [2*digits + 1]uint64
	for bit := range len(message) {
		b := uint64(message[len(message)-1-bit])
		at := bit * 8
		all[at/digitBits] |= b << (at % digitBits) & digitMask
		all[at/digitBits+1] |= b << (at % digitBits) >> digitBits
	}
	for i := range w.x {
		copy(w.x[i][:digits], all[:digits])
		copy(w.y[i][:digits], all[digits:])
	}
	multiply(&w.x, &w.x, &k.toR, &k.primes)
	multiply(&w.y, &w.y, &k.highToR, &k.primes)
	for i := range w.x {
		var carry uint64
		for d := range digits {
			sum := w.x[i][d] + w.y[i][d] + carry
			w.x[i][d], carry = sum&digitMask, sum>>digitBits
		}
	}
}

// fillTable sets the table to the powers 0 to 31 of w.x.
func (k *Key) fillTable(w *work) {
	multiply(&w.table[0], &k.one, &k.toR, &k.primes)
	for i := 1; i < entries; i++ {
		multiply(&w.table[i], &w.table[i-1], &w.x, &k.primes)
	}
}

// raise sets w.power to w.x to the power of the exponents, at most the prime.
func (k *Key) raise(w *work) {
	const top = primeBits / windowBits * windowBits // 1020: the first window has four bits
	choose(&w.power, &w.table, k.exponents[0].window(top), k.exponents[1].window(top))
	for at := top - windowBits; at >= 0; at -= windowBits {
		for range windowBits {
			multiply(&w.power, &w.power, &w.power, &k.primes)
		}
		choose(&w.factor, &w.table, k.exponents[0].window(at), k.exponents[1].window(at))
		multiply(&w.power, &w.power, &w.factor, &k.primes)
	}
	multiply(&w.power, &w.power, &k.one, &k.primes)
}

// window is five bits, from the bit at on.
func (l *limbs) window(at int) uint64 {
	bits := l[at/64] >> (at % 64)
	if rest := 64 - at%64; rest < windowBits && at/64+1 < len(l) { // where the window is, not what's in it
		bits |= l[at/64+1] << rest
	}
	return bits % entries
}

// combine is Garner's formula: with s1 and s2 modulo p and q, s = s2 + q*((s1 - s2)/q mod p).
func (k *Key) combine(w *work) *[2 * primeBits / 8]byte {
	p, s1, s2 := &k.primes.m[0], &w.power[0], &w.power[1]
	var carry int64
	w.x = pair{}
	for d := range digits { // and 2p, which is more than q
		sum := int64(s1[d]+2*p[d]) - int64(s2[d]) + carry
		w.x[0][d], carry = uint64(sum)&digitMask, sum>>digitBits
	}
	multiply(&w.x, &w.x, &k.inverse, &k.primes)
	h := &w.x[0]
	h.reduceOnce(p)
	factor, sum := h.limbs(), s2.limbs()
	product := multiplied(&factor, &k.q, &sum)
	clear(factor[:])
	clear(sum[:])
	return product
}
