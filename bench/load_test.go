// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// patience bounds every wait of the load: a gateway that loses bytes fails its benchmark, it does not hang the run.
const patience = 60 * time.Second

// way is how a client reaches the backend: through which address, with TLS or with a ClientHello that is sent and never answered, or plain.
type way struct {
	addr  string
	tls   *tls.Config
	hello []byte
}

// way through a door. Without a gateway every way is plain.
func (g *gateway) way(d door) way {
	w := way{addr: g.at[d]}
	switch {
	case g.peer == direct || d == tcpDoor:
	case d == passDoor:
		w.hello = preparedHello
	default:
		w.tls = clientConfig(d)
	}
	return w
}

// clientConfig offers what every peer is set up for: TLS 1.3, AES-128-GCM, X25519. Dynamic record sizes are off, so that bulk comes in full records
// from its first byte.
func clientConfig(d door) *tls.Config {
	return &tls.Config{
		ServerName:                  string(d) + ".test",
		InsecureSkipVerify:          true,
		MinVersion:                  tls.VersionTLS13,
		CurvePreferences:            []tls.CurveID{tls.X25519},
		CipherSuites:                []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256},
		DynamicRecordSizingDisabled: true,
	}
}

func (w way) dial() (net.Conn, error) {
	c, err := net.DialTimeout("tcp", w.addr, patience)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	if w.hello != nil {
		if _, err := c.Write(w.hello); err != nil {
			c.Close()
			return nil, err
		}
	}
	if w.tls != nil {
		secured := tls.Client(c, w.tls)
		if err := secured.Handshake(); err != nil {
			c.Close()
			return nil, fmt.Errorf("handshake: %w", err)
		}
		return secured, nil
	}
	return c, nil
}

// preparedHello is the ClientHello of an honest client for ecdsa.test, to be sent by those that do not mean to go on.
var preparedHello = makeHello()

func makeHello() []byte {
	here, there := net.Pipe()
	go func() {
		tls.Client(here, clientConfig(ecdsaDoor)).Handshake()
		here.Close()
	}()
	defer there.Close()
	p := make([]byte, 4096)
	n, err := there.Read(p)
	if err != nil || n < 100 {
		panic(fmt.Sprintf("a ClientHello of %d bytes: %v", n, err))
	}
	return p[:n]
}

// together does the same work n times at once and returns the first error, by number.
func together(n int, do func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// crowd is a number of open connections.
type crowd []net.Conn

// gather opens connections until there are n, sixteen at a time. Each has echoed once: its backend is there, its tickets have been read.
func (c crowd) gather(n int, w way) (crowd, error) {
	had := len(c)
	c = append(c, make(crowd, n-had)...)
	err := together(16, func(worker int) error {
		for i := had + worker; i < n; i += 16 {
			conn, err := w.dial()
			if err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
			c[i] = conn
			if err := echoOnce(conn, message(256), make([]byte, 256)); err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
		}
		return nil
	})
	return c, err
}

func (c crowd) close() {
	for _, conn := range c {
		if conn != nil {
			conn.Close()
		}
	}
}

func (c crowd) extend() {
	until := time.Now().Add(patience)
	for _, conn := range c {
		conn.SetDeadline(until)
	}
}

// message is n bytes to be echoed.
func message(n int) []byte { return bytes.Repeat([]byte("echo"), n/4) }

// echoOnce sends a message and waits for all of it to come back.
func echoOnce(c io.ReadWriter, sent, back []byte) error {
	if _, err := c.Write(sent); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if _, err := io.ReadFull(c, back); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	if !bytes.Equal(sent, back) {
		return errors.New("the echo is not what was sent")
	}
	return nil
}

// echoPaced lets every connection send `times` messages at a fixed rate: each sends once a period, and all are spread over it. A message that could not be sent in time, because
// the one before was not back, counts its wait too: the load does not slow down to be kind.
func (c crowd) echoPaced(size, times int, period time.Duration) ([]time.Duration, error) {
	c.extend()
	took := make([]time.Duration, len(c)*times)
	sent, start := message(size), time.Now()
	err := together(len(c), func(i int) error {
		back := make([]byte, size)
		due := start.Add(period * time.Duration(i) / time.Duration(len(c)))
		for k := range times {
			began := due
			if wait := time.Until(due); wait > 0 {
				time.Sleep(wait)
				began = time.Now() // waking late is the load's fault
			}
			if err := echoOnce(c[i], sent, back); err != nil {
				return err
			}
			took[i*times+k] = time.Since(began)
			due = due.Add(period)
		}
		return nil
	})
	return took, err
}

// visit is one whole connection: handshake, 256 bytes there and back, close. It tells whether the session was resumed.
func (w way) visit() (resumed bool, took time.Duration, err error) {
	began := time.Now()
	c, err := w.dial()
	if err != nil {
		return false, 0, err
	}
	defer c.Close()
	if err := echoOnce(c, message(256), make([]byte, 256)); err != nil {
		return false, 0, err
	}
	if secured, ok := c.(*tls.Conn); ok {
		resumed = secured.ConnectionState().DidResume
	}
	return resumed, time.Since(began), nil
}

// firstTicket keeps the first session it is given and hands it out for ever, so that each resumption costs the client the same.
type firstTicket struct {
	sync.Mutex
	session *tls.ClientSessionState
}

func (f *firstTicket) Get(string) (*tls.ClientSessionState, bool) {
	f.Lock()
	defer f.Unlock()
	return f.session, f.session != nil
}

func (f *firstTicket) Put(_ string, s *tls.ClientSessionState) {
	f.Lock()
	defer f.Unlock()
	if f.session == nil {
		f.session = s
	}
}

// knock sends the prepared hello, waits for the first byte of the answer and goes away: it costs the gateway nearly a handshake (the key exchange and the
// signature) and the load a tenth of one. That is what lets one core ask for twice what another can give. It reports whether the gateway went on with the
// handshake; one that turns a client away has answered too.
func knock(addr string) (welcome bool, err error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return false, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write(preparedHello); err != nil {
		return false, nil
	}
	var first [4096]byte
	n, err := c.Read(first[:])
	return n > 0 && first[0] == 0x16, nil
}
