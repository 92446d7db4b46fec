// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
)

var update = flag.Bool("update", false, "write the examples of the API and the table of metrics")

// apiPage is the reference of the API.
const apiPage = "../../docs/reference/api.md"

// example is a request in the reference and what is answered: a question over TCP, or an order by the socket.
var example = regexp.MustCompile("(?m)^\\$ curl (?:--unix-socket /run/tlsnat/admin\\.sock (-X POST) )?'?http://(?:127\\.0\\.0\\.1:9180|localhost)/api/v1/([a-z/]*)(\\?[^\\s']*)?'?\n((?:[^$`].*\n)+)")

// shown is a gateway that has something of everything to show.
func shown(t *testing.T) *bed {
	file := t.TempDir() + "/edge.natmap"
	backend := echoServer(t)
	write := func(b *bed, options string) {
		text := fmt.Sprintf("%[1]s localhost -> demo\n%[2]s -> %[3]s mode=tcp check=tcp every=1s %[4]s\n", b.tls, b.plain, backend, options)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b := startFrom(t, file, func(b *bed) { write(b, "") })
	_ = b.shake(t, nil).Close()
	if _, err := b.hello(t, "unknown.test", nil); err == nil {
		t.Fatal("unknown.test shook hands")
	}
	b.shake(t, nil)
	b.await(t, "two to be over", func(s *gateway.Status) bool { return ended(&s.Connections) == 2 })
	write(b, "conns=5000")
	if r := b.gateway.Reload(); !r.OK {
		t.Fatal(r.Problems)
	}
	b.echo(t, 1000)
	b.shake(t, nil)
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		infos, _ := b.gateway.Backends(1)
		if len(infos[0].Checks) == 1 && !infos[0].Checks[0].At.IsZero() {
			return b
		}
		if time.Now().After(deadline) {
			t.Fatalf("no check: %+v", infos)
		}
	}
}

// TestReferenceShowsWhatTheAPIAnswers: every example is asked for, and has the same names as the answer, which are those of the
// types; every endpoint has an example.
func TestReferenceShowsWhatTheAPIAnswers(t *testing.T) {
	text, err := os.ReadFile(apiPage)
	if err != nil {
		t.Fatal(err)
	}
	b := shown(t)
	infos, _ := b.gateway.Backends(1)
	backend := infos[0].Address
	examples := example.FindAllStringSubmatch(string(text), -1)
	written := string(text)
	there := map[string]bool{}
	for _, x := range examples {
		method, path, query, sample := "GET", x[2], strings.ReplaceAll(x[3], "10.0.0.11:8080", backend), x[4]
		if x[1] != "" {
			method = "POST"
		}
		there[method+" /api/v1/"+path] = true
		if answers[path] == nil {
			t.Errorf("%s %s: nothing is known of such an answer", method, path)
			continue
		}
		_, real := b.ask(t, method, "/api/v1/"+path+query, b.trusted(t))
		if *update {
			head, _, _ := strings.Cut(x[0], "\n")
			written = strings.Replace(written, x[0], head+"\n"+b.tidy(t, answers[path](), real, backend), 1)
			continue
		}
		if err := strictly(sample, answers[path]()); err != nil {
			t.Errorf("%s %s: the reference: %v", method, path, err)
		}
		if err := strictly(real, answers[path]()); err != nil {
			t.Errorf("%s %s: %v", method, path, err)
		}
		promised, got := shape(sample), shape(real)
		for name := range promised {
			if _, there := got[name]; !there {
				t.Errorf("%s %s: %s is in the reference and not in %s", method, path, name, real)
			}
		}
		for name, always := range got {
			if _, there := promised[name]; always && !there {
				t.Errorf("%s %s: %s is not in the reference", method, path, name)
			}
		}
	}
	if *update {
		if err := os.WriteFile(apiPage, []byte(written), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, e := range get[admin.IndexAnswer](t, b, "").Endpoints {
		if !there[e.Method+" "+e.Path] {
			t.Errorf("no example of %s %s", e.Method, e.Path)
		}
	}
}

// tidy makes an example of an answer: a list has one element, addresses and times are those of the other examples.
func (b *bed) tidy(t *testing.T, into any, answer, backend string) string {
	t.Helper()
	if err := json.Unmarshal([]byte(answer), into); err != nil {
		t.Fatal(err)
	}
	shorten(reflect.ValueOf(into).Elem())
	var text strings.Builder
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(into); err != nil {
		t.Fatal(err)
	}
	s := text.String()
	for _, r := range [][2]string{
		{`"\d{4}-\d\d-\d\dT[^"]*"`, `"2026-03-01T09:30:00Z"`}, {regexp.QuoteMeta(backend), "10.0.0.11:8080"}, {regexp.QuoteMeta(b.tls), ":443"},
		{regexp.QuoteMeta(b.plain), ":5432"}, {`127\.0\.0\.1:\d{4,5}`, "192.0.2.7:51124"}, {`/tmp[^"]*/edge\.natmap`, "/etc/tlsnat/edge.natmap"},
		{`/tmp[^"]*/([^/"]*)"`, `/var/lib/tlsnat/$1"`}, {`"v0\.0\.0-test"`, `"v1.0.0"`}, {`\blocalhost\b`, "www.example.com"},
	} {
		s = regexp.MustCompile(r[0]).ReplaceAllString(s, r[1])
	}
	return onOneLine(s)
}

// shorten leaves one element of each list, and a few of what is counted by a word.
func shorten(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			shorten(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				shorten(v.Field(i))
			}
		}
	case reflect.Slice:
		if v.Len() > 1 && v.Index(0).Kind() == reflect.Struct {
			v.SetLen(1)
		}
		for i := range v.Len() {
			shorten(v.Index(i))
		}
	case reflect.Map:
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { // what there is comes first
			return cmp.Or(cmp.Compare(fmt.Sprint(v.MapIndex(b)), fmt.Sprint(v.MapIndex(a))), strings.Compare(a.String(), b.String()))
		})
		const enough = 3
		for _, key := range keys[min(enough, len(keys)):] {
			v.SetMapIndex(key, reflect.Value{})
		}
	}
}

var (
	plainInside = regexp.MustCompile(`[\[{]\n[^\[\]{}]*[\]}]`)
	lineBreak   = regexp.MustCompile(`\n\s*`)
)

// onOneLine writes what has nothing in it but plain values on one line.
func onOneLine(s string) string {
	return plainInside.ReplaceAllStringFunc(s, func(m string) string {
		m = lineBreak.ReplaceAllString(m, " ")
		return m[:1] + m[2:len(m)-2] + m[len(m)-1:]
	})
}

// TestMetricsAreExplained: docs/reference/metrics.md is what the metrics say of themselves.
func TestMetricsAreExplained(t *testing.T) {
	b := shown(t)
	response, text := b.ask(t, http.MethodGet, "/metrics", nil)
	if response.StatusCode != http.StatusOK {
		t.Fatal(response.Status)
	}
	want := metricTable(text)
	file := filepath.Join(docs, "reference", "metrics.md")
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != want {
		t.Errorf("go test ./gateway/admin -run TestMetricsAreExplained -update (%v)", err)
	}
}

// metricTable has a row for each of our metrics, with the labels of its first line.
func metricTable(text string) string {
	table := "# Metrics\n\nThe admin serves them at `/metrics`, beside those of the Go runtime (`go_`) and of the process (`process_`).\n" +
		"Labels have closed lists of values, or bounds that the text names.\nNothing that a client says becomes a label.\n" +
		"Histograms are native ones, with a few classic buckets.\n[alerts.yml](../alerts.yml) and [prometheus.yml](../prometheus.yml) use them.\n\n| metric | type | labels | is |\n|---|---|---|---|\n"
	for _, m := range regexp.MustCompile(`(?m)^# HELP (tlsnat_\w+) (.*)\n# TYPE \w+ (\w+)\n\w+(?:\{(.*)\})? `).FindAllStringSubmatch(text, -1) {
		var labels []string
		for _, l := range regexp.MustCompile(`(\w+)="(?:[^"\\]|\\.)*"`).FindAllStringSubmatch(m[4], -1) {
			if l[1] != "le" {
				labels = append(labels, "`"+l[1]+"`")
			}
		}
		table += fmt.Sprintf("| `%s` | %s | %s | %s |\n", m[1], m[3], strings.Join(labels, ", "), strings.ReplaceAll(m[2], "|", `\|`))
	}
	return table
}
