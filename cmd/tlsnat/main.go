// SPDX-License-Identifier: Apache-2.0

// Tlsnat is a Layer-4 TLS edge gateway with port NAT.
//
//	tlsnat            the demo, when no TLSNAT_ variable is set
//	tlsnat run        the gateway
//	tlsnat check      read everything as run would, and say what is wrong
//	tlsnat explain    which rule decides, and with what
//	tlsnat env        every setting
//	tlsnat version
package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/tlsnat/tlsnat/gateway"
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
  tlsnat env        every setting: name, type, default, meaning
  tlsnat version    version, Go, kernel features

Settings are variables of the environment (tlsnat env). Without any of them, and without a command, it is the demo.
`

func (p *program) main() int {
	name := "run"
	if len(p.args) > 0 {
		name = p.args[0]
	} else if !p.configured() {
		name = "demo"
	}
	commands := map[string]func([]string) int{
		"run": p.run, "demo": p.demo, "check": p.check, "explain": p.explain, "env": p.env, "version": p.version,
	}
	switch name {
	case "help", "-h", "-help", "--help":
		fmt.Fprint(p.out, usage)
		return exitOK
	}
	command, ok := commands[name]
	if !ok {
		fmt.Fprintf(p.err, "tlsnat: there is no command %q\n\n%s", name, usage)
		return exitUsage
	}
	return command(p.args[min(1, len(p.args)):])
}

// configured says whether any setting is there.
func (p *program) configured() bool {
	for _, kv := range p.environ {
		if strings.HasPrefix(kv, gateway.Prefix) {
			return true
		}
	}
	return false
}

// noArguments complains about arguments to a command that takes none.
func (p *program) noArguments(command string, args []string) bool {
	if len(args) == 0 {
		return true
	}
	fmt.Fprintf(p.err, "tlsnat %s: takes no arguments, but got %q; settings are variables of the environment, see 'tlsnat env'\n", command, args)
	return false
}
