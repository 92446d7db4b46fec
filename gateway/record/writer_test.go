// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"testing"
)

func TestSlotHasRoomForEveryVersion(t *testing.T) {
	for suite, want := range map[uint16][2]int{suite13: {5, 17}, suite12: {13, 16}, suiteChaCha: {5, 16}} {
		var w Writer
		w.Init(testKeys(t, suite), 0)
		if got := [2]int{w.Prefix(), w.Suffix()}; got != want {
			t.Errorf("%s: prefix and suffix %v, want %v", tls.CipherSuiteName(suite), got, want)
		}
		var r Reader
		r.Init(testKeys(t, suite), 0, Server)
		if got := r.Overhead(); got != want[0]+want[1] {
			t.Errorf("%s: a record that is read has %d bytes beside its data, one that is written %v", tls.CipherSuiteName(suite), got, want)
		}
	}
}

func TestSealStaysInItsSlot(t *testing.T) {
	for _, suite := range fastSuites {
		for _, n := range []int{0, 1, 1400, MaxPlaintext} {
			var w Writer
			w.Init(testKeys(t, suite), 0)
			size := w.Prefix() + n + w.Suffix()
			buf := bytes.Repeat([]byte{0xee}, size+100)
			if got := w.Seal(buf, n); got != size {
				t.Fatalf("%d bytes became a record of %d, want %d", n, got, size)
			}
			if !bytes.Equal(buf[size:], bytes.Repeat([]byte{0xee}, 100)) {
				t.Fatalf("sealing %d bytes wrote behind the record", n)
			}
		}
	}
}

func TestShortSlotPanics(t *testing.T) {
	for name, f := range map[string]func(w *Writer){
		"a byte too short": func(w *Writer) { w.Seal(make([]byte, 5+10+16), 10) },
		"a byte too much":  func(w *Writer) { w.Seal(make([]byte, 1<<15), MaxPlaintext+1) },
		"a negative size":  func(w *Writer) { w.Seal(make([]byte, 100), -1) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("a slot of the wrong size was sealed")
				}
			}()
			var w Writer
			w.Init(testKeys(t, suite13), 0)
			f(&w)
		})
	}
}

func TestKeyUpdateIsDueBeforeTheLimit(t *testing.T) {
	var w Writer
	w.Init(testKeys(t, suite13), updateAfter-1)
	if w.UpdateDue() {
		t.Error("due too early")
	}
	sealData(&w, nil)
	if !w.UpdateDue() {
		t.Error("not due after 2^24 records")
	}
	if len(w.AppendKeyUpdate(nil, true)) == 0 || w.UpdateDue() {
		t.Error("still due after the update")
	}
	w.Init(testKeys(t, suite12), 1<<40)
	if w.UpdateDue() || len(w.AppendKeyUpdate(nil, true)) != 0 {
		t.Error("TLS 1.2 updates its keys")
	}
}

func TestNothingIsSealedAfterTheLastAlert(t *testing.T) {
	for _, suite := range fastSuites {
		for a, goesOn := range map[Alert]bool{AlertCloseNotify: false, AlertBadRecordMAC: false, AlertUserCanceled: true} {
			var w Writer
			w.Init(testKeys(t, suite), 0)
			out := w.AppendAlert([]byte("before"), a)
			if !bytes.HasPrefix(out, []byte("before")) || len(out) == len("before") {
				t.Fatalf("appending %v gives %q", a, out)
			}
			if got := w.Seal(make([]byte, 100), 1) > 0; got != goesOn {
				t.Errorf("after %v sealing goes on: %v", a, got)
			}
			if got := len(w.AppendAlert(nil, AlertCloseNotify)) > 0; got != goesOn {
				t.Errorf("after %v alerts go on: %v", a, got)
			}
		}
	}
}

func TestAlertLevelsAreThoseOfTheRFC(t *testing.T) {
	for _, suite := range []uint16{suite13, suite12} {
		for a, level := range map[Alert]byte{0: 1, 90: 1, 100: 2, 10: 2, 20: 2, 22: 2, 80: 2} {
			var w Writer
			w.Init(testKeys(t, suite), 0)
			rec := w.AppendAlert(nil, a)
			r, _ := pair(t, suite, Server)
			_, p, err := r.plaintext(rec)
			if err != nil || !bytes.Equal(p, []byte{level, byte(a)}) {
				t.Errorf("%v is sent as %v, %v", a, p, err)
			}
		}
	}
}

func TestNoAllocationPerRecord(t *testing.T) {
	for _, suite := range fastSuites {
		t.Run(tls.CipherSuiteName(suite), func(t *testing.T) {
			var r Reader
			var w Writer
			r.Init(testKeys(t, suite), 0, Server)
			w.Init(testKeys(t, suite), 0)
			slot := make([]byte, w.Prefix()+1400+w.Suffix())
			alerts := make([]byte, 0, 64)
			allocs := testing.AllocsPerRun(100, func() {
				n := w.Seal(slot, 1400)
				if rec, took, err := r.Next(slot[:n]); err != nil || took != n || len(rec.Data) != 1400 {
					t.Fatal(took, err)
				}
				alerts = w.AppendAlert(alerts[:0], AlertUserCanceled)
				if rec, _, err := r.Next(alerts); err != nil || rec.Kind != Ignored {
					t.Fatal(rec, err)
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations for a record", allocs)
			}
		})
	}
}
