// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tlsnat/tlsnat/natmap"
)

// firewall prints the rules that open the ports of the map, or what source=transparent needs.
func (p *program) firewall(args []string) int {
	q, err := readFirewall(args)
	if err != nil {
		fmt.Fprintf(p.err, "tlsnat firewall: %v; write tlsnat firewall [--format nft|ufw] [--also PORTS], or tlsnat firewall --transparent\n", err)
		return exitUsage
	}
	if q.transparent {
		fmt.Fprint(p.out, transparentRecipe)
		return exitOK
	}
	config, problems := p.config()
	if config == nil {
		p.complain(problems)
		return exitInput
	}
	all := openings(append(config.Map.Listens(), q.also...))
	if q.format == "ufw" {
		p.printUfw(all)
	} else {
		p.printNft(all)
	}
	return exitOK
}

// firewallArguments say what is printed.
type firewallArguments struct {
	format      string          // nft or ufw
	also        []natmap.Listen // other services of the machine
	transparent bool
}

func readFirewall(args []string) (q firewallArguments, err error) {
	var also string
	f := flag.NewFlagSet("firewall", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&q.format, "format", "nft", "")
	f.StringVar(&also, "also", "", "")
	f.BoolVar(&q.transparent, "transparent", false, "")
	if err := f.Parse(args); err != nil {
		return q, err
	}
	switch {
	case f.NArg() > 0:
		return q, fmt.Errorf("%q: every argument has a name", f.Args())
	case q.transparent && f.NFlag() > 1:
		return q, fmt.Errorf("--transparent prints a script of its own")
	case q.format != "nft" && q.format != "ufw":
		return q, fmt.Errorf("--format %s: neither nft nor ufw", q.format)
	case also == "":
		return q, nil
	}
	for item := range strings.SplitSeq(also, ",") {
		l, ok := readPorts(item)
		if !ok {
			return q, fmt.Errorf("--also %s: %q is not a port or a range of ports, as in 22,8000-8010", also, item)
		}
		q.also = append(q.also, l)
	}
	return q, nil
}

// readPorts reads 22 or 8000-8010.
func readPorts(text string) (natmap.Listen, bool) {
	first, last, isRange := strings.Cut(text, "-")
	if !isRange {
		last = first
	}
	lo, err := strconv.ParseUint(first, 10, 16)
	hi, err2 := strconv.ParseUint(last, 10, 16)
	return natmap.Listen{Lo: uint16(lo), Hi: uint16(hi)}, err == nil && err2 == nil && lo > 0 && lo <= hi
}

// opening is what may be connected to at one address; the zero address is every one.
type opening struct {
	addr  netip.Addr
	ports []portRange
}

type portRange struct{ lo, hi int }

// text is the range as both programs write it, but for what stands between its ends.
func (r portRange) text(between string) string {
	if r.lo == r.hi {
		return strconv.Itoa(r.lo)
	}
	return strconv.Itoa(r.lo) + between + strconv.Itoa(r.hi)
}

// openings are the ports of listeners, by address, every address first. What is open at every address is not opened once
// more at one, and nobody comes to a loopback address from outside.
func openings(listens []natmap.Listen) (all []opening) {
	slices.SortFunc(listens, func(a, b natmap.Listen) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Lo, b.Lo))
	})
	var everywhere []portRange
	for len(listens) > 0 {
		addr := listens[0].Addr
		n := slices.IndexFunc(listens, func(l natmap.Listen) bool { return l.Addr != addr })
		if n < 0 {
			n = len(listens)
		}
		ports := without(merged(listens[:n]), everywhere)
		if !addr.IsValid() {
			everywhere = ports
		}
		if !addr.IsLoopback() && len(ports) > 0 {
			all = append(all, opening{addr, ports})
		}
		listens = listens[n:]
	}
	return all
}

// merged are the ranges of listeners that come by port; those that touch become one.
func merged(listens []natmap.Listen) (all []portRange) {
	for _, l := range listens {
		if last := len(all) - 1; last >= 0 && int(l.Lo) <= all[last].hi+1 {
			all[last].hi = max(all[last].hi, int(l.Hi))
		} else {
			all = append(all, portRange{int(l.Lo), int(l.Hi)})
		}
	}
	return all
}

// without is what of the ranges is in none of the others; both come by port.
func without(ranges, others []portRange) (rest []portRange) {
	for _, r := range ranges {
		for _, o := range others {
			if o.hi < r.lo || o.lo > r.hi {
				continue
			}
			if o.lo > r.lo {
				rest = append(rest, portRange{r.lo, o.lo - 1})
			}
			r.lo = o.hi + 1
		}
		if r.lo <= r.hi {
			rest = append(rest, r)
		}
	}
	return rest
}

// printNft prints a firewall for nft(8). It is one that drops: in nftables no table can let in what another one drops, so
// that rules which only accept would open nothing, and close nothing.
func (p *program) printNft(all []opening) {
	fmt.Fprint(p.out, nftHead)
	for _, o := range all {
		to := ""
		switch {
		case o.addr.Is4():
			to = "ip daddr " + o.addr.String() + " "
		case o.addr.IsValid():
			to = "ip6 daddr " + o.addr.WithZone("").String() + " "
		}
		if zone := o.addr.Zone(); zone != "" {
			to = fmt.Sprintf("iifname %q %s", zone, to)
		}
		words := make([]string, len(o.ports))
		for i, r := range o.ports {
			words[i] = r.text("-")
		}
		fmt.Fprintf(p.out, "\t\t%stcp dport { %s } accept\n", to, strings.Join(words, ", "))
	}
	fmt.Fprint(p.out, nftEnd)
}

// What a machine needs besides: answers to what it asks itself, ICMP (RFC 4890 says what breaks without), and its lease
// of DHCPv6, which connection tracking takes for no answer, since the question went to a multicast address.
const (
	nftHead = `#!/usr/sbin/nft -f
# What may come in: the ports of the map. Load it with 'nft -f' as root, again after a change of the map.
#
# EVERYTHING ELSE IS DROPPED, also SSH: 'tlsnat firewall --also 22' opens other ports. Other tables stay in force.
# 'nft delete table inet tlsnat_filter' takes it away. Each connection has two entries in the kernel's connection
# tracking, one to the client and one to the backend: the sysctl net.netfilter.nf_conntrack_max has to hold them.
table inet tlsnat_filter
delete table inet tlsnat_filter
table inet tlsnat_filter {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		iif lo accept
		meta l4proto { icmp, ipv6-icmp } accept
		ip6 daddr fe80::/10 udp dport 546 accept
`
	nftEnd = `		counter drop
	}
}
`
)

// printUfw prints commands for ufw(8), which drops by default what nobody has allowed.
func (p *program) printUfw(all []opening) {
	fmt.Fprint(p.out, ufwHead)
	for _, o := range all {
		on, to := "", "any"
		if o.addr.IsValid() {
			to = o.addr.WithZone("").String()
		}
		if zone := o.addr.Zone(); zone != "" {
			on = "in on " + zone + " "
		}
		for _, r := range o.ports {
			fmt.Fprintf(p.out, "ufw allow %sproto tcp to %s port %s comment tlsnat\n", on, to, r.text(":"))
		}
	}
}

const ufwHead = `#!/bin/sh
# What may come in: the ports of the map. Run this as root, again after a change of the map.
#
# ufw keeps what was allowed before: 'ufw status numbered' shows the comment tlsnat at what an earlier map has opened,
# and 'ufw delete NUMBER' closes it.
set -e
`

// transparentRecipe has the answers of backends, which are for clients' addresses, delivered to the gateway's sockets.
// A script: nft(8) marks packets that have a transparent socket here (net/netfilter/nft_socket.c), and the rule sends
// what is marked to the loopback device, that is to this machine (Documentation/networking/tproxy.rst of the kernel).
// Its table stands beside that of the ports: each can be loaded without the other.
const transparentRecipe = `#!/bin/sh
# source=transparent: backends see the client's own address. Run this as root, again after each boot.
#
# Backends have to send their answers through this machine: it is their default gateway, or their gateway to the
# clients. And the gateway needs the right CAP_NET_ADMIN: AmbientCapabilities=CAP_NET_ADMIN in systemd, --cap-add
# NET_ADMIN for a container.
set -e
nft -f - <<'EOF'
table inet tlsnat_transparent
delete table inet tlsnat_transparent
table inet tlsnat_transparent {
	chain divert {
		type filter hook prerouting priority mangle; policy accept;
		meta l4proto tcp socket transparent 1 meta mark set 1 accept
	}
}
EOF
for family in -4 -6; do
	ip $family rule show | grep -q 'fwmark 0x1 lookup 100' || ip $family rule add fwmark 1 lookup 100
	ip $family route replace local default dev lo table 100
done
`
