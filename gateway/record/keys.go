// SPDX-License-Identifier: Apache-2.0

package record

import (
	"crypto/fips140"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"errors"
	"fmt"
	"hash"
	"runtime"
)

const (
	maxKeyLen    = 32 // AES-256 and ChaCha20
	maxSecretLen = 48 // SHA-384
	masterLen    = 48 // RFC 5246 8.1
	randomLen    = 32 // RFC 5246 7.4.1.2
	ivLen        = 12 // every AEAD here: RFC 5116 5.3, RFC 8439 2.8
	saltLen      = 4  // the implicit part of a TLS 1.2 GCM nonce: RFC 5288 3
)

// Keys protect one direction of a connection: cipher suite, key, IV and, in TLS 1.3, the traffic
// secret that the next keys come from. It holds no pointers, so a copy is the whole of it: whoever
// copies it wipes the copy.
type Keys struct {
	suite  uint16
	key    [maxKeyLen]byte
	iv     [ivLen]byte // TLS 1.2 GCM: the salt, then zeros, so that iv ^ seq is salt || seq
	secret [maxSecretLen]byte
}

// suiteSpec is what the record layer needs to know of a cipher suite.
type suiteSpec struct {
	keyLen  int
	hash    func() hash.Hash
	hashLen int
	chacha  bool
}

// specs has the suites that this package carries. All are AEADs with a 16-byte tag.
var specs = map[uint16]suiteSpec{
	tls.TLS_AES_128_GCM_SHA256:                        {16, sha256.New, 32, false},
	tls.TLS_AES_256_GCM_SHA384:                        {32, sha512.New384, 48, false},
	tls.TLS_CHACHA20_POLY1305_SHA256:                  {32, sha256.New, 32, true},
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256:       {16, sha256.New, 32, false},
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256:         {16, sha256.New, 32, false},
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384:       {32, sha512.New384, 48, false},
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384:         {32, sha512.New384, 48, false},
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256: {32, sha256.New, 32, true},
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256:   {32, sha256.New, 32, true},
}

// errFIPS: that mode allows AES-GCM only with nonces that the cipher itself counts, which only
// crypto/tls may ask for.
var errFIPS = errors.New("record: GODEBUG=fips140=only forbids this engine's ciphers; unset it, or leave the connection to crypto/tls")

// TrafficKeys derives the keys of one direction from its TLS 1.3 application traffic secret
// (RFC 8446 7.3). The secret is as long as the suite's hash: 32 bytes, or 48 with SHA-384.
func TrafficKeys(suite uint16, secret []byte) (k Keys, err error) {
	spec, ok := specs[suite]
	if !ok || !isTLS13(suite) {
		return Keys{}, fmt.Errorf("record: cipher suite %#04x is not one of TLS 1.3's AES-GCM or ChaCha20-Poly1305", suite)
	}
	if fips140.Enforced() {
		return Keys{}, errFIPS
	}
	if len(secret) != spec.hashLen {
		return Keys{}, fmt.Errorf("record: traffic secret has %d bytes, suite %#04x wants %d", len(secret), suite, spec.hashLen)
	}
	k.suite = suite
	forget() // the stack grows now, not when secrets would stay in the old one
	k.setSecret(secret)
	forget()
	return k, nil
}

// KeyBlock derives the keys of both directions from a TLS 1.2 master secret of 48 bytes and the two
// hello randoms of 32 bytes (RFC 5246 6.3; AES-GCM: RFC 5288 3; ChaCha20-Poly1305: RFC 7905 2).
// client is what the client writes with, server what the server writes with.
func KeyBlock(suite uint16, master, clientRandom, serverRandom []byte) (client, server Keys, err error) {
	if _, ok := specs[suite]; !ok || isTLS13(suite) {
		return client, server, fmt.Errorf("record: cipher suite %#04x is not one of TLS 1.2's ECDHE with AES-GCM or ChaCha20-Poly1305", suite)
	}
	if fips140.Enforced() {
		return client, server, errFIPS
	}
	if len(master) != masterLen {
		return client, server, fmt.Errorf("record: master secret has %d bytes, want %d", len(master), masterLen)
	}
	if len(clientRandom) != randomLen || len(serverRandom) != randomLen {
		return client, server, fmt.Errorf("record: client random has %d and server random %d bytes, want %d each", len(clientRandom), len(serverRandom), randomLen)
	}
	forget()
	expandKeys(suite, master, clientRandom, serverRandom, &client, &server)
	forget()
	return client, server, nil
}

// expandKeys is KeyBlock without its checks.
//
//go:noinline
func expandKeys(suite uint16, master, clientRandom, serverRandom []byte, client, server *Keys) {
	spec := specs[suite]
	fixed := saltLen
	if spec.chacha {
		fixed = ivLen
	}
	var buf [2*maxKeyLen + 2*ivLen]byte
	block := buf[:2*spec.keyLen+2*fixed]
	seed := append(append(make([]byte, 0, 2*randomLen), serverRandom...), clientRandom...)
	prf(block, spec.hash, master, "key expansion", seed)

	client.suite, server.suite = suite, suite
	block = block[copy(client.key[:spec.keyLen], block):]
	block = block[copy(server.key[:spec.keyLen], block):]
	block = block[copy(client.iv[:fixed], block):]
	copy(server.iv[:fixed], block)
	clear(buf[:])
}

// Suite is the cipher suite's number, as crypto/tls writes it.
func (k *Keys) Suite() uint16 { return k.suite }

// Key is the AEAD's key, 16 or 32 bytes inside k: for an engine outside this package, such as the
// kernel's.
func (k *Keys) Key() []byte { return k.key[:specs[k.suite].keyLen] }

// IV is the implicit nonce inside k: 12 bytes, or the 4 of the salt for AES-GCM in TLS 1.2.
func (k *Keys) IV() []byte { return k.iv[:ivLen-k.explicitNonce()] }

// Expansion is how many bytes a record's body has beside its content, padding aside: explicit nonce, tag and, in TLS 1.3,
// the content type.
func Expansion(suite uint16) int {
	k := Keys{suite: suite}
	n := k.explicitNonce() + tagLen
	if isTLS13(suite) {
		n++
	}
	return n
}

// Update replaces TLS 1.3 keys by the next generation (RFC 8446 7.2). TLS 1.2 has none: it does
// nothing there.
func (k *Keys) Update() {
	if !isTLS13(k.suite) {
		return
	}
	forget()
	k.next()
	forget()
}

//go:noinline
func (k *Keys) next() {
	spec := specs[k.suite]
	mac := hmac.New(spec.hash, k.secret[:spec.hashLen])
	next := make([]byte, spec.hashLen)
	expandLabel(mac, "traffic upd", next)
	k.setSecret(next)
	clear(next)
}

// forget overwrites the stack under the caller's frame, where hashes and compiled code have left copies of keys. They take
// less than 4 KiB.
//
//go:noinline
func forget() {
	var frames [4096]byte
	clear(frames[:])
	runtime.KeepAlive(&frames)
}

// Wipe overwrites the keys with zeros.
func (k *Keys) Wipe() { *k = Keys{} }

// setSecret starts a generation: the traffic secret, and the key and IV that come from it.
//
//go:noinline
func (k *Keys) setSecret(secret []byte) {
	spec := specs[k.suite]
	copy(k.secret[:], secret)
	mac := hmac.New(spec.hash, secret)
	expandLabel(mac, "key", k.key[:spec.keyLen])
	expandLabel(mac, "iv", k.iv[:])
}

// explicitNonce is how many bytes of nonce each record carries: 8 for AES-GCM in TLS 1.2 (RFC 5288
// 3), otherwise none (RFC 7905 2, RFC 8446 5.3).
func (k *Keys) explicitNonce() int {
	if isTLS13(k.suite) || specs[k.suite].chacha {
		return 0
	}
	return ivLen - saltLen
}

// isTLS13 tells the version by the suite: 0x13xx belong to TLS 1.3 alone (RFC 8446 B.4).
func isTLS13(suite uint16) bool { return suite>>8 == 0x13 }

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 7.1), mac being an HMAC keyed
// with the secret. No key, IV or secret is longer than its suite's hash, so HKDF-Expand (RFC 5869
// 2.3) stops after one block.
func expandLabel(mac hash.Hash, label string, out []byte) {
	info := make([]byte, 0, 32)
	info = append(info, 0, byte(len(out)), byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "...)
	info = append(info, label...)
	info = append(info, 0, 1) // no context; block 1
	mac.Reset()
	mac.Write(info)
	block := mac.Sum(make([]byte, 0, maxSecretLen))
	copy(out, block)
	clear(block)
}

// prf fills out with TLS 1.2's pseudo-random function (RFC 5246 5).
func prf(out []byte, newHash func() hash.Hash, secret []byte, label string, seed []byte) {
	mac := hmac.New(newHash, secret)
	seed = append([]byte(label), seed...)
	mac.Write(seed)
	a := mac.Sum(nil)
	block := make([]byte, 0, maxSecretLen)
	for len(out) > 0 {
		mac.Reset()
		mac.Write(a)
		mac.Write(seed)
		block = mac.Sum(block[:0])
		out = out[copy(out, block):]
		mac.Reset()
		mac.Write(a)
		a = mac.Sum(a[:0])
	}
	clear(block)
	clear(a)
}
