// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/config"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/natmap"
)

// root is the repository, seen from this package's directory, where go test runs.
const root = "../.."

func readme(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// blocks are the fenced blocks of a language.
func blocks(t testing.TB, language string) (all []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(readme(t), -1) {
		all = append(all, m[1])
	}
	if len(all) == 0 {
		t.Fatalf("the README has no block of %s", language)
	}
	return all
}

// published is what a clone has at its top, beside texts that no command needs. What somebody's own work has left there
// (the binary, certificates and maps of the README) is not of it.
var published = []string{"cmd", "gateway", "sni", "natmap", "bench", "docs", "go.mod", "go.sum", "Dockerfile", "README.md", "ARCHITECTURE.md"}

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
	sh := blocks(t, "sh")
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
	script := "set -eu\n" + strings.Join(blocks(t, "sh")[2:], "")
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
	p.out.await(t, "# LISTEN") // edge.natmap, through the gateway
	p.out.await(t, "tlsnat works")
	p.err.await(t, `"outcome":"ok"`, `"mode":"terminate"`)
}

// TestREADMEConsoleNamesWhatIsThere is about the commands that need a host of their own: the files of ours in them
// exist, and docker understands its arguments.
func TestREADMEConsoleNamesWhatIsThere(t *testing.T) {
	text := strings.ReplaceAll(strings.Join(blocks(t, "console"), ""), "\\\n", " ")
	for _, file := range regexp.MustCompile(`docs/\S+`).FindAllString(text, -1) {
		if _, err := os.Stat(filepath.Join(root, file)); err != nil {
			t.Error(err)
		}
	}
	if _, err := exec.LookPath("docker"); err != nil {
		return
	}
	for _, line := range regexp.MustCompile(`(?m)^\$ (docker (?:build|run) [^#\n]*)`).FindAllStringSubmatch(text, -1) {
		cmd := exec.Command("sh", "-c", line[1])
		cmd.Dir = root
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "DOCKER_HOST=unix:///nobody-is-there.sock"}
		// Arguments are looked at first, and then nobody is there.
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "nobody-is-there.sock") {
			t.Errorf("%s: %v\n%s", line[1], err, out)
		}
	}
}

// TestREADMETablesAreCurrent holds the tables against what they are made from.
func TestREADMETablesAreCurrent(t *testing.T) {
	text := readme(t)
	want := fill(t, fill(t, text, "options", optionTable()), "settings", settingTable())
	if *update {
		if err := os.WriteFile(filepath.Join(root, "README.md"), []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if text != want {
		t.Error("go test ./cmd/tlsnat -run README -update")
	}
}

// fill puts a table between its marks.
func fill(t *testing.T, text, name, table string) string {
	t.Helper()
	between := regexp.MustCompile("(?s)(<!-- " + name + ": [^\n]* -->\n).*?(<!-- end of " + name + " -->)")
	if !between.MatchString(text) {
		t.Fatalf("no place for the %s", name)
	}
	return between.ReplaceAllString(text, "${1}"+strings.ReplaceAll(table, "$", "$$")+"${2}")
}

func optionTable() string {
	var b strings.Builder
	b.WriteString("| option | default | goes with | meaning |\n|---|---|---|---|\n")
	for _, o := range natmap.OptionDocs() {
		value := o.Default
		if o.Setting != "" {
			value = "`" + config.Prefix + o.Setting + "`"
		}
		fmt.Fprintf(&b, "| `%s=%s` | %s | %s | %s |\n", o.Key, strings.ReplaceAll(o.Value, "|", `\|`), value, o.Rules, strings.ReplaceAll(o.Help, "|", `\|`))
	}
	return b.String()
}

func settingTable() string {
	var b strings.Builder
	b.WriteString("| variable | type | default | meaning |\n|---|---|---|---|\n")
	for _, d := range config.SettingDocs() {
		value := ""
		if d.Default != "" {
			value = "`" + d.Default + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", d.Name, d.Type, value, strings.ReplaceAll(d.Doc, "|", `\|`))
	}
	return b.String()
}

// TestREADMESampleIsWhatIsLogged holds the sample line against a real one: the same fields in the same order, each of
// them explained.
func TestREADMESampleIsWhatIsLogged(t *testing.T) {
	r := runGateway(t)
	c := r.dial(t)
	echo(t, c, "x")
	c.Close()
	sample, line := blocks(t, "json")[0], r.err.await(t, `"msg":"connection"`)
	got, want := keys(t, sample), keys(t, line)
	if !slices.Equal(got, want) {
		t.Errorf("the sample has %q, a line %q", got, want)
	}
	explained := firstColumn(t, "field")
	for _, key := range want[3:] { // level, time and msg explain themselves
		if !slices.Contains(explained, key) {
			t.Errorf("%s is not explained", key)
		}
	}
}

// keys are those of a JSON object, in its order.
func keys(t *testing.T, object string) (all []string) {
	t.Helper()
	if !json.Valid([]byte(object)) {
		t.Fatalf("no JSON: %s", object)
	}
	for _, m := range regexp.MustCompile(`"(\w+)":`).FindAllStringSubmatch(object, -1) {
		all = append(all, m[1])
	}
	return all
}

func TestREADMEExplainsEveryOutcome(t *testing.T) {
	var want []string
	for o := gateway.OK; o <= gateway.Internal; o++ {
		want = append(want, o.String())
	}
	if got := firstColumn(t, "outcome"); !slices.Equal(got, want) {
		t.Errorf("the README has %q, the gateway %q", got, want)
	}
}

// firstColumn are the words in code type of the first column of the table with that heading.
func firstColumn(t *testing.T, heading string) (all []string) {
	t.Helper()
	_, rows, ok := strings.Cut(readme(t), "\n| "+heading+" |")
	if !ok {
		t.Fatalf("no table of %ss", heading)
	}
	for row := range strings.SplitSeq(rows, "\n") {
		cells := strings.Split(row, "|")
		if len(all) > 0 && len(cells) < 3 {
			break
		}
		if len(cells) > 2 {
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
				all = append(all, m[1])
			}
		}
	}
	return all
}
