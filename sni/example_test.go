// SPDX-License-Identifier: Apache-2.0

package sni_test

import (
	"fmt"
	"os"

	"github.com/tlsnat/tlsnat/sni"
)

// A hello is followed while it arrives, here in segments of 500 bytes.
func ExampleParser() {
	hello, err := os.ReadFile("testdata/hellos/chromium-pq.bin")
	if err != nil {
		panic(err)
	}
	var (
		parser sni.Parser
		h      sni.Hello
	)
	for n := 500; ; n += 500 {
		sent := hello[:min(n, len(hello))]
		if err = parser.Parse(sent, &h); err != sni.ErrMore {
			break
		}
		fmt.Printf("%d bytes, %d are needed\n", len(sent), parser.Need())
	}
	fmt.Println(h.ServerName, h.ALPN, h.JA4(), err)

	var refused *sni.Error
	refused, _ = new(sni.Parser).Parse([]byte("GET / HTTP/1.1\r\n"), &h).(*sni.Error)
	fmt.Println(refused)
	// Output:
	// 500 bytes, 1920 are needed
	// 1000 bytes, 1920 are needed
	// 1500 bytes, 1920 are needed
	// edge.example [h2 http/1.1] t13d1517h2_8daaf6152771_cb7bf5808d99 <nil>
	// client hello: record type at byte 0 is 71 instead of 22, handshake
}
