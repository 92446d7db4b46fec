// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/printable"
)

// newLogger writes lines as the settings say, through a buffer: a loop that ends a connection must not wait for a
// disk or a pipe.
func newLogger(s *config.Settings, out *lineBuffer) *zap.Logger {
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
	return zap.New(printableCore{zapcore.NewCore(encoder, out, level)})
}

const (
	// What a field of a line may have: a name has 253 bytes (RFC 1035, section 2.3.4), an error names two or three of them,
	// and what is kept of a load balancer's TLVs has twice tlvLimit in hexadecimal. Without a bound one client's lines would
	// push everybody else's out of the buffer.
	maxField = 2 * tlvLimit
	// A message is our own text, and may have a path and a line of the map in it.
	maxMessage = 4096
)

// printableCore has every line say in printable text, and not too much of it, what strangers have written. The lines' own
// encoding escapes what JSON asks for and no more.
type printableCore struct{ zapcore.Core }

func (c printableCore) With(fields []zap.Field) zapcore.Core {
	return printableCore{c.Core.With(fields)}
}

func (c printableCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c printableCore) Write(e zapcore.Entry, fields []zap.Field) error {
	e.Message = printable.Text(e.Message, maxMessage)
	for i := range fields {
		switch f := &fields[i]; {
		case f.Type == zapcore.ErrorType:
			if err, ok := f.Interface.(error); ok && err != nil {
				*f = zap.String(f.Key, printable.Text(err.Error(), maxField))
			}
		case f.Type == zapcore.StringType && f.Key != stackField:
			f.String = printable.Text(f.String, maxField)
		}
	}
	return c.Core.Write(e, fields)
}

// stackField is a panic's stack: our own, of many lines.
const stackField = "stack"

// Logger is the gateway's log, for what its owner has to say. It ends with Drain.
func (g *Gateway) Logger() *zap.Logger { return g.log }

// lineBuffer takes lines without waiting and writes them from a goroutine of its own. A line that finds it full, or that
// can't be written, is lost and counted; when lines are written again the log says how many there were.
type lineBuffer struct {
	out     io.Writer
	lost    func(lines uint64) // logs that
	mu      sync.Mutex
	some    sync.Cond
	pending []byte
	writing bool
	closed  bool
	torn    bool   // the last line that was written has no end
	idle    []byte // the other half of the double buffer
	done    chan struct{}
	dropped atomic.Uint64
	told    uint64 // of dropped, what lost was told
}

const (
	// What may wait to be written: a minute of a thousand lines a second would be 30 MB, a disk that hangs for longer
	// than a few seconds is given up on.
	pendingLines = 8 << 20
	// LastLines is how long the end waits for the last lines to be written. A reader that is merely slow takes a pipe's
	// 64 KiB in no time; one that hangs must not keep the process from ending.
	LastLines = 2 * time.Second
)

func newLineBuffer(out io.Writer) *lineBuffer {
	b := &lineBuffer{out: out, lost: func(uint64) {}, done: make(chan struct{})}
	b.some.L = &b.mu
	go b.run()
	return b
}

// Write takes a line.
func (b *lineBuffer) Write(line []byte) (int, error) {
	text := printable.JSON(line)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || len(b.pending)+len(text) > pendingLines {
		b.dropped.Add(1)
		return len(line), nil
	}
	b.pending = append(b.pending, text...)
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
		if b.flush(batch) {
			b.tell()
		}
		b.mu.Lock()
		const worthKeeping = 256 << 10
		if cap(batch) <= worthKeeping {
			b.idle = batch[:0]
		}
	}
}

// flush writes lines, and counts those that it can't write: on a full disk, to a reader that is gone.
func (b *lineBuffer) flush(batch []byte) bool {
	if b.torn {
		if _, err := b.out.Write([]byte{'\n'}); err != nil {
			b.dropped.Add(uint64(bytes.Count(batch, []byte{'\n'})))
			return false
		}
		b.torn = false
	}
	n, err := b.out.Write(batch)
	if err == nil {
		return true
	}
	n = max(0, min(n, len(batch)))
	b.torn = n > 0 && batch[n-1] != '\n'
	b.dropped.Add(uint64(bytes.Count(batch[n:], []byte{'\n'})))
	return false
}

// tell logs how many lines were lost since it was logged last.
func (b *lineBuffer) tell() {
	if n := b.dropped.Load(); n != b.told {
		b.lost(n - b.told)
		b.told = n
	}
}

// close writes what is pending and ends, or gives up when nobody reads it.
func (b *lineBuffer) close() {
	b.mu.Lock()
	b.closed = true
	b.some.Signal()
	b.mu.Unlock()
	select {
	case <-b.done:
	case <-time.After(LastLines):
	}
}
