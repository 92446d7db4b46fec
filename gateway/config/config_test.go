// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/config"
)

// TestNoCertificateIsMadeForNobody: only a demo gets one made. A map that ends no TLS runs where nothing can be written.
func TestNoCertificateIsMadeForNobody(t *testing.T) {
	for rules, made := range map[string]bool{":8443 -> 127.0.0.1:1 mode=tcp": false, ":8443 edge.test -> 127.0.0.1:1 mode=pass": false, ":8443 -> demo": true} {
		state := t.TempDir()
		s, err := config.ReadSettings([]string{"TLSNAT_MAP=" + rules, "TLSNAT_STATE=" + state, "TLSNAT_ADMIN=off"})
		if err != nil {
			t.Fatal(err)
		}
		if c, problems := config.Read(s); c == nil {
			t.Errorf("%s: %v", rules, problems)
		}
		if _, err := os.Stat(filepath.Join(state, "demo")); (err == nil) != made {
			t.Errorf("%s: a certificate was made: %v, should be %v", rules, err == nil, made)
		}
	}
}
