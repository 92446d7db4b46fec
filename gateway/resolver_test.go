// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// reply is what a nameserver says to a question: several messages, one, or none at all.
type reply func(q dnsmessage.Message, overTCP bool) []dnsmessage.Message

// nameserver is a DNS server on loopback, over UDP and TCP. Questions are of the form "app.test. A".
type nameserver struct {
	addr  string
	mu    sync.Mutex
	to    map[string]reply
	asked map[string]int
}

func newNameserver(t testing.TB) *nameserver {
	t.Helper()
	z := &nameserver{to: map[string]reply{}, asked: map[string]int{}}
	var packets net.PacketConn
	var streams net.Listener
	for {
		var err error
		if streams, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if packets, err = net.ListenPacket("udp", streams.Addr().String()); err == nil {
			break
		}
		_ = streams.Close()
	}
	z.addr = streams.Addr().String()
	var all sync.WaitGroup
	t.Cleanup(func() {
		_, _ = packets.Close(), streams.Close()
		all.Wait()
	})
	all.Go(func() {
		b := make([]byte, 4096)
		for {
			n, from, err := packets.ReadFrom(b)
			if err != nil {
				return
			}
			for _, m := range z.replies(b[:n], false) {
				_, _ = packets.WriteTo(m, from)
			}
		}
	})
	all.Go(func() {
		for {
			c, err := streams.Accept()
			if err != nil {
				return
			}
			size := make([]byte, 2)
			_, _ = io.ReadFull(c, size)
			b := make([]byte, binary.BigEndian.Uint16(size))
			_, _ = io.ReadFull(c, b)
			for _, m := range z.replies(b, true) {
				_, _ = c.Write(binary.BigEndian.AppendUint16(nil, uint16(len(m)))) // in two segments
				_, _ = c.Write(m)
			}
			_ = c.Close()
		}
	})
	return z
}

func (z *nameserver) replies(question []byte, overTCP bool) (all [][]byte) {
	var m dnsmessage.Message
	if m.Unpack(question) != nil || len(m.Questions) != 1 {
		return nil
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	q := strings.ToLower(m.Questions[0].Name.String()) + " " + strings.TrimPrefix(m.Questions[0].Type.String(), "Type")
	z.mu.Lock()
	say := z.to[q]
	z.asked[q]++
	z.mu.Unlock()
	if say == nil {
		say = failing(dnsmessage.RCodeNameError)
	}
	for _, r := range say(m, overTCP) {
		b, err := r.Pack()
		if err != nil {
			panic(err)
		}
		all = append(all, b)
	}
	return all
}

func (z *nameserver) says(question string, r reply) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.to[question] = r
}

func (z *nameserver) count(question string) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.asked[question]
}

func failing(code dnsmessage.RCode) reply {
	return func(m dnsmessage.Message, _ bool) []dnsmessage.Message {
		m.RCode = code
		return []dnsmessage.Message{m}
	}
}

func silence(dnsmessage.Message, bool) []dnsmessage.Message { return nil }

func having(all ...string) reply {
	return func(m dnsmessage.Message, _ bool) []dnsmessage.Message {
		m.Answers = recordsOf(m.Questions[0].Name, all)
		return []dnsmessage.Message{m}
	}
}

// recordsOf makes records of "10.0.0.1", "fd00::1", "cname:a.test." and "srv:a.test.:80".
func recordsOf(name dnsmessage.Name, all []string) (records []dnsmessage.Resource) {
	for _, s := range all {
		r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: 60}}
		kind, rest, _ := strings.Cut(s, ":")
		a, _ := netip.ParseAddr(s)
		switch {
		case kind == "cname":
			name = dnsmessage.MustNewName(rest)
			r.Body = &dnsmessage.CNAMEResource{CNAME: name}
		case kind == "srv":
			host, port, _ := strings.Cut(rest, ":")
			var n uint16
			_, _ = fmt.Sscan(port, &n)
			r.Body = &dnsmessage.SRVResource{Port: n, Target: dnsmessage.MustNewName(host)}
		case a.Is4():
			r.Body = &dnsmessage.AResource{A: a.As4()}
		default:
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		}
		records = append(records, r)
	}
	return records
}

// leadsTo is an answer in one line: "10.0.0.1 fd00::1", "a.test.:80=10.0.0.1".
func leadsTo(leads []lead) string {
	var all []string
	for _, l := range leads {
		s := strings.Trim(fmt.Sprint(l.addrs), "[]")
		if l.target != "" {
			s = fmt.Sprintf("%s:%d=%s", l.target, l.port, s)
		}
		all = append(all, s)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// forged comes before the true answer, and has another number or another question.
func forged(then reply) reply {
	return func(m dnsmessage.Message, overTCP bool) []dnsmessage.Message {
		number, other := m, m
		number.ID++
		number.RCode = dnsmessage.RCodeNameError
		other.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName("other.test."), Type: m.Questions[0].Type, Class: dnsmessage.ClassINET}}
		return append([]dnsmessage.Message{number, other}, then(m, overTCP)...)
	}
}

// TestNamesLeadWhereTheAnswersSay: all there is of half answers, odd ones and false ones.
func TestNamesLeadWhereTheAnswersSay(t *testing.T) {
	const serverFailure, refused = dnsmessage.RCodeServerFailure, dnsmessage.RCodeRefused
	was, srv := []string{"10.0.0.1", "fd00::1"}, "_x._tcp.app.test."
	for what, c := range map[string]struct {
		says  map[string]reply // by question
		was   []string         // where app.test led before
		want  string           // "": nowhere
		lacks string
	}{
		"both families":         {map[string]reply{"app.test. A": having("10.0.0.2"), "app.test. AAAA": having("fd00::2")}, was, "10.0.0.2 fd00::2", ""},
		"no IPv6":               {map[string]reply{"app.test. A": having("10.0.0.2"), "app.test. AAAA": having()}, was, "10.0.0.2", ""},
		"no IPv6, wrongly said": {map[string]reply{"app.test. A": having("10.0.0.2")}, was, "10.0.0.2", ""},
		"IPv4 fails":            {map[string]reply{"app.test. A": failing(serverFailure), "app.test. AAAA": having("fd00::1")}, was, "10.0.0.1 fd00::1", "IPv4"},
		"IPv6 fails, IPv4 goes elsewhere": {map[string]reply{"app.test. A": having("10.0.0.2"), "app.test. AAAA": failing(refused)}, was,
			"10.0.0.2 fd00::1", "IPv6"},
		"IPv6 fails from the start": {map[string]reply{"app.test. A": having("10.0.0.2"), "app.test. AAAA": failing(serverFailure)}, nil, "10.0.0.2", "IPv6"},
		"both fail":                 {map[string]reply{"app.test. A": failing(serverFailure), "app.test. AAAA": failing(serverFailure)}, was, "", ""},
		"neither has an address":    {map[string]reply{"app.test. A": having(), "app.test. AAAA": having()}, was, "", ""},
		"another name's": {map[string]reply{"app.test. A": having("cname:real.test.", "10.0.0.3"), "app.test. AAAA": having("cname:real.test.")}, nil,
			"10.0.0.3", ""},
		"refers to other servers": {map[string]reply{"app.test. A": having("10.0.0.2"), "app.test. AAAA": func(m dnsmessage.Message, _ bool) []dnsmessage.Message {
			m.RecursionAvailable = false
			return []dnsmessage.Message{m}
		}}, was, "10.0.0.2 fd00::1", "IPv6"},
		"letters as they like": {map[string]reply{"app.test. A": func(m dnsmessage.Message, overTCP bool) []dnsmessage.Message {
			m.Questions[0].Name = dnsmessage.MustNewName("aPp.TesT.")
			return having("10.0.0.2")(m, overTCP)
		}, "app.test. AAAA": having()}, was, "10.0.0.2", ""},
		"forged answers first": {map[string]reply{"app.test. A": forged(having("10.0.0.2")), "app.test. AAAA": forged(failing(serverFailure))}, was,
			"10.0.0.2 fd00::1", "IPv6"},
		"over TCP": {map[string]reply{"app.test. A": func(m dnsmessage.Message, overTCP bool) []dnsmessage.Message {
			if !overTCP {
				m.Truncated = true
				return []dnsmessage.Message{m}
			}
			return having("10.0.0.2", "10.0.0.3")(m, overTCP)
		}, "app.test. AAAA": having()}, was, "10.0.0.2 10.0.0.3", ""},
		"records": {map[string]reply{srv + " SRV": having("srv:a.test.:80", "srv:b.test.:81"), "a.test. A": having("10.0.0.1"), "b.test. A": having("10.0.0.2")}, nil,
			"a.test.:80=10.0.0.1 b.test.:81=10.0.0.2", ""},
		"records, of which one fails from the start": {map[string]reply{srv + " SRV": having("srv:a.test.:80", "srv:b.test.:81"), "a.test. A": having("10.0.0.1"),
			"b.test. A": failing(serverFailure), "b.test. AAAA": failing(serverFailure)}, nil, "a.test.:80=10.0.0.1", "b.test."},
		"records, of which one fails later": {map[string]reply{srv + " SRV": having("srv:a.test.:80", "srv:b.test.:81"), "a.test. A": having("10.0.0.3"),
			"b.test. A": failing(serverFailure), "b.test. AAAA": failing(serverFailure)}, []string{"a.test.:80=10.0.0.1", "b.test.:81=10.0.0.2"},
			"a.test.:80=10.0.0.3 b.test.:81=10.0.0.2", "b.test."},
		"records fail": {map[string]reply{srv + " SRV": failing(serverFailure)}, nil, "", ""},
	} {
		t.Run(what, func(t *testing.T) {
			z := newNameserver(t)
			n := &name{host: "app.test"}
			for q, r := range c.says {
				if z.says(q, r); strings.HasPrefix(q, "_") {
					n.host, n.srv = srv, true
				}
			}
			if c.was != nil {
				n.leads.Store(leadsOf(c.was))
			}
			a, err := n.lookup(t.Context(), z.addr)
			if got := leadsTo(a.leads); got != c.want || (err != nil) != (c.want == "") {
				t.Errorf("it leads to %q, want %q: %v", got, c.want, err)
			}
			if (a.lacks != "") != (c.lacks != "") || !strings.Contains(a.lacks, c.lacks) {
				t.Errorf("it lacks %q, want %q", a.lacks, c.lacks)
			}
			if err == nil && (a.ttl < minTTL || a.ttl > time.Minute) {
				t.Errorf("that holds for %v, and the records for a minute", a.ttl)
			}
		})
	}
}

// leadsOf is where a name led, as leadsTo writes it.
func leadsOf(all []string) *[]lead {
	leads := []lead{{weight: 1}}
	if strings.Contains(all[0], "=") {
		leads = nil
	}
	for _, s := range all {
		target, addr, ok := strings.Cut(s, "=")
		if !ok {
			leads[0].addrs = append(leads[0].addrs, netip.MustParseAddr(s))
			continue
		}
		host, port, _ := strings.Cut(target, ":")
		l := lead{target: host, addrs: []netip.Addr{netip.MustParseAddr(addr)}}
		_, _ = fmt.Sscan(port, &l.port)
		leads = append(leads, l)
	}
	return &leads
}

// TestLookupHasTimeForMoreThanOneAttempt: a server that does not answer is given up on so soon that the next attempt ends
// within the time that the start has.
func TestLookupHasTimeForMoreThanOneAttempt(t *testing.T) {
	t.Parallel()
	z := newNameserver(t)
	for _, q := range []string{"app.test. A", "app.test. AAAA"} {
		z.says(q, func(m dnsmessage.Message, overTCP bool) []dnsmessage.Message {
			if z.count(q) == 1 {
				return nil
			}
			return having("10.0.0.1")(m, overTCP)[:1]
		})
	}
	z.says("app.test. AAAA", silence)
	began := time.Now()
	a, err := (&name{host: "app.test"}).lookup(t.Context(), z.addr)
	took := time.Since(began)
	if leadsTo(a.leads) != "10.0.0.1" || !strings.Contains(a.lacks, "IPv6") {
		t.Errorf("it leads to %v, lacks %q: %v", a.leads, a.lacks, err)
	}
	if took > resolveTimeout/2 {
		t.Errorf("that took %v", took)
	}
	if n := z.count("app.test. A"); n != 2 {
		t.Errorf("the server was asked %d times for IPv4, want 2", n)
	}
}
