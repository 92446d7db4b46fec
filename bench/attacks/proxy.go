// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// Attacks with the PROXY header: who may send one, and what becomes of access lists.
var proxyAttacks = []attack{
	{"proxy-header-from-a-stranger", "a client that writes a PROXY header itself is taken for somebody else", proxyFromStranger},
	{"proxy-local-then-talks", "a LOCAL or UNKNOWN header is a way around deny= and limits", proxyLocalThenTalks},
	{"proxy-header-cut-anywhere", "a header in pieces is taken for none", proxyInPieces},
	{"mapped-addresses", "a list with ::ffff: prefixes never matches, and lets in whom it denies", mappedAddresses},
}

func proxyFromStranger(s *stage) error {
	heard := make(chan []byte, 4)
	back, err := s.serve(func(c net.Conn) {
		b := make([]byte, 256)
		n, _ := c.Read(b)
		heard <- b[:n]
	})
	if err != nil {
		return err
	}
	e, err := s.start(":{0} -> "+back+" mode=tcp proxy=v1", "PROXY_FROM=127.0.0.9/32")
	if err != nil {
		return err
	}
	c, err := e.dial(0)
	if err != nil {
		return err
	}
	defer c.Close()
	_, _ = io.WriteString(c, "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
	own := "PROXY TCP4 127.0.0.1 "
	if b := <-heard; !strings.HasPrefix(string(b), own) {
		return fmt.Errorf("the backend heard %q, which does not begin with the gateway's own header", b)
	}
	return nil
}

// localHeader is version 2's LOCAL, and unspecHeader a PROXY of unknown addresses.
var (
	signature    = "\r\n\r\n\x00\r\nQUIT\n"
	localHeader  = signature + "\x20\x00\x00\x00"
	unspecHeader = signature + "\x21\x00\x00\x00"
)

func proxyLocalThenTalks(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo} deny=127.0.0.0/8\n:{1} a.example -> {echo}", "PROXY_FROM=127.0.0.0/8")
	if err != nil {
		return err
	}
	for n, header := range []string{localHeader, unspecHeader, "PROXY UNKNOWN\r\n"} {
		for i := range e.addrs {
			c, err := e.dialFrom(fmt.Sprintf("127.0.5.%d", 10*n+i+1), i) // whoever is refused has a line of their own only once
			if err != nil {
				return err
			}
			defer c.Close()
			if _, err := io.WriteString(c, header); err != nil {
				return err
			}
			err = echoes(tls.Client(c, s.client("a.example")), []byte("hello"))
			switch {
			case i == 0 && err == nil:
				return fmt.Errorf("behind the header %q a client that deny= names was served", header)
			case i == 1 && err != nil:
				return fmt.Errorf("behind the header %q nobody is served: %w", header, err)
			}
			if i == 1 {
				continue
			}
			if o, err := e.outcome(c.LocalAddr()); err != nil || o != "denied" {
				return errors.Join(fmt.Errorf("behind the header %q the outcome is %q, not denied", header, o), err)
			}
		}
	}
	return nil
}

func proxyInPieces(s *stage) error {
	e, err := s.start(":{0} -> {echo} mode=tcp", "PROXY_FROM=127.0.0.0/8")
	if err != nil {
		return err
	}
	for _, header := range []string{
		"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
		signature + "\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x00\x01\x00\x02",
	} {
		c, err := e.dial(0)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := echoes(&after{&drip{c, len(header)}, header}, []byte("hello")); err != nil {
			return err
		}
		c.Close()
		if l, err := e.lineOf(c.LocalAddr()); err != nil || l.str("client") != "192.0.2.1:1" {
			return errors.Join(fmt.Errorf("client %q", l.str("client")), err)
		}
	}
	return nil
}

// after writes words before the first bytes.
type after struct {
	net.Conn
	words string
}

func (a *after) Write(p []byte) (int, error) {
	if a.words != "" {
		if _, err := io.WriteString(a.Conn, a.words); err != nil {
			return 0, err
		}
		a.words = ""
	}
	return a.Conn.Write(p)
}

func mappedAddresses(s *stage) error {
	e, err := s.start(":{0} -> {echo} mode=tcp deny=::ffff:127.0.0.0/104")
	if err != nil {
		return err
	}
	c, err := e.dial(0)
	if isReset(err) {
		return nil // turned away before the dial returned
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if echoes(c, []byte("hello")) == nil {
		return errors.New("a client that deny= names was served")
	}
	return nil
}
