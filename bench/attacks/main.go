// SPDX-License-Identifier: Apache-2.0

// Attacks drives the real tlsnat binary from outside with everything that once harmed it, or could: bytes that break a
// protocol, clients that say nothing, backends that hang, files that are broken, a machine that lacks something. Each
// attack states what is right, in numbers where load is concerned, beside HAProxy where that is the yardstick.
//
//	go run ./bench/attacks                 every attack, at small scale
//	go run ./bench/attacks -run silent     those whose name has "silent"
//	go run ./bench/attacks -full           at the scale that the claims are about
//	go run ./bench/attacks -list           names and reasons
//
// It builds the gateway unless -binary names one. It talks to loopback only, and each attack ends by itself. An attack
// that lacks a program or a right is skipped and says why; with TLSNAT_CI=1 it fails.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"
)

// attack is one way to harm a gateway.
type attack struct {
	name string // words with dashes, as in "many-small-records"
	why  string // what goes wrong where the gateway is not right
	run  func(s *stage) error
}

// attacks is every attack, in the order of the files that have them.
func attacks() []attack {
	var all []attack
	for _, part := range [][]attack{recordAttacks, helloAttacks, proxyAttacks, clearTextAttacks, adminAttacks, sharedAttacks, machineAttacks} {
		all = append(all, part...)
	}
	return all
}

// errSkip is why an attack cannot be tried here.
var errSkip = errors.New("skipped")

func main() {
	pattern := flag.String("run", "", "only attacks whose name matches this regular expression")
	binary := flag.String("binary", "", "the gateway (default: it is built)")
	full := flag.Bool("full", false, "at full scale: minutes instead of seconds")
	list := flag.Bool("list", false, "print names and reasons, and end")
	flag.Parse()
	if *list {
		for _, a := range attacks() {
			fmt.Printf("%-36s %s\n", a.name, a.why)
		}
		return
	}
	if err := runAll(*pattern, *binary, *full); err != nil {
		fmt.Fprintln(os.Stderr, "attacks:", err)
		os.Exit(1)
	}
}

func runAll(pattern, binary string, full bool) error {
	chosen, err := regexp.Compile(pattern)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	dir, err := os.MkdirTemp("", "tlsnat-attacks-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // other users have to reach the binary
		return err
	}
	if binary, err = findBinary(binary, dir); err != nil {
		return err
	}
	var passed, failed, skipped int
	for _, a := range attacks() {
		if !chosen.MatchString(a.name) {
			continue
		}
		began := time.Now()
		switch err := try(a, binary, dir, full); {
		case err == nil:
			passed++
			fmt.Printf("ok    %-36s %.1f s\n", a.name, time.Since(began).Seconds())
		case errors.Is(err, errSkip) && os.Getenv("TLSNAT_CI") == "":
			skipped++
			fmt.Printf("skip  %-36s %v\n", a.name, err)
		default:
			failed++
			fmt.Printf("FAIL  %-36s %v\n      (%s)\n", a.name, err, a.why)
		}
	}
	fmt.Printf("attacks: %d passed, %d failed, %d skipped\n", passed, failed, skipped)
	switch {
	case failed > 0:
		return fmt.Errorf("%d attacks succeeded", failed)
	case passed+skipped == 0:
		return fmt.Errorf("no attack matches %q", pattern)
	}
	return nil
}

// findBinary is the gateway's path: the given one, or a new build in dir.
func findBinary(given, dir string) (string, error) {
	if given != "" {
		return filepath.Abs(given)
	}
	out := filepath.Join(dir, "tlsnat")
	build := exec.Command("go", "build", "-pgo=off", "-o", out, "github.com/tlsnat/tlsnat/cmd/tlsnat")
	build.Stderr = os.Stderr
	return out, build.Run()
}

// try runs one attack on a stage of its own, and ends what it started.
func try(a attack, binary, dir string, full bool) (err error) {
	s, err := newStage(binary, dir, full)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.close())
	}()
	return a.run(s)
}
