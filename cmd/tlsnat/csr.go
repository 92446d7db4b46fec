// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
)

// csr makes a key, and the request for a certificate that a CA signs.
func (p *program) csr(args []string) int {
	q := newCSRArguments()
	errs := q.read(args)
	for _, err := range errs {
		fmt.Fprintf(p.err, "tlsnat csr: %v\n", err)
	}
	if len(errs) > 0 {
		return exitUsage
	}
	stem := q.out
	if stem == "" {
		stem = filepath.Join(p.setting("CERTS"), fileStem(&q.request))
	}
	key, request := stem+".key", stem+".csr"
	switch err := q.request.Write(key, request); {
	case errors.Is(err, fs.ErrExist):
		fmt.Fprintf(p.err, "tlsnat csr: %v; nothing is ever overwritten: write --out with another name, such as --out %s-2\n", err, stem)
		return exitInput
	case errors.Is(err, fs.ErrNotExist):
		fmt.Fprintf(p.err, "tlsnat csr: %v; make the directory, or write --out with the path of another one\n", err)
		return exitInput
	case err != nil:
		fmt.Fprintf(p.err, "tlsnat csr: %v\n", err)
		return exitCannot
	}
	p.tellNextSteps(stem, q)
	return exitOK
}

// tellNextSteps says what was made, and what becomes of it.
func (p *program) tellNextSteps(stem string, q *csrArguments) {
	kind := "ECDSA P-256"
	if q.request.RSABits > 0 {
		kind = fmt.Sprintf("RSA %d", q.request.RSABits)
	}
	all := slices.Clone(q.request.Names)
	for _, a := range q.request.Addrs {
		all = append(all, a.String())
	}
	fmt.Fprintf(p.out, "key      %s.key: %s; it stays here, and nobody else needs it\n", stem, kind)
	fmt.Fprintf(p.out, "request  %s.csr: for %s\n", stem, some(all))
	fmt.Fprintf(p.out, "next     give the request to the CA, and put its answer into %s.crt: the certificate, then the intermediates\n", stem)
	if p.setting("CERTS") == "" {
		fmt.Fprintf(p.out, "         %sCERTS is the directory that is served from; 'tlsnat check' says whether all is well\n", config.Prefix)
	} else {
		fmt.Fprintln(p.out, "         'tlsnat check' says whether all is well, 'tlsnat reload' has the running gateway serve it")
	}
}

// fileStem is what the files are called: as the first name.
func fileStem(r *certs.Request) string {
	if len(r.Names) > 0 {
		return strings.Replace(r.Names[0], "*", "wildcard", 1)
	}
	return strings.ReplaceAll(r.Addrs[0].String(), ":", "_")
}

// csrArguments are read from the command line.
type csrArguments struct {
	request certs.Request
	rsa     string
	out     string
	texts   []string // of csrFields
	flags   *flag.FlagSet
}

// csrField is an attribute of the subject. most is its length in characters: the upper bounds of RFC 5280, appendix A.1,
// and of X.520 for those that only EV certificates have.
type csrField struct {
	name string
	most int
	set  func(s *pkix.Name, text string)
}

func extra(oid ...int) func(*pkix.Name, string) {
	return func(s *pkix.Name, text string) {
		s.ExtraNames = append(s.ExtraNames, pkix.AttributeTypeAndValue{Type: oid, Value: text})
	}
}

// csrFields are what OV and EV certificates ask for (EV guidelines of the CA/Browser forum, section 7.1.4.2).
var csrFields = []csrField{
	{"org", 64, func(s *pkix.Name, text string) { s.Organization = []string{text} }},
	{"unit", 64, func(s *pkix.Name, text string) { s.OrganizationalUnit = []string{text} }},
	{"country", 2, func(s *pkix.Name, text string) { s.Country = []string{text} }},
	{"state", 128, func(s *pkix.Name, text string) { s.Province = []string{text} }},
	{"city", 128, func(s *pkix.Name, text string) { s.Locality = []string{text} }},
	{"street", 128, func(s *pkix.Name, text string) { s.StreetAddress = []string{text} }},
	{"postal-code", 40, func(s *pkix.Name, text string) { s.PostalCode = []string{text} }},
	{"serial-number", 64, func(s *pkix.Name, text string) { s.SerialNumber = text }},
	{"business-category", 128, extra(2, 5, 4, 15)},
	{"jurisdiction-country", 2, extra(1, 3, 6, 1, 4, 1, 311, 60, 2, 1, 3)},
	{"jurisdiction-state", 128, extra(1, 3, 6, 1, 4, 1, 311, 60, 2, 1, 2)},
	{"email", 255, func(s *pkix.Name, text string) { // emailAddress of PKCS#9, which is an IA5String (RFC 2985, section 5.2.1)
		s.ExtraNames = append(s.ExtraNames, pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1},
			Value: asn1.RawValue{Tag: asn1.TagIA5String, Bytes: []byte(text)}})
	}},
}

func newCSRArguments() *csrArguments {
	q := &csrArguments{texts: make([]string, len(csrFields)), flags: flag.NewFlagSet("csr", flag.ContinueOnError)}
	q.flags.SetOutput(io.Discard)
	q.flags.StringVar(&q.rsa, "rsa", "", "")
	q.flags.StringVar(&q.out, "out", "", "")
	for i, f := range csrFields {
		q.flags.StringVar(&q.texts[i], f.name, "", "")
	}
	return q
}

// read reads names and flags in any order, and returns every complaint about them.
func (q *csrArguments) read(args []string) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for len(args) > 0 {
		if err := q.flags.Parse(args); err != nil {
			bad("%v; 'tlsnat help' lists what there is", err)
			return errs
		}
		if args = q.flags.Args(); len(args) > 0 {
			if err := q.addName(args[0]); err != nil {
				bad("%v", err)
			}
			args = args[1:]
		}
	}
	if len(errs) == 0 && len(q.request.Names)+len(q.request.Addrs) == 0 {
		bad("names are missing; write what the certificate is for, as in tlsnat csr www.example.com example.com")
	}
	switch q.rsa {
	case "":
	case "2048", "3072", "4096":
		_, _ = fmt.Sscan(q.rsa, &q.request.RSABits)
	default:
		bad("--rsa %s: not a size; write 2048, 3072 or 4096, or nothing for ECDSA P-256, which costs a tenth", q.rsa)
	}
	if ext := filepath.Ext(q.out); ext == ".key" || ext == ".csr" || ext == ".crt" {
		bad("--out %s: .key, .csr and .crt are added to it; write --out %s", q.out, strings.TrimSuffix(q.out, ext))
	}
	for i, f := range csrFields {
		if err := f.read(&q.request.Subject, q.texts[i]); err != nil {
			bad("--%s %s: %v", f.name, shown(q.texts[i]), err)
		}
	}
	return errs
}

// addName takes a name, as the map does, or an address.
func (q *csrArguments) addName(text string) error {
	if a, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil && a.Zone() == "" {
		if a = a.Unmap(); slices.Contains(q.request.Addrs, a) {
			return fmt.Errorf("%s stands twice; write it once", text)
		}
		q.request.Addrs = append(q.request.Addrs, a)
		return nil
	}
	name, err := natmap.Parser{ToASCII: idna.Lookup.ToASCII}.Name(text)
	switch at := strings.IndexByte(name, '_'); {
	case strings.ContainsAny(text, "=*") && !strings.HasPrefix(text, "*.") || text == "*":
		return fmt.Errorf("%q is not a name; write one such as www.example.com or *.example.com; what is about the subject has two hyphens, as in --org", text)
	case err != nil:
		if all, ok := errors.AsType[natmap.Errors](err); ok {
			return fmt.Errorf("%q, at character %d: %s; %s", text, all[0].Col, all[0].Msg, all[0].Hint)
		}
		return err
	case at >= 0:
		return fmt.Errorf("%q, at character %d: \"_\" cannot stand in a certificate (RFC 5280, section 4.2.1.6); use letters, digits, hyphens and dots", text, at+1)
	case slices.Contains(q.request.Names, name):
		return fmt.Errorf("%s stands twice; write it once", text)
	}
	q.request.Names = append(q.request.Names, name)
	return nil
}

// read puts the text into the subject.
func (f *csrField) read(s *pkix.Name, text string) error {
	switch n := utf8.RuneCountInString(text); {
	case text == "":
		return nil
	case strings.HasSuffix(f.name, "country"):
		if text = strings.ToUpper(text); len(text) != 2 || strings.Trim(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
			return errors.New("not a country; write the two letters of ISO 3166, as in DE")
		}
		if text == "UK" {
			return errors.New("not in ISO 3166; write GB")
		}
	case !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl):
		return errors.New("has characters that cannot be seen; write text in UTF-8")
	case n > f.most:
		return fmt.Errorf("%d characters; certificates have room for %d", n, f.most)
	case f.name == "email":
		local, domain, at := strings.Cut(text, "@")
		if !at || local == "" || domain == "" || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > unicode.MaxASCII }) {
			return errors.New("not an address of mail; write one in ASCII, as in hostmaster@example.com")
		}
	}
	f.set(s, text)
	return nil
}
