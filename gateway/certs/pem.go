// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/tlsnat/tlsnat/gateway/printable"
)

// maxKey bounds a private key before anything is computed with it: RSA-8192, the largest that crypto/tls clients
// take, is under 5 KiB of DER, and the checks of an RSA key grow with the cube of its size.
const maxKey = 8 << 10

// file is what one file of the directory held.
type file struct {
	path     string // as it was opened
	name     string // below the directory, for messages about another file
	mode     fs.FileMode
	lent     bool // to a group, by root: see lentToGroup
	certs    []*cert
	keys     []*key
	broken   bool // something in it was an error
	stamp    Stamp
	problems report
}

// cert is a certificate and where it stands. pub is its public key in one normal form, "" if TLS has no use for it.
type cert struct {
	*x509.Certificate
	pub  string
	file *file
	line int
}

// key is a private key and where it stands.
type key struct {
	crypto.Signer
	fast crypto.Signer // the same in the form that signs fastest; nil: not made yet
	pub  string
	file *file
	line int
}

func (c *cert) at() place { return place{c.file.path, c.line} }
func (k *key) at() place  { return place{k.file.path, k.line} }

func (f *file) fail(line int, hint, format string, args ...any) {
	f.broken = true
	f.problems.fail(place{f.path, line}, hint, format, args...)
}

func (f *file) warn(line int, hint, format string, args ...any) {
	f.problems.warn(place{f.path, line}, hint, format, args...)
}

// parse takes every PEM block of the file. Text between blocks is a comment, as openssl writes it.
func (f *file) parse(data []byte) {
	if UTF16(data) {
		f.fail(0, "convert it with: iconv -f UTF-16 -t ASCII "+printable.Shell(f.path)+" > "+printable.Shell(stem(f.path)+"-ascii"+filepath.Ext(f.path))+", and remove it",
			"is text in UTF-16, as PowerShell writes it, not PEM")
		return
	}
	UnixLines(data)
	switch found := f.scan(data); {
	case found:
	case len(bytes.TrimSpace(data)) == 0:
		f.fail(0, "put the certificate or key into it, or remove it", "is empty")
	default:
		if format := foreignFormat(data); format != "" {
			f.fail(0, convert(format, f.path), "is %s, not PEM", format)
			return
		}
		f.fail(0, "PEM begins with a line -----BEGIN CERTIFICATE----- or -----BEGIN PRIVATE KEY-----", "holds no PEM block")
	}
}

// UTF16 says whether data is text in UTF-16, with a byte order mark or without it: every other byte of ASCII is zero.
func UTF16(data []byte) bool {
	if bytes.HasPrefix(data, []byte{0xff, 0xfe}) || bytes.HasPrefix(data, []byte{0xfe, 0xff}) {
		return true
	}
	if len(data) < 4 {
		return false
	}
	return data[0] == 0 && data[2] == 0 && data[1] != 0 && data[3] != 0 || data[1] == 0 && data[3] == 0 && data[0] != 0 && data[2] != 0
}

// UnixLines makes line feeds of carriage returns, where they end the lines alone.
func UnixLines(data []byte) {
	if bytes.IndexByte(data, '\n') >= 0 {
		return
	}
	for i := range data {
		if data[i] == '\r' {
			data[i] = '\n'
		}
	}
}

// byteOrderMark begins a file of an editor on Windows, and stands in the middle when files were put together.
var byteOrderMark = []byte("\xef\xbb\xbf")

// scan cuts the data into PEM blocks and reports whether there was any, whole or broken. pem.Decode would skip a
// broken block without a word; cut out first, each either decodes or is reported with its line.
func (f *file) scan(data []byte) (found bool) {
	begin, beginLine := -1, 0
	for offset, line := 0, 1; offset < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[offset:], '\n'); i >= 0 {
			end = offset + i + 1
		}
		offset += len(data[offset:end]) - len(bytes.TrimPrefix(data[offset:end], byteOrderMark))
		text := data[offset:end]
		switch {
		case bytes.HasPrefix(text, []byte("-----BEGIN ")):
			if begin >= 0 {
				f.unended(beginLine)
			}
			found, begin, beginLine = true, offset, line
		case bytes.HasPrefix(text, []byte("-----END ")):
			next := bytes.Index(text, []byte("-----BEGIN "))
			if next > 0 {
				end = offset + next // the rest of the line is looked at as a line of its own
			}
			if begin < 0 {
				f.fail(line, "copy the whole block", "PEM block has an END line but no BEGIN line")
			} else {
				f.decode(bytes.TrimSuffix(data[begin:end], byteOrderMark), beginLine)
			}
			found, begin = true, -1
			if next > 0 {
				f.warn(line, "put a line break between them", "the END line of a PEM block and the BEGIN line of the next one are one line")
				line--
			}
		case bytes.HasPrefix(bytes.TrimLeft(text, " \t"), []byte("-----BEGIN ")):
			f.fail(line, "remove the blanks before each line", "PEM block is indented")
			found = true
		}
		offset = end
	}
	if begin >= 0 {
		f.unended(beginLine)
	}
	return found
}

func (f *file) unended(line int) {
	f.fail(line, "copy the whole block, with its line breaks", "PEM block has a BEGIN line but no END line")
}

// decode takes one block, from its BEGIN line to its END line.
func (f *file) decode(text []byte, line int) {
	block, _ := pem.Decode(text)
	if block == nil {
		f.fail(line+firstBadLine(text), "copy the whole block again", "PEM block is not valid base64, or BEGIN and END differ")
		return
	}
	switch block.Type {
	case "CERTIFICATE", "X509 CERTIFICATE":
		f.addCert(block.Bytes, line)
	case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
		f.addKey(block, line)
		clear(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		f.encrypted(line)
	case "EC PARAMETERS", "DH PARAMETERS": // openssl writes the first before a key; the second is of the past
	default:
		f.otherBlock(block.Type, line)
	}
}

// firstBadLine is the first line of a block that is not base64, counted from its BEGIN line; 0 if all are.
func firstBadLine(text []byte) int {
	lines := bytes.Split(text, []byte("\n"))
	for i, l := range lines[1:] {
		l = bytes.TrimSpace(l)
		if bytes.HasPrefix(l, []byte("-----")) {
			break
		}
		if bytes.ContainsFunc(l, notBase64) && !bytes.Contains(l, []byte(": ")) { // "Proc-Type: 4,ENCRYPTED"
			return i + 1
		}
	}
	return 0
}

func notBase64(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '+' || r == '/' || r == '=')
}

func (f *file) addCert(der []byte, line int) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		f.fail(line, "ask its CA for another one", "certificate cannot be parsed: %.200s", strings.TrimPrefix(err.Error(), "x509: "))
		return
	}
	for _, other := range f.certs {
		if other.Equal(c) {
			f.warn(line, "remove one of them", "the same certificate stands at line %d", other.line)
			return
		}
	}
	f.certs = append(f.certs, &cert{Certificate: c, pub: normal(c.PublicKey), file: f, line: line})
}

// addKey never passes on what a parser says: its words may be bytes of the key.
func (f *file) addKey(block *pem.Block, line int) {
	switch {
	case strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
		f.encrypted(line)
		return
	case len(block.Bytes) > maxKey:
		f.fail(line, "make a new key with: openssl ecparam -name prime256v1 -genkey -noout", "private key is larger than RSA-8192")
		return
	}
	signer := parseKey(block.Bytes)
	if signer == nil {
		f.unparsable(block, line)
		return
	}
	f.keys = append(f.keys, &key{Signer: signer, pub: normal(signer.Public()), file: f, line: line})
}

// parseKey tries the three encodings whatever the label says, since files with the wrong one are about:
// PKCS#8 (RFC 5958), PKCS#1 (RFC 8017, A.1.2) and SEC 1 (RFC 5915). It is nil if TLS has no use for the key.
func parseKey(der []byte) crypto.Signer {
	var parsed any
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		parsed = k
	} else if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		parsed = k
	} else if k, err := x509.ParseECPrivateKey(der); err == nil {
		parsed = k
	}
	if signer, ok := parsed.(crypto.Signer); ok && normal(signer.Public()) != "" {
		return signer
	}
	return nil
}

func (f *file) unparsable(block *pem.Block, line int) {
	var pkcs8 struct {
		Version   int
		Algorithm pkix.AlgorithmIdentifier
		Key       []byte
	}
	if asn1.Unmarshal(block.Bytes, &pkcs8); pkcs8.Algorithm.Algorithm != nil {
		if name := algorithmNames[pkcs8.Algorithm.Algorithm.String()]; name != "" {
			f.fail(line, "use ECDSA P-256 or RSA 2048", "private key is for %s, which TLS clients do not take", name)
			return
		}
	}
	f.fail(line, "use ECDSA with P-256, P-384 or P-521, RSA or Ed25519; openssl pkey -check -noout -in "+printable.Shell(f.path)+" says more",
		"private key cannot be parsed")
}

func (f *file) encrypted(line int) {
	f.fail(line, fmt.Sprintf("decrypt it with: openssl pkey -in %s -out %s, and remove it", printable.Shell(f.path), printable.Shell(stem(f.path)+"-plain.key")),
		"private key is encrypted with a passphrase")
}

func (f *file) otherBlock(typ string, line int) {
	switch typ {
	case "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST":
		f.warn(line, "put the certificate here that its CA makes of it", "is a signing request, not a certificate")
	case "PUBLIC KEY", "RSA PUBLIC KEY":
		f.warn(line, "put the private key here", "is a public key, which is not needed")
	case "TRUSTED CERTIFICATE":
		f.fail(line, convert("OpenSSL's TRUSTED CERTIFICATE", f.path), "is OpenSSL's TRUSTED CERTIFICATE, which only OpenSSL reads")
	case "PKCS7", "CMS":
		f.fail(line, convert("PKCS#7", f.path), "is PKCS#7, which is not read")
	case "OPENSSH PRIVATE KEY":
		f.fail(line, "convert a copy with: ssh-keygen -p -m PEM -f "+printable.Shell(f.path), "private key is in OpenSSH's format")
	case "DSA PRIVATE KEY":
		f.fail(line, "use ECDSA P-256 or RSA 2048", "private key is for DSA, which TLS clients do not take")
	default:
		f.warn(line, "remove it", "PEM block of type %.40q is not used", typ)
	}
}

// algorithmNames are the keys that a certificate may have and crypto/tls cannot sign with.
var algorithmNames = map[string]string{
	"1.2.840.10040.4.1":     "DSA",
	"1.2.840.113549.1.1.10": "RSASSA-PSS",
	"1.3.101.110":           "X25519",
	"1.3.101.111":           "X448",
	"1.3.101.113":           "Ed448",
}

// keyAlgorithm names the algorithm of a certificate's key, by its object identifier if nothing better is known.
func keyAlgorithm(c *x509.Certificate) string {
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki); err != nil {
		return "unknown"
	}
	oid := spki.Algorithm.Algorithm.String()
	if name := algorithmNames[oid]; name != "" {
		return name
	}
	return oid
}

// normal is a public key in its one DER form, whatever form it was written in; "" if it is none for TLS.
func normal(public crypto.PublicKey) string {
	switch public.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey:
		der, err := x509.MarshalPKIXPublicKey(public)
		if err == nil {
			return string(der)
		}
	}
	return ""
}

// kind is a type of key. Clients choose among them, so a name may have a certificate of each. In the order in
// which they are offered: ECDSA and Ed25519 cost a tenth of RSA to sign; ECDSA is what every client can do.
type kind int

const (
	kindECDSA kind = iota
	kindEd25519
	kindRSA
	kinds
)

// judge says what kind of key it is and how it is called, or why it cannot be served.
func judge(c *x509.Certificate) (k kind, name string, refusal string) {
	switch pub := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		name = "ECDSA " + pub.Params().Name
		if pub.Curve == elliptic.P224() {
			refusal = "TLS has no signature for P-224"
		}
		return kindECDSA, name, refusal
	case ed25519.PublicKey:
		return kindEd25519, "Ed25519", ""
	case *rsa.PublicKey:
		name = fmt.Sprintf("RSA %d", pub.N.BitLen())
		if n := pub.N.BitLen(); n < 2048 {
			refusal = fmt.Sprintf("an RSA key of %d bits is too weak, clients refuse it", n)
		} else if n > maxRSABits {
			refusal = fmt.Sprintf("an RSA key of %d bits is too large, clients refuse it", n)
		}
		return kindRSA, name, refusal
	}
	return 0, "", "its key is for " + keyAlgorithm(c) + ", which TLS clients do not take"
}

// maxRSABits is crypto/tls's own limit; one check of a larger signature would cost a client milliseconds.
const maxRSABits = 8192

var foreignByExtension = map[string]string{
	".p12": "PKCS#12", ".pfx": "PKCS#12", ".der": "DER", ".p7b": "PKCS#7 in DER", ".p7c": "PKCS#7 in DER", ".jks": "a Java key store",
}

// foreignFormat recognises what people take for PEM.
func foreignFormat(data []byte) string {
	var pfx struct {
		Version int
		Auth    asn1.RawValue
		Mac     asn1.RawValue `asn1:"optional"`
	}
	var signed struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"optional"`
	}
	is := func(v any) bool { _, err := asn1.Unmarshal(data, v); return err == nil }
	switch {
	case bytes.HasPrefix(data, []byte{0xfe, 0xed, 0xfe, 0xed}):
		return "a Java key store"
	case data[0] != 0x30: // DER begins with a SEQUENCE; the caller has seen that there is a first byte
		return ""
	case is(&pfx) && pfx.Version == 3: // RFC 7292, 4
		return "PKCS#12"
	case is(&signed):
		return "PKCS#7 in DER"
	case len(data) <= maxKey && parseKey(data) != nil:
		return "a private key in DER"
	}
	if _, err := x509.ParseCertificate(data); err == nil {
		return "a certificate in DER"
	}
	return ""
}

// convert is the command that makes PEM of a file, beside it and never over it.
func convert(format, path string) string {
	command := "openssl x509 -inform der"
	switch format {
	case "PKCS#12":
		command = "openssl pkcs12 -nodes"
	case "PKCS#7":
		command = "openssl pkcs7 -print_certs"
	case "PKCS#7 in DER":
		command = "openssl pkcs7 -inform der -print_certs"
	case "a private key in DER":
		command = "openssl pkey -inform der"
	case "OpenSSL's TRUSTED CERTIFICATE":
		command = "openssl x509"
	case "a Java key store":
		return fmt.Sprintf("convert it with: keytool -importkeystore -srckeystore %s -deststoretype pkcs12 -destkeystore %s, and remove it",
			printable.Shell(path), printable.Shell(stem(path)+".p12"))
	}
	return fmt.Sprintf("convert it with: %s -in %s -out %s, and remove it", command, printable.Shell(path), printable.Shell(path+".pem"))
}
