// SPDX-License-Identifier: Apache-2.0

package record_test

import (
	"crypto/tls"
	"fmt"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// A server takes over after the handshake; the client is played by a Writer with the same keys.
func Example() {
	secret := make([]byte, 32) // CLIENT_TRAFFIC_SECRET_0
	keys, err := record.TrafficKeys(tls.TLS_AES_128_GCM_SHA256, secret)
	if err != nil {
		fmt.Println(err)
		return
	}
	var client record.Writer
	client.Init(keys, 0)
	slot := make([]byte, client.Prefix()+5+client.Suffix())
	copy(slot[client.Prefix():], "hello")
	received := slot[:client.Seal(slot, 5)]
	received = client.AppendAlert(received, record.AlertCloseNotify)

	var r record.Reader
	r.Init(keys, 0, record.Server)
	keys.Wipe()
	for len(received) > 0 {
		rec, n, err := r.Next(received)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s: %q\n", rec.Kind, rec.Data)
		received = received[n:]
	}
	// Output:
	// data: "hello"
	// close_notify: ""
}
