// SPDX-License-Identifier: Apache-2.0

package record

import (
	"encoding/binary"
	"fmt"
)

// Content types of records (RFC 8446, section 5.1).
const (
	TypeChangeCipherSpec = 20
	TypeAlert            = 21
	TypeHandshake        = 22
	TypeData             = 23
)

// HandshakeType: what may come after a handshake (RFC 8446 4.6, RFC 5246 7.4.1).
const (
	msgHelloRequest     = 0
	msgClientHello      = 1
	msgNewSessionTicket = 4
	msgKeyUpdate        = 24
)

const (
	headerLen    = 5
	tagLen       = 16
	msgHeaderLen = 4 // HandshakeType, uint24 length

	// maxTicket bounds a NewSessionTicket. It costs no memory: the bound is crypto/tls's, so that what
	// it would refuse in a handshake is not let through after it.
	maxTicket = 65536

	// minTicket is lifetime, age_add, an empty nonce, a ticket of one byte and no extensions
	// (RFC 8446 4.6.1).
	minTicket = 4 + 4 + 1 + 2 + 1 + 2

	// maxUseless empty records, warnings and tickets may come in a row. Each costs less than a record of one byte, which
	// nobody bounds, so that this only ends what never says anything. It is more than peers let each other send: 32 empty
	// records, 128 KeyUpdates. Pieces of one message do not count: its length bounds them. KeyUpdates are paid for.
	maxUseless = 255

	// A KeyUpdate costs the peer 27 bytes, and us two key derivations and an answer: some 5 µs and a
	// write(2). The first thousand are free, which is less work than a dozen handshakes and lets a
	// connection with little traffic update every hour for six weeks; from then on data pays for each.
	updatePrice  = 4096 // bytes of application data
	updateCredit = 1024 * updatePrice
)

const (
	// MaxPlaintext is the most a record carries (RFC 8446 5.1), in bytes.
	MaxPlaintext = 1 << 14

	// MaxRecord is the longest record that a Reader waits for, header included. The RFCs allow 256
	// bytes of expansion in TLS 1.3 and 2048 in 1.2, for ciphers that expand more than these: with a
	// 16-byte tag anything longer must have too long a plaintext, and is refused by its header.
	MaxRecord = headerLen + 8 + MaxPlaintext + tagLen
)

// Role says which side of the connection we are.
type Role uint8

const (
	Server Role = iota // the peer is a client: it may send KeyUpdate
	Client             // the peer is a server: it may also send NewSessionTicket
)

// Kind says what a record was.
type Kind uint8

const (
	Data               Kind = iota // application data, maybe none
	Ignored                        // nothing to do: a ticket, a warning, part of a handshake message
	KeyUpdate                      // the peer has new keys, reading follows them
	KeyUpdateRequested             // the same, and ours is owed: Writer.AppendKeyUpdate(dst, false)
	CloseNotify                    // the peer writes no more: half-close
	AlertReceived                  // the peer gave up: Record.Alert says why
)

var kindNames = [...]string{"data", "ignored", "key_update", "key_update_requested", "close_notify", "alert"}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Record is one opened record.
type Record struct {
	Data  []byte // Kind Data: the plaintext, inside the bytes given to Next
	Kind  Kind
	Alert Alert // CloseNotify, AlertReceived, and a warning that was Ignored
}

// Reader opens what the peer sealed. Embed it by value; it is not safe for concurrent use. The zero
// Reader opens nothing: Init it.
type Reader struct {
	half
	credit  uint32 // bytes of application data not yet spent on KeyUpdates
	left    uint32 // of the handshake message under way: bytes to come; while have < 4, its length so far
	have    uint8  // bytes of its 4-byte header seen; 0: no message is under way
	msg     uint8  // its type
	useless uint8  // empty records, warnings and tickets since the last data
	role    Role
	ticket  ticketWalk // of the NewSessionTicket under way
}

// Init makes r ready for the record with sequence number seq under k. r keeps its own copy of k.
func (r *Reader) Init(k Keys, seq uint64, role Role) {
	*r = Reader{credit: updateCredit, role: role}
	r.half.init(k, seq)
}

// Park drops the AEAD, most of what an idle connection costs. Next sets it up again by itself, in
// well under a microsecond.
func (r *Reader) Park() { r.park() }

// Wipe overwrites the keys, also those of the AEAD if that can be wiped: package gcm's own can, others
// are left to the garbage collector.
// After it, Next returns ErrClosed.
func (r *Reader) Wipe() { r.wipe() }

// Need is the total number of bytes that the first record of b wants, as far as b tells: 5, or 5 and
// the length once those are there. It is at most MaxRecord for a header that Next accepts.
func (r *Reader) Need(b []byte) int {
	if len(b) < headerLen {
		return headerLen
	}
	return headerLen + int(binary.BigEndian.Uint16(b[3:]))
}

// Overhead is how many bytes a record has beside its data, padding aside: header, explicit nonce, tag and, in TLS 1.3,
// the content type.
func (r *Reader) Overhead() int {
	n := headerLen + int(r.explicit) + tagLen
	if r.tls13 {
		n++
	}
	return n
}

// Suite is the cipher suite's number, 0 when nothing is opened any more.
func (r *Reader) Suite() uint16 { return r.suite() }

// TLS13 says whether the version is 1.3, in which the peer may change its keys.
func (r *Reader) TLS13() bool { return r.tls13 }

// Export copies the keys and the number of the next record, for an engine that goes on opening from
// here, such as the kernel's: at the end of a record only. Wipe the copy; when the other engine has taken over, say
// Follow.
func (r *Reader) Export() (k Keys, seq uint64) { return r.export() }

// Follow tells r that another engine opens from now on. r forgets key and IV, and must not be asked for the Next record
// any more; it judges what the other one has opened (Judge, Carried), by the same rules and within the same budgets.
func (r *Reader) Follow() { r.follow() }

// Carried counts n bytes of application data, at least one, that the other engine has opened.
func (r *Reader) Carried(n int) {
	r.useless = 0
	r.credit = min(r.credit+uint32(min(n, updateCredit)), updateCredit)
}

// Judge says what a record means that the other engine has opened: its content type and content. After KeyUpdate and
// KeyUpdateRequested, Export has the keys of the records behind it, then Follow again. Errors are those of Next.
func (r *Reader) Judge(typ byte, p []byte) (Record, error) {
	if r.over() {
		return Record{}, ErrClosed
	}
	r.seq++
	if typ == TypeData && len(p) > 0 && r.have == 0 {
		r.Carried(len(p))
		return Record{Data: p}, nil
	}
	rec, e := r.control(typ, p)
	if e != nil {
		return Record{}, e
	}
	return rec, nil
}

// Refuse makes the error for a record that the other engine could not open, and ends reading.
func (r *Reader) Refuse(a Alert, reason string) error { return r.fail(a, reason) }

// Next opens the first record of b in place. n is how many bytes of b it took; 0 without an error
// means that b holds no whole record yet (Need tells how much is wanted). A header is judged as soon
// as its 5 bytes are there.
//
// An error is an *Error with the alert to send, or ErrClosed. After an error, after CloseNotify and
// after AlertReceived the keys are wiped, and every further call returns ErrClosed. The bytes of a
// record that could not be opened are lost.
func (r *Reader) Next(b []byte) (rec Record, n int, err error) {
	if r.over() {
		return Record{}, 0, ErrClosed
	}
	if len(b) < headerLen {
		return Record{}, 0, nil
	}
	if e := r.checkHeader(b); e != nil {
		return Record{}, 0, e
	}
	n = headerLen + int(binary.BigEndian.Uint16(b[3:]))
	if len(b) < n {
		return Record{}, 0, nil
	}
	seq := r.seq
	typ, p, e := r.plaintext(b[:n:n])
	if e != nil {
		return Record{}, 0, e
	}
	if typ == TypeData && len(p) > 0 && r.have == 0 {
		r.useless = 0
		r.credit = min(r.credit+uint32(len(p)), updateCredit)
		return Record{Data: p}, n, nil
	}
	if rec, e = r.control(typ, p); e != nil {
		e.Seq = seq // it has been counted by now
		return Record{}, 0, e
	}
	return rec, n, nil
}

// checkHeader judges type, version and length. In TLS 1.3 every record looks like application data
// (RFC 8446 5.2), a change_cipher_spec has no place after the handshake (RFC 8446 5), and in 1.2 it
// would start a renegotiation. The order is crypto/tls's: version, length, type.
func (r *Reader) checkHeader(b []byte) *Error {
	typ, version, n := b[0], binary.BigEndian.Uint16(b[1:]), int(binary.BigEndian.Uint16(b[3:]))
	expansion := tagLen + int(r.explicit)
	if r.tls13 {
		expansion++ // the content type
	}
	switch {
	case version != 0x0303: // also in TLS 1.3: RFC 8446 5.1
		return r.fail(AlertProtocolVersion, fmt.Sprintf("record header: version %#04x at offset 1, want 0x0303", version))
	case n > MaxPlaintext+expansion:
		return r.fail(AlertRecordOverflow, fmt.Sprintf("record header: length %d at offset 3, at most %d", n, MaxPlaintext+expansion))
	case typ != TypeData && (r.tls13 || typ != TypeAlert && typ != TypeHandshake):
		return r.fail(AlertUnexpectedMessage, fmt.Sprintf("record header: type %d at offset 0 after the handshake", typ))
	case n < tagLen+int(r.explicit):
		return r.fail(AlertBadRecordMAC, fmt.Sprintf("record header: length %d at offset 3, too short for a tag", n))
	case r.seq == lastSeq:
		return r.fail(AlertInternalError, "sequence numbers are used up")
	}
	return nil
}

// plaintext opens one whole record whose header has been checked, and counts it.
func (r *Reader) plaintext(rec []byte) (typ byte, p []byte, err *Error) {
	p, ok := r.open(rec)
	if !ok {
		return 0, nil, r.fail(AlertBadRecordMAC, "it does not open: forged, damaged, or of other keys")
	}
	typ = rec[0]
	if r.tls13 {
		if typ, p = unpad(p); typ == 0 {
			return 0, nil, r.fail(AlertUnexpectedMessage, "no content type, only padding")
		}
	}
	r.seq++
	return typ, p, nil
}

// unpad splits a TLSInnerPlaintext: content, its type, zeros (RFC 8446 5.4). Type 0 means that there
// was none. The time it takes tells how long the padding was, as RFC 8446 E.3 concedes; what it
// tells is no more than the length of the content, which the backend sees at once.
func unpad(p []byte) (typ byte, content []byte) {
	for len(p) >= 8 && binary.LittleEndian.Uint64(p[len(p)-8:]) == 0 {
		p = p[:len(p)-8]
	}
	for len(p) > 0 {
		typ, p = p[len(p)-1], p[:len(p)-1]
		if typ != 0 {
			return typ, p
		}
	}
	return 0, nil
}

// control handles everything that is not a record full of data.
func (r *Reader) control(typ byte, p []byte) (Record, *Error) {
	if r.have > 0 && typ != TypeHandshake { // RFC 8446 5.1
		return Record{}, r.fail(AlertUnexpectedMessage, fmt.Sprintf("record of type %d inside a handshake message", typ))
	}
	switch {
	case typ == TypeData:
		return Record{Data: p}, r.countUseless()
	case typ == TypeAlert:
		return r.alert(p)
	case typ == TypeHandshake && r.tls13:
		return r.handshake(p)
	case typ == TypeHandshake:
		return Record{}, r.renegotiation(p)
	}
	return Record{}, r.fail(AlertUnexpectedMessage, fmt.Sprintf("content type %d after the handshake", typ))
}

// alert takes a record that must be one alert, whole and alone (RFC 8446 5.1 and 5.4). Unlike RFC 5246
// allows, it is not put together from pieces: no stack sends it so.
func (r *Reader) alert(p []byte) (Record, *Error) {
	if len(p) == 0 {
		return Record{}, r.fail(AlertUnexpectedMessage, "empty alert")
	}
	if len(p) != 2 {
		return Record{}, r.fail(AlertDecodeError, fmt.Sprintf("alert of %d bytes, want 2", len(p)))
	}
	level, a := p[0], Alert(p[1])
	switch {
	case a == AlertCloseNotify:
		r.wipe()
		return Record{Kind: CloseNotify, Alert: a}, nil
	case !r.tls13 && level == levelWarning && a == AlertNoRenegotiation: // as OpenSSL: nobody here has asked for a renegotiation
		return Record{}, r.fail(AlertHandshakeFailure, "the peer refuses a renegotiation that nobody has asked for")
	case r.tls13 && a == AlertUserCanceled, !r.tls13 && level == levelWarning:
		return Record{Kind: Ignored, Alert: a}, r.countUseless()
	case !r.tls13 && level != levelFatal:
		return Record{}, r.fail(AlertIllegalParameter, fmt.Sprintf("alert level %d at offset 0, want 1 or 2", level))
	}
	r.wipe()
	return Record{Kind: AlertReceived, Alert: a}, nil
}

// renegotiation refuses every handshake message of TLS 1.2: after the handshake it can only start
// another one (RFC 5246 7.4.1.1 and 7.4.1.2).
func (r *Reader) renegotiation(p []byte) *Error {
	starts := byte(msgClientHello)
	if r.role == Client {
		starts = msgHelloRequest
	}
	if len(p) > 0 && p[0] == starts {
		return r.fail(AlertNoRenegotiation, "the peer wants to renegotiate")
	}
	return r.fail(AlertUnexpectedMessage, "handshake message after the handshake")
}

// handshake walks over the messages in a TLS 1.3 handshake record. One may begin in an earlier record
// and go on in a later one (RFC 8446 5.1); nothing of it is kept but its type and length.
func (r *Reader) handshake(p []byte) (Record, *Error) {
	if len(p) == 0 { // RFC 8446 5.1
		return Record{}, r.fail(AlertUnexpectedMessage, "empty handshake record")
	}
	for len(p) > 0 {
		if r.have < msgHeaderLen {
			var err *Error
			if p, err = r.messageHeader(p); err != nil {
				return Record{}, err
			}
			continue
		}
		take := min(int(r.left), len(p))
		body := p[:take]
		p = p[take:]
		if r.msg == msgNewSessionTicket && !r.ticket.take(body, int(r.left)-take) {
			return Record{}, r.fail(AlertDecodeError, "new_session_ticket: its fields do not fill it")
		}
		if r.left -= uint32(take); r.left > 0 {
			break
		}
		r.have = 0
		if r.msg == msgKeyUpdate {
			return r.keyUpdate(body[0], len(p))
		}
	}
	return Record{Kind: Ignored}, nil
}

// messageHeader takes what p has of the message's 4-byte header, judging each part as it comes. When
// the header is whole, left is at least 1.
func (r *Reader) messageHeader(p []byte) (rest []byte, err *Error) {
	if r.have == 0 {
		if p[0] != msgKeyUpdate && (p[0] != msgNewSessionTicket || r.role != Client) {
			return nil, r.fail(AlertUnexpectedMessage, fmt.Sprintf("handshake message of type %d after the handshake", p[0]))
		}
		if p[0] == msgNewSessionTicket {
			if err := r.countUseless(); err != nil {
				return nil, err
			}
		}
		r.msg, r.left, r.have, r.ticket, p = p[0], 0, 1, newTicketWalk, p[1:]
	}
	for ; r.have < msgHeaderLen && len(p) > 0; r.have, p = r.have+1, p[1:] {
		r.left = r.left<<8 | uint32(p[0])
	}
	if r.have < msgHeaderLen {
		return p, nil
	}
	switch {
	case r.msg == msgKeyUpdate && r.left != 1:
		return nil, r.fail(AlertDecodeError, fmt.Sprintf("key_update: length %d at offset 1, want 1", r.left))
	case r.msg == msgNewSessionTicket && r.left < minTicket:
		return nil, r.fail(AlertDecodeError, fmt.Sprintf("new_session_ticket: length %d at offset 1, at least %d", r.left, minTicket))
	case r.left > maxTicket:
		return nil, r.fail(AlertIllegalParameter, fmt.Sprintf("new_session_ticket: length %d at offset 1, at most %d", r.left, maxTicket))
	}
	return p, nil
}

// keyUpdate moves reading to the next keys. Nothing may follow in the record, which was sealed with
// the old ones (RFC 8446 4.6.3 and 5.1).
func (r *Reader) keyUpdate(request byte, trailing int) (Record, *Error) {
	switch {
	case request > 1:
		return Record{}, r.fail(AlertIllegalParameter, fmt.Sprintf("key_update: request_update %d at offset 4, want 0 or 1", request))
	case trailing > 0:
		return Record{}, r.fail(AlertUnexpectedMessage, fmt.Sprintf("key_update: %d bytes follow it in its record", trailing))
	case r.credit < updatePrice:
		return Record{}, r.fail(AlertUnexpectedMessage, "key_update: too many for the data between them")
	}
	r.credit -= updatePrice
	r.advance()
	if request == 1 {
		return Record{Kind: KeyUpdateRequested}, nil
	}
	return Record{Kind: KeyUpdate}, nil
}

// countUseless bounds what keeps us busy without telling us anything.
func (r *Reader) countUseless() *Error {
	if r.useless == maxUseless {
		return r.fail(AlertUnexpectedMessage, fmt.Sprintf("more than %d empty records, warnings and tickets without application data", maxUseless))
	}
	r.useless++
	return nil
}

// ticketWalk follows the fields of a NewSessionTicket (RFC 8446, section 4.6.1), in whatever pieces they come. Nothing of
// them is kept.
type ticketWalk struct {
	field ticketField
	got   uint8  // bytes of a length that have come
	left  uint16 // bytes of the field to come, or the length so far
}

// ticketField is where a ticketWalk is. Lengths come before what they are of.
type ticketField uint8

const (
	ticketTimes ticketField = iota // lifetime and age_add
	ticketNonceLen
	ticketNonce
	ticketLen
	ticketItself
	ticketExtensionsLen
	ticketExtensionHeader // type and length; or the end of the message
	ticketExtension
)

var newTicketWalk = ticketWalk{left: 4 + 4}

// lengthLen is how many bytes a length has; 0 for what is no length. Of an extension's header the last two bytes are its.
var lengthLen = [...]uint8{ticketNonceLen: 1, ticketLen: 2, ticketExtensionsLen: 2, ticketExtensionHeader: 4, ticketExtension: 0}

// take follows p, behind which the message has left bytes. It says whether the fields can still fill the message.
func (w *ticketWalk) take(p []byte, left int) bool {
	for len(p) > 0 {
		size := lengthLen[w.field]
		if size == 0 {
			n := min(len(p), int(w.left))
			p = p[n:]
			w.left -= uint16(n)
		} else {
			w.left = w.left<<8 | uint16(p[0])
			w.got++
			p = p[1:]
			if w.got < size {
				continue
			}
			if !w.fits(len(p) + left) {
				return false
			}
			w.got = 0
			w.field++
		}
		if w.left == 0 || w.field == ticketExtensionHeader {
			w.next()
		}
	}
	return left > 0 || w.field == ticketExtensionHeader && w.got == 0
}

// fits judges a length that is whole, behind which the message has so many bytes.
func (w *ticketWalk) fits(rest int) bool {
	switch {
	case int(w.left) > rest, w.field == ticketLen && w.left == 0:
		return false
	case w.field == ticketExtensionsLen:
		return int(w.left) == rest
	}
	return true
}

// next goes on behind a field that is whole.
func (w *ticketWalk) next() {
	switch w.field {
	case ticketExtension:
		w.field = ticketExtensionHeader
	case ticketExtensionHeader: // of the first extension, or none
	default:
		w.field++
	}
	w.left = 0
}

// fail ends reading for good.
func (r *Reader) fail(a Alert, reason string) *Error {
	e := &Error{Alert: a, Seq: r.seq, Reason: reason}
	r.wipe()
	return e
}
