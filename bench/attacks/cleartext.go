// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// Attacks with what is said in the clear: redirects, and protocols that ask for TLS themselves.
var clearTextAttacks = []attack{
	{"redirect-to-somewhere-else", "a request line or a Host header chooses where clients are sent", redirectElsewhere},
	{"redirect-head-has-no-body", "an answer to HEAD with a body is taken for the next answer", redirectHead},
	{"postgres-cancel-is-no-tunnel", "a CancelRequest opens a way to the backend in the clear", postgresCancel},
	{"command-behind-starttls", "what a stranger puts behind STARTTLS is taken for the client's", commandBehindStartTLS},
}

func redirectElsewhere(s *stage) error {
	if err := s.certificate("a", "good.example"); err != nil {
		return err
	}
	e, err := s.start(":{0} -> redirect\n:{1} good.example -> demo")
	if err != nil {
		return err
	}
	for _, request := range []string{
		"GET x:@evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
		"GET @evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
		"GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
		"GET evil.example HTTP/1.1\r\nHost: good.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: good.example@evil.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: good.example/@evil.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: good.example\r\nHost: evil.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: \r\n\r\n",
		"CONNECT evil.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n",
	} {
		answer, err := e.says(0, request)
		if err != nil {
			return err
		}
		status, rest, _ := strings.Cut(answer, "\r\n")
		if strings.Contains(status, " 30") && strings.Contains(rest, "evil.example") || !strings.HasPrefix(status, "HTTP/1.") {
			return fmt.Errorf("%q is answered with %q", request, answer)
		}
	}
	answer, err := e.says(0, "GET /a?b HTTP/1.1\r\nHost: good.example\r\n\r\n")
	if err != nil || !strings.Contains(answer, "Location: https://good.example/a?b\r\n") {
		return errors.Join(fmt.Errorf("an ordinary request is answered with %q", answer), err)
	}
	return nil
}

// says sends words to the i-th port, and returns all that comes back.
func (e *edge) says(i int, words string) (string, error) {
	c, err := e.dial(i)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, words); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

func redirectHead(s *stage) error {
	e, err := s.start(":{0} -> redirect")
	if err != nil {
		return err
	}
	answer, err := e.says(0, "HEAD / HTTP/1.1\r\nHost: good.example\r\n\r\n")
	if _, body, found := strings.Cut(answer, "\r\n\r\n"); err != nil || !found || body != "" {
		return errors.Join(fmt.Errorf("HEAD is answered with %q", answer), err)
	}
	return nil
}

func postgresCancel(s *stage) error {
	heard := make(chan int, 1)
	back, err := s.serve(func(c net.Conn) {
		_, _ = io.WriteString(c, "secrets of the backend")
		n, _ := io.Copy(io.Discard, c)
		heard <- int(n)
	})
	if err != nil {
		return err
	}
	e, err := s.start(":{0} -> " + back + " starttls=postgres cert=a.example")
	if err != nil {
		return err
	}
	c, err := e.dial(0)
	if err != nil {
		return err
	}
	defer c.Close()
	cancel := binary.BigEndian.AppendUint32(nil, 16)
	cancel = binary.BigEndian.AppendUint32(cancel, 80877102)
	cancel = append(cancel, 1, 2, 3, 4, 5, 6, 7, 8)
	_, _ = c.Write(append(cancel, "and a tunnel behind it"...))
	answer, _ := io.ReadAll(c)
	if len(answer) > 0 {
		return fmt.Errorf("the client was told %q", answer)
	}
	c.Close()
	select {
	case n := <-heard:
		if n > len(cancel) {
			return fmt.Errorf("the backend heard %d bytes, and the packet has %d", n, len(cancel))
		}
	default: // it was refused altogether, since bytes came behind it
	}
	return nil
}

func commandBehindStartTLS(s *stage) error {
	heard := make(chan string, 1)
	back, err := s.serve(func(c net.Conn) {
		_, _ = io.WriteString(c, "220 backend\r\n")
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	if err != nil {
		return err
	}
	e, err := s.start(":{0} a.example -> " + back + " starttls=smtp")
	if err != nil {
		return err
	}
	if _, err := e.says(0, "EHLO me\r\nSTARTTLS\r\nMAIL FROM:<evil@example>\r\n"); err != nil {
		return err
	}
	select {
	case text := <-heard:
		return fmt.Errorf("the backend heard %q", text)
	default:
		return nil
	}
}
