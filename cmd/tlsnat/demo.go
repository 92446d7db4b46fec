// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

// demo is a working gateway with nothing configured.
func (p *program) demo(args []string) int {
	if !p.noArguments("demo", args) {
		return exitUsage
	}
	config, problems := p.demoConfig()
	p.complain(problems)
	if config == nil {
		return exitInput
	}
	e, err := p.open(config)
	if errors.Is(err, errStopped) {
		return exitOK
	}
	if err != nil {
		return p.cannotDemo(err)
	}
	e.admin, err = startAdmin(config.Settings, e.Gateway) // the demo works without it, too
	p.welcome(e, err)
	return p.serve(e)
}

// demoConfig is the demo's map and a certificate of its own, with what else is set.
func (p *program) demoConfig() (*config.Config, config.Problems) {
	s, err := config.ReadSettings(p.environ)
	var problems config.Problems
	for _, e := range joined(err) {
		problems = append(problems, config.Problem{Text: e.Error()})
	}
	if s.Map != "" || s.MapFile != "" {
		problems = append(problems, config.Problem{Text: "the demo has a map of its own, but " + config.Prefix + "MAP or " +
			config.Prefix + "MAP_FILE is set; 'tlsnat run' runs that one"})
	}
	if len(problems) > 0 {
		return nil, problems
	}
	s.Map, s.Certs = config.DemoMap, ""
	return config.Read(s)
}

// cannotDemo says what to do where the demo's port is taken: it has no map that one could change.
func (p *program) cannotDemo(err error) int {
	p.cannot(err)
	if errors.Is(err, unix.EADDRINUSE) {
		fmt.Fprintf(p.err, "The demo on another port: %sMAP=':9443 -> demo' tlsnat run\n", config.Prefix)
	}
	return exitCannot
}

// welcome says what listens and how to try it. noAdmin is why there is no admin page.
func (p *program) welcome(e *edge, noAdmin error) {
	admin := "off"
	if noAdmin != nil {
		admin = "not there: " + noAdmin.Error()
	} else if a := e.admin.Addr(); a != "" {
		admin = "http://" + a + "/"
	}
	cert := config.DemoCertFile(e.config.Settings)
	fmt.Fprintf(p.out, `tlsnat demo: TLS ends here, and a built-in backend answers with what the edge knows of the connection.

  listens   :8443
  try it    curl --cacert %s https://localhost:8443/
  admin     %s
  orders    tlsnat reload, tlsnat backend …%s
  log       below, a line for each connection
  stop      Ctrl-C

`, printable.Shell(cert), admin, byPage(e))
}

// byPage says what the page asks for before it gives an order.
func byPage(e *edge) string {
	if path := e.admin.TokenPath(); path != "" {
		return "; the page asks for the token in " + path
	}
	return ""
}
