// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"errors"
	"testing"
)

// handedOver is a Writer and the Reader of its peer, some records into a connection.
func handedOver(t *testing.T, suite uint16) (*Writer, *Reader) {
	t.Helper()
	k := Keys{suite: suite}
	k.setSecret(bytes.Repeat([]byte{7}, specs[suite].hashLen))
	w, r := new(Writer), new(Reader)
	w.Init(k, 0)
	r.Init(k, 0, Server)
	for range 3 {
		next(t, r, sealed(w, []byte("before")))
	}
	return w, r
}

func sealed(w *Writer, p []byte) []byte {
	slot := make([]byte, w.Prefix()+len(p)+w.Suffix())
	copy(slot[w.Prefix():], p)
	return slot[:w.Seal(slot, len(p))]
}

func next(t *testing.T, r *Reader, b []byte) Record {
	t.Helper()
	rec, n, err := r.Next(b)
	if err != nil || n != len(b) {
		t.Fatalf("took %d of %d bytes: %v", n, len(b), err)
	}
	return rec
}

// TestExportGoesOnWhereTheWriterWas: another engine that has the exported keys writes what the peer expects, and after
// Follow the key is nowhere in the Writer any more.
func TestExportGoesOnWhereTheWriterWas(t *testing.T) {
	w, r := handedOver(t, tls.TLS_AES_256_GCM_SHA384)
	k, seq := w.Export()
	w.Follow()
	if w.keys.key != [maxKeyLen]byte{} || w.keys.iv != [ivLen]byte{} || w.aead != nil {
		t.Error("the Writer still has its key")
	}
	var other Writer
	other.Init(k, seq)
	if rec := next(t, r, sealed(&other, []byte("after"))); string(rec.Data) != "after" {
		t.Errorf("read %q", rec.Data)
	}
	w.Carried(1)

	next(t, r, other.append(nil, TypeHandshake, msgKeyUpdate, 0, 0, 1, 0))
	w.Update()
	k, seq = w.Export()
	other.Init(k, seq)
	if rec := next(t, r, sealed(&other, []byte("renewed"))); string(rec.Data) != "renewed" || seq != 0 {
		t.Errorf("read %q, first record %d", rec.Data, seq)
	}
}

// TestJudgeHasTheBudgetsOfNext: whoever opens the records, floods end after as many.
func TestJudgeHasTheBudgetsOfNext(t *testing.T) {
	for _, c := range []struct {
		name  string
		typ   byte
		p     []byte
		free  int
		every int // bytes of data between them
	}{
		{"empty records", TypeData, nil, maxUseless, 0},
		{"key updates in a row", TypeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 0}, updateCredit / updatePrice, 0},
		{"key updates between bytes", TypeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 1}, updateCredit / updatePrice, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, r := handedOver(t, tls.TLS_AES_128_GCM_SHA256)
			r.Follow()
			for i := range c.free {
				if _, err := r.Judge(c.typ, c.p); err != nil {
					t.Fatalf("record %d: %v", i, err)
				}
				if c.every > 0 {
					r.Carried(c.every)
				}
			}
			_, err := r.Judge(c.typ, c.p)
			if e, ok := errors.AsType[*Error](err); !ok || e.Alert != AlertUnexpectedMessage {
				t.Fatalf("one more: %v", err)
			}
			if _, err := r.Judge(c.typ, c.p); err != ErrClosed {
				t.Errorf("after that: %v", err)
			}
		})
	}
}

// TestUsedUpKeysAreTold: before the limit of AES-GCM, and never for a cipher that has none.
func TestUsedUpKeysAreTold(t *testing.T) {
	for suite, want := range map[uint16]bool{tls.TLS_AES_128_GCM_SHA256: true, tls.TLS_CHACHA20_POLY1305_SHA256: false,
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256: false} {
		var w Writer
		w.Init(Keys{suite: suite}, 0)
		w.Carried(updateAfter)
		if due := w.UpdateDue(); due != w.tls13 || w.UsedUp() {
			t.Errorf("%#x after 2^24 records: due %v, used up %v", suite, due, w.UsedUp())
		}
		w.Carried(overAfter - updateAfter)
		if w.UsedUp() != want {
			t.Errorf("%#x after 2^24.5 records: used up %v", suite, w.UsedUp())
		}
	}
}
