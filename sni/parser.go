// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"errors"
	"fmt"
	"strings"
)

// ErrMore means that what has arrived is right so far, and not all of it.
var ErrMore = errors.New("client hello: more bytes are to come")

// Error is a ClientHello, or something in its place, that is refused.
type Error struct {
	Field  string // as the RFCs name it: "record length", "cipher_suites", "server_name"
	Offset int    // of the field in the bytes given to Parse
	Reason string // what is wrong with the field: "is cut short"

	// Alert is the description of the fatal alert to answer with (RFC 8446,
	// section 6.2), the one crypto/tls would send where it sends one. It is 0 if
	// no alert is due because the peer does not speak TLS. (Alert 0,
	// close_notify, never answers an error.)
	Alert uint8
}

// Error has the field, the offset and the reason.
func (e *Error) Error() string {
	return fmt.Sprintf("client hello: %s at byte %d %s", e.Field, e.Offset, e.Reason)
}

// Alert descriptions (RFC 8446, section 6).
const (
	alertNone              = 0
	alertUnexpectedMessage = 10
	alertRecordOverflow    = 22
	alertIllegalParameter  = 47
	alertDecodeError       = 50
	alertProtocolVersion   = 70
)

// malformed is a decode_error found at the start of at; see wire for its Offset.
func malformed(field string, at wire, reason string) *Error {
	return &Error{Field: field, Offset: cap(at), Reason: reason, Alert: alertDecodeError}
}

const (
	recordHeaderLen  = 5       // type, version, length (RFC 8446, section 5.1)
	messageHeaderLen = 4       // type, uint24 length (RFC 8446, section 4)
	maxRecord        = 1 << 14 // RFC 8446, section 5.1
	maxHello         = 1 << 16 // as crypto/tls; 150 bytes to 2 KiB are usual

	recordTypeAlert     = 21
	recordTypeHandshake = 22
	typeClientHello     = 1
)

// MaxLen is the longest that the bytes given to Parse can get before it has
// decided: a hello of 64 KiB with one byte in each record. A caller is free to
// give up sooner; browsers send 2 KiB.
const MaxLen = (recordHeaderLen + 1) * (messageHeaderLen + maxHello)

// Parser follows a ClientHello while its bytes arrive. The zero value is ready.
// It is 20 bytes and holds no buffer, for it sits in every half-open connection.
//
// It agrees with crypto/tls on what a ClientHello is, but for the dot at the end
// of a name, which it takes, as OpenSSL does. It is stricter with the records
// around the hello, as OpenSSL is: a record's major version must be 3, and no
// warning alert may come before or amid the hello. And as RFC 8446 wants it, a
// session id has 32 bytes at most.
//
// The hello may be split over any number of records and any number of calls.
// One that lies in a single record, as nearly all do, is parsed where it is;
// another is put together once, when all of it is there. All calls together
// take time linear in the bytes, even if they come one at a time.
type Parser struct {
	at   int32 // where in the bytes the record starts that is being waited for
	got  int32 // bytes of the message in the records before it, which are whole
	size int32 // of the message with its header; 0 while the header is not there
	need int32 // see Need
	done bool
	head [messageHeaderLen - 1]byte // message header from records before; 3 bytes, with the 4th it is decided
}

// Need is the smallest len(b) at which another Parse can get further. It is
// more than len(b) after ErrMore, and at most one record ahead.
func (p *Parser) Need() int { return int(max(p.need, 1)) }

// Len is how many bytes of b the hello's records took, 0 before Parse has
// returned nil. The last record may hold the start of another handshake
// message; as in crypto/tls that is for the handshake to judge.
func (p *Parser) Len() int {
	if !p.done {
		return 0
	}
	return int(p.need)
}

// Parse looks at b: everything the client has sent, so that each call's b is
// the former call's b, unchanged, and more. It returns
//
//   - nil when h is filled; what follows the hello is not looked at,
//   - [ErrMore] while bytes are missing, with h untouched,
//   - an *[Error] when it is no ClientHello, with h holding what could be read
//     of it, and nothing of the hello before.
//
// The result does not depend on how b was cut into calls. Parse never keeps b.
// Without an error it allocates only for a name or protocol it has not just
// seen, for lists longer than h had room for, and for a hello in several records.
func (p *Parser) Parse(b []byte, h *Hello) error {
	for len(b) >= p.Need() {
		whole, err := p.advance(b)
		if err != nil {
			h.reset()
			return err
		}
		if whole {
			return p.finish(b, h)
		}
	}
	return ErrMore
}

// advance takes in what b has of the record at p.at, and moves on if it has all
// of it: whole is true if the message ends there. What it checks depends on the
// bytes before, never on how many came after them.
func (p *Parser) advance(b []byte) (whole bool, err *Error) {
	record := b[p.at:]
	if record[0] != recordTypeHandshake {
		return false, p.wrongType(record[0])
	}
	if len(record) < recordHeaderLen {
		p.need = p.at + recordHeaderLen
		return false, nil
	}
	n, err := p.recordLen(record)
	if err != nil {
		return false, err
	}
	payload := record[recordHeaderLen:min(len(record), recordHeaderLen+n)]
	if p.size == 0 {
		if err := p.messageHeader(b, payload); err != nil {
			return false, err
		}
	}
	if len(payload) < n {
		p.need = p.at + recordHeaderLen + int32(n)
		if p.size == 0 {
			p.need = min(p.need, p.at+recordHeaderLen+messageHeaderLen-p.got)
		}
		return false, nil
	}
	if p.size > 0 && p.got+int32(n) >= p.size {
		p.need = p.at + recordHeaderLen + int32(n)
		return true, nil
	}
	p.got += int32(n)
	p.at += recordHeaderLen + int32(n)
	p.need = p.at + recordHeaderLen
	return false, nil
}

func (p *Parser) wrongType(typ byte) *Error {
	e := &Error{Field: "record type", Offset: int(p.at), Alert: alertUnexpectedMessage,
		Reason: fmt.Sprintf("is %d instead of 22, handshake", typ)}
	switch {
	case p.at > 0 || typ == recordTypeAlert:
	case typ == 0x80: // the length of an SSLv2 record: its top bit is set
		e.Reason, e.Alert = "is that of SSLv2", alertProtocolVersion
	default:
		e.Alert = alertNone
	}
	return e
}

// recordLen checks a record's header and returns the length it announces.
func (p *Parser) recordLen(record []byte) (int, *Error) {
	const atVersion, atLength = 1, 3
	if record[atVersion] != 3 {
		return 0, &Error{Field: "record version", Offset: int(p.at) + atVersion, Alert: alertProtocolVersion,
			Reason: fmt.Sprintf("is %d.%d instead of 3.x", record[1], record[2])}
	}
	n := lengthOf(record)
	switch {
	case n == 0: // RFC 8446, section 5.1: not even if padding is intended
		return 0, &Error{Field: "record length", Offset: int(p.at) + atLength, Alert: alertUnexpectedMessage,
			Reason: "is 0"}
	case n > maxRecord:
		return 0, &Error{Field: "record length", Offset: int(p.at) + atLength, Alert: alertRecordOverflow,
			Reason: fmt.Sprintf("is %d, more than %d", n, maxRecord)}
	}
	return n, nil
}

func lengthOf(record []byte) int { return int(record[3])<<8 | int(record[4]) }

// messageHeader sets p.size once the four bytes are there, and keeps those that are.
func (p *Parser) messageHeader(b, payload []byte) *Error {
	var head [messageHeaderLen]byte
	copy(head[:], p.head[:p.got])
	have := int(p.got) + copy(head[p.got:], payload)
	copy(p.head[:], head[:])
	if have < len(head) {
		return nil
	}
	n := int(head[1])<<16 | int(head[2])<<8 | int(head[3])
	switch {
	case head[0] != typeClientHello:
		return &Error{Field: "handshake type", Offset: p.locate(b, 0), Alert: alertUnexpectedMessage,
			Reason: fmt.Sprintf("is %d instead of 1, client_hello", head[0])}
	case n > maxHello:
		// crypto/tls answers internal_error here; OpenSSL and BoringSSL lay it to the client.
		return &Error{Field: "handshake length", Offset: p.locate(b, 1), Alert: alertIllegalParameter,
			Reason: fmt.Sprintf("is %d, more than %d", n, maxHello)}
	}
	p.size = int32(messageHeaderLen + n)
	return nil
}

// finish decodes the message that ends in the record at p.at.
func (p *Parser) finish(b []byte, h *Hello) error {
	message := wire(b[recordHeaderLen:])
	if p.at == 0 {
		message = message[:p.size]
	} else {
		message = p.join(b)
	}
	err := h.decode(message)
	if h.RootDot > 0 {
		h.RootDot = p.locate(b, cap(message)-h.RootDot)
	}
	if err != nil {
		err.Offset = p.locate(b, cap(message)-err.Offset)
		return err
	}
	p.done = true
	return nil
}

// join copies the message out of its records. Its size was checked, and all of
// it has arrived, before this allocates.
func (p *Parser) join(b []byte) []byte {
	message := make([]byte, 0, p.size)
	for len(message) < int(p.size) {
		n := lengthOf(b)
		part := b[recordHeaderLen : recordHeaderLen+n]
		message = append(message, part[:min(n, int(p.size)-len(message))]...)
		b = b[recordHeaderLen+n:]
	}
	return message
}

// locate is the offset in b of byte i of the message.
func (p *Parser) locate(b []byte, i int) int {
	at := 0
	for at < int(p.at) {
		n := lengthOf(b[at:])
		if i < n {
			break
		}
		i -= n
		at += recordHeaderLen + n
	}
	return at + recordHeaderLen + i
}

// httpMethods start a request line (RFC 9110, section 9; RFC 5789); PRI starts
// an HTTP/2 connection (RFC 9113, section 3.4).
var httpMethods = [...]string{
	"GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "OPTIONS ", "PATCH ", "CONNECT ", "TRACE ", "PRI ",
}

// LooksLikeHTTP reports whether b, as far as it goes, is the method of a plain
// HTTP request and the space after it. One byte can be enough for that: no
// TLS record starts with a letter. It is false for no bytes at all.
func LooksLikeHTTP(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	for _, method := range httpMethods {
		n := min(len(b), len(method))
		if strings.HasPrefix(method, string(b[:n])) {
			return true
		}
	}
	return false
}
