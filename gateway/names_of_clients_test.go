// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// helloFor is a hello of crypto/tls with these bytes as its name.
func helloFor(t testing.TB, name string) []byte {
	t.Helper()
	b := clientHello(t, nil)
	const asked = "edge.test"
	at := bytes.Index(b, []byte(asked))
	rest := at + len(asked)
	more := len(name) - len(asked)
	grow := func(at, size int) { // a length field
		n := more
		for i := at + size - 1; i >= at; i-- {
			n += int(b[i])
			b[i], n = byte(n), n>>8
		}
	}
	grow(at-2, 2) // of the name, of the list, of the extension
	grow(at-5, 2)
	grow(at-7, 2)
	extensions := 5 + 4 + 2 + 32
	extensions += 1 + int(b[extensions])
	extensions += 2 + int(b[extensions])<<8 + int(b[extensions+1])
	extensions += 1 + int(b[extensions])
	grow(extensions, 2)
	grow(6, 3)
	message := append(append(append([]byte(nil), b[5:at]...), name...), b[rest:]...)
	var records []byte
	for part := range slices.Chunk(message, 16384) {
		records = append(append(records, 22, 3, 1, byte(len(part)>>8), byte(len(part))), part...)
	}
	return records
}

// TestNamesThatNoHostHasAreRefused before a rule, a certificate or a backend hears of them. A name of 21,900 bytes made
// the PROXY header too long, and the client's first bytes stood in its place.
func TestNamesThatNoHostHasAreRefused(t *testing.T) {
	w := newWitness(t)
	b := start(t, ":{0} edge.test *.wild.test -> "+w.addr+" proxy=v2\n:{1} -> "+w.addr+" proxy=v2 mode=pass")
	for _, name := range []string{
		strings.Repeat("\xff", 21900) + ".wild.test", strings.Repeat("a", 64) + ".wild.test", strings.Repeat("a.", 130) + "wild.test",
		"a\x00.wild.test", "b\xc3\xbccher.wild.test", "a b.wild.test", "\u202ea.wild.test", "\x9b31m.wild.test", "a\r\nb.wild.test",
		"*.wild.test", ".wild.test", "a..wild.test", "edge.test..", ".", "user@edge.test", "edge.test:443", "edge.test/", `edge.test\`,
	} {
		for i := range 2 {
			c := b.dial(t, i)
			if _, err := c.Write(helloFor(t, name)); err != nil {
				t.Fatal(err)
			}
			answer, _ := io.ReadAll(c)
			_ = c.Close()
			l := b.lineOf(t, c)
			if string(answer) != "\x15\x03\x03\x00\x02\x02\x70" || l.Outcome != "unknown_name" || l.Alert != "unrecognized_name" || l.Stage != "match" {
				t.Errorf("%.40q: answer %x, %s", name, answer, l)
			}
			if len(l.text) > 1000 || l.SNI != "" || strings.ContainsFunc(l.text, func(r rune) bool { return r > unicode.MaxASCII }) {
				t.Errorf("%.40q: a line of %d bytes: %.300s", name, len(l.text), l.text)
			}
		}
	}
	select {
	case y := <-w.conns:
		y.end(t)
		t.Errorf("a backend was told %.80q", y.data)
	default:
	}
}

// TestLongestNameIsServed, and the backend is told of it.
func TestLongestNameIsServed(t *testing.T) {
	w := newWitness(t)
	b := start(t, ":{0} *.wild.test -> "+w.addr+" proxy=v2 mode=pass")
	name := strings.Repeat(strings.Repeat("a", 61)+".", 4)[:253-len(".wild.test")] + ".wild.test"
	c := b.dial(t, 0)
	hello := helloFor(t, strings.ToUpper(name))
	if _, err := c.Write(hello); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	y := w.next(t)
	y.end(t)
	if !bytes.HasPrefix(y.data, []byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11")) || !bytes.Contains(y.data, []byte(name)) || !bytes.HasSuffix(y.data, hello) {
		t.Errorf("the backend is told %.600q", y.data)
	}
	_ = y.conn.Close()
	_ = c.Close()
	b.lineOf(t, c).expect(t, logLine{SNI: name})
}
