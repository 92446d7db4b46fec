// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/gateway/starttls"
	"github.com/tlsnat/tlsnat/natmap"
	"github.com/tlsnat/tlsnat/sni"
)

// helloLimit bounds what is kept of a client before its hello is whole. A hello has 64 KiB at most (package sni); the
// rest is for the headers of the records that it is cut into.
const helloLimit = 96 << 10

// Alerts that are sent before there is a TLS connection (RFC 8446, section 6).
const (
	alertNone              = 0 // as package sni has it
	alertUnexpectedMessage = uint8(record.AlertUnexpectedMessage)
	alertDecodeError       = uint8(record.AlertDecodeError)
	alertAccessDenied      = uint8(record.AlertAccessDenied)
	alertInternalError     = uint8(record.AlertInternalError)
	alertUnrecognizedName  = uint8(record.AlertUnrecognizedName)
)

// readHello gathers the ClientHello. Ports whose bytes are not to be looked at go on at once.
func (c *conn) readHello() stage {
	if c.port.plain != nil {
		c.enter(c.port.plain)
		return c.act()
	}
	for {
		b, ended, errno := c.gather(helloLimit)
		if len(b) > 0 {
			switch err := c.hello.Parse(b, &c.loop.hello); {
			case err == nil:
				c.keep(b)
				return matching
			case err != sni.ErrMore:
				return c.notTLS(b, err)
			case len(b) >= helloLimit:
				return c.refuse(BadHello, alertDecodeError, fmt.Sprintf("no whole ClientHello in %d bytes", len(b)))
			}
			c.keep(b)
		}
		if ended {
			return c.endedEarly(errno)
		}
		if !c.client.readable {
			return readingHello
		}
	}
}

// endedEarly is a client that left before it said what it wants. One that said nothing at all was a probe or a
// port scan: a load balancer's health check looks like that, and is not an error.
func (c *conn) endedEarly(errno unix.Errno) stage {
	why := fmt.Sprintf("the client left after %d bytes of it", len(c.pending))
	switch {
	case errno != 0 && c.lost(&c.client) == Internal:
		return c.finish(Internal, errno.Error())
	case len(c.pending) == 0:
		c.report.probe = true
		return c.finish(OK, "")
	case errno != 0:
		return c.finish(ClientReset, why)
	case c.stage == readingProxy:
		return c.finish(BadProxy, why)
	}
	return c.finish(BadHello, why)
}

// notTLS answers bytes that are no ClientHello: in plain HTTP if that is what was spoken, else with an alert.
func (c *conn) notTLS(b []byte, err error) stage {
	if c.prelude.Protocol != starttls.Off {
		return c.refuse(BadHello, alertDecodeError, "behind the request for TLS: "+err.Error())
	}
	if startsProxyHeader(b) {
		return c.refuse(BadProxy, alertDecodeError,
			"a PROXY header from "+c.report.peer.Addr().String()+", which is not in "+config.Prefix+"PROXY_FROM")
	}
	if sni.LooksLikeHTTP(b) {
		c.tell(BadHello, "plain HTTP on a TLS port")
		return c.answerAndLinger(plainHTTPAnswer(asksHead(b)))
	}
	if e, ok := errors.AsType[*sni.Error](err); ok && e.Offset == 0 {
		e.Alert = firstRecordAlert(b, e.Alert)
	}
	return c.malformed(err)
}

// firstRecordAlert is what answers a first record that is no handshake record. A record of another type is TLS, and out of
// place: change_cipher_spec, application data, or a type that nobody knows. A fatal alert is not answered by an alert.
func firstRecordAlert(b []byte, said uint8) uint8 {
	const highest = 4 // records of version 3.0 to 3.4
	switch {
	case len(b) >= 7 && b[0] == record.TypeAlert && b[5] == alertLevelFatal:
		return alertNone
	case said == alertNone && len(b) >= 3 && b[1] == 3 && b[2] <= highest:
		return alertUnexpectedMessage
	}
	return said
}

const plainHTTPBody = "This port speaks TLS, and the request was plain HTTP. Write https:// in its address.\n"

// plainHTTPAnswer is the answer to plain HTTP; without its body where the method is HEAD (RFC 9110, section 9.3.2).
func plainHTTPAnswer(headOnly bool) []byte {
	head := fmt.Sprintf("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n", len(plainHTTPBody))
	if headOnly {
		return []byte(head)
	}
	return []byte(head + plainHTTPBody)
}

// match finds the rule for what the hello, which the loop still has, asks for.
func (c *conn) match() stage {
	h := &c.loop.hello
	name, err := h.HostName()
	c.report.helloed(h, name, c.loop.now)
	if err != nil { // nothing of such a name is kept: it would go to the log, to tickets and to backends
		return c.refuse(UnknownName, alertUnrecognizedName, "the name that the client asks for "+err.Error())
	}
	if c.route != nil { // MySQL's, whose gate it has passed
		return c.serve()
	}
	r := c.port.match(c.report.sni, h.ALPN)
	if r == nil {
		return c.refuse(UnknownName, alertUnrecognizedName, unknownName(c.report.sni))
	}
	c.enter(r)
	return c.act()
}

func unknownName(name string) string {
	if name == "" {
		return "the client sent no name, and no rule for this port is without one"
	}
	return "no rule for this name and port"
}

// refuse ends a connection that has no TLS yet: with a fatal alert where TLS was spoken, and by closing otherwise.
func (c *conn) refuse(o Outcome, alert uint8, why string) stage {
	c.tell(o, why)
	if c.route != nil && c.route.rule.Options.Mode == natmap.TCP {
		abort(&c.client)
		return c.finish(o, why)
	}
	if alert == alertNone {
		return c.startLinger() // what speaks no TLS understands no alert
	}
	c.report.alertSent = int16(alert)
	return c.answerAndLinger([]byte{21, 3, 3, 0, 2, 2, alert})
}
