// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// Attacks with the first message of a client: names that are none, hellos that cost, and clients that never answer.
var helloAttacks = []attack{
	{"name-longer-than-a-name", "a name that is too long for the PROXY header makes the gateway leave the header out", longName},
	{"name-that-is-an-address", "bytes that no host name has reach logs, backends and certificates", oddNames},
	{"silent-handshakes-many-addresses", "clients that never answer the gateway's hello shut out honest ones", silentFromMany},
	{"silent-handshakes-one-address", "one address that never answers the gateway's hello shuts out all others", silentFromOne},
	{"hellos-with-thousands-of-ciphers", "hellos with 30,000 cipher suites make established connections wait", bigHellos},
	{"hello-a-byte-at-a-time", "hellos in pieces cost more than hellos", helloInPieces},
	{"first-record-is-none", "a client that begins with another record gets no alert", firstRecord},
}

// hello is a ClientHello that crypto/tls would send for the name, as one record.
func hello(name string) ([]byte, error) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() {
		_ = tls.Client(theirs, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
		theirs.Close()
	}()
	_ = ours.SetDeadline(time.Now().Add(patience))
	header := make([]byte, 5)
	if _, err := io.ReadFull(ours, header); err != nil {
		return nil, err
	}
	body := make([]byte, binary.BigEndian.Uint16(header[3:]))
	_, err := io.ReadFull(ours, body)
	return append(header, body...), err
}

// madeHello is a TLS 1.2 ClientHello of our own making, in as many records as it needs.
func madeHello(name []byte, ciphers int) []byte {
	var body bytes.Buffer
	u16 := func(n int) { _ = binary.Write(&body, binary.BigEndian, uint16(n)) }
	body.Write([]byte{3, 3})
	body.Write(make([]byte, 32))
	body.WriteByte(0)
	u16(2 * (ciphers + 1))
	u16(0xc02b) // ECDHE-ECDSA-AES128-GCM-SHA256
	for i := range ciphers {
		u16(0x1000 + i)
	}
	body.Write([]byte{1, 0})
	groups := []byte{0, 10, 0, 4, 0, 2, 0, 23}          // supported_groups: P-256
	signatures := []byte{0, 13, 0, 6, 0, 4, 4, 3, 8, 4} // signature_algorithms: ECDSA P-256, RSA-PSS
	u16(9 + len(name) + len(groups) + len(signatures))  // extensions
	u16(0)                                              // server_name
	u16(5 + len(name))                                  // its length
	u16(3 + len(name))                                  // of its list
	body.WriteByte(0)                                   // a host name
	u16(len(name))                                      //
	body.Write(name)                                    //
	body.Write(append(append([]byte(nil), groups...), signatures...))
	message := append([]byte{1, byte(body.Len() >> 16), byte(body.Len() >> 8), byte(body.Len())}, body.Bytes()...)
	var out []byte
	for len(message) > 0 {
		n := min(len(message), 1<<14)
		out = append(append(out, 22, 3, 1, byte(n>>8), byte(n)), message[:n]...)
		message = message[n:]
	}
	return out
}

func longName(s *stage) error {
	heard := make(chan []byte, 16)
	back, err := s.serve(func(c net.Conn) {
		b := make([]byte, 1<<16)
		n, _ := c.Read(b)
		heard <- b[:n]
	})
	if err != nil {
		return err
	}
	e, err := s.start(fmt.Sprintf(":{0} *.a.example -> %s proxy=v2\n:{1} *.a.example -> %s proxy=v2 mode=pass", back, back))
	if err != nil {
		return err
	}
	names := [][]byte{
		append(bytes.Repeat([]byte{0xff}, 21900), ".a.example"...),
		append(bytes.Repeat([]byte("a"), 254-10), ".a.example"...),
		append(bytes.Repeat([]byte("a"), 64), ".a.example"...),
		append(bytes.Repeat([]byte("a."), 6000), "a.example"...),
	}
	for i := range e.addrs {
		for _, name := range names {
			c, err := e.dial(i)
			if err != nil {
				return err
			}
			_, _ = c.Write(madeHello(name, 0))
			answer, _ := io.ReadAll(c)
			c.Close()
			if !bytes.Equal(answer, []byte{21, 3, 3, 0, 2, 2, 112}) && !bytes.Equal(answer, []byte{21, 3, 1, 0, 2, 2, 112}) {
				return fmt.Errorf("a name of %d bytes is answered with % x, not unrecognized_name", len(name), answer[:min(len(answer), 16)])
			}
			l, err := e.lineOf(c.LocalAddr())
			if err != nil {
				return err
			}
			if l.str("outcome") != "unknown_name" || len(fmt.Sprint(l)) > 2000 {
				return fmt.Errorf("a name of %d bytes: outcome %s, a line of %d bytes", len(name), l.str("outcome"), len(fmt.Sprint(l)))
			}
		}
	}
	select {
	case b := <-heard:
		return fmt.Errorf("the backend heard %q", b[:min(len(b), 40)])
	default:
		return nil
	}
}

func oddNames(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo}")
	if err != nil {
		return err
	}
	for _, name := range []string{"a.example\x00.evil", "a\u202eexample", "a.example\r\nevil: 1", "\x1b[2J", "a..example", ".a.example", "a.example..", "", "a b"} {
		c, err := e.dial(0)
		if err != nil {
			return err
		}
		_, _ = c.Write(madeHello([]byte(name), 0))
		answer, _ := io.ReadAll(c)
		c.Close()
		if len(answer) != 7 || answer[0] != 21 {
			return fmt.Errorf("the name %q is answered with % x, not with an alert", name, answer[:min(len(answer), 16)])
		}
	}
	for _, bad := range []string{"\u202e", "\x1b", "\u0085"} {
		if strings.Contains(e.said(), bad) {
			return fmt.Errorf("the log has the raw character %q", bad)
		}
	}
	return nil
}

func silentFromMany(s *stage) error { return silentHandshakes(s, 1000) }
func silentFromOne(s *stage) error  { return silentHandshakes(s, 1) }

// silentHandshakes has many clients begin a handshake and fall silent, and honest ones come meanwhile.
func silentHandshakes(s *stage, addresses int) error {
	e, err := s.start(":{0} a.example -> {echo}", "LOG_FORMAT=json")
	if err != nil {
		return err
	}
	perSecond := s.scaled(500, 2000)
	what := fmt.Sprintf("slowest honest client beside %d silent hellos/s from %d addresses", perSecond, addresses)
	slowest, err := s.beside(e, what, func(e *edge) (time.Duration, error) {
		return e.honestBesideSilence(addresses, perSecond, time.Duration(s.scaled(2, 10))*time.Second)
	})
	// The figure that is promised is 250 ms on a quiet machine; here others may work beside it.
	if limit := 2 * time.Second; err == nil && slowest > limit {
		return fmt.Errorf("an honest client waited for %v", slowest)
	}
	return err
}

// honestBesideSilence is how long the slowest of some honest clients takes beside those who fall silent.
func (e *edge) honestBesideSilence(addresses, perSecond int, span time.Duration) (slowest time.Duration, err error) {
	first, err := hello("a.example")
	if err != nil {
		return 0, err
	}
	stop := make(chan struct{})
	var attackers sync.WaitGroup
	attackers.Go(func() { e.beSilent(first, addresses, perSecond, stop) })
	defer attackers.Wait()
	defer close(stop)
	time.Sleep(span / 2) // until the places are taken
	const clients = 40
	for i := range clients {
		took, err := e.honest("127.9.9.9", 0, "a.example")
		if err != nil {
			return 0, fmt.Errorf("honest client %d of %d is not served: %w", i+1, clients, err)
		}
		slowest = max(slowest, took)
		time.Sleep(span / 2 / clients)
	}
	return slowest, nil
}

// beSilent connects perSecond times a second from so many addresses, says hello, and nothing more. It holds as many
// connections as come in five seconds.
func (e *edge) beSilent(first []byte, addresses, perSecond int, stop chan struct{}) {
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	ticker := time.NewTicker(time.Second / time.Duration(perSecond))
	defer ticker.Stop()
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		from := i % addresses
		c, err := e.dialFrom(fmt.Sprintf("127.1.%d.%d", from/250, from%250+1), 0)
		if err != nil {
			continue
		}
		_, _ = c.Write(first)
		if open = append(open, c); len(open) > 5*perSecond {
			open[0].Close()
			open = open[1:]
		}
	}
}

func bigHellos(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo}")
	if err != nil {
		return err
	}
	big := madeHello([]byte("unknown.example"), 30000)
	each, err := s.beside(e, fmt.Sprintf("processor time for a hello of %d bytes, system calls included", len(big)), func(e *edge) (time.Duration, error) {
		return e.costOf(big)
	})
	if err != nil {
		return err
	}
	// To copy 60 KB out of the kernel and to follow them is 100 us; what made loops stop cost 6 ms.
	if limit := time.Millisecond; each > limit {
		return fmt.Errorf("a hello of %d bytes costs %v", len(big), each)
	}
	_, err = e.honest("", 0, "a.example")
	return err
}

// costOf is the processor time that a hello costs which leads nowhere.
func (e *edge) costOf(hello []byte) (time.Duration, error) {
	before, err := e.cpu()
	if err != nil {
		return 0, err
	}
	const hellos = 200
	for range hellos {
		c, err := e.dial(0)
		if err != nil {
			return 0, err
		}
		_, _ = c.Write(hello)
		_ = c.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
		c.Close()
	}
	after, err := e.cpu()
	return (after - before) / hellos, err
}

func helloInPieces(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo}")
	if err != nil {
		return err
	}
	raw, err := e.dial(0)
	if err != nil {
		return err
	}
	defer raw.Close()
	return echoes(tls.Client(&drip{Conn: raw, left: 600}, s.client("a.example")), []byte("slow"))
}

// drip sends its first bytes one at a time.
type drip struct {
	net.Conn
	left int
}

func (d *drip) Write(p []byte) (int, error) {
	for i := range p {
		if d.left == 0 {
			n, err := d.Conn.Write(p[i:])
			return i + n, err
		}
		d.left--
		if _, err := d.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

func firstRecord(s *stage) error {
	e, err := s.start(":{0} a.example -> demo")
	if err != nil {
		return err
	}
	for what, first := range map[string][]byte{
		"ChangeCipherSpec": {20, 3, 3, 0, 1, 1},
		"data":             {23, 3, 3, 0, 1, 1},
		"an unknown type":  {99, 3, 3, 0, 1, 1},
	} {
		c, err := e.dial(0)
		if err != nil {
			return err
		}
		_, _ = c.Write(first)
		answer, _ := io.ReadAll(c)
		c.Close()
		if len(answer) != 7 || answer[6] != 10 { // unexpected_message
			return fmt.Errorf("%s first is answered with % x, not unexpected_message", what, answer)
		}
		if o, err := e.outcome(c.LocalAddr()); err != nil || o != "bad_hello" {
			return errors.Join(fmt.Errorf("%s first: outcome %q", what, o), err)
		}
	}
	return nil
}
