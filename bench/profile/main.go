// SPDX-License-Identifier: Apache-2.0

// Command profile refreshes the profile that the compiler optimises the gateway by:
//
//	go run ./bench/profile
//
// It builds the gateway with the build tag profile, puts it under the benchmarks' loads and merges what it was busy with into cmd/tlsnat/default.pgo,
// which go build finds by itself. To be run when the code that moves bytes or shakes hands has changed; an old profile does no harm, it only fits less.
// It measures nothing: whether it helped is for the benchmarks to say.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// loads are what a gateway does all day. Each is a benchmark with its own share of the profile; a load that is missing here is compiled as if it never
// happened.
var loads = []string{
	"Handshake/peer=tlsnat/(ecdsa|mlkem|tls12|resumed)$",
	"Echo/peer=tlsnat/",
	"Bulk/peer=tlsnat/",
	"Passthrough/peer=tlsnat/",
}

func main() {
	if err := refresh(); err != nil {
		fmt.Fprintln(os.Stderr, "profile:", err)
		os.Exit(1)
	}
}

func refresh() error {
	mod, err := output("go", "env", "GOMOD")
	if err != nil {
		return err
	}
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	dir, err := os.MkdirTemp("", "tlsnat-profile-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "tlsnat")
	if _, err := output("go", "build", "-C", root, "-tags", "profile", "-pgo", "off", "-o", binary, "./cmd/tlsnat"); err != nil {
		return err
	}
	for _, load := range loads {
		test := exec.Command("go", "test", "-C", root, "-run", "^$", "-bench", load, "-benchtime", "5s", "./bench")
		test.Env = append(os.Environ(), "BENCH_TLSNAT="+binary, "PROFILE_DIR="+dir)
		test.Stdout, test.Stderr = os.Stderr, os.Stderr
		if err := test.Run(); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(test.Args, " "), err)
		}
	}
	return merge(dir, filepath.Join(root, "cmd", "tlsnat", "default.pgo"))
}

// merge makes one profile of those in dir.
func merge(dir, into string) error {
	parts, err := filepath.Glob(filepath.Join(dir, "*.pprof"))
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return errors.New("the gateway wrote no profile")
	}
	merged, err := output("go", append([]string{"tool", "pprof", "-proto"}, parts...)...)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%s: %d profiles of two seconds\n", into, len(parts))
	return os.WriteFile(into, merged, 0o644)
}

func output(name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return text, nil
}
