// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSizes: what operators write.
func TestSizes(t *testing.T) {
	for text, want := range map[string]Size{"512MB": 512 << 20, "4gb": 4 << 30, "16384KB": 16 << 20, "1 TB": 1 << 40, "7B": 7, "0MB": 0} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%s is %d, %v; want %d", text, s, err, want)
		}
		var again Size
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Errorf("%s is written as %s, which is %d, %v", text, s, again, err)
		}
	}
	for _, text := range []string{"", "512", "MB", "-1MB", "1.5GB", "9999999999TB", "1XB", "9223372036854775807GB"} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken for %d", text, s)
		}
	}
	for _, value := range []string{"512", "1MB", "-5MB"} {
		if _, err := ReadSettings([]string{Prefix + "MEMORY=" + value}); err == nil {
			t.Errorf("MEMORY=%s is taken", value)
		}
	}
}

// TestDefaultMemory is half of the least that a cgroup, of either version and at any level, or the machine has.
func TestDefaultMemory(t *testing.T) {
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err != nil {
		t.Fatal(err)
	}
	all := Size(machine.Totalram) * Size(machine.Unit)
	for name, c := range map[string]struct {
		files map[string]string
		want  Size
	}{
		"nothing":             {nil, all / 2},
		"version 2":           {map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "268435456\n"}, 128 << 20},
		"above it":            {map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "134217728\n"}, 64 << 20},
		"no limit":            {map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, all / 2},
		"version 1":           {map[string]string{"proc/self/cgroup": "5:cpu:/x\n4:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "268435456\n"}, 128 << 20},
		"version 1, no limit": {map[string]string{"proc/self/cgroup": "4:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, all / 2},
		"of the container":    {map[string]string{"proc/self/cgroup": "4:memory:/docker/f00\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n"}, 128 << 20},
		"little":              {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, leastMemory},
	} {
		root := t.TempDir()
		for path, text := range c.files {
			_ = os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755)
			if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := defaultMemory(root); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
