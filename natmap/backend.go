// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// A Backend is where a rule forwards to. It is comparable.
//
// Its port is Lo for every listening port when Lo == Hi, and counts along with
// the listening range from Lo to Hi otherwise. When Relative it is the listening
// port plus Offset.
type Backend struct {
	TLS      bool       // re-encrypt
	StartTLS StartTLS   // with TLS: how the backend is asked for it; off: TLS from the first byte on
	Unix     string     // absolute path of a socket; Host, Addr and the ports are then zero
	SRV      bool       // Host is the name of SRV records, which have the ports (RFC 2782); Lo and Hi are then zero
	Host     string     // name or IP address, without brackets
	Addr     netip.Addr // Host, when that is an address
	Lo, Hi   uint16
	Relative bool
	Offset   int  // -65534 to 65534
	Weight   int  // 1 to 256, 1 when not given
	Backup   bool // only when no other is up
}

const (
	maxWeight = 256 // HAProxy's bound: enough for shares under one per cent
	maxUnix   = 107 // bytes: sun_path of unix(7) is 108 with its NUL
)

// Port returns the backend's port for a connection that arrived at port in of a
// listener whose first port is listenLo: the NAT. For a socket it returns 0, and for
// SRV records as well.
func (b Backend) Port(listenLo, in uint16) uint16 {
	switch {
	case b.Unix != "", b.SRV:
		return 0
	case b.Relative:
		return uint16(int(in) + b.Offset)
	}
	// A fixed port is a range of one; Parse saw to it that any other range is as
	// long as the listening one.
	return b.Lo + min(in-listenLo, b.Hi-b.Lo)
}

// String returns the backend as the map writes it.
func (b Backend) String() string {
	s := b.target()
	if b.Weight > 1 {
		s += "/weight=" + strconv.Itoa(b.Weight)
	}
	if b.Backup {
		s += "/backup"
	}
	return s
}

// target is the backend without its weight and role.
func (b Backend) target() string {
	if b.Unix != "" {
		return "unix:" + escapePath(b.Unix)
	}
	s := bracket(b.Host) + ":" + b.ports()
	if b.SRV {
		s = "srv:" + b.Host
	}
	switch {
	case b.StartTLS != StartTLSOff:
		s = "tls+" + b.StartTLS.String() + "://" + s
	case b.TLS:
		s = "tls://" + s
	}
	return s
}

func (b Backend) ports() string {
	switch {
	case !b.Relative:
		return ports(b.Lo, b.Hi)
	case b.Offset == 0:
		return "="
	}
	return fmt.Sprintf("%+d", b.Offset)
}

// bracket puts an IPv6 address into brackets.
func bracket(host string) string {
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// backend reads one backend. l is nil when the listener was not understood; what
// depends on it is then not checked.
func (p *parser) backend(t token, l *Listen) Backend {
	var b Backend
	rest, isUnix := t.cutPrefix("unix:")
	if isUnix {
		p.unix(&b, rest)
	} else {
		p.network(&b, t, l)
	}
	b.Weight = max(b.Weight, 1)
	return b
}

func (p *parser) network(b *Backend, t token, l *Listen) {
	addr, isTLS, first := tlsScheme(t)
	b.TLS, b.StartTLS = isTLS, first
	if scheme, rest, ok := strings.Cut(addr.text, "://"); ok {
		p.scheme(addr, scheme, rest)
		return
	}
	if strings.HasPrefix(addr.text, "unix:") {
		p.fault(t, "tls:// does not go with a socket", "write "+clip(addr.text))
		return
	}
	if i := strings.IndexByte(addr.text, ','); i >= 0 {
		p.fault(addr.sub(i, i+1), "a comma stands in a backend", "put a space between backends")
		return
	}
	if i := strings.IndexByte(addr.text, '/'); i >= 0 {
		p.suffixes(b, addr.from(i))
		addr = addr.sub(0, i)
	}
	// No port begins like that: a host that is called srv is no exception.
	if name, ok := addr.cutPrefix("srv:_"); ok {
		b.SRV = true
		p.backendHost(b, token{"_" + name.text, name.line, name.col - 1})
		return
	}
	if host, port, ok := p.hostPort(addr); ok {
		p.backendHost(b, host)
		p.backendPorts(b, port, l)
	}
}

func (p *parser) scheme(t token, scheme, rest string) {
	rest, _, _ = strings.Cut(rest, "/")
	if !strings.Contains(rest, ":") {
		rest += ":PORT"
	}
	if s := strings.ToLower(scheme); s == "https" || s == "tls" || s == "ssl" {
		rest = "tls://" + rest
	}
	hint := startTLSHint(scheme, rest)
	if hint == "" {
		hint = "write " + clip(rest)
	}
	p.fault(t, "a backend has no scheme "+quote(scheme+"://"), hint)
}

// hostPort splits host:port. The host loses its brackets.
func (p *parser) hostPort(t token) (host, port token, ok bool) {
	i := strings.LastIndexByte(t.text, ':')
	switch {
	case strings.HasPrefix(t.text, "["):
		end := strings.IndexByte(t.text, ']')
		if end < 0 {
			p.fault(t, "[ without ]", "write an IPv6 address as [2001:db8::1]:8080")
			return host, port, false
		}
		if i != end+1 {
			p.fault(t, quote(t.text)+" has no port", "write "+clip(t.text[:end+1])+":8080")
			return host, port, false
		}
		return t.sub(1, end), t.from(i + 1), true
	case i < 0:
		p.noPort(t)
		return host, port, false
	case strings.IndexByte(t.text, ':') != i:
		p.fault(t, quote(t.text)+" has more than one colon", "write an IPv6 address in brackets: [2001:db8::1]:8080")
		return host, port, false
	}
	return t.sub(0, i), t.from(i + 1), true
}

func (p *parser) noPort(t token) {
	msg := quote(t.text) + " is a backend without a port"
	switch w := Nearest(t.text, actionWords[Redirect:]); {
	case t.text == "":
		p.fault(t, "the backend has no host and no port", "write one like 10.0.0.11:8080")
	case w == t.text:
		p.fault(t, w+" takes no prefix and no suffix", "write "+w+" alone")
	case w != "":
		p.fault(t, msg, "did you mean "+w+"? Otherwise write "+clip(t.text)+":8080")
	case digits(t.text):
		p.fault(t, quote(t.text)+" is a port without a host", "write 127.0.0.1:"+clip(t.text))
	default:
		p.fault(t, msg, "write "+clip(t.text)+":8080; a name that clients ask for stands before the ->")
	}
}

func (p *parser) backendHost(b *Backend, t token) {
	if t.text == "" {
		p.fault(t, "the backend has no host", "write 127.0.0.1 before the colon for this machine")
		return
	}
	if a, err := netip.ParseAddr(t.text); err == nil {
		p.backendAddr(b, t, a)
		return
	}
	if strings.Contains(t.text, ":") || strings.Contains(t.text, "%") {
		p.fault(t, quote(t.text)+" is not an IPv6 address", "write one like [2001:db8::1]:8080")
		return
	}
	// A trailing dot keeps a resolver from appending its search domains: it stays.
	name, dot := strings.CutSuffix(t.text, ".")
	b.Host = p.hostname(t.sub(0, len(name)))
	if dot {
		b.Host += "."
	}
}

func (p *parser) backendAddr(b *Backend, t token, a netip.Addr) {
	switch a = a.Unmap(); {
	case a.IsUnspecified():
		p.fault(t, quote(t.text)+" is no address to connect to", "write 127.0.0.1 or [::1] for this machine")
	case a.IsMulticast():
		p.fault(t, quote(t.text)+" is a multicast address", "write the address of one host")
	case !zoneOK(a):
		p.fault(t, quote(t.text)+" has an impossible zone", "write the name of an interface, as in [fe80::1%eth0]:8080")
	default:
		b.Addr, b.Host = a, a.String()
	}
}

// zoneOK reports whether the zone of a, if any, can be an interface's name.
func zoneOK(a netip.Addr) bool {
	z := a.Zone()
	return len(z) <= 15 && strings.Trim(z, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == "" // IFNAMSIZ
}

// backendPorts reads 8080, 8000-8099, +N, -N or =, and checks that every port of
// the listening range has one to go to.
func (p *parser) backendPorts(b *Backend, t token, l *Listen) {
	switch {
	case t.text == "=":
		b.Relative = true
	case strings.HasPrefix(t.text, "+"), strings.HasPrefix(t.text, "-"):
		b.Relative = true
		p.offset(b, t, l)
	default:
		p.backendRange(b, t, l)
	}
}

func (p *parser) offset(b *Backend, t token, l *Listen) {
	n, err := strconv.Atoi(t.text[1:])
	if err != nil || !digits(t.text[1:]) || n > 65534 {
		p.fault(t, quote(t.text)+" is not a distance between ports", "write +N or -N with N up to 65534, or = for the same port")
		return
	}
	if t.text[0] == '-' {
		n = -n
	}
	b.Offset = n
	if l == nil {
		return
	}
	for _, in := range []uint16{l.Lo, l.Hi} {
		if out := int(in) + n; out < 1 || out > 65535 {
			p.fault(t, fmt.Sprintf("listening port %d with %s gives port %d", in, t.text, out),
				fmt.Sprintf("ports are 1 to 65535: write %+d to %+d here", 1-int(l.Lo), 65535-int(l.Hi)))
			return
		}
	}
}

func (p *parser) backendRange(b *Backend, t token, l *Listen) {
	lo, hi, ok := p.portRange(t)
	if !ok {
		return
	}
	b.Lo, b.Hi = lo, hi
	n := int(hi) - int(lo) + 1
	if l == nil || n == 1 || n == l.Len() {
		return
	}
	hint := fmt.Sprintf("write %d for all of them, or listen on as many ports as the backend has", lo)
	if end := int(lo) + l.Len() - 1; end <= 65535 {
		hint = "write " + ports(lo, uint16(end))
	}
	p.fault(t, fmt.Sprintf("%s has %s, but %s has %d", quote(t.text), plural(n, "port"), l, l.Len()), hint)
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return strconv.Itoa(n) + " " + what
}

// suffixes reads /weight=3 and /backup, in any order. t starts with a slash.
func (p *parser) suffixes(b *Backend, t token) {
	for t.text != "" {
		end := len(t.text)
		if i := strings.IndexByte(t.text[1:], '/'); i >= 0 {
			end = i + 1
		}
		p.suffix(b, t.sub(0, end))
		t = t.from(end)
	}
}

func (p *parser) suffix(b *Backend, t token) {
	weight, isWeight := strings.CutPrefix(t.text, "/weight=")
	switch {
	case isWeight && b.Weight != 0, t.text == "/backup" && b.Backup:
		p.fault(t, quote(t.text)+" stands twice", "write it once")
	case isWeight:
		n, err := strconv.Atoi(weight)
		if err != nil || !digits(weight) || n < 1 || n > maxWeight {
			p.fault(t, quote(weight)+" is not a weight", "write /weight=1 to /weight=256")
			return
		}
		b.Weight = n
	case t.text == "/backup":
		b.Backup = true
	default:
		p.fault(t, quote(t.text)+" is not known after a backend", "write /weight=3 or /backup; a backend has no path")
	}
}

// unix reads the path of a socket and its suffixes. Suffixes are looked for at the
// end only, so /run/weight=3/app.sock is a path; %XX stands for a byte, so that
// every path can be written.
func (p *parser) unix(b *Backend, t token) {
	path := t
	for {
		i := strings.LastIndexByte(path.text, '/')
		if i <= 0 || path.text[i:] != "/backup" && !strings.HasPrefix(path.text[i:], "/weight=") {
			break
		}
		p.suffix(b, path.from(i))
		path = path.sub(0, i)
	}
	s, ok := unescapePath(path.text)
	switch {
	case !ok:
		p.fault(path, "% in a path is not followed by two hexadecimal digits", "write %25 for the character itself")
	case !strings.HasPrefix(s, "/"):
		p.fault(path, quote(path.text)+" is not an absolute path", "write unix:/run/app.sock")
	case len(s) > maxUnix:
		p.fault(path, fmt.Sprintf("the path of a socket has at most %d bytes, this one %d", maxUnix, len(s)), "write a shorter one")
	case strings.IndexByte(s, 0) >= 0:
		p.fault(path, "the path of a socket contains a NUL", "write it without %00")
	default:
		b.Unix = s
	}
}

// escapePath writes a path so that it has no meaning beyond the path: no space,
// comment, separator, arrow or suffix.
func escapePath(s string) string {
	var b strings.Builder
	last := strings.LastIndexByte(s, '/')
	suffix := s[last:] == "/backup" || strings.HasPrefix(s[last:], "/weight=")
	for i := 0; i < len(s); i++ {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("%#;>", c) >= 0 || suffix && i == last+1 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func unescapePath(s string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if len(s)-i < 3 {
			return "", false
		}
		c, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", false
		}
		b.WriteByte(byte(c))
		i += 2
	}
	return b.String(), true
}
