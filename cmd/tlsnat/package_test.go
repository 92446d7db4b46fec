// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/tls"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
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
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// What the gateway comes in: its packages, an image, a service.

const module = "github.com/tlsnat/tlsnat/"

// TestImportsGoOneWay holds the packages against the table in ARCHITECTURE.md. A package that isn't there may import
// none of ours; and nobody imports cmd or bench.
func TestImportsGoOneWay(t *testing.T) {
	allowed, pure := importTable(t)
	out, err := exec.Command("go", "list", "-pgo=off", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); seen++ {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		for _, path := range p.Imports {
			ours, isOurs := strings.CutPrefix(path, module)
			if isOurs && !slices.Contains(allowed[name], ours) {
				t.Errorf("%s imports %s", name, ours)
			}
			if foreign := strings.Contains(path, "."); foreign && slices.Contains(pure, name) {
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
	if seen < len(allowed) {
		t.Errorf("go list found only %d packages", seen)
	}
}

// importTable is which of our packages a package may import, and which ones may import the standard library only.
func importTable(t *testing.T) (allowed map[string][]string, pure []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	allowed = map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|(.*)\\|(.*)\\|$").FindAllStringSubmatch(string(text), -1) {
		allowed[row[1]] = []string{}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[3], -1) {
			if top, _, _ := strings.Cut(m[1], "/"); top == "cmd" || top == "bench" {
				t.Errorf("%s may import %s", row[1], m[1])
			}
			allowed[row[1]] = append(allowed[row[1]], m[1])
		}
		if strings.Contains(row[2], "Standard library only") {
			pure = append(pure, row[1])
		}
	}
	if len(allowed) < 7 || len(pure) == 0 {
		t.Fatalf("the table is not found: %v, %v", allowed, pure)
	}
	return allowed, pure
}

// dockerfile are the arguments of an instruction, wherever it stands.
func dockerfile(t *testing.T, instruction string) (all []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^`+instruction+` (.+)$`).FindAllStringSubmatch(string(text), -1) {
		all = append(all, m[1])
	}
	if len(all) == 0 {
		t.Fatalf("the Dockerfile has no %s", instruction)
	}
	return all
}

// TestImageRunsInAnEmptyFileSystem does by hand what the Dockerfile says: it builds with its commands, and runs what
// came out as its user, in a directory that has nothing else.
func TestImageRunsInAnEmptyFileSystem(t *testing.T) {
	testkit.Needs(t, testkit.Root)
	if os.Geteuid() != 0 {
		absent(t, "chroot needs root")
	}
	user, _, _ := strings.Cut(dockerfile(t, "USER")[0], ":")
	uid, err := strconv.Atoi(user)
	if err != nil || uid == 0 {
		t.Fatalf("USER %s is not a number, or is root", user)
	}
	image := openDir(t, 0)
	buildImage(t, image)
	checkMaterials(t, image, uid)
	if err := os.Chown(filepath.Join(image, "state"), uid, uid); err != nil {
		t.Fatal(err)
	}
	var command []string
	for _, instruction := range []string{"ENTRYPOINT", "CMD"} {
		var words []string
		if err := json.Unmarshal([]byte(dockerfile(t, instruction)[0]), &words); err != nil {
			t.Fatal(err)
		}
		command = append(command, words...)
	}
	port := freePort(t)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(dockerfile(t, "ENV"), fmt.Sprintf("TLSNAT_MAP=:%d -> demo", port), "TLSNAT_ADMIN=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: image, Pdeathsig: syscall.SIGKILL,
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	p := launch(t, cmd)
	p.err.await(t, `"msg":"running"`)
	c, err := tls.Dial("tcp", fmt.Sprintf("localhost:%d", port), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
	answer := make([]byte, 512)
	if n, err := c.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.0 200 OK") {
		t.Errorf("%q, %v", answer[:n], err)
	}
}

// buildImage runs the RUN lines that compile, and puts what is copied into the image at its place.
func buildImage(t *testing.T, image string) {
	t.Helper()
	for _, line := range dockerfile(t, "RUN") {
		if strings.Contains(line, "go mod download") { // has been done, or this test would not compile
			continue
		}
		cmd := exec.Command("sh", "-c", strings.ReplaceAll(line, "/image/", image+"/"))
		cmd.Dir = root
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, text)
		}
	}
	binary, err := elf.Open(filepath.Join(image, "tlsnat"))
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	for _, p := range binary.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the binary is not static")
		}
	}
	for _, line := range dockerfile(t, "COPY") {
		words := strings.Fields(line)
		from, to := words[len(words)-2], words[len(words)-1]
		if strings.HasPrefix(from, "/etc/") { // of the build image; this machine has the same
			copyFile(t, from, filepath.Join(image, to))
		}
		if strings.HasPrefix(from, "/image/") && from != "/image"+to {
			at := filepath.Join(image, to)
			if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/"+filepath.Base(from), at); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		absent(t, "%s is not there", from)
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, text, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// inImage runs a command in the image's file system and returns what it says.
func inImage(image string, uid int, environ []string, args ...string) string {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir, cmd.Env = "/", environ
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: image, Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	out, err := cmd.CombinedOutput()
	return fmt.Sprintf("%s%v", out, err)
}

// checkMaterials looks at what else is in the image: CAs to verify backends by, and the list of modules.
func checkMaterials(t *testing.T, image string, uid int) {
	t.Helper()
	environ := []string{"TLSNAT_MAP=:9443 -> tls://backend.test:443 mode=tcp", "TLSNAT_ADMIN=off"}
	if said := inImage(image, uid, environ, "/tlsnat", "check"); !strings.Contains(said, "ok: 1 rule") {
		t.Errorf("a tls:// backend in the image: %s", said)
	}
	text, err := os.ReadFile(filepath.Join(image, "modules.txt"))
	if err != nil {
		t.Fatal(err)
	}
	modules := regexp.MustCompile(`(?m)^\tdep\t(\S+)\t(\S+)\t(h1:\S+)$`).FindAllSubmatch(text, -1)
	sums, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range modules {
		if !strings.Contains(string(sums), fmt.Sprintf("%s %s %s\n", m[1], m[2], m[3])) {
			t.Errorf("%s is not the module of go.sum", m[0])
		}
	}
	if len(modules) < 5 || strings.Count(string(text), "\tdep\t") != len(modules) {
		t.Errorf("modules without a hash:\n%s", text)
	}
}

// TestToolchainIsNamed: go.mod and the build image name the same patch release, so that no older crypto/tls is compiled in.
func TestToolchainIsNamed(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^go (1\.\d+\.[1-9]\d*)$`).FindSubmatch(text)
	if m == nil {
		t.Fatal("go.mod names no patch release")
	}
	if image := dockerfile(t, "ARG")[0]; !regexp.MustCompile(`^GO_IMAGE=golang:` + regexp.QuoteMeta(string(m[1])) + `(@sha256:[0-9a-f]{64})?$`).MatchString(image) {
		t.Errorf("the image is built with %s, go.mod says %s", image, m[1])
	}
}

func TestDockerfileCopiesWhatIsThere(t *testing.T) {
	for _, line := range dockerfile(t, "COPY") {
		if strings.Contains(line, "--from=") {
			continue
		}
		words := strings.Fields(line)
		for _, file := range words[:len(words)-1] {
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Error(err)
			}
		}
	}
}

// unit is the service with the program under test in it.
func unit(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs/tlsnat.service"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), "/usr/local/bin/tlsnat", tlsnat)
}

func TestUnitIsUnderstoodBySystemd(t *testing.T) {
	analyze := needs(t, "systemd-analyze")
	file := filepath.Join(t.TempDir(), "tlsnat.service")
	if err := os.WriteFile(file, []byte(unit(t)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(analyze, "verify", file).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestUnitWaitsForTheDrain keeps systemd from killing what drains.
func TestUnitWaitsForTheDrain(t *testing.T) {
	m := regexp.MustCompile(`(?m)^TimeoutStopSec=(\S+)$`).FindStringSubmatch(unit(t))
	if m == nil {
		t.Fatal("no TimeoutStopSec=")
	}
	stop, err := time.ParseDuration(m[1])
	s, errs := config.ReadSettings(nil)
	if err != nil || errs != nil || stop <= s.DrainTimeout+5*time.Second {
		t.Errorf("TimeoutStopSec=%s, but connections may take %s to end", m[1], s.DrainTimeout)
	}
}

// TestUnitAllowsEverySystemCall traces the gateway at work and holds its system calls against the unit's filter.
func TestUnitAllowsEverySystemCall(t *testing.T) {
	needs(t, "systemd-analyze")
	strace := needs(t, "strace")
	trace := filepath.Join(t.TempDir(), "trace")
	r := &running{port: freePort(t)}
	cmd := command(t, t.TempDir(), []string{fmt.Sprintf("TLSNAT_MAP=:%d -> demo", r.port), "TLSNAT_ADMIN=127.0.0.1:0",
		"TLSNAT_STATE=" + t.TempDir()}, "-f", "-qq", "-o", trace, tlsnat, "run")
	cmd.Path = strace
	r.process = launch(t, cmd)
	t.Cleanup(func() { // what is traced outlives a strace that is killed
		select {
		case <-r.ended:
		default:
			signalChildren(r.cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	r.err.await(t, `"msg":"running"`)
	c, err := tls.Dial("tcp", fmt.Sprintf("localhost:%d", r.port), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
	c.Read(make([]byte, 512))
	c.Close()
	r.err.await(t, `"msg":"connection"`)
	// strace keeps signals for itself, and ends after what it traces.
	if err := signalChildren(r.cmd.Process.Pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r.exit(t)
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\d+ +(\w+)\(`).FindAllSubmatch(text, -1) {
		made[string(m[1])] = true
	}
	if !made["accept4"] || !made["epoll_ctl"] {
		t.Fatalf("the trace has only %v", made)
	}
	allowed := systemCalls(t)
	for name := range made {
		if !allowed[name] {
			t.Errorf("%s is not allowed", name)
		}
	}
}

// signalChildren signals the processes that pid has started.
func signalChildren(pid int, sig syscall.Signal) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	for child := range strings.FieldsSeq(string(text)) {
		n, wrong := strconv.Atoi(child)
		if wrong == nil {
			wrong = syscall.Kill(n, sig)
		}
		err = errors.Join(err, wrong)
	}
	return err
}

// systemCalls are those that the unit's SystemCallFilter= lines allow, in their order.
func systemCalls(t *testing.T) map[string]bool {
	t.Helper()
	allowed := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^SystemCallFilter=(~?)(.+)$`).FindAllStringSubmatch(unit(t), -1) {
		for _, name := range strings.Fields(m[2]) {
			for _, call := range expand(t, name) {
				allowed[call] = m[1] == ""
			}
		}
	}
	return allowed
}

// expand is a set of system calls as systemd knows it.
func expand(t *testing.T, name string) (all []string) {
	t.Helper()
	if !strings.HasPrefix(name, "@") {
		return []string{name}
	}
	out, err := exec.Command("systemd-analyze", "syscall-filter", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		word := strings.TrimSpace(line)
		if word == "" || word == name || strings.HasPrefix(word, "#") {
			continue
		}
		all = append(all, expand(t, word)...)
	}
	return all
}

// TestExampleSettingsExist reads docs/tlsnat.env as systemd does, with what is commented out.
func TestExampleSettingsExist(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs/tlsnat.env"))
	if err != nil {
		t.Fatal(err)
	}
	var environ []string
	for _, m := range regexp.MustCompile(`(?m)^#?(TLSNAT_\w+=.*)$`).FindAllStringSubmatch(string(text), -1) {
		setting := m[1]
		if setting == "TLSNAT_ADMIN_TOKEN=" { // to be chosen
			setting += "secret"
		}
		environ = append(environ, setting)
	}
	if _, err := config.ReadSettings(environ); err != nil || len(environ) < 4 {
		t.Errorf("%q: %v", environ, err)
	}
}

// TestSettingsAreForRootAlone: the file may hold the admin's token. The guide installs it so, and shows no way to check
// it that puts what it holds into the arguments of a process, which every user can read.
func TestSettingsAreForRootAlone(t *testing.T) {
	text := strings.Join(blocks(t, "docs/guide/install.md", "console"), "")
	if m := regexp.MustCompile(`(?m)^\$ install -m (\d+) .*docs/tlsnat\.env`).FindStringSubmatch(text); m == nil || m[1] != "600" {
		t.Errorf("installed as %v", m)
	}
	if strings.Contains(text, "env $(") {
		t.Error("settings are arguments of env")
	}
	dir := t.TempDir()
	settings, err := os.ReadFile(filepath.Join(root, "docs/tlsnat.env"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "tlsnat.env")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(settings), "/etc/tlsnat/", dir+"/")+"TLSNAT_ADMIN_TOKEN=secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "edge.natmap"), []byte(":9443 -> 127.0.0.1:1 mode=tcp\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "certs"), 0o700); err != nil {
		t.Fatal(err)
	}
	check := regexp.MustCompile(`(?m)^\$ (\(set -a; .*)$`).FindStringSubmatch(text)
	if check == nil {
		t.Fatal("no command that checks the settings")
	}
	line := strings.NewReplacer("/etc/tlsnat/", dir+"/", "runuser -u tlsnat -- tlsnat", tlsnat).Replace(check[1])
	out, _ := exec.Command("sh", "-c", line).CombinedOutput()
	if !strings.Contains(string(out), "certs: no certificate with its key") { // of all that it read nothing else is wrong
		t.Errorf("%s: %s", line, out)
	}
}
