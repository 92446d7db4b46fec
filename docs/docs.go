// SPDX-License-Identifier: Apache-2.0

// Package docs holds the documents of this directory, so that the command can print them.
//
//	text, ok := docs.Page("backends")
//
// A page is found by the name of its file. What is about one word, such as an option or an outcome, is a row of a table:
//
//	rows := docs.Rows("connect_failed")
package docs

import (
	"embed"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
)

//go:embed glossary.md troubleshoot.md guide reference
var files embed.FS

// A Topic is a page.
type Topic struct {
	Name  string // "backends"
	Title string // its first heading
	file  string
}

// Topics are all pages: the guide, the reference, then the others, each in the order of names.
func Topics() (all []Topic) {
	for _, pattern := range []string{"guide/*.md", "reference/*.md", "*.md"} {
		names, err := fs.Glob(files, pattern)
		if err != nil {
			panic(err) // the patterns are constants
		}
		for _, name := range names {
			title, _, _ := strings.Cut(read(name), "\n")
			all = append(all, Topic{strings.TrimSuffix(path.Base(name), ".md"), strings.TrimPrefix(title, "# "), name})
		}
	}
	return all
}

func read(name string) string {
	text, err := files.ReadFile(name)
	if err != nil {
		panic(err) // what is embedded can be read
	}
	return string(text)
}

// mark is a comment between which a table is generated.
var mark = regexp.MustCompile(`(?m)^<!--.*-->\n`)

// Page is the text of a topic.
func Page(topic string) (text string, ok bool) {
	for _, t := range Topics() {
		if t.Name == topic {
			return mark.ReplaceAllString(read(t.file), ""), true
		}
	}
	return "", false
}

// A Row is a row of a table that is about a word.
type Row struct {
	Topic string
	Names []string // of the columns
	Cells []string
}

// code is a word in code type, as it begins a row: `idle=DURATION`, `TLSNAT_MAP`.
var code = regexp.MustCompile("`([\\w-]+)[^`]*`")

// Rows are the rows of all tables whose first cell names the word: an option, a setting, an outcome, a metric.
func Rows(word string) (rows []Row) {
	for _, t := range Topics() {
		var head []string
		for line := range strings.SplitSeq(read(t.file), "\n") {
			cells := Cells(line)
			switch {
			case strings.HasPrefix(line, "|---"): // between the head and the rows
			case cells == nil:
				head = nil
			case head == nil:
				head = cells
			case named(cells[0], word):
				rows = append(rows, Row{t.Name, head, cells})
			}
		}
	}
	return rows
}

func named(cell, word string) bool {
	return slices.ContainsFunc(code.FindAllStringSubmatch(cell, -1), func(m []string) bool { return m[1] == word })
}

// Cells are those of a row of a table, or nil. A bar in a cell is written \|.
func Cells(line string) []string {
	if !strings.HasPrefix(line, "| ") || !strings.HasSuffix(line, "|") {
		return nil
	}
	const bar = "\x00"
	cells := strings.Split(strings.Trim(strings.ReplaceAll(line, `\|`, bar), "|"), "|")
	for i, c := range cells {
		cells[i] = strings.ReplaceAll(strings.TrimSpace(c), bar, "|")
	}
	return cells
}
