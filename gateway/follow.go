// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// Handshake types that are looked at during a handshake (RFC 8446, section 4).
const (
	messageClientHello = 1
	messageServerHello = 2

	recordHeader  = 5
	messageHeader = 4

	// finishedLen is a TLS 1.2 Finished: header and verify_data (RFC 5246, section 7.4.9).
	finishedLen = messageHeader + 12
)

// follower follows one direction of a handshake: its records, and its handshake messages while these are in the clear.
// Both may be cut anywhere, and their bytes may come in any pieces. The record engine goes on with what is counted here.
//
// In TLS 1.3 a ChangeCipherSpec means nothing (RFC 8446, appendix D.4), so that after one the counts of TLS 1.2 are of no
// use; and in TLS 1.2 no record has the type of application data before the handshake is over.
type follower struct {
	record followedRecord

	message     [messageHeader]byte // header of the message in progress
	messageGot  int                 // its bytes that have come, header included
	random      [32]byte            // of the last ClientHello or ServerHello: after a HelloRetryRequest the second one
	randomKnown bool

	changed  bool   // a ChangeCipherSpec has come
	behind   uint64 // records after it
	pieces   int    // handshake records among them
	sealed   int    // bytes in the bodies of those
	secret   uint64 // records of the type of application data
	alert    int16  // the last fatal alert in the clear; 0: none
	last     []byte // the last protected record, or its first keep bytes
	lastSize int    // how long that record is
	keep     int
}

// followedRecord is the record in progress.
type followedRecord struct {
	header [recordHeader]byte
	got    int // bytes of the header that have come
	size   int // of the body
	body   int // bytes of it that have come
	plain  bool
	alert  [2]byte
}

// begin makes f ready for another handshake. It keeps protected records of up to keep bytes.
func (f *follower) begin(keep int) {
	clear(f.last)
	*f = follower{last: f.last[:0], keep: keep}
}

// follow takes the next bytes.
func (f *follower) follow(b []byte) {
	for len(b) > 0 {
		if f.record.got < recordHeader {
			n := copy(f.record.header[f.record.got:], b)
			f.record.got += n
			b = b[n:]
			if f.record.got == recordHeader {
				f.opened()
			}
			continue
		}
		n := min(len(b), f.record.size-f.record.body)
		f.bytes(b[:n])
		b = b[n:]
	}
}

// opened is told that a record's header has come.
func (f *follower) opened() {
	r := &f.record
	r.size = int(r.header[3])<<8 | int(r.header[4])
	r.plain = r.header[0] != record.TypeData && !f.changed
	if !r.plain {
		f.last, f.lastSize = append(f.last[:0], r.header[:]...), recordHeader+r.size
	}
	if r.size == 0 {
		f.closed()
	}
}

// bytes takes some of a record's body.
func (f *follower) bytes(b []byte) {
	r := &f.record
	switch {
	case !r.plain:
		f.last = append(f.last, b[:min(len(b), max(0, f.keep-len(f.last)))]...)
	case r.header[0] == record.TypeHandshake:
		f.messages(b)
	case r.header[0] == record.TypeAlert && r.body < len(r.alert):
		copy(r.alert[r.body:], b)
	}
	if r.body += len(b); r.body == r.size {
		f.closed()
	}
}

// closed is told that a record is whole.
func (f *follower) closed() {
	r := &f.record
	typ := r.header[0]
	switch {
	case typ == record.TypeData:
		f.secret++
	case typ == record.TypeAlert && r.plain && r.size == len(r.alert) && r.alert[0] == alertLevelFatal:
		f.alert = int16(r.alert[1])
	}
	switch {
	case f.changed:
		f.behind++
		if typ == record.TypeHandshake {
			f.pieces++
			f.sealed += r.size
		}
	case typ == record.TypeChangeCipherSpec:
		f.changed = true
	}
	f.record = followedRecord{}
}

// alertLevelFatal: an alert of the level below ends nothing (RFC 5246, section 7.2).
const alertLevelFatal = 2

// messages takes bytes of handshake messages.
func (f *follower) messages(b []byte) {
	for len(b) > 0 {
		if f.messageGot < messageHeader {
			n := copy(f.message[f.messageGot:], b)
			f.messageGot += n
			b = b[n:]
		} else {
			n := min(len(b), f.messageSize()-f.messageGot)
			f.hear(b[:n])
			f.messageGot += n
			b = b[n:]
		}
		if f.messageGot >= messageHeader && f.messageGot == f.messageSize() {
			f.messageGot = 0
		}
	}
}

// messageSize is how long the message in progress is, header included.
func (f *follower) messageSize() int {
	return messageHeader + int(f.message[1])<<16 + int(f.message[2])<<8 + int(f.message[3])
}

// hear takes the random out of a hello. It follows the version.
func (f *follower) hear(b []byte) {
	if f.message[0] != messageClientHello && f.message[0] != messageServerHello {
		return
	}
	const begin, end = messageHeader + 2, messageHeader + 2 + 32
	if f.messageGot < end && f.messageGot+len(b) > begin {
		from := max(begin-f.messageGot, 0)
		copy(f.random[f.messageGot+from-begin:], b[from:])
		f.randomKnown = f.messageGot+len(b) >= end
	}
}

// Why a hand-over is refused. The words are for the log.
var (
	errCutRecord  = errors.New("the handshake ended inside a record")
	errUnsealed   = errors.New("no record after the ChangeCipherSpec")
	errBeyond     = errors.New("its Finished is not alone in its records")
	errWrongCount = errors.New("the last record of the handshake is not the one that was counted")
)

// next12 is the number of the record after a TLS 1.2 handshake under k. Each record after the ChangeCipherSpec counts:
// Finished may be cut into several, and warnings may come before it. The last record has to open with the last number.
func (f *follower) next12(k *record.Keys) (uint64, error) {
	switch {
	case f.record.got > 0:
		return 0, errCutRecord
	case f.behind == 0:
		return 0, errUnsealed
	case f.sealed != finishedLen+f.pieces*record.Expansion(k.Suite()):
		return 0, errBeyond
	case !record.SealedAs(*k, f.last, f.behind-1):
		return 0, errWrongCount
	}
	return f.behind, nil
}

// next13 is the number of the next record under the application keys k of TLS 1.3: how many session tickets were written
// under them. The last record tells by the number that it opens with. It opens with none if nothing was written under
// these keys; then it has to be the last one of the handshake's keys. A number that was only assumed could be used twice.
func (f *follower) next13(k *record.Keys, handshake []byte) (uint64, error) {
	if f.record.got > 0 {
		return 0, errCutRecord
	}
	if next, ok := record.ProbeSequence(*k, f.last, int(f.secret)); ok {
		return next, nil
	}
	before, err := record.TrafficKeys(k.Suite(), handshake)
	if err != nil {
		return 0, fmt.Errorf("keys of the handshake: %w", err)
	}
	defer before.Wipe()
	if f.secret == 0 || !record.SealedAs(before, f.last, f.secret-1) {
		return 0, errWrongCount
	}
	return 0, nil
}

// wrote is the number of the next record to write under k, of a handshake that is over.
func (w *wire) wrote(version uint16, k *record.Keys, handshake []byte) (uint64, error) {
	if version == tls.VersionTLS13 {
		return w.out.next13(k, handshake)
	}
	return w.out.next12(k)
}

// read is the number of the next record to open. In TLS 1.3 it is 0: crypto/tls takes up the application keys with the
// peer's Finished, refuses bytes behind that in its record, and is handed no further record. If it ever were, the next
// one would not open.
func (w *wire) read(version uint16, k *record.Keys) (uint64, error) {
	switch {
	case version != tls.VersionTLS13:
		return w.in.next12(k)
	case w.in.record.got > 0:
		return 0, errCutRecord
	}
	return 0, nil
}

// engine makes the record engine's halves for a handshake that is over. From here on crypto/tls must not touch the
// connection again. If the peer's records do not add up it gets an alert; if ours do not, nothing may be sealed any more.
func (w *wire) engine(s *secrets, state *tls.ConnectionState, role record.Role) (*session, error) {
	client, server, err := s.keys(state, w, role)
	defer client.Wipe()
	defer server.Wipe()
	if err != nil {
		return nil, err
	}
	opens, seals, handshake := &client, &server, &s.serverHandshake
	if role == record.Client {
		opens, seals, handshake = &server, &client, &s.clientHandshake
	}
	sess := &session{}
	written, err := w.wrote(state.Version, seals, handshake.bytes())
	if err != nil {
		return nil, fmt.Errorf("our records: %w", err)
	}
	sess.writer.Init(*seals, written)
	read, err := w.read(state.Version, opens)
	if err != nil {
		w.out.alert = int16(record.AlertUnexpectedMessage)
		_, _ = w.Write(sess.writer.AppendAlert(nil, record.AlertUnexpectedMessage)) // the connection ends in any case
		return nil, fmt.Errorf("the peer's records: %w", err)
	}
	sess.reader.Init(*opens, read, role)
	return sess, nil
}
