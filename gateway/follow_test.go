// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/tls"
	"encoding/binary"
	"reflect"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/gateway/record"
)

func rec(typ byte, body ...byte) []byte {
	return append([]byte{typ, 3, 3, byte(len(body) >> 8), byte(len(body))}, body...)
}

// serverHello has a random of 7s, and then what makes it long enough.
func serverHello() []byte {
	return append(append([]byte{messageServerHello, 0, 0, 40, 3, 3}, bytes.Repeat([]byte{7}, 32)...), 0, 0, 0, 0, 0, 0)
}

func following(pieces ...[]byte) *follower {
	f := &follower{}
	f.begin(record.MaxRecord)
	for _, p := range pieces {
		f.follow(p)
	}
	return f
}

// TestRandomIsThatOfTheHello, however that is cut, and not bytes of a certificate that look like a hello.
func TestRandomIsThatOfTheHello(t *testing.T) {
	hello := serverHello()
	second := append([]byte{messageServerHello, 0, 0, 0}, bytes.Repeat([]byte{9}, 100)...)
	certificate := append([]byte{11, 0, 0x40, 0}, bytes.Repeat([]byte{5}, 0x4000-len(second))...)
	certificate = append(certificate, second...)
	whole := bytes.Join([][]byte{rec(22, hello...), rec(22, certificate[:0x4004-len(second)]...), rec(22, certificate[0x4004-len(second):]...)}, nil)
	var small []byte
	for _, x := range append(bytes.Clone(hello), certificate...) {
		small = append(small, rec(22, x)...)
	}
	for name, b := range map[string][]byte{"large records": whole, "records of a byte": small} {
		for _, step := range []int{1, 3, 5, 37, 43, len(b)} {
			f := &follower{}
			f.begin(record.MaxRecord)
			for p := b; len(p) > 0; {
				n := min(step, len(p))
				f.follow(p[:n])
				p = p[n:]
			}
			if want := bytes.Repeat([]byte{7}, 32); !f.randomKnown || !bytes.Equal(f.random[:], want) || f.record.got != 0 || f.messageGot != 0 {
				t.Errorf("%s, %d bytes at a time: random %x, known: %v", name, step, f.random, f.randomKnown)
			}
		}
	}
	if f := following(rec(22, hello[:37]...)); f.randomKnown {
		t.Error("a random that is a byte short is known")
	}
}

// TestOnlyFatalAlertsCount: a warning ends nothing.
func TestOnlyFatalAlertsCount(t *testing.T) {
	for _, c := range []struct {
		b    []byte
		want int16
	}{
		{rec(21, 1, 112), 0}, {rec(21, 2, 40), 40}, {append(rec(21, 2, 40), rec(21, 1, 0)...), 40},
		{rec(21, 2), 0}, {rec(21, 2, 40, 2), 0}, {append(rec(20, 1), rec(21, 2, 40)...), 0},
	} {
		if f := following(c.b); f.alert != c.want {
			t.Errorf("%x: alert %d, want %d", c.b, f.alert, c.want)
		}
	}
}

// sealedFor is a record of that number.
func sealedFor(k record.Keys, seq uint64, n int) []byte {
	var w record.Writer
	w.Init(k, seq)
	slot := make([]byte, w.Prefix()+n+w.Suffix())
	return slot[:w.Seal(slot, n)]
}

// TestNumberThatDoesNotAddUpIsRefused: our own records tell the number to go on with, or the connection ends. A number
// that was only assumed could seal two records with one nonce.
func TestNumberThatDoesNotAddUpIsRefused(t *testing.T) {
	suite := tls.TLS_AES_128_GCM_SHA256
	app, hs := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	k, err := record.TrafficKeys(suite, app)
	if err != nil {
		t.Fatal(err)
	}
	handshake, err := record.TrafficKeys(suite, hs)
	if err != nil {
		t.Fatal(err)
	}
	flight := [][]byte{sealedFor(handshake, 0, 9), sealedFor(handshake, 1, 900), sealedFor(handshake, 2, 36)}
	for name, c := range map[string]struct {
		more [][]byte
		hs   []byte
		next uint64
		err  error
	}{
		"no ticket":                 {nil, hs, 0, nil},
		"a ticket":                  {[][]byte{sealedFor(k, 0, 200)}, hs, 1, nil},
		"three tickets":             {[][]byte{sealedFor(k, 0, 200), sealedFor(k, 1, 200), sealedFor(k, 2, 200)}, hs, 3, nil},
		"other keys":                {[][]byte{sealedFor(handshake, 7, 200)}, hs, 0, errWrongCount},
		"a number beyond the count": {[][]byte{sealedFor(k, 9, 200)}, hs, 0, errWrongCount},
		"half a record":             {[][]byte{sealedFor(k, 0, 200)[:100]}, hs, 0, errCutRecord},
		"the handshake's unknown":   {nil, app, 0, errWrongCount},
	} {
		f := following(append(append([][]byte{rec(20, 1)}, flight...), c.more...)...)
		if next, err := f.next13(&k, c.hs); next != c.next || err != c.err {
			t.Errorf("%s: %d, %v; want %d, %v", name, next, err, c.next, c.err)
		}
	}
	if _, err := following().next13(&k, hs); err != errWrongCount {
		t.Errorf("nothing was sealed: %v", err)
	}
	if _, err := following(flight...).next13(&k, nil); err == nil {
		t.Error("the handshake's secret was not logged, and a number is known")
	}
}

// TestNumberAfterChangeCipherSpec counts every record.
func TestNumberAfterChangeCipherSpec(t *testing.T) {
	suite := tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
	k, _, err := record.KeyBlock(suite, make([]byte, 48), make([]byte, 32), make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	// Not of the right type inside, which next12 does not look at: their number is what opens them.
	as := func(typ byte, seq uint64, n int) []byte {
		var w record.Writer
		w.Init(k, seq)
		if typ == 21 {
			return w.AppendAlert(nil, record.AlertUserCanceled)
		}
		return sealHandshake(k, seq, n)
	}
	for name, c := range map[string]struct {
		records [][]byte
		next    uint64
		err     error
	}{
		"one record":         {[][]byte{as(22, 0, 16)}, 1, nil},
		"two records":        {[][]byte{as(22, 0, 4), as(22, 1, 12)}, 2, nil},
		"a warning before":   {[][]byte{as(21, 0, 2), as(22, 1, 16)}, 2, nil},
		"a byte too many":    {[][]byte{as(22, 0, 17)}, 0, errBeyond},
		"a byte too few":     {[][]byte{as(22, 0, 15)}, 0, errBeyond},
		"another number":     {[][]byte{as(22, 1, 16)}, 0, errWrongCount},
		"nothing":            {nil, 0, errUnsealed},
		"a record cut short": {[][]byte{as(22, 0, 16)[:9]}, 0, errCutRecord},
	} {
		f := following(append([][]byte{rec(22, serverHello()...), rec(20, 1)}, c.records...)...)
		if next, err := f.next12(&k); next != c.next || err != c.err {
			t.Errorf("%s: %d, %v; want %d, %v", name, next, err, c.next, c.err)
		}
	}
	if _, err := following(as(22, 0, 16)).next12(&k); err != errUnsealed {
		t.Errorf("without a ChangeCipherSpec: %v", err)
	}
}

// sealHandshake is a handshake record of n bytes in TLS 1.2.
func sealHandshake(k record.Keys, seq uint64, n int) []byte {
	block, err := aes.NewCipher(k.Key())
	if err != nil {
		panic(err) // the key has the right length
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES has blocks of 16 bytes
	}
	number := binary.BigEndian.AppendUint64(nil, seq)
	nonce := append(bytes.Clone(k.IV()), number...)
	aad := append(bytes.Clone(number), 22, 3, 3, byte(n>>8), byte(n))
	return rec(22, gcm.Seal(number, nonce, make([]byte, n), aad)...)
}

// TestSecretsAreWholeOrUnknown: one that was not logged, or half of one, makes no keys.
func TestSecretsAreWholeOrUnknown(t *testing.T) {
	state := &tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256}
	full := strings.Repeat("ab", 32)
	var w wire
	var s secrets
	say := func(label, secret string) error {
		_, err := s.Write([]byte(label + " " + full + " " + secret + "\n"))
		return err
	}
	for _, step := range []struct{ label, secret string }{{"CLIENT_TRAFFIC_SECRET_0", full}, {"SERVER_TRAFFIC_SECRET_0", full[:62]}} {
		if err := say(step.label, step.secret); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.keys(state, &w, record.Server); err == nil {
			t.Errorf("%s of %d digits was enough", step.label, len(step.secret))
		}
	}
	if err := say("SERVER_TRAFFIC_SECRET_0", full[:61]+"x"); err == nil || s.server.n != 0 {
		t.Errorf("what is no number was taken: %v", err)
	}
	if err := say("SERVER_TRAFFIC_SECRET_0", full); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.keys(state, &w, record.Server); err != nil {
		t.Error(err)
	}
	state = &tls.ConnectionState{Version: tls.VersionTLS12, CipherSuite: tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	s.master.set(make([]byte, masterLen))
	if _, _, err := s.keys(state, &w, record.Server); err == nil {
		t.Error("keys without the hellos' randoms")
	}
}

// FuzzFollower: however the bytes are cut, the same is found; and nothing grows.
func FuzzFollower(f *testing.F) {
	f.Add(append(rec(22, serverHello()...), rec(20, 1)...), uint8(1))
	f.Add(append(rec(21, 2, 40), rec(23, make([]byte, 99)...)...), uint8(7))
	f.Add(bytes.Join([][]byte{rec(22, 2), rec(22, serverHello()[1:]...), rec(22), rec(20, 1), rec(22, 1, 2, 3)}, nil), uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, step uint8) {
		whole := following(b)
		cut := &follower{}
		cut.begin(record.MaxRecord)
		for p := b; len(p) > 0; {
			n := min(int(step)+1, len(p))
			cut.follow(p[:n])
			p = p[n:]
		}
		if !bytes.Equal(whole.last, cut.last) || len(cut.last) > record.MaxRecord {
			t.Errorf("last record %x, in pieces %x", whole.last, cut.last)
		}
		whole.last, cut.last = nil, nil
		if !reflect.DeepEqual(whole, cut) {
			t.Errorf("%+v\nin pieces %+v", whole, cut)
		}
	})
}
