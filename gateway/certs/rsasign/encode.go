// SPDX-License-Identifier: Apache-2.0

package rsasign

import (
	"crypto"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
)

// digestInfos are the DER that stands before a digest (RFC 8017 9.2, note 1).
var digestInfos = map[crypto.Hash]string{
	crypto.SHA1:   "\x30\x21\x30\x09\x06\x05\x2b\x0e\x03\x02\x1a\x05\x00\x04\x14",
	crypto.SHA256: "\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20",
	crypto.SHA384: "\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30",
	crypto.SHA512: "\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40",
}

// encodePKCS1v15 is EMSA-PKCS1-v1_5 (RFC 8017 9.2). It does not know every hash.
func encodePKCS1v15(message *[2 * primeBits / 8]byte, hash crypto.Hash, digest []byte) bool {
	info, known := digestInfos[hash]
	if !known {
		return false
	}
	tail := append([]byte(info), digest...)
	message[1] = 1
	padding := message[2 : len(message)-len(tail)-1]
	for i := range padding {
		padding[i] = 0xff
	}
	copy(message[len(message)-len(tail):], tail)
	return true
}

// encodePSS is EMSA-PSS with MGF1 of the same hash, and a salt as long as the digest (RFC 8017 9.1.1). The modulus has
// 2048 bits, so the message has 2047.
func encodePSS(message *[2 * primeBits / 8]byte, hash crypto.Hash, digest []byte) {
	salt := make([]byte, len(digest))
	_, _ = rand.Read(salt) // never fails
	h := hash.New()
	h.Write(make([]byte, 8))
	h.Write(digest)
	h.Write(salt)
	sum := h.Sum(nil)

	masked := message[:len(message)-len(sum)-1]
	masked[len(masked)-len(salt)-1] = 1
	copy(masked[len(masked)-len(salt):], salt)
	var counter [4]byte
	for i := 0; i*len(sum) < len(masked); i++ {
		binary.BigEndian.PutUint32(counter[:], uint32(i))
		h.Reset()
		h.Write(sum)
		h.Write(counter[:])
		piece := masked[i*len(sum):]
		subtle.XORBytes(piece, piece, h.Sum(nil))
	}
	masked[0] &= 0x7f
	copy(message[len(masked):], sum)
	message[len(message)-1] = 0xbc
}
