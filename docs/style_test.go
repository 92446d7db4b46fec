// SPDX-License-Identifier: Apache-2.0

package docs_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/docs"
)

// The house style: sizes, sentences, words and links of everything that is written for readers.

const (
	top        = ".."
	pageSize   = 12 << 10 // what one reads in ten minutes
	readmeSize = 8 << 10  // what one reads before one decides
	longest    = 18       // words of a sentence, on average over a page
)

// sourceDirs are directories whose Go comments and messages keep to the words below. A directory joins when its texts do.
var sourceDirs = []string{"docs", "cmd/tlsnat/help.go"}

// words are expressions that are private, or have to be read twice, each with what to write instead.
var words = map[string]string{
	`entrance|gatehouse|errands?`:        "access, task",
	`leads? nowhere`:                     "has never resolved",
	`as many again`:                      "the same number",
	`so many of (?:them|those)`:          "n",
	`of whom`:                            "a sentence of its own",
	`in vain`:                            "without success, failed",
	`under way`:                          "in progress",
	`is shed|are shed|was shed`:          "is dropped",
	`whoever`:                            "a client that, anybody who",
	`ended last`:                         "recently ended",
	`at once that`:                       "a condition first, then the consequence",
	`those (?:that|who|which)`:           "a noun",
	`puts? off|putting off`:              "defers",
	`goes with it|went with it`:          "a verb that says what happens",
	`half of them, 99`:                   "p50, p99",
	`behind (?:it|them|that)`:            "after",
	`for so long|for as long|so long as`: "for this time, while",
	`the former|the latter`:              "the noun",
	`(?:asks?|asked) whether it is fit`:  "health check",
}

var forbidden = func() *regexp.Regexp {
	var all []string
	for w := range words {
		all = append(all, w)
	}
	slices.Sort(all)
	return regexp.MustCompile(`(?i)\b(?:` + strings.Join(all, "|") + `)\b`)
}()

// instead is what to write for a forbidden expression.
func instead(found string) string {
	for w, better := range words {
		if regexp.MustCompile(`(?i)^(?:` + w + `)$`).MatchString(found) {
			return better
		}
	}
	return ""
}

// pages are the documents, from the top of the repository. Reports to other projects keep to these projects' style.
func pages(t *testing.T) []string {
	t.Helper()
	all := []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"}
	err := filepath.WalkDir(top+"/docs", func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".md") && !strings.Contains(path, "/upstream/") {
			all = append(all, strings.TrimPrefix(path, top+"/"))
		}
		return err
	})
	if err != nil || len(all) < 20 {
		t.Fatal(len(all), err)
	}
	return all
}

func text(t *testing.T, page string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, page))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	fence      = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	made       = regexp.MustCompile(`(?s)<!-- figures.*?<!-- end of figures -->`)
	inCode     = regexp.MustCompile("`[^`]*`")
	target     = regexp.MustCompile(`\]\([^)]*\)`)
	marks      = regexp.MustCompile(`^(?:[-*] |\d+\. |#+ )`)
	twoAtATime = regexp.MustCompile(`[.!?][)*]* +[A-Z\x60*\[]`)
	tests      = regexp.MustCompile(`\bTest[A-Z]\w+`)
)

// prose are the lines of a text that are neither code nor made by a program, with code as one word. Their numbers stay.
func prose(text string) []string {
	blank := func(s string) string { return strings.Repeat("\n", strings.Count(s, "\n")) }
	text = made.ReplaceAllStringFunc(fence.ReplaceAllStringFunc(text, blank), blank)
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = target.ReplaceAllString(inCode.ReplaceAllString(strings.TrimSpace(line), "`x`"), "]")
	}
	return lines
}

func TestPagesAreShort(t *testing.T) {
	for _, page := range pages(t) {
		most := pageSize
		if page == "README.md" {
			most = readmeSize
		}
		if n := len(text(t, page)); n > most {
			t.Errorf("%s has %d bytes; write at most %d, or make two pages of it", page, n, most)
		}
	}
}

// sentences are those of the prose of a page, and the cells of its tables.
func sentences(page string) (all []string) {
	for _, line := range prose(page) {
		switch {
		case strings.HasPrefix(line, "|---"), strings.HasPrefix(line, "<!--"), strings.HasPrefix(line, "#"), line == "":
		case strings.HasPrefix(line, "|"):
			for _, cell := range docs.Cells(line) {
				all = append(all, strings.FieldsFunc(cell, func(r rune) bool { return r == ';' || r == ':' })...)
			}
		default:
			all = append(all, marks.ReplaceAllString(line, ""))
		}
	}
	return all
}

// cellWords is the least length of a cell that counts as a sentence; below it is a value.
const cellWords = 4

func TestSentencesAreShort(t *testing.T) {
	for _, page := range pages(t) {
		count, sum := 0, 0
		for _, s := range sentences(text(t, page)) {
			if n := len(strings.Fields(s)); n >= cellWords {
				count, sum = count+1, sum+n
			}
		}
		if count > 0 && sum > count*longest {
			t.Errorf("%s: a sentence has %d words on average; write at most %d", page, sum/count, longest)
		}
	}
}

func TestOneSentenceALine(t *testing.T) {
	for _, page := range pages(t) {
		for i, line := range prose(text(t, page)) {
			if !strings.HasPrefix(line, "|") && twoAtATime.MatchString(marks.ReplaceAllString(line, "")) {
				t.Errorf("%s:%d: two sentences on a line: %s", page, i+1, line)
			}
		}
	}
}

func TestWordsAreThoseOfTheField(t *testing.T) {
	for _, page := range pages(t) {
		for i, line := range prose(text(t, page)) {
			for _, w := range forbidden.FindAllString(tests.ReplaceAllString(line, ""), -1) {
				t.Errorf("%s:%d: %q; write: %s", page, i+1, w, instead(w))
			}
		}
	}
	for _, dir := range sourceDirs {
		err := filepath.WalkDir(filepath.Join(top, dir), func(path string, e fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "style_test.go") {
				return err
			}
			source, err := os.ReadFile(path)
			for i, line := range strings.Split(string(source), "\n") {
				for _, w := range forbidden.FindAllString(line, -1) {
					t.Errorf("%s:%d: %q; write: %s", path, i+1, w, instead(w))
				}
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	unslug  = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors are those that GitHub makes of the headings.
func anchors(page string) (all []string) {
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		all = append(all, strings.ReplaceAll(unslug.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return all
}

func TestLinksLeadSomewhere(t *testing.T) {
	for _, page := range append(pages(t), "bench/README.md") {
		for _, m := range link.FindAllStringSubmatch(inCode.ReplaceAllString(fence.ReplaceAllString(text(t, page), ""), ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			at := page
			if file != "" {
				at = filepath.Join(filepath.Dir(page), file)
			}
			if _, err := os.Stat(filepath.Join(top, at)); err != nil {
				t.Errorf("%s: %v", page, err)
			} else if anchor != "" && !slices.Contains(anchors(text(t, at)), anchor) {
				t.Errorf("%s: %s has no heading %q", page, at, anchor)
			}
		}
	}
}

// TestEveryPageIsReached: each page has a link from another one.
func TestEveryPageIsReached(t *testing.T) {
	reached := map[string]bool{"README.md": true}
	for _, page := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(text(t, page), -1) {
			file, _, _ := strings.Cut(m[1], "#")
			if at := filepath.Join(filepath.Dir(page), file); at != page {
				reached[at] = true
			}
		}
	}
	for _, page := range pages(t) {
		if !reached[page] {
			t.Errorf("no page has a link to %s", page)
		}
	}
}

// TestStyleCanFail holds the checks against texts that are wrong.
func TestStyleCanFail(t *testing.T) {
	if !twoAtATime.MatchString("One ends. Another begins.") || twoAtATime.MatchString("Version 1.2 is old, e.g. here.") {
		t.Error("sentences are not told apart")
	}
	if w := forbidden.FindString("It was tried in vain."); instead(w) == "" {
		t.Error("a forbidden word is not found")
	}
	if !slices.Equal(anchors("# Who may give orders?\n## A `b` c"), []string{"who-may-give-orders", "a-b-c"}) {
		t.Errorf("%q", anchors("# Who may give orders?\n## A `b` c"))
	}
	if got := sentences("Hello `a b` there.\n\n| a | one two three four; five |\n"); len(got) != 4 {
		t.Errorf("%q", got)
	}
}

func TestRowsAreFound(t *testing.T) {
	for word, topic := range map[string]string{"idle": "options", "TLSNAT_MAP": "settings", "ok": "log", "tlsnat_connections_open": "metrics"} {
		if !slices.ContainsFunc(docs.Rows(word), func(r docs.Row) bool { return r.Topic == topic && len(r.Cells) == len(r.Names) }) {
			t.Errorf("%s: no row of %s in %+v", word, topic, docs.Rows(word))
		}
	}
	for _, topic := range docs.Topics() {
		if page, ok := docs.Page(topic.Name); !ok || !strings.HasPrefix(page, "# "+topic.Title) {
			t.Errorf("%s: %.40q", topic.Name, page)
		}
	}
	if _, ok := docs.Page("weather"); ok || docs.Rows("weather") != nil {
		t.Error("a topic that is not there is found")
	}
}
