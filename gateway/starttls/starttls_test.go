// SPDX-License-Identifier: Apache-2.0

package starttls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"
	"unsafe"
)

const host = "mail.example"

// packet is a startup packet of PostgreSQL.
func packet(code uint32, rest string) string {
	b := binary.BigEndian.AppendUint32(nil, uint32(8+len(rest)))
	return string(binary.BigEndian.AppendUint32(b, code)) + rest
}

// mysqlPack is a packet of MySQL.
func mysqlPack(number byte, payload string) string {
	n := len(payload)
	return string([]byte{byte(n), byte(n >> 8), byte(n >> 16), number}) + payload
}

func le32(v uint32) string { return string(binary.LittleEndian.AppendUint32(nil, v)) }

// mysqlGreeting is a greeting of MySQL with these capabilities in the lower half.
func mysqlGreeting(capabilities uint16) string {
	return mysqlPack(0, "\x0a10.11.19-MariaDB\x00"+"\x07\x00\x00\x00"+"12345678\x00"+string([]byte{byte(capabilities), byte(capabilities >> 8)})+
		"\x2d\x02\x00\xff\x81\x15\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00123456789012\x00mysql_native_password\x00")
}

var (
	sslRequest = mysqlPack(1, le32(clientProtocol41|clientSSL)+le32(1<<24)+"\x2d"+strings.Repeat("\x00", 23))
	startTLS   = string(appendStartTLS(nil))
)

// ldapRequest is a request with this number.
func ldapRequest(id, op byte, body string) string {
	message := appendElement([]byte{berInteger, 1, id}, op, []byte(body))
	return string(appendElement(nil, berSequence, message))
}

func ldapAnswer(id uint32, op, code byte, text, name string) string {
	return string(appendResult(nil, id, op, code, text, name))
}

// serverCases is what clients say, what they hear, and where that leads.
var serverCases = []struct {
	name     string
	protocol Protocol
	says     string
	hears    string
	rest     string // not used up
	step     Step
	fault    string
}{
	{"postgres: TLS", Postgres, packet(postgresSSL, ""), "S", "", TLS, ""},
	{"postgres: TLS, with the ClientHello behind it", Postgres, packet(postgresSSL, "")[:8] + "\x16\x03\x01", "S", "\x16\x03\x01", TLS, ""},
	{"postgres: GSSAPI first", Postgres, packet(postgresGSS, "") + packet(postgresSSL, ""), "NS", "", TLS, ""},
	{"postgres: GSSAPI over and over", Postgres, packet(postgresGSS, "") + packet(postgresGSS, ""), "N", packet(postgresGSS, ""), More, "no packet that a PostgreSQL connection begins with: length 8, code 80877104"},
	{"postgres: TLS from the first byte on", Postgres, "\x16\x03\x01\x02", "", "\x16\x03\x01\x02", TLS, ""},
	{"postgres: cancel", Postgres, packet(postgresCancel, "\x00\x00\x00\x01keys"), "", packet(postgresCancel, "\x00\x00\x00\x01keys"), Cancel, ""},
	{"postgres: half a cancel", Postgres, packet(postgresCancel, "\x00\x00\x00\x01keys")[:15], "", packet(postgresCancel, "\x00\x00\x00\x01keys")[:15], More, ""},
	{"postgres: cancel of 2 GiB", Postgres, "\x7f\xff\xff\xff" + packet(postgresCancel, "")[4:], "", "\x7f\xff\xff\xff" + packet(postgresCancel, "")[4:], More, "no packet that a PostgreSQL connection begins with: length 2147483647, code 80877102"},
	{"postgres: plain", Postgres, packet(3<<16, "user\x00x\x00\x00"), string(appendPostgresError(nil)), packet(3<<16, "user\x00x\x00\x00"), More, "a startup message without TLS"},
	{"postgres: HTTP", Postgres, "GET / HTTP/1.1\r\n", "", "GET / HTTP/1.1\r\n", More, "no packet that a PostgreSQL connection begins with: length 1195725856, code 790644820"},
	{"mysql: TLS", MySQL, sslRequest + "\x16\x03", "", "\x16\x03", TLS, ""},
	{"mysql: plain", MySQL, mysqlPack(1, le32(clientProtocol41)+"…"), string(appendMySQLError(nil, 2, 3159, "this port takes connections with TLS only")), mysqlPack(1, le32(clientProtocol41)+"…"), More, "a login without TLS"},
	{"mysql: out of order", MySQL, mysqlPack(2, sslRequest[4:]), "", mysqlPack(2, sslRequest[4:]), More, errNotMySQL.Error()},
	{"mysql: a request that is too long", MySQL, mysqlPack(1, sslRequest[4:]+"x"), "", mysqlPack(1, sslRequest[4:]+"x"), More, errNotMySQL.Error()},
	{"smtp: TLS", SMTP, "EHLO me\r\nSTARTTLS\r\n", "250-mail.example\r\n250-ENHANCEDSTATUSCODES\r\n250 STARTTLS\r\n220 2.0.0 Ready to start TLS\r\n", "", TLS, ""},
	{"smtp: LMTP, in lower case, without carriage returns", SMTP, "lhlo me\nstarttls\n", "250-mail.example\r\n250-ENHANCEDSTATUSCODES\r\n250 STARTTLS\r\n220 2.0.0 Ready to start TLS\r\n", "", TLS, ""},
	{"smtp: commands behind STARTTLS", SMTP, "STARTTLS\r\nMAIL FROM:<a@b>\r\n", "220 2.0.0 Ready to start TLS\r\n", "MAIL FROM:<a@b>\r\n", TLS, ""},
	{"smtp: mail without TLS", SMTP, "HELO me\r\nMAIL FROM:<a@b>\r\nAUTH PLAIN AGEAYg==\r\nNOOP\r\nRSET\r\nEHLO\r\nSTARTTLS now\r\nQUIT\r\n",
		"250 mail.example\r\n530 5.7.0 Must issue a STARTTLS command first\r\n530 5.7.0 Must issue a STARTTLS command first\r\n250 2.0.0 OK\r\n250 2.0.0 OK\r\n" +
			"501 5.5.4 Say who you are\r\n501 5.5.4 STARTTLS takes no parameters\r\n221 2.0.0 Bye\r\n", "", Bye, ""},
	{"smtp: talk without an end", SMTP, strings.Repeat("NOOP\r\n", 20), strings.Repeat("250 2.0.0 OK\r\n", 16) + "421 4.7.0 Too many commands without STARTTLS\r\n", strings.Repeat("NOOP\r\n", 4), More, "16 commands, and none of them asks for TLS"},
	{"smtp: a line without an end", SMTP, strings.Repeat("x", maxLine), "500 5.5.6 Not a command line\r\n", strings.Repeat("x", maxLine), More, "no end of a line in 2048 bytes"},
	{"smtp: TLS at once", SMTP, "\x16\x03\x01", "500 5.5.6 Not a command line\r\n", "\x16\x03\x01", More, "TLS, where the protocol begins in the clear"},
	{"imap: TLS", IMAP, "a1 CAPABILITY\r\na2 starttls\r\n", "* CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED\r\na1 OK done\r\na2 OK Begin TLS negotiation now\r\n", "", TLS, ""},
	{"imap: login without TLS", IMAP, "a LOGIN u {3}\r\nb NOOP\r\nc SELECT INBOX\r\nd AUTHENTICATE PLAIN\r\ne LOGOUT\r\n",
		"a NO [PRIVACYREQUIRED] STARTTLS comes first\r\nb OK done\r\nc BAD STARTTLS comes first\r\nd NO [PRIVACYREQUIRED] STARTTLS comes first\r\n* BYE\r\ne OK done\r\n", "", Bye, ""},
	{"imap: tags that must not be repeated", IMAP, "* OK\r\n\r\na+ NOOP\r\n" + strings.Repeat("t", 65) + " NOOP\r\n\x1b[2J NOOP\r\n", strings.Repeat("* BAD a command begins with a tag\r\n", 5), "", More, ""},
	{"imap: behind STARTTLS", IMAP, "a STARTTLS\r\nb LOGIN x y\r\n", "a OK Begin TLS negotiation now\r\n", "b LOGIN x y\r\n", TLS, ""},
	{"pop3: TLS", POP3, "CAPA\r\nSTLS\r\n", "+OK\r\nSTLS\r\n.\r\n+OK Begin TLS negotiation\r\n", "", TLS, ""},
	{"pop3: login without TLS", POP3, "USER x\r\nPASS y\r\nQUIT\r\n", "-ERR STLS comes first\r\n-ERR STLS comes first\r\n+OK\r\n", "", Bye, ""},
	{"ldap: TLS", LDAP, startTLS + "\x16", ldapAnswer(1, ldapExtendedResponse, 0, "", oidStartTLS), "\x16", TLS, ""},
	{"ldap: TLS from the first byte on", LDAP, "\x16\x03", "", "\x16\x03", TLS, ""},
	{"ldap: bind, search, password, abandon without TLS", LDAP, ldapRequest(1, ldapBind, "\x02\x01\x03\x04\x00\x80\x00") + ldapRequest(2, ldapSearch, "x") +
		ldapRequest(3, ldapExtended, "\x80\x02\x31\x32") + ldapRequest(4, ldapAbandon, "\x03") + ldapRequest(5, ldapUnbind, ""),
		ldapAnswer(1, 0x61, 13, "StartTLS comes first", "") + ldapAnswer(2, 0x65, 13, "StartTLS comes first", "") + ldapAnswer(3, 0x78, 13, "StartTLS comes first", ""), "", Bye, ""},
	{"ldap: an answer", LDAP, ldapRequest(1, 0x61, ""), ldapAnswer(0, 0x78, 2, "", oidDisconnection), ldapRequest(1, 0x61, ""), More, "not a request of LDAP: tag 0x61, number 1"},
	{"ldap: 4 GiB", LDAP, "\x30\x84\xff\xff\xff\xff", ldapAnswer(0, 0x78, 2, "", oidDisconnection), "\x30\x84\xff\xff\xff\xff", More, "an element of 4294967295 bytes before TLS, of 4096 at most"},
	{"ldap: a length without an end", LDAP, "\x30\x80\x02", ldapAnswer(0, 0x78, 2, "", oidDisconnection), "\x30\x80\x02", More, errNotLDAP.Error()},
	{"ldap: a number below zero", LDAP, "\x30\x05\x02\x01\xff\x42\x00", ldapAnswer(0, 0x78, 2, "", oidDisconnection), "\x30\x05\x02\x01\xff\x42\x00", More, errNotLDAP.Error()},
	{"ldap: HTTP", LDAP, "GET /", ldapAnswer(0, 0x78, 2, "", oidDisconnection), "GET /", More, errNotLDAP.Error()},
}

func TestClientsAreAnswered(t *testing.T) {
	for _, tt := range serverCases {
		t.Run(tt.name, func(t *testing.T) {
			s := NewServer(tt.protocol)
			out, used, step, err := s.Next(nil, []byte(tt.says), host)
			if string(out) != tt.hears {
				t.Errorf("hears\n%q, wants\n%q", out, tt.hears)
			}
			if tt.says[used:] != tt.rest || step != tt.step {
				t.Errorf("%q is left, at step %d; wants %q at %d", tt.says[used:], step, tt.rest, tt.step)
			}
			if text := errorText(err); text != tt.fault {
				t.Errorf("error %q, wants %q", text, tt.fault)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// clientCases is what backends say, what they hear, and where that leads. Greetings end with a |.
var clientCases = []struct {
	name     string
	protocol Protocol
	asks     bool
	says     string
	hears    string
	step     Step
	fault    string
}{
	{"postgres: yes", Postgres, true, "S", packet(postgresSSL, ""), TLS, ""},
	{"postgres: no", Postgres, true, "N", packet(postgresSSL, ""), More, "it does not offer TLS (ssl = off)"},
	{"postgres: an error", Postgres, true, "E\x00\x00\x00\x10evil", packet(postgresSSL, ""), More, "it answers the SSLRequest with an error"},
	{"postgres: anything else", Postgres, true, "H", packet(postgresSSL, ""), More, "it answers the SSLRequest with the byte 0x48"},
	{"mysql: yes", MySQL, true, mysqlGreeting(0xfffe) + "|", string(appendSSLRequest(nil)), TLS, ""},
	{"mysql: no", MySQL, true, mysqlGreeting(0xf7fe), "", More, "it does not offer TLS"},
	{"mysql: greeting only", MySQL, false, mysqlGreeting(0xf7fe) + "|", "", Greeted, ""},
	{"mysql: too many connections", MySQL, true, mysqlPack(0, "\xff\x10\x04Too many connections"), "", More, "it takes no connection: error 1040"},
	{"mysql: a packet of 16 MiB", MySQL, true, "\xff\xff\xff\x00", "", More, "a packet of 16777215 bytes before TLS, of 1024 at most"},
	{"mysql: a version without an end", MySQL, true, mysqlPack(0, "\x0a8.0"), "", More, errNotMySQL.Error()},
	{"mysql: too short", MySQL, true, mysqlPack(0, "\x0a8.0\x00123412345678\x00"), "", More, errNotMySQL.Error()},
	{"smtp: yes", SMTP, true, "220-mx\r\n220 mx ESMTP\r\n|250-mx\r\n250-SIZE 1\r\n250 starttls\r\n220 go\r\n", "EHLO mail.example\r\nSTARTTLS\r\n", TLS, ""},
	{"smtp: the greeting only", SMTP, false, "220 mx\r\n|", "", Greeted, ""},
	{"smtp: LMTP", SMTP, true, "220 mx\r\n|500 what?\r\n250-mx\r\n250 STARTTLS\r\n220 go\r\n", "EHLO mail.example\r\nLHLO mail.example\r\nSTARTTLS\r\n", TLS, ""},
	{"smtp: no", SMTP, true, "220 mx\r\n|250-mx\r\n250 SIZE STARTTLS\r\n", "EHLO mail.example\r\n", More, "it does not offer STARTTLS"},
	{"smtp: not now", SMTP, true, "220 mx\r\n|250 STARTTLS\r\n454 4.7.0 later\r\n", "EHLO mail.example\r\nSTARTTLS\r\n", More, `it says "454 4.7.0 later"`},
	{"smtp: no service", SMTP, false, "554 go away\r\n", "", More, `it says "554 go away"`},
	{"smtp: a reply with two codes", SMTP, true, "220-mx\r\n250 mx\r\n", "", More, `not a reply of SMTP: "250 mx"`},
	{"smtp: a reply without an end", SMTP, true, strings.Repeat("220-\r\n", maxLines), "", More, "more than 200 lines, and TLS has not begun"},
	{"smtp: a line without an end", SMTP, true, strings.Repeat("2", maxLine), "", More, "no end of a line in 2048 bytes"},
	{"imap: yes", IMAP, true, "* OK hi\r\n|* CAPABILITY IMAP4rev1\r\ntls OK go\r\n", imapAsk, TLS, ""},
	{"imap: no", IMAP, true, "* OK hi\r\n|tls BAD what?\r\n", imapAsk, More, `it says "tls BAD what?"`},
	{"imap: somebody already", IMAP, true, "* PREAUTH hi\r\n", "", More, `it greets with "* PREAUTH hi"`},
	{"imap: somebody already, without TLS", IMAP, false, "* PREAUTH hi\r\n", "", More, `it greets with "* PREAUTH hi"`},
	{"imap: goodbye", IMAP, true, "* OK hi\r\n|* BYE\r\n", imapAsk, More, `it says "* BYE"`},
	{"pop3: yes", POP3, true, "+OK <1.2@x>\r\n|+OK\r\n", "STLS\r\n", TLS, ""},
	{"pop3: no", POP3, true, "+OK\r\n|-ERR what?\r\n", "STLS\r\n", More, `it says "-ERR what?"`},
	{"ldap: yes", LDAP, true, ldapAnswer(1, 0x78, 0, "", oidStartTLS), startTLS, TLS, ""},
	{"ldap: no", LDAP, true, ldapAnswer(1, 0x78, 2, "", ""), startTLS, More, "it refuses StartTLS with the result code 2"},
	{"ldap: goodbye", LDAP, true, ldapAnswer(0, 0x78, 52, "", oidDisconnection), startTLS, More, "not an answer to StartTLS: tag 0x78, number 0"},
	{"ldap: something else", LDAP, true, "220 mx\r\n", startTLS, More, errNotLDAP.Error()},
}

func TestBackendsAreAsked(t *testing.T) {
	for _, tt := range clientCases {
		t.Run(tt.name, func(t *testing.T) {
			greeting, rest, greets := strings.Cut(tt.says, "|")
			c := NewClient(tt.protocol, tt.asks)
			b := []byte(greeting + rest)
			out := c.Start(nil)
			out, used, step, err := c.Next(out, b, host)
			if greets && (step != Greeted || used != len(greeting)) {
				t.Fatalf("step %d behind %d bytes, and the greeting has %d: %v", step, used, len(greeting), err)
			}
			if tt.step != Greeted && step == Greeted {
				out, used, step, err = c.Next(out, b[used:], host)
				used += len(greeting)
			}
			if string(out) != tt.hears || step != tt.step || errorText(err) != tt.fault {
				t.Errorf("hears %q, step %d, error %q; wants %q, %d, %q", out, step, errorText(err), tt.hears, tt.step, tt.fault)
			}
			if err == nil && used != len(b) {
				t.Errorf("%d of %d bytes are used up", used, len(b))
			}
		})
	}
}

// play has a conversation in the pieces that cuts says, and returns all that is to be seen of it.
func play(next func(dst, b []byte) ([]byte, int, Step, error), says []byte, cuts *rand.Rand) (out []byte, rest string, step Step, fault string) {
	var b []byte
	for {
		var used int
		var err error
		out, used, step, err = next(out, b)
		b = b[used:]
		if err != nil || step != More && step != Greeted || used == 0 && len(says) == 0 && step == More {
			return out, string(b) + string(says), step, errorText(err)
		}
		if step == Greeted {
			out = append(out, '|')
			continue
		}
		n := len(says)
		if cuts != nil && n > 0 {
			n = 1 + cuts.IntN(min(n, 1+cuts.IntN(9)))
		}
		b, says = append(b, says[:n]...), says[n:]
	}
}

// FuzzSplitAnywhere: how the bytes come in pieces changes nothing, of what is answered and of how it ends.
func FuzzSplitAnywhere(f *testing.F) {
	for _, tt := range serverCases {
		f.Add(uint8(tt.protocol), false, []byte(tt.says), uint64(1))
	}
	for _, tt := range clientCases {
		f.Add(uint8(tt.protocol), true, []byte(strings.Replace(tt.says, "|", "", 1)), uint64(2))
	}
	f.Fuzz(func(t *testing.T, protocol uint8, client bool, says []byte, seed uint64) {
		p := Protocol(protocol)
		if p == Off || p >= protocols {
			return
		}
		player := func() func(dst, b []byte) ([]byte, int, Step, error) {
			if client {
				c := NewClient(p, true)
				return func(dst, b []byte) ([]byte, int, Step, error) { return c.Next(dst, b, host) }
			}
			s := NewServer(p)
			return func(dst, b []byte) ([]byte, int, Step, error) { return s.Next(dst, b, host) }
		}
		out, rest, step, fault := play(player(), says, nil)
		out2, rest2, step2, fault2 := play(player(), says, rand.New(rand.NewPCG(seed, 0)))
		if !bytes.Equal(out, out2) || rest != rest2 || step != step2 || fault != fault2 {
			t.Errorf("whole:  %q, left %q, step %d, %q\npieces: %q, left %q, step %d, %q", out, rest, step, fault, out2, rest2, step2, fault2)
		}
		if len(out) > 16*(256+len(says)) {
			t.Errorf("%d bytes are answered to %d", len(out), len(says))
		}
	})
}

// TestMySQLBridgeCounts is a login with a change of plugin, and a command behind it, in every split of the bytes.
func TestMySQLBridgeCounts(t *testing.T) {
	caps := uint32(clientProtocol41 | clientSecure)
	type says struct {
		up       bool
		say, get string
	}
	talk := []says{
		{true, mysqlPack(2, le32(caps|clientSSL)+"login"), mysqlPack(1, le32(caps)+"login")},
		{false, mysqlPack(2, "\xfecaching_sha2_password\x00salt"), mysqlPack(3, "\xfecaching_sha2_password\x00salt")},
		{true, mysqlPack(4, ""), mysqlPack(3, "")},
		{false, mysqlPack(4, ""), mysqlPack(5, "")},
		{false, mysqlPack(5, "\x01\x03"), mysqlPack(6, "\x01\x03")},
		{true, mysqlPack(0, "\x03pipelined"), mysqlPack(0, "\x03pipelined")},
		{false, mysqlPack(6, "\x00\x00\x00\x02\x00\x00\x00"), mysqlPack(7, "\x00\x00\x00\x02\x00\x00\x00")},
		{true, mysqlPack(0, "\x03select 1"), mysqlPack(0, "\x03select 1")},
		{false, mysqlPack(1, "\x01"), mysqlPack(1, "\x01")},
	}
	for piece := 1; piece < 60; piece++ {
		var m MySQLBridge
		for i, s := range talk {
			var got []byte
			for b := []byte(s.say); len(b) > 0; {
				n := min(piece, len(b))
				var err error
				if s.up {
					got, err = m.Up(got, b[:n])
				} else {
					got = m.Down(got, b[:n])
				}
				if err != nil {
					t.Fatal(err)
				}
				b = b[n:]
			}
			if string(got) != s.get {
				t.Fatalf("pieces of %d, packet %d: %q became %q, wants %q", piece, i, s.say, got, s.get)
			}
			if m.Over() != (i >= 6) {
				t.Fatalf("packet %d: over is %v", i, m.Over())
			}
		}
	}
}

func TestMySQLBridgeGivesBackHalfAHeader(t *testing.T) {
	var m MySQLBridge
	up, err := m.Up(nil, []byte(mysqlPack(2, le32(clientSSL))+"\x05\x00"))
	if err != nil || string(up) != mysqlPack(1, le32(0)) {
		t.Fatalf("%q, %v", up, err)
	}
	m.Down(nil, []byte(mysqlPack(2, "\x00")))
	if rest := m.Rest(nil); !m.Over() || string(rest) != "\x05\x00" {
		t.Errorf("over %v, rest %q", m.Over(), rest)
	}
}

func TestMySQLBridgeTakesNoOtherLogin(t *testing.T) {
	for _, b := range []string{mysqlPack(1, le32(0)), mysqlPack(2, "abc"), mysqlPack(0, "\x03select 1")} {
		if _, err := new(MySQLBridge).Up(nil, []byte(b)); err == nil {
			t.Errorf("%q is taken", b)
		}
	}
}

func TestMySQLGreetingOffersTLS(t *testing.T) {
	plain, encrypted := mysqlGreeting(0xf7fe), mysqlGreeting(0xfffe)
	if got := MySQLGreeting([]byte(plain)); string(got) != encrypted {
		t.Errorf("%q", got)
	}
	if got := MySQLRefusal(nil, "nobody"); string(got) != mysqlPack(0, "\xff\x10\x04#HY000nobody") {
		t.Errorf("%q", got)
	}
}

// TestUpgradeSpeaks runs Upgrade against a Server of ours, and against one that says more than it may.
func TestUpgradeSpeaks(t *testing.T) {
	for p := Postgres; p < protocols; p++ {
		t.Run(p.String(), func(t *testing.T) {
			for _, more := range []string{"", "injected\r\n"} {
				ours, theirs := net.Pipe()
				ours.SetDeadline(time.Now().Add(time.Minute))
				go serveUpgrade(theirs, p, more)
				err := Upgrade(ours, p, host)
				if more == "" && err != nil || more != "" && p != MySQL && !errors.Is(err, ErrBehind) {
					t.Errorf("with %q behind: %v", more, err)
				}
				ours.Close()
			}
		})
	}
}

// serveUpgrade answers until TLS, and writes more in one piece with the last answer.
func serveUpgrade(c net.Conn, p Protocol, more string) {
	defer c.Close()
	s := NewServer(p)
	out := s.Greeting(nil, host)
	if p == MySQL {
		out = append(out, mysqlGreeting(0xfffe)...)
	}
	var b [512]byte
	have := 0
	for {
		if len(out) > 0 {
			if _, err := c.Write(out); err != nil {
				return
			}
		}
		n, err := c.Read(b[have:])
		if err != nil {
			return
		}
		have += n
		var used int
		var step Step
		out, used, step, _ = s.Next(out[:0], b[:have], host)
		have = copy(b[:], b[used:have])
		if step == TLS {
			c.Write(append(out, more...))
			return
		}
	}
}

func TestUpgradeSaysWhyNot(t *testing.T) {
	ours, theirs := net.Pipe()
	go func() {
		theirs.Read(make([]byte, 8))
		theirs.Write([]byte("N"))
		theirs.Close()
	}()
	if err := Upgrade(ours, Postgres, host); err == nil || !strings.Contains(err.Error(), "ssl = off") {
		t.Error(err)
	}
	if err := Upgrade(ours, Postgres, host); err == nil {
		t.Error("a connection that is closed was upgraded")
	}
}

// TestWordsAreTheMaps: there are as many protocols as the map has words.
func TestWordsAreTheMaps(t *testing.T) {
	seen := map[string]bool{}
	for p := range protocols {
		seen[p.String()] = true
	}
	if len(seen) != int(protocols) || !seen["ldap"] || !seen["off"] {
		t.Error(seen)
	}
}

// TestServerIsSmall: it is part of every connection.
func TestServerIsSmall(t *testing.T) {
	if n := unsafe.Sizeof(Server{}); n > 4 {
		t.Errorf("%d bytes", n)
	}
}
