// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// dice are the fuzzer's bytes, drawn one decision at a time; they end in zeros.
type dice struct{ b []byte }

func (d *dice) byte() byte {
	if len(d.b) == 0 {
		return 0
	}
	x := d.b[0]
	d.b = d.b[1:]
	return x
}

// size is up to limit, the small and the largest ones being likelier.
func (d *dice) size(limit int) int {
	x := d.byte()
	n := int(x&0x3f)<<8 | int(d.byte())
	switch x >> 6 {
	case 0:
		n &= 0x0f
	case 1:
		n &= 0xff
	case 2:
		n = max(limit-n&0x0f, 0)
	}
	return min(n, limit)
}

func (d *dice) bytes(limit int) []byte {
	n := min(d.size(limit), len(d.b))
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

// suiteAndRole is one of the twelve combinations.
func (d *dice) suiteAndRole() (uint16, Role) {
	x := d.byte()
	return fastSuites[int(x>>1)%len(fastSuites)], Role(x & 1)
}

// openInPieces gives b to r in pieces of the fuzzer's sizes, keeping what is left of a record as a
// caller would, and holds Need and Next to each other.
func openInPieces(t *testing.T, r *Reader, d *dice, b []byte) (data []byte) {
	t.Helper()
	var buf []byte
	for len(b) > 0 {
		n := len(b)
		if len(d.b) > 0 {
			n = min(max(d.size(MaxRecord), 1), n)
		}
		buf = append(buf, b[:n]...)
		b = b[n:]
		if d.byte()&7 == 0 {
			r.Park()
		}
		got, _, rest, err := openAll(r, buf)
		if err != nil {
			t.Fatal(err)
		}
		if need := r.Need(rest); need <= len(rest) || need > MaxRecord {
			t.Fatalf("%d bytes are left unopened, but %d are needed", len(rest), need)
		}
		data, buf = append(data, got...), bytes.Clone(rest)
	}
	if len(buf) > 0 {
		t.Fatalf("%d bytes were never opened", len(buf))
	}
	return data
}

// What crypto/tls seals, split anywhere, comes out the same.
func FuzzOpenAgainstCryptoTLS(f *testing.F) {
	f.Fuzz(func(t *testing.T, script []byte) {
		d := &dice{script}
		suite, role := d.suiteAndRole()
		s := dial(t, suite, role)
		var want []byte
		for range 1 + d.byte()&7 {
			if isTLS13(suite) && d.byte()&3 == 0 { // the peer answers with a KeyUpdate of its own
				s.out.write(s.w.AppendKeyUpdate(nil, true))
				s.send([]byte{1}, 1)
				s.expect([]byte{1})
			}
			part := pattern(d.size(3 * MaxPlaintext))
			want = append(want, part...)
			s.peer.Write(part)
		}
		if got := openInPieces(t, &s.r, d, s.in.rest()); !bytes.Equal(got, want) {
			t.Fatalf("crypto/tls sealed %d bytes, %d others came out", len(want), len(got))
		}
	})
}

// What we seal, crypto/tls reads.
func FuzzSealIsReadByCryptoTLS(f *testing.F) {
	f.Fuzz(func(t *testing.T, script []byte) {
		d := &dice{script}
		suite, role := d.suiteAndRole()
		s := dial(t, suite, role)
		var want []byte
		for range 1 + d.byte()%7 { // a ticket, seven KeyUpdates and seven empty records: crypto/tls takes 16 without data
			switch d.byte() & 7 {
			case 0:
				s.w.Park()
			case 1:
				s.out.write(s.w.AppendKeyUpdate(nil, d.byte()&1 == 1))
			}
			part := pattern(d.size(2 * MaxPlaintext))
			want = append(want, part...)
			s.send(part, max(d.size(MaxPlaintext), 1+len(part)/8))
		}
		s.out.write(s.w.AppendAlert(nil, AlertCloseNotify))
		got, err := io.ReadAll(s.peer)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes sealed, %d read: %v", len(want), len(got), err)
		}
	})
}

// open∘seal = id, with padding that a Writer would not add, split anywhere.
func FuzzSealOpen(f *testing.F) {
	f.Fuzz(func(t *testing.T, script []byte) {
		d := &dice{script}
		suite, role := d.suiteAndRole()
		r, h := pair(t, suite, role)
		var w Writer
		w.Init(testKeys(t, suite), 0)
		var want, wire []byte
		for range 1 + d.byte()&15 {
			content := pattern(d.size(MaxPlaintext))
			if d.byte()&1 == 1 {
				content = make([]byte, len(content)) // zeros, so that padding is not told by its value
			}
			padding := 0
			if d.byte()&3 == 0 {
				padding = d.size(MaxPlaintext - len(content))
			}
			rec := forgeContent(h, TypeData, content, padding)
			if own := sealData(&w, content); padding == 0 && !bytes.Equal(own, rec) {
				t.Fatalf("Seal and the test's sealer differ on %d bytes", len(content))
			}
			want, wire = append(want, content...), append(wire, rec...)
		}
		if got := openInPieces(t, r, d, wire); !bytes.Equal(got, want) {
			t.Fatalf("sealed %d bytes, opened %d others", len(want), len(got))
		}
	})
}

// verdict is how a stream of records ended: what came out, and why no more.
type verdict struct {
	data   []byte
	end    string // "open", "close_notify", "alert …" or "refused"
	strict bool   // refused for something that the other one may let pass
	ticket bool   // something of a ticket was skipped, which crypto/tls reads and may not like
}

// Forged records under the right keys: the Reader's verdict is crypto/tls's. It may only be stricter,
// for the reasons in forgeOne and strictReason, and it does not read tickets.
func FuzzHostileRecords(f *testing.F) {
	f.Fuzz(func(t *testing.T, script []byte) {
		d := &dice{script}
		suite, role := d.suiteAndRole()
		s := dial(t, suite, 1-role) // crypto/tls has the role under test
		var h half
		h.init(s.writeKeys, s.writeSeq)
		var r Reader
		r.Init(s.writeKeys, s.writeSeq, role)
		ours := hostile(d, &r, &h, s.out)
		s.out.finish()
		theirs := cryptoTLSVerdict(s.peer)
		if ours.strict && bytes.HasPrefix(theirs.data, ours.data) || theirs.strict && bytes.HasPrefix(ours.data, theirs.data) ||
			ours.ticket && theirs.end == "refused" && bytes.HasPrefix(ours.data, theirs.data) {
			return
		}
		if ours.end != theirs.end || !bytes.Equal(ours.data, theirs.data) {
			t.Fatalf("ours: %q and %d bytes; crypto/tls: %q and %d bytes", ours.end, len(ours.data), theirs.end, len(theirs.data))
		}
	})
}

// hostile forges records, one after the other, for out and for r.
func hostile(d *dice, r *Reader, h *half, out *queue) (v verdict) {
	v.end = "open"
	for len(d.b) > 0 {
		rec, lenient := forgeOne(d, h)
		out.write(rec)
		data, events, _, err := openAll(r, bytes.Clone(rec))
		v.data = append(v.data, data...)
		if err != nil {
			v.end, v.strict = "refused", lenient || strictReason(err)
			return v
		}
		for _, e := range events {
			switch e.Kind {
			case KeyUpdate, KeyUpdateRequested:
				h.advance()
			case CloseNotify:
				v.end = "close_notify"
				return v
			case AlertReceived:
				v.end = "alert " + tls.AlertError(e.Alert).Error()
				return v
			case Ignored:
				v.ticket = v.ticket || h.tls13 && e.Alert == 0
			}
		}
	}
	return v
}

// forgeOne makes one record. lenient tells that crypto/tls is known to let it pass where RFC 8446
// does not.
func forgeOne(d *dice, h *half) (rec []byte, lenient bool) {
	kind := d.byte()
	types := []byte{TypeData, TypeData, TypeAlert, TypeHandshake, TypeHandshake, TypeChangeCipherSpec, d.byte()}
	typ := types[int(kind)%len(types)]
	content := d.bytes(300)
	switch kind >> 4 {
	case 0: // as it is
		rec = forgeContent(h, typ, content, 0)
	case 1:
		rec = forgeContent(h, typ, content, min(d.size(MaxPlaintext), MaxPlaintext-len(content)))
	case 2: // as long as can be, or too long
		rec = forgeContent(h, typ, pattern(MaxPlaintext-2+int(d.byte()&3)), 0)
	case 3: // any inner plaintext, also none
		rec = forge(h, TypeData, content)
		lenient = len(content) == 0
	case 4: // a header of one's own
		rec = forgeContent(h, typ, content, 0)
		rec[d.byte()%3] = d.byte()
	case 5:
		rec = forgeContent(h, typ, content, 0)
		rec[headerLen+int(d.byte())%(len(rec)-headerLen)] ^= 1 | d.byte()
	default: // likely ones
		likely := [][]byte{
			{msgKeyUpdate, 0, 0, 1, 0}, {msgKeyUpdate, 0, 0, 1, 1}, {msgKeyUpdate, 0, 0, 1, 2},
			{msgKeyUpdate, 0, 0}, {1, 1}, {0}, {msgHelloRequest, 0, 0, 0},
		}
		rec = forgeContent(h, TypeHandshake, likely[int(d.byte())%len(likely)], 0)
	}
	// crypto/tls ignores change_cipher_spec in TLS 1.3 for good, inside and outside; RFC 8446 5 refuses
	// it after the handshake.
	lenient = lenient || rec[0] == TypeChangeCipherSpec || h.tls13 && typ == TypeChangeCipherSpec
	return rec, lenient
}

// strictReason tells the refusals that crypto/tls comes to later, if at all: it waits for the whole of
// a handshake message before it looks at the type, takes messages behind a KeyUpdate, and counts
// messages where we count records.
func strictReason(err error) bool {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return false
	}
	for _, reason := range []string{"handshake message", "key_update:", "new_session_ticket:", "more than", "renegotiat"} {
		if bytes.Contains([]byte(e.Reason), []byte(reason)) {
			return true
		}
	}
	return false
}

func cryptoTLSVerdict(c *tls.Conn) (v verdict) {
	var err error
	v.data, err = io.ReadAll(c)
	op, isOp := errors.AsType[*net.OpError](err)
	switch {
	case err == nil:
		v.end = "close_notify"
	case errors.Is(err, errDrained):
		v.end = "open"
	case isOp && op.Op == "remote error":
		v.end = "alert " + op.Err.Error()
	case err.Error() == "tls: too many ignored records", err.Error() == "tls: too many non-advancing records":
		v.end, v.strict = "refused", true // after 16, which is fewer than other peers send
	default:
		v.end = "refused"
	}
	return v
}

// A fuzz target without seeds runs nothing in an ordinary test.
func TestEveryFuzzTargetHasSeeds(t *testing.T) {
	for _, name := range []string{"FuzzOpenAgainstCryptoTLS", "FuzzSealIsReadByCryptoTLS", "FuzzSealOpen", "FuzzHostileRecords"} {
		seeds, err := os.ReadDir(filepath.Join("testdata", "fuzz", name))
		if err != nil || len(seeds) == 0 {
			t.Errorf("no seeds for %s: %v", name, err)
		}
	}
}
