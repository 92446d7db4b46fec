// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestWhatCameDuringAPauseCounts: the process stands still for longer than its timeouts, and meanwhile clients go on. What
// they have sent is carried, however many they are and wherever in their story; those that were silent end.
func TestWhatCameDuringAPauseCounts(t *testing.T) {
	beside(t)
	timeout := 2 * time.Second
	if raceEnabled {
		timeout *= 4 // 150 streams begin within it
	}
	half := serve(t, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, c) // until the client's end; the answer comes later
		time.Sleep(timeout / 2)
		_, _ = io.WriteString(c, "late")
	})
	e := runEdge(t, fmt.Sprintf(":{0} edge.test -> %[1]s idle=1m\n:{1} -> %[1]s mode=tcp\n:{2} edge.test -> %[1]s mode=pass\n:{3} -> %[2]s mode=tcp", echoServer(t), half),
		"IDLE_TIMEOUT="+timeout.String(), "HELLO_TIMEOUT="+timeout.String(), "LINGER_TIMEOUT="+timeout.String(), "LOOPS=1")
	hello := clientHello(t, nil)
	streams := make([]net.Conn, 150) // more than one look at the poller tells of
	for i := range streams {
		streams[i] = e.dial(t, 1)
		exchange(t, streams[i], []byte("before"))
	}
	silent := e.dial(t, 1)
	exchange(t, silent, []byte("before"))
	mute, begun, answered := e.dial(t, 2), e.dial(t, 2), e.dial(t, 3)
	_, _ = begun.Write(hello[:100])
	_ = answered.CloseWrite()
	shaking := &heldBack{Conn: e.dial(t, 0), hold: make(chan struct{}), held: make(chan struct{})}
	shook := make(chan error, 1)
	go func() {
		c := tls.Client(shaking, clientConfig(t, nil))
		if err := c.Handshake(); err != nil {
			shook <- err
			return
		}
		shook <- trade(c, []byte("after the pause"))
	}()
	<-shaking.held
	e.signal(t, syscall.SIGSTOP)
	close(shaking.hold)
	for _, c := range streams {
		_, _ = io.WriteString(c, "x")
	}
	_, _ = mute.Write(hello)
	_, _ = begun.Write(hello[100:])
	time.Sleep(timeout + timeout/2)
	e.signal(t, syscall.SIGCONT)
	for i, c := range streams {
		if b, err := readByte(c); err != nil || b != 'x' {
			t.Fatalf("stream %d of %d: %q, %v", i, len(streams), b, err)
		}
	}
	for what, c := range map[string]net.Conn{"a whole hello": mute, "the rest of a hello": begun} {
		if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil { // the echo
			t.Errorf("%s came during the pause: %v", what, err)
		}
	}
	if b, err := io.ReadAll(answered); err != nil || string(b) != "late" {
		t.Errorf("the answer that came during the pause is %q, %v", b, err)
	}
	if err := <-shook; err != nil {
		t.Errorf("a handshake whose answer came during the pause: %v; %s", err, e.lineOf(t, shaking.Conn))
	}
	e.lineOf(t, silent).expect(t, logLine{Outcome: "idle"})
}

// heldBack is a client's connection whose second message waits for a word.
type heldBack struct {
	net.Conn
	wrote      sync.Once
	said       bool
	hold, held chan struct{}
}

func (c *heldBack) Write(b []byte) (int, error) {
	if c.said {
		c.wrote.Do(func() { close(c.held) })
		<-c.hold
	}
	c.said = true
	return c.Conn.Write(b)
}

func readByte(c net.Conn) (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	return b[0], err
}
