// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"slices"
	"strings"
)

// A StartTLS is a protocol that begins in the clear and goes over to TLS.
type StartTLS uint8

// The protocols, in the order of their words.
const (
	StartTLSOff StartTLS = iota
	StartTLSPostgres
	StartTLSMySQL
	StartTLSSMTP
	StartTLSIMAP
	StartTLSPOP3
	StartTLSLDAP
)

var startTLSWords = []string{"off", "postgres", "mysql", "smtp", "imap", "pop3", "ldap"}

// String returns the value of starttls=.
func (s StartTLS) String() string { return word(startTLSWords, int(s)) }

// startTLSSlips are other names of the protocols.
var startTLSSlips = map[string]string{
	"postgresql": "postgres", "pgsql": "postgres", "pg": "postgres", "mariadb": "mysql", "lmtp": "smtp", "submission": "smtp",
	"imap4": "imap", "pop": "pop3", "none": "off", "no": "off",
}

var startTLSOptions = []option{{
	key: "starttls", def: "off", value: "postgres|mysql|smtp|imap|pop3|ldap|off", uses: terminate | pass | reject,
	help: "clients begin in the clear with this protocol and ask for TLS in it; the same for all rules of a port (default off)",
	set:  enum(startTLSWords, startTLSSlips, func(o *Options) *StartTLS { return &o.StartTLS }),
	show: func(o *Options) string { return o.StartTLS.String() },
}}

// Protocols are the application protocols offered to the client: those of alpn=, and
// without it postgresql where that may begin with TLS at once, which its clients then
// insist on ("Frontend/Backend Protocol", section "SSL Session Encryption").
func (o *Options) Protocols() []string {
	if len(o.ALPN) == 0 && o.StartTLS == StartTLSPostgres {
		return []string{"postgresql"}
	}
	return o.ALPN
}

// tlsScheme cuts tls:// or tls+PROTOCOL:// off a backend.
func tlsScheme(t token) (addr token, isTLS bool, first StartTLS) {
	if addr, isTLS = t.cutPrefix("tls://"); isTLS {
		return addr, true, StartTLSOff
	}
	for i, w := range startTLSWords[1:] {
		if addr, isTLS = t.cutPrefix("tls+" + w + "://"); isTLS {
			return addr, true, StartTLS(i + 1)
		}
	}
	return t, false, StartTLSOff
}

// startTLSHint is what to write for a scheme that names one of the protocols, or "".
func startTLSHint(scheme, rest string) string {
	w := strings.TrimPrefix(strings.ToLower(scheme), "tls+")
	if slip := startTLSSlips[w]; slip != "" {
		w = slip
	}
	if i := slices.Index(startTLSWords, w); i < 1 {
		return ""
	}
	return "write " + clip(rest) + ", or tls+" + w + "://" + clip(rest) + " to ask it for TLS"
}

// checkStartTLS complains about what the protocol of starttls= cannot do.
func (p *parser) checkStartTLS(d *draft) {
	says, isMySQL := "starttls="+d.Options.StartTLS.String(), d.Options.StartTLS == StartTLSMySQL
	switch {
	case isMySQL && d.named():
		p.fault(d.left[1], says+": a server of MySQL speaks first, so its rule is chosen before the client can ask for a name", "remove the name, and give each server a port or an address of its own")
	case isMySQL && d.alpn > 0:
		p.fault(d.left[1], says+": a server of MySQL speaks first, so its rule is chosen before the client can offer a protocol", "remove "+clip(d.left[1].text))
	case isMySQL && d.Action == Forward && d.Options.Mode == Pass:
		p.fault(d.left[0], says+": a server of MySQL speaks first, so there is no name yet that mode=pass could read", "write mode=tcp without starttls=: TLS goes through it as well")
	}
	for _, b := range d.Backends {
		if fault, hint := d.startTLSFault(b); fault != "" {
			p.fault(d.tls, fault, hint)
			return
		}
	}
}

// startTLSFault is what is wrong between a rule and its encrypted backend.
func (d *draft) startTLSFault(b Backend) (fault, hint string) {
	spoken := d.Options.StartTLS
	plain := b
	plain.TLS, plain.StartTLS = false, StartTLSOff
	switch {
	case !b.TLS:
	case spoken == StartTLSMySQL && b.StartTLS == StartTLSOff:
		return "a server of MySQL has no TLS from the first byte on", "write tls+mysql://" + plain.target()
	case b.StartTLS == StartTLSMySQL && spoken != StartTLSMySQL:
		return "tls+mysql:// counts on a client that asked for TLS in the same way", "write starttls=mysql"
	case spoken != StartTLSOff && b.StartTLS != StartTLSOff && b.StartTLS != spoken:
		return "the backend speaks " + b.StartTLS.String() + ", but clients speak " + spoken.String(), "write tls+" + spoken.String() + "://" + plain.target()
	}
	return "", ""
}

// checkPreludes complains about rules that share a port and do not agree on starttls=: a port has to know what to say
// before it knows the name. The rules come as preludes has them.
func (p *parser) checkPreludes(rules []*Rule, blamed map[Pos]bool) {
	var widest *Rule
	for _, r := range rules {
		if widest == nil || widest.Listen.Hi < r.Listen.Lo {
			widest = r
		}
		if widest.Options.StartTLS == r.Options.StartTLS || blamed[lineOf(r)] {
			continue
		}
		p.blame(widest, r, blamed, func(old, dup *Rule) (string, string) {
			return "starttls=" + dup.Options.StartTLS.String() + " on " + overlap(old, dup) + ", where the rule at " + old.Pos.String() + " has starttls=" +
				old.Options.StartTLS.String(), "write the same for all rules of a port: it speaks before it knows the name"
		})
	}
}

// A prelude is what a run of ports says before TLS.
type prelude struct {
	lo, hi uint16
	first  StartTLS
}

// preludes are those of an island's rules, which come by first port, wider ranges first: the widest speak for those that
// lie in them. It is nil when all ports begin with TLS.
func preludes(rules []*Rule) (all []prelude) {
	any := false
	for _, r := range rules {
		any = any || r.Options.StartTLS != StartTLSOff
		if n := len(all); n == 0 || all[n-1].hi < r.Listen.Lo {
			all = append(all, prelude{r.Listen.Lo, r.Listen.Hi, r.Options.StartTLS})
		}
	}
	if !any {
		return nil
	}
	return all
}

// prelude is what the port says before TLS.
func (t *table) prelude(port uint16) StartTLS {
	i, _ := slices.BinarySearchFunc(t.preludes, port, func(s prelude, port uint16) int { return int(s.hi) - int(port) })
	if i < len(t.preludes) && t.preludes[i].lo <= port {
		return t.preludes[i].first
	}
	return StartTLSOff
}
