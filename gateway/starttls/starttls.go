// SPDX-License-Identifier: Apache-2.0

// Package starttls speaks what some protocols say in the clear before TLS begins, to a client and to a backend.
//
//	s := starttls.NewServer(starttls.SMTP)
//	out := s.Greeting(nil, "mail.example")
//	for {
//		… write out, and read more behind b …
//		var used int
//		var step starttls.Step
//		out, used, step, err = s.Next(out[:0], b, "mail.example")
//		b = b[used:]
//		if step == starttls.TLS {
//			break // what is in b now, and what comes after it, is the client's TLS
//		}
//	}
//
// A Server answers a client until it asks for TLS. A Client asks a backend for TLS, or only takes the greeting that it
// begins with. MySQL's backends begin, and its packets are numbered through TLS: a MySQLBridge counts for a backend that
// is spoken to without.
//
// Nothing that a peer says in the clear outlives the prelude (RFC 3207, section 4.2): no name, no identity, no option. What
// comes behind the request for TLS is never taken for a command, before TLS or after it: it is handed back, and can only be
// a ClientHello (the flaw of CVE-2011-0411 and CVE-2021-23214 was to keep it for later).
//
// The package does no input or output but for Upgrade, which is given a connection; it reads no clock, and keeps no byte
// of a peer: the caller shows what is not used up again, with more behind it.
package starttls

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/tlsnat/tlsnat/natmap"
)

// A Protocol is one that begins in the clear and goes over to TLS: what the map calls it.
type Protocol natmap.StartTLS

// The protocols. Off is none: TLS from the first byte on.
const (
	Off      = Protocol(natmap.StartTLSOff)
	Postgres = Protocol(natmap.StartTLSPostgres) // SSLRequest (PostgreSQL, "Frontend/Backend Protocol", section "SSL Session Encryption")
	MySQL    = Protocol(natmap.StartTLSMySQL)    // the SSLRequest packet of MySQL and MariaDB
	SMTP     = Protocol(natmap.StartTLSSMTP)     // RFC 3207; LMTP too (RFC 2033)
	IMAP     = Protocol(natmap.StartTLSIMAP)     // RFC 9051, section 6.2.1
	POP3     = Protocol(natmap.StartTLSPOP3)     // RFC 2595, section 4
	LDAP     = Protocol(natmap.StartTLSLDAP)     // RFC 4511, section 4.14

	protocols = LDAP + 1
)

// String returns the word that the map has for p.
func (p Protocol) String() string { return natmap.StartTLS(p).String() }

// Greets reports whether a server of p speaks first. A client that we have greeted must not see a backend's greeting.
func (p Protocol) Greets() bool { return p == MySQL || p == SMTP || p == IMAP || p == POP3 }

// Direct reports whether a client of p may begin with TLS on the port where others begin in the clear: the first byte
// tells. PostgreSQL 17 does (sslnegotiation=direct); a client of LDAP that takes the port for ldaps:// may as well.
func (p Protocol) Direct() bool { return p == Postgres || p == LDAP }

// A Step is how far a prelude has come.
type Step uint8

const (
	More    Step = iota // what is there was answered; the rest of it is not whole
	TLS                 // whoever asked may begin with TLS
	Bye                 // the client takes its leave, and is told goodbye
	Cancel              // Postgres: the bytes not used up are a CancelRequest, on a connection of its own
	Greeted             // of a Client: the backend's greeting is over with the bytes used up
)

// tlsHandshake is the first byte of a ClientHello's record (RFC 8446, section 5.1). No protocol here begins with it.
const tlsHandshake = 0x16

const (
	// maxCommands is how many commands a client may send before it asks for TLS. Two are usual: hello, and STARTTLS.
	maxCommands = 16
	// maxLines is how many lines a backend may need until TLS begins. Large servers offer some thirty extensions.
	maxLines = 200
	// maxLine bounds a line, its end included. RFC 5321, section 4.5.3.1.4, has 512 for commands and replies, and 998 for
	// text; RFC 2449 has 255 and 512. IMAP's have no limit, but a list of capabilities stays below it.
	maxLine = 2048
)

// line returns the line that b begins with, without its end, and its length with it; 0 while it is not whole. A line may
// end without a carriage return: nothing of it is passed on, so that nobody else can see it differently.
func line(b []byte) (text []byte, size int, err error) {
	if len(b) > 0 && b[0] == tlsHandshake {
		return nil, 0, errors.New("TLS, where the protocol begins in the clear")
	}
	end := bytes.IndexByte(b[:min(len(b), maxLine)], '\n')
	switch {
	case end >= 0:
		return bytes.TrimSuffix(b[:end], []byte("\r")), end + 1, nil
	case len(b) >= maxLine:
		return nil, 0, fmt.Errorf("no end of a line in %d bytes", maxLine)
	}
	return nil, 0, nil
}

// verb cuts a line into its first word, in upper case, and the rest. A word that is longer than any command is none.
func verb(text []byte) (word string, rest []byte) {
	first, rest, _ := bytes.Cut(text, []byte(" "))
	if len(first) > len("AUTHENTICATE") {
		return "", rest
	}
	return string(bytes.ToUpper(first)), bytes.TrimSpace(rest)
}

// quoted is a peer's text for an error: printable, and cut to a length that can be read.
func quoted(text []byte) string { return fmt.Sprintf("%q", text[:min(len(text), 80)]) }

// Upgrade asks the server behind rw for TLS, and returns when the TLS handshake may begin: what a health check needs to
// know of a backend, and where its own handshake begins. host is the name that SMTP has us say. The deadline is rw's.
func Upgrade(rw io.ReadWriter, p Protocol, host string) error {
	c := NewClient(p, true)
	var b []byte
	out, step := c.Start(nil), More
	for {
		if len(out) > 0 {
			if _, err := rw.Write(out); err != nil {
				return fmt.Errorf("ask for TLS: %w", err)
			}
		}
		if step == TLS {
			break
		}
		var err error
		var used int
		if out, used, step, err = c.Next(out[:0], b, host); err != nil {
			return err
		}
		if b = b[used:]; used == 0 && len(out) == 0 && step == More {
			if b, err = readMore(rw, b); err != nil {
				return err
			}
		}
	}
	if len(b) > 0 {
		return ErrBehind
	}
	return nil
}

// ErrBehind is the backend's when bytes in the clear follow its word that TLS may begin: somebody else's, most probably,
// put there to be taken for what it says under TLS.
var ErrBehind = errors.New("bytes in the clear follow its word that TLS may begin")

func readMore(r io.Reader, b []byte) ([]byte, error) {
	have := len(b)
	b = append(b, make([]byte, 512)...)
	n, err := r.Read(b[have:])
	if n == 0 && err != nil {
		return nil, fmt.Errorf("ask for TLS: %w", err)
	}
	return b[:have+n], nil
}
