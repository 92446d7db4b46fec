// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"os"
	"regexp"
)

// hitch: one worker below its master, no OCSP process. It has no passthrough.
var hitch = &peer{
	name:    "hitch",
	from:    "BENCH_HITCH",
	called:  []string{"hitch"},
	doors:   []door{ecdsaDoor, rsaDoor},
	asked:   []string{"--version"},
	version: regexp.MustCompile(`(?m)^hitch \S+`),
	setUp: func(s site) ([]string, error) {
		text := hitchConfig
		if os.Geteuid() == 0 {
			text += "user = \"nobody\"\n" // hitch refuses to serve as root
		}
		path, err := s.fill("hitch.conf", text)
		return []string{"--config=" + path}, err
	},
}

const hitchConfig = `
frontend = {
	host = "127.0.0.2"
	port = "{ecdsa-port}"
	pem-file = "{ecdsa-pem}"
}
frontend = {
	host = "127.0.0.2"
	port = "{rsa-port}"
	pem-file = "{rsa-pem}"
}
backend = "[{backend-host}]:{backend-port}"
workers = 1
backlog = 4096
daemon = off
log-level = 1
ocsp-dir = ""
tls-protos = TLSv1.2 TLSv1.3
ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"
ciphersuites = "TLS_AES_128_GCM_SHA256"
`
