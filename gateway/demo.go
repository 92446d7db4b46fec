// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"
	"golang.org/x/sys/unix"
)

// demo is the built-in backend: an HTTP server that answers any request with what the edge knows of the connection.
// It learns that the way every backend may: from a PROXY v2 header. Its connections are pairs of sockets inside the
// process, so it has no port.
type demo struct {
	server *http.Server
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

type demoConnKey struct{}

func newDemo() *demo {
	d := &demo{conns: make(chan net.Conn, 256), closed: make(chan struct{})}
	d.server = &http.Server{
		Handler:           http.HandlerFunc(answerDemo),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, demoConnKey{}, c)
		},
	}
	return d
}

// connect makes a connection to the demo, and returns the gateway's end.
func (d *demo) connect() (int32, unix.Errno) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err.(unix.Errno)
	}
	f := os.NewFile(uintptr(fds[1]), "demo")
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		_ = unix.Close(fds[0])
		return -1, unix.ENOMEM
	}
	select {
	case d.conns <- conn:
		return int32(fds[0]), 0
	default:
		_ = conn.Close()
		_ = unix.Close(fds[0])
		return -1, unix.ECONNREFUSED
	}
}

func (d *demo) serve() {
	_ = d.server.Serve(&proxyproto.Listener{Listener: d, ReadHeaderTimeout: 10 * time.Second})
}

func (d *demo) close() {
	_ = d.server.Close()
	_ = d.Close()
}

// Accept, Close and Addr make the demo a net.Listener for its own server.

func (d *demo) Accept() (net.Conn, error) {
	select {
	case c := <-d.conns:
		return c, nil
	case <-d.closed:
		return nil, net.ErrClosed
	}
}

func (d *demo) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

func (d *demo) Addr() net.Addr { return &net.UnixAddr{Name: "demo", Net: "unix"} }

// demoAnswer is what the demo says.
type demoAnswer struct {
	Message string `json:"message"`
	Client  string `json:"client"`
	Edge    string `json:"edge"`
	Name    string `json:"sni,omitempty"`
	TLS     string `json:"tls,omitempty"`
	Cipher  string `json:"cipher,omitempty"`
	ALPN    string `json:"alpn,omitempty"`
	ID      string `json:"id,omitempty"`
	Request string `json:"request"`
	Body    int64  `json:"request_body_bytes"`
}

func answerDemo(w http.ResponseWriter, r *http.Request) {
	body, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return
	}
	a := demoAnswer{Message: "tlsnat works", Request: r.Method + " " + r.URL.Path, Body: body}
	if pc, ok := r.Context().Value(demoConnKey{}).(*proxyproto.Conn); ok {
		a.learn(pc.ProxyHeader())
	}
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(a)
}

// learn reads the PROXY header that the gateway sent.
func (a *demoAnswer) learn(h *proxyproto.Header) {
	if h == nil {
		return
	}
	if h.SourceAddr != nil {
		a.Client, a.Edge = h.SourceAddr.String(), h.DestinationAddr.String()
	}
	tlvs, err := h.TLVs()
	if err != nil {
		return
	}
	for _, t := range tlvs {
		switch t.Type {
		case proxyproto.PP2_TYPE_AUTHORITY:
			a.Name = string(t.Value)
		case proxyproto.PP2_TYPE_ALPN:
			a.ALPN = string(t.Value)
		case proxyproto.PP2_TYPE_UNIQUE_ID:
			a.ID = string(t.Value)
		}
	}
	if s, ok := tlvparse.FindSSL(tlvs); ok {
		a.TLS, _ = s.SSLVersion()
		a.Cipher, _ = s.SSLCipher()
	}
}
