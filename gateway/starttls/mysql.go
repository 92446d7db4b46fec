// SPDX-License-Identifier: Apache-2.0

package starttls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// A packet of MySQL is three bytes of length, a number, and the payload. Numbers count through a conversation, both sides
// together, and begin at 0 with each command (MySQL internals, "MySQL Packets"). So the SSLRequest, number 1, is behind
// the backend's greeting, 0; and all that follows it under TLS has a number more than it would have without.
const (
	mysqlHeader     = 4
	mysqlMaxPayload = 1024 // of a greeting: versions are the only part without a bound, and have 60 bytes at most
	sslRequestSize  = mysqlHeader + 32

	clientProtocol41 = 1 << 9
	clientSSL        = 1 << 11
	clientSecure     = 1 << 15
	utf8mb4          = 45
)

// errSecureTransport is what a client without TLS is told: ER_SECURE_TRANSPORT_REQUIRED of MySQL 8.
const errSecureTransport = 3159

var errNotMySQL = errors.New("not a packet that a connection of MySQL begins with")

// mysqlPacket returns the first packet of b, header and all; nil while it is not whole.
func mysqlPacket(b []byte, limit int) ([]byte, error) {
	if len(b) < mysqlHeader {
		return nil, nil
	}
	n := int(b[0]) | int(b[1])<<8 | int(b[2])<<16
	switch {
	case n > limit:
		return nil, fmt.Errorf("a packet of %d bytes before TLS, of %d at most", n, limit)
	case len(b) < mysqlHeader+n:
		return nil, nil
	}
	return b[:mysqlHeader+n], nil
}

// mysql takes the client's SSLRequest. A response without TLS is refused before it is whole: who it is from, and its
// password, do not matter. What follows the SSLRequest is the client's TLS.
func (s *Server) mysql(dst, b []byte) (out []byte, n int, step Step, err error) {
	if len(b) < mysqlHeader+4 {
		return dst, 0, More, nil
	}
	switch {
	case b[3] != 1:
		return dst, 0, More, errNotMySQL
	case binary.LittleEndian.Uint32(b[mysqlHeader:])&clientSSL == 0:
		return appendMySQLError(dst, 2, errSecureTransport, "this port takes connections with TLS only"), 0, More, errors.New("a login without TLS")
	case int(b[0])|int(b[1])<<8|int(b[2])<<16 != sslRequestSize-mysqlHeader:
		return dst, 0, More, errNotMySQL
	case len(b) < sslRequestSize:
		return dst, 0, More, nil
	}
	return dst, sslRequestSize, TLS, nil
}

// appendMySQLError appends an ERR packet.
func appendMySQLError(dst []byte, number byte, code uint16, text string) []byte {
	dst = append(dst, byte(1+2+6+len(text)), 0, 0, number, 0xff, byte(code), byte(code>>8))
	return append(append(dst, "#HY000"...), text...)
}

// MySQLRefusal appends what a client is told in place of a greeting when there is no backend to greet it.
func MySQLRefusal(dst []byte, text string) []byte {
	const erConCount = 1040 // too many connections: what clients know as a server that takes nobody for now
	return appendMySQLError(dst, 0, erConCount, text[:min(len(text), 200)])
}

// mysql takes the backend's greeting, and then asks for TLS without waiting for an answer, since there is none.
func (c *Client) mysql(dst, b []byte) (out []byte, n int, step Step, err error) {
	if c.phase == asked {
		return appendSSLRequest(dst), 0, TLS, nil
	}
	p, err := mysqlPacket(b, mysqlMaxPayload)
	if err != nil || p == nil {
		return dst, 0, More, err
	}
	at := capabilities(p)
	switch {
	case len(p) > mysqlHeader+2 && p[mysqlHeader] == 0xff:
		return dst, 0, More, fmt.Errorf("it takes no connection: error %d", binary.LittleEndian.Uint16(p[mysqlHeader+1:]))
	case at == 0 || p[3] != 0:
		return dst, 0, More, errNotMySQL
	case c.asks && p[at+1]&(clientSSL>>8) == 0:
		return dst, 0, More, errors.New("it does not offer TLS")
	}
	c.next(asked)
	return dst, len(p), Greeted, nil
}

// capabilities is where the lower half of them begins in a greeting: behind the version of the protocol, 10, that of the
// server with its NUL, the connection's number, eight bytes of the scramble and one that is unused. It is 0 for what is
// no greeting.
func capabilities(p []byte) int {
	if len(p) <= mysqlHeader || p[mysqlHeader] != 10 {
		return 0
	}
	end := bytes.IndexByte(p[mysqlHeader+1:], 0)
	at := mysqlHeader + 1 + end + 1 + 4 + 8 + 1
	if end < 0 || at+2 > len(p) {
		return 0
	}
	return at
}

// MySQLGreeting makes a backend's greeting, a whole packet that a Client has taken, one that offers TLS, in place.
func MySQLGreeting(p []byte) []byte {
	if at := capabilities(p); at > 0 {
		p[at+1] |= clientSSL >> 8
	}
	return p
}

// appendSSLRequest appends that of a client of our own. A gateway sends its client's instead: servers hold the login that
// follows against it.
func appendSSLRequest(dst []byte) []byte {
	p := [sslRequestSize]byte{sslRequestSize - mysqlHeader, 0, 0, 1}
	binary.LittleEndian.PutUint32(p[mysqlHeader:], clientProtocol41|clientSSL|clientSecure)
	binary.LittleEndian.PutUint32(p[mysqlHeader+4:], 1<<24) // the largest packet
	p[mysqlHeader+8] = utf8mb4
	return append(dst, p[:]...)
}

// A MySQLBridge joins a client that speaks TLS to a backend that does not, from the login to the backend's word that it
// is over: it takes one off the numbers of the client's packets, puts one onto the backend's, and takes the flag for TLS
// out of the login. From then on both count alike.
//
// What was agreed on is not touched otherwise, so a way to log in that depends on TLS does not come to its end:
// caching_sha2_password wants the password itself when the backend has not cached it, and a backend takes that through
// TLS or a Unix socket only.
type MySQLBridge struct {
	up, down packets
	login    bool // has begun
	over     bool
}

// packets follows one direction.
type packets struct {
	head [mysqlHeader + 4]byte // of the packet that is beginning
	have int                   // of head
	left int                   // of the payload that is to come, and goes through as it is
}

// Over reports whether the login has ended: from now on nothing has to be changed.
func (m *MySQLBridge) Over() bool { return m.over }

// Up appends to dst what the backend gets of b, which the client has sent.
func (m *MySQLBridge) Up(dst, b []byte) ([]byte, error) {
	p := &m.up
	for len(b) > 0 && !m.over {
		want := mysqlHeader
		if !m.login && p.have >= mysqlHeader {
			want += 4 // with the capabilities
		}
		var whole bool
		if dst, b, whole = p.fill(dst, b, want); !whole {
			continue
		}
		if !m.login && p.have == mysqlHeader {
			if p.head[3] != 2 || p.size() < 4 {
				return dst, errNotMySQL
			}
			continue
		}
		if !m.login {
			p.head[mysqlHeader+1] &^= clientSSL >> 8
			m.login = true
		}
		if p.head[3] > 0 { // 0: a command that does not wait for the word that the login is over
			p.head[3]--
		}
		dst = p.emit(dst)
	}
	return append(dst, b...), nil
}

// Down appends to dst what the client gets of b, which the backend has sent. The login is over with an OK or ERR packet.
func (m *MySQLBridge) Down(dst, b []byte) []byte {
	p := &m.down
	for len(b) > 0 && !m.over {
		want := mysqlHeader
		if p.have == mysqlHeader {
			want++ // with the word that the packet is
		}
		var whole bool
		if dst, b, whole = p.fill(dst, b, want); !whole || p.have == mysqlHeader && p.size() > 0 {
			continue
		}
		word := p.head[mysqlHeader]
		m.over = p.have > mysqlHeader && (word == 0x00 || word == 0xff)
		p.head[3]++
		dst = p.emit(dst)
	}
	return append(dst, b...)
}

// Rest appends what Up has taken and not given out when the login was over.
func (m *MySQLBridge) Rest(dst []byte) []byte {
	dst = append(dst, m.up.head[:m.up.have]...)
	m.up.have = 0
	return dst
}

// size is the length of the payload, once the header is there.
func (p *packets) size() int { return int(p.head[0]) | int(p.head[1])<<8 | int(p.head[2])<<16 }

// fill passes on what is left of a payload, then gathers the next head; whole says that it is there.
func (p *packets) fill(dst, b []byte, want int) (out, rest []byte, whole bool) {
	if n := min(p.left, len(b)); n > 0 {
		dst, b, p.left = append(dst, b[:n]...), b[n:], p.left-n
	}
	if p.left == 0 && len(b) > 0 {
		n := copy(p.head[p.have:want], b)
		b, p.have = b[n:], p.have+n
	}
	return dst, b, p.left == 0 && p.have == want
}

// emit passes the head on, and begins with its payload.
func (p *packets) emit(dst []byte) []byte {
	dst = append(dst, p.head[:p.have]...)
	p.left, p.have = p.size()-(p.have-mysqlHeader), 0
	return dst
}
