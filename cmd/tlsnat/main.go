// SPDX-License-Identifier: Apache-2.0

//go:debug x509negativeserial=1

// Tlsnat is a Layer-4 TLS edge gateway with port NAT.
//
//	tlsnat            the demo, when no TLSNAT_ variable is set
//	tlsnat run        the gateway
//	tlsnat check      read everything as run would, and say what is wrong
//	tlsnat explain    which rule decides, and with what
//	tlsnat show       tables of the running gateway
//	tlsnat backend    drain, maintain or ready a backend of the running gateway
//	tlsnat csr        make a key and a certificate signing request
//	tlsnat firewall   rules that open the ports of the map, or the routes that source=transparent needs
//	tlsnat reload     have the running gateway read map and certificates again
//	tlsnat env        every setting
//	tlsnat version    version, Go, kernel features
//	tlsnat help       the manual
//
// It reads arguments and the environment, prints, and ends the process; what the gateway does is package gateway.
package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

// Exit codes.
const (
	exitOK     = 0
	exitInput  = 1 // what the user wrote is wrong
	exitUsage  = 2
	exitCannot = 3 // a port is taken, a right is missing
)

// program is the outside world.
type program struct {
	args    []string
	environ []string
	out     io.Writer
	err     io.Writer
}

func main() {
	p := program{os.Args[1:], os.Environ(), os.Stdout, os.Stderr}
	os.Exit(p.main())
}

const usage = `tlsnat: a Layer-4 TLS edge gateway with port NAT

  tlsnat run        run the gateway
  tlsnat demo       run with nothing configured: https://localhost:8443 answers
  tlsnat check      read settings, map and certificates, and say what is wrong
  tlsnat explain    --port 443 [--sni NAME] [--from ADDRESS] [--addr ADDRESS] [--alpn LIST]
                    which rule decides, with which certificate, backends and options
  tlsnat show       map|conns|backends|certs|generations [--json] [--watch] [--limit N] [--client ADDRESS …]
                    tables of the running gateway
  tlsnat backend    drain|maintain|ready ADDRESS
                    take a backend of the running gateway out, and back in
  tlsnat reload     have the running gateway read map and certificates again
  tlsnat csr        [--rsa 2048|3072|4096] [--out PATH] [--org TEXT] [--unit TEXT] [--country XX] [--state TEXT] [--city TEXT]
                    [--street TEXT] [--postal-code TEXT] [--email TEXT] [--serial-number TEXT] [--business-category TEXT]
                    [--jurisdiction-country XX] [--jurisdiction-state TEXT] NAME…
                    make a key (ECDSA P-256) and the request for a certificate that a CA signs; names, *.names, addresses
  tlsnat firewall   [--format nft|ufw] [--also PORTS]
                    rules that open the ports of the map, and these, and drop the rest
                    --transparent: the routes that source=transparent needs
  tlsnat env        every setting: name, type, default, meaning
  tlsnat version    version, Go, kernel features
  tlsnat help       [TOPIC]
                    the manual: a page, an option, a setting, an outcome or a metric

Settings are variables of the environment (tlsnat env). Without any of them, and without a command, it is the demo.
Exit codes: 0 done, 1 what you wrote is wrong, 2 usage, 3 could not run (a port is taken, a right is missing).
`

func (p *program) main() int {
	name, args := "run", p.args
	if len(args) > 0 {
		name, args = args[0], args[1:]
	} else if !p.configured() {
		name = "demo"
	}
	if isHelp(name) || slices.ContainsFunc(args, isHelp) {
		fmt.Fprint(p.out, usage)
		return exitOK
	}
	commands := map[string]func([]string) int{
		"run": p.run, "demo": p.demo, "check": p.check, "explain": p.explain,
		"show": p.show, "reload": p.reload, "backend": p.backend, "firewall": p.firewall, "csr": p.csr,
		"env": p.env, "help": p.help, "version": p.version, "--version": p.version,
	}
	command, ok := commands[name]
	if !ok {
		fmt.Fprintf(p.err, "tlsnat: there is no command %q\n\n%s", name, usage)
		return exitUsage
	}
	return command(args)
}

func isHelp(arg string) bool { return arg == "-h" || arg == "-help" || arg == "--help" }

// configured says whether any setting is there.
func (p *program) configured() bool { return config.Configured(p.environ) }

// setting is a variable of the environment, without its prefix; empty is as good as not set.
func (p *program) setting(key string) string {
	for _, kv := range slices.Backward(p.environ) { // of two the last one counts
		if value, ok := strings.CutPrefix(kv, config.Prefix+key+"="); ok {
			return value
		}
	}
	return ""
}

// noArguments complains about arguments to a command that takes none.
func (p *program) noArguments(command string, args []string) bool {
	if len(args) == 0 {
		return true
	}
	fmt.Fprintf(p.err, "tlsnat %s: takes no arguments, but got %q; settings are variables of the environment, see 'tlsnat env'\n", command, args)
	return false
}

// config reads everything and returns every complaint at once: about settings, then map, then certificates. If there
// is anything that keeps the gateway from running the config is nil.
func (p *program) config() (*config.Config, config.Problems) {
	s, err := config.ReadSettings(p.environ)
	var problems config.Problems
	for _, e := range joined(err) {
		problems = append(problems, config.Problem{Text: e.Error()})
	}
	config, more := config.Read(s)
	if len(problems) > 0 {
		config = nil
	}
	return config, append(problems, more...)
}

// joined are the errors of errors.Join.
func joined(err error) []error {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		return all.Unwrap()
	}
	if err != nil {
		return []error{err}
	}
	return nil
}

// complain prints problems.
func (p *program) complain(problems config.Problems) {
	for _, problem := range problems {
		fmt.Fprintf(p.err, "%s\n", printable.JSON([]byte(problem.String())))
	}
}
