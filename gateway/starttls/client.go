// SPDX-License-Identifier: Apache-2.0

package starttls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// A Client is what we are to a backend until TLS begins, or until its greeting is over.
type Client struct {
	Protocol Protocol
	asks     bool // for TLS; else it only takes the greeting
	phase    phase
	lines    uint8   // taken
	code     [3]byte // SMTP: of the reply that is being read; zero before its first line
	offers   bool    // SMTP: EHLO was answered with STARTTLS
	lmtp     bool    // SMTP: the backend knows no EHLO, so it was asked with LHLO
}

type phase uint8

const (
	greeting phase = iota // what the backend begins with
	hello                 // SMTP: what it offers
	asked                 // its answer to the request for TLS
)

// NewClient returns the client of a fresh connection. Where asks is false it is done when the backend has greeted.
func NewClient(p Protocol, asks bool) Client {
	c := Client{Protocol: p, asks: asks}
	if !p.Greets() {
		c.phase = asked
	}
	return c
}

// Start appends what the backend is told before it says anything.
func (c *Client) Start(dst []byte) []byte {
	switch {
	case c.Protocol == Postgres && c.asks:
		return binary.BigEndian.AppendUint32(append(dst, 0, 0, 0, 8), postgresSSL)
	case c.Protocol == LDAP && c.asks:
		return appendStartTLS(dst)
	}
	return dst
}

// imapAsk is our tag, and the command.
const imapAsk = "tls STARTTLS\r\n"

// Next takes what the backend has sent and was not used up, and appends to dst what it is told. The step is Greeted once,
// at the end of a greeting: there it stops, for the caller to keep the bytes used up, and goes on when it is called again.
// With TLS the handshake may begin, and bytes that are left are to be refused (ErrBehind). An error says what the backend
// did instead.
func (c *Client) Next(dst, b []byte, host string) (out []byte, used int, step Step, err error) {
	for {
		var n int
		dst, n, step, err = c.one(dst, b[used:], host)
		used += n
		if n == 0 || step != More || err != nil {
			return dst, used, step, err
		}
		if c.lines++; c.lines >= maxLines {
			return dst, used, More, fmt.Errorf("more than %d lines, and TLS has not begun", maxLines)
		}
	}
}

// one takes one line, or message; n is 0 when none is whole.
func (c *Client) one(dst, b []byte, host string) (out []byte, n int, step Step, err error) {
	switch c.Protocol {
	case Postgres:
		return c.postgres(dst, b)
	case MySQL:
		return c.mysql(dst, b)
	case LDAP:
		return c.ldap(dst, b)
	}
	text, n, err := line(b)
	if err != nil || n == 0 {
		return dst, 0, More, err
	}
	switch c.Protocol {
	case SMTP:
		dst, step, err = c.smtp(dst, text, host)
	case IMAP:
		dst, step, err = c.imap(dst, text)
	case POP3:
		dst, step, err = c.pop3(dst, text)
	}
	return dst, n, step, err
}

// next goes on to the next answer.
func (c *Client) next(p phase) { c.phase, c.code = p, [3]byte{} }

// smtp takes a line of a reply: its code, the same on all its lines, and a hyphen if more follow (RFC 5321, section
// 4.2.1).
func (c *Client) smtp(dst, text []byte, host string) ([]byte, Step, error) {
	if len(text) < 3 || len(text) > 3 && text[3] != ' ' && text[3] != '-' || c.code != [3]byte{} && string(text[:3]) != string(c.code[:]) {
		return dst, More, errors.New("not a reply of SMTP: " + quoted(text))
	}
	copy(c.code[:], text)
	if c.phase == hello {
		keyword, _ := verb(text[min(4, len(text)):])
		c.offers = c.offers || keyword == "STARTTLS"
	}
	if len(text) > 3 && text[3] == '-' {
		return dst, More, nil
	}
	return c.smtpReply(dst, text, host)
}

// smtpReply goes on behind the last line of a reply. LMTP knows no EHLO, and says so (RFC 2033, section 4.1).
func (c *Client) smtpReply(dst, text []byte, host string) ([]byte, Step, error) {
	code := string(c.code[:])
	switch {
	case c.phase == greeting && code == "220":
		c.next(hello)
		if c.asks {
			dst = fmt.Appendf(dst, "EHLO %s\r\n", host)
		}
		return dst, Greeted, nil
	case c.phase == hello && code[0] == '5' && !c.lmtp:
		c.lmtp = true
		c.next(hello)
		return fmt.Appendf(dst, "LHLO %s\r\n", host), More, nil
	case c.phase == hello && code == "250" && !c.offers:
		return dst, More, errors.New("it does not offer STARTTLS")
	case c.phase == hello && code == "250":
		c.next(asked)
		return append(dst, "STARTTLS\r\n"...), More, nil
	case c.phase == asked && code == "220":
		return dst, TLS, nil
	}
	return dst, More, errors.New("it says " + quoted(text))
}

func (c *Client) imap(dst, text []byte) ([]byte, Step, error) {
	upper := strings.ToUpper(string(text[:min(len(text), len("* PREAUTH"))]))
	switch {
	case c.phase == greeting && strings.HasPrefix(upper, "* OK"):
		c.next(asked)
		if c.asks {
			dst = append(dst, imapAsk...)
		}
		return dst, Greeted, nil
	case c.phase == greeting: // PREAUTH as well: it would be somebody already, and has no STARTTLS any more
		return dst, More, errors.New("it greets with " + quoted(text))
	case strings.HasPrefix(upper, "TLS OK"):
		return dst, TLS, nil
	case strings.HasPrefix(upper, "* ") && !strings.HasPrefix(upper, "* BYE"):
		return dst, More, nil
	}
	return dst, More, errors.New("it says " + quoted(text))
}

func (c *Client) pop3(dst, text []byte) ([]byte, Step, error) {
	switch {
	case !bytes.HasPrefix(text, []byte("+OK")):
		return dst, More, errors.New("it says " + quoted(text))
	case c.phase == asked:
		return dst, TLS, nil
	}
	c.next(asked)
	if c.asks {
		dst = append(dst, "STLS\r\n"...)
	}
	return dst, Greeted, nil
}

// postgres takes the one byte of the answer. The text of an error is not shown: nobody knows yet who it is from
// (CVE-2024-10977).
func (c *Client) postgres(dst, b []byte) (out []byte, n int, step Step, err error) {
	switch {
	case len(b) == 0:
		return dst, 0, More, nil
	case b[0] == 'S':
		return dst, 1, TLS, nil
	case b[0] == 'N':
		return dst, 0, More, errors.New("it does not offer TLS (ssl = off)")
	case b[0] == 'E':
		return dst, 0, More, errors.New("it answers the SSLRequest with an error")
	}
	return dst, 0, More, fmt.Errorf("it answers the SSLRequest with the byte %#02x", b[0])
}
