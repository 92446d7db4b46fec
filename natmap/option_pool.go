// SPDX-License-Identifier: Apache-2.0

package natmap

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// PoolOptions are the options about the backends of a rule: which one is next, which
// are fit to be asked, and how they are connected to.
type PoolOptions struct {
	Balance  Balance
	MaxConns int // connections to one address at once; 0: no bound
	Queue    Queue
	Retries  *int // rounds after the first one; nil: DefaultRetries
	Eject    *int // connects that fail in a row; 0: off, nil: DefaultEject

	Check      Check
	Every      time.Duration // 0: DefaultEvery
	Rise, Fall int           // 0: DefaultRise, DefaultFall
	SlowStart  time.Duration // or Off
	OnDown     OnDown
	ResolveTo  ResolveTo

	Source      Origin
	KeepAlive   time.Duration // or Off
	UserTimeout time.Duration // or Off
	DSCP        *uint8        // nil: what the system sets
	MPTCP       Switch
	FastOpen    Switch
}

// What holds when an option is not given.
const (
	DefaultRetries = 3 // as HAProxy's
	DefaultEject   = 3
	DefaultEvery   = 5 * time.Second
	DefaultRise    = 2 // as HAProxy's, with the next
	DefaultFall    = 3
)

// A Balance is how the next backend is chosen.
type Balance uint8

const (
	RoundRobin Balance = iota
	LeastConn
	Random     // the less busy of two picked by chance
	SourceHash // by the client's address
	First      // the first that has room
)

var balanceWords = []string{"round-robin", "least-conn", "random", "source-hash", "first"}

// String returns the value of balance=.
func (b Balance) String() string { return word(balanceWords, int(b)) }

// An OnDown is what becomes of connections to a backend that is found to be down.
type OnDown uint8

const (
	Keep OnDown = iota
	Cut
)

var onDownWords = []string{"keep", "cut"}

// String returns the value of on-down=.
func (d OnDown) String() string { return word(onDownWords, int(d)) }

// A ResolveTo is which addresses DNS may give for the name of a backend.
type ResolveTo uint8

const (
	ResolveToNetwork ResolveTo = iota // those of other machines, and of this one as others see it
	ResolveToAny
)

var resolveToWords = []string{"network", "any"}

// String returns the value of resolve-to=.
func (r ResolveTo) String() string { return word(resolveToWords, int(r)) }

// A Switch is off or on.
type Switch uint8

const (
	SwitchOff Switch = iota
	SwitchOn
)

var switchWords = []string{"off", "on"}

// String returns the value of an option that is a switch.
func (s Switch) String() string { return word(switchWords, int(s)) }

// A Check is how a backend is asked whether it is fit. The zero Check is none.
type Check struct {
	Kind     string   // "", "tcp", "tls", "http" or "starttls"
	Path     string   // of http: "/healthz"
	StartTLS StartTLS // of starttls: how it is asked for TLS
}

// checkKinds are the words of check=; those with an argument have it behind a colon.
var checkKinds = []string{"off", "tcp", "tls", "http", "starttls"}

// String returns the value of check=.
func (c Check) String() string {
	switch {
	case c.Kind == "":
		return "off"
	case c.Path != "":
		return c.Kind + ":" + c.Path
	case c.StartTLS != StartTLSOff:
		return c.Kind + ":" + c.StartTLS.String()
	}
	return c.Kind
}

// A Queue is where connections wait when every backend has max-conns= of them. The
// zero Queue is none.
type Queue struct {
	Len  int           // connections that wait
	Time time.Duration // each of them, at most; 0: as long as a connect may take
}

// String returns the value of queue=.
func (q Queue) String() string {
	switch {
	case q.Len == 0:
		return "off"
	case q.Time == 0:
		return strconv.Itoa(q.Len)
	}
	return strconv.Itoa(q.Len) + "," + duration(q.Time)
}

// An Origin is the address that backends are connected to from. The zero Origin
// leaves it to the system.
type Origin struct {
	Transparent bool // the client's own
	Addr        netip.Addr
	Lo, Hi      uint16 // of Addr; zero: any port
}

// String returns the value of source=.
func (s Origin) String() string {
	switch {
	case s.Transparent:
		return "transparent"
	case !s.Addr.IsValid():
		return "off"
	case s.Lo == 0:
		return s.Addr.String()
	}
	return bracket(s.Addr.String()) + ":" + ports(s.Lo, s.Hi)
}

const forwarded = terminate | pass | tcp

var poolOptions = []option{
	{
		key: "balance", def: "round-robin", value: strings.Join(balanceWords, "|"), uses: forwarded,
		help: "which backend is next; random: the less busy of two random ones; source-hash: by the client's address; first: the first available in the rule (default round-robin)",
		set: enum(balanceWords, map[string]string{"roundrobin": "round-robin", "rr": "round-robin", "leastconn": "least-conn",
			"least_conn": "least-conn", "source": "source-hash", "ip-hash": "source-hash", "hash": "source-hash", "p2c": "random"},
			func(o *Options) *Balance { return &o.Pool.Balance }),
		show: func(o *Options) string { return o.Pool.Balance.String() },
	},
	optional("max-conns", "none", "connections to one backend address at once; further ones go to another one, or to queue= (default no bound)", 1, 1_000_000,
		func(o *Options) *int { return &o.Pool.MaxConns }),
	{
		key: "queue", def: "off", value: "N[,DURATION]|off", uses: forwarded,
		help: "connections that may wait while every backend has max-conns=, and for how long (default off; the duration is connect=)",
		set:  setQueue,
		show: func(o *Options) string { return o.Pool.Queue.String() },
	},
	counted("retries", strconv.Itoa(DefaultRetries), "how often all backends are tried again, within connect= (default 3)", 10,
		func(o *Options) **int { return &o.Pool.Retries }),
	counted("eject", strconv.Itoa(DefaultEject), "connects that fail in a row and take a backend out until it can be connected to again (default 3)", 1000,
		func(o *Options) **int { return &o.Pool.Eject }),
	{
		key: "check", def: "off", value: "tcp|tls|starttls:PROTOCOL|http:/PATH|off", uses: forwarded,
		help: "health check: tcp: connect; tls: complete a handshake; starttls: ask for TLS in the protocol; http: answer with a status below 400 (default off)",
		set:  setCheck,
		show: func(o *Options) string { return o.Pool.Check.String() },
	},
	atLeast(100*time.Millisecond, timer("every", DefaultEvery.String(), "time between two checks (default 5s); a check that takes longer has failed", forwarded, false,
		func(o *Options) *time.Duration { return &o.Pool.Every })),
	optional("rise", strconv.Itoa(DefaultRise), "checks in a row that have to succeed before a backend is up again (default 2)", 1, 1000,
		func(o *Options) *int { return &o.Pool.Rise }),
	optional("fall", strconv.Itoa(DefaultFall), "checks in a row that have to fail before a backend is down; the first one ever decides alone (default 3)", 1, 1000,
		func(o *Options) *int { return &o.Pool.Fall }),
	timer("slow-start", "off", "time in which a recovered backend gets its share gradually (default off)", forwarded, true,
		func(o *Options) *time.Duration { return &o.Pool.SlowStart }),
	{
		key: "on-down", def: "keep", value: strings.Join(onDownWords, "|"), uses: forwarded,
		help: "open connections when a check finds the backend down, or it goes into maintenance (default keep)",
		set: enum(onDownWords, map[string]string{"close": "cut", "reset": "cut", "kill": "cut"},
			func(o *Options) *OnDown { return &o.Pool.OnDown }),
		show: func(o *Options) string { return o.Pool.OnDown.String() },
	},
	{
		key: "resolve-to", def: "network", value: strings.Join(resolveToWords, "|"), uses: forwarded,
		help: "addresses that DNS may give for a backend's name; network: no loopback, link-local, unspecified, multicast or broadcast ones (default network)",
		set: enum(resolveToWords, map[string]string{"all": "any", "loopback": "any"},
			func(o *Options) *ResolveTo { return &o.Pool.ResolveTo }),
		show: func(o *Options) string { return o.Pool.ResolveTo.String() },
	},
	{
		key: "source", def: "off", value: "transparent|IP[:LO-HI]|off", uses: forwarded,
		help: "address that backends see; transparent: the client's own (needs routes: tlsnat firewall --transparent); IP: this address of the machine",
		set:  setSource,
		show: func(o *Options) string { return o.Pool.Source.String() },
	},
	atLeast(time.Second, timer("keepalive", "2m", "silence after which the kernel probes client and backend (default 2m)", forwarded, true,
		func(o *Options) *time.Duration { return &o.Pool.KeepAlive })),
	timer("user-timeout", "the system's", "time that sent bytes may stay unacknowledged before the kernel ends the connection (RFC 5482; default the system's)", forwarded, true,
		func(o *Options) *time.Duration { return &o.Pool.UserTimeout }),
	{
		key: "dscp", def: "the system's", value: "0-63|ef|af11…|cs0…", uses: forwarded,
		help: "DSCP mark of packets to client and backend (RFC 2474)",
		set:  setDSCP,
		show: func(o *Options) string { return strconv.Itoa(int(*o.Pool.DSCP)) },
	},
	toggle("mptcp", "speaks Multipath TCP (RFC 8684) to backends that can (default off)",
		func(o *Options) *Switch { return &o.Pool.MPTCP }),
	toggle("fastopen", "data with the SYN (RFC 7413): taken from clients on the rule's ports, and sent to backends that gave out a cookie; it may arrive twice (default off)",
		func(o *Options) *Switch { return &o.Pool.FastOpen }),
}

// toggle is the row of an option that is on or off.
func toggle(key, help string, field func(*Options) *Switch) option {
	return option{
		key: key, def: "off", value: "on|off", help: help, uses: forwarded,
		set:  enum(switchWords, map[string]string{"yes": "on", "true": "on", "1": "on", "no": "off", "false": "off", "0": "off"}, field),
		show: func(o *Options) string { return field(o).String() },
	}
}

// optional is the row of an option whose value is a number of which zero is not one.
func optional(key, def, help string, lo, hi int, field func(*Options) *int) option {
	return option{
		key: key, def: def, value: "N", help: help, uses: forwarded,
		set: func(p *parser, o *Options, v token) {
			if n, ok := p.number(v, lo, hi, ""); ok {
				*field(o) = n
			}
		},
		show: func(o *Options) string { return strconv.Itoa(*field(o)) },
	}
}

// counted is the row of an option whose value is a number, and off is none.
func counted(key, def, help string, hi int, field func(*Options) **int) option {
	return option{
		key: key, def: def, value: "N|off", help: help, uses: forwarded,
		set: func(p *parser, o *Options, v token) {
			n, ok := 0, v.text == "off"
			if !ok {
				n, ok = p.number(v, 0, hi, ", or off")
			}
			if ok {
				*field(o) = &n
			}
		},
		show: func(o *Options) string {
			if n := **field(o); n > 0 {
				return strconv.Itoa(n)
			}
			return "off"
		},
	}
}

// number reads lo to hi, written as Itoa writes it.
func (p *parser) number(v token, lo, hi int, or string) (int, bool) {
	n, err := strconv.Atoi(v.text)
	if err != nil || !digits(v.text) || n < lo || n > hi {
		p.fault(v, quote(v.text)+" is not a number from "+strconv.Itoa(lo)+" to "+strconv.Itoa(hi), fmt.Sprintf("write %d to %d%s", lo, hi, or))
		return 0, false
	}
	return n, true
}

// atLeast is a timer that may not be shorter than d: below it the option would do
// nothing but harm, or the kernel counts in larger units.
func atLeast(d time.Duration, row option) option {
	set := row.set
	row.set = func(p *parser, o *Options, v token) {
		if given, err := time.ParseDuration(v.text); err == nil && given >= minTimer && given < d {
			p.fault(v, quote(v.text)+" is too short", "write "+duration(d)+" or more")
			return
		}
		set(p, o, v)
	}
	return row
}

// maxQueue bounds the connections that wait for one rule: each costs its descriptor.
const maxQueue = 100_000

func setQueue(p *parser, o *Options, v token) {
	o.Pool.Queue = Queue{}
	if v.text == "off" {
		return
	}
	length, rest, timed := strings.Cut(v.text, ",")
	n, ok := p.number(v.sub(0, len(length)), 1, maxQueue, ", or off; with a comma and how long each may wait: queue=100,5s")
	if !ok {
		return
	}
	o.Pool.Queue.Len = n
	if !timed {
		return
	}
	d, err := time.ParseDuration(rest)
	at := v.from(len(length) + 1)
	switch {
	case err != nil:
		p.fault(at, quote(rest)+" is not a duration", durationHint(rest, "write a duration with its unit, as in queue=100,5s"))
	case d < minTimer || d > maxTimer:
		p.fault(at, quote(rest)+" is out of range", "write a duration from 1ms to 8784h")
	default:
		o.Pool.Queue.Time = d
	}
}

// maxPath bounds the path of a check: it goes out in every request.
const maxPath = 1024

func setCheck(p *parser, o *Options, v token) {
	kind, path, hasPath := strings.Cut(v.text, ":")
	switch {
	case !slices.Contains(checkKinds, kind):
		hint := "write tcp, tls, starttls:PROTOCOL, http:/PATH or off"
		if w := Nearest(kind, checkKinds); w != "" {
			hint = "did you mean " + w + "?"
		}
		p.fault(v, quote(v.text)+" is not a check", hint)
	case kind == "http" && !strings.HasPrefix(path, "/"):
		p.fault(v, quote(v.text)+" has no path", "write check=http:/healthz, with the path that answers when all is well")
	case kind == "http" && (len(path) > maxPath || !visible(path)):
		p.fault(v.from(len("http:")), quote(path)+" cannot stand in a request", fmt.Sprintf("write at most %d characters of ASCII, others as %%XX (RFC 3986)", maxPath))
	case kind == "starttls":
		p.setCheckStartTLS(o, v, path)
	case kind != "http" && hasPath:
		p.fault(v, kind+" takes no argument", "write check="+kind+", or check=http:/PATH")
	case kind == "off":
		o.Pool.Check = Check{}
	default:
		o.Pool.Check = Check{Kind: kind, Path: path}
	}
}

func (p *parser) setCheckStartTLS(o *Options, v token, word string) {
	if slip := startTLSSlips[word]; slip != "" {
		word = slip
	}
	i := slices.Index(startTLSWords, word)
	if i < 1 || v.text != "starttls:"+word {
		hint := "write check=starttls:PROTOCOL, with one of " + strings.Join(startTLSWords[1:], ", ")
		if i >= 1 {
			hint = "did you mean starttls:" + word + "?"
		}
		p.fault(v, quote(v.text)+" names no protocol", hint)
		return
	}
	o.Pool.Check = Check{Kind: "starttls", StartTLS: StartTLS(i)}
}

// visible reports whether every byte of s can stand in the target of a request.
func visible(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

func setSource(p *parser, o *Options, v token) {
	o.Pool.Source = Origin{}
	switch v.text {
	case "off":
		return
	case "transparent", "client":
		if v.text == "client" {
			p.fault(v, quote(v.text)+" is not an address", "did you mean transparent?")
		}
		o.Pool.Source.Transparent = true
		return
	}
	host := v
	if i := strings.LastIndexByte(v.text, ':'); i >= 0 && (v.text[0] == '[' || strings.Count(v.text, ":") == 1) {
		if host = v.sub(0, i); v.text[0] != '[' || v.text[i-1] == ']' {
			lo, hi, ok := p.portRange(v.from(i + 1))
			if !ok {
				return
			}
			o.Pool.Source.Lo, o.Pool.Source.Hi = lo, hi
		} else {
			host = v
		}
	}
	text := strings.TrimSuffix(strings.TrimPrefix(host.text, "["), "]")
	a, err := netip.ParseAddr(text)
	switch a = a.Unmap(); {
	case err != nil:
		p.fault(host, quote(host.text)+" is not an IP address", "write transparent, or an address of this machine, as in 192.0.2.1 or 192.0.2.1:40000-49999")
	case a.IsUnspecified() || a.IsMulticast():
		p.fault(host, quote(host.text)+" is no address to connect from", "write one of this machine's")
	case !zoneOK(a):
		p.fault(host, quote(host.text)+" has an impossible zone", "write the name of an interface, as in fe80::1%eth0")
	default:
		o.Pool.Source.Addr = a
	}
}

// dscpWords are the registered code points (RFC 2474, 2597, 3246, 5865).
var dscpWords = func() map[string]uint8 {
	words := map[string]uint8{"ef": 46, "va": 44, "default": 0}
	for class := range uint8(8) {
		words[fmt.Sprintf("cs%d", class)] = class << 3
		for drop := uint8(1); drop <= 3 && class >= 1 && class <= 4; drop++ {
			words[fmt.Sprintf("af%d%d", class, drop)] = class<<3 | drop<<1
		}
	}
	return words
}()

func setDSCP(p *parser, o *Options, v token) {
	code, named := dscpWords[strings.ToLower(v.text)]
	if !named {
		n, err := strconv.ParseUint(v.text, 10, 8)
		if err != nil || n > 63 || !digits(v.text) {
			p.fault(v, quote(v.text)+" is not a code point", "write 0 to 63, or a registered one such as ef, af21 or cs1")
			return
		}
		code = uint8(n)
	}
	o.Pool.DSCP = &code
}

// warnPool notes options of r itself that do nothing there.
func warnPool(r *Rule, note func(at Pos, msg, hint string)) {
	idle := func(keys string, without string, missing bool) {
		for _, s := range r.Settings {
			if missing && !s.Default && slices.Contains(strings.Fields(keys), s.Key) {
				note(s.Pos, s.Key+"= does nothing without "+without+"=", "write "+without+"= as well, or remove it")
			}
		}
	}
	o := &r.Options.Pool
	idle("every rise fall", "check", o.Check == Check{})
	idle("queue", "max-conns", o.MaxConns == 0)
}
