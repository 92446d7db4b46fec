// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"regexp"
	"strings"
)

// haproxy: one thread, splice where nothing is decrypted, pipes as large as tlsnat's. To splice always costs it a third of splice-auto's time in bulk and
// a fifth more in echoes, so it is told what is coming.
var haproxy = &peer{
	name:    "haproxy",
	from:    "BENCH_HAPROXY",
	called:  []string{"haproxy"},
	doors:   []door{ecdsaDoor, rsaDoor, passDoor, tcpDoor},
	asked:   []string{"-vv"},
	version: regexp.MustCompile(`(?m)^HAProxy version \S+|^Running on .*SSL version : .*$`),
	setUp: func(s site) ([]string, error) {
		config, splice := haproxyConfig, "option splice-auto"
		if s.bulk && !s.manual {
			splice = "option splice-request\n\toption splice-response"
		}
		if s.manual {
			config = strings.NewReplacer("\ttune.bufsize {buffer}\n", "", "\ttune.pipesize 1048576\n", "").Replace(config)
		}
		path, err := s.fill("haproxy.cfg", strings.Replace(config, "{splice}", splice, 1))
		return []string{"-db", "-q", "-f", path}, err
	},
}

const haproxyConfig = `
global
	nbthread 1
	tune.bufsize {buffer}
	maxconn {half-fds}
	maxpipes 64
	tune.pipesize 1048576
	tune.ssl.cachesize 20000
	tune.ssl.default-dh-param 2048
	ssl-default-bind-options ssl-min-ver TLSv1.2
	ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
	ssl-default-bind-ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256

defaults
	mode tcp
	timeout connect 10s
	timeout client 10m
	timeout server 10m
	backlog 4096
	{splice}

frontend ecdsa
	bind {ecdsa} ssl crt {ecdsa-pem}
	default_backend work
frontend rsa
	bind {rsa} ssl crt {rsa-pem}
	default_backend work
frontend tcp
	bind {tcp}
	default_backend work
frontend pass
	bind {pass}
	tcp-request inspect-delay 10s
	tcp-request content accept if { req.ssl_hello_type 1 }
	use_backend work if { req.ssl_sni -i ecdsa.test }

backend work
	server one {backend}
`
