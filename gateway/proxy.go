// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
)

const (
	// proxyLimit bounds a PROXY header: version 1 has 107 bytes at most, version 2 16 and a length that the codec
	// takes up to 4096.
	proxyLimit = 16 + 4096
	v1Limit    = 107
)

// v1Start is what a header of version 1 begins with, in capitals (PROXY protocol, section 2.1).
var v1Start = []byte("PROXY ")

var errNotProxy = errors.New("no PROXY header, which is demanded from this address (" + config.Prefix + "PROXY_FROM)")

// readProxyHeader takes the PROXY header off a connection from a load balancer that is trusted (PROXY protocol,
// sections 2.1 and 2.2). What follows it stays in pending.
func (c *conn) readProxyHeader() stage {
	if c.report.local {
		return c.awaitWord()
	}
	for {
		b, ended, errno := c.gather(proxyLimit + helloLimit)
		n, err := proxyHeaderLen(b)
		switch {
		case err != nil:
			return c.badProxy(err)
		case n > 0 && n <= len(b):
			return c.takeProxyHeader(b, n)
		}
		c.keep(b)
		switch {
		case ended:
			return c.endedEarly(errno)
		case !c.client.readable:
			return readingProxy
		}
	}
}

// takeProxyHeader reads the header, which is the first n bytes of b.
func (c *conn) takeProxyHeader(b []byte, n int) stage {
	if err := c.believe(b[:n]); err != nil {
		return c.badProxy(err)
	}
	if wanted := c.port.tlvs; wanted != nil && !c.report.local {
		c.report.tlvs = keepTLVs(b[:n], wanted)
	}
	rest := b[n:]
	c.pending, c.report.heard = append([]byte(nil), rest...), len(rest) > 0
	if c.report.local && len(rest) == 0 {
		return c.beginLocal()
	}
	return c.comeIn()
}

// believe takes the client's address from a whole header. One that names none leaves the peer's: LOCAL, UNKNOWN, and in
// version 2 UNSPEC, which the codec refuses, and UNIX, whose client has no address.
func (c *conn) believe(b []byte) error {
	if bytes.HasPrefix(b, proxyproto.SIGV2) {
		if b[12] == byte(proxyproto.LOCAL) || b[13] == byte(proxyproto.UNSPEC) { // what follows is not looked at, nor LOCAL's family
			c.report.local = true
			return nil
		}
		if err := checkTLVs(b[16+v2Addresses[b[13]]:]); err != nil {
			return err
		}
		if err := checkProxySum(b); err != nil {
			return err
		}
		if b[13] == byte(proxyproto.UnixStream) {
			c.report.local = true
			return nil
		}
	}
	h, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(b), len(b)))
	if err != nil {
		return err
	}
	if h.Command.IsLocal() {
		c.report.local = true
		return nil
	}
	src, dst, ok := h.TCPAddrs()
	if !ok {
		return errors.New("the PROXY header has no addresses of TCP")
	}
	c.report.source, c.report.target = unmapped(src), unmapped(dst)
	return nil
}

// v2Addresses are the families and protocols that a connection over TCP can come with, and how long their addresses are
// (PROXY protocol, section 2.2). Those for datagrams are defined, but none came here by TCP: taken for one that names nobody
// its client would have the address of the load balancer, and pass where that does.
var v2Addresses = map[byte]int{
	byte(proxyproto.UNSPEC): 0, byte(proxyproto.TCPv4): 2*4 + 2*2, byte(proxyproto.TCPv6): 2*16 + 2*2, byte(proxyproto.UnixStream): 2 * 108,
}

// judgeV2 looks at the fixed part of a header of version 2, which is whole, before the rest is waited for.
func judgeV2(b []byte) error {
	size, known := v2Addresses[b[13]]
	n := int(binary.BigEndian.Uint16(b[14:]))
	switch {
	case 16+n > proxyLimit:
		return fmt.Errorf("PROXY header of %d bytes, more than %d", 16+n, proxyLimit)
	case b[12] == byte(proxyproto.LOCAL):
	case b[12] != byte(proxyproto.PROXY):
		return fmt.Errorf("PROXY header with version and command %#02x, which is neither PROXY nor LOCAL of version 2", b[12])
	case !known:
		return fmt.Errorf("PROXY header with family and protocol %#02x, which is none of TCP4, TCP6, UNIX and UNSPEC", b[13])
	case n < size:
		return fmt.Errorf("PROXY header with %d bytes for addresses that take %d", n, size)
	}
	return nil
}

// checkTLVs holds the lengths of TLVs against the header that they are in, and those in the one about TLS against that (PROXY
// protocol, sections 2.2.4 and 2.2.6): what one reader takes for the end another would take for more.
func checkTLVs(b []byte) error {
	var wrong error
	rest := eachTLV(b, func(kind uint8, whole []byte) {
		wrong = cmp.Or(wrong, checkTLV(proxyproto.PP2Type(kind), whole[tlvHead:]))
	})
	switch {
	case wrong != nil:
		return wrong
	case len(rest) >= tlvHead:
		return errors.New("the PROXY header has a TLV that is longer than the rest of it")
	case len(rest) > 0:
		return errors.New("the PROXY header ends within a TLV")
	}
	return nil
}

func checkTLV(kind proxyproto.PP2Type, value []byte) error {
	switch {
	case kind == proxyproto.PP2_TYPE_CRC32C && len(value) != 4:
		return fmt.Errorf("the CRC32C of the PROXY header has %d bytes, not 4", len(value))
	case kind == proxyproto.PP2_TYPE_SSL && len(value) < sslTLVHead:
		return fmt.Errorf("the TLV about TLS in the PROXY header has %d bytes, less than %d", len(value), sslTLVHead)
	case kind == proxyproto.PP2_TYPE_SSL:
		return checkParts(value[sslTLVHead:])
	}
	return nil
}

// sslTLVHead is what a TLV about TLS begins with: a byte of flags, four that say whether the certificate was verified.
const sslTLVHead = 1 + 4

// checkParts holds the lengths of the TLVs in one about TLS against that.
func checkParts(b []byte) error {
	if rest := eachTLV(b, func(uint8, []byte) {}); len(rest) > 0 {
		return errors.New("the TLV about TLS in the PROXY header has a part that goes beyond it")
	}
	return nil
}

// comeIn is what comes behind the header, if the gate lets the client in.
func (c *conn) comeIn() stage {
	if c.knocked != notRefused { // it has been counted
		return c.shut(c.knocked)
	}
	if why := c.knock(); why != notRefused {
		return c.shut(why)
	}
	return c.port.first
}

// beginLocal is for a connection that the load balancer calls its own (LOCAL), or whose client it does not name (UNKNOWN,
// UNSPEC). It is a probe until it says something; then the gate sees the peer. Where the port speaks first the peer has to
// be let in before it is spoken to, and one that is not may still look whether the port is open.
func (c *conn) beginLocal() stage {
	if c.port.eager {
		c.knocked = c.knock()
		if c.knocked == notRefused {
			return c.port.first
		}
	}
	return c.awaitWord()
}

func (c *conn) awaitWord() stage {
	for {
		b, ended, errno := c.gather(helloLimit)
		switch {
		case len(b) > 0:
			c.keep(b)
			return c.comeIn()
		case ended:
			return c.endedEarly(errno)
		case !c.client.readable:
			return readingProxy
		}
	}
}

// proxyTLVs is where the TLVs of a version 2 header begin, by its address family: behind two addresses and two ports.
var proxyTLVs = [...]int{16, 16 + 2*4 + 2*2, 16 + 2*16 + 2*2, 16 + 2*108}

// checkProxySum compares the CRC32C in a header of version 2, if there is one, with its bytes (PROXY protocol, section
// 2.2.3). The codec does not.
func checkProxySum(b []byte) error {
	if !bytes.HasPrefix(b, proxyproto.SIGV2) || int(b[13]>>4) >= len(proxyTLVs) {
		return nil
	}
	for at := proxyTLVs[b[13]>>4]; at+3 <= len(b); {
		n := int(binary.BigEndian.Uint16(b[at+1:]))
		if proxyproto.PP2Type(b[at]) == proxyproto.PP2_TYPE_CRC32C && n == 4 && at+7 <= len(b) {
			sum := crc32.Checksum(b[:at+3], castagnoli)
			sum = crc32.Update(sum, castagnoli, make([]byte, 4))
			if crc32.Update(sum, castagnoli, b[at+7:]) != binary.BigEndian.Uint32(b[at+3:]) {
				return errors.New("the CRC32C of the PROXY header is not that of its bytes")
			}
		}
		at += 3 + n
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// badProxy ends the connection without a word: what speaks no PROXY protocol does not wait for an answer in TLS.
func (c *conn) badProxy(err error) stage {
	return c.finish(BadProxy, err.Error())
}

func unmapped(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// startsProxyHeader says whether b begins like a PROXY header of either version.
func startsProxyHeader(b []byte) bool {
	return bytes.HasPrefix(b, proxyproto.SIGV2[:min(len(b), len(proxyproto.SIGV2))]) && len(b) >= 5 ||
		bytes.HasPrefix(b, proxyproto.SIGV1)
}

// proxyHeaderLen is the length of the header at the start of b: 0 as long as that can't be told. It judges the first
// byte already, so that whoever does not speak the protocol isn't waited for.
func proxyHeaderLen(b []byte) (int, error) {
	v1, v2 := v1Start, proxyproto.SIGV2
	switch {
	case bytes.HasPrefix(b, v2):
		if len(b) < 16 {
			return 0, nil
		}
		return 16 + int(binary.BigEndian.Uint16(b[14:])), judgeV2(b)
	case bytes.HasPrefix(b, v1):
		end := bytes.IndexByte(b[:min(len(b), v1Limit)], '\n')
		if end < 0 && len(b) >= v1Limit {
			return 0, fmt.Errorf("PROXY header of version 1 without an end in %d bytes", v1Limit)
		}
		return end + 1, nil
	case bytes.HasPrefix(v1, b), bytes.HasPrefix(v2, b):
		return 0, nil
	}
	return 0, errNotProxy
}

// greet puts the PROXY header for the backend, and what the client has sent already, before everything else that goes
// there. To a tls:// backend the header has gone already, in the clear before the handshake, as HAProxy's send-proxy
// and everybody who reads it have it. A backend to which nothing can be said yet may be one that speaks first.
func (c *conn) greet() stage {
	if err := c.checkTLS(); err != nil {
		return c.unannounced(err)
	}
	if s := c.backend.tls; s != nil {
		c.up.hold(c.loop, s.sealed(c.pending))
	} else if err := c.sayFirst(); err != nil {
		return c.unannounced(err)
	}
	c.upward().carried(len(c.pending))
	c.pending = nil
	if c.cancels {
		return c.startCancel()
	}
	c.tuneClient()
	c.active = c.loop.now
	c.up.at, c.down.at = c.loop.now-freshAfter-1, c.loop.now-freshAfter-1
	c.setDeadline(min(int64(parkAfter), int64(c.route.idle)))
	silent := c.backend.tls == nil && !c.dial.introduced && c.dial.early == 0 && !c.up.stuck()
	c.to(c.relayed())
	next := c.relay()
	if silent && c.up.moved == 0 && c.backend.fd >= 0 {
		ackNow(c.backend.fd)
	}
	return next
}

// checkTLS holds the connection against its rule before the first byte of anybody's is carried: in the clear goes only what
// the map says may.
func (c *conn) checkTLS() error {
	switch b := c.dial.backend; {
	case config.Terminates(c.route.rule) && c.client.tls == nil && !c.cancels:
		return errors.New("the rule terminates TLS, and the client has none")
	case b.spec != nil && b.spec.TLS && c.backend.tls == nil:
		return errors.New("the map says tls://, and the backend is spoken to in the clear")
	}
	return nil
}

// sayFirst has the header and what the client has sent go, but for what has gone with the SYN.
func (c *conn) sayFirst() error {
	early := c.dial.early
	if !c.dial.introduced {
		p, err := c.preface()
		if err != nil {
			return err
		}
		header, err := p.after(early)
		if err != nil {
			return err
		}
		if len(p.header) > 0 {
			c.up.hold(c.loop, header)
			early = 0
		}
	}
	c.up.hold(c.loop, c.pending[early:])
	return nil
}

// unannounced ends a connection that its backend must not hear of: without the header that the rule wants the client's
// first bytes would be taken for it.
func (c *conn) unannounced(err error) stage {
	c.hangUp()
	return c.unconnected(Internal, err.Error())
}

// preface is what a backend hears before everything else: a whole PROXY header, or, by the rule's word, nothing. The zero
// value is neither, and nobody can send it: no header can be lost on the way to a backend without an error.
type preface struct {
	header []byte
	made   bool
}

var errNoPreface = errors.New("no PROXY header was made for the backend, nor does the rule do without")

// after is what is left of it behind the bytes that have gone with the SYN. Without a header those were the client's.
func (p preface) after(early int) ([]byte, error) {
	switch {
	case !p.made:
		return nil, errNoPreface
	case len(p.header) == 0:
		return nil, nil
	case early > len(p.header):
		return nil, fmt.Errorf("%d bytes of a PROXY header of %d have gone", early, len(p.header))
	}
	return p.header[early:], nil
}

// prefaceLimit is what receivers take of a header: 4096 bytes (nginx, go-proxyproto) and more. The longest that a client can
// cause has 1.5 KiB: a name of 253 bytes, a protocol of 255, tlvLimit of the load balancer's.
const prefaceLimit = 4096

// preface makes the header for the backend as the rule wants it. It is the same each time that it is made.
func (c *conn) preface() (preface, error) {
	version := c.route.proxy
	if c.dial.backend.demo {
		version = natmap.ProxyV2
	}
	if version == natmap.ProxyOff {
		return preface{made: true}, nil
	}
	header, err := c.proxyHeader(version)
	switch {
	case err != nil:
		return preface{}, fmt.Errorf("the PROXY header for the backend: %w", err)
	case len(header) == 0 || len(header) > prefaceLimit:
		return preface{}, fmt.Errorf("the PROXY header for the backend has %d bytes, of %d at most", len(header), prefaceLimit)
	}
	return preface{header, true}, nil
}

// proxyHeader is the header for the backend.
func (c *conn) proxyHeader(version natmap.ProxyVersion) ([]byte, error) {
	src, dst := c.report.source, c.report.target
	if !dst.IsValid() {
		dst = localAddr(c.client.fd)
	}
	if !src.IsValid() || !dst.IsValid() {
		return nil, errors.New("the client's address is not known, or not the one that it connected to")
	}
	if src.Addr().Is4() != dst.Addr().Is4() { // one family for both: IPv4 as mapped IPv6
		src, dst = netip.AddrPortFrom(mapped(src.Addr()), src.Port()), netip.AddrPortFrom(mapped(dst.Addr()), dst.Port())
	}
	h := proxyproto.HeaderProxyFromAddrs(byte(version), net.TCPAddrFromAddrPort(src), net.TCPAddrFromAddrPort(dst))
	if c.report.local {
		h.Command, h.TransportProtocol = proxyproto.LOCAL, proxyproto.UNSPEC
	}
	if version == natmap.ProxyV2 {
		return c.proxyV2(h)
	}
	return h.Format()
}

func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

// proxyV2 adds what a backend may want to know (PROXY protocol, section 2.2.6) and the checksum over all of it.
func (c *conn) proxyV2(h *proxyproto.Header) ([]byte, error) {
	r := &c.report
	id := r.idText()
	tlvs := []proxyproto.TLV{{Type: proxyproto.PP2_TYPE_UNIQUE_ID, Value: []byte(id)}}
	if r.sni != "" {
		tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte(r.sni)})
	}
	if r.negotiated != "" {
		tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_ALPN, Value: []byte(r.negotiated)})
	}
	if r.version != 0 {
		tlvs = append(tlvs, sslTLV(r))
	}
	if r.tlvs != nil {
		tlvs = append(tlvs, r.tlvs.forwarded(c.route)...)
	}
	// The checksum is taken over the whole header with zeros in its own place, and it comes last: so it is the last
	// four bytes.
	tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_CRC32C, Value: make([]byte, 4)})
	if err := h.SetTLVs(tlvs); err != nil {
		return nil, err
	}
	b, err := h.Format()
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b, castagnoli))
	return b, nil
}

// sslTLV is PP2_TYPE_SSL: the client spoke TLS, this version with this cipher. verify is non-zero as long as no
// client certificate was verified.
func sslTLV(r *report) proxyproto.TLV {
	v := []byte{tlvparse.PP2_BITFIELD_CLIENT_SSL, 0, 0, 0, 1}
	sub := func(t proxyproto.PP2Type, s string) {
		v = append(v, byte(t), byte(len(s)>>8), byte(len(s)))
		v = append(v, s...)
	}
	sub(proxyproto.PP2_SUBTYPE_SSL_VERSION, r.versionName())
	sub(proxyproto.PP2_SUBTYPE_SSL_CIPHER, r.cipherName())
	return proxyproto.TLV{Type: proxyproto.PP2_TYPE_SSL, Value: v}
}
