// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"time"
)

// Attacks with TLS records: their sizes, their number, and what stands between them.
var recordAttacks = []attack{
	{"many-small-records-up", "a client that writes line by line loses its upload, and its loop spins", smallRecordsUp},
	{"many-small-records-down", "a tls:// backend that writes line by line loses its answer", smallRecordsDown},
	{"small-records-beside-neighbours", "a flood of one-byte records makes other connections wait", smallRecordsBeside},
	{"cut-inside-a-record", "a stream that somebody cut looks whole to the backend", cutInsideARecord},
	{"end-without-close-notify", "a stream that somebody cut is logged as if its client had ended it", endWithoutCloseNotify},
}

// recordSizes are the sizes at which the ways of carrying records change.
var recordSizes = []int{1, 2, 15, 16, 17, 18, 80, 100, 237, 238, 1023, 1024, 1025, 4095, 4096, 4097, 16383, 16384}

// burst is a connection whose writes wait until flush, so that many records leave at once.
type burst struct {
	net.Conn
	out *bufio.Writer
}

func (b *burst) Write(p []byte) (int, error) { return b.out.Write(p) }

// records sends n bytes in records of the given size over a TLS connection made of b, many in one segment.
func (b *burst) records(c *tls.Conn, data []byte, size int) error {
	for len(data) > 0 {
		n := min(size, len(data))
		if _, err := c.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return b.out.Flush()
}

// pattern is n bytes of which no two neighbours of a record are the same.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i>>8*13 + i>>16)
	}
	return p
}

func smallRecordsUp(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo}")
	if err != nil {
		return err
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, size := range recordSizes {
			if err := e.sendsRecords(version, size, min(s.scaled(4000, 20000), 16<<20/size)); err != nil {
				return fmt.Errorf("%s, records of %d bytes: %w", tls.VersionName(version), size, err)
			}
		}
	}
	return e.quiet()
}

// sendsRecords has a client send count records, and read them back while it sends.
func (e *edge) sendsRecords(version uint16, size, count int) error {
	raw, err := e.dial(0)
	if err != nil {
		return err
	}
	defer raw.Close()
	b := &burst{raw, bufio.NewWriterSize(raw, 1<<20)}
	config := e.stage.client("a.example")
	config.MaxVersion, config.MinVersion = version, version
	config.DynamicRecordSizingDisabled = true
	c := tls.Client(&flushing{burst: b}, config)
	if err := c.Handshake(); err != nil {
		return err
	}
	c.NetConn().(*flushing).held = true
	data := pattern(size * count)
	sent := make(chan error, 1)
	go func() { sent <- b.records(c, data, size) }()
	got := make([]byte, len(data))
	if n, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("%d of %d bytes came back: %w", n, len(data), err)
	}
	for i := range got {
		if got[i] != data[i] {
			return fmt.Errorf("byte %d of %d is another one", i, len(data))
		}
	}
	return <-sent
}

// flushing passes on each write of the handshake at once; once it is held, records wait for burst.records.
type flushing struct {
	*burst
	held bool
}

func (f *flushing) Write(p []byte) (int, error) {
	n, err := f.burst.Write(p)
	if err == nil && !f.held {
		err = f.out.Flush()
	}
	return n, err
}

func smallRecordsDown(s *stage) error {
	const size, count = 80, 20000
	data := pattern(size * count)
	own, err := tls.LoadX509KeyPair(s.path("certs/a.pem"), s.path("certs/a.pem"))
	if err != nil {
		return err
	}
	back, err := s.serve(func(raw net.Conn) {
		b := &burst{raw, bufio.NewWriterSize(raw, 1<<20)}
		c := tls.Server(&flushing{burst: b}, &tls.Config{Certificates: []tls.Certificate{own}, DynamicRecordSizingDisabled: true})
		if c.Handshake() == nil {
			c.NetConn().(*flushing).held = true
			_ = b.records(c, data, size)
			_, _ = io.Copy(io.Discard, c)
		}
	})
	if err != nil {
		return err
	}
	e, err := s.start(":{0} -> tls://"+back+" mode=tcp backend-verify=off", "LOOPS=1")
	if err != nil {
		return err
	}
	c, err := e.dial(0)
	if err != nil {
		return err
	}
	defer c.Close()
	got := make([]byte, len(data))
	if n, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("%d of %d bytes came: %w", n, len(data), err)
	}
	if string(got) != string(data) {
		return fmt.Errorf("other bytes came")
	}
	return e.quiet()
}

func smallRecordsBeside(s *stage) error {
	e, err := s.start(":{0} a.example -> {echo}")
	if err != nil {
		return err
	}
	records := s.scaled(100_000, 1_000_000)
	slowest, err := s.beside(e, fmt.Sprintf("slowest neighbour of a flood of %d records of one byte", records), func(e *edge) (time.Duration, error) {
		return e.honestBesideRecords(records)
	})
	if err != nil {
		return err
	}
	if limit := time.Second; slowest > limit { // quiet it is 3 ms; a busy machine multiplies that
		return fmt.Errorf("a neighbour waited for %v", slowest)
	}
	return e.quiet()
}

// honestBesideRecords is how long the slowest honest client takes while another sends records of one byte.
func (e *edge) honestBesideRecords(records int) (slowest time.Duration, err error) {
	flood := make(chan error, 1)
	go func() { flood <- e.sendsRecords(tls.VersionTLS13, 1, records) }()
	for {
		select {
		case err := <-flood:
			return slowest, err
		default:
		}
		took, err := e.honest("", 0, "a.example")
		if err != nil {
			return slowest, fmt.Errorf("a neighbour: %w", err)
		}
		slowest = max(slowest, took)
	}
}

func cutInsideARecord(s *stage) error {
	end := make(chan error, 1)
	back, err := s.serve(func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		end <- err
	})
	if err != nil {
		return err
	}
	e, err := s.start(":{0} a.example -> " + back)
	if err != nil {
		return err
	}
	raw, err := e.dial(0)
	if err != nil {
		return err
	}
	defer raw.Close()
	c := tls.Client(raw, s.client("a.example"))
	if _, err := c.Write([]byte("an order of 1000")); err != nil {
		return err
	}
	if _, err := raw.Write([]byte{23, 3, 3, 0, 200, 1, 2, 3}); err != nil {
		return err
	}
	if err := raw.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	if err := <-end; err == nil {
		return fmt.Errorf("the backend saw an ordinary end")
	}
	if o, err := e.outcome(raw.LocalAddr()); err != nil || o != "tls_error" {
		return fmt.Errorf("outcome %q, not tls_error: %w", o, err)
	}
	return nil
}

func endWithoutCloseNotify(s *stage) error {
	back, err := s.serve(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	if err != nil {
		return err
	}
	e, err := s.start(":{0} a.example -> " + back)
	if err != nil {
		return err
	}
	raw, err := e.dial(0)
	if err != nil {
		return err
	}
	defer raw.Close()
	c := tls.Client(raw, s.client("a.example"))
	if _, err := c.Write([]byte("an order of 1000")); err != nil {
		return err
	}
	if err := raw.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	l, err := e.lineOf(raw.LocalAddr())
	if err != nil {
		return err
	}
	if l["cut_short"] == nil {
		return fmt.Errorf("nothing in its line says that the stream was cut: %v", l)
	}
	return nil
}
