// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestWhatDidNotChangeIsNotReadAgain: a list and the sets that were made of it are taken over while the file is what it
// was, or has the content that it had.
func TestWhatDidNotChangeIsNotReadAgain(t *testing.T) {
	dir := t.TempDir()
	list, edge := filepath.Join(dir, "block.txt"), filepath.Join(dir, "edge.natmap")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const rule = ":9443 -> 127.0.0.1:1 mode=tcp deny=@block.txt\n"
	write(list, "192.0.2.0/24\n2001:db8::/32\n")
	write(edge, rule)
	s, err := ReadSettings([]string{"TLSNAT_MAP_FILE=" + edge, "TLSNAT_ADMIN=off"})
	if err != nil {
		t.Fatal(err)
	}
	read := func(before *Config) *Config {
		t.Helper()
		c, problems := Reread(s, before)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return c
	}
	same := func(a, b *Config) bool {
		return a.Gate(a.Map.Rules[len(a.Map.Rules)-1]) == b.Gate(b.Map.Rules[len(b.Map.Rules)-1]) && a.lists.files[list].list == b.lists.files[list].list
	}
	one := read(nil)
	two := read(one)
	if !same(one, two) {
		t.Error("a list that was written a moment ago is parsed again, though its content is the same")
	}
	write(list, "192.0.2.0/24\n2001:db8::/32\n")
	write(edge, "# a line more\n"+rule)
	three := read(two)
	if !same(two, three) {
		t.Error("a list that was written again with the same content is parsed again")
	}
	write(list, "192.0.2.0/25\n2001:db8::/32\n")
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(list, old, old); err != nil {
		t.Fatal(err)
	}
	if four := read(three); same(three, four) || four.Gate(four.Map.Rules[0]).Len() != 2 {
		t.Error("a list with another content is not read")
	}
}
