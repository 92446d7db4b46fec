// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// TestTruncationOption: a stream of TLS that ends without a close_notify goes on to a side without TLS as the rule says, and
// the line names whose it was, whatever the rule says.
func TestTruncationOption(t *testing.T) {
	beside(t)
	x := &crossing{backends: map[uint16]chan *net.TCPConn{}}
	plain, secure := x.listen(t, 0), x.listen(t, tls.VersionTLS13)
	const how = "backend-ca=root backend-name=edge.test mode=tcp"
	x.bed = start(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} edge.test -> %[1]s truncation=fin\n:{2} edge.test -> %[1]s truncation=reset\n"+
		":{3} -> tls://%[2]s %[3]s\n:{4} -> tls://%[2]s %[3]s truncation=fin\n:{5} -> tls://%[2]s %[3]s truncation=reset", plain, secure, how),
		"BACKEND_CAS="+filepath.Dir(pki(t).rootFile(t)))
	for port, want := range []string{fin, fin, rst, rst, fin, rst} {
		for _, announced := range []bool{false, true} {
			t.Run(fmt.Sprintf("port %d, close_notify %v", port, announced), func(t *testing.T) {
				w := way{"", port, tls.VersionTLS13, 0}
				if port >= 3 {
					w = way{"", port, 0, tls.VersionTLS13}
				}
				client := x.enter(t, w)
				arrived := <-x.backends[w.backend]
				defer arrived.Close()
				backend, err := serverEnd(t, arrived, w.backend)
				if err != nil {
					t.Fatal(err)
				}
				from, to, side, reset := client, backend, "client", "client_reset"
				if port >= 3 {
					from, to, side, reset = backend, client, "backend", "backend_reset"
				}
				_ = to.SetDeadline(time.Now().Add(patience))
				data := random(uint64(port), 50_000)
				from.send(t, data)
				line, how := logLine{Outcome: "ok"}, fin
				if announced {
					from.finish()
				} else {
					_ = from.tcp.CloseWrite()
					line.CutShort, how = side, want
				}
				to.expect(t, data, how)
				if how == rst {
					line.Outcome = reset
				} else {
					to.finish()
				}
				got := x.lineOf(t, client.tcp)
				got.expect(t, line)
				if announced && got.CutShort != "" {
					t.Errorf("the end was announced: %s", got)
				}
			})
		}
	}
	status := x.gateway.Status()
	if n := status.Connections.CutShort; n["client"] != 3 || n["backend"] != 3 {
		t.Errorf("streams that were cut short, as counted: %v", n)
	}
}
