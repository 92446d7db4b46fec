// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// leastMemory serves a loop or two.
const leastMemory Size = 16 << 20

// Size is a number of bytes, as operators write it: 512MB.
type Size int64

var sizeUnits = []struct {
	name  string
	bytes Size
}{{"TB", 1 << 40}, {"GB", 1 << 30}, {"MB", 1 << 20}, {"KB", 1 << 10}, {"B", 1}}

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(text []byte) error {
	for _, u := range sizeUnits {
		number, found := strings.CutSuffix(strings.ToUpper(string(text)), u.name)
		if !found {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
		if err != nil || n < 0 || n > 1<<50/int64(u.bytes) {
			break
		}
		*s = Size(n) * u.bytes
		return nil
	}
	return errors.New("not a size")
}

func (s Size) String() string {
	for _, u := range sizeUnits {
		if s%u.bytes == 0 && s != 0 {
			return strconv.FormatInt(int64(s/u.bytes), 10) + u.name
		}
	}
	return "0B"
}

// defaultMemory is half of what the process may use, or of what the machine has.
func defaultMemory(root string) Size {
	all := cgroupMemory(root)
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err == nil {
		all = min(all, Size(machine.Totalram)*Size(machine.Unit))
	}
	return max(all/2, leastMemory)
}

// noLimit is more than any machine has; cgroups say something like it where there is none.
const noLimit Size = 1 << 50

// cgroupMemory is the least that the process's cgroups allow, of version 2 and 1. In a container its own cgroup may be at
// the root, whatever /proc says.
func cgroupMemory(root string) Size {
	least := noLimit
	groups, _ := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	for line := range strings.Lines(string(groups)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) < 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max"
		switch {
		case parts[0] == "0" && parts[1] == "":
		case strings.Contains(","+parts[1]+",", ",memory,"):
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		for dir := filepath.Clean("/" + parts[2]); ; dir = filepath.Dir(dir) {
			least = min(least, limitIn(filepath.Join(root, base, dir, file)))
			if dir == "/" {
				break
			}
		}
	}
	return least
}

// limitIn reads a limit; "max" and a file that is not there are none.
func limitIn(path string) Size {
	text, err := os.ReadFile(path)
	if err != nil {
		return noLimit
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil || n <= 0 {
		return noLimit
	}
	return min(Size(n), noLimit)
}
