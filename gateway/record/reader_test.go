// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"testing"
	"unsafe"

	"github.com/tlsnat/tlsnat/gateway/record/gcm"
)

// testKeys are keys of any suite, made from a fixed secret.
func testKeys(t testing.TB, suite uint16) Keys {
	t.Helper()
	var k Keys
	var err error
	if isTLS13(suite) {
		k, err = TrafficKeys(suite, pattern(specs[suite].hashLen))
	} else {
		k, _, err = KeyBlock(suite, pattern(masterLen), pattern(randomLen), pattern(randomLen))
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// pair is a Reader and the half that seals for it.
func pair(t testing.TB, suite uint16, role Role) (r *Reader, h *half) {
	r, h = new(Reader), new(half)
	r.Init(testKeys(t, suite), 0, role)
	h.init(testKeys(t, suite), 0)
	return r, h
}

const (
	suite13     = tls.TLS_AES_128_GCM_SHA256
	suite12     = tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
	suiteChaCha = tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
)

// ticket is a NewSessionTicket message with n bytes of body.
func ticket(n int) []byte {
	b := append([]byte{msgNewSessionTicket, byte(n >> 16), byte(n >> 8), byte(n)}, make([]byte, n)...)
	binary.BigEndian.PutUint16(b[4+9:], uint16(n-(minTicket-1))) // neither nonce nor extensions
	return b
}

// broken is a ticket of 50 bytes with another byte at that place of its body.
func broken(at int, x byte) []byte {
	b := ticket(50)
	b[4+at] = x
	return b
}

// extended is a ticket with these bytes for its extensions.
func extended(extensions ...byte) []byte {
	b := ticket(50)
	b[3], b[4+49] = byte(50+len(extensions)), byte(len(extensions))
	return append(b, extensions...)
}

func concat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func repeat(n int, f func() []byte) (out []byte) {
	for range n {
		out = append(out, f()...)
	}
	return out
}

// rekey seals a KeyUpdate and follows it.
func rekey(h *half) []byte {
	rec := forgeContent(h, TypeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 0}, 0)
	h.advance()
	return rec
}

func TestEveryViolationHasItsAlert(t *testing.T) {
	data := func(h *half) []byte { return forgeContent(h, TypeData, []byte("x"), 0) }
	content := func(typ byte, content ...byte) func(*half) []byte {
		return func(h *half) []byte { return forgeContent(h, typ, content, 0) }
	}
	raw := func(b ...byte) func(*half) []byte { return func(*half) []byte { return b } }
	for _, c := range []struct {
		name  string
		suite uint16
		role  Role
		send  func(h *half) []byte
		alert Alert
	}{
		{"1.3 record of type change_cipher_spec", suite13, Server, raw(20, 3, 3, 0, 1), AlertUnexpectedMessage},
		{"1.3 record of type alert", suite13, Server, raw(21, 3, 3, 0, 2), AlertUnexpectedMessage},
		{"1.3 record of type handshake", suite13, Client, raw(22, 3, 3, 0, 30), AlertUnexpectedMessage},
		{"1.3 record of type 99", suite13, Client, raw(99, 3, 3, 0, 30), AlertUnexpectedMessage},
		{"1.3 record of version 1.3", suite13, Server, raw(23, 3, 4, 0, 30), AlertProtocolVersion},
		{"1.3 record of version 1.0", suite13, Server, raw(23, 3, 1, 0, 30), AlertProtocolVersion},
		{"1.3 record longer than 2^14+256", suite13, Server, raw(23, 3, 3, 0x41, 0x01), AlertRecordOverflow},
		{"1.3 record whose inner plaintext must be too long", suite13, Server, raw(23, 3, 3, 0x40, 0x12), AlertRecordOverflow},
		{"1.3 record shorter than a tag", suite13, Server, raw(23, 3, 3, 0, 15), AlertBadRecordMAC},
		{"1.3 empty record", suite13, Server, raw(23, 3, 3, 0, 0), AlertBadRecordMAC},
		{"1.3 record of an empty inner plaintext", suite13, Server,
			func(h *half) []byte { return forge(h, TypeData, nil) }, AlertUnexpectedMessage},
		{"1.3 record of padding only", suite13, Server,
			func(h *half) []byte { return forge(h, TypeData, make([]byte, 100)) }, AlertUnexpectedMessage},
		{"1.3 longest record of padding only", suite13, Server,
			func(h *half) []byte { return forge(h, TypeData, make([]byte, MaxPlaintext+1)) }, AlertUnexpectedMessage},
		{"1.3 record twice", suite13, Server,
			func(h *half) []byte { rec := data(h); return concat(rec, rec) }, AlertBadRecordMAC},
		{"1.3 record of the wrong sequence number", suite13, Server,
			func(h *half) []byte { h.seq++; return data(h) }, AlertBadRecordMAC},
		{"1.3 content type change_cipher_spec", suite13, Server, content(20, 1), AlertUnexpectedMessage},
		{"1.3 content type 24", suite13, Server, content(24, 1), AlertUnexpectedMessage},
		{"1.3 empty alert", suite13, Server, content(21), AlertUnexpectedMessage},
		{"1.3 alert in halves", suite13, Server, content(21, 1), AlertDecodeError},
		{"1.3 two alerts in a record", suite13, Server, content(21, 1, 0, 1, 0), AlertDecodeError},
		{"1.3 empty handshake", suite13, Server, content(22), AlertUnexpectedMessage},
		{"1.3 ClientHello", suite13, Server, content(22, 1, 0, 0, 1, 0), AlertUnexpectedMessage},
		{"1.3 Finished", suite13, Server, content(22, 20), AlertUnexpectedMessage},
		{"1.3 ticket from a client", suite13, Server, content(22, ticket(50)...), AlertUnexpectedMessage},
		{"1.3 CertificateRequest after the handshake", suite13, Client, content(22, 13, 0, 0, 3, 0, 0, 0), AlertUnexpectedMessage},
		{"1.3 HelloRequest", suite13, Client, content(22, 0, 0, 0, 0), AlertUnexpectedMessage},
		{"1.3 ticket too short to be one", suite13, Client, content(22, ticket(minTicket-1)...), AlertDecodeError},
		{"1.3 ticket longer than 64 KiB", suite13, Client, content(22, 4, 1, 0, 1), AlertIllegalParameter},
		{"1.3 KeyUpdate of no length", suite13, Server, content(22, 24, 0, 0, 0), AlertDecodeError},
		{"1.3 KeyUpdate of length 2", suite13, Server, content(22, 24, 0, 0, 2, 0, 0), AlertDecodeError},
		{"1.3 KeyUpdate asking 2", suite13, Server, content(22, 24, 0, 0, 1, 2), AlertIllegalParameter},
		{"1.3 KeyUpdate before another", suite13, Server, content(22, 24, 0, 0, 1, 0, 24, 0, 0, 1, 0), AlertUnexpectedMessage},
		{"1.3 KeyUpdate before a ticket", suite13, Client, content(22, append([]byte{24, 0, 0, 1, 0}, ticket(20)...)...), AlertUnexpectedMessage},
		{"1.3 KeyUpdate, then the old keys", suite13, Server,
			func(h *half) []byte {
				return concat(forgeContent(h, TypeHandshake, []byte{24, 0, 0, 1, 0}, 0), data(h))
			}, AlertBadRecordMAC},
		{"1.3 data inside a handshake message", suite13, Server,
			func(h *half) []byte { return concat(content(22, 24, 0)(h), data(h)) }, AlertUnexpectedMessage},
		{"1.3 empty data inside a handshake message", suite13, Server,
			func(h *half) []byte { return concat(content(22, 24)(h), content(23)(h)) }, AlertUnexpectedMessage},
		{"1.3 alert inside a handshake message", suite13, Client,
			func(h *half) []byte { return concat(content(22, ticket(50)[:20]...)(h), content(21, 1, 0)(h)) }, AlertUnexpectedMessage},
		{"1.3 KeyUpdates without data", suite13, Server,
			func(h *half) []byte { return repeat(updateCredit/updatePrice+1, func() []byte { return rekey(h) }) }, AlertUnexpectedMessage},
		{"1.3 KeyUpdates with too little data", suite13, Server,
			func(h *half) []byte {
				return repeat(1025, func() []byte { return concat(data(h), rekey(h)) })
			}, AlertUnexpectedMessage},
		{"1.3 empty records", suite13, Server,
			func(h *half) []byte { return repeat(maxUseless+1, func() []byte { return content(23)(h) }) }, AlertUnexpectedMessage},
		{"1.3 user_canceled again and again", suite13, Server,
			func(h *half) []byte { return repeat(maxUseless+1, func() []byte { return content(21, 1, 90)(h) }) }, AlertUnexpectedMessage},
		{"1.3 tickets without data", suite13, Client,
			func(h *half) []byte {
				return repeat(maxUseless+1, func() []byte { return content(22, ticket(50)...)(h) })
			}, AlertUnexpectedMessage},
		{"1.3 ticket of a nonce that is too long", suite13, Client, content(22, broken(8, 200)...), AlertDecodeError},
		{"1.3 ticket without a ticket", suite13, Client, content(22, broken(10, 0)...), AlertDecodeError},
		{"1.3 ticket that is too long", suite13, Client, content(22, broken(10, 38)...), AlertDecodeError},
		{"1.3 ticket that leaves bytes over", suite13, Client, content(22, broken(10, 36)...), AlertDecodeError},
		{"1.3 ticket with extensions that are not there", suite13, Client, content(22, broken(49, 1)...), AlertDecodeError},
		{"1.3 ticket with half an extension", suite13, Client, content(22, extended(0, 42, 0)...), AlertDecodeError},
		{"1.3 ticket with an extension that is too long", suite13, Client, content(22, extended(0, 42, 0, 4, 1, 2, 3)...), AlertDecodeError},
		{"1.3 broken ticket byte by byte", suite13, Client,
			func(h *half) []byte {
				msg := broken(10, 36)
				return repeat(len(msg), func() []byte { b := msg[0]; msg = msg[1:]; return content(22, b)(h) })
			}, AlertDecodeError},

		{"1.2 record of type change_cipher_spec", suite12, Server, raw(20, 3, 3, 0, 25), AlertUnexpectedMessage},
		{"1.2 record of type 24", suite12, Server, raw(24, 3, 3, 0, 25), AlertUnexpectedMessage},
		{"1.2 record of version 1.1", suite12, Server, raw(23, 3, 2, 0, 25), AlertProtocolVersion},
		{"1.2 record longer than 2^14+2048", suite12, Server, raw(23, 3, 3, 0x48, 0x01), AlertRecordOverflow},
		{"1.2 record whose plaintext must be too long", suite12, Server, raw(23, 3, 3, 0x40, 0x19), AlertRecordOverflow},
		{"1.2 ChaCha20 record whose plaintext must be too long", suiteChaCha, Server, raw(23, 3, 3, 0x40, 0x11), AlertRecordOverflow},
		{"1.2 record shorter than nonce and tag", suite12, Server, raw(23, 3, 3, 0, 23), AlertBadRecordMAC},
		{"1.2 ChaCha20 record shorter than a tag", suiteChaCha, Server, raw(23, 3, 3, 0, 15), AlertBadRecordMAC},
		{"1.2 record twice", suite12, Server,
			func(h *half) []byte { rec := data(h); return concat(rec, rec) }, AlertBadRecordMAC},
		{"1.2 record of another type than it was sealed as", suite12, Server,
			func(h *half) []byte { rec := data(h); rec[0] = TypeHandshake; return rec }, AlertBadRecordMAC},
		{"1.2 ClientHello", suite12, Server, content(22, 1, 0, 0, 0), AlertNoRenegotiation},
		{"1.2 HelloRequest", suite12, Client, content(22, 0, 0, 0, 0), AlertNoRenegotiation},
		{"1.2 HelloRequest from a client", suite12, Server, content(22, 0, 0, 0, 0), AlertUnexpectedMessage},
		{"1.2 ServerHello", suite12, Client, content(22, 2, 0, 0, 0), AlertUnexpectedMessage},
		{"1.2 ticket after the handshake", suite12, Client, content(22, ticket(50)...), AlertUnexpectedMessage},
		{"1.2 empty handshake", suite12, Client, content(22), AlertUnexpectedMessage},
		{"1.2 empty alert", suite12, Server, content(21), AlertUnexpectedMessage},
		{"1.2 alert in halves", suite12, Server, content(21, 1), AlertDecodeError},
		{"1.2 alert of level 3", suite12, Server, content(21, 3, 10), AlertIllegalParameter},
		{"1.2 alert of level 0", suite12, Server, content(21, 0, 90), AlertIllegalParameter},
		{"1.2 warnings again and again", suite12, Server,
			func(h *half) []byte { return repeat(maxUseless+1, func() []byte { return content(21, 1, 90)(h) }) }, AlertUnexpectedMessage},
		{"1.2 empty records", suite12, Server,
			func(h *half) []byte { return repeat(maxUseless+1, func() []byte { return content(23)(h) }) }, AlertUnexpectedMessage},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, h := pair(t, c.suite, c.role)
			_, events, _, err := openAll(r, c.send(h))
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Alert != c.alert {
				t.Fatalf("got %v after %d events, want %v", err, len(events), c.alert)
			}
			if e.Alert == AlertCloseNotify || e.Reason == "" {
				t.Errorf("an error without a reason: %+v", e)
			}
			if _, n, err := r.Next(data(h)); n != 0 || !errors.Is(err, ErrClosed) {
				t.Errorf("after it, Next gives %d, %v, want ErrClosed", n, err)
			}
		})
	}
}

func TestEveryBitIsAuthenticated(t *testing.T) {
	for _, suite := range fastSuites {
		_, h := pair(t, suite, Server)
		rec := forgeContent(h, TypeData, []byte("authentic"), 3)
		for bit := range len(rec) * 8 {
			if at := bit / 8; at == 3 || at == 4 {
				continue // another length: another number of bytes is waited for
			}
			r, _ := pair(t, suite, Server)
			forged := bytes.Clone(rec)
			forged[bit/8] ^= 1 << (bit % 8)
			if got, n, err := r.Next(forged); err == nil {
				t.Fatalf("%s: bit %d changed, and %q came out of %d bytes", tls.CipherSuiteName(suite), bit, got.Data, n)
			}
		}
	}
}

func TestHeaderIsJudgedBeforeItsBodyComes(t *testing.T) {
	r, _ := pair(t, suite13, Server)
	for n := range headerLen {
		if _, took, err := r.Next([]byte{99, 9, 9, 255, 255}[:n]); took != 0 || err != nil {
			t.Fatalf("%d bytes of a header: %d, %v", n, took, err)
		}
		if need := r.Need(make([]byte, n)); need != headerLen {
			t.Fatalf("%d bytes of a header: need %d, want %d", n, need, headerLen)
		}
	}
	if need := r.Need([]byte{23, 3, 3, 0x40, 0x11}); need != 5+0x4011 || need > MaxRecord {
		t.Fatalf("longest TLS 1.3 record: need %d", need)
	}
	if _, _, err := r.Next([]byte{23, 3, 3, 0xff, 0xff}); err == nil {
		t.Fatal("a header that announces 64 KiB is waited for")
	}
}

func TestLongestRecordsAreOpened(t *testing.T) {
	for _, suite := range fastSuites {
		r, h := pair(t, suite, Server)
		want := pattern(MaxPlaintext)
		rec := forgeContent(h, TypeData, want, 0)
		if len(rec) > MaxRecord {
			t.Errorf("%s: %d bytes, more than MaxRecord", tls.CipherSuiteName(suite), len(rec))
		}
		got, _, _, err := openAll(r, rec)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", tls.CipherSuiteName(suite), len(got), err)
		}
	}
}

func TestPaddingIsStripped(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 9, 100, MaxPlaintext - 16} {
		for _, want := range [][]byte{pattern(16), make([]byte, 16), {1, 0, 0, 0, 0, 0, 0, 0, 0}, {}} {
			r, h := pair(t, suite13, Server)
			rec, _, err := r.Next(forgeContent(h, TypeData, want, n))
			if err != nil || rec.Kind != Data || !bytes.Equal(rec.Data, want) {
				t.Errorf("%d zeros behind %x: %+v, %v", n, want, rec, err)
			}
		}
	}
}

func TestWarningsAreIgnored(t *testing.T) {
	for suite, alerts := range map[uint16][]byte{suite13: {90}, suite12: {90, 112}} {
		for _, a := range alerts {
			r, h := pair(t, suite, Server)
			_, events, _, err := openAll(r, forgeContent(h, TypeAlert, []byte{levelWarning, a}, 0))
			if err != nil || len(events) != 1 || events[0].Kind != Ignored || events[0].Alert != Alert(a) {
				t.Errorf("%#x: warning %v: %v, %v", suite, Alert(a), events, err)
			}
		}
	}
}

func TestAlertsEndReading(t *testing.T) {
	for suite, level := range map[uint16]byte{suite13: levelWarning, suite12: levelFatal} {
		for a, kind := range map[Alert]Kind{AlertCloseNotify: CloseNotify, AlertBadRecordMAC: AlertReceived, 255: AlertReceived} {
			r, h := pair(t, suite, Server)
			rec, n, err := r.Next(forgeContent(h, TypeAlert, []byte{level, byte(a)}, 0))
			if err != nil || n == 0 || rec.Kind != kind || rec.Alert != a {
				t.Errorf("%#x: %v came as %+v, %v", suite, a, rec, err)
			}
			if _, _, err := r.Next(forgeContent(h, TypeData, []byte("x"), 0)); !errors.Is(err, ErrClosed) {
				t.Errorf("%#x: reading goes on after %v: %v", suite, a, err)
			}
		}
	}
}

func TestHandshakeMessagesMayBeSplit(t *testing.T) {
	msgs := concat(ticket(100), ticket(minTicket), []byte{msgKeyUpdate, 0, 0, 1, 1})
	for cut := 1; cut < len(msgs); cut++ {
		r, h := pair(t, suite13, Client)
		_, events, _, err := openAll(r, concat(
			forgeContent(h, TypeHandshake, msgs[:cut], 0),
			forgeContent(h, TypeHandshake, msgs[cut:], 0)))
		if err != nil || len(events) != 2 || events[0].Kind != Ignored || events[1].Kind != KeyUpdateRequested {
			t.Fatalf("cut at %d: %v, %v", cut, events, err)
		}
		h.advance()
		if got, _, _, err := openAll(r, forgeContent(h, TypeData, []byte("new keys"), 0)); string(got) != "new keys" {
			t.Fatalf("cut at %d: %q, %v under the new keys", cut, got, err)
		}
	}
}

// TestMessagesMayComeInPieces of a byte: messages are counted, not records.
func TestMessagesMayComeInPieces(t *testing.T) {
	msg := concat(ticket(300), extended(0, 42, 0, 4, 1, 2, 3, 4, 0xff, 1, 0, 0), []byte{msgKeyUpdate, 0, 0, 1, 0})
	r, h := pair(t, suite13, Client)
	_, events, _, err := openAll(r, repeat(len(msg), func() []byte { b := msg[:1]; msg = msg[1:]; return forgeContent(h, TypeHandshake, b, 0) }))
	if err != nil || events[len(events)-1].Kind != KeyUpdate {
		t.Errorf("%v", err)
	}
}

// TestPeersMayRepeatThemselves as often as any of them lets others: 32 empty records, 128 KeyUpdates.
func TestPeersMayRepeatThemselves(t *testing.T) {
	r, h := pair(t, suite13, Server)
	if _, _, _, err := openAll(r, repeat(32, func() []byte { return forgeContent(h, TypeData, nil, 0) })); err != nil {
		t.Errorf("32 empty records: %v", err)
	}
	if _, _, _, err := openAll(r, repeat(128, func() []byte { return rekey(h) })); err != nil {
		t.Errorf("128 KeyUpdates: %v", err)
	}
}

// TestRefusedRenegotiationEnds: a warning that answers what nobody has asked.
func TestRefusedRenegotiationEnds(t *testing.T) {
	r, h := pair(t, suite12, Server)
	_, _, _, err := openAll(r, forgeContent(h, TypeAlert, []byte{levelWarning, byte(AlertNoRenegotiation)}, 0))
	wantError(t, err, "handshake_failure")
	if body := AlertNoRenegotiation.Body(); body[0] != levelFatal {
		t.Errorf("no_renegotiation is sent at level %d, and the connection ends", body[0])
	}
}

func TestLongestTicketIsSkippedWithoutMemory(t *testing.T) {
	r, h := pair(t, suite13, Client)
	msg := ticket(maxTicket)
	var wire []byte
	for len(msg) > 0 {
		n := min(len(msg), MaxPlaintext)
		wire = append(wire, forgeContent(h, TypeHandshake, msg[:n], 0)...)
		msg = msg[n:]
	}
	r.Next(wire[:r.Need(wire)]) // sets the AEAD up
	wire = wire[r.Need(wire):]
	allocs := testing.AllocsPerRun(1, func() {
		for len(wire) > 0 {
			_, n, err := r.Next(wire)
			if err != nil {
				t.Fatal(err)
			}
			wire = wire[n:]
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	if got, _, _, err := openAll(r, forgeContent(h, TypeData, []byte("x"), 0)); string(got) != "x" {
		t.Errorf("data behind the ticket: %q, %v", got, err)
	}
}

func TestDataPaysForKeyUpdates(t *testing.T) {
	r, h := pair(t, suite13, Server)
	data := pattern(updatePrice)
	for i := range 3 * updateCredit / updatePrice {
		if _, _, _, err := openAll(r, concat(forgeContent(h, TypeData, data, 0), rekey(h))); err != nil {
			t.Fatalf("update %d: %v", i, err)
		}
	}
}

func TestSequenceNumbersDoNotWrap(t *testing.T) {
	for _, suite := range []uint16{suite13, suite12} {
		var r Reader
		var w Writer
		r.Init(testKeys(t, suite), lastSeq-1, Server)
		w.Init(testKeys(t, suite), lastSeq-1)
		if got, _, _, err := openAll(&r, sealData(&w, []byte("last"))); string(got) != "last" {
			t.Fatalf("%#x: last record: %q, %v", suite, got, err)
		}
		if rec := sealData(&w, []byte("x")); len(rec) != 0 {
			t.Errorf("%#x: sealed with the last sequence number", suite)
		}
		if rec := w.AppendKeyUpdate(nil, false); len(rec) != 0 {
			t.Errorf("%#x: KeyUpdate with the last sequence number", suite)
		}
		_, _, err := r.Next([]byte{23, 3, 3, 0, 30})
		if e, ok := errors.AsType[*Error](err); !ok || e.Alert != AlertInternalError {
			t.Errorf("%#x: reading on: %v", suite, err)
		}
	}
}

func TestZeroReaderAndWriterAreClosed(t *testing.T) {
	var r Reader
	if _, _, err := r.Next(make([]byte, 100)); !errors.Is(err, ErrClosed) {
		t.Errorf("zero Reader: %v", err)
	}
	r.Init(Keys{}, 0, Server)
	if _, _, err := r.Next(make([]byte, 100)); !errors.Is(err, ErrClosed) {
		t.Errorf("Reader of zero keys: %v", err)
	}
	var w Writer
	if n := w.Seal(make([]byte, 100), 1); n != 0 {
		t.Errorf("zero Writer sealed %d bytes", n)
	}
	if _, ok := ProbeSequence(Keys{}, make([]byte, 100), 8); ok {
		t.Error("zero keys opened something")
	}
}

func TestDamagedProbeFindsNothing(t *testing.T) {
	for _, suite := range fastSuites {
		_, h := pair(t, suite, Server)
		rec := forgeContent(h, TypeData, []byte("x"), 0)
		for n := range rec {
			if _, ok := ProbeSequence(testKeys(t, suite), rec[:n], 8); ok {
				t.Fatalf("%d of %d bytes were found", n, len(rec))
			}
		}
		if _, ok := ProbeSequence(testKeys(t, suite), append(rec, 0), 8); ok {
			t.Fatal("a record and a byte were found")
		}
		if _, ok := ProbeSequence(testKeys(t, suite), rec, -1); ok {
			t.Fatal("found by trying nothing")
		}
	}
}

func TestParkedConnectionIsSmall(t *testing.T) {
	reader, writer := unsafe.Sizeof(Reader{}), unsafe.Sizeof(Writer{})
	t.Logf("Keys %d, Reader %d, Writer %d bytes", unsafe.Sizeof(Keys{}), reader, writer)
	if reader > 200 || reader+writer > 400 {
		t.Errorf("Reader has %d bytes and Writer %d, want at most 200, and 400 together", reader, writer)
	}
	r, h := pair(t, suite13, Server)
	for range 3 {
		if got, _, _, err := openAll(r, forgeContent(h, TypeData, []byte("x"), 0)); string(got) != "x" {
			t.Fatalf("after Park: %q, %v", got, err)
		}
		if r.Park(); r.aead != nil {
			t.Fatal("Park kept the AEAD")
		}
	}
}

func TestErrorSaysWhichRecordAndWhichAlert(t *testing.T) {
	r, h := pair(t, suite13, Server)
	_, _, _, err := openAll(r, concat(forgeContent(h, TypeData, []byte("x"), 0), []byte{23, 3, 3, 0xff, 0xff}))
	wantError(t, err, "tls record 1:", "length 65535 at offset 3, at most 16401", "record_overflow")
	r, h = pair(t, suite13, Server)
	_, _, _, err = openAll(r, concat(forgeContent(h, TypeData, []byte("x"), 0), forgeContent(h, TypeAlert, nil, 0)))
	wantError(t, err, "tls record 1:", "empty alert", "unexpected_message")
	if got := Alert(112).String() + " " + Alert(200).String(); got != "unrecognized_name alert(200)" {
		t.Errorf("alerts are called %s", got)
	}
	if got := KeyUpdateRequested.String() + " " + Kind(9).String(); got != "key_update_requested kind(9)" {
		t.Errorf("kinds are called %s", got)
	}
}

func TestWipedReaderAndWriterAreClosed(t *testing.T) {
	var r Reader
	var w Writer
	r.Init(testKeys(t, suite13), 0, Server)
	w.Init(testKeys(t, suite13), 0)
	rec := sealData(&w, []byte("x"))
	r.Wipe()
	w.Wipe()
	if _, n, err := r.Next(rec); n != 0 || !errors.Is(err, ErrClosed) {
		t.Errorf("a wiped Reader gives %d, %v", n, err)
	}
	if n := w.Seal(make([]byte, 100), 1); n != 0 {
		t.Errorf("a wiped Writer sealed %d bytes", n)
	}
	if r.keys != (Keys{}) || w.keys != (Keys{}) {
		t.Error("something is left of the keys")
	}
}

// TestDroppedAEADsAreWiped: parked, at the end, and when keys are renewed, no expanded key stays behind.
func TestDroppedAEADsAreWiped(t *testing.T) {
	if ok, why := gcm.Accelerated(); !ok {
		t.Skip("the standard library's AES-GCM can't be wiped: ", why)
	}
	for _, suite := range []uint16{suite13, suite12} {
		for name, drop := range map[string]func(h *half){"park": (*half).park, "wipe": (*half).wipe, "advance": (*half).advance} {
			if name == "advance" && suite == suite12 {
				continue // TLS 1.2 has no KeyUpdate
			}
			var h half
			h.init(testKeys(t, suite), 0)
			h.ready()
			aead, nonce := h.aead, h.nonce
			aead.Seal(nil, nonce[:], nil, nil)
			drop(&h)
			if h.aead != nil || !panics(func() { aead.Seal(nil, nonce[:], nil, nil) }) {
				t.Errorf("%s, %x: the AEAD still works", name, suite)
			}
		}
	}
}

func panics(f func()) (yes bool) {
	defer func() { yes = recover() != nil }()
	f()
	return false
}
