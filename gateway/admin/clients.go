// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// clients is a listener whose clients are bounded in number. A connection that comes when there are too many takes the
// place of another one, so that nobody is kept out by those who were first: of the source that has most of them, the one
// that has made no progress for longest. A health check sends its request at once and is answered at once, so it is
// the last to lose its place.
type clients struct {
	net.Listener
	max  int
	kept *reserve
	shed atomic.Uint64 // connections that lost their place

	mu      sync.Mutex
	open    map[*client]struct{}
	sources map[any]int // connections of each
}

// client is a connection.
type client struct {
	net.Conn
	of     *clients
	source any         // the address, or the user's id on a Unix socket
	peer   *unix.Ucred // who is there, on a Unix socket

	since   time.Time // it was accepted, was answered, or is being answered
	writing bool      // an answer
	holds   bool      // an order is carried out for it: it keeps its place
	closed  sync.Once
}

func newClients(l net.Listener, most int, kept *reserve) *clients {
	return &clients{Listener: l, max: most, kept: kept, open: map[*client]struct{}{}, sources: map[any]int{}}
}

// How long accepting rests when it has failed. The client waits in the backlog, and is still answered within 100 ms.
const acceptRest = 10 * time.Millisecond

// Accept returns the next connection. Without a free descriptor it takes one of those in reserve, or that of
// another client.
func (c *clients) Accept() (net.Conn, error) {
	for {
		conn, err := c.Listener.Accept()
		switch {
		case err == nil:
			return c.enter(conn), nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
			// accept4(2) takes a descriptor before it looks whether anybody is there.
			if c.pending() && (c.kept.spend(1) || c.makeRoom()) {
				continue
			}
		case !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ENOMEM):
			return nil, err
		}
		time.Sleep(acceptRest)
	}
}

// pending says whether somebody waits to be accepted.
func (c *clients) pending() (yes bool) {
	s, ok := c.Listener.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		yes = err == nil && n == 1
	})
	return yes
}

// enter gives a connection a place.
func (c *clients) enter(conn net.Conn) *client {
	n := &client{Conn: conn, of: c, since: time.Now()}
	n.peer = peerOf(conn)
	n.source = sourceOf(conn, n.peer)
	c.mu.Lock()
	var out *client
	if len(c.open) >= c.max {
		out = c.victim(func(*client) bool { return true })
	}
	c.open[n] = struct{}{}
	c.sources[n.source]++
	c.mu.Unlock()
	c.drop(out)
	c.kept.refill()
	return n
}

// makeRoom closes a connection for the sake of the next one.
func (c *clients) makeRoom() bool {
	c.mu.Lock()
	out := c.victim(func(*client) bool { return true })
	c.mu.Unlock()
	return c.drop(out)
}

// drop closes a connection that has lost its place.
func (c *clients) drop(out *client) bool {
	if out == nil {
		return false
	}
	c.shed.Add(1)
	_ = out.Close()
	return true
}

// victim is who loses its place, of those that may: nil if nobody may.
func (c *clients) victim(may func(*client) bool) (out *client) {
	for n := range c.open {
		if n.holds || !may(n) {
			continue
		}
		if out == nil {
			out = n
			continue
		}
		if has, most := c.sources[n.source], c.sources[out.source]; has > most || has == most && n.since.Before(out.since) {
			out = n
		}
	}
	return out
}

// Close closes the connection, and gives its place to others.
func (n *client) Close() error {
	n.closed.Do(func() {
		c := n.of
		c.mu.Lock()
		delete(c.open, n)
		if c.sources[n.source]--; c.sources[n.source] == 0 {
			delete(c.sources, n.source)
		}
		c.mu.Unlock()
	})
	err := n.Conn.Close()
	n.of.kept.refill()
	return err
}

// CloseWrite ends our stream: the HTTP server does so before it closes what was not read to its end.
func (n *client) CloseWrite() error {
	if c, ok := n.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// answers notes that an answer is written to the client from now on. Of more than maxAnswers the one that takes longest
// is given up: each may be megabytes that nobody reads.
func (n *client) answers() {
	c := n.of
	c.mu.Lock()
	n.since, n.writing = time.Now(), true
	writing := 0
	for o := range c.open {
		if o.writing {
			writing++
		}
	}
	var out *client
	if writing > maxAnswers {
		out = c.victim(func(o *client) bool { return o.writing && o != n })
	}
	c.mu.Unlock()
	c.drop(out)
}

// answered notes that the connection waits for another request.
func (n *client) answered() {
	n.of.mu.Lock()
	n.since, n.writing = time.Now(), false
	n.of.mu.Unlock()
}

// keep has the connection keep its place until done is called.
func (n *client) keep() (done func()) {
	set := func(holds bool) {
		n.of.mu.Lock()
		n.since, n.holds = time.Now(), holds
		n.of.mu.Unlock()
	}
	set(true)
	return func() { set(false) }
}

// peerOf is who is at the other end of a Unix socket; nil elsewhere.
func peerOf(conn net.Conn) (cred *unix.Ucred) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return nil
	}
	cred = &unix.Ucred{Pid: -1, Uid: ^uint32(0), Gid: ^uint32(0)} // nobody, should the kernel not say
	raw, err := u.SyscallConn()
	if err != nil {
		return cred
	}
	_ = raw.Control(func(fd uintptr) {
		if c, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			cred = c
		}
	})
	return cred
}

func sourceOf(conn net.Conn, peer *unix.Ucred) any {
	if peer != nil {
		return peer.Uid
	}
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

type clientKey struct{}

// withClient has the requests of a connection know it.
func withClient(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, clientKey{}, conn)
}

// clientOf is the connection that a request came on.
func clientOf(r *http.Request) *client {
	n, _ := r.Context().Value(clientKey{}).(*client)
	return n
}

// reserve is descriptors that are open for nothing but to be closed when somebody needs one. So the admin answers when the
// process has none left, which is when an operator looks at it.
type reserve struct {
	mu   sync.Mutex
	most int
	fds  []int
	over bool
}

func newReserve(n int) *reserve {
	r := &reserve{most: n}
	r.refill()
	return r
}

// spend closes n of them, or says that there are not as many.
func (r *reserve) spend(n int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.fds) < n {
		return false
	}
	for range n {
		_ = unix.Close(r.fds[len(r.fds)-1])
		r.fds = r.fds[:len(r.fds)-1]
	}
	return true
}

// needed says whether the process has no other descriptor.
func (r *reserve) needed() bool {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return true
	}
	_ = unix.Close(fd)
	return false
}

// refill opens as many as are missing and may be opened.
func (r *reserve) refill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.fds) < r.most && !r.over {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return
		}
		r.fds = append(r.fds, fd)
	}
}

func (r *reserve) left() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.fds)
}

func (r *reserve) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	for _, fd := range r.fds {
		_ = unix.Close(fd)
	}
	r.fds = nil
}
