// SPDX-License-Identifier: Apache-2.0

package record

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// updateAfter records a writer's keys are due for renewal. AES-GCM is good for 2^24.5 full records
// (RFC 8446 5.5); stopping at 2^24 leaves the caller seven million records, or 100 GB, in which to
// notice. ChaCha20-Poly1305 has no such limit, and an update every 256 GiB costs nothing.
const updateAfter = 1 << 24

// overAfter records, 2^24.5, the keys of AES-GCM in TLS 1.3 must not be used any more (RFC 8446 5.5).
const overAfter = 23726566

// Writer seals what we send. Embed it by value; it is not safe for concurrent use. The zero Writer
// has no keys: Init it.
type Writer struct {
	half
}

// Init makes w ready to write the record with sequence number seq under k. w keeps its own copy of k.
func (w *Writer) Init(k Keys, seq uint64) { w.half.init(k, seq) }

// Park drops the AEAD, most of what an idle connection costs. The next record sets it up again.
func (w *Writer) Park() { w.park() }

// Wipe overwrites the keys, as Reader.Wipe does. After it, nothing is sealed.
func (w *Writer) Wipe() { w.wipe() }

// Prefix is how many bytes to leave before the payload: 5 for the header, and 8 more for the explicit
// nonce of AES-GCM in TLS 1.2.
func (w *Writer) Prefix() int { return headerLen + int(w.explicit) }

// Suffix is how many bytes to leave behind the payload: 16 for the tag, and in TLS 1.3 one more for
// the content type.
func (w *Writer) Suffix() int {
	if w.tls13 {
		return tagLen + 1
	}
	return tagLen
}

// Seal makes slot[Prefix():Prefix()+n], at most MaxPlaintext bytes, into a record of application data
// in place, and returns the length of the record, which starts at slot[0]. slot must have room for
// Prefix()+n+Suffix() bytes; it panics if it has not, or if n is too large.
//
// It returns 0, and leaves slot alone, when the Writer must not write any more: after an alert that
// ends the connection, after Wipe, or when the sequence numbers are used up.
func (w *Writer) Seal(slot []byte, n int) int { return w.seal(slot, n, TypeData) }

// AppendAlert seals a as a record of its own and appends it to dst. Every alert but user_canceled ends
// our writing, close_notify too (RFC 8446 6.1): the keys are wiped, nothing more is sealed, and a
// second alert leaves dst as it is.
func (w *Writer) AppendAlert(dst []byte, a Alert) []byte {
	dst = w.append(dst, TypeAlert, a.level(), byte(a))
	if a != AlertUserCanceled {
		w.wipe()
	}
	return dst
}

// AppendKeyUpdate seals a KeyUpdate with the current keys, appends it to dst and goes over to the
// next keys (RFC 8446 4.6.3). request asks the peer for its own: true when UpdateDue is, false when
// this answers KeyUpdateRequested; one answer does for all requests since the last. TLS 1.2 has no
// KeyUpdate: dst comes back as it was.
func (w *Writer) AppendKeyUpdate(dst []byte, request bool) []byte {
	if !w.tls13 || w.spent() {
		return dst
	}
	var ask byte
	if request {
		ask = 1
	}
	dst = w.append(dst, TypeHandshake, msgKeyUpdate, 0, 0, 1, ask)
	w.advance()
	return dst
}

// UpdateDue tells that it is time for AppendKeyUpdate. It is never so in TLS 1.2.
func (w *Writer) UpdateDue() bool { return w.tls13 && w.seq >= updateAfter }

// Suite is the cipher suite's number, 0 when nothing is sealed any more.
func (w *Writer) Suite() uint16 { return w.suite() }

// Export copies the keys and the number of the next record, for an engine that goes on sealing from
// here, such as the kernel's. Wipe the copy; when the other engine has taken over, say Follow.
func (w *Writer) Export() (k Keys, seq uint64) { return w.export() }

// Follow tells w that another engine seals from now on. w forgets key and IV, and must not Seal or Append any more; it
// counts what it is told of (Carried), and makes the next keys (Update).
func (w *Writer) Follow() { w.follow() }

// Carried counts so many records that the other engine has sealed.
func (w *Writer) Carried(records int) { w.seq += uint64(records) }

// Update goes over to the next keys, which Export then copies: when a KeyUpdate has been sent by the other engine
// (RFC 8446 4.6.3). It is nothing in TLS 1.2.
func (w *Writer) Update() {
	if w.tls13 && !w.over() {
		w.advance()
	}
}

// UsedUp tells that not one more record may be sealed with the keys (RFC 8446 5.5). A Writer that gets its KeyUpdate
// when UpdateDue says so never comes here.
func (w *Writer) UsedUp() bool { return w.tls13 && !specs[w.keys.suite].chacha && w.seq >= overAfter }

// spent tells that there are no keys, or no sequence numbers left under them.
func (w *Writer) spent() bool { return w.over() || w.seq == lastSeq }

// append seals a short record of any type behind dst.
func (w *Writer) append(dst []byte, typ byte, payload ...byte) []byte {
	at, size := len(dst), w.Prefix()+len(payload)+w.Suffix()
	dst = slices.Grow(dst, size)[:at+size]
	copy(dst[at+w.Prefix():], payload)
	return dst[:at+w.seal(dst[at:], len(payload), typ)]
}

// seal is Seal for any content type (RFC 8446 5.2, RFC 5246 6.2.3.3).
func (w *Writer) seal(slot []byte, n int, typ byte) int {
	if w.spent() {
		return 0
	}
	if n > MaxPlaintext {
		panic(fmt.Sprintf("record: payload of %d bytes, at most %d", n, MaxPlaintext))
	}
	prefix := w.Prefix()
	size := prefix + n + w.Suffix()
	slot = slot[:size:size] // or the AEAD would move the record to memory of its own
	slot[0], slot[1], slot[2] = typ, 3, 3
	binary.BigEndian.PutUint16(slot[3:], uint16(size-headerLen))
	w.ready()
	payload, aad := slot[prefix:prefix+n], slot[:headerLen]
	if w.tls13 {
		slot[0], slot[prefix+n] = TypeData, typ
		payload = slot[prefix : prefix+n+1]
	} else {
		copy(slot[headerLen:prefix], w.nonce[saltLen:])
		aad = w.aad12(slot, n)
	}
	w.aead.Seal(payload[:0], w.nonce[:], payload, aad)
	w.seq++
	return size
}

// ProbeSequence finds out where a writer stands: given the last record of its handshake flight and its
// keys, it tries the sequence numbers 0 to limit-1 and returns the one after that which opens rec. A
// TLS 1.3 server's tickets and a TLS 1.2 Finished are sealed with the application keys, and only
// crypto/tls knows how many there were. !ok means that rec is none of these: it was sealed with other
// keys, or it is not one whole record. Whoever then takes the writer to be at 0 has to know that rec
// was sealed with the handshake's keys: see SealedAs. rec is left as it is.
func ProbeSequence(k Keys, rec []byte, limit int) (next uint64, ok bool) {
	return probe(k, rec, 0, uint64(max(limit, 0)))
}

// SealedAs tells whether rec is the record with that sequence number under k. rec is left as it is.
func SealedAs(k Keys, rec []byte, seq uint64) bool {
	_, ok := probe(k, rec, seq, seq+1)
	return ok
}

// probe tries the sequence numbers from seq to end-1.
func probe(k Keys, rec []byte, seq, end uint64) (next uint64, ok bool) {
	var h half
	h.init(k, seq)
	defer h.wipe()
	if h.over() || len(rec) > MaxRecord || len(rec) < headerLen+int(h.explicit)+tagLen ||
		int(binary.BigEndian.Uint16(rec[3:])) != len(rec)-headerLen {
		return 0, false
	}
	trial := make([]byte, len(rec)) // a failed Open overwrites what it was given
	defer clear(trial)
	for h.seq < end {
		copy(trial, rec)
		_, ok := h.open(trial)
		h.seq++
		if ok {
			return h.seq, true
		}
	}
	return 0, false
}
