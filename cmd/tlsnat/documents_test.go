// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/natmap"
)

// documents are all texts for readers, from the top of the repository.
func documents(t testing.TB) []string {
	t.Helper()
	all := []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"}
	err := filepath.WalkDir(filepath.Join(root, "docs"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".md") {
			all = append(all, strings.TrimPrefix(path, root+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestDocumentCommandsWork types the sh blocks of each page but the README, which has a test of its own, in one shell.
// The program is in the path, and nothing is set.
func TestDocumentCommandsWork(t *testing.T) {
	for _, page := range documents(t)[1:] {
		sh := blocks(t, page, "sh")
		if len(sh) == 0 {
			continue
		}
		t.Run(page, func(t *testing.T) {
			for _, program := range []string{"curl", "openssl"} {
				needs(t, program)
			}
			script := "set -eu\n" + strings.ReplaceAll(strings.Join(sh, ""), "8443", strconv.Itoa(freePort(t)))
			cmd := shell(t, t.TempDir(), "bash", "-c", script)
			cmd.Env = append(cmd.Env, "TLSNAT_ADMIN=off", "PATH="+filepath.Dir(tlsnat)+":"+os.Getenv("PATH"))
			p := launch(t, cmd)
			select {
			case <-p.ended:
			case <-time.After(patience):
				t.Error("it does not end")
			}
			if p.status != nil {
				t.Errorf("%v:\n%s\n%s\n%s", p.status, script, p.out.text(), p.err.text())
			}
		})
	}
}

var (
	ownCommand = regexp.MustCompile(`(?m)^\$ (tlsnat .*)$`)
	ownFile    = regexp.MustCompile(`docs/[\w.-]+`)
)

// TestDocumentConsoleIsUnderstood is about commands that need a host of their own. Ours are run without a gateway, which
// finds a command or an argument that does not exist (exit code 2); the files of ours are there.
func TestDocumentConsoleIsUnderstood(t *testing.T) {
	found := 0
	for _, page := range documents(t) {
		text := strings.ReplaceAll(strings.Join(blocks(t, page, "console"), ""), "\\\n", " ")
		for _, file := range ownFile.FindAllString(text, -1) {
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Errorf("%s: %v", page, err)
			}
		}
		for _, m := range ownCommand.FindAllStringSubmatch(text, -1) {
			found++
			cmd := command(t, t.TempDir(), []string{"TLSNAT_MAP=:9 -> 127.0.0.1:9 mode=tcp", "TLSNAT_ADMIN=off", "PATH=" + filepath.Dir(tlsnat) + ":" + os.Getenv("PATH")}, "-c", m[1])
			cmd.Path = "/bin/sh"
			if r := finish(t, cmd); r.code == exitUsage {
				t.Errorf("%s: %s: %v", page, m[1], r)
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d commands are found", found)
	}
}

// TestDocumentDockerIsUnderstood has docker look at its arguments, which it does before it asks its daemon.
func TestDocumentDockerIsUnderstood(t *testing.T) {
	needs(t, "docker")
	text := strings.ReplaceAll(strings.Join(blocks(t, "docs/guide/install.md", "console"), ""), "\\\n", " ")
	lines := regexp.MustCompile(`(?m)^\$ (docker (?:build|run) [^#\n]*)`).FindAllStringSubmatch(text, -1)
	if len(lines) == 0 {
		t.Fatal("no command of docker")
	}
	for _, line := range lines {
		cmd := exec.Command("sh", "-c", line[1])
		cmd.Dir = root
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "DOCKER_HOST=unix:///nobody-is-there.sock"}
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "nobody-is-there.sock") {
			t.Errorf("%s: %v\n%s", line[1], err, out)
		}
	}
}

// TestDocumentMapsAreRight checks every map, with certificates, CAs and lists for what it names.
func TestDocumentMapsAreRight(t *testing.T) {
	found := 0
	for _, page := range documents(t) {
		for _, text := range blocks(t, page, "natmap") {
			found++
			dir := t.TempDir()
			files := map[string][]byte{"edge.natmap": []byte(text)}
			m, err := natmap.Parse(natmap.Source{Name: "edge.natmap", Text: text})
			if err != nil {
				t.Errorf("%s: %v", page, err)
				continue
			}
			names := []string{"localhost"}
			for _, r := range m.Rules {
				names = append(names, r.Name, r.Options.Cert, r.Options.BackendCert)
			}
			slices.Sort(names)
			names = slices.DeleteFunc(slices.Compact(names), func(s string) bool { return s == "" })
			id := issue(t, -time.Hour, 90*24*time.Hour, names...)
			files["certs/all.crt"], files["certs/all.key"] = id.cert, id.key
			for _, r := range m.Rules {
				files["cas/"+r.Options.BackendCA+"x.pem"] = id.cert
				if r.Options.BackendCA != "" {
					files["cas/"+r.Options.BackendCA+".pem"] = id.cert
				}
			}
			for _, list := range regexp.MustCompile(`(?:allow|deny)=@(\S+)`).FindAllStringSubmatch(text, -1) {
				files[list[1]] = []byte("198.51.100.0/24\n")
			}
			write(t, dir, files)
			r := finish(t, command(t, dir, []string{"TLSNAT_MAP_FILE=edge.natmap", "TLSNAT_CERTS=certs", "TLSNAT_BACKEND_CAS=cas", "TLSNAT_ADMIN=off"}, "check"))
			// 3 is a machine that lacks descriptors or a right for it, which is no mistake of the map.
			if r.code != exitOK && r.code != exitCannot {
				t.Errorf("%s:\n%s\n%v", page, text, r)
			}
		}
	}
	if found < 12 {
		t.Errorf("only %d maps are found", found)
	}
}

// TestDocumentFunctionsAreThere: CONTRIBUTING names functions with their files, for readers to follow.
func TestDocumentFunctionsAreThere(t *testing.T) {
	steps := regexp.MustCompile(`(?m)^\d+\. \[\S+\]\((\S+\.go)\) \x60(\w+)\x60`).FindAllStringSubmatch(document(t, "CONTRIBUTING.md"), -1)
	if len(steps) < 10 {
		t.Errorf("only %d steps", len(steps))
	}
	for _, s := range steps {
		if !regexp.MustCompile(`(?m)^func (\([^)]*\) )?` + s[2] + `\(`).MatchString(document(t, s[1])) {
			t.Errorf("%s has no function %s", s[1], s[2])
		}
	}
}

// TestDocumentNamesAreThere: tests, files, metrics, settings and options that a page names exist.
func TestDocumentNamesAreThere(t *testing.T) {
	tests, settings := allTests(t), document(t, settingPage)
	metrics, options := document(t, "docs/reference/metrics.md"), document(t, optionPage)
	code := regexp.MustCompile("`[^`\n]+`")
	for _, page := range documents(t) {
		text := document(t, page)
		missing := func(pattern, what string, is func(name string) bool) {
			for _, span := range code.FindAllString(text, -1) {
				for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(span, -1) {
					if !is(m[1]) {
						t.Errorf("%s: there is no %s %s", page, what, m[1])
					}
				}
			}
		}
		missing(`^.(Test[A-Z]\w+).$`, "test", func(name string) bool { return tests[name] })
		missing(`^.((?:gateway|natmap|sni|cmd|bench|docs)/[\w/.-]+\.\w+)`, "file", func(name string) bool {
			_, err := os.Stat(filepath.Join(root, name))
			return err == nil
		})
		missing(`(tlsnat_[a-z_]+[a-z])`, "metric", func(name string) bool { return strings.Contains(metrics, "`"+name+"`") })
		missing(`(TLSNAT_[A-Z_]+[A-Z])`, "setting", func(name string) bool {
			return strings.Contains(settings, "`"+name+"`") || name == "TLSNAT_TEST" || name == "TLSNAT_CI"
		})
		missing(`^.([a-z][a-z-]+)=.?$`, "option", func(name string) bool {
			return strings.Contains(options, "`"+name+"=") || page == apiPage || name == "limit" || name == "host" // of the API and of psql
		})
	}
}

// allTests are the names of all tests.
func allTests(t *testing.T) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(text, -1) {
			all[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
