// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// world is what the cases build their directories of.
type world struct {
	*testing.T
	dir                string
	root, inter, other *identity
	a                  *identity // for a.example, by inter
}

func (w *world) put(name string, parts ...string) { w.T.Helper(); put(w.T, w.dir, name, parts...) }

// pair writes a.crt with its chain, and a.key.
func (w *world) pair(id *identity) {
	w.put("a.crt", id.certPEM(), w.inter.certPEM())
	w.put("a.key", id.keyPEM(w.T))
}

var complaints = []struct {
	name  string
	build func(w *world)
	want  []string // messages; DIR stands for the directory
	serve []string
}{
	{"a directory that does not exist", func(w *world) { os.Remove(w.dir) },
		[]string{`error DIR: does not exist; make it, or name the directory that holds the certificates`}, nil},
	{"an empty directory", func(w *world) { w.put("README.txt", "") },
		[]string{`error DIR: no certificate with its key: 0 files *.pem, *.crt, *.cer, *.key were read; put NAME.crt and NAME.key into it; one level of subdirectories is read too`}, nil},
	{"only a CA", func(w *world) { w.put("ca.crt", w.root.certPEM()) },
		[]string{`error DIR: no certificate with its key: 1 files *.pem, *.crt, *.cer, *.key were read; put NAME.crt and NAME.key into it; one level of subdirectories is read too`}, nil},
	{"a link to nothing", func(w *world) { w.pair(w.a); symlink(w.T, w.dir, "gone/b.crt", "b.crt") },
		[]string{`error DIR/b.crt: is a link to gone/b.crt, which does not exist; renew the link or remove it`}, []string{"a.example = ECDSA P-256"}},
	{"a pipe", func(w *world) { w.pair(w.a); syscall.Mkfifo(filepath.Join(w.dir, "b.pem"), 0o600) },
		[]string{`error DIR/b.pem: is not a regular file; put a file or a link to a file there`}, []string{"a.example = ECDSA P-256"}},
	{"a file that is too large", func(w *world) { w.pair(w.a); w.put("b.pem", strings.Repeat("x", maxFile+1)) },
		[]string{`error DIR/b.pem: is too large: it has more than 1024 KiB; a chain and its key take a few KiB: give each certificate a file of its own`}, []string{"a.example = ECDSA P-256"}},

	{"a certificate without its key", func(w *world) { w.put("a.crt", w.a.certPEM(), w.inter.certPEM()) },
		[]string{`error DIR/a.crt:1: the certificate for a.example has no private key: none of the 0 keys here is for it; put its key beside it, as a.key`}, nil},
	{"a key without its certificate", func(w *world) { w.pair(w.a); w.put("b.key", leaf(w.T, nil, "b").keyPEM(w.T)) },
		[]string{`warning DIR/b.key:1: no certificate is for this private key; put the certificate that its CA returned beside it, or remove the key`}, []string{"a.example = ECDSA P-256"}},
	{"a key of the same name that does not fit", func(w *world) {
		w.put("a.crt", w.a.certPEM(), w.inter.certPEM())
		w.put("a.key", leaf(w.T, nil, "b").keyPEM(w.T))
	}, []string{`error DIR/a.crt:1: the key at a.key:1 is not its key: the certificate for a.example is not served; put the key there that the certificate was requested with`}, nil},
	{"a key in the same file that does not fit", func(w *world) {
		w.put("a.pem", w.a.certPEM(), w.inter.certPEM(), leaf(w.T, nil, "b").keyPEM(w.T))
	}, []string{`error DIR/a.pem:1: the key at a.pem:20 is not its key: the certificate for a.example is not served; put the key there that the certificate was requested with`}, nil},
	{"a self-signed certificate without its key", func(w *world) {
		w.put("a.crt", issue(w.T, nil, ask{names: []string{"a.example"}, change: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }}).certPEM())
	}, []string{`error DIR/a.crt:1: the certificate for a.example has no private key: none of the 0 keys here is for it; put its key beside it, as a.key`}, nil},
	{"a key in the same directory that does not fit", func(w *world) {
		w.put("a/fullchain.pem", w.a.certPEM(), w.inter.certPEM())
		w.put("a/privkey.pem", leaf(w.T, nil, "b").keyPEM(w.T))
	}, []string{`error DIR/a/fullchain.pem:1: the key at a/privkey.pem:1 is not its key: the certificate for a.example is not served; put the key there that the certificate was requested with`}, nil},
	{"a key with a passphrase, PKCS#8", func(w *world) {
		w.put("a.crt", w.a.certPEM(), w.inter.certPEM())
		w.put("a.key", pemText("ENCRYPTED PRIVATE KEY", []byte{0x30, 0}))
	}, []string{
		`error DIR/a.crt:1: the certificate for a.example is not served: its key should be in a.key, which cannot be used`,
		`error DIR/a.key:1: private key is encrypted with a passphrase; decrypt it with: openssl pkey -in DIR/a.key -out DIR/a-plain.key, and remove it`}, nil},
	{"a key with a passphrase, of old", func(w *world) {
		w.pair(w.a)
		w.put("b.key", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES"}, Bytes: []byte{1}})))
	}, []string{`error DIR/b.key:1: private key is encrypted with a passphrase; decrypt it with: openssl pkey -in DIR/b.key -out DIR/b-plain.key, and remove it`}, []string{"a.example = ECDSA P-256"}},
	{"a key that is none", func(w *world) { w.pair(w.a); w.put("b.key", pemText("PRIVATE KEY", []byte("nonsense"))) },
		[]string{`error DIR/b.key:1: private key cannot be parsed; use ECDSA with P-256, P-384 or P-521, RSA or Ed25519; openssl pkey -check -noout -in DIR/b.key says more`}, []string{"a.example = ECDSA P-256"}},
	{"a key that is too large", func(w *world) { w.pair(w.a); w.put("b.key", pemText("PRIVATE KEY", make([]byte, maxKey+1))) },
		[]string{`error DIR/b.key:1: private key is larger than RSA-8192; make a new key with: openssl ecparam -name prime256v1 -genkey -noout`}, []string{"a.example = ECDSA P-256"}},
	{"a key that others can read", func(w *world) { w.pair(w.a); os.Chmod(filepath.Join(w.dir, "a.key"), 0o640) },
		[]string{`warning DIR/a.key: the private key can be read by others: mode 0640; run: chmod 600 DIR/a.key`}, []string{"a.example = ECDSA P-256"}},
	{"a key that root lends to a group", func(w *world) {
		w.pair(w.a)
		if err := os.Chown(filepath.Join(w.dir, "a.key"), 0, 65534); err != nil {
			testkit.Missing(w.T, "only root can give a file away")
		}
		os.Chmod(filepath.Join(w.dir, "a.key"), 0o640)
	}, nil, []string{"a.example = ECDSA P-256"}},
	{"many keys that others can read", func(w *world) {
		w.pair(w.a)
		b := leaf(w.T, w.inter, "b.example")
		w.put("it's b.pem", b.certPEM(), w.inter.certPEM(), b.keyPEM(w.T))
		os.Chmod(filepath.Join(w.dir, "a.key"), 0o644)
		os.Chmod(filepath.Join(w.dir, "it's b.pem"), 0o604)
	}, []string{`warning DIR/a.key: the private key can be read by others: mode 0644 (and 1 more in DIR); run: chmod 600 DIR/a.key 'DIR/it'\''s b.pem'`},
		[]string{"a.example = ECDSA P-256", "b.example = ECDSA P-256"}},
	{"a Kubernetes secret that others can read", func(w *world) {
		w.pair(w.a)
		symlink(w.T, w.dir, "..2026", "..data")
		os.Chmod(filepath.Join(w.dir, "a.key"), 0o644)
	}, []string{`warning DIR/a.key: the private key can be read by others: mode 0644; set defaultMode: 0400 in the secret's volume`}, []string{"a.example = ECDSA P-256"}},

	{"an expired certificate", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, from: -90 * days, to: -time.Hour}))
	}, []string{`warning DIR/a.crt:1: the certificate for a.example expired 2026-06-01 11:00 UTC; renew it: clients refuse it`}, []string{"a.example = ECDSA P-256"}},
	{"a certificate of tomorrow", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, from: days, to: 90 * days}))
	}, []string{`warning DIR/a.crt:1: the certificate for a.example is not valid before 2026-06-02 12:00 UTC; check the clock of this machine`}, []string{"a.example = ECDSA P-256"}},
	{"a certificate for 20 more days", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, from: -70 * days, to: 20 * days}))
	}, []string{`warning DIR/a.crt:1: the certificate for a.example expires in 20 days, 2026-06-21 12:00 UTC; renew it`}, []string{"a.example = ECDSA P-256"}},
	{"a short certificate for 3 more days is fine", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, from: -3 * days, to: 3 * days}))
	}, nil, []string{"a.example = ECDSA P-256"}},
	{"a short certificate for 30 more hours", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, from: -5 * days, to: 30 * time.Hour}))
	}, []string{`warning DIR/a.crt:1: the certificate for a.example expires in 30 hours, 2026-06-02 18:00 UTC; renew it`}, []string{"a.example = ECDSA P-256"}},

	{"no intermediate", func(w *world) {
		id := issue(w.T, w.inter, ask{names: []string{"a.example"}, change: func(c *x509.Certificate) { c.IssuingCertificateURL = []string{"http://ca.example/i.crt"} }})
		w.put("a.pem", id.certPEM(), id.keyPEM(w.T))
	}, []string{`warning DIR/a.pem:1: the certificate of its issuer "Intermediate" is missing: clients that do not know it refuse the chain; append it to the file, or if it is a root put it into one of its own; it is at http://ca.example/i.crt`}, []string{"a.example = ECDSA P-256"}},
	{"a chain in the wrong order", func(w *world) {
		w.put("a.pem", w.inter.certPEM(), w.a.certPEM(), w.a.keyPEM(w.T))
	}, []string{`warning DIR/a.pem:10: the chain is not in order; it is served in order; write the leaf first, then each issuer after what it signed`}, []string{"a.example = ECDSA P-256"}},
	{"a chain with its root", func(w *world) {
		w.put("a.pem", w.a.keyPEM(w.T), w.a.certPEM(), w.inter.certPEM(), w.root.certPEM())
	}, []string{`warning DIR/a.pem:25: the root "Root" is sent with each handshake: clients have it or do not believe it; remove it`}, []string{"a.example = ECDSA P-256"}},
	{"a chain of somebody else", func(w *world) {
		w.put("a.pem", w.a.keyPEM(w.T), w.a.certPEM(), w.other.certPEM())
	}, []string{
		`warning DIR/a.pem:6: the certificate of its issuer "Intermediate" is missing: clients that do not know it refuse the chain; append it to the file, or if it is a root put it into one of its own`,
		`warning DIR/a.pem:16: "Other" is no part of the chain of a certificate in this file; remove it, or replace it by the certificate that is missing`}, []string{"a.example = ECDSA P-256"}},
	{"an intermediate of the same name", func(w *world) {
		w.put("a.pem", w.a.keyPEM(w.T), w.a.certPEM(), authority(w.T, w.root, "Intermediate").certPEM())
	}, []string{
		`warning DIR/a.pem:6: names as its issuer "Intermediate", but that one, DIR/a.pem:16, did not sign it; ask its CA for another one`,
		`warning DIR/a.pem:16: "Intermediate" is no part of the chain of a certificate in this file; remove it, or replace it by the certificate that is missing`}, []string{"a.example = ECDSA P-256"}},
	{"an issuer that is no CA", func(w *world) {
		no := issue(w.T, w.root, ask{cn: "No CA", key: edKey(w.T)})
		id := leaf(w.T, no, "a.example")
		w.put("a.pem", id.keyPEM(w.T), id.certPEM(), no.certPEM())
	}, []string{
		`warning DIR/a.pem:6: names as its issuer "No CA", but that one, DIR/a.pem:15, is not a CA; ask its CA for another one`,
		`warning DIR/a.pem:15: "No CA" is no part of the chain of a certificate in this file; remove it, or replace it by the certificate that is missing`}, []string{"a.example = ECDSA P-256"}},
	{"an expired intermediate", func(w *world) {
		old := issue(w.T, w.root, ask{cn: "Old", from: -300 * days, to: -days, change: func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		}})
		a, b := leaf(w.T, old, "a.example"), leaf(w.T, old, "b.example")
		w.put("a.pem", a.certPEM(), old.certPEM(), a.keyPEM(w.T))
		w.put("b.pem", b.certPEM(), old.certPEM(), b.keyPEM(w.T))
	}, []string{`warning DIR/a.pem:11: the intermediate "Old" expired 2026-05-31 12:00 UTC; put the CA's new one there`}, []string{"a.example = ECDSA P-256", "b.example = ECDSA P-256"}},
	{"the same certificate twice", func(w *world) {
		w.put("a.pem", w.a.certPEM(), w.inter.certPEM(), w.a.certPEM(), w.a.keyPEM(w.T))
	}, []string{`warning DIR/a.pem:20: the same certificate stands at line 1; remove one of them`}, []string{"a.example = ECDSA P-256"}},

	{"a name by common name alone", func(w *world) { w.pair(issue(w.T, w.inter, ask{cn: "Old.example"})) },
		[]string{`warning DIR/a.crt:1: has no subjectAltName: it is served for its common name "old.example", but today's clients refuse it; ask for one with a subjectAltName`}, []string{"old.example = ECDSA P-256"}},
	{"no name", func(w *world) { w.pair(issue(w.T, w.inter, ask{cn: "My server"})) },
		[]string{`error DIR/a.crt:1: not served: the certificate holds no name and no address; ask for one with a subjectAltName`}, nil},
	{"names that no client asks for", func(w *world) { w.pair(leaf(w.T, w.inter, "a.example", "w*.a.example", "192.0.2.1")) },
		[]string{
			`warning DIR/a.crt:1: its name "w*.a.example" is none that a client can ask for; write names like "www.example" or "*.example" into the request`,
			`warning DIR/a.crt:1: its name "192.0.2.1" is none that a client can ask for; write names like "www.example" or "*.example" into the request`}, []string{"a.example = ECDSA P-256"}},
	{"a certificate for clients", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }}))
	}, []string{`warning DIR/a.crt:1: is not for servers: clients refuse it; ask for one with the extended key usage serverAuth`}, []string{"a.example = ECDSA P-256"}},
	{"the key of a CA", func(w *world) {
		w.pair(w.a)
		w.put("ca.pem", w.root.certPEM(), w.root.keyPEM(w.T))
	}, []string{`warning DIR/ca.pem:1: the private key of the CA "Root" is here; keep the key of a CA away from the edge`}, []string{"a.example = ECDSA P-256"}},
	{"two certificates for one name", func(w *world) {
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example", "b.example"}, from: -80 * days, to: 10 * days}))
		w.put("new.pem", w.a.certPEM(), w.a.keyPEM(w.T))
		w.put("later.pem", "comment\n")
		b := issue(w.T, w.inter, ask{names: []string{"a.example"}, from: days, to: 90 * days})
		w.put("later.pem", b.certPEM(), w.inter.certPEM(), b.keyPEM(w.T))
	}, []string{
		`warning DIR/a.crt:1: not served for a.example: DIR/new.pem:1 has a newer certificate (ECDSA P-256, from 2026-05-02 12:00 UTC); remove the one that is not wanted`,
		`warning DIR/a.crt:1: the certificate for a.example expires in 10 days, 2026-06-11 12:00 UTC; renew it`,
	}, []string{"a.example = ECDSA P-256", "b.example = ECDSA P-256"}},

	{"a weak key", func(w *world) {
		weak, _ := rsa.GenerateKey(rand.Reader, 1024)
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, key: weak}))
	}, []string{`error DIR/a.crt:1: not served: an RSA key of 1024 bits is too weak, clients refuse it; ask for a certificate with an ECDSA P-256 key`}, nil},
	{"a curve that TLS does not know", func(w *world) {
		key, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
		w.pair(issue(w.T, w.inter, ask{names: []string{"a.example"}, key: key}))
	}, []string{`error DIR/a.crt:1: not served: TLS has no signature for P-224; ask for a certificate with an ECDSA P-256 key`}, nil},

	{"broken PEM", func(w *world) {
		w.pair(w.a)
		text := w.a.certPEM()
		lines := strings.SplitAfter(text, "\n")
		w.put("b0.pem", "")
		w.put("b1.pem", "hello\n")
		w.put("b2.pem", lines[0], lines[1], "!", lines[2], strings.Join(lines[3:], ""))
		w.put("b3.pem", "comment\n", strings.Join(lines[:5], ""))
		w.put("b4.pem", strings.Join(lines[:5], ""), text)
		w.put("b5.pem", strings.Join(lines[1:], ""))
		w.put("b6.pem", "  "+strings.Join(lines, "  "))
		w.put("b7.pem", strings.ReplaceAll(text, "\n", " "))
		w.put("b8.pem", pemText("CERTIFICATE", []byte("nonsense")))
		w.put("b9.pem", pemText("SECRET", nil))
	}, []string{
		`error DIR/b0.pem: is empty; put the certificate or key into it, or remove it`,
		`error DIR/b1.pem: holds no PEM block; PEM begins with a line -----BEGIN CERTIFICATE----- or -----BEGIN PRIVATE KEY-----`,
		`error DIR/b2.pem:3: PEM block is not valid base64, or BEGIN and END differ; copy the whole block again`,
		`error DIR/b3.pem:2: PEM block has a BEGIN line but no END line; copy the whole block, with its line breaks`,
		`error DIR/b4.pem:1: PEM block has a BEGIN line but no END line; copy the whole block, with its line breaks`,
		`error DIR/b5.pem:9: PEM block has an END line but no BEGIN line; copy the whole block`,
		`error DIR/b6.pem:1: PEM block is indented; remove the blanks before each line`,
		`error DIR/b7.pem:1: PEM block has a BEGIN line but no END line; copy the whole block, with its line breaks`,
		`error DIR/b8.pem:1: certificate cannot be parsed: malformed certificate; ask its CA for another one`,
		`warning DIR/b9.pem:1: PEM block of type "SECRET" is not used; remove it`,
	}, []string{"a.example = ECDSA P-256"}},
	{"other formats", func(w *world) {
		w.pair(w.a)
		key, _ := x509.MarshalPKCS8PrivateKey(w.a.key)
		w.put("b0.cer", string(w.a.Raw))
		w.put("b1.key", string(key))
		w.put("b2.p12", "")
		w.put("b3.pem", pemText("CERTIFICATE REQUEST", nil), pemText("PUBLIC KEY", nil))
		w.put("b4.pem", pemText("OPENSSH PRIVATE KEY", nil))
		w.put("b5.pem", pemText("PKCS7", nil))
		w.put("b6.jks", "")
		w.put("b7.pfx", "converted already")
		w.put("b7.pem", w.inter.certPEM())
		w.put("b8.pem", pemText("DH PARAMETERS", nil))
	}, []string{
		`error DIR/b0.cer: is a certificate in DER, not PEM; convert it with: openssl x509 -inform der -in DIR/b0.cer -out DIR/b0.cer.pem, and remove it`,
		`error DIR/b1.key: is a private key in DER, not PEM; convert it with: openssl pkey -inform der -in DIR/b1.key -out DIR/b1.key.pem, and remove it`,
		`warning DIR/b2.p12: is PKCS#12, which is not read; convert it with: openssl pkcs12 -nodes -in DIR/b2.p12 -out DIR/b2.p12.pem, and remove it`,
		`warning DIR/b3.pem:1: is a signing request, not a certificate; put the certificate here that its CA makes of it`,
		`warning DIR/b3.pem:3: is a public key, which is not needed; put the private key here`,
		`error DIR/b4.pem:1: private key is in OpenSSH's format; convert a copy with: ssh-keygen -p -m PEM -f DIR/b4.pem`,
		`error DIR/b5.pem:1: is PKCS#7, which is not read; convert it with: openssl pkcs7 -print_certs -in DIR/b5.pem -out DIR/b5.pem.pem, and remove it`,
		`warning DIR/b6.jks: is a Java key store, which is not read; convert it with: keytool -importkeystore -srckeystore DIR/b6.jks -deststoretype pkcs12 -destkeystore DIR/b6.p12, and remove it`,
	}, []string{"a.example = ECDSA P-256"}},
	{"files from Windows", func(w *world) {
		w.pair(w.a)
		wide := func(s string) string {
			var b strings.Builder
			for _, c := range []byte(s) {
				b.Write([]byte{c, 0})
			}
			return b.String()
		}
		b := func(name string) (cert, key string) {
			id := issue(w.T, w.inter, ask{names: []string{name}, key: edKey(w.T)})
			return id.certPEM(), id.keyPEM(w.T)
		}
		c1, k1 := b("b1.example")
		w.put("b1.pem", "\xff\xfe", wide(c1+k1))
		w.put("b2.pem", wide(c1+k1))
		ec := leaf(w.T, w.inter, "b3.example")
		w.put("b3.pem", strings.TrimSpace(ec.certPEM()), ec.keyPEM(w.T))
		ec = leaf(w.T, w.inter, "b4.example")
		w.put("b4.pem", "\ufeff", ec.certPEM(), "\ufeff", ec.keyPEM(w.T))
		ec = leaf(w.T, w.inter, "b5.example")
		w.put("b5.pem", strings.ReplaceAll(ec.certPEM()+ec.keyPEM(w.T), "\n", "\r"))
	}, []string{
		`error DIR/b1.pem: is text in UTF-16, as PowerShell writes it, not PEM; convert it with: iconv -f UTF-16 -t ASCII DIR/b1.pem > DIR/b1-ascii.pem, and remove it`,
		`error DIR/b2.pem: is text in UTF-16, as PowerShell writes it, not PEM; convert it with: iconv -f UTF-16 -t ASCII DIR/b2.pem > DIR/b2-ascii.pem, and remove it`,
		`warning DIR/b3.pem:10: the END line of a PEM block and the BEGIN line of the next one are one line; put a line break between them`,
	}, []string{"a.example = ECDSA P-256", "b3.example = ECDSA P-256", "b4.example = ECDSA P-256", "b5.example = ECDSA P-256"}},
	{"a file name that speaks to the terminal", func(w *world) { w.pair(w.a); w.put("\x1b[2J.pem", "x") },
		[]string{`error "DIR/\x1b[2J.pem": holds no PEM block; PEM begins with a line -----BEGIN CERTIFICATE----- or -----BEGIN PRIVATE KEY-----`}, []string{"a.example = ECDSA P-256"}},
}

func TestEveryComplaintSaysWhatToDo(t *testing.T) {
	root := authority(t, nil, "Root")
	inter := authority(t, root, "Intermediate")
	other := authority(t, root, "Other")
	a := leaf(t, inter, "a.example")
	for _, c := range complaints {
		t.Run(c.name, func(t *testing.T) {
			w := &world{T: t, dir: plainDir(t), root: root, inter: inter, other: other, a: a}
			c.build(w)
			s, problems := Load(w.dir, noon)
			if got := messages(w.dir, problems); !slices.Equal(got, c.want) {
				t.Errorf("messages:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if got := serves(s); !slices.Equal(got, c.serve) || (s == nil) != (len(c.serve) == 0) {
				t.Errorf("serves %q, want %q", got, c.serve)
			}
		})
	}
}

// plainDir has a name that needs no quotes in a shell; t.TempDir has the test's in it.
func plainDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "certs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestDirectoryMayNotBeAFile(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "a.pem", "")
	s, problems := Load(filepath.Join(dir, "a.pem"), noon)
	want := []string{"error DIR/a.pem: is not a directory; write the directory that holds it"}
	if got := messages(dir, problems); s != nil || !slices.Equal(got, want) {
		t.Errorf("%v %q", s, got)
	}
}

// A file system user that is not root: only this thread's, which ends with the test.
func TestUnreadableFileSaysWhoMayNotReadIt(t *testing.T) {
	if os.Geteuid() != 0 {
		testkit.Missing(t, "only root can become another user for file access")
	}
	dir := t.TempDir()
	put(t, dir, "sub/a.key", "secret")
	var r report
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
			os.Chmod(d, 0o755)
		}
		os.Chmod(filepath.Join(dir, "sub"), 0o755)
		syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0)
		r = readFile(dir, filepath.Join(dir, "sub/a.key"), nil).problems
		syscall.RawSyscall(syscall.SYS_SETFSUID, 0, 0, 0)
		os.Chmod(filepath.Join(dir, "sub"), 0o700)
		syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0)
		new(listing).add(filepath.Join(dir, "sub"), false, &r)
		r = append(r, readFile(dir, filepath.Join(dir, "sub/a.key"), nil).problems...)
	}()
	<-done
	want := []string{
		"error DIR/sub/a.key: user root (uid 0) may not read it: owner is uid 0, mode 0600; run: chown root DIR/sub/a.key && chmod 600 DIR/sub/a.key",
		"error DIR/sub: user root (uid 0) may not read it: owner is uid 0, mode 0700; run: chown root DIR/sub && chmod 700 DIR/sub",
		"error DIR/sub/a.key: user root (uid 0) may not enter the directory it is in; run: chmod a+x DIR/sub",
	}
	if got := messages(dir, r); !slices.Equal(got, want) {
		t.Errorf("messages:\n%s", strings.Join(got, "\n"))
	}
}

func TestOrderOfTheChainIsRepaired(t *testing.T) {
	root := authority(t, nil, "Root")
	upper := authority(t, root, "Upper")
	lower := authority(t, upper, "Lower")
	crossRoot := authority(t, nil, "Cross root")
	id := leaf(t, lower, "a.example")
	cross := issue(t, crossRoot, ask{cn: "Upper", key: upper.key, from: -300 * days, to: 300 * days, change: func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	}})
	for _, c := range []struct {
		name       string
		have, want []*identity
		problems   int
	}{
		{"in order", []*identity{id, lower, upper}, []*identity{id, lower, upper}, 0},
		{"two paths", []*identity{id, lower, upper, cross}, []*identity{id, lower, upper, cross}, 0},
		{"two paths, other way", []*identity{id, lower, cross, upper}, []*identity{id, lower, cross, upper}, 0},
		{"reversed", []*identity{upper, lower, id}, []*identity{id, lower, upper}, 1},
		{"mixed", []*identity{id, upper, lower}, []*identity{id, lower, upper}, 1},
		{"with root", []*identity{id, lower, upper, root}, []*identity{id, lower, upper, root}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			text := id.keyPEM(t)
			for _, have := range c.have {
				text += have.certPEM()
			}
			put(t, dir, "a.pem", text)
			s, problems := Load(dir, noon)
			var got, want []string
			for _, der := range s.Only().Served(noon)[0].TLS().Certificate {
				got = append(got, string(der))
			}
			for _, w := range c.want {
				want = append(want, string(w.Raw))
			}
			if !slices.Equal(got, want) || len(problems) != c.problems {
				t.Errorf("%d certificates, problems %q", len(got), messages(dir, problems))
			}
		})
	}
}

func TestChainIsCompletedFromOtherFiles(t *testing.T) {
	root := authority(t, nil, "Root")
	upper := authority(t, root, "Upper")
	lower := authority(t, upper, "Lower")
	id := leaf(t, lower, "a.example")
	dir := t.TempDir()
	put(t, dir, "a.pem", id.certPEM(), id.keyPEM(t))
	put(t, dir, "ca/all.crt", root.certPEM(), upper.certPEM(), lower.certPEM())
	put(t, dir, "ca/lower-of-another.crt", authority(t, root, "Lower").certPEM())
	chain := loadClean(t, dir).Only().Served(noon)[0].TLS().Certificate
	if len(chain) != 3 || string(chain[1]) != string(lower.Raw) || string(chain[2]) != string(upper.Raw) {
		t.Errorf("%d certificates", len(chain))
	}
}

func TestHostileChainCostsLittle(t *testing.T) {
	// Every Left is signed by every Right and the other way round: unbounded, 80,000 signatures would be checked.
	left, right := authority(t, nil, "Left"), authority(t, nil, "Right")
	id := leaf(t, left, "a.example")
	text := id.certPEM() + id.keyPEM(t)
	for range 200 {
		for _, c := range [][2]*identity{{left, right}, {right, left}} {
			text += issue(t, c[1], ask{cn: c[0].Subject.CommonName, key: c[0].key, change: func(x *x509.Certificate) {
				x.IsCA, x.BasicConstraintsValid, x.KeyUsage = true, true, x509.KeyUsageCertSign
			}}).certPEM()
		}
	}
	f := &file{path: "a.pem", name: "a.pem"}
	f.parse([]byte(text))
	var r report
	p := newPairing([]*file{f}, noon, &r)
	certs := p.pairs()
	if n := len(certs[0].TLS().Certificate); n != maxChain || len(p.links) > maxChecks {
		t.Errorf("a chain of %d after %d checks", n, len(p.links))
	}
}

func TestKeysAreInNoMessage(t *testing.T) {
	id := leaf(t, nil, "a.example")
	text := id.keyPEM(t)
	lines := strings.Split(text, "\n")
	secret := func(s string) bool {
		for _, l := range lines[1:4] {
			for i := 0; i+12 <= len(l); i++ {
				if strings.Contains(s, l[i:i+12]) {
					return true
				}
			}
		}
		return false
	}
	if !secret(text) {
		t.Fatal("the test sees nothing")
	}
	for i := 1; i < len(text); i += 3 {
		for _, broken := range []string{text[:i], text[i:], text[:i] + "!" + text[i:], text[:i] + "\n" + text[i:], text[:i-1] + "A" + text[i:]} {
			f := &file{path: "a.key", name: "a.key", mode: fs.FileMode(0o644)}
			f.parse([]byte(broken))
			var r report
			assemble([]*file{f}, noon, &r)
			for _, p := range r {
				if secret(p.Error()) {
					t.Fatalf("%q: %v", broken, p)
				}
			}
		}
	}
}
