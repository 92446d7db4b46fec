// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/natmap"
)

// Pages of the documents that are compared with what the program does.
const (
	optionPage  = "docs/reference/options.md"
	settingPage = "docs/reference/settings.md"
	commandPage = "docs/reference/commands.md"
	apiPage     = "docs/reference/api.md"
	logPage     = "docs/reference/log.md"
	troublePage = "docs/troubleshoot.md"
)

// topics are the tables of options, each with its options.
var topics = map[string]string{
	"rules": "mode proxy idle connect linger lifetime drain min-tls alpn cert ktls truncation https-port",
	"pool": "backend-ca backend-name backend-cert backend-verify balance max-conns queue retries eject check every rise fall slow-start on-down " +
		"resolve-to",
	"sockets":   "source keepalive user-timeout dscp mptcp fastopen",
	"access":    "allow deny conns-per-ip rate-per-ip conns handshakes bandwidth",
	"protocols": "starttls forward-tlvs log-tlvs",
}

// TestReferenceIsCurrent compares the generated parts of the reference with what they are made from.
func TestReferenceIsCurrent(t *testing.T) {
	parts := map[string]map[string]string{
		settingPage: {"settings": settingTable()},
		commandPage: {"usage": "```text\n" + usage + "```\n"},
		optionPage:  {},
	}
	placed := map[string]bool{}
	for topic, keys := range topics {
		parts[optionPage]["options "+topic] = optionTable(strings.Fields(keys))
		for _, key := range strings.Fields(keys) {
			placed[key] = true
		}
	}
	for _, o := range natmap.OptionDocs() {
		if !placed[o.Key] {
			t.Errorf("%s= is in no topic", o.Key)
		}
	}
	for page, tables := range parts {
		text := document(t, page)
		want := text
		for name, table := range tables {
			want = fill(t, want, name, table)
		}
		switch {
		case text == want:
		case *update:
			if err := os.WriteFile(filepath.Join(root, page), []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("%s is old: go test ./cmd/tlsnat -run Reference -update", page)
		}
	}
}

// fill puts a table between its marks.
func fill(t *testing.T, text, name, table string) string {
	t.Helper()
	word, _, _ := strings.Cut(name, " ")
	between := regexp.MustCompile("(?s)(<!-- " + name + ": [^\n]* -->\n).*?(<!-- end of " + word + " -->)")
	if !between.MatchString(text) {
		t.Fatalf("no place for the %s", name)
	}
	return between.ReplaceAllString(text, "${1}"+strings.ReplaceAll(table, "$", "$$")+"${2}")
}

// defaultSaid is a default in the help of an option, which has a column of its own here.
var defaultSaid = regexp.MustCompile(` \(default:? [^;)]*\)`)

func optionTable(keys []string) string {
	var b strings.Builder
	b.WriteString("| option | default | rules | meaning |\n|---|---|---|---|\n")
	for _, o := range natmap.OptionDocs() {
		if !slices.Contains(keys, o.Key) {
			continue
		}
		value := o.Default
		if o.Setting != "" {
			value = "`" + config.Prefix + o.Setting + "`"
		}
		fmt.Fprintf(&b, "| `%s=%s` | %s | %s | %s |\n", o.Key, bars(o.Value), value, o.Rules, bars(defaultSaid.ReplaceAllString(o.Help, "")))
	}
	return b.String()
}

// bars writes text for a cell of a table.
func bars(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

func settingTable() string {
	var b strings.Builder
	b.WriteString("| variable | type | default | meaning |\n|---|---|---|---|\n")
	for _, d := range config.SettingDocs() {
		value := ""
		if d.Default != "" {
			value = "`" + d.Default + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", d.Name, d.Type, value, bars(d.Doc))
	}
	return b.String()
}

// TestReferenceHasALineAsItIsLogged holds the sample line against a real one: the same fields in the same order, each of
// them explained.
func TestReferenceHasALineAsItIsLogged(t *testing.T) {
	r := runGateway(t)
	c := r.dial(t)
	echo(t, c, "x")
	c.Close()
	sample, line := blocks(t, logPage, "json")[0], r.err.await(t, `"msg":"connection"`)
	got, want := keys(t, sample), keys(t, line)
	if !slices.Equal(got, want) {
		t.Errorf("the sample has %q, a line %q", got, want)
	}
	explained := firstColumn(t, logPage, "field")
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

// TestDocumentsExplainEveryWordOfTheLog compares the tables with the closed lists of the gateway.
func TestDocumentsExplainEveryWordOfTheLog(t *testing.T) {
	var outcomes []string
	for o := gateway.OK; o <= gateway.Internal; o++ {
		outcomes = append(outcomes, o.String())
	}
	for _, page := range []string{logPage, troublePage} {
		if got := firstColumn(t, page, "outcome"); !slices.Equal(got, outcomes) {
			t.Errorf("%s has %q, the gateway %q", page, got, outcomes)
		}
	}
	c, _ := config.Read(config.Settings{Map: ":1 -> demo", Admin: "off", State: t.TempDir(), Loops: 1, Handshakes: 1})
	if c == nil {
		t.Fatal("no configuration")
	}
	g, err := gateway.New(c, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	s := g.Status()
	for heading, want := range map[string]map[string]uint64{"refused": s.Gate.Refused, "reason": s.Kernel.Fallbacks} {
		got := firstColumn(t, troublePage, heading)
		slices.Sort(got)
		if all := slices.Sorted(maps.Keys(want)); !slices.Equal(got, all) {
			t.Errorf("%s: the page has %q, the gateway %q", heading, got, all)
		}
	}
}

// TestTroubleshootNamesAlertsAsTLSDoes: an operator looks an alert up by the name or the number that a client prints.
func TestTroubleshootNamesAlertsAsTLSDoes(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\(([0-9]+)\\) \\| ([^|]+) \\|").FindAllStringSubmatch(document(t, troublePage), -1)
	if len(rows) < 6 {
		t.Fatalf("the table of alerts has %d rows", len(rows))
	}
	for _, row := range rows {
		number, err := strconv.ParseUint(row[2], 10, 8)
		if err != nil {
			t.Error(err)
			continue
		}
		real := strings.ReplaceAll(strings.TrimPrefix(tls.AlertError(number).Error(), "tls: "), " ", "_")
		if !strings.HasPrefix(real, row[1]) { // "protocol version not supported" is protocol_version
			t.Errorf("alert %d is %s, and not %s", number, real, row[1])
		}
		for word := range strings.SplitSeq(row[3], ", ") {
			if !isOutcome(strings.Trim(word, "`")) {
				t.Errorf("%s: there is no outcome %s", row[1], word)
			}
		}
	}
}

func isOutcome(word string) bool {
	for o := gateway.OK; o <= gateway.Internal; o++ {
		if o.String() == word {
			return true
		}
	}
	return false
}

// firstColumn are the words in code type of the first column of the table with that heading.
func firstColumn(t *testing.T, page, heading string) (all []string) {
	t.Helper()
	_, rows, ok := strings.Cut(document(t, page), "\n| "+heading+" |")
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
