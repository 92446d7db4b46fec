// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/record"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// senders are what one peer can do for as long as it likes. A sender opens what it needs, goes on until over is closed or
// it can't, and closes everything.
var senders = []struct {
	name string
	send func(t *testing.T, e *edge, over chan struct{})
}{
	{"records of a byte", floods(toPlain, 1, 64)},
	{"records of a byte, to a tls:// backend", floods(toTLS, 1, 64)},
	{"full records", floods(toPlain, record.MaxPlaintext, 4)},
	{"full records, to a tls:// backend", floods(toTLS, record.MaxPlaintext, 4)},
	{"full records that nobody reads", floods(toPlain, record.MaxPlaintext, 0)},
	{"empty records", breaks(toPlain, func(p *penman) []byte { return p.data(nil) })},
	{"KeyUpdates", breaks(toPlain, func(p *penman) []byte { return p.update(true) })},
	{"KeyUpdates, to a tls:// backend", breaks(toTLS, func(p *penman) []byte { return p.update(true) })},
	{"warnings", breaks(toPlain, func(p *penman) []byte { return p.record(record.TypeAlert, []byte{1, 90}) })},
	{"half a record", halves(toPlain)},
	{"half a record, to a tls:// backend", halves(toTLS)},
	{"garbage after the handshake", breaks(toPlain, func(p *penman) []byte { return []byte{23, 3, 3, 0, 32, 31: 1, 36: 1} })},
	{"garbage for a hello", storms(toPlain, strings.Repeat("\x16\x03\x01\x40\x00garbage", 100))},
	{"a hello, a byte every 10 ms", drips(toPlain, false)},
	{"a hello in records of a byte", drips(toPlain, true)},
	{"silence", storms(toPlain, "")},
	{"half a hello and a reset", storms(toPlain, "\x16\x03\x01\x02\x00\x01")},
	{"bytes without TLS", storms(toTCP, strings.Repeat("x", 1<<16))},
	{"lines of a prelude", storms(toPrelude, strings.Repeat("EHLO "+strings.Repeat("x", 400)+"\r\n", 20))},
	{"a prelude without a line's end", storms(toPrelude, strings.Repeat("x", 1<<16))},
	{"long requests", storms(toRedirect, "GET /"+strings.Repeat("x", 16<<10)+" HTTP/1.1\r\n")},
	{"handshakes", func(t *testing.T, e *edge, over chan struct{}) {
		config := clientConfig(t, func(c *tls.Config) { c.ClientSessionCache = tls.NewLRUClientSessionCache(1) })
		again(over, func() {
			c, err := net.DialTimeout("tcp", e.addr(toPlain), patience)
			if err != nil {
				return
			}
			s := tls.Client(c, config)
			if s.Handshake() == nil {
				_, _ = s.Write([]byte("x"))
				_, _ = s.Read(make([]byte, 1))
			}
			_ = c.Close()
		})
	}},
}

// again does something until that is over.
func again(over chan struct{}, do func()) {
	for {
		select {
		case <-over:
			return
		default:
			do()
		}
	}
}

// floods sends records of a size, of which readers of the echo take so many at a time; 0: none.
func floods(port, size, reads int) func(*testing.T, *edge, chan struct{}) {
	return func(t *testing.T, e *edge, over chan struct{}) {
		p := dialPenman(t, &e.bed, port, nil)
		defer p.Close()
		if reads > 0 {
			go func() { _, _ = io.Copy(io.Discard, p.TCPConn) }()
		}
		piece := make([]byte, size)
		again(over, func() {
			var b []byte
			for range max(reads, 1) {
				b = append(b, p.data(piece)...)
			}
			_ = p.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := p.TCPConn.Write(b); err != nil {
				<-over // half a record has gone: nothing more can follow
			}
		})
	}
}

// breaks sends records that cost its connection, again and again.
func breaks(port int, piece func(*penman) []byte) func(*testing.T, *edge, chan struct{}) {
	return func(t *testing.T, e *edge, over chan struct{}) {
		again(over, func() {
			p := dialPenman(t, &e.bed, port, func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 })
			defer p.Close()
			go func() { _, _ = io.Copy(io.Discard, p.TCPConn) }()
			for range 4000 {
				if _, err := p.TCPConn.Write(piece(p)); err != nil {
					return
				}
			}
		})
	}
}

// halves sends the beginning of a record, and the rest never.
func halves(port int) func(*testing.T, *edge, chan struct{}) {
	return func(t *testing.T, e *edge, over chan struct{}) {
		p := dialPenman(t, &e.bed, port, nil)
		defer p.Close()
		_, _ = p.TCPConn.Write(p.data(make([]byte, record.MaxPlaintext))[:record.MaxPlaintext])
		<-over
	}
}

// storms connects, says some words and resets the connection, again and again.
func storms(port int, words string) func(*testing.T, *edge, chan struct{}) {
	return func(t *testing.T, e *edge, over chan struct{}) {
		again(over, func() {
			c, err := net.DialTimeout("tcp", e.addr(port), patience)
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := io.WriteString(c, words); err == nil {
				_, _ = c.Read(make([]byte, 1<<10))
			}
			reset(c.(*net.TCPConn))
		})
	}
}

// drips sends a hello byte by byte: slowly, or each in a record of its own.
func drips(port int, records bool) func(*testing.T, *edge, chan struct{}) {
	return func(t *testing.T, e *edge, over chan struct{}) {
		hello := clientHello(t, nil)
		again(over, func() {
			c := e.dial(t, port)
			defer c.Close()
			for _, b := range hello[recordHeaderLen:] {
				piece := []byte{b}
				if records {
					piece = []byte{22, 3, 1, 0, 1, b}
				}
				select {
				case <-over:
					return
				default:
				}
				if _, err := c.Write(piece); err != nil {
					return
				}
				if !records {
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
}

const recordHeaderLen = 5

var senderTime = flag.Duration("senders", 200*time.Millisecond, "how long each peer of TestOneSenderHarmsNobody goes on; from a second on, others' times are compared with a limit")

// TestOneSenderHarmsNobody: whatever one peer sends, and for how long: beside it others are served, and after it nothing is
// left: no computing, no memory, no descriptor.
func TestOneSenderHarmsNobody(t *testing.T) {
	testkit.Needs(t, testkit.Slow)
	long := *senderTime >= time.Second
	backend, encrypted := echoServer(t), tlsEcho(t)
	e := runEdge(t, fmt.Sprintf(":{0} edge.test -> %[1]s\n:{1} edge.test -> tls://%[2]s backend-ca=root backend-name=edge.test\n:{2} edge.test -> %[1]s mode=pass\n"+
		":{3} -> %[1]s mode=tcp\n:{4} edge.test -> %[1]s starttls=smtp\n:{5} -> redirect", backend, encrypted),
		"LOOPS=1", "HELLO_TIMEOUT=1s", "IDLE_TIMEOUT=2s", "LINGER_TIMEOUT=2s", "BACKEND_CAS="+filepath.Dir(pki(t).rootFile(t)), "LOG_LEVEL=error", "MEMORY=64MB")
	neighbour := func() time.Duration {
		other := e.dialTLS(t, toPlain, nil)
		defer other.Close()
		return p99(echoTimes(t, other, func() bool { return false }))
	}
	for _, s := range senders { // what is needed once
		over := make(chan struct{})
		time.AfterFunc(20*time.Millisecond, func() { close(over) })
		s.send(t, e, over)
	}
	quiet := neighbour()
	sockets := e.restingSockets(t)
	memory := e.pss(t)
	for _, s := range senders {
		t.Run(s.name, func(t *testing.T) {
			over := make(chan struct{})
			var sending sync.WaitGroup
			sending.Go(func() { s.send(t, e, over) })
			beside := neighbour()
			time.Sleep(*senderTime)
			if long {
				beside = min(beside, neighbour()) // one of them may have met something else
			}
			close(over)
			sending.Wait()
			if n := settled(sockets, func() int { return e.restingSockets(t) }); n > sockets {
				t.Errorf("%d sockets are left", n-sockets)
			}
			if left := e.pss(t) - memory; left > 16<<20 {
				t.Errorf("%d KiB are left", left>>10)
			}
			cpu := e.cpu(t)
			time.Sleep(200 * time.Millisecond)
			if n := e.cpu(t) - cpu; n > 10*time.Millisecond {
				t.Errorf("it computes %v in the 0.2 s after", n)
			}
			if long && beside > 2*quiet+2*time.Millisecond {
				t.Errorf("p99 of an echo beside it %v, without it %v", beside, quiet)
			}
			t.Logf("p99 of an echo beside it %v, without it %v", beside, quiet)
		})
	}
}
