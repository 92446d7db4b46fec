// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
)

// certFile writes a new certificate for a name, with its chain and key, as NAME.pem.
func certFile(t testing.TB, dir, name string) *identity {
	t.Helper()
	id, err := issue(pki(t).middle, name, ecdsaKey, name)
	if err != nil {
		t.Fatal(err)
	}
	text := slices.Concat(id.pem(), pki(t).middle.pem(), id.keyPEM())
	if err := os.WriteFile(filepath.Join(dir, name+".pem"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return id
}

// shows says whether clients that ask for the name are shown this certificate.
func (b *bed) shows(t testing.TB, id *identity, name string) bool {
	t.Helper()
	c := b.dialTLS(t, 0, func(c *tls.Config) { c.ServerName, c.ClientSessionCache = name, nil })
	defer c.Close()
	return bytes.Equal(c.ConnectionState().PeerCertificates[0].Raw, id.Raw)
}

// spoil are ways in which a file becomes unusable.
var spoil = map[string]func(path string, content []byte) error{
	"cut short": func(path string, content []byte) error { return os.WriteFile(path, content[:200], 0o600) },
	"empty":     func(path string, _ []byte) error { return os.Truncate(path, 0) },
	"no PEM":    func(path string, _ []byte) error { return os.WriteFile(path, []byte("<html>404</html>"), 0o600) },
	"no key": func(path string, content []byte) error {
		return os.WriteFile(path, content[:bytes.Index(content, []byte("-----BEGIN PRIVATE"))], 0o600)
	},
	"a pipe": func(path string, _ []byte) error {
		_ = os.Remove(path)
		return unix.Mkfifo(path, 0o600)
	},
	"a dangling link": func(path string, _ []byte) error {
		_ = os.Remove(path)
		return os.Symlink("gone", path)
	},
	"renewed under another name, and cut short": func(path string, content []byte) error {
		_ = os.Remove(path)
		return os.WriteFile(filepath.Join(filepath.Dir(path), "renewed.pem"), content[:200], 0o600)
	},
}

// TestUnusableCertificateKeepsWhatItHad: the name keeps its certificate, another one that was renewed is taken, and the
// unusable file is said.
func TestUnusableCertificateKeepsWhatItHad(t *testing.T) {
	for how, do := range spoil {
		t.Run(how, func(t *testing.T) {
			beside(t)
			v := startLive(t, ":{0} edge.test -> "+echoServer(t))
			certFile(t, v.certs, "a.test")
			b := certFile(t, v.certs, "b.test")
			v.reload(t, ":{0} a.test b.test -> "+echoServer(t))
			path := filepath.Join(v.certs, "b.test.pem")
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := do(path, whole); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time what was kept is kept
				renewed := certFile(t, v.certs, "a.test")
				r := v.gateway.Reload()
				if !r.OK || r.Unusable == 0 || v.gateway.Status().Unusable != r.Unusable {
					t.Fatalf("%+v, status %d", r, v.gateway.Status().Unusable)
				}
				if !v.shows(t, renewed, "a.test") || !v.shows(t, b, "b.test") {
					t.Error("the renewed one is not taken, or the other one not kept")
				}
				kept := slices.IndexFunc(v.gateway.Certificates(100), func(i gateway.CertInfo) bool { return i.Kept && slices.Contains(i.Names, "b.test") })
				if said := strings.Join(r.Problems, "\n"); kept < 0 || !strings.Contains(said, "b.test is still served with the certificate that was read before") {
					t.Errorf("kept: %d, said: %s", kept, said)
				}
			}
			if !slices.ContainsFunc(v.log.all(), func(l logLine) bool { return l.Level == "error" && strings.Contains(l.Msg, v.certs) }) {
				t.Error("no error is in the log")
			}
			_ = os.Remove(filepath.Join(v.certs, "renewed.pem"))
			_ = os.Remove(path)
			again := certFile(t, v.certs, "b.test")
			if r := v.gateway.Reload(); !r.OK || r.Unusable != 0 || !v.shows(t, again, "b.test") {
				t.Errorf("what is whole again is not taken: %+v", r)
			}
			_ = os.Remove(path)
			if r := v.gateway.Reload(); !r.OK || slices.ContainsFunc(v.gateway.Certificates(100), func(i gateway.CertInfo) bool { return slices.Contains(i.Names, "b.test") }) {
				t.Errorf("a certificate that was removed is served: %+v", r)
			}
		})
	}
}

// TestUnusableFilesAtTheStart: what is whole is served; a rule that needs what cannot be read lets nothing through.
func TestUnusableFilesAtTheStart(t *testing.T) {
	beside(t)
	dir, cas := t.TempDir(), t.TempDir()
	a := certFile(t, dir, "a.test")
	for _, path := range []string{filepath.Join(dir, "b.pem"), filepath.Join(cas, "corp.pem")} {
		if err := os.WriteFile(path, []byte("-----BEGIN CERTIFICATE-----\nMIIB"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good, err := os.ReadFile(pki(t).rootFile(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cas, "root.pem"), good, 0o600); err != nil {
		t.Fatal(err)
	}
	secure := sServer(t, "ECDSA")
	b := start(t, fmt.Sprintf(":{0} a.test -> %s\n:{1} -> tls://%[2]s mode=tcp backend-ca=corp backend-name=edge.test\n"+
		":{2} -> tls://%[2]s mode=tcp backend-ca=root backend-name=edge.test\n:{3} -> tls://%[2]s mode=tcp backend-ca=root backend-cert=b.test\n"+
		":{4} -> %[1]s cert=b.test", echoServer(t), secure), "CERTS="+dir, "BACKEND_CAS="+cas)
	if !b.shows(t, a, "a.test") || b.gateway.Status().Unusable == 0 {
		t.Error("what is whole is not served, or what is not is not said")
	}
	b.reverse(t, 2)
	for port, why := range map[int]string{1: "the CA of backend-ca=corp cannot be read", 3: "the certificate of backend-cert=b.test cannot be read"} {
		if c, err := net.Dial("tcp", b.addr(port)); err == nil { // the reset may be faster
			_, _ = c.Write([]byte("x"))
			if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
				t.Error("something came back from a backend that nothing can verify")
			}
			_ = c.Close()
		}
		if l := b.line(t, func(l logLine) bool { return strings.Contains(l.Error, why) }); l.Outcome != "connect_failed" {
			t.Errorf("%s", l)
		}
	}
	if r := b.gateway.Reload(); !r.OK {
		t.Errorf("what could not be read at the start keeps the rest from being reloaded: %+v", r)
	}
}

// TestReloadDoesNotExchangeAGoodCAForABadOne: an unusable file keeps the CA that was read from it, and a map that comes to
// name a CA that is not there is a mistake in the map.
func TestReloadDoesNotExchangeAGoodCAForABadOne(t *testing.T) {
	beside(t)
	cas := t.TempDir()
	good, err := os.ReadFile(pki(t).rootFile(t))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cas, "corp.pem")
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	rule := ":{0} -> tls://" + sServer(t, "ECDSA") + " mode=tcp backend-name=edge.test backend-ca="
	v := startLive(t, rule+"corp", "BACKEND_CAS="+cas)
	v.reverse(t, 0)
	for how, do := range spoil {
		if how == "no key" || strings.HasPrefix(how, "renewed") {
			continue // no matter for a CA
		}
		_ = os.Remove(path)
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := do(path, good); err != nil {
			t.Fatal(err)
		}
		if r := v.gateway.Reload(); !r.OK || r.Unusable == 0 {
			t.Errorf("%s: %+v", how, r)
		}
		v.reverse(t, 0)
	}
	v.write(t, rule+"copr")
	if r := v.gateway.Reload(); r.OK {
		t.Errorf("a mistake in the map was taken: %+v", r)
	}
	v.reverse(t, 0)
}

// TestMapDirectoryHasWhatEditorsLeave: locks, backups and directories are no rules.
func TestMapDirectoryHasWhatEditorsLeave(t *testing.T) {
	dir := t.TempDir()
	rule := []byte(":9443 -> 127.0.0.1:1 mode=tcp\n")
	for name, text := range map[string][]byte{"10.natmap": rule, ".hidden.natmap": []byte("no rule"), "10.natmap~": rule, ".10.natmap.swp": rule, "#10.natmap#": rule, "._10.natmap": {0}} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("op@host.77:1700000000", filepath.Join(dir, ".#10.natmap")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "20.natmap"), 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := config.ReadSettings([]string{"TLSNAT_MAP_FILE=" + dir, "TLSNAT_ADMIN=off"})
	if err != nil {
		t.Fatal(err)
	}
	config, problems := config.Read(s)
	if config == nil || len(config.Map.Rules) != 1 || len(problems) != 1 || !strings.Contains(problems.String(), "20.natmap: is a directory") {
		t.Errorf("%v", problems)
	}
}

// TestPipesAreNotWaitedFor: whatever a setting or the map names, a pipe is an error and no wait.
func TestPipesAreNotWaitedFor(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe.natmap")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, settings := range [][]string{
		{"TLSNAT_MAP_FILE=" + pipe},
		{"TLSNAT_MAP_FILE=" + dir},
		{"TLSNAT_MAP=:9443 -> 127.0.0.1:1 mode=tcp deny=@" + pipe},
	} {
		s, err := config.ReadSettings(append(settings, "TLSNAT_ADMIN=off"))
		if err != nil {
			t.Fatal(err)
		}
		if _, problems := config.Read(s); !problems.Errors() || !strings.Contains(problems.String(), "is not a regular file") {
			t.Errorf("%v: %v", settings, problems)
		}
	}
}

// TestMapsAndListsFromWindows: UTF-16 is called by its name; marks and line ends of other systems are no matter.
func TestMapsAndListsFromWindows(t *testing.T) {
	const text = ":9443 -> 127.0.0.1:1 mode=tcp\n:9444 -> 127.0.0.1:1 mode=tcp\n"
	wide := []byte{0xff, 0xfe}
	for _, b := range []byte(text) {
		wide = append(wide, b, 0)
	}
	for _, c := range []struct {
		name, content string
		rules         int
	}{
		{"UTF-16", string(wide), 0},
		{"UTF-16 without a mark", string(wide[2:]), 0},
		{"carriage returns", strings.ReplaceAll(text, "\n", "\r"), 2},
		{"both", strings.ReplaceAll(text, "\n", "\r\n"), 2},
		{"a mark at the start and in the middle", "\ufeff" + strings.ReplaceAll(text, "\n:", "\n\ufeff:"), 2},
	} {
		s, err := config.ReadSettings([]string{"TLSNAT_MAP_FILE=" + writeFile(t, "edge.natmap", []byte(c.content)), "TLSNAT_ADMIN=off"})
		if err != nil {
			t.Fatal(err)
		}
		config, problems := config.Read(s)
		if c.rules == 0 && !strings.Contains(problems.String(), "is text in UTF-16") || c.rules > 0 && (config == nil || len(config.Map.Rules) != c.rules) {
			t.Errorf("%s: %v", c.name, problems)
		}
	}
}

// TestUnusableListsCloseTheirRules: at the start a rule with a list that cannot be read lets nobody in, and the others are
// served. After that the rule has the list that was read before.
func TestUnusableListsCloseTheirRules(t *testing.T) {
	beside(t)
	list := writeFile(t, "block.txt", []byte("192.0.2.0/24\n198.51.10"))
	backend := echoServer(t)
	b := start(t, ":{0} -> "+backend+" mode=tcp deny=@"+list+"\n:{1} -> "+backend+" mode=tcp")
	in := func(port int) bool {
		_, err := echoes(t, "127.0.0.1", b.addr(port))
		return err == nil
	}
	if in(0) || !in(1) || b.gateway.Status().Unusable != 1 {
		t.Errorf("let in: %v, the other rule: %v, unusable files: %d", in(0), in(1), b.gateway.Status().Unusable)
	}
	for i, text := range []string{"192.0.2.0/24\n", "127.0.0.0/8 and more", ""} {
		if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			_ = os.Remove(list)
		}
		if r := b.gateway.Reload(); !r.OK || r.Unusable != min(i, 1) || !in(0) {
			t.Errorf("%q: let in: %v, %+v", text, in(0), r)
		}
	}
}
