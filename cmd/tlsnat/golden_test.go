// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestWhatIsWrittenIsWhatIsAnswered runs testdata/*/*.txt. A file begins with its reason, then comes the command with
// the settings before it, then the files that it finds, then what it has to say and its exit code:
//
//	# a name that no rule has
//	$ TLSNAT_MAP_FILE=edge.natmap tlsnat explain --port 443 --sni x.example
//	-- edge.natmap --
//	:443 a.example -> 10.0.0.1:80
//	-- stdout --
//	…
//	-- stderr --
//	-- exit 0 --
//
// The directory certs/ is there in each, with certificates as their file names say. To add a case add a file with the
// first lines; go test -run TestWhatIsWritten -update writes the rest.
func TestWhatIsWrittenIsWhatIsAnswered(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			given, want := cutCase(t, string(text))
			r := runCase(t, given)
			got := fmt.Sprintf("-- stdout --\n%s-- stderr --\n%s-- exit %d --\n", r.out, r.err, r.code)
			if *update {
				if err := os.WriteFile(file, []byte(given+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != want {
				t.Errorf("%s\nwants:\n%s\ngot:\n%s", given, want, got)
			}
		})
	}
}

// cutCase splits a case into what is given and what is wanted.
func cutCase(t *testing.T, text string) (given, want string) {
	t.Helper()
	given, want, _ = strings.Cut(text, "-- stdout --\n")
	if !strings.HasPrefix(given, "# ") {
		t.Fatal("the first line is not its reason")
	}
	return given, "-- stdout --\n" + want
}

var (
	caseFile = regexp.MustCompile(`(?m)^-- (.+) --\n`)
	// What depends on the day of the test.
	until   = regexp.MustCompile(`until \d{4}-\d\d-\d\d \(89 days\)`)
	expired = regexp.MustCompile(`expired (on )?\d{4}-\d\d-\d\d( \d\d:\d\d UTC)?`)
	// What depends on who runs the test.
	uid = regexp.MustCompile(`\(uid \d+\)`)
)

func runCase(t *testing.T, given string) result {
	t.Helper()
	dir := caseDir(t)
	head, rest := given, ""
	if i := caseFile.FindStringIndex(given); i != nil {
		head, rest = given[:i[0]], given[i[0]:]
	}
	names, texts := caseFile.FindAllStringSubmatch(rest, -1), caseFile.Split(rest, -1)
	for i, name := range names {
		write(t, dir, map[string][]byte{name[1]: []byte(texts[i+1])})
	}
	_, line, ok := strings.Cut(head, "\n$ ")
	environ, args, ok2 := strings.Cut(strings.TrimSpace(line), "tlsnat")
	if !ok || !ok2 {
		t.Fatal("there is no line '$ [SETTINGS] tlsnat ARGUMENTS'")
	}
	r := finish(t, command(t, dir, append([]string{"TLSNAT_ADMIN=off"}, strings.Fields(environ)...), strings.Fields(args)...))
	tidy := func(s string) string {
		s = expired.ReplaceAllString(until.ReplaceAllString(s, "until DATE (89 days)"), "expired ${1}DATE")
		return uid.ReplaceAllString(s, "(uid UID)")
	}
	r.out, r.err = tidy(r.out), tidy(r.err)
	return r
}

// caseDir is a directory with certificates.
func caseDir(t *testing.T) string {
	t.Helper()
	const day = 24 * time.Hour
	good := issue(t, -day, 90*day, "api.bank.example", "www.bank.example")
	wild := issue(t, -day, 90*day, "*.wild.example")
	old := issue(t, -90*day, -day, "old.bank.example")
	other := issue(t, -day, 90*day, "other.example")
	return write(t, t.TempDir(), map[string][]byte{
		"certs/good/api.crt": good.cert, "certs/good/api.key": good.key,
		"certs/good/wild.crt": wild.cert, "certs/good/wild.key": wild.key,
		"certs/expired/old.crt": old.cert, "certs/expired/old.key": old.key,
		"certs/nokey/api.crt":        good.cert,
		"certs/otherkey/api.crt":     good.cert,
		"certs/otherkey/api.key":     other.key,
		"certs/garbage/api.pem":      []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
		"certs/one/api.crt":          good.cert,
		"certs/one/api.key":          good.key,
		"certs/nothing/README":       []byte("certificates come here"),
		"cas/corp.pem":               good.cert, // signed by itself
		"cas/keyed.pem":              append(append([]byte(nil), old.cert...), old.key...),
		"certs/afile":                []byte("not a directory"),
		"certs/openkey/api-open.crt": good.cert,
		"certs/openkey/api-open.pem": good.key, // mode 0644, which a key must not have
	})
}
