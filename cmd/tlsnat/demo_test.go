// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// demoPort has to be free for the demo, which has no settings that could change it.
func demoPort(t *testing.T) {
	t.Helper()
	if testkit.FixedPort(t, 8443) {
		absent(t, "somebody listens on port 8443")
	}
}

// TestDemoWorksWithNothingSet types what the demo prints.
func TestDemoWorksWithNothingSet(t *testing.T) {
	needs(t, "curl")
	demoPort(t)
	home := filepath.Join(t.TempDir(), "it's a home") // whose name has to be quoted
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	p := launch(t, command(t, home, nil))
	line := p.out.await(t, "curl")
	p.out.await(t, "stop")
	first := typed(t, line)
	if first.Message != "tlsnat works" || first.TLS != "TLSv1.3" || first.Name != "localhost" || !strings.HasSuffix(first.Edge, ":8443") {
		t.Errorf("%+v", first)
	}
	p.err.await(t, `"msg":"connection"`, `"id":"`+first.ID+`"`, `"outcome":"ok"`)
	p.signal(t, syscall.SIGINT)
	if code := p.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}

	certs, _ := filepath.Glob(filepath.Join(home, ".cache/tlsnat/demo/*.crt"))
	if len(certs) != 1 {
		t.Fatalf("certificates: %q", certs)
	}
	before, _ := os.ReadFile(certs[0])
	p = launch(t, command(t, home, nil, "demo"))
	typed(t, p.out.await(t, "curl"))
	if after, _ := os.ReadFile(certs[0]); !bytes.Equal(before, after) {
		t.Error("the certificate was made anew")
	}
}

type demoAnswer struct {
	Message, Edge, TLS, ID string
	Name                   string `json:"sni"`
}

// typed runs the command in a line of the demo's as a shell would.
func typed(t *testing.T, line string) (answer demoAnswer) {
	t.Helper()
	cmd := exec.Command("sh", "-c", line[strings.Index(line, "curl"):]+" --silent --show-error --max-time 30")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	text, err := cmd.CombinedOutput()
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, text)
	}
	return answer
}

// TestDemoSaysWhatToDoAboutATakenPort takes the port if nobody else has.
func TestDemoSaysWhatToDoAboutATakenPort(t *testing.T) {
	testkit.FixedPort(t, 8443)
	if l, err := net.Listen("tcp", ":8443"); err == nil {
		defer l.Close()
	}
	r := ask(t, nil)
	advice := regexp.MustCompile(`TLSNAT_MAP=':\d+ -> demo' tlsnat run`)
	if r.code != exitCannot || r.out != "" || !strings.Contains(r.err, "listen on :8443: address already in use") || !advice.MatchString(r.err) {
		t.Error(r)
	}
}

func TestDemoGoesOnWithoutItsAdminPage(t *testing.T) {
	demoPort(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := launch(t, command(t, t.TempDir(), []string{"TLSNAT_ADMIN=" + l.Addr().String()}, "demo"))
	line := p.out.await(t, "admin")
	if !hasAll(line, []string{"not there", "address already in use"}) {
		t.Error(line)
	}
	p.out.await(t, "stop")
	p.signal(t, syscall.SIGTERM)
	if code := p.exit(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// TestDemoEndsWithItsTerminal sends what a terminal that is closed sends.
func TestDemoEndsWithItsTerminal(t *testing.T) {
	demoPort(t)
	caught := make(chan os.Signal, 1) // where these tests run under nohup the demo would inherit that the signal is ignored
	signal.Notify(caught, syscall.SIGHUP)
	defer signal.Stop(caught)
	p := launch(t, command(t, t.TempDir(), []string{"TLSNAT_ADMIN=off"}, "demo"))
	p.out.await(t, "stop")
	p.signal(t, syscall.SIGHUP)
	p.exit(t)
}
