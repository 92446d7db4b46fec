// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/certs/rsasign"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/record/gcm"
)

// check reads everything as run does and says what is wrong with it.
func (p *program) check(args []string) int {
	if !p.noArguments("check", args) {
		return exitUsage
	}
	config, problems := p.config()
	p.complain(problems)
	if config == nil || problems.Errors() {
		return exitInput
	}
	if err := gateway.CheckSockets(config); err != nil {
		return p.cannot(err)
	}
	ports, certificates := 0, len(config.Certs.Served(time.Now()))
	for _, l := range config.Map.Listens() {
		ports += l.Len()
	}
	fmt.Fprintf(p.out, "ok: %s on %s, %s", count(len(config.Map.Rules), "rule"), count(ports, "port"), count(certificates, "certificate"))
	if len(problems) > 0 {
		fmt.Fprintf(p.out, ", %s", count(len(problems), "warning"))
	}
	fmt.Fprintln(p.out)
	return exitOK
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return strconv.Itoa(n) + " " + what
}

// env prints every setting.
func (p *program) env(args []string) int {
	if !p.noArguments("env", args) {
		return exitUsage
	}
	docs := config.SettingDocs()
	name, kind, value := len("NAME"), len("TYPE"), len("DEFAULT")
	for _, d := range docs {
		name, kind, value = max(name, len(d.Name)), max(kind, len(d.Type)), max(value, len(d.Default))
	}
	left := name + kind + value + 3*len("  ")
	row := func(n, k, v, text string) {
		fmt.Fprintf(p.out, "%-*s  %-*s  %-*s  %s\n", name, n, kind, k, value, v, text)
	}
	row("NAME", "TYPE", "DEFAULT", "MEANING")
	for _, d := range docs {
		for i, line := range wrap(d.Doc, p.width()-left) {
			if i > 0 {
				d.Name, d.Type, d.Default = "", "", ""
			}
			row(d.Name, d.Type, d.Default, line)
		}
	}
	return exitOK
}

// width is that of the terminal. What goes to a file or a pipe is not wrapped, so that grep finds whole lines.
func (p *program) width() int {
	const unbounded = 1 << 20
	size := p.terminal()
	if size == nil || size.Col == 0 {
		return unbounded
	}
	return int(size.Col)
}

// terminal is the size of the one that is written to; nil: it is none.
func (p *program) terminal() *unix.Winsize {
	f, ok := p.out.(*os.File)
	if !ok {
		return nil
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return nil
	}
	return size
}

func (p *program) onTerminal() bool { return p.terminal() != nil }

// wrap breaks text between words into lines of at most width characters, or of 24 where there is less room: a
// column that is narrower can't be read.
func wrap(text string, width int) []string {
	width = max(width, 24)
	lines := []string{""}
	for word := range strings.FieldsSeq(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case utf8.RuneCountInString(*last)+1+utf8.RuneCountInString(word) <= width:
			*last += " " + word
		default:
			lines = append(lines, word)
		}
	}
	return lines
}

// version prints what runs, and on what.
func (p *program) version(args []string) int {
	if !p.noArguments("version", args) {
		return exitUsage
	}
	fmt.Fprintf(p.out, "tlsnat %s\n", buildVersion())
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "go\t%s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	fmt.Fprintf(w, "AES-GCM\t%s\n", accelerated("VAES with AVX-512", gcm.Accelerated))
	fmt.Fprintf(w, "RSA-2048\t%s\n", accelerated("AVX-512 IFMA", rsasign.Accelerated))
	fmt.Fprintf(w, "kernel\t%s\n", kernel())
	fmt.Fprintf(w, "kTLS\t%s\n", gateway.KernelTLS())
	fmt.Fprintf(w, "splice\t%s\n", splice())
	fmt.Fprintf(w, "sk_lookup\t%s\n", gateway.Steering())
	fmt.Fprintf(w, "backlog\t%s (net.core.somaxconn)\n", sysctl("net/core/somaxconn"))
	fmt.Fprintf(w, "pipes\t%s bytes (fs.pipe-max-size)\n", sysctl("fs/pipe-max-size"))
	w.Flush()
	return exitOK
}

// buildVersion is the module's version, which the go command takes from the tag or the commit.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "of unknown version"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	revision, modified := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = "+dirty"
		}
	}
	return cmp.Or(revision, "devel") + modified
}

// accelerated says which implementation does the work: our own, by its name, or the standard library's.
func accelerated(ours string, is func() (bool, string)) string {
	if ok, why := is(); !ok {
		return "the standard library's (" + why + ")"
	}
	return ours
}

func kernel() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err.Error()
	}
	return unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:])
}

func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return "not to be read"
	}
	return strings.TrimSpace(string(b))
}

// splice tries it, with one byte from a socket to a pipe.
func splice() string {
	if err := trySplice(); err != nil {
		return "fails: " + err.Error() + "; mode=pass and mode=tcp need it"
	}
	return "works"
}

func trySplice() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	if _, err := unix.Write(pair[0], []byte{1}); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	n, err := unix.Splice(pair[1], nil, pipe[1], nil, 1, unix.SPLICE_F_NONBLOCK)
	if err == nil && n != 1 {
		err = io.ErrShortWrite
	}
	return err
}
