// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"io"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newLogger writes lines as the settings say, through a buffer: a loop that ends a connection must not wait for a
// disk or a pipe.
func newLogger(s *Settings, out *lineBuffer) *zap.Logger {
	level, err := zapcore.ParseLevel(s.LogLevel)
	if err != nil {
		level = zapcore.InfoLevel
	}
	enc := zap.NewProductionEncoderConfig()
	enc.TimeKey, enc.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(enc)
	if s.LogFormat == "console" {
		enc.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(enc)
	}
	return zap.New(zapcore.NewCore(encoder, out, level))
}

// Logger is the gateway's log, for what its owner has to say. It ends with Drain.
func (g *Gateway) Logger() *zap.Logger { return g.log }

// lineBuffer takes lines without waiting and writes them from a goroutine of its own. Lines that find it full are
// dropped, and counted.
type lineBuffer struct {
	out     io.Writer
	mu      sync.Mutex
	some    sync.Cond
	pending []byte
	writing bool
	closed  bool
	idle    []byte // the other half of the double buffer
	done    chan struct{}
	dropped atomic.Uint64
}

// What may wait to be written: a minute of a thousand lines a second would be 30 MB, a disk that hangs for longer
// than a few seconds is given up on.
const pendingLines = 8 << 20

func newLineBuffer(out io.Writer) *lineBuffer {
	b := &lineBuffer{out: out, done: make(chan struct{})}
	b.some.L = &b.mu
	go b.run()
	return b
}

// Write takes a line.
func (b *lineBuffer) Write(line []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || len(b.pending)+len(line) > pendingLines {
		b.dropped.Add(1)
		return len(line), nil
	}
	b.pending = append(b.pending, line...)
	if !b.writing {
		b.some.Signal()
	}
	return len(line), nil
}

// Sync is for zap, which calls it before it ends the process.
func (b *lineBuffer) Sync() error { return nil }

func (b *lineBuffer) run() {
	defer close(b.done)
	b.mu.Lock()
	for {
		for len(b.pending) == 0 && !b.closed {
			b.writing = false
			b.some.Wait()
		}
		if len(b.pending) == 0 {
			b.mu.Unlock()
			return
		}
		b.writing = true
		batch := b.pending
		b.pending, b.idle = b.idle[:0], nil
		b.mu.Unlock()
		_, _ = b.out.Write(batch) // nobody is left to complain to
		b.mu.Lock()
		const worthKeeping = 256 << 10
		if cap(batch) <= worthKeeping {
			b.idle = batch[:0]
		}
	}
}

// close writes what is pending and ends.
func (b *lineBuffer) close() {
	b.mu.Lock()
	b.closed = true
	b.some.Signal()
	b.mu.Unlock()
	<-b.done
}
