// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
)

func TestEnvListsEverySetting(t *testing.T) {
	r := ask(t, nil, "env")
	rows := strings.Split(strings.TrimSpace(r.out), "\n")
	docs := config.SettingDocs()
	if r.code != exitOK || len(rows) != len(docs)+1 {
		t.Fatal(r)
	}
	for i, d := range docs {
		want := strings.Fields(strings.Join([]string{d.Name, d.Type, d.Default, d.Doc}, " "))
		if got := strings.Fields(rows[i+1]); !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestEnvFitsTheTerminal runs it on one of 90 columns.
func TestEnvFitsTheTerminal(t *testing.T) {
	terminal, side := openTerminal(t, 90)
	cmd := command(t, t.TempDir(), nil, "env")
	cmd.Stdout = side
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	side.Close()
	var text bytes.Buffer
	text.ReadFrom(terminal) // ends with EIO when the other side is closed
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	rows := strings.Split(strings.TrimSpace(text.String()), "\r\n")
	if len(rows) <= len(config.SettingDocs())+1 {
		t.Errorf("nothing is wrapped:\n%s", &text)
	}
	for _, row := range rows {
		if len(row) > 90 {
			t.Errorf("%d columns: %s", len(row), row)
		}
	}
}

// openTerminal is a pseudo-terminal, and the side of it that programs see.
func openTerminal(t *testing.T, columns uint16) (terminal, side *os.File) {
	t.Helper()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		absent(t, "no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { terminal.Close() })
	fd := int(terminal.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if side, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns}); err != nil {
		t.Fatal(err)
	}
	return terminal, side
}

func TestVersionTellsWhatTheKernelCan(t *testing.T) {
	r := ask(t, nil, "version")
	protocols, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_available_ulp")
	ktls := "not used: .*modprobe tls"
	if slices.Contains(strings.Fields(string(protocols)), "tls") {
		ktls = "works"
	}
	want := regexp.MustCompile(`^tlsnat \S+\ngo +go1\.\S+ linux/\w+\nAES-GCM +(VAES with AVX-512|the standard library's \(.+\))\nRSA-2048 +(AVX-512 IFMA|the standard library's \(.+\))\nkernel +Linux \d\S+\nkTLS +` + ktls + `\b.*\nsplice +works\nsk_lookup +\S.*\nbacklog +\d+ .*\npipes +\d+ bytes .*\n$`)
	if r.code != exitOK || !want.MatchString(r.out) {
		t.Errorf("%v\nwants %s", r, want)
	}
	if again := ask(t, nil, "--version"); again != r {
		t.Errorf("--version says something else: %v", again)
	}
}

// TestEveryOptionIsExplained holds explain against the map's grammar: an option that is neither set by a rule nor by
// a setting has a value that is built in.
func TestEveryOptionIsExplained(t *testing.T) {
	settings := map[string]bool{}
	for _, d := range config.SettingDocs() {
		settings[strings.TrimPrefix(d.Name, config.Prefix)] = true
	}
	for _, o := range natmap.OptionDocs() {
		if (o.Default == "") == (o.Setting == "") || o.Setting != "" && !settings[o.Setting] {
			t.Errorf("%s: built in %q, setting %q", o.Key, o.Default, o.Setting)
		}
	}
}
