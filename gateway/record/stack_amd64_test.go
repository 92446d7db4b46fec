// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"runtime/debug"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/testkit/registers"
)

//go:noinline
func deepen() byte {
	var frame [64 << 10]byte
	for i := range frame {
		frame[i] = byte(i)
	}
	return frame[len(frame)/3]
}

// TestNoKeyIsLeftOnTheStack by what derives keys: half a key or a secret is looked for under the caller's frame.
func TestNoKeyIsLeftOnTheStack(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would give back what deepen makes
	secret, random := bytes.Repeat([]byte("secretly"), 6), make([]byte, 32)
	var k, other Keys
	left := make([]byte, 8<<10)
	for name, derive := range map[string]func(){
		"TrafficKeys": func() {
			k, _ = TrafficKeys(tls.TLS_AES_256_GCM_SHA384, secret)
			registers.Below(left)
		},
		"Update": func() {
			k.suite = tls.TLS_AES_256_GCM_SHA384
			k.Update()
			registers.Below(left)
		},
		"KeyBlock": func() {
			k, other, _ = KeyBlock(tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, secret, random, random)
			registers.Below(left)
		},
	} {
		deepen()
		derive()
		for what, part := range map[string][]byte{"the key": k.key[:16], "the second half of the key": k.key[16:],
			"the secret": k.secret[:16], "the other key": other.key[:16], "the given secret": secret[:16]} {
			if n := bytes.Count(left, part); n > 0 && !bytes.Equal(part, make([]byte, 16)) {
				t.Errorf("%s left %s %d times", name, what, n)
			}
		}
	}
}
