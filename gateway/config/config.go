// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/idna"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/certs"
	"github.com/tlsnat/tlsnat/natmap"
)

// Config is everything that was read: settings, map, certificates. It is checked and never changes.
type Config struct {
	Settings Settings
	Map      *natmap.Map
	Certs    *certs.Store

	BackendCAs map[string]*certs.Authority // those that rules name with backend-ca=; one without certificates verifies nobody
	lists      lists

	// Unusable are the errors about single files. Everything else is served, and what was read from them before.
	Unusable Problems

	before       *Config // while it is read: the one in use; nil at the start
	certsSpoiled bool    // a file of certificates cannot be used
}

// DemoMap is the map of a gateway that was given none.
const DemoMap = ":8443 -> demo"

// ReadConfig reads the map and the certificates that the settings name. Every complaint comes at once. An error about a
// single file of certificates, CAs or prefixes is one of Config.Unusable; if there is any other error the Config is nil.
func Read(s Settings) (*Config, Problems) {
	c, problems := Reread(s, nil)
	if c.Refused(problems) {
		return nil, problems
	}
	return c, problems
}

// Refused says whether there is an error that is not about a single file.
func (c *Config) Refused(problems Problems) bool {
	return slices.ContainsFunc(problems, func(p Problem) bool { return !p.Warning && !slices.Contains(c.Unusable, p) })
}

// unusable notes an error about a single file.
func (c *Config) unusable(text string) Problem {
	p := Problem{Text: text}
	c.Unusable = append(c.Unusable, p)
	return p
}

// Reread is ReadConfig for a gateway that runs. It returns what was read in any case (see Refused). What cannot be used of
// it is taken from before.
func Reread(s Settings, before *Config) (*Config, Problems) {
	c := &Config{Settings: s, before: before}
	defer func() { c.before = nil }()
	var problems Problems
	sources, problems := mapSources(&s)
	if len(sources) == 0 && len(problems) == 0 {
		problems = append(problems, Problem{Text: "there is no map: write rules into a file and set " + Prefix +
			"MAP_FILE to its path, or set " + Prefix + "MAP to the rules themselves, such as ':443 www.example.com -> 10.0.0.11:8080'; '" +
			"tlsnat demo' runs without one"})
	}
	if !problems.Errors() {
		m, err := natmap.Parser{ToASCII: idna.Lookup.ToASCII}.Parse(sources...)
		problems = append(problems, mapProblems(err)...)
		if m != nil {
			c.Map = m
			for _, w := range m.Warnings() {
				problems = append(problems, Problem{true, w.Error()})
			}
			if len(m.Rules) == 0 && err == nil {
				problems = append(problems, Problem{Text: "the map has no rule: write one, such as ':443 www.example.com -> 10.0.0.11:8080'"})
			}
		}
	}
	problems = append(problems, c.readCerts()...)
	if c.Map != nil {
		problems = append(problems, c.readBackendCAs()...)
		problems = append(problems, c.checkRules()...)
		problems = append(problems, c.checkCoalescing()...)
		problems = append(problems, c.readLists()...)
		problems = append(problems, c.checkTransparent()...)
		problems = append(problems, c.checkTLVs()...)
		problems = append(problems, c.checkAdmin()...)
	}
	return c, problems
}

// mapSources reads the texts of the map.
func mapSources(s *Settings) (sources []natmap.Source, problems Problems) {
	if s.Map != "" {
		sources = append(sources, natmap.Source{Name: Prefix + "MAP", Text: s.Map})
	}
	if s.MapFile == "" {
		return sources, nil
	}
	files, problems, err := mapFiles(s.MapFile)
	if err != nil {
		return nil, Problems{{Text: fmt.Sprintf("%sMAP_FILE=%s: %v; write the path of a file with rules, or of a directory with *.natmap files", Prefix, s.MapFile, reason(err))}}
	}
	for _, f := range files {
		text, err := readMap(f)
		if err != nil {
			problems = append(problems, Problem{Text: fmt.Sprintf("%s: %v; %s", f, reason(err), readable(err))})
			continue
		}
		sources = append(sources, natmap.Source{Name: f, Text: text})
	}
	return sources, problems
}

// mapFiles are the files with rules: the one that is named, or those of a directory. As with a shell's *.natmap, names
// that begin with a dot are left out: they are what editors and Kubernetes keep there.
func mapFiles(path string) (files []string, problems Problems, err error) {
	entries, err := os.ReadDir(path)
	if errors.Is(err, unix.ENOTDIR) {
		return []string{path}, nil, nil
	}
	for _, e := range entries {
		name := filepath.Join(path, e.Name())
		switch info, err := os.Stat(name); {
		case filepath.Ext(e.Name()) != ".natmap" || strings.HasPrefix(e.Name(), "."):
		case err == nil && info.IsDir():
			problems = append(problems, Problem{true, name + ": is a directory, which is not looked into; move its files up, or rename it"})
		default:
			files = append(files, name)
		}
	}
	if err == nil && len(files) == 0 {
		err = errors.New("no *.natmap file is in this directory")
	}
	return files, problems, err
}

// readable says what to do about a file that could not be read.
func readable(err error) string {
	switch {
	case errors.Is(err, certs.ErrNotRegular):
		return "put a file or a link to a file there"
	case errors.Is(err, certs.ErrTooLarge):
		return "write less into one file"
	case errors.Is(err, errUTF16):
		return "save it in UTF-8, or convert it with iconv -f UTF-16 -t UTF-8"
	case errors.Is(err, fs.ErrNotExist):
		return "put the file there, or correct its path; a link leads nowhere if its target is gone"
	}
	return fmt.Sprintf("make the file readable for the user that tlsnat runs as (uid %d)", os.Getuid())
}

// reason is an error without the path, which the message has already.
func reason(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// errUTF16 is about files from PowerShell.
var errUTF16 = errors.New("is text in UTF-16")

// readText reads a regular file of text in UTF-8, with lines of whatever system, and does not wait for anything.
func readText(path string, limit int64) ([]byte, certs.Stamp, error) {
	b, info, err := certs.ReadFile(path, limit)
	switch {
	case err != nil:
		return nil, certs.Stamp{}, err
	case certs.UTF16(b):
		return nil, certs.Stamp{}, errUTF16
	}
	stamp := certs.NewStamp(info, b)
	certs.UnixLines(b)
	return b, stamp, nil
}

// readMap also leaves out byte order marks in the middle, of files that were put together.
func readMap(path string) (string, error) {
	b, _, err := readText(path, natmap.MaxText)
	return strings.ReplaceAll(string(b), "\n\ufeff", "\n"), err
}

func mapProblems(err error) (problems Problems) {
	var all natmap.Errors
	switch {
	case err == nil:
	case errors.As(err, &all):
		for _, e := range all {
			problems = append(problems, Problem{Text: e.Error()})
		}
	default:
		problems = append(problems, Problem{Text: err.Error()})
	}
	return problems
}

// readCerts loads the directory of certificates. A demo without one makes its own.
func (c *Config) readCerts() (problems Problems) {
	now := time.Now()
	if c.Settings.Certs == "" {
		if c.Map == nil || !c.onlyDemoTerminates() {
			return nil
		}
		if err := OwnDirectory(c.Settings.State); err != nil {
			return append(problems, Problem{Text: err.Error()})
		}
		store, err := certs.SelfSigned(filepath.Join(c.Settings.State, "demo"), []string{"localhost", "127.0.0.1", "::1"}, now)
		if err != nil {
			return Problems{{Text: fmt.Sprintf("make a certificate for the demo: %v; set %sSTATE to a directory that tlsnat may write to", err, Prefix)}}
		}
		c.Certs = store
		return nil
	}
	var had *certs.Store
	if c.before != nil {
		had = c.before.Certs
	}
	store, found := certs.Reload(c.Settings.Certs, now, had)
	for _, p := range found {
		problem := Problem{p.Warning, p.Error()}
		if !p.Warning && !p.Whole {
			problem, c.certsSpoiled = c.unusable(p.Error()), true
		}
		problems = append(problems, problem)
	}
	c.Certs = store
	return problems
}

// Certificate is the one for the name that a client asked for. A client that sent no name gets the one that the rule
// names (cert=), else one for the address it connected to, else the only one there is. It is nil if none is for it.
func (c *Config) Certificate(r *natmap.Rule, name string, local func() netip.Addr) *certs.Entry {
	if name == "" {
		name = r.Options.Cert
	}
	if name != "" {
		return c.Certs.ForName(name)
	}
	if e := c.Certs.ForAddr(local()); e != nil {
		return e
	}
	return c.Certs.Only()
}

// onlyDemoTerminates says whether no rule needs a certificate of the operator's.
func (c *Config) onlyDemoTerminates() bool {
	demo := false
	for _, r := range c.Map.Rules {
		if Terminates(r) && r.Action != natmap.Demo {
			return false
		}
		demo = demo || r.Action == natmap.Demo
	}
	return demo
}

// terminates says whether clients of the rule see a certificate.
func Terminates(r *natmap.Rule) bool {
	return (r.Action == natmap.Forward || r.Action == natmap.Demo) && r.Options.Mode == natmap.Terminate
}

// encrypts says whether the rule has a tls:// backend.
func Encrypts(r *natmap.Rule) bool {
	return slices.ContainsFunc(r.Backends, func(b natmap.Backend) bool { return b.TLS })
}

// readBackendCAs reads the CAs that rules name, each once. Files that nobody names are not looked at.
func (c *Config) readBackendCAs() (problems Problems) {
	c.BackendCAs = map[string]*certs.Authority{}
	now := time.Now()
	for _, r := range c.Map.Rules {
		name := r.Options.BackendCA
		if _, read := c.BackendCAs[name]; read || name == "" {
			continue
		}
		if c.Settings.BackendCAs == "" {
			problems = append(problems, Problem{Text: fmt.Sprintf("%s: backend-ca=%s: set %sBACKEND_CAS to the directory that holds %s.pem", r.Pos, name, Prefix, name)})
			return problems
		}
		problems = append(problems, c.readBackendCA(name, now)...)
	}
	return problems
}

// readBackendCA reads a CA. If its file cannot be used the rule has the CA that was read from it before. At the start
// there is none: then nobody is verified by it, and the other rules are served. A reload that comes to name an unusable
// file is refused, since it would take a rule from clients that have it now.
func (c *Config) readBackendCA(name string, now time.Time) (problems Problems) {
	a, found := certs.LoadAuthority(c.Settings.BackendCAs, name, now)
	var had *certs.Authority
	if c.before != nil {
		had = c.before.BackendCAs[name]
	}
	bad := false
	for _, p := range found {
		problem := Problem{p.Warning, p.Error()}
		if !p.Warning && (c.before == nil || had != nil) {
			problem = c.unusable(p.Error())
		}
		bad = bad || !p.Warning
		problems = append(problems, problem)
	}
	if bad && had != nil && len(had.Certs) > 0 {
		a = had
	}
	if a == nil {
		a = certs.NoAuthority(c.Settings.BackendCAs, name)
	}
	c.BackendCAs[name] = a
	return problems
}

// checkEncryption looks at what a rule's tls:// backends need.
func (c *Config) checkEncryption(r *natmap.Rule, say func(warning bool, format string, args ...any)) {
	o := &r.Options
	switch {
	case o.BackendUnverified && o.BackendCA != "":
		say(false, "backend-verify=off: nothing is verified, so backend-ca=%s has no meaning; remove one of the two", o.BackendCA)
	case o.BackendUnverified:
		say(true, "backend-verify=off: NOBODY CHECKS WHO ANSWERS as the backend; whoever can intercept the connection reads and changes everything; "+
			"put the backend's CA, or its own certificate if it is self-signed, into %sBACKEND_CAS/NAME.pem and write backend-ca=NAME instead", Prefix)
	case o.BackendCA == "" && !systemRoots():
		say(false, "this system has no CA certificates to verify tls:// backends against; install the package ca-certificates "+
			"(in a container: mount /etc/ssl/certs), or write backend-ca=NAME")
	}
	if cert := o.BackendCert; cert != "" && c.Certs.ForName(cert) == nil {
		c.sayNoCert(cert, say, "backend-cert=%s: no certificate in %sCERTS has this name; write a name that one of them has", cert, Prefix)
	}
}

// systemRoots says whether the system has CAs.
func systemRoots() bool {
	roots, err := x509.SystemCertPool()
	return err == nil && !roots.Equal(x509.NewCertPool())
}

// checkRules looks at what the rules need from elsewhere.
func (c *Config) checkRules() (problems Problems) {
	for _, r := range c.Map.Rules {
		say := func(warning bool, format string, args ...any) {
			problems = append(problems, Problem{warning, fmt.Sprintf("%s: ", r.Pos) + fmt.Sprintf(format, args...)})
		}
		if Encrypts(r) {
			c.checkEncryption(r, say)
		}
		if !Terminates(r) {
			continue
		}
		name := r.Name
		if c.Certs == nil && c.Settings.Certs == "" {
			say(false, "the rule terminates TLS and needs a certificate; set %sCERTS to the directory that holds it, or write mode=pass", Prefix)
			continue
		}
		if name != "" && c.Certs.ForName(anyName(name)) == nil {
			say(true, "%s, clients that ask for it are refused; %s", c.noneIsFor(r.Name), c.remedy(r))
		}
		if cert := r.Options.Cert; cert != "" && c.Certs.ForName(cert) == nil {
			c.sayNoCert(cert, say, "cert=%s: %s; write a name that one of them has", cert, c.noneIsFor(cert))
		}
	}
	return problems
}

// sayNoCert complains about an option that names a certificate which is not there. If a file of certificates cannot be
// used it may be in there: at the start the rule is served without it then, and in a reload if it is so already.
func (c *Config) sayNoCert(cert string, say func(warning bool, format string, args ...any), format string, args ...any) {
	mistake := !c.certsSpoiled || c.before != nil && !c.before.lacks(cert)
	say(!mistake, format, args...)
}

// lacks says whether a rule names a certificate that is not there.
func (c *Config) lacks(cert string) bool {
	return c.Certs.ForName(cert) == nil && slices.ContainsFunc(c.Map.Rules, func(r *natmap.Rule) bool {
		return r.Options.Cert == cert || r.Options.BackendCert == cert
	})
}

// noneIsFor says that a name has no certificate.
func (c *Config) noneIsFor(name string) string {
	if c.Settings.Certs == "" {
		return "the demo's certificate is for this machine, not for " + name
	}
	return "no certificate in " + c.Settings.Certs + " is for " + name
}

// remedy is what to do about a name without a certificate.
func (c *Config) remedy(r *natmap.Rule) string {
	switch {
	case c.Settings.Certs == "":
		return "set " + Prefix + "CERTS to a directory that holds one"
	case r.Action == natmap.Demo:
		return "put one there"
	}
	return "put one there, or write mode=pass"
}

// DemoCertFile is where the demo's certificate is kept.
func DemoCertFile(s Settings) string { return filepath.Join(s.State, "demo", "self-signed.crt") }

// checkAdmin says which range of the map has the admin's address in it. Of a single port the admin's own attempt to
// listen would say so; steered connections would just not reach it.
func (c *Config) checkAdmin() (problems Problems) {
	at, err := netip.ParseAddrPort(c.Settings.Admin)
	if err != nil {
		return nil // off, or a name
	}
	for _, l := range c.Map.Listens() {
		if meets(at.Addr(), l.Addr) && l.Contains(at.Port()) {
			problems = append(problems, Problem{Text: fmt.Sprintf("%sADMIN=%s: the map listens there, too (%s); give one of the two another port", Prefix, c.Settings.Admin, l)})
		}
	}
	return problems
}

// meets says whether a connection could reach a listener at admin as well as one at addr, of which the zero Addr is every one.
func meets(admin, addr netip.Addr) bool {
	switch {
	case !addr.IsValid(), admin == netip.IPv6Unspecified():
		return true
	case admin.IsUnspecified():
		return addr.Is4()
	}
	return admin.Unmap() == addr
}

// checkTLVs says when nobody's header is believed, so that there are no TLVs.
func (c *Config) checkTLVs() (problems Problems) {
	if len(c.Settings.ProxyFrom) > 0 {
		return nil
	}
	for _, r := range c.Map.Rules {
		for _, s := range r.Settings {
			if s.Key == "forward-tlvs" && s.Value != "off" || s.Key == "log-tlvs" && s.Value != "off" {
				text := fmt.Sprintf("%s: %s= does nothing: no PROXY header is believed; set %sPROXY_FROM to the addresses of the load balancer", s.Pos, s.Key, Prefix)
				return Problems{{true, text}} // once: it is about the setting
			}
		}
	}
	return nil
}
