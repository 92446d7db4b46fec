// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"io"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// TestWireHandsOutOneRecordAtATime: no read goes beyond the record in progress, however large its buffer is, and a long record
// of handshake messages comes as several with the same bytes in them. After a ChangeCipherSpec records are as they came.
func TestWireHandsOutOneRecordAtATime(t *testing.T) {
	rec := func(kind byte, n int) []byte {
		return append([]byte{kind, 3, 3, byte(n >> 8), byte(n)}, bytes.Repeat([]byte{kind}, n)...)
	}
	hello, short, change, finished := rec(record.TypeHandshake, 3*longestPiece+7), rec(record.TypeHandshake, longestPiece), rec(record.TypeChangeCipherSpec, 1), rec(record.TypeHandshake, 2*longestPiece)
	came := bytes.Join([][]byte{hello, short, change, finished, rec(record.TypeData, 20)}, nil)
	want := bytes.Join([][]byte{rec(record.TypeHandshake, longestPiece), rec(record.TypeHandshake, longestPiece), rec(record.TypeHandshake, longestPiece), rec(record.TypeHandshake, 7),
		short, change, finished, rec(record.TypeData, 20)}, nil)
	for _, size := range []int{1, 3, 5, 6, 511, 1 << 16} {
		w := &wire{buf: bytes.Clone(came)}
		w.in.begin(shortRecord)
		var got []byte
		for p := make([]byte, size); ; {
			n := w.take(p)
			if n == 0 {
				break
			}
			if whole := len(got) + n; n > recordHeader && (size == 1<<16) && !bytes.HasPrefix(want[len(got):], p[:n]) {
				t.Fatalf("a read up to %d is not of one record", whole)
			}
			got = append(got, p[:n]...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("reads of %d: %d bytes, want %d", size, len(got), len(want))
		}
		if w.in.behind != 2 || w.in.record.got != 0 {
			t.Errorf("reads of %d: %d records counted after the ChangeCipherSpec", size, w.in.behind)
		}
	}
	w := &wire{buf: bytes.Clone(came)}
	w.in.begin(shortRecord)
	if n, err := w.Read(make([]byte, 1<<16)); err != nil || n != recordHeader {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := io.ReadFull(w, make([]byte, longestPiece)); err != nil || n != longestPiece {
		t.Errorf("%d, %v", n, err)
	}
}
