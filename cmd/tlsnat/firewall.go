// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

// firewall prints what source=transparent needs.
func (p *program) firewall(args []string) int {
	if len(args) != 1 || args[0] != "--transparent" {
		fmt.Fprintln(p.err, "tlsnat firewall: write tlsnat firewall --transparent")
		return exitUsage
	}
	fmt.Fprint(p.out, transparentRecipe)
	return exitOK
}

// transparentRecipe has the answers of backends, which are for clients' addresses, delivered to the gateway's sockets.
// A script: nft(8) marks packets that have a transparent socket here (net/netfilter/nft_socket.c), and the rule sends
// what is marked to the loopback device, that is to this machine (Documentation/networking/tproxy.rst of the kernel).
const transparentRecipe = `#!/bin/sh
# source=transparent: backends see the client's own address. Run this as root, again after each boot.
#
# Backends have to send their answers through this machine: it is their default gateway, or their gateway to the
# clients. And the gateway needs the right CAP_NET_ADMIN: AmbientCapabilities=CAP_NET_ADMIN in systemd, --cap-add
# NET_ADMIN for a container.
set -e
nft -f - <<'EOF'
table inet tlsnat
delete table inet tlsnat
table inet tlsnat {
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
