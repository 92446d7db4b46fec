// SPDX-License-Identifier: Apache-2.0

package bench

import "regexp"

// stunnel: a thread for each connection, on the one core. It has no passthrough.
var stunnel = &peer{
	name:    "stunnel",
	from:    "BENCH_STUNNEL",
	called:  []string{"stunnel4", "stunnel"},
	doors:   []door{ecdsaDoor, rsaDoor},
	asked:   []string{"-version"},
	version: regexp.MustCompile(`(?m)^stunnel \S+|^Running +with .*SSL \d\S+`),
	setUp: func(s site) ([]string, error) {
		path, err := s.fill("stunnel.conf", stunnelConfig)
		return []string{path}, err
	},
}

const stunnelConfig = `
foreground = yes
debug = err
pid =
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
sslVersionMin = TLSv1.2
ciphers = ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256
ciphersuites = TLS_AES_128_GCM_SHA256
options = NO_RENEGOTIATION
TIMEOUTbusy = 600
TIMEOUTclose = 0
TIMEOUTidle = 600

[ecdsa]
accept = {ecdsa}
connect = {backend}
cert = {ecdsa-pem}

[rsa]
accept = {rsa}
connect = {backend}
cert = {rsa-pem}
`
