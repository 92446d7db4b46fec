// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
)

// nginx: its stream module, a master and one worker. Where the module is a file of its own, it is loaded.
var nginx = &peer{
	name:    "nginx",
	from:    "BENCH_NGINX",
	called:  []string{"nginx"},
	doors:   []door{ecdsaDoor, rsaDoor, passDoor, tcpDoor},
	asked:   []string{"-V"},
	version: regexp.MustCompile(`(?m)^nginx version: \S+|^(?:built|running) with \S+ \d\S*`),
	setUp: func(s site) ([]string, error) {
		path, err := s.fill("nginx.conf", streamModule(s.binary)+nginxConfig)
		return []string{"-p", s.dir, "-c", path, "-e", filepath.Join(s.dir, "log")}, err
	},
}

var modulesPath = regexp.MustCompile(`--modules-path=(\S+)`)

func streamModule(binary string) string {
	text, _ := exec.Command(binary, "-V").CombinedOutput()
	if found := modulesPath.FindSubmatch(text); found != nil {
		file := filepath.Join(string(found[1]), "ngx_stream_module.so")
		if _, err := os.Stat(file); err == nil {
			return "load_module " + file + ";\n"
		}
	}
	return ""
}

const nginxConfig = `
daemon off;
pid {dir}/nginx.pid;
worker_processes 1;
worker_rlimit_nofile {fds};
events {
	use epoll;
	worker_connections {fds};
	multi_accept off;
}
stream {
	access_log off;
	proxy_connect_timeout 10s;
	proxy_timeout 10m;
	preread_timeout 10m;
	tcp_nodelay on;
	proxy_buffer_size {buffer};

	ssl_protocols TLSv1.2 TLSv1.3;
	ssl_ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256;
	ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
	ssl_ecdh_curve auto;
	ssl_session_cache shared:one:16m;
	ssl_session_tickets on;
	ssl_handshake_timeout 10m;

	upstream work {
		server {backend};
	}
	map $ssl_preread_server_name $named {
		ecdsa.test work;
	}
	server {
		listen {ecdsa} ssl backlog=4096;
		ssl_certificate {ecdsa-pem};
		ssl_certificate_key {ecdsa-pem};
		proxy_pass work;
	}
	server {
		listen {rsa} ssl backlog=4096;
		ssl_certificate {rsa-pem};
		ssl_certificate_key {rsa-pem};
		proxy_pass work;
	}
	server {
		listen {pass} backlog=4096;
		ssl_preread on;
		proxy_pass $named;
	}
	server {
		listen {tcp} backlog=4096;
		proxy_pass work;
	}
}
`
