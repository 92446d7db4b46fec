// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

// TestEverySecretMayBeInAFile: it has NAME_FILE, and a credential of systemd.
func TestEverySecretMayBeInAFile(t *testing.T) {
	dir := t.TempDir()
	for f := range fields() {
		if f.Tag.Get("secret") == "" {
			continue
		}
		name := f.Tag.Get("env")
		if err := os.WriteFile(filepath.Join(dir, strings.ReplaceAll(strings.ToLower(name), "_", "-")), []byte("s3cret\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, strings.ReplaceAll(strings.ToLower(name), "_", "-"))
		for _, kv := range []string{Prefix + name + "=s3cret", Prefix + name + "_FILE=" + file, "CREDENTIALS_DIRECTORY=" + dir} {
			s, err := ReadSettings([]string{kv})
			if got := reflect.ValueOf(s).FieldByName(f.Name).String(); got != "s3cret" || err != nil {
				t.Errorf("%s: %q, %v", kv, got, err)
			}
		}
		if _, err := ReadSettings([]string{Prefix + name + "=a", Prefix + name + "_FILE=" + file}); err == nil || !strings.Contains(err.Error(), "set one of the two") {
			t.Errorf("both: %v", err)
		}
	}
}

// TestSecretFilesThatAreNone are complaints, without a word of what is in them; none of them is waited for.
func TestSecretFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"empty": "", "lines": "s3cret\nmore", "blank": "\n", "long": strings.Repeat("s3cret", 1000)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"empty", "lines", "blank", "long", "fifo", ".", "missing"} {
		s, err := ReadSettings([]string{"TLSNAT_ADMIN_TOKEN_FILE=" + filepath.Join(dir, name), "TLSNAT_ADMIN=0.0.0.0:9180"})
		if err == nil || !strings.Contains(err.Error(), "TLSNAT_ADMIN_TOKEN_FILE="+filepath.Join(dir, name)) || strings.Contains(err.Error(), "s3cret") || s.AdminToken != "" {
			t.Errorf("%s: %q, %v", name, s.AdminToken, err)
		}
	}
}

func TestSocketNamesTellGatewaysApart(t *testing.T) {
	for admin, want := range map[string]string{
		"127.0.0.1:9180": "admin.sock", "0.0.0.0:9180": "admin.sock", "[::]:9180": "admin.sock", "127.0.0.1:9181": "admin-9181.sock",
		"127.0.0.2:9180": "admin-127.0.0.2.sock", "[::1]:9181": "admin-::1-9181.sock", "off": "admin.sock",
	} {
		if got := socketName(admin); got != want {
			t.Errorf("%s: %s, want %s", admin, got, want)
		}
	}
}
