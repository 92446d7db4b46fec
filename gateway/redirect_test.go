// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"
)

// TestRedirectLeadsToTheHostThatWasAsked, or nowhere: what another parser could read as another host is refused.
func TestRedirectLeadsToTheHostThatWasAsked(t *testing.T) {
	b := start(t, ":{0} -> redirect\n:{1} -> redirect https-port=8443")
	get := func(target, host string) string { return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }
	good := "good.example"
	for _, c := range []struct {
		port              int
		request, location string // "": 400
	}{
		{0, get("/", good), "https://good.example/"},
		{0, get("/a/b?c=d&e=%2f", "Good.Example:80"), "https://good.example/a/b?c=d&e=%2f"},
		{0, get("/", "good.example."), "https://good.example/"},
		{0, get("/", "good.example:"), "https://good.example/"},
		{1, get("/x", "good.example:8080"), "https://good.example:8443/x"},
		{0, get("/", "[2001:db8::1]:80"), "https://[2001:db8::1]/"},
		{1, get("/", "[2001:db8::1]"), "https://[2001:db8::1]:8443/"},
		{0, get("/", "192.0.2.7:80"), "https://192.0.2.7/"},
		{0, get("//evil.example/", good), "https://good.example//evil.example/"},
		{0, get("/@evil.example", good), "https://good.example/@evil.example"},
		{0, get("/\"<>^`{|}\xc3\xbc", good), "https://good.example/%22%3C%3E%5E%60%7B%7C%7D%C3%BC"},
		{0, "GET / HTTP/1.0\r\nHOST:good.example\r\n\r\n", "https://good.example/"},
		{0, "POST /form HTTP/1.1\r\nContent-Length: 0\r\nHost: good.example \r\n\r\n", "https://good.example/form"},
		{0, get("/.well-known/acme-challenge/token", good), "https://good.example/.well-known/acme-challenge/token"},

		{0, get("x:@evil.example/", good), ""},
		{0, get("@evil.example/", good), ""},
		{0, get(".evil.example/", good), ""},
		{0, get(":8443/", good), ""},
		{0, get("http://evil.example/", good), ""},
		{0, get("https://good.example/", good), ""},
		{0, get("good.example:443", good), ""},
		{0, "CONNECT evil.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n", ""},
		{0, "OPTIONS * HTTP/1.1\r\nHost: good.example\r\n\r\n", ""},
		{0, get("", good), ""},
		{0, get(`\evil.example/`, good), ""},
		{0, get(`/\evil.example/`, good), ""},
		{0, get("/#x", good), ""},
		{0, get("/%zz", good), ""},
		{0, get("/%+1", good), ""},
		{0, get("/%2", good), ""},
		{0, get("/a b", good), ""},
		{0, get("/\x00", good), ""},
		{0, get("/\x0bSet-Cookie: a=b", good), ""},
		{0, get("/\rSet-Cookie: a=b", good), ""},
		{0, get("/\nSet-Cookie: a=b", good), ""},
		{0, get("/", ""), ""},
		{0, get("/", "."), ""},
		{0, get("/", "good.example@evil.example"), ""},
		{0, get("/", "good.example:@evil.example"), ""},
		{0, get("/", "good.example:80:80"), ""},
		{0, get("/", "good.example:x"), ""},
		{0, get("/", "good.example:65536"), ""},
		{0, get("/", "good.example/evil"), ""},
		{0, get("/", "good.example, evil.example"), ""},
		{0, get("/", "a..example"), ""},
		{0, get("/", "2001:db8::1"), ""},
		{0, get("/", "[2001:db8::1"), ""},
		{0, get("/", "[::1]evil.example"), ""},
		{0, get("/", "[good.example]"), ""},
		{0, get("/", "[192.0.2.7]"), ""},
		{0, get("/", "[fe80::1%25eth0]"), ""},
		{0, get("/", "b\xc3\xbccher.example"), ""},
		{0, get("/", strings.Repeat("a", 64)+".example"), ""},
		{0, "GET / HTTP/1.1\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\nHost: good.example\r\nhost: good.example\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\nHost : good.example\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\n Host: good.example\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\nHost: good.example\r\n folded\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\nX: a\nHost: evil.example\r\nHost: good.example\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\nX: a\x00\r\nHost: good.example\r\n\r\n", ""},
		{0, "GET / HTTP/1.1\r\nHost: good.exa\x00mple\r\n\r\n", ""},
		{0, "GET / HTTP/2.0\r\nHost: good.example\r\n\r\n", ""},
		{0, "GET / HTTP/1.1 \r\nHost: good.example\r\n\r\n", ""},
		{0, "GET  / HTTP/1.1\r\nHost: good.example\r\n\r\n", ""},
		{0, "GET /\r\nHost: good.example\r\n\r\n", ""},
		{0, "G(T / HTTP/1.1\r\nHost: good.example\r\n\r\n", ""},
		{0, "\r\n\r\n", ""},
	} {
		conn := b.dial(t, c.port)
		_, _ = io.WriteString(conn, c.request)
		answer, err := io.ReadAll(conn)
		if err != nil {
			t.Fatalf("%.100q: %v", c.request, err)
		}
		head, body, _ := strings.Cut(string(answer), "\r\n\r\n")
		want := "HTTP/1.1 400 Bad Request\r\n"
		if c.location != "" {
			want = "HTTP/1.1 308 Permanent Redirect\r\nLocation: " + c.location + "\r\n"
		}
		if !strings.HasPrefix(head, want) || strings.Count(head, "\r\n") != strings.Count(want, "\r\n")+2 || body == "" {
			t.Errorf("%.100q: answer %q, want %q", c.request, answer, want)
		}
		_ = conn.Close()
		outcome := "ok"
		if c.location == "" {
			outcome = "bad_hello"
		}
		if l := b.lineOf(t, conn); l.Outcome != outcome || len(l.text) > 800 {
			t.Errorf("%.100q: line: %s", c.request, l)
		}
	}
}

// TestRedirectsWithNames lead the hosts that they are for, as names of a ClientHello are looked up, and nobody else anywhere.
func TestRedirectsWithNames(t *testing.T) {
	b := start(t, ":{0} good.example *.shop.example bücher.example -> redirect\n:{0} *.a.shop.example -> redirect https-port=8443\n"+
		":{1} good.example -> redirect https-port=444\n:{1} -> redirect\n:{0} closed.example -> redirect deny=127.0.0.0/8")
	const ok, unknown, bad = "308 Permanent Redirect", "421 Misdirected Request", "400 Bad Request"
	for _, c := range []struct {
		port                   int
		host, status, location string
	}{
		{0, "good.example", ok, "good.example"},
		{0, "GOOD.Example.:80", ok, "good.example"},
		{0, "www.shop.example", ok, "www.shop.example"},
		{0, "x.y.shop.example", ok, "x.y.shop.example"},
		{0, "x.a.shop.example", ok, "x.a.shop.example:8443"},
		{0, "xn--bcher-kva.example", ok, "xn--bcher-kva.example"},
		{0, "shop.example", unknown, ""},
		{0, "evil.example", unknown, ""},
		{0, "good.example.evil.example", unknown, ""},
		{0, "xgood.example", unknown, ""},
		{0, "127.0.0.1", unknown, ""},
		{0, "[::1]:80", unknown, ""},
		{0, "good.example@evil.example", bad, ""},
		{0, "", bad, ""},
		{1, "good.example", ok, "good.example:444"},
		{1, "evil.example", ok, "evil.example"},
		{1, "127.0.0.1", ok, "127.0.0.1"},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			conn := b.dial(t, c.port)
			_, _ = io.WriteString(conn, method+" /x HTTP/1.1\r\nHost: "+c.host+"\r\n\r\n")
			answer, err := io.ReadAll(conn)
			if err != nil {
				t.Fatalf("%s: %v", c.host, err)
			}
			head, body, _ := strings.Cut(string(answer), "\r\n\r\n")
			want := "HTTP/1.1 " + c.status + "\r\n"
			if c.location != "" {
				want += "Location: https://" + c.location + "/x\r\n"
			}
			if !strings.HasPrefix(head, want) || strings.Contains(head, "Location") != (c.location != "") || (body == "") != (method == "HEAD") {
				t.Errorf("port %d, %s %q: answer %q, want %q", c.port, method, c.host, answer, want)
			}
			_ = conn.Close()
			outcome := map[string]string{ok: "ok", unknown: "unknown_name", bad: "bad_hello"}[c.status]
			if l := b.lineOf(t, conn); l.Outcome != outcome || (l.Rule != "") != (c.status == ok || c.port == 1) || outcome == "unknown_name" && !strings.Contains(l.Error, strings.ToLower(strings.TrimSuffix(c.host, ":80"))) {
				t.Errorf("%q: line: %s", c.host, l)
			}
		}
	}
	conn := b.dial(t, 0)
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: closed.example\r\n\r\n")
	if answer, err := io.ReadAll(conn); len(answer) > 0 || err == nil {
		t.Errorf("a rule that denies the client answers %q, %v", answer, err)
	}
	if l := b.lineOf(t, conn); l.Outcome != "denied" || l.Refused != "address" || l.Rule == "" {
		t.Errorf("line: %s", l)
	}
}

// TestHalfARequestMakesRoom: who has not finished a request gives way when TLSNAT_MAX_CONNS are open, as half a hello does.
func TestHalfARequestMakesRoom(t *testing.T) {
	for _, rule := range []string{":{0} -> redirect", ":{0} good.example -> redirect"} {
		b := start(t, rule, "MAX_CONNS=4", "LOOPS=1")
		for range 12 {
			crowded(t, b.addr(0), []byte("GET / HT"))
		}
		time.Sleep(300 * time.Millisecond) // leastArrival is over
		c := b.dial(t, 0)
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: good.example\r\n\r\n")
		if answer, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 308 ") {
			t.Errorf("%s: %q, %v", rule, answer, err)
		}
	}
}

// TestHeadGetsNoBody (RFC 9110, section 9.3.2), from a redirect and from the hint on a TLS port.
func TestHeadGetsNoBody(t *testing.T) {
	b := start(t, ":{0} -> redirect\n:{1} edge.test -> 127.0.0.1:1")
	for i := range 2 {
		for _, request := range []string{"HEAD / HTTP/1.1\r\nHost: edge.test\r\n\r\n", "HEAD x HTTP/1.1\r\nHost: edge.test\r\n\r\n"} {
			for _, first := range []int{1, len(request)} {
				c := b.dial(t, i)
				_, _ = io.WriteString(c, request[:first])
				waitDelivered(t, c)
				_, _ = io.WriteString(c, request[first:])
				answer, _ := io.ReadAll(c)
				if !bytes.HasPrefix(answer, []byte("HTTP/1.1 ")) || !bytes.HasSuffix(answer, []byte("\r\n\r\n")) {
					t.Errorf("port %d, %q: %q", i, request, answer)
				}
				_ = c.Close()
				if l := b.lineOf(t, c); i == 0 && strings.Contains(request, "/ HTTP") != (l.Outcome == "ok") {
					t.Errorf("line: %s", l)
				}
			}
		}
	}
}
