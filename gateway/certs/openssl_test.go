// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/printable"
)

// Every way in which openssl writes a key, beside the certificate that it makes of it. $K is key.pem, which each
// case makes; the certificate is for a.example.
func TestKeysOfOpensslLoad(t *testing.T) {
	const ec = "openssl ecparam -genkey -noout -name "
	for name, c := range map[string]struct{ make, want string }{
		"RSA PKCS#8":           {"openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out $K", "RSA 2048"},
		"RSA PKCS#1":           {"openssl genrsa -traditional -out $K 2048", "RSA 2048"},
		"RSA 3072":             {"openssl genrsa -out $K 3072", "RSA 3072"},
		"P-256 SEC1":           {ec + "prime256v1 -out $K", "ECDSA P-256"},
		"P-256 and parameters": {"openssl ecparam -genkey -name prime256v1 -out $K", "ECDSA P-256"},
		"P-256 PKCS#8":         {"openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out $K", "ECDSA P-256"},
		"P-384":                {ec + "secp384r1 -out $K", "ECDSA P-384"},
		"P-521":                {ec + "secp521r1 -out $K", "ECDSA P-521"},
		"Ed25519":              {"openssl genpkey -algorithm ed25519 -out $K", "Ed25519"},
		"with text":            {ec + "prime256v1 | openssl pkey -text -out $K", "ECDSA P-256"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			opensslPair(t, dir, c.make)
			s, problems := Load(dir, time.Now())
			problems = slices.DeleteFunc(problems, func(p Problem) bool { return strings.Contains(p.Msg, "not take") }) // browsers, some types
			if got := serves(s); len(problems) > 0 || !slices.Equal(got, []string{"a.example = " + c.want}) {
				t.Errorf("serves %q, problems %q", got, messages(dir, problems))
			}
		})
	}
}

// opensslPair makes key.pem by a shell command, and cert.pem for it.
func opensslPair(t *testing.T, dir, command string) {
	t.Helper()
	shellRun(t, dir, command+"; chmod 600 $K; openssl req -x509 -new -key $K -days 300 -subj /CN=x -addext subjectAltName=DNS:a.example -out cert.pem")
}

func shellRun(t *testing.T, dir, command string) {
	t.Helper()
	program(t, "openssl")
	cmd := exec.Command("/bin/sh", "-ec", command)
	cmd.Dir, cmd.Env = dir, []string{"K=key.pem", "PATH=/usr/sbin:/usr/bin:/bin"}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

func TestOpensslFilesThatCannotBeServedAreExplained(t *testing.T) {
	const key = "openssl ecparam -genkey -noout -name prime256v1 -out $K"
	for name, c := range map[string]struct {
		key, then string
		want      []string // the beginnings of the messages
	}{
		"encrypted PKCS#8": {key, "openssl pkey -in $K -aes128 -passout pass:x -out e && mv e $K",
			[]string{"error DIR/cert.pem:1: the certificate for a.example has no private key", "error DIR/key.pem:1: private key is encrypted with a passphrase; decrypt it with: openssl pkey"}},
		"encrypted of old": {key, "openssl ec -in $K -aes128 -passout pass:x -out e && mv e $K",
			[]string{"error DIR/cert.pem:1: the certificate for a.example has no private key", "error DIR/key.pem:1: private key is encrypted with a passphrase; decrypt it with: openssl pkey"}},
		"PKCS#12": {key, "openssl pkcs12 -export -inkey $K -in cert.pem -passout pass: -out a.pem && rm key.pem cert.pem",
			[]string{"error DIR/a.pem: is PKCS#12, not PEM; convert it with: openssl pkcs12 -nodes -in DIR/a.pem -out DIR/a.pem.pem"}},
		"PKCS#7 DER": {key, "openssl crl2pkcs7 -nocrl -certfile cert.pem -outform der -out a.cer && rm key.pem cert.pem",
			[]string{"error DIR/a.cer: is PKCS#7 in DER, not PEM; convert it with: openssl pkcs7 -inform der -print_certs -in DIR/a.cer -out DIR/a.cer.pem"}},
		"PKCS#7 PEM": {key, "openssl crl2pkcs7 -nocrl -certfile cert.pem -out a.cer && rm key.pem cert.pem",
			[]string{"error DIR/a.cer:1: is PKCS#7, which is not read; convert it with: openssl pkcs7 -print_certs -in DIR/a.cer -out DIR/a.cer.pem"}},
		"DER": {key, "openssl x509 -in cert.pem -outform der -out a.crt && openssl pkey -in key.pem -outform der -out a.key && rm key.pem cert.pem",
			[]string{"error DIR/a.crt: is a certificate in DER, not PEM; convert it with: openssl x509 -inform der", "error DIR/a.key: is a private key in DER, not PEM; convert it with: openssl pkey -inform der"}},
		"trusted": {key, "openssl x509 -in cert.pem -trustout -out t && mv t cert.pem",
			[]string{"error DIR/cert.pem:1: is OpenSSL's TRUSTED CERTIFICATE", "warning DIR/key.pem:1: no certificate is for this private key"}},
		"Ed448": {"openssl genpkey -algorithm ed448 -out $K", "",
			[]string{"error DIR/cert.pem:1: not served: its key is for Ed448, which TLS clients do not take", "error DIR/key.pem:1: private key is for Ed448, which TLS clients do not take; use"}},
		"RSASSA-PSS": {"openssl genpkey -algorithm rsa-pss -pkeyopt rsa_keygen_bits:2048 -out $K", "",
			[]string{"error DIR/cert.pem:1: not served: its key is for RSASSA-PSS", "error DIR/key.pem:1: private key is for RSASSA-PSS"}},
		"secp256k1": {"openssl ecparam -genkey -noout -name secp256k1 -out $K", "",
			[]string{"error DIR/cert.pem:1: certificate cannot be parsed: unsupported elliptic curve", "error DIR/key.pem:1: private key cannot be parsed; use ECDSA with P-256"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := plainDir(t)
			opensslPair(t, dir, c.key)
			shellRun(t, dir, c.then)
			s, problems := Load(dir, time.Now())
			got := messages(dir, problems)
			if s != nil || !slices.EqualFunc(got, c.want, strings.HasPrefix) {
				t.Errorf("messages:\n%s", strings.Join(got, "\n"))
			}
		})
	}
}

// The commands that the hints give must do what they say.
func TestHintsConvert(t *testing.T) {
	dir := plainDir(t)
	opensslPair(t, dir, "openssl ecparam -genkey -noout -name prime256v1 -out $K")
	shellRun(t, dir, "openssl x509 -in cert.pem -outform der -out a.crt; openssl pkey -in key.pem -outform der -out a.key; rm key.pem cert.pem")
	_, problems := Load(dir, time.Now())
	for _, p := range problems {
		command := strings.TrimSuffix(strings.TrimPrefix(p.Hint, "convert it with: "), ", and remove it")
		shellRun(t, dir, command+" && rm "+printable.Shell(p.File))
	}
	shellRun(t, dir, "chmod 600 *")
	s, problems := Load(dir, time.Now())
	if s.Only() == nil || len(problems) > 0 {
		t.Errorf("problems %q", messages(dir, problems))
	}
}

func TestSHA1SignatureIsAWarning(t *testing.T) {
	dir := plainDir(t)
	shellRun(t, dir, `
		openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 3000 -subj /CN=Root
		openssl req -newkey rsa:2048 -nodes -keyout $K -out csr -subj /CN=x
		echo subjectAltName=DNS:a.example >ext
		openssl x509 -req -sha1 -in csr -extfile ext -CA ca.crt -CAkey ca.key -days 300 -out cert.pem
		rm ca.key csr ext; chmod 600 *`)
	s, problems := Load(dir, time.Now())
	want := []string{"warning DIR/cert.pem:1: is signed with SHA1-RSA, which clients refuse; ask its CA for another one"}
	if got := messages(dir, problems); s.Only() == nil || !slices.Equal(got, want) {
		t.Errorf("messages %q", got)
	}
}

// A chain that openssl's client verifies is what openssl's tools would be asked about in a support call.
func TestOpensslVerifiesTheServedChain(t *testing.T) {
	dir := t.TempDir()
	root := authority(t, nil, "Root")
	upper := authority(t, root, "Upper")
	lower := authority(t, upper, "Lower")
	id := leaf(t, lower, "a.example")
	put(t, dir, "a.pem", upper.certPEM(), lower.certPEM(), id.certPEM(), id.keyPEM(t))
	s, _ := Load(dir, noon)
	out := t.TempDir()
	var text []string
	for _, der := range s.Only().Served(noon)[0].TLS().Certificate {
		text = append(text, pemText("CERTIFICATE", der))
	}
	put(t, out, "leaf.pem", text[0])
	put(t, out, "above.pem", text[1:]...)
	put(t, out, "root.pem", root.certPEM())
	in := func(name string) string { return filepath.Join(out, name) }
	got := run(t, "openssl", "verify", "-attime", "1780315200", "-verify_hostname", "a.example",
		"-CAfile", in("root.pem"), "-untrusted", in("above.pem"), in("leaf.pem"))
	if !strings.Contains(got, ": OK") {
		t.Errorf("%q", got)
	}
}
