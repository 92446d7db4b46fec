// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tlsnat/tlsnat/gateway/printable"
)

// maxFile bounds what is read of one file. The largest chain with an RSA-8192 key is under 64 KiB; 1 MiB still
// takes the system's whole CA bundle, and stops at a disk image that somebody called backup.pem.
const maxFile = 1 << 20

// Load reads a directory and reports everything that is wrong with it at once, sorted by file and line. What
// could be understood is served; the store is nil if that is nothing. Expired certificates are served, with a
// warning: a client that refuses one tells its user more than a gateway that does not answer.
func Load(dir string, now time.Time) (*Store, []Problem) { return Reload(dir, now, nil) }

// Reload is Load for a directory that was read before, and a file that cannot be used takes no certificate away that
// was read from it: that one is served on, with a warning. Certificates whose files were removed are gone.
func Reload(dir string, now time.Time, before *Store) (*Store, []Problem) {
	var r report
	l := list(dir, &r)
	files := readAll(dir, l.paths, before)
	p := newPairing(files, now, &r)
	p.remember(before)
	certs := p.pairs()
	kept := before.spared(certs, l.paths, r)
	certs = append(certs, kept...)
	l.reportForeign(certs, &r)
	store := index(certs, now, &r)
	store.remember(files, p.links)
	warnKept(kept, store.Served(now), &r)
	warnOpenKeys(files, &r)
	if store == nil && !slices.ContainsFunc(r, Problem.fatal) {
		r.fail(place{file: dir}, "put NAME.crt and NAME.key into it; one level of subdirectories is read too",
			"no certificate with its key: %d files *.pem, *.crt, *.cer, *.key were read", len(files))
	}
	return store, r.of(dir).sorted()
}

// listing is what a directory holds, in order of name.
type listing struct {
	paths   []string // of files that may hold certificates or keys
	foreign []string // of files in formats that we do not read
}

func list(dir string, r *report) (l listing) {
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		r.fail(place{file: dir}, "write the directory that holds it", "is not a directory")
		return l
	}
	l.add(dir, true, r)
	return l
}

func (l *listing) add(dir string, descend bool, r *report) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		reportUnreadable(dir, err, r)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "."), e.Name() == "lost+found": // the latter is in every fresh volume
		case isDir(path, e):
			if descend {
				l.add(path, false, r)
			}
		case holdsPEM(path):
			l.paths = append(l.paths, path)
		case foreignByExtension[strings.ToLower(filepath.Ext(path))] != "":
			l.foreign = append(l.foreign, path)
		}
	}
}

// isDir follows a link.
func isDir(path string, e fs.DirEntry) bool {
	if e.Type()&fs.ModeSymlink == 0 {
		return e.IsDir()
	}
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func holdsPEM(path string) bool {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".pem", ".crt", ".cer", ".key":
		return true
	}
	return false
}

// reportForeign names files in formats that we do not read. Once such a file has been converted, and the result is
// beside it, there is nothing to say. Where its directory has a certificate in PEM it is worth a warning only: tools
// write the same certificate in several formats (cert-manager's keystores).
func (l *listing) reportForeign(certs []*Certificate, r *report) {
	served := make(map[string]bool)
	for _, c := range certs {
		served[filepath.Dir(c.CertFile)] = true
	}
	for _, path := range l.foreign {
		format, say := foreignByExtension[strings.ToLower(filepath.Ext(path))], r.fail
		if served[filepath.Dir(path)] {
			say = r.warn
		}
		if !exists(path+".pem") && !exists(stem(path)+".pem") {
			say(place{file: path}, convert(format, path), "is %s, which is not read", format)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// stem is a path without its extension.
func stem(path string) string { return strings.TrimSuffix(path, filepath.Ext(path)) }

// readAll reads and parses files on all CPUs; most of the time is spent checking that keys are sound. Those that are what
// they were are taken from the store before. If there is one there is traffic as well, and one CPU has to do: the caller's
// thread may have been told to yield to others, and new ones have not.
func readAll(dir string, paths []string, before *Store) []*file {
	files := make([]*file, len(paths))
	if before != nil {
		for i, path := range paths {
			files[i] = before.readFile(dir, path)
		}
		return files
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(paths)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(paths)); i = next.Add(1) - 1 {
				files[i] = before.readFile(dir, paths[i])
			}
		})
	}
	workers.Wait()
	return files
}

// readFile is the file as it was parsed before, if it is what it was then. A file that could not be used is read anew.
func (s *Store) readFile(dir, path string) *file {
	var had *file
	if s != nil {
		had = s.files[path]
	}
	if had != nil && !had.broken && had.stamp.Unread(path) {
		return had
	}
	return readFile(dir, path, had)
}

// remember keeps what the next Reload need not do again.
func (s *Store) remember(files []*file, links map[[2]*x509.Certificate]link) {
	if s == nil {
		return
	}
	s.files, s.links = make(map[string]*file, len(files)), links
	for _, f := range files {
		s.files[f.path] = f
	}
}

// readFile is the parsed file; what kept it from being read is among its problems.
// It is had if the content is the same.
func readFile(dir, path string, had *file) *file {
	f := &file{path: path, name: path}
	if name, err := filepath.Rel(dir, path); err == nil {
		f.name = name
	}
	data, info, err := ReadFile(path, maxFile)
	if err != nil {
		f.broken = true
		reportUnreadable(path, err, &f.problems)
		return f
	}
	defer clear(data) // it may hold a key
	stamp := NewStamp(info, data)
	if same := had != nil && !had.broken && had.stamp.Same(stamp); same {
		f = had
	} else {
		f.parse(data)
	}
	f.mode, f.lent, f.stamp = info.Mode(), lentToGroup(info), stamp
	return f
}

func reportUnreadable(path string, err error, r *report) {
	at := place{file: path}
	info, statErr := os.Stat(path)
	switch {
	case errors.Is(err, ErrNotRegular):
		r.fail(at, "put a file or a link to a file there", "%v", err)
	case errors.Is(err, ErrTooLarge):
		r.fail(at, "a chain and its key take a few KiB: give each certificate a file of its own", "%v", err)
	case errors.Is(err, fs.ErrNotExist):
		target, linkErr := os.Readlink(path)
		if linkErr != nil {
			r.fail(at, "make it, or name the directory that holds the certificates", "does not exist")
			return
		}
		r.fail(at, "renew the link or remove it", "is a link to %s, which does not exist", printable.Quoted(target))
	case errors.Is(err, fs.ErrPermission) && statErr == nil:
		name, mode := whoami(), "600"
		if info.IsDir() {
			mode = "700"
		}
		r.fail(at, fmt.Sprintf("run: chown %s %s && chmod %s %[2]s", name, printable.Shell(path), mode),
			"user %s (uid %d) may not read it: owner is uid %d, mode %04o", name, os.Geteuid(), owner(info), info.Mode().Perm())
	case errors.Is(err, fs.ErrPermission):
		r.fail(at, "run: chmod a+x "+printable.Shell(filepath.Dir(path)),
			"user %s (uid %d) may not enter the directory it is in", whoami(), os.Geteuid())
	default:
		r.fail(at, "", "cannot be read: %v", withoutPath(err))
	}
}

// whoami is the name of the user that this process is, or its number in a container without a passwd file.
func whoami() string {
	uid := strconv.Itoa(os.Geteuid())
	if u, err := user.LookupId(uid); err == nil {
		return u.Username
	}
	return uid
}

func owner(info fs.FileInfo) uint32 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Uid
	}
	return 0
}

// lentToGroup says whether the file is root's and a group other than root's may read it, and nobody else: that is how
// a service without rights of its own is given a key that it can't change. PostgreSQL accepts the same.
func lentToGroup(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Uid == 0 && st.Gid != 0 && info.Mode().Perm()&0o037 == 0
}

// warnOpenKeys warns once a directory of private keys that others can read, since one mistake made them all so.
func warnOpenKeys(files []*file, r *report) {
	open := make(map[string][]*file)
	var dirs []string
	for _, f := range files {
		if len(f.keys) == 0 || f.mode.Perm()&0o077 == 0 || f.lent {
			continue
		}
		dir := filepath.Dir(f.path)
		if open[dir] == nil {
			dirs = append(dirs, dir)
		}
		open[dir] = append(open[dir], f)
	}
	for _, dir := range dirs {
		first, more := open[dir][0], ""
		if n := len(open[dir]) - 1; n > 0 {
			more = fmt.Sprintf(" (and %d more in %s)", n, printable.Quoted(dir))
		}
		r.warn(place{file: first.path}, closeKeyHint(dir, open[dir]), "the private key can be read by others: mode %04o%s",
			first.mode.Perm(), more)
	}
}

// closeKeyHint knows that a mounted Kubernetes secret is read-only: its mode is set where it is mounted.
func closeKeyHint(dir string, files []*file) string {
	if _, err := os.Lstat(filepath.Join(dir, "..data")); err == nil {
		return "set defaultMode: 0400 in the secret's volume"
	}
	if len(files) > 3 {
		return "run: chmod 600 " + printable.Shell(dir) + "/*"
	}
	hint := "run: chmod 600"
	for _, f := range files {
		hint += " " + printable.Shell(f.path)
	}
	return hint
}
