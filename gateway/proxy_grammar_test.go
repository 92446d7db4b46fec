// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/pires/go-proxyproto"
)

// v2Bytes is a header of version 2 with these bytes 13 and 14 and this rest.
func v2Bytes(command, family byte, rest ...byte) string {
	b := append([]byte(nil), proxyproto.SIGV2...)
	b = append(b, command, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(rest)))
	return string(append(b, rest...))
}

// TestProxyHeadersToTheLetter (PROXY protocol, sections 2.1 and 2.2): what is none ends the connection, and no backend hears
// of it; what is one says where the client comes from.
func TestProxyHeadersToTheLetter(t *testing.T) {
	const bad, peer = "", "127.0.0.1" // of a header that names nobody the client is the peer
	four := []byte{192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 1, 187}
	six := append(append(net.ParseIP("2001:db8::7").To16(), net.ParseIP("2001:db8::1").To16()...), 0x12, 0x67, 1, 187)
	unix := append(append([]byte("/run/a"), make([]byte, 102)...), make([]byte, 108)...)
	with := func(b []byte, tlvs ...byte) []byte { return append(append([]byte(nil), b...), tlvs...) }
	cut := func(s string, to byte) string { b := []byte(s); b[15] = to; return string(b) }
	ssl := func(value ...byte) string {
		return v2Bytes(0x21, 0x11, with(four, with([]byte{0x20, 0, byte(len(value))}, value...)...)...)
	}
	longest := "PROXY UNKNOWN " + strings.Repeat("f", 107-16) + "\r\n"
	var reached atomic.Int64
	backend := serve(t, func(c *net.TCPConn) { reached.Add(1); _, _ = io.Copy(c, c) })
	b := start(t, ":{0} -> "+backend+" mode=tcp", "PROXY_FROM=127.0.0.1")
	good := int64(0)
	for name, c := range map[string]struct{ header, from string }{
		"v1 TCP4":                         {"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n", "192.0.2.7:4711"},
		"v1 TCP6":                         {"PROXY TCP6 2001:DB8::7 2001:db8::1 4711 443\r\n", "[2001:db8::7]:4711"},
		"v1 TCP6, as long as it can be":   {"PROXY TCP6 2001:0db8:0000:0000:0000:0000:0000:0007 2001:0db8:0000:0000:0000:0000:0000:0001 65535 65535\r\n", "[2001:db8::7]:65535"},
		"v1 ports 0":                      {"PROXY TCP4 192.0.2.7 192.0.2.1 0 0\r\n", "192.0.2.7:0"},
		"v1 UNKNOWN":                      {"PROXY UNKNOWN\r\n", peer},
		"v1 UNKNOWN and more":             {"PROXY UNKNOWN whatever  it\tsays\r\n", peer},
		"v1 of 107 bytes":                 {longest, peer},
		"v1 of 108 bytes":                 {"PROXY UNKNOWN f" + longest[14:], bad},
		"v1 in lower case":                {"proxy TCP4 192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 family in lower case":         {"PROXY tcp4 192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 UDP4":                         {"PROXY UDP4 192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 two spaces":                   {"PROXY  TCP4 192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 two spaces between addresses": {"PROXY TCP4 192.0.2.7  192.0.2.1 4711 443\r\n", bad},
		"v1 space at the end":             {"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443 \r\n", bad},
		"v1 tab":                          {"PROXY TCP4\t192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 one word too many":            {"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443 1\r\n", bad},
		"v1 one word too few":             {"PROXY TCP4 192.0.2.7 192.0.2.1 4711\r\n", bad},
		"v1 no CR":                        {"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\n", bad},
		"v1 CR within":                    {"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\r\n", bad},
		"v1 leading zero in a port":       {"PROXY TCP4 192.0.2.7 192.0.2.1 04711 443\r\n", bad},
		"v1 port 65536":                   {"PROXY TCP4 192.0.2.7 192.0.2.1 65536 443\r\n", bad},
		"v1 port with a sign":             {"PROXY TCP4 192.0.2.7 192.0.2.1 +4711 443\r\n", bad},
		"v1 port in hexadecimal":          {"PROXY TCP4 192.0.2.7 192.0.2.1 0x1 443\r\n", bad},
		"v1 no port":                      {"PROXY TCP4 192.0.2.7 192.0.2.1  443\r\n", bad},
		"v1 leading zero in an address":   {"PROXY TCP4 192.0.02.7 192.0.2.1 4711 443\r\n", bad},
		"v1 address of three numbers":     {"PROXY TCP4 192.0.7 192.0.2.1 4711 443\r\n", bad},
		"v1 IPv6 in TCP4":                 {"PROXY TCP4 2001:db8::7 2001:db8::1 4711 443\r\n", bad},
		"v1 mapped IPv4 in TCP4":          {"PROXY TCP4 ::ffff:192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 IPv4 in TCP6":                 {"PROXY TCP6 192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 a zone":                       {"PROXY TCP6 fe80::7%lo fe80::1 4711 443\r\n", bad},
		"v1 brackets":                     {"PROXY TCP6 [2001:db8::7] 2001:db8::1 4711 443\r\n", bad},
		"v1 a name":                       {"PROXY TCP4 localhost 192.0.2.1 4711 443\r\n", bad},
		"v1 another word":                 {"PROXYTCP4 192.0.2.7 192.0.2.1 4711 443\r\n", bad},
		"v1 another word without an end":  {"PROXYjunk", bad},

		"v2 TCP4":                            {v2Bytes(0x21, 0x11, four...), "192.0.2.7:4711"},
		"v2 TCP6":                            {v2Bytes(0x21, 0x21, six...), "[2001:db8::7]:4711"},
		"v2 UNIX":                            {v2Bytes(0x21, 0x31, unix...), peer},
		"v2 UNSPEC":                          {v2Bytes(0x21, 0), peer},
		"v2 UNSPEC with a TLV":               {v2Bytes(0x21, 0, 4, 0, 1, 0), peer},
		"v2 LOCAL":                           {v2Bytes(0x20, 0), peer},
		"v2 LOCAL with addresses":            {v2Bytes(0x20, 0x11, four...), peer},
		"v2 LOCAL without its addresses":     {v2Bytes(0x20, 0x11), peer},
		"v2 LOCAL of another family":         {v2Bytes(0x20, 0x77, 1, 2, 3), peer},
		"v2 TLVs":                            {v2Bytes(0x21, 0x11, with(four, 4, 0, 0, 2, 0, 1, 'a')...), "192.0.2.7:4711"},
		"v2 TLS":                             {ssl(1, 0, 0, 0, 0, 0x21, 0, 1, 'x'), "192.0.2.7:4711"},
		"v2 TLS without parts":               {ssl(0, 0, 0, 0, 1), "192.0.2.7:4711"},
		"v2 version 1":                       {v2Bytes(0x11, 0x11, four...), bad},
		"v2 version 3":                       {v2Bytes(0x31, 0x11, four...), bad},
		"v2 command 2":                       {v2Bytes(0x22, 0x11, four...), bad},
		"v2 command 15":                      {v2Bytes(0x2f, 0x11, four...), bad},
		"v2 family 4":                        {v2Bytes(0x21, 0x41, four...), bad},
		"v2 IPv4, protocol 0":                {v2Bytes(0x21, 0x10, four...), bad},
		"v2 IPv4, protocol 3":                {v2Bytes(0x21, 0x13, four...), bad},
		"v2 UNSPEC, protocol 1":              {v2Bytes(0x21, 0x01), bad},
		"v2 UDP4":                            {v2Bytes(0x21, 0x12, four...), bad},
		"v2 UDP6":                            {v2Bytes(0x21, 0x22, six...), bad},
		"v2 UNIX datagrams":                  {v2Bytes(0x21, 0x32, unix...), bad},
		"v2 TCP4 of 11 bytes":                {v2Bytes(0x21, 0x11, four[:11]...), bad},
		"v2 TCP6 of 35 bytes":                {v2Bytes(0x21, 0x21, six[:35]...), bad},
		"v2 TCP6 of 12 bytes":                {v2Bytes(0x21, 0x21, four...), bad},
		"v2 UNIX of 215 bytes":               {v2Bytes(0x21, 0x31, unix[:215]...), bad},
		"v2 TCP4 of no bytes":                {v2Bytes(0x21, 0x11), bad},
		"v2 TLV of two bytes":                {v2Bytes(0x21, 0x11, with(four, 2, 0)...), bad},
		"v2 TLV beyond the header":           {v2Bytes(0x21, 0x11, with(four, 2, 0, 2, 'a')...), bad},
		"v2 TLV of 65,535 bytes":             {v2Bytes(0x21, 0x11, with(four, 2, 255, 255, 'a')...), bad},
		"v2 padding beyond the header":       {v2Bytes(0x21, 0x11, with(four, 4, 0, 9)...), bad},
		"v2 UNSPEC with anything in it":      {v2Bytes(0x21, 0, 2, 0, 2, 'a'), peer},
		"v2 CRC32C of three bytes":           {v2Bytes(0x21, 0x11, with(four, 3, 0, 3, 0, 0, 0)...), bad},
		"v2 TLS of four bytes":               {ssl(1, 0, 0, 0), bad},
		"v2 TLS part of two bytes":           {ssl(1, 0, 0, 0, 0, 0x21, 0), bad},
		"v2 TLS part beyond it":              {ssl(1, 0, 0, 0, 0, 0x21, 0, 2, 'x'), bad},
		"v2 TLS part that takes the next":    {v2Bytes(0x21, 0x11, with(four, 0x20, 0, 8, 1, 0, 0, 0, 0, 0x21, 0, 3, 2, 0, 0)...), bad},
		"v2 of 65,551 bytes, not sent":       {string(proxyproto.SIGV2) + "\x21\x11\xff\xff", bad},
		"v2 of 4,113 bytes, not sent":        {string(proxyproto.SIGV2) + "\x21\x11\x10\x01", bad},
		"v2 LOCAL of 65,551 bytes, not sent": {string(proxyproto.SIGV2) + "\x20\x00\xff\xff", bad},
		"v2 shorter than its addresses":      {cut(v2Bytes(0x21, 0x11, four...), 4), bad},
		"v2 with another signature":          {strings.Replace(v2Bytes(0x21, 0x11, four...), "QUIT", "quit", 1), bad},
	} {
		t.Run(name, func(t *testing.T) {
			conn := b.dial(t, 0)
			_, _ = io.WriteString(conn, c.header)
			if c.from == bad {
				if got, err := io.ReadAll(conn); len(got) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%q, %v", got, err)
				}
				_ = conn.Close()
				b.lineOf(t, conn).expect(t, logLine{Level: "info", Outcome: "bad_proxy", Client: conn.LocalAddr().String(), Stage: "proxy_header"})
				return
			}
			good++
			exchange(t, conn, []byte("behind it"))
			_ = conn.Close()
			if c.from == peer {
				c.from = conn.LocalAddr().String()
			}
			b.lineOf(t, conn).expect(t, logLine{Outcome: "ok", Client: c.from, BytesUp: int64(len("behind it"))})
		})
	}
	if n := reached.Load(); n != good {
		t.Errorf("the backend heard of %d connections, want %d", n, good)
	}
}
