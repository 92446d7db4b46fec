// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net"
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
		return []string{"run"}, errors.Join(s.copyCertificates(), s.writeLists(), s.writeMap())
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
	return []string{
		"TLSNAT_MAP_FILE=" + s.mapFile(),
		"TLSNAT_CERTS=" + filepath.Join(s.dir, "certs"),
		"TLSNAT_BACKEND_CAS=" + filepath.Join(s.dir, "certs"), // they are signed by themselves
		"TLSNAT_STATE=" + filepath.Join(s.dir, "state"),
		"TLSNAT_ADMIN=off",
		"TLSNAT_LOG_LEVEL=error",
		"TLSNAT_LOOPS=" + strconv.Itoa(max(1, s.loops)),
		"TLSNAT_HELLO_TIMEOUT=10m", // half hellos are counted, not closed
	}
}

func (s site) mapFile() string { return filepath.Join(s.dir, "rules.natmap") }

func (s site) writeMap() error {
	behind := s.backend
	if s.encrypt {
		behind = "tls://" + s.backend + " backend-ca=ecdsa.test backend-name=ecdsa.test"
	}
	var rules []string
	if s.full {
		rules = s.fullMap()
	}
	rules = append(rules,
		s.at[ecdsaDoor]+" ecdsa.test -> "+behind,
		s.at[rsaDoor]+" rsa.test -> "+s.backend,
		s.at[passDoor]+" ecdsa.test -> "+s.backend+" mode=pass",
		s.at[tcpDoor]+" -> "+s.backend+" mode=tcp\n")
	return os.WriteFile(s.mapFile(), []byte(strings.Join(rules, "\n")), 0o600)
}

// fullMap is the map of a busy edge, above the rules that are measured, with every limit on for those too and far away: 10,000 names that lead to 100
// other backends, checked every five seconds, and found down since nobody listens there.
func (s site) fullMap() []string {
	_, port, _ := net.SplitHostPort(s.backend)
	rules := []string{"default allow=127.0.0.0/8,::1,@friends.txt deny=@foes.txt conns-per-ip=1000000 rate-per-ip=10000/s conns=1000000 " +
		"bandwidth=100GB/s check=tcp balance=least-conn max-conns=1000000 queue=1000"}
	for i := range 10_000 {
		rules = append(rules, fmt.Sprintf("%s n%d.ecdsa.test -> 127.0.1.%d:%s", s.at[ecdsaDoor], i, 1+i%100, port))
	}
	return rules
}

// writeLists writes 20,000 prefixes each to let in and to keep out, none of them ours.
func (s site) writeLists() error {
	if !s.full {
		return nil
	}
	var errs []error
	for name, first := range map[string]int{"friends.txt": 16, "foes.txt": 32} {
		var list strings.Builder
		for i := range 20_000 {
			fmt.Fprintf(&list, "%d.%d.%d.0/24\n", first+i>>16, i>>8&255, i&255)
		}
		errs = append(errs, os.WriteFile(filepath.Join(s.dir, name), []byte(list.String()), 0o600))
	}
	return errors.Join(errs...)
}
