// SPDX-License-Identifier: Apache-2.0

package record

import (
	"crypto/cipher"
	"encoding/binary"
	"math"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/tlsnat/tlsnat/gateway/record/gcm"
)

// half is what reading and writing have in common: the keys, the sequence number, and the AEAD while
// it is set up. nonce and aad live here because arguments of an interface call escape: as locals they
// would be two allocations a record.
type half struct {
	aead     cipher.AEAD // nil when parked: AES-GCM's takes 576 bytes, or 1,280 (see gcm)
	seq      uint64      // of the next record
	keys     Keys
	nonce    [ivLen]byte // the first 4 bytes stay those of the IV, the rest is made for each record
	aad      [aadLen]byte
	explicit uint8 // bytes of nonce in each record
	tls13    bool
}

// aadLen is TLS 1.2's: sequence number, type, version, length of the plaintext (RFC 5246 6.2.3.3).
const aadLen = 13

// lastSeq is never used: a sequence number must not wrap (RFC 8446 5.3, RFC 5246 6.1).
const lastSeq = math.MaxUint64

func (h *half) init(k Keys, seq uint64) {
	*h = half{
		keys:     k,
		seq:      seq,
		explicit: uint8(k.explicitNonce()),
		tls13:    isTLS13(k.suite),
	}
	copy(h.nonce[:], k.iv[:saltLen])
}

// advance goes to the next generation of TLS 1.3 keys, whose records count from 0 (RFC 8446 5.3).
func (h *half) advance() {
	h.keys.Update()
	h.park()
	h.seq = 0
	copy(h.nonce[:], h.keys.iv[:saltLen])
}

// park drops the AEAD, and leaves none of its keys to the garbage if it can be wiped: package gcm's own
// can, the standard library's and ChaCha20-Poly1305 can't.
func (h *half) park() {
	if a, ok := h.aead.(interface{ Wipe() }); ok {
		a.Wipe()
	}
	h.aead = nil
}

// suite is the cipher suite's number, 0 when it is over.
func (h *half) suite() uint16 { return h.keys.suite }

// export copies what another engine needs to go on from here.
func (h *half) export() (Keys, uint64) { return h.keys, h.seq }

// follow gives up opening and sealing: key and IV are wiped, what is left counts records and makes the next keys.
func (h *half) follow() {
	h.park()
	clear(h.keys.key[:])
	clear(h.keys.iv[:])
	clear(h.nonce[:])
}

// wipe ends this half: without keys it is over.
func (h *half) wipe() {
	h.park()
	*h = half{}
}

func (h *half) over() bool { return h.keys.suite == 0 }

// ready sets the AEAD up if it is parked and the nonce for the next record: IV xor sequence number
// (RFC 8446 5.3, RFC 7905 2). A TLS 1.2 GCM IV ends in zeros, so there it is salt || sequence number
// (RFC 5288 3).
func (h *half) ready() {
	if h.aead == nil {
		h.aead = newAEAD(&h.keys)
	}
	mask := binary.BigEndian.Uint64(h.keys.iv[saltLen:])
	binary.BigEndian.PutUint64(h.nonce[saltLen:], mask^h.seq)
}

// aad12 is the additional data of a TLS 1.2 record whose plaintext has n bytes.
func (h *half) aad12(header []byte, n int) []byte {
	binary.BigEndian.PutUint64(h.aad[:], h.seq)
	copy(h.aad[8:], header[:3])
	binary.BigEndian.PutUint16(h.aad[11:], uint16(n))
	return h.aad[:]
}

// open authenticates and decrypts one whole record in place, without counting it. Its header has been
// checked: there are explicit + 16 bytes or more behind it.
func (h *half) open(rec []byte) (p []byte, ok bool) {
	h.ready()
	header, body := rec[:headerLen], rec[headerLen:]
	aad := header
	if !h.tls13 {
		if h.explicit > 0 { // the sender chooses it; it need not be the sequence number
			copy(h.nonce[saltLen:], body)
			body = body[h.explicit:]
		}
		aad = h.aad12(header, len(body)-tagLen)
	}
	p, err := h.aead.Open(body[:0], h.nonce[:], body, aad)
	return p, err == nil
}

// newAEAD never fails: k.suite is in specs, and with it the key's length is right.
func newAEAD(k *Keys) cipher.AEAD {
	aead, err := tryAEAD(k)
	if err != nil {
		panic("record: " + err.Error())
	}
	return aead
}

func tryAEAD(k *Keys) (cipher.AEAD, error) {
	if specs[k.suite].chacha {
		return chacha20poly1305.New(k.key[:])
	}
	return gcm.New(k.Key())
}
