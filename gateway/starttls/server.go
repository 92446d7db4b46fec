// SPDX-License-Identifier: Apache-2.0

package starttls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// A Server is what we are to a client until it begins with TLS. It has three bytes.
type Server struct {
	Protocol Protocol
	commands uint8 // answered
	declined bool  // Postgres: GSSAPI encryption was asked for, and is not to be had
}

// NewServer returns the server of a fresh connection.
func NewServer(p Protocol) Server { return Server{Protocol: p} }

// Greeting appends what the client is told before it says anything; for MySQL that is its backend's (MySQLGreeting).
func (s *Server) Greeting(dst []byte, host string) []byte {
	switch s.Protocol {
	case SMTP:
		return fmt.Appendf(dst, "220 %s ESMTP\r\n", host)
	case IMAP:
		return append(dst, "* OK [CAPABILITY "+imapCapabilities+"] ready\r\n"...)
	case POP3: // without a timestamp: APOP would be about the backend's
		return append(dst, "+OK ready\r\n"...)
	}
	return dst
}

// Next takes what the client has sent and was not used up, and appends to dst what it is answered. An error is a breach
// of the protocol, or a client that goes on without TLS: the connection ends with what was appended.
func (s *Server) Next(dst, b []byte, host string) (out []byte, used int, step Step, err error) {
	for {
		var n int
		dst, n, step, err = s.one(dst, b[used:], host)
		used += n
		if n == 0 || step != More || err != nil {
			return dst, used, step, err
		}
		if s.commands++; s.commands >= maxCommands {
			return s.tooMany(dst), used, More, fmt.Errorf("%d commands, and none of them asks for TLS", maxCommands)
		}
	}
}

// one answers one command; n is 0 when none is whole.
func (s *Server) one(dst, b []byte, host string) (out []byte, n int, step Step, err error) {
	if len(b) > 0 && b[0] == tlsHandshake && s.Protocol.Direct() {
		return dst, 0, TLS, nil
	}
	switch s.Protocol {
	case Postgres:
		return s.postgres(dst, b)
	case MySQL:
		return s.mysql(dst, b)
	case LDAP:
		return s.ldap(dst, b)
	}
	text, n, err := line(b)
	if err != nil {
		return s.badLine(dst), 0, More, err
	}
	if n == 0 {
		return dst, 0, More, nil
	}
	switch s.Protocol {
	case SMTP:
		dst, step = smtpAnswer(dst, text, host)
	case IMAP:
		dst, step = imapAnswer(dst, text)
	case POP3:
		dst, step = pop3Answer(dst, text)
	}
	return dst, n, step, nil
}

func (s *Server) badLine(dst []byte) []byte {
	switch s.Protocol {
	case SMTP:
		return append(dst, "500 5.5.6 Not a command line\r\n"...)
	case IMAP:
		return append(dst, "* BYE not a command line\r\n"...)
	}
	return append(dst, "-ERR not a command line\r\n"...)
}

func (s *Server) tooMany(dst []byte) []byte {
	switch s.Protocol {
	case SMTP:
		return append(dst, "421 4.7.0 Too many commands without STARTTLS\r\n"...)
	case IMAP:
		return append(dst, "* BYE too many commands without STARTTLS\r\n"...)
	case POP3:
		return append(dst, "-ERR too many commands without STLS\r\n"...)
	case LDAP:
		return appendDisconnection(dst)
	}
	return dst
}

// smtpAnswer answers as RFC 3207, section 4, has it: everything else has to wait for TLS.
func smtpAnswer(dst, text []byte, host string) ([]byte, Step) {
	word, rest := verb(text)
	switch {
	case (word == "EHLO" || word == "LHLO" || word == "HELO") && len(rest) == 0:
		return append(dst, "501 5.5.4 Say who you are\r\n"...), More
	case word == "EHLO" || word == "LHLO":
		return fmt.Appendf(dst, "250-%s\r\n250-ENHANCEDSTATUSCODES\r\n250 STARTTLS\r\n", host), More
	case word == "HELO":
		return fmt.Appendf(dst, "250 %s\r\n", host), More
	case word == "NOOP" || word == "RSET":
		return append(dst, "250 2.0.0 OK\r\n"...), More
	case word == "QUIT":
		return append(dst, "221 2.0.0 Bye\r\n"...), Bye
	case word == "STARTTLS" && len(rest) > 0:
		return append(dst, "501 5.5.4 STARTTLS takes no parameters\r\n"...), More
	case word == "STARTTLS":
		return append(dst, "220 2.0.0 Ready to start TLS\r\n"...), TLS
	}
	return append(dst, "530 5.7.0 Must issue a STARTTLS command first\r\n"...), More
}

const imapCapabilities = "IMAP4rev1 STARTTLS LOGINDISABLED" // RFC 9051, section 6.2.3: no LOGIN in the clear

func imapAnswer(dst, text []byte) ([]byte, Step) {
	tag, command, _ := bytes.Cut(text, []byte(" "))
	if !imapTag(tag) {
		return append(dst, "* BAD a command begins with a tag\r\n"...), More
	}
	word, _ := verb(command)
	switch word {
	case "CAPABILITY":
		return fmt.Appendf(dst, "* CAPABILITY "+imapCapabilities+"\r\n%s OK done\r\n", tag), More
	case "NOOP":
		return fmt.Appendf(dst, "%s OK done\r\n", tag), More
	case "LOGOUT":
		return fmt.Appendf(dst, "* BYE\r\n%s OK done\r\n", tag), Bye
	case "STARTTLS":
		return fmt.Appendf(dst, "%s OK Begin TLS negotiation now\r\n", tag), TLS
	case "LOGIN", "AUTHENTICATE": // RFC 5530
		return fmt.Appendf(dst, "%s NO [PRIVACYREQUIRED] STARTTLS comes first\r\n", tag), More
	}
	return fmt.Appendf(dst, "%s BAD STARTTLS comes first\r\n", tag), More
}

// imapTag reports whether b may be repeated as a tag (RFC 9051, section 9: ASTRING-CHAR without "+").
func imapTag(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c >= 0x7f || bytes.IndexByte([]byte(`(){%*"\+`), c) >= 0 {
			return false
		}
	}
	return len(b) > 0 && len(b) <= 64 // RFC 9051 has no bound; clients count to five digits or so
}

func pop3Answer(dst, text []byte) ([]byte, Step) {
	switch word, _ := verb(text); word {
	case "CAPA": // RFC 2449, section 5
		return append(dst, "+OK\r\nSTLS\r\n.\r\n"...), More
	case "QUIT":
		return append(dst, "+OK\r\n"...), Bye
	case "STLS":
		return append(dst, "+OK Begin TLS negotiation\r\n"...), TLS
	}
	return append(dst, "-ERR STLS comes first\r\n"...), More
}

// Codes of PostgreSQL's packets before the startup message, where that has its version: 1234 in the upper half (from
// src/include/libpq/pqcomm.h).
const (
	postgresCancel = 1234<<16 | 5678
	postgresSSL    = 1234<<16 | 5679
	postgresGSS    = 1234<<16 | 5680
)

// postgres answers a packet without a type: length, code. A client may ask for GSSAPI encryption first, and is told that
// there is none. A startup message is refused before it is whole: who it is from does not matter.
func (s *Server) postgres(dst, b []byte) (out []byte, n int, step Step, err error) {
	if len(b) < 8 {
		return dst, 0, More, nil
	}
	size, code := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	switch {
	case code == postgresSSL && size == 8:
		return append(dst, 'S'), 8, TLS, nil
	case code == postgresGSS && size == 8 && !s.declined:
		s.declined = true
		return append(dst, 'N'), 8, More, nil
	case code == postgresCancel && size >= 16 && size <= 12+256: // keys of 4 to 256 bytes, since protocol 3.2
		if len(b) < int(size) {
			return dst, 0, More, nil
		}
		return dst, 0, Cancel, nil
	case code>>16 == 3:
		return appendPostgresError(dst), 0, More, errors.New("a startup message without TLS")
	}
	return dst, 0, More, fmt.Errorf("no packet that a PostgreSQL connection begins with: length %d, code %d", size, code)
}

// appendPostgresError appends the ErrorResponse that a client without TLS is shown. Its code is the one that a server has
// whose pg_hba.conf takes hostssl only.
func appendPostgresError(dst []byte) []byte {
	const fields = "SFATAL\x00VFATAL\x00C28000\x00Mthis port takes connections with TLS only\x00" +
		"Hset sslmode=require, or verify-full, in the client\x00\x00"
	dst = append(dst, 'E')
	dst = binary.BigEndian.AppendUint32(dst, uint32(4+len(fields)))
	return append(dst, fields...)
}
