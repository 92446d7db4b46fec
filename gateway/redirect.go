// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"github.com/tlsnat/tlsnat/sni"
)

// requestLimit bounds the head of a request that is only going to be redirected.
const requestLimit = 16 << 10

// readRequest answers plain HTTP with 308 to the same place over https. Where rules have names there is none yet.
func (c *conn) readRequest() stage {
	for {
		b, ended, errno := c.gather(requestLimit)
		if end := bytes.Index(b, []byte("\r\n\r\n")); end >= 0 {
			return c.redirect(b[:end+4])
		}
		c.keep(b)
		switch {
		case ended:
			return c.endedEarly(errno)
		case len(b) >= requestLimit:
			c.tell(BadHello, fmt.Sprintf("no end of the HTTP request's head in %d bytes", requestLimit))
			return c.answerAndLinger(httpAnswer(http.StatusRequestHeaderFieldsTooLarge, "", asksHead(b)))
		case !c.client.readable:
			return readingRequest
		}
	}
}

// asksHead says whether b begins a HEAD request, as far as it goes: no other method begins with an H.
func asksHead(b []byte) bool { return len(b) > 0 && b[0] == 'H' }

func (c *conn) redirect(head []byte) stage {
	req, err := readHead(head)
	if err != nil {
		c.tell(BadHello, "not an HTTP request that can be redirected: "+err.Error())
		return c.answerAndLinger(httpAnswer(http.StatusBadRequest, "", req.headOnly))
	}
	if c.route == nil {
		if next, ok := c.matchHost(&req); !ok {
			return next
		}
	}
	host := req.host
	if port := c.route.rule.Options.HTTPSPort; port != 0 && port != 443 {
		host += ":" + strconv.Itoa(int(port))
	}
	c.tell(OK, "")
	return c.answerAndLinger(httpAnswer(http.StatusPermanentRedirect, "https://"+host+req.target, req.headOnly))
}

// matchHost finds the rule for the Host header, on a port whose redirects have names, and says whether its gate lets the
// client through. A host that none is for gets 421 (RFC 9110, section 15.5.20): it is the one status that says "this host is
// not served here, whatever the path", which 404 would leave open, and there is nothing in it that leads anywhere.
func (c *conn) matchHost(req *request) (next stage, ok bool) {
	r := c.port.match(req.name, nil)
	if r == nil {
		c.tell(UnknownName, "no redirect on this port is for the host "+req.host)
		return c.answerAndLinger(httpAnswer(http.StatusMisdirectedRequest, "", req.headOnly)), false
	}
	c.enter(r)
	if r.gate != nil {
		if why := c.passGate(); why != notRefused {
			return c.shut(why), false
		}
	}
	return readingRequest, true
}

// request is what a redirect needs of one.
type request struct {
	headOnly bool   // the method is HEAD: the answer has no body (RFC 9110, section 9.3.2)
	target   string // path and query, with nothing in them that a Location may not have
	host     string // of the Host header, without its port; an IPv6 address in brackets
	name     string // the host, unless it is an address, which counts as no name as in a ClientHello
}

// readHead reads a request's head, strictly: what two parsers can read in two ways is refused, since the one that follows
// the Location is not this one (RFC 9112, sections 2.2, 3 and 5). Only a target in origin-form leads back to the host that
// the client named; one in absolute-form names its own, and what comes from it would be put behind ours.
func readHead(head []byte) (req request, err error) {
	lines := strings.Split(strings.TrimSuffix(string(head), "\r\n\r\n"), "\r\n")
	method, rest, _ := strings.Cut(lines[0], " ")
	target, version, _ := strings.Cut(rest, " ")
	req.headOnly = method == http.MethodHead
	switch {
	case !isToken(method) || len(version) != len("HTTP/1.1") || version != "HTTP/1.0" && version != "HTTP/1.1":
		return req, errors.New("the request line is not METHOD TARGET HTTP/1.1")
	case !strings.HasPrefix(target, "/"):
		return req, errors.New("the target does not begin with a slash")
	}
	if req.target, err = cleanTarget(target); err != nil {
		return req, err
	}
	hosts := 0
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(line, ":")
		if !ok || !isToken(name) || strings.ContainsFunc(value, isControl) {
			return req, errors.New("a header line is not NAME: VALUE")
		}
		if !strings.EqualFold(name, "Host") {
			continue
		}
		if hosts++; hosts > 1 {
			return req, errors.New("there are two Host headers")
		}
		if req.host, req.name, err = hostOnly(strings.Trim(value, " \t")); err != nil {
			return req, err
		}
	}
	if hosts == 0 {
		return req, errors.New("there is no Host header")
	}
	return req, nil
}

// isToken reports whether s is one (RFC 9110, section 5.6.2).
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	})
}

// isControl reports whether a header's value may not have r.
func isControl(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }

// cleanTarget is a target in origin-form as it may stand in a Location (RFC 3986, section 3.3): what programs send that is
// not allowed there is written as %XX. A backslash, which browsers read as a slash, and a fragment are refused.
func cleanTarget(s string) (string, error) {
	const unreserved = "-._~!$&'()*+,;=:@/?%"
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ' || c == 0x7f || c == '\\' || c == '#':
			return "", fmt.Errorf("the target has the byte %#02x", c)
		case c == '%' && !isPercent(s[i:]):
			return "", errors.New("the target has a % without two hexadecimal digits behind it")
		case c|0x20 >= 'a' && c|0x20 <= 'z', c >= '0' && c <= '9', strings.IndexByte(unreserved, c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String(), nil
}

func isPercent(s string) bool {
	if len(s) < 3 {
		return false
	}
	_, err := strconv.ParseUint(s[1:3], 16, 8)
	return err == nil && s[1] != '+' && s[1] != '-'
}

var errHost = errors.New("the Host header has no host name or address that may stand in a Location")

// hostOnly is the host of a Host header without its port: a name that a client can ask for under TLS, or an address, which
// is no name.
func hostOnly(value string) (host, name string, err error) {
	host, port := value, ""
	if i := strings.LastIndexByte(value, ':'); i > strings.LastIndexByte(value, ']') {
		host, port = value[:i], value[i+1:]
	}
	if _, err := strconv.ParseUint("0"+port, 10, 16); err != nil {
		return "", "", errHost
	}
	inner, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		inner, bracketed = strings.CutSuffix(inner, "]")
		if a, err := netip.ParseAddr(inner); !bracketed || err != nil || !a.Is6() || a.Zone() != "" {
			return "", "", errHost
		}
		return host, "", nil
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
		return host, "", nil
	}
	if name, err = sni.HostName(host); err != nil || name == "" {
		return "", "", errHost
	}
	return name, name, nil
}

// httpAnswer is a whole response without a body worth reading.
func httpAnswer(status int, location string, headOnly bool) []byte {
	var b bytes.Buffer
	body := http.StatusText(status) + "\n"
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	if location != "" {
		fmt.Fprintf(&b, "Location: %s\r\n", location)
	}
	fmt.Fprintf(&b, "Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n", len(body))
	if !headOnly {
		b.WriteString(body)
	}
	return b.Bytes()
}
