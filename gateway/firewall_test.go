// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"net"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// onEdge runs a program on the machine in the middle.
func (n *network) onEdge(t testing.TB, stdin string, words ...string) string {
	t.Helper()
	return run(t, command(t, program(t, "ip", "iproute2"), append([]string{"netns", "exec", n.edge}, words...)...), stdin)
}

// firewallOf is what tlsnat firewall prints for a map.
func firewallOf(t testing.TB, rules string, args ...string) string {
	t.Helper()
	cmd, _ := edgeCommand(t, rules, nil)
	cmd.Args = append(cmd.Args[:len(cmd.Args)-1], append([]string{"firewall"}, args...)...)
	return run(t, cmd, "")
}

// TestFirewallOpensWhatTheMapListensOn: the printed rules are understood by nft, can be loaded again, let clients to the
// ports of the map, of either family, and nobody anywhere else; and source=transparent works beside them.
func TestFirewallOpensWhatTheMapListensOn(t *testing.T) {
	nft := program(t, "nft", "nftables")
	n := newNetwork(t)
	const rules = `:443 -> 10.77.2.2:8080 mode=tcp source=transparent
		10.77.1.1:8000-8002 -> 10.77.2.2:8080 mode=tcp
		[fd77:1::1]:8443 -> [fd77:2::2]:8080 mode=tcp source=transparent`
	n.transparentRoutes(t)
	text := firewallOf(t, rules, "--also", "22")
	n.onEdge(t, text, nft, "-c", "-f", "-")
	n.onEdge(t, text, nft, "-f", "-")
	n.onEdge(t, text, nft, "-f", "-")
	for _, at := range []string{"10.77.2.2:8080", "[fd77:2::2]:8080"} {
		l := within(t, n.backend, func() (net.Listener, error) { return net.Listen("tcp", at) })
		serveOn(t, l, func(c net.Conn) { echo(c.(*net.TCPConn)) })
	}
	cmd, _ := edgeCommand(t, rules, nil, "ip", "netns", "exec", n.edge)
	e := startEdge(t, cmd, nil)
	for _, at := range []string{":22", ":442", ":8003", "[fd77:1::1]:8000", "10.77.1.1:8443"} { // of others, who have nothing to do with the map
		l := within(t, n.edge, func() (net.Listener, error) { return net.Listen("tcp", at) })
		serveOn(t, l, func(c net.Conn) { echo(c.(*net.TCPConn)) })
	}
	for _, at := range []string{"10.77.1.1:443", "10.77.1.1:8000", "10.77.1.1:8002", "[fd77:1::1]:8443", "10.77.1.1:22", "[fd77:1::1]:22"} {
		c := within(t, n.client, func() (net.Conn, error) { return net.DialTimeout("tcp", at, patience) })
		_ = c.SetDeadline(time.Now().Add(patience))
		if err := trade(c, []byte("data")); err != nil {
			t.Errorf("%s: %v\n%s", at, err, e.log.text())
		}
		_ = c.Close()
	}
	for _, at := range []string{"10.77.1.1:442", "[fd77:1::1]:442", "10.77.1.1:8003", "[fd77:1::1]:8000", "10.77.1.1:8443"} {
		n.isDropped(t, nft, at)
	}
}

var droppedPackets = regexp.MustCompile(`counter packets (\d+)`)

// dropped is how many packets nobody has let in.
func (n *network) dropped(t testing.TB, nft string) int {
	t.Helper()
	m := droppedPackets.FindStringSubmatch(n.onEdge(t, "", nft, "list", "chain", "inet", "tlsnat_filter", "input"))
	if m == nil {
		t.Fatal("the chain has no counter")
	}
	count, _ := strconv.Atoi(m[1])
	return count
}

// isDropped connects to where somebody listens, and waits until a packet is dropped.
func (n *network) isDropped(t testing.TB, nft, at string) {
	t.Helper()
	before := n.dropped(t, nft)
	ctx, giveUp := context.WithTimeout(t.Context(), patience)
	defer giveUp()
	connected := make(chan bool)
	go func() {
		connected <- within(t, n.client, func() (bool, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", at)
			if err == nil {
				_ = c.Close()
			}
			giveUp()
			return err == nil, nil
		})
	}()
	for ctx.Err() == nil && n.dropped(t, nft) == before {
		time.Sleep(5 * time.Millisecond)
	}
	giveUp()
	if <-connected {
		t.Errorf("%s is open", at)
	}
	if n.dropped(t, nft) == before {
		t.Errorf("%s: nothing was dropped", at)
	}
}

// TestUfwUnderstandsItsRules: every line of them, without doing what it says. Where ufw is not installed they have its
// grammar (ufw(8), "RULE SYNTAX").
func TestUfwUnderstandsItsRules(t *testing.T) {
	text := firewallOf(t, ":443 -> demo; 192.0.2.1:8000-8010 -> 10.0.0.1:= mode=tcp; [2001:db8::1]:8443 -> demo; [fe80::1%lo]:8443 -> demo", "--format", "ufw")
	var lines []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "ufw ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	if len(lines) != 4 {
		t.Fatal(text)
	}
	grammar := regexp.MustCompile(`^ufw allow (in on [\w.-]+ )?proto tcp to (any|[0-9a-f.:]+) port \d+(:\d+)? comment tlsnat$`)
	for _, line := range lines {
		if !grammar.MatchString(line) {
			t.Errorf("%q is no rule", line)
		}
	}
	ufw := program(t, "ufw", "ufw")
	for _, line := range lines {
		words := strings.Fields(line)
		if out, err := exec.Command(ufw, append([]string{"--dry-run"}, words[1:]...)...).CombinedOutput(); err != nil || strings.Contains(string(out), "ERROR") {
			t.Errorf("%s: %v\n%s", line, err, out)
		}
	}
}
