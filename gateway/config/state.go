// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// OwnDirectory makes a directory for secrets and sockets, with mode 0700, or finds one that nobody else can write to. In
// a shared directory such as /tmp anybody may have been first: a directory of another user, a symbolic link of another
// user, or one that others may write to is refused.
func OwnDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory %s: %w", dir, reason(err))
	}
	if link, err := os.Lstat(dir); err != nil {
		return fmt.Errorf("look at the directory %s: %w", dir, reason(err))
	} else if link.Mode()&fs.ModeSymlink != 0 && !trusted(link) {
		return fmt.Errorf("%s is a symbolic link of uid %d; remove it, or set %sSTATE to a directory of your own", dir, uidOf(link), Prefix)
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("open the directory %s: %w; it has to belong to user %d", dir, reason(err), os.Geteuid())
	}
	defer d.Close()
	info, err := d.Stat()
	if err != nil {
		return fmt.Errorf("look at the directory %s: %w", dir, reason(err))
	}
	const others = 0o022
	switch {
	case !trusted(info):
		return fmt.Errorf("%s belongs to uid %d; remove it, or set %sSTATE to a directory of your own", dir, uidOf(info), Prefix)
	case info.Mode()&others != 0:
		return fmt.Errorf("others may write to %s (mode %04o); look what is in there, then run: chmod 700 %[1]s", dir, info.Mode().Perm())
	case isShared(filepath.Dir(dir)) && info.Mode().Perm()&0o077 != 0 && uidOf(info) == os.Geteuid():
		return d.Chmod(0o700)
	}
	return nil
}

func uidOf(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }

// ours says whether a file is the user's or root's, who can do everything anyway.
func trusted(info fs.FileInfo) bool { return uidOf(info) == 0 || uidOf(info) == os.Geteuid() }

// isShared says whether everybody may make files in a directory, as in /tmp.
func isShared(dir string) bool {
	info, err := os.Stat(dir)
	return err == nil && info.Mode()&0o002 != 0
}

// The admin's port when nobody sets it.
const adminPort = 9180

// AdminSocketAt is the path of the admin's socket for an admin at the address; "" if there is none. byDefault says that
// nobody has set it. Two gateways of one user have two ports, and so two sockets: a command that is told the port finds
// the right one.
func (s *Settings) AdminSocketAt(admin string) (path string, byDefault bool) {
	switch {
	case s.AdminSocket == "off", s.AdminSocket == "" && s.Admin == "off":
		return "", false
	case s.AdminSocket != "":
		return s.AdminSocket, false
	}
	return filepath.Join(s.socketDir(), socketName(admin)), true
}

// AdminSockets are the paths at which a command looks for the gateway's socket. The last one is that of the service
// (docs/tlsnat.service), for an operator who has none of its environment.
func (s *Settings) AdminSockets() []string {
	path, byDefault := s.AdminSocketAt(s.Admin)
	switch {
	case path == "":
		return nil
	case !byDefault:
		return []string{path}
	}
	name := filepath.Base(path)
	all := []string{path, filepath.Join(s.State, name), filepath.Join("/run/tlsnat", name)}
	if all[0] == all[1] {
		all = all[1:]
	}
	return all
}

// socketDir is what systemd makes for RuntimeDirectory=, else the user's own, else the state directory.
func (s *Settings) socketDir() string {
	if d, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); d != "" {
		return d
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		if info, err := os.Stat(d); err == nil && info.IsDir() && uidOf(info) == os.Geteuid() {
			return filepath.Join(d, "tlsnat")
		}
	}
	return s.State
}

func socketName(admin string) string {
	name := "admin"
	ap, err := netip.ParseAddrPort(admin)
	if err != nil {
		return name + ".sock"
	}
	if a := ap.Addr(); !a.IsUnspecified() && a != netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		name += "-" + a.String()
	}
	if ap.Port() != adminPort {
		name += "-" + strconv.Itoa(int(ap.Port()))
	}
	return name + ".sock"
}

// AdminTokenPath is where the token is that the gateway makes itself.
func (s *Settings) AdminTokenPath() string { return filepath.Join(s.State, "admin-token") }

// MakeAdminToken is the token in the state directory, made with mode 0600 if there is none. Of two gateways that start
// at once one makes it, and the other one takes that.
func (s *Settings) MakeAdminToken() (string, error) {
	if err := OwnDirectory(s.State); err != nil {
		return "", err
	}
	path := s.AdminTokenPath()
	if token, err := s.OwnAdminToken(); !errors.Is(err, fs.ErrNotExist) {
		return token, err
	}
	f, err := os.CreateTemp(s.State, ".admin-token-*") // its mode is 0600
	if err != nil {
		return "", fmt.Errorf("make a token for orders: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(rand.Text() + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Link(f.Name(), path) // fails if somebody else was faster
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("make a token for orders in %s: %w", s.State, err)
	}
	return s.OwnAdminToken()
}

// OwnAdminToken reads the token that the gateway has made. One that others may read is none.
func (s *Settings) OwnAdminToken() (string, error) {
	path := s.AdminTokenPath()
	info, err := os.Lstat(path)
	if err != nil {
		return "", fmt.Errorf("read the token for orders: %w", err)
	}
	if !info.Mode().IsRegular() || !trusted(info) || info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s is not a file that only its owner may read (uid %d, mode %v); remove it, and the next start makes another one", path, uidOf(info), info.Mode())
	}
	token, err := readSecret(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return token, nil
}

// AdminSpares are descriptors that the admin keeps in reserve, to accept with when the process has no others.
const AdminSpares = 16

// AdminClients is how many connections the admin's address may have. A flood turns them over: with 256 of them and ten
// thousand new ones a second a client still has 25 ms to send its request. Where files are few it takes a small part.
func AdminClients() int {
	const fewest, most, part = 48, 256, 64
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return fewest
	}
	return int(max(fewest, min(most, r.Cur/part)))
}
