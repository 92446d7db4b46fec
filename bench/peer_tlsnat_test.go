// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

var tlsnat = &peer{
	name:    "tlsnat",
	from:    "BENCH_TLSNAT",
	doors:   []door{ecdsaDoor, rsaDoor, passDoor, tcpDoor},
	asked:   []string{"version"},
	version: regexp.MustCompile(`(?m)^.+$`),
	setUp: func(s site) ([]string, error) {
		return []string{"run"}, s.copyCertificates()
	},
}

// buildGateway builds the command of this repository into the run's directory.
func buildGateway() (string, error) {
	out := filepath.Join(runDir, "tlsnat")
	text, err := exec.Command("go", "build", "-o", out, "github.com/tlsnat/tlsnat/cmd/tlsnat").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build ./cmd/tlsnat: %w: %s", err, strings.TrimSpace(string(text)))
	}
	return out, nil
}

// copyCertificates gives the gateway a directory of its own, with files named by server name.
func (s site) copyCertificates() error {
	certs, state := filepath.Join(s.dir, "certs"), filepath.Join(s.dir, "state")
	errs := []error{os.Mkdir(certs, 0o700), os.Mkdir(state, 0o700)}
	for _, file := range s.pem {
		text, err := os.ReadFile(file)
		errs = append(errs, err, os.WriteFile(filepath.Join(certs, filepath.Base(file)), text, 0o600))
	}
	return errors.Join(errs...)
}

func tlsnatSettings(s site) []string {
	behind := s.backend
	if s.encrypt {
		behind = "tls://" + s.backend + " backend-ca=ecdsa.test backend-name=ecdsa.test"
	}
	rules := []string{
		s.at[ecdsaDoor] + " ecdsa.test -> " + behind,
		s.at[rsaDoor] + " rsa.test -> " + s.backend,
		s.at[passDoor] + " ecdsa.test -> " + s.backend + " mode=pass",
		s.at[tcpDoor] + " -> " + s.backend + " mode=tcp",
	}
	return []string{
		"TLSNAT_MAP=" + strings.Join(rules, "\n"),
		"TLSNAT_CERTS=" + filepath.Join(s.dir, "certs"),
		"TLSNAT_BACKEND_CAS=" + filepath.Join(s.dir, "certs"), // they are signed by themselves
		"TLSNAT_STATE=" + filepath.Join(s.dir, "state"),
		"TLSNAT_ADMIN=off",
		"TLSNAT_LOG_LEVEL=error",
		"TLSNAT_LOOPS=" + strconv.Itoa(max(1, s.loops)),
		"TLSNAT_HELLO_TIMEOUT=10m", // half hellos are counted, not closed
	}
}
