// SPDX-License-Identifier: Apache-2.0

package natmap_test

import (
	"fmt"
	"net/netip"

	"github.com/tlsnat/tlsnat/natmap"
)

func Example() {
	m, err := natmap.Parse(natmap.Source{Name: "edge.natmap", Text: `
:443          api.bank.example  -> 10.0.0.11:8080
:443          *.bank.example    -> 10.0.0.12:8080 10.0.0.13:8080/backup
:20000-20099                    -> 10.0.0.30:8000-8099
`})
	if err != nil {
		fmt.Println(err)
		return
	}
	rule := m.Port(netip.Addr{}, 443).Lookup("www.bank.example")
	fmt.Println(rule.Pos, rule.Name, rule.Backends)
	rule = m.Port(netip.Addr{}, 20042).Lookup("")
	fmt.Println(rule.Backends[0].Host, rule.Backends[0].Port(rule.Listen.Lo, 20042))
	// Output:
	// edge.natmap:3:15 *.bank.example [10.0.0.12:8080 10.0.0.13:8080/backup]
	// 10.0.0.30 8042
}

func Example_errors() {
	_, err := natmap.Parse(natmap.Source{Name: "edge.natmap", Text: `
:443 api.bank.example => 10.0.0.11:8080
:80 -> Redirect
`})
	fmt.Println(err)
	// Output:
	// edge.natmap:2:23: "=>" stands where -> is expected; write ->
	// edge.natmap:3:8: "Redirect" is a backend without a port; did you mean redirect? Otherwise write Redirect:8080
}
