// SPDX-License-Identifier: Apache-2.0

package record

import (
	"crypto/tls"
	"fmt"
	"testing"
)

// benchmark names its suites as short as a table wants them.
var benchSuites = []struct {
	name  string
	suite uint16
}{
	{"aes128-1.3", tls.TLS_AES_128_GCM_SHA256},
	{"aes256-1.3", tls.TLS_AES_256_GCM_SHA384},
	{"chacha-1.3", tls.TLS_CHACHA20_POLY1305_SHA256},
	{"aes128-1.2", tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
}

func eachSize(b *testing.B, f func(b *testing.B, suite uint16, n int)) {
	for _, s := range benchSuites {
		for _, n := range []int{256, 1400, MaxPlaintext} {
			b.Run(fmt.Sprintf("%s/%d", s.name, n), func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				f(b, s.suite, n)
			})
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	eachSize(b, func(b *testing.B, suite uint16, n int) {
		var w Writer
		w.Init(testKeys(b, suite), 0)
		slot := make([]byte, w.Prefix()+n+w.Suffix())
		for b.Loop() {
			w.Seal(slot, n)
		}
	})
}

// BenchmarkSealBare is the AEAD alone, on the same bytes.
func BenchmarkSealBare(b *testing.B) {
	eachSize(b, func(b *testing.B, suite uint16, n int) {
		var h half
		h.init(testKeys(b, suite), 0)
		h.ready()
		slot := make([]byte, headerLen+n+tagLen)
		for b.Loop() {
			h.aead.Seal(slot[headerLen:headerLen], h.nonce[:], slot[headerLen:headerLen+n], slot[:headerLen])
		}
	})
}

// opening in place destroys the record: both of these copy it back each time.
func BenchmarkOpen(b *testing.B) {
	eachSize(b, func(b *testing.B, suite uint16, n int) {
		var r Reader
		_, h := pair(b, suite, Server)
		sealed := forgeContent(h, TypeData, make([]byte, n), 0)
		r.Init(testKeys(b, suite), 0, Server)
		rec := make([]byte, len(sealed))
		for b.Loop() {
			r.seq = 0
			copy(rec, sealed)
			if _, _, err := r.Next(rec); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkOpenBare(b *testing.B) {
	eachSize(b, func(b *testing.B, suite uint16, n int) {
		_, h := pair(b, suite, Server)
		h.ready()
		sealed := h.aead.Seal(nil, h.nonce[:], make([]byte, n), nil)
		rec := make([]byte, len(sealed))
		for b.Loop() {
			copy(rec, sealed)
			if _, err := h.aead.Open(rec[:0], h.nonce[:], rec, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkUnpark is what the first record after Park costs more.
func BenchmarkUnpark(b *testing.B) {
	for _, s := range benchSuites {
		b.Run(s.name, func(b *testing.B) {
			b.ReportAllocs()
			var w Writer
			w.Init(testKeys(b, s.suite), 0)
			for b.Loop() {
				w.Park()
				w.ready()
			}
		})
	}
}

func BenchmarkTrafficKeys(b *testing.B) {
	b.ReportAllocs()
	secret := make([]byte, 32)
	for b.Loop() {
		if _, err := TrafficKeys(tls.TLS_AES_128_GCM_SHA256, secret); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkKeyBlock(b *testing.B) {
	b.ReportAllocs()
	master, random := make([]byte, masterLen), make([]byte, randomLen)
	for b.Loop() {
		if _, _, err := KeyBlock(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, master, random, random); err != nil {
			b.Fatal(err)
		}
	}
}
