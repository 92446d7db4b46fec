// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/config"
)

// socketMode lets the gateway's group give orders, and nobody else.
const socketMode = 0o660

// socket is a listening Unix socket, and the file that it is.
type socket struct {
	*net.UnixListener
	path     string
	dev, ino uint64
}

// listenUnix makes the socket at path. What a gateway that is gone has left there is taken away; where one listens, it is
// an error. Two that start at once take turns, by a lock on the directory.
func listenUnix(path string) (*socket, error) {
	dir, name := filepath.Split(path)
	d, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return nil, fmt.Errorf("open its directory: %w", reason(err))
	}
	defer d.Close() // and with it the lock
	if err := lockDirectory(int(d.Fd())); err != nil {
		return nil, fmt.Errorf("lock its directory: %w", err)
	}
	at := reachable(path, d)
	if err := takeAway(path, at); err != nil {
		return nil, err
	}
	l, err := bindUnix(at)
	if err != nil {
		return nil, reason(err)
	}
	l.SetUnlinkOnClose(false) // by then the path may be another gateway's
	s := &socket{UnixListener: l, path: path}
	st, err := setSocketMode(int(d.Fd()), name)
	if err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("set its mode: %w", err)
	}
	s.dev, s.ino = st.Dev, st.Ino
	return s, nil
}

// setSocketMode gives the socket its mode, of which the umask may have taken more away. Others may be able to write to the
// directory, and put a link, or a file of somebody else, in its place: so what is opened is looked at, and only that is changed.
func setSocketMode(dir int, name string) (st unix.Stat_t, err error) {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	switch err := unix.Fstat(fd, &st); {
	case err != nil:
		return st, err
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK || int(st.Uid) != os.Geteuid() || st.Nlink != 1:
		return st, errors.New("somebody has put another file in its place; choose a directory that nobody else can write to")
	case st.Mode&0o777 == socketMode:
		return st, nil
	}
	return st, unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), socketMode) // fchmod(2) does not take a descriptor of O_PATH
}

// bindUnix makes the socket with its mode: a socket that is given one before bind(2) never has another (unix(7)).
func bindUnix(at string) (*net.UnixListener, error) {
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }), err)
	}}
	l, err := c.Listen(context.Background(), "unix", at)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// maxSocketPath is what fits into a sockaddr_un, with its end (unix(7)).
const maxSocketPath = 107

// reachable is a path that a socket address has room for. Longer ones go through the descriptor of the directory.
func reachable(path string, dir *os.File) string {
	if len(path) <= maxSocketPath {
		return path
	}
	return "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path)
}

// takeAway removes a socket that nobody listens on.
func takeAway(path, at string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return reason(err)
	case info.Mode()&fs.ModeSocket == 0:
		return errors.New("there is a file that is no socket; remove it, or set another path")
	}
	// A gateway that stands still doesn't accept, but the kernel connects for it; and one whose backlog is full answers
	// with EAGAIN. Only a socket without an owner refuses.
	c, err := net.DialTimeout("unix", at, time.Second)
	if err == nil {
		_ = c.Close()
		return errInUse
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return errors.Join(errInUse, reason(err))
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the one that a former gateway has left: %w", reason(err))
	}
	return nil
}

var errInUse = errors.New("another gateway listens there")

// Close ends it, and takes the file away if it is still its own.
func (s *socket) Close() error {
	err := s.UnixListener.Close()
	var st unix.Stat_t
	if unix.Lstat(s.path, &st) == nil && st.Dev == s.dev && st.Ino == s.ino {
		_ = os.Remove(s.path)
	}
	return err
}

// openSocket listens on the socket that the settings name, or nobody has named. Without the latter the gateway runs too: then
// complain is told why there is none.
func openSocket(s config.Settings, admin string, complain func(string)) (*socket, error) {
	path, byDefault := s.AdminSocketAt(admin)
	if path == "" {
		return nil, nil
	}
	var err error
	if byDefault {
		err = config.OwnDirectory(filepath.Dir(path))
	}
	var l *socket
	if err == nil {
		if l, err = listenUnix(path); err == nil {
			return l, nil
		}
	}
	what := fmt.Errorf("%sADMIN_SOCKET=%s: %w; set it to another path, or to 'off'", config.Prefix, path, err)
	if !byDefault {
		return nil, what
	}
	complain("there is no socket for orders: " + what.Error())
	return nil, nil
}

// lockPatience is how long another gateway may take to make its socket in the same directory: milliseconds, as a rule.
const lockPatience = 2 * time.Second

// lockDirectory keeps two gateways from taking a socket over at once. Whoever may open the directory can hold its lock, so
// that it is not waited for without end.
func lockDirectory(fd int) error {
	for end := time.Now().Add(lockPatience); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if time.Now().After(end) {
			return errors.New("another process holds it; end that, or set TLSNAT_ADMIN_SOCKET to a path in a directory of the gateway's own")
		}
	}
}
