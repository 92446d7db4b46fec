// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// requestLimit bounds the head of a request that is only going to be redirected.
const requestLimit = 16 << 10

// readRequest answers plain HTTP with 308 to the same place over https.
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
			return c.answerAndLinger(httpAnswer(http.StatusRequestHeaderFieldsTooLarge, ""))
		case !c.client.readable:
			return readingRequest
		}
	}
}

func (c *conn) redirect(head []byte) stage {
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
	if err != nil {
		c.tell(BadHello, "not an HTTP request: "+err.Error())
		return c.answerAndLinger(httpAnswer(http.StatusBadRequest, ""))
	}
	host := hostOnly(req.Host)
	if host == "" {
		c.tell(BadHello, "an HTTP request without a usable Host, it can't be redirected")
		return c.answerAndLinger(httpAnswer(http.StatusBadRequest, ""))
	}
	if port := c.route.rule.Options.HTTPSPort; port != 0 && port != 443 {
		host = net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(int(port)))
	}
	c.tell(OK, "")
	return c.answerAndLinger(httpAnswer(http.StatusPermanentRedirect, "https://"+host+req.URL.RequestURI()))
}

// hostOnly is the host of a Host header without its port; "" if it's none that may stand in a Location.
func hostOnly(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
		if strings.Contains(h, ":") {
			host = "[" + h + "]"
		}
	}
	for _, r := range host {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !letter && !strings.ContainsRune("-._:[]", r) {
			return ""
		}
	}
	return host
}

// httpAnswer is a whole response without a body worth reading.
func httpAnswer(status int, location string) []byte {
	var b bytes.Buffer
	body := http.StatusText(status) + "\n"
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	if location != "" {
		fmt.Fprintf(&b, "Location: %s\r\n", location)
	}
	fmt.Fprintf(&b, "Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	return b.Bytes()
}
