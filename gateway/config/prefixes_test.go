// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/gate"
	"github.com/tlsnat/tlsnat/natmap"
)

// TestPrefixesMeanTheSameEverywhere: in the map, in a list's file, in a setting and in a query. IPv4 in its mapped form is
// IPv4, since that is how addresses of clients are known.
func TestPrefixesMeanTheSameEverywhere(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.7": "192.0.2.7/32", "10.0.0.0/8": "10.0.0.0/8", "2001:db8::/32": "2001:db8::/32", "::1": "::1/128",
		"::ffff:192.0.2.7": "192.0.2.7/32", "::ffff:10.0.0.0/104": "10.0.0.0/8", "::ffff:192.0.2.7/128": "192.0.2.7/32", "::ffff:0.0.0.0/96": "0.0.0.0/0",
		"::/0": "::/0", "::ffff:0:0/95": "", "::ffff:10.0.0.0/80": "", "fe80::1%eth0": "", "fe80::/10%eth0": "", "10.0.0.0/33": "", "10.0.0.0/08": "",
		"": "", "loadbalancer": "", "10.0.0.0/-1": "", "010.0.0.1": "",
	} {
		p, msg, _ := natmap.ParsePrefix(text)
		if (msg == "") != (want != "") || want != "" && p.String() != want {
			t.Errorf("%q in the map: %v, %s; want %q", text, p, msg, want)
		}
		if text == "" {
			continue // an empty line, and a setting that is not set
		}
		if list, complaints := gate.ParseList("list", text); (len(complaints) == 0) != (want != "") || want != "" && list.Len() != 1 {
			t.Errorf("%q in a list: %v; want %q", text, complaints, want)
		}
		s, err := ReadSettings([]string{"TLSNAT_PROXY_FROM=" + text})
		if (err == nil) != (want != "") || want != "" && (len(s.ProxyFrom) != 1 || s.ProxyFrom[0] != p) {
			t.Errorf("%q in a setting: %v, %v; want %q", text, s.ProxyFrom, err, want)
		}
		if want != "" && !s.Trusts(p.Addr()) {
			t.Errorf("%q does not hold %v", text, p.Addr())
		}
	}
	s, err := ReadSettings([]string{"TLSNAT_PROXY_FROM=10.1.2.3/8"}) // as ever
	if err != nil || !s.Trusts(netip.MustParseAddr("10.9.9.9")) {
		t.Errorf("%v, %v", s.ProxyFrom, err)
	}
}

// TestSettingsNameWhatCannotBeSeen: quotes that docker --env-file keeps, carriage returns of files from Windows, and the
// like, in whatever setting. No secret is shown.
func TestSettingsNameWhatCannotBeSeen(t *testing.T) {
	for kv, want := range map[string]string{
		`LOG_LEVEL="info"`:     `TLSNAT_LOG_LEVEL="info": is in quotes`,
		`LOG_LEVEL='info'`:     `TLSNAT_LOG_LEVEL='info': is in quotes`,
		`IDLE_TIMEOUT="15m"`:   "is in quotes",
		`LOOPS="2"`:            "is in quotes",
		`MAP=":1 -> demo"`:     "is in quotes",
		`CERTS="/etc/certs"`:   "is in quotes",
		"WATCH=on\r":           `TLSNAT_WATCH="on\r": ends in a carriage return`,
		"MAX_CONNS=5\r":        "ends in a carriage return",
		"MAP_FILE=/x\r":        "ends in a carriage return",
		"LOG_LEVEL=\ufeffinfo": "begins with a byte order mark",
		"KTLS=a\x1b[31muto":    "cannot be seen",
		"KTLS=a\u009buto":      "cannot be seen",
		"ADMIN_TOKEN=\"secr\"": "TLSNAT_ADMIN_TOKEN: is in quotes",
		"ADMIN_TOKEN=secr\r":   "TLSNAT_ADMIN_TOKEN: ends in a carriage return",
		"KTLS=\u202eotua":      `TLSNAT_KTLS="\u202eotua": write auto, rx or off`,
	} {
		_, err := ReadSettings([]string{Prefix + kv})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secr") {
			t.Errorf("%q: %v, want %q", kv, err, want)
		} else if strings.ContainsAny(err.Error(), "\r\x1b\n") {
			t.Errorf("%q: %q", kv, err)
		}
	}
	if _, err := ReadSettings([]string{"TLSNAT_MAP=:1 -> demo\r\n:2 -> demo\r\n"}); err != nil {
		t.Errorf("lines of a map from Windows: %v", err)
	}
	if _, err := natmap.Parse(natmap.Source{Name: "m", Text: "\ufeff:1 -> demo\r\n:2 -> demo\r\n"}); err != nil {
		t.Errorf("a map from Windows: %v", err)
	}
}
