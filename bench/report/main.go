// SPDX-License-Identifier: Apache-2.0

// Command report runs the benchmarks of ../ in rounds and writes down their medians:
//
//	go run ./bench/report                        # five rounds of everything
//	go run ./bench/report -rounds 3 -bench Echo  # less of it, to look at
//	go run ./bench/report -rounds 0              # only write the table and the charts again, from bench/results/raw.txt
//
// It replaces what stands between the two marker comments of bench/README.md and of the repository's README.md, writes charts to bench/charts and leaves every line of every round in
// bench/results/raw.txt, in Go's benchmark format, for benchstat. A round takes every peer in turn through every case, so a median is over measurements
// that lie minutes apart. It does not judge: what is better is said by the ratio, and whether the difference is one by benchstat.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

func main() {
	rounds := flag.Int("rounds", 5, "how often everything is measured; 0 writes the report from what was measured before")
	bench := flag.String("bench", ".", "which benchmarks to run, as for go test")
	benchtime := flag.String("benchtime", "1s", "how long each of them runs, as for go test")
	flag.Parse()
	dir, err := benchDir()
	if err == nil && *rounds > 0 {
		err = measure(dir, *rounds, "-test.run=^$", "-test.timeout=1h", "-test.bench="+*bench, "-test.benchtime="+*benchtime)
	}
	if err == nil {
		err = write(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

// benchDir is the folder bench of the module that the working directory is in.
func benchDir() (string, error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	path := strings.TrimSpace(string(mod))
	if path == "" || path == os.DevNull {
		return "", errors.New("not inside the module: run it from the repository's root")
	}
	return filepath.Join(filepath.Dir(path), "bench"), nil
}

// measure runs the benchmarks round after round into results/raw.txt. An interrupt ends the round's process, which ends what it started.
func measure(dir string, rounds int, args ...string) error {
	binary := filepath.Join(os.TempDir(), fmt.Sprintf("tlsnat-bench-%d.test", os.Getpid()))
	defer os.Remove(binary)
	build := exec.Command("go", "test", "-c", "-o", binary, ".")
	build.Dir, build.Stderr = dir, os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go test -c: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "results"), 0o755); err != nil {
		return err
	}
	raw, err := os.Create(filepath.Join(dir, "results", "raw.txt"))
	if err != nil {
		return err
	}
	defer raw.Close()
	signal.Ignore(syscall.SIGINT) // the terminal sends it to the round too
	for round := range rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, rounds)
		run := exec.Command(binary, args...)
		run.Dir, run.Stderr, run.Stdout = dir, os.Stderr, io.MultiWriter(raw, os.Stderr)
		if err := run.Run(); err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
	}
	return raw.Close()
}

// write makes the table and the charts from results/raw.txt.
func write(dir string) error {
	raw, err := os.Open(filepath.Join(dir, "results", "raw.txt"))
	if err != nil {
		return err
	}
	defer raw.Close()
	m, err := parse(raw)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "charts"), 0o755); err != nil {
		return err
	}
	for _, c := range charts {
		if err := os.WriteFile(filepath.Join(dir, "charts", c.file), c.draw(m), 0o644); err != nil {
			return err
		}
	}
	for readme, figures := range map[string][]byte{"README.md": m.tables(), filepath.Join("..", "README.md"): m.short()} {
		if err := rewrite(filepath.Join(dir, readme), figures); err != nil {
			return err
		}
	}
	return nil
}

// rewrite puts figures between the marker comments of a file.
func rewrite(path string, figures []byte) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if text, err = replaceFigures(text, figures); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(path, text, 0o644)
}

const (
	figuresBegin = "<!-- figures: written by go run ./bench/report -->\n"
	figuresEnd   = "<!-- end of figures -->"
)

func replaceFigures(text, tables []byte) ([]byte, error) {
	before, rest, found := bytes.Cut(text, []byte(figuresBegin))
	_, after, closed := bytes.Cut(rest, []byte(figuresEnd))
	if !found || !closed {
		return nil, fmt.Errorf("no place for the figures: it needs a line %q and after it %q", strings.TrimSpace(figuresBegin), figuresEnd)
	}
	return slices.Concat(before, []byte(figuresBegin), tables, []byte(figuresEnd), after), nil
}
