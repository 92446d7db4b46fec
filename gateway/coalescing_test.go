// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/config"
)

// TestSharedCertificateWithHTTP2IsWarnedOf: if browsers would mix two names up, and only then.
func TestSharedCertificateWithHTTP2IsWarnedOf(t *testing.T) {
	dir := t.TempDir()
	for _, names := range [][]string{{"*.shop.test"}, {"x.test", "y.test"}, {"z.test"}} {
		id, err := issue(pki(t).middle, names[0], ecdsaKey, names...)
		if err != nil {
			t.Fatal(err)
		}
		text := slices.Concat(id.pem(), pki(t).middle.pem(), id.keyPEM())
		if err := os.WriteFile(filepath.Join(dir, strings.Trim(names[0], "*.")+".pem"), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		rules string
		both  []string // names in the one warning; nil: there is none
	}{
		{":9443 a.shop.test -> 127.0.0.1:1 alpn=h2;:9443 b.shop.test -> 127.0.0.1:2 alpn=h2", []string{"a.shop.test", "b.shop.test"}},
		{":9443 a.shop.test -> 127.0.0.1:1 alpn=h2,http/1.1;:9443 b.shop.test -> 127.0.0.1:2", []string{"a.shop.test", "b.shop.test"}},
		{":9443 a.shop.test -> 127.0.0.1:1;:9443 b.shop.test -> 127.0.0.1:2 alpn=h2", []string{"a.shop.test", "b.shop.test"}},
		{":9443 a.shop.test -> 127.0.0.1:1 alpn=h2;:9443 *.shop.test -> 127.0.0.1:2", []string{"a.shop.test", "*.shop.test"}},
		{":9443 x.test -> 127.0.0.1:1 alpn=h2;:9443 y.test -> 127.0.0.1:2 mode=pass", []string{"x.test", "y.test"}},
		{":9443 x.test -> 127.0.0.1:1 alpn=h2;127.0.0.1:9443 y.test -> 127.0.0.1:2", []string{"x.test", "y.test"}},
		{":9443 a.shop.test b.shop.test -> 127.0.0.1:1 alpn=h2", nil},
		{":9443 a.shop.test -> 127.0.0.1:1 127.0.0.1:2 alpn=h2;:9443 b.shop.test -> 127.0.0.1:2 127.0.0.1:1 alpn=h2", nil},
		{":9443 a.shop.test -> 127.0.0.1:1;:9443 b.shop.test -> 127.0.0.1:2", nil},
		{":9443 a.shop.test -> 127.0.0.1:1 alpn=http/1.1;:9443 b.shop.test -> 127.0.0.1:2 alpn=http/1.1", nil},
		{":9443 a.shop.test -> 127.0.0.1:1 alpn=h2;:9444 b.shop.test -> 127.0.0.1:2 alpn=h2", nil},
		{":9443 x.test -> 127.0.0.1:1 alpn=h2;:9443 z.test -> 127.0.0.1:2 alpn=h2", nil},
		{":9443 a.shop.test -> 127.0.0.1:1 alpn=h2;:9443 b.shop.test -> 127.0.0.1:2 alpn=h2;:9443 c.shop.test -> 127.0.0.1:3 alpn=h2", []string{"a.shop.test"}},
	} {
		s, err := config.ReadSettings([]string{"TLSNAT_MAP=" + c.rules, "TLSNAT_CERTS=" + dir, "TLSNAT_ADMIN=off"})
		if err != nil {
			t.Fatal(err)
		}
		config, problems := config.Read(s)
		said := problems.String()
		if config == nil || len(problems) != min(1, len(c.both)) || slices.ContainsFunc(c.both, func(name string) bool { return !strings.Contains(said, name) }) {
			t.Errorf("%s:\n%s", c.rules, said)
		}
	}
}
