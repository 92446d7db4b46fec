// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// TestPeersHeldToOneGroup: clients and backends that have a single group, and certificates with keys of other curves.
func TestPeersHeldToOneGroup(t *testing.T) {
	beside(t)
	a := pki(t)
	names := map[tls.CurveID]string{tls.X25519: "X25519", tls.CurveP256: "P-256", tls.CurveP384: "P-384", tls.CurveP521: "P-521"}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		name := curve.Params().Name
		leaf, err := issue(a.middle, name, func() (crypto.Signer, error) { return ecdsa.GenerateKey(curve, rand.Reader) }, "edge.test")
		if err != nil {
			t.Fatal(err)
		}
		backend := serve(t, func(c *net.TCPConn) {
			config := &tls.Config{Certificates: []tls.Certificate{leaf.certificate(a)}}
			config.GetConfigForClient = func(chi *tls.ClientHelloInfo) (*tls.Config, error) {
				only := config.Clone()
				only.GetConfigForClient = nil
				if len(chi.SupportedProtos) == 1 {
					var group, version uint16
					_, err := fmt.Sscanf(chi.SupportedProtos[0], "%d-%d", &group, &version)
					only.CurvePreferences, only.MaxVersion, only.NextProtos = []tls.CurveID{tls.CurveID(group)}, version, chi.SupportedProtos
					return only, err
				}
				return only, nil
			}
			s := tls.Server(c, config)
			_, _ = io.Copy(s, s)
			_ = s.Close()
		})
		var protocols []string
		for _, group := range []tls.CurveID{tls.CurveP256, tls.CurveP384, tls.CurveP521, tls.X25519} {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				protocols = append(protocols, fmt.Sprintf("%d-%d", group, version))
			}
		}
		dir := filepath.Dir(writeFile(t, "edge.pem", slices.Concat(leaf.pem(), a.middle.pem(), leaf.keyPEM())))
		b := start(t, ":{0} edge.test -> tls://"+backend+" backend-ca=root backend-name=edge.test alpn="+strings.Join(protocols, ","), trusting(t), "CERTS="+dir)
		for _, p := range protocols {
			var group, version uint16
			if _, err := fmt.Sscanf(p, "%d-%d", &group, &version); err != nil {
				t.Fatal(err)
			}
			t.Run(fmt.Sprintf("%s/%s/key %s", tls.CurveID(group), tls.VersionName(version), name), func(t *testing.T) {
				c := b.dialTLS(t, 0, func(c *tls.Config) {
					c.MaxVersion, c.CurvePreferences, c.NextProtos = version, []tls.CurveID{tls.CurveID(group)}, []string{p}
				})
				exchange(t, c, []byte("there and back"))
				_ = c.Close()
				if l := b.lineOf(t, c); l.Outcome != "ok" || l.BackendTLS == "" || l.Group != names[tls.CurveID(group)] {
					t.Errorf("line: %s", l)
				}
			})
		}
	}
}

// TestCheckOffersWhatConnectionsOffer: a server that connections can't agree with is down.
func TestCheckOffersWhatConnectionsOffer(t *testing.T) {
	beside(t)
	for name, c := range map[string]struct {
		change func(*tls.Config)
		up     bool
	}{
		"P-384":         {func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }, true},
		"another group": {func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.SecP384r1MLKEM1024} }, false},
		"CBC only": {func(c *tls.Config) {
			c.CipherSuites, c.MaxVersion = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}, tls.VersionTLS12
		}, false},
		"TLS 1.2":          {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		"TLS 1.1 and less": {func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
	} {
		t.Run(name, func(t *testing.T) {
			config := serverConfig(t, 0)
			c.change(config)
			var asked atomic.Int32
			addr := serve(t, func(raw *net.TCPConn) {
				asked.Add(1)
				s := tls.Server(raw, config)
				_, _ = io.Copy(s, s)
				_ = s.Close()
			})
			b := start(t, ":{0} edge.test -> tls://"+addr+" backend-ca=root backend-name=edge.test check=tls every=100ms rise=1 fall=1", trusting(t))
			want, outcome := "down", "no_backend"
			if c.up {
				want, outcome = "up", "ok"
			}
			until(t, "checked", func() bool { return asked.Load() > 2 })
			until(t, want, func() bool { return b.backend(t, addr).State == want })
			conn := b.dialTLS(t, 0, nil)
			if c.up {
				exchange(t, conn, []byte("up"))
			} else {
				_, _ = io.Copy(io.Discard, conn)
			}
			_ = conn.Close()
			b.lineOf(t, conn).expect(t, logLine{Outcome: outcome})
		})
	}
}
