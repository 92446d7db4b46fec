// SPDX-License-Identifier: Apache-2.0

package starttls

import (
	"errors"
	"fmt"
)

// maxMessage bounds an LDAPMessage before TLS. Searches of the root DSE have some hundred bytes.
const maxMessage = 4096

const (
	oidStartTLS      = "1.3.6.1.4.1.1466.20037" // RFC 4511, section 4.14.1
	oidDisconnection = "1.3.6.1.4.1.1466.20036" // section 4.4.1
)

// Tags of BER as LDAP uses it, and of the operations (RFC 4511, section 4.2 and the following).
const (
	berInteger    = 0x02
	berString     = 0x04
	berEnumerated = 0x0a
	berSequence   = 0x30
	berName       = 0x80 // requestName, [0]
	berAnswerName = 0x8a // responseName, [10]

	ldapBind             = 0x60
	ldapUnbind           = 0x42
	ldapSearch           = 0x63
	ldapAbandon          = 0x50
	ldapExtended         = 0x77
	ldapExtendedResponse = 0x78
)

// ldapAnswers has the tag of the answer to each request that has one.
var ldapAnswers = map[byte]byte{
	ldapBind: 0x61, ldapSearch: 0x65, 0x66: 0x67, 0x68: 0x69, 0x4a: 0x6b, 0x6c: 0x6d, 0x6e: 0x6f, ldapExtended: ldapExtendedResponse,
}

// Result codes (RFC 4511, appendix A).
const (
	ldapSuccess                 = 0
	ldapProtocolError           = 2
	ldapConfidentialityRequired = 13
)

var errNotLDAP = errors.New("not a message of LDAP")

// element takes a BER element of definite length off b. Without an error ok is false when b is too short for it.
func element(b []byte) (tag byte, body, rest []byte, ok bool, err error) {
	if len(b) < 2 {
		return 0, nil, nil, false, nil
	}
	n, at := int(b[1]), 2
	if b[1] >= 0x80 {
		more := int(b[1] & 0x7f)
		if more == 0 || more > 4 {
			return 0, nil, nil, false, errNotLDAP
		}
		if len(b) < 2+more {
			return 0, nil, nil, false, nil
		}
		n, at = 0, 2+more
		for _, c := range b[2:at] {
			n = n<<8 | int(c)
		}
	}
	switch {
	case n > maxMessage:
		return 0, nil, nil, false, fmt.Errorf("an element of %d bytes before TLS, of %d at most", n, maxMessage)
	case len(b) < at+n:
		return b[0], nil, nil, false, nil
	}
	return b[0], b[at : at+n], b[at+n:], true, nil
}

// ldapMessage is an LDAPMessage: who asks, and what.
type ldapMessage struct {
	id   uint32
	op   byte
	body []byte
	size int // of all of it; 0 while it is not whole
}

func readLDAP(b []byte) (m ldapMessage, err error) {
	if len(b) > 0 && b[0] != berSequence {
		return m, errNotLDAP
	}
	_, body, rest, ok, err := element(b)
	if err != nil || !ok {
		return m, err
	}
	tag, id, body, ok, err := element(body)
	if err != nil || !ok || tag != berInteger || len(id) == 0 || len(id) > 4 || id[0] >= 0x80 {
		return m, errNotLDAP
	}
	for _, c := range id {
		m.id = m.id<<8 | uint32(c)
	}
	if m.op, m.body, _, ok, err = element(body); err != nil || !ok {
		return m, errNotLDAP
	}
	m.size = len(b) - len(rest)
	return m, nil
}

// ldap answers a request: what is not StartTLS has to wait for it.
func (s *Server) ldap(dst, b []byte) (out []byte, n int, step Step, err error) {
	m, err := readLDAP(b)
	if err != nil {
		return appendDisconnection(dst), 0, More, err
	}
	if m.size == 0 {
		return dst, 0, More, nil
	}
	answer, known := ldapAnswers[m.op]
	switch {
	case m.op == ldapUnbind:
		return dst, m.size, Bye, nil
	case m.op == ldapAbandon:
		return dst, m.size, More, nil
	case !known || m.id == 0: // no request has the number of an unsolicited answer
		return appendDisconnection(dst), 0, More, fmt.Errorf("not a request of LDAP: tag %#02x, number %d", m.op, m.id)
	case m.op == ldapExtended && requestName(m.body) == oidStartTLS:
		return appendResult(dst, m.id, answer, ldapSuccess, "", oidStartTLS), m.size, TLS, nil
	}
	return appendResult(dst, m.id, answer, ldapConfidentialityRequired, "StartTLS comes first", ""), m.size, More, nil
}

// requestName is the OID of an extended request; "" if it has none.
func requestName(body []byte) string {
	tag, name, _, ok, err := element(body)
	if err != nil || !ok || tag != berName {
		return ""
	}
	return string(name)
}

// ldap takes the answer to our request for TLS, which has the number 1.
func (c *Client) ldap(dst, b []byte) (out []byte, n int, step Step, err error) {
	m, err := readLDAP(b)
	if err != nil || m.size == 0 {
		return dst, 0, More, err
	}
	if m.op != ldapExtendedResponse || m.id != 1 {
		return dst, 0, More, fmt.Errorf("not an answer to StartTLS: tag %#02x, number %d", m.op, m.id)
	}
	tag, code, _, ok, err := element(m.body)
	if err != nil || !ok || tag != berEnumerated || len(code) != 1 {
		return dst, 0, More, errNotLDAP
	}
	if code[0] != ldapSuccess {
		return dst, 0, More, fmt.Errorf("it refuses StartTLS with the result code %d", code[0])
	}
	return dst, m.size, TLS, nil
}

// appendElement appends an element of less than 128 bytes.
func appendElement(dst []byte, tag byte, body []byte) []byte {
	return append(append(dst, tag, byte(len(body))), body...)
}

func appendStartTLS(dst []byte) []byte {
	op := appendElement(nil, ldapExtended, appendElement(nil, berName, []byte(oidStartTLS)))
	return appendElement(dst, berSequence, append([]byte{berInteger, 1, 1}, op...))
}

// appendResult appends an LDAPResult (RFC 4511, section 4.1.9).
func appendResult(dst []byte, id uint32, op, code byte, text, name string) []byte {
	result := appendElement(nil, berEnumerated, []byte{code})
	result = appendElement(result, berString, nil) // matchedDN
	result = appendElement(result, berString, []byte(text))
	if name != "" {
		result = appendElement(result, berAnswerName, []byte(name))
	}
	number := []byte{byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id)}
	for len(number) > 1 && number[0] == 0 && number[1] < 0x80 { // as short as it can be (X.690, section 8.3.2)
		number = number[1:]
	}
	message := appendElement(nil, berInteger, number)
	return appendElement(dst, berSequence, appendElement(message, op, result))
}

// appendDisconnection appends the notice that ends a connection which breaks the protocol.
func appendDisconnection(dst []byte) []byte {
	return appendResult(dst, 0, ldapExtendedResponse, ldapProtocolError, "", oidDisconnection)
}
