// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"io"
	"net"
	"testing"
	"time"
)

// TestTimersOfARuleEndItsConnections, where the rule has other ones than the settings: idle= when nothing moves, linger=
// when nothing moves and one side has ended its stream, lifetime= whatever moves.
func TestTimersOfARuleEndItsConnections(t *testing.T) {
	silent := serve(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c); <-t.Context().Done() })
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp idle=400ms\n:{1} -> "+silent+" mode=tcp linger=400ms\n:{2} -> "+echoServer(t)+" mode=tcp lifetime=400ms\n"+
		":{3} -> "+echoServer(t)+" mode=tcp", "IDLE_TIMEOUT=1h", "LINGER_TIMEOUT=1h")
	idle, half, busy, others := b.dial(t, 0), b.dial(t, 1), b.dial(t, 2), b.dial(t, 3)
	exchange(t, others, []byte("the settings' timers"))
	exchange(t, idle, []byte("then silence"))
	_, _ = half.Write([]byte("then the end"))
	_ = half.CloseWrite()
	for trade(busy, []byte("again and again")) == nil {
		time.Sleep(time.Millisecond) // so that it is not a stream
	}
	for _, c := range []*net.TCPConn{idle, half} {
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	for c, outcome := range map[*net.TCPConn]string{idle: "idle", half: "idle", busy: "lifetime"} {
		l := b.lineOf(t, c)
		l.expect(t, logLine{Outcome: outcome})
		if l.DurationMS < 400 {
			t.Errorf("too early: %s", l)
		}
	}
	exchange(t, others, []byte("still there"))
}
