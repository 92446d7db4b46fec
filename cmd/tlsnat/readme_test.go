// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// root is the repository, seen from this package's directory, where go test runs.
const root = "../.."

// document is a text of the repository.
func document(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// blocks are the fenced blocks of a language in a document.
func blocks(t testing.TB, name, language string) (all []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?ms)^ *```"+language+"\n(.*?)^ *```$").FindAllStringSubmatch(document(t, name), -1) {
		all = append(all, m[1])
	}
	return all
}

// published is what a clone has at its top, beside texts that no command needs. What somebody's own work has left there
// (the binary, certificates and maps of the README) is not of it.
var published = []string{"cmd", "gateway", "sni", "natmap", "bench", "docs", "go.mod", "go.sum", "Dockerfile", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"}

// freshCopy is the repository as somebody has it who has just fetched it.
func freshCopy(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range published {
		from := filepath.Join(root, name)
		err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
			to := filepath.Join(dir, strings.TrimPrefix(path, root))
			switch {
			case err != nil:
				return err
			case e.IsDir() && e.Name() == "testdata":
				return filepath.SkipDir
			case e.IsDir():
				return os.MkdirAll(to, 0o755)
			case !e.Type().IsRegular():
				return nil
			}
			text, err := os.ReadFile(path)
			return errors.Join(err, os.WriteFile(to, text, 0o644))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// shell is a command in that directory, with the go command's caches and a home of its own. Its whole group of
// processes ends with the test.
func shell(t *testing.T, dir, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	for _, key := range []string{"GOCACHE", "GOMODCACHE", "GOPATH", "GOPROXY", "GOSUMDB", "GOFLAGS", "GOTOOLCHAIN"} {
		value, err := exec.Command("go", "env", key).Output()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, key+"="+strings.TrimSpace(string(value)))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	t.Cleanup(func() {
		if cmd.Process != nil {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	return cmd
}

// TestREADMEBeginsWithTwoCommands types the first one; the second one is what runs this test.
func TestREADMEBeginsWithTwoCommands(t *testing.T) {
	sh := blocks(t, "README.md", "sh")
	if len(sh) < 2 || sh[0] != "go run ./cmd/tlsnat\n" || sh[1] != "go test ./...\n" {
		t.Fatalf("it begins with %q", sh[:min(2, len(sh))])
	}
	needs(t, "curl")
	demoPort(t)
	p := launch(t, shell(t, freshCopy(t), "sh", "-c", "exec "+sh[0]))
	line := p.out.await(t, "curl")
	p.out.await(t, "stop")
	if answer := typed(t, line); answer.Message != "tlsnat works" || answer.TLS != "TLSv1.3" {
		t.Errorf("%+v", answer)
	}
	if err := syscall.Kill(-p.cmd.Process.Pid, syscall.SIGINT); err != nil { // as Ctrl-C does
		t.Fatal(err)
	}
	p.err.await(t, `"msg":"draining"`)
	p.exit(t) // with a code of the go command's own
}

// TestREADMECommandsWork types all the other ones in one shell, in their order. Only the ports are others, and the
// admin is off: the README's may be taken on this machine.
func TestREADMECommandsWork(t *testing.T) {
	for _, program := range []string{"curl", "openssl", "python3"} {
		needs(t, program)
	}
	script := "set -eu\n" + strings.Join(blocks(t, "README.md", "sh")[2:], "")
	for _, port := range []string{"8443", "8080"} {
		script = strings.ReplaceAll(script, port, strconv.Itoa(freePort(t)))
	}
	cmd := shell(t, freshCopy(t), "bash", "-c", script)
	cmd.Env = append(cmd.Env, "TLSNAT_ADMIN=off")
	p := launch(t, cmd)
	select {
	case <-p.ended:
	case <-time.After(2 * patience): // it compiles
		t.Error("it doesn't end")
	}
	if p.status != nil {
		t.Errorf("%v:\n%s\n%s\n%s", p.status, script, p.out.text(), p.err.text())
		return
	}
	p.out.await(t, "ok: 1 rule on 1 port, 1 certificate")
	p.out.await(t, "rule", "edge.natmap:2", "www.example.com")
	p.out.await(t, "# LISTEN")                                                  // edge.natmap, through the gateway
	p.err.await(t, `"msg":"connection"`, `"mode":"terminate"`, `"path":"user"`) // curl may end with a reset: it leaves a close_notify unread
}
