// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"

	"go.uber.org/zap"

	"github.com/tlsnat/tlsnat/gateway/config"
	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// lines is what a logger of the format writes.
func linesOf(t *testing.T, format string, write func(*zap.Logger)) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := newLineBuffer(w)
	write(newLogger(&config.Settings{LogFormat: format, LogLevel: "info"}, b))
	b.close()
	w.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestLinesAreOfPrintableText: no field, whatever its type, brings anything to a terminal or a line to its end.
func TestLinesAreOfPrintableText(t *testing.T) {
	evil := "pay\u202e\u009b2J\x1b]0;x\x07\r\n{\"msg\":\"forged\"}\u2028"
	for _, format := range []string{"json", "console"} {
		text := linesOf(t, format, func(l *zap.Logger) {
			l.Info("connection "+evil, zap.String("sni", evil), zap.Error(errors.New(evil)), zap.Strings("all", []string{evil}), zap.Any("any", evil))
			l.With(zap.String("with", evil)).Warn("x")
		})
		if strings.Count(text, "\n") != 2 {
			t.Errorf("%s: %d lines in %q", format, strings.Count(text, "\n"), text)
		}
		for _, r := range text {
			if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
				t.Errorf("%s: %q in %q", format, r, text)
				break
			}
		}
	}
}

// TestLinesAreBounded: a name of 63 KB takes no more of the buffer than others do.
func TestLinesAreBounded(t *testing.T) {
	long := strings.Repeat("x", 63<<10)
	text := linesOf(t, "json", func(l *zap.Logger) {
		l.Info("connection", zap.String("sni", long), zap.String("alpn", long), zap.Error(errors.New(long)))
	})
	if len(text) > 4*maxField || !strings.Contains(text, "…") {
		t.Errorf("%d bytes", len(text))
	}
}

// TestLinesThatAreNotWrittenAreCounted, on a disk that is full, and said when there is room again.
func TestLinesThatAreNotWrittenAreCounted(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		testkit.Missing(t, "%v", err)
	}
	defer full.Close()
	b := newLineBuffer(full)
	for range 5 {
		_, _ = b.Write([]byte("a line\n"))
	}
	b.close()
	if n := b.dropped.Load(); n != 5 {
		t.Errorf("%d lines were lost, want 5", n)
	}
}

// torn takes some bytes of the first batch, then it fails once, then it takes all.
type torn struct {
	takes int
	fails int
	text  strings.Builder
}

func (w *torn) Write(p []byte) (int, error) {
	if w.fails > 0 {
		w.fails--
		n := min(w.takes, len(p))
		w.takes = 0
		w.text.Write(p[:n])
		return n, errors.New("no space left on device")
	}
	return w.text.Write(p)
}

// TestTornLineIsEnded: what is written behind half a line begins a line of its own, and the loss is told.
func TestTornLineIsEnded(t *testing.T) {
	w := &torn{takes: 9, fails: 2} // "line 1\nli" of the first, nothing of the second batch
	b := newLineBuffer(io.Discard)
	b.close()
	var told []uint64
	b.out, b.lost = w, func(n uint64) { told = append(told, n) }
	for _, batch := range []string{"line 1\nline 2\nline 3\n", "line 4\n", "line 5\n"} {
		if b.flush([]byte(batch)) {
			b.tell()
		}
	}
	if got, want := w.text.String(), "line 1\nli\nline 5\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if n := b.dropped.Load(); n != 3 || len(told) != 1 || told[0] != 3 {
		t.Errorf("%d lost, told %v, want 3", n, told)
	}
}

// TestHungReaderIsNotWaitedFor when the gateway ends.
func TestHungReaderIsNotWaitedFor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	b := newLineBuffer(w)
	_, _ = b.Write(make([]byte, 1<<20)) // more than a pipe holds
	began := time.Now()
	b.close()
	if took := time.Since(began); took < LastLines || took > LastLines+30*time.Second {
		t.Errorf("it took %s, want %s", took, LastLines)
	}
}
