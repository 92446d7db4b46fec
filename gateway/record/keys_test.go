// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"hash"
	"strings"
	"testing"
)

// The traffic secrets of RFC 8448 3, "Simple 1-RTT Handshake".
const (
	rfc8448Client = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5"
	rfc8448Server = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643"
)

func rfc8448Keys(t *testing.T, secret string) Keys {
	t.Helper()
	k, err := TrafficKeys(tls.TLS_AES_128_GCM_SHA256, unhex(t, secret))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestTrafficKeysAreThoseOfRFC8448(t *testing.T) {
	for _, c := range []struct{ secret, key, iv string }{
		{rfc8448Client, "17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"},
		{rfc8448Server, "9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"},
	} {
		k := rfc8448Keys(t, c.secret)
		if !bytes.Equal(k.Key(), unhex(t, c.key)) || !bytes.Equal(k.IV(), unhex(t, c.iv)) {
			t.Errorf("secret %s: key %x, iv %x", c.secret, k.Key(), k.IV())
		}
	}
}

// The application records of RFC 8448 3: the client's 50 bytes 00 to 31 and its close_notify. (The
// server's begin with record 1, after its ticket.)
func TestRecordsAreThoseOfRFC8448(t *testing.T) {
	payload := make([]byte, 50)
	for i := range payload {
		payload[i] = byte(i)
	}
	for _, c := range []struct {
		name, secret string
		seq          uint64
		role         Role
		data, bye    string
	}{
		{"client", rfc8448Client, 0, Server, `
			17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab
			3f 2b 98 19 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d
			ea e6 3a ee bb 21 69 49 15 e4`,
			"17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3"},
		{"server", rfc8448Server, 1, Client, `
			17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b
			36 e3 0e fa f9 7d 90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3
			32 54 0d d0 32 e1 67 c2 95 5d`,
			"17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var w Writer
			w.Init(rfc8448Keys(t, c.secret), c.seq)
			if got := sealData(&w, payload); !bytes.Equal(got, unhex(t, c.data)) {
				t.Errorf("sealed data as\n%x", got)
			}
			if got := w.AppendAlert(nil, AlertCloseNotify); !bytes.Equal(got, unhex(t, c.bye)) {
				t.Errorf("sealed close_notify as\n%x", got)
			}
			var r Reader
			r.Init(rfc8448Keys(t, c.secret), c.seq, c.role)
			got, events, _, err := openAll(&r, append(unhex(t, c.data), unhex(t, c.bye)...))
			if err != nil || !bytes.Equal(got, payload) || len(events) != 1 || events[0].Kind != CloseNotify {
				t.Errorf("opened %x, %v, %v", got, events, err)
			}
		})
	}
}

// The vectors that the working group exchanged for RFC 5246 5:
// https://mailarchive.ietf.org/arch/msg/tls/fzVCzk-z3FShgGJ6DOXqM1ydxms/
func TestPRFIsThatOfTLS12(t *testing.T) {
	for _, c := range []struct {
		hash              func() hash.Hash
		secret, seed, out string
	}{
		{sha256.New, "9bbe436ba940f017b17652849a71db35", "a0ba9f936cda311827a6f796ffd5198c", `
			e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a6b301791e90d35c9c9a46b4e14baf9af
			0fa022f7077def17abfd3797c0564bab4fbc91666e9def9b97fce34f796789baa48082d122ee42c5a72e5a5110fff701
			87347b66`},
		{sha512.New384, "b80b733d6ceefcdc71566ea48e5567df", "cd665cf6a8447dd6ff8b27555edb7465", `
			7b0c18e9ced410ed1804f2cfa34a336a1c14dffb4900bb5fd7942107e81c83cde9ca0faa60be9fe34f82b1233c9146a0
			e534cb400fed2700884f9dc236f80edd8bfa961144c9e8d792eca722a7b32fc3d416d473ebc2c5fd4abfdad05d918425
			9b5bf8cd4d90fa0d31e2dec479e4f1a26066f2eea9a69236a3e52655c9e9aee691c8f3a26854308d5eaa3be85e099070
			3d73e56f`},
	} {
		want := unhex(t, c.out)
		got := make([]byte, len(want))
		prf(got, c.hash, unhex(t, c.secret), "test label", unhex(t, c.seed))
		if !bytes.Equal(got, want) {
			t.Errorf("prf gives %x", got)
		}
	}
}

func TestBadKeyInputIsNamed(t *testing.T) {
	_, err := TrafficKeys(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, make([]byte, 32))
	wantError(t, err, "cipher suite 0xc02f")
	_, err = TrafficKeys(0x1304, make([]byte, 32)) // AES-CCM
	wantError(t, err, "cipher suite 0x1304")
	_, err = TrafficKeys(tls.TLS_AES_256_GCM_SHA384, make([]byte, 32))
	wantError(t, err, "traffic secret has 32 bytes", "wants 48")
	_, _, err = KeyBlock(tls.TLS_AES_128_GCM_SHA256, make([]byte, 48), make([]byte, 32), make([]byte, 32))
	wantError(t, err, "cipher suite 0x1301")
	_, _, err = KeyBlock(tls.TLS_RSA_WITH_AES_128_CBC_SHA, make([]byte, 48), make([]byte, 32), make([]byte, 32))
	wantError(t, err, "cipher suite 0x002f")
	_, _, err = KeyBlock(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, make([]byte, 47), make([]byte, 32), make([]byte, 32))
	wantError(t, err, "master secret has 47 bytes")
	_, _, err = KeyBlock(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, make([]byte, 48), make([]byte, 32), nil)
	wantError(t, err, "client random has 32 and server random 0 bytes")
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error is %q, want it to say %q", err, part)
		}
	}
}

func TestWipedKeysAreZero(t *testing.T) {
	k := rfc8448Keys(t, rfc8448Client)
	k.Wipe()
	if k != (Keys{}) {
		t.Error("something is left of wiped keys")
	}
	var r Reader
	r.Init(rfc8448Keys(t, rfc8448Client), 0, Server)
	r.Next([]byte{23, 3, 1, 0, 0}) // an error wipes as well
	if r.keys != (Keys{}) || r.half != (half{}) {
		t.Error("something is left of the keys after an error")
	}
	var w Writer
	w.Init(rfc8448Keys(t, rfc8448Client), 0)
	w.AppendAlert(nil, AlertCloseNotify)
	if w != (Writer{}) {
		t.Error("something is left of the keys after close_notify")
	}
}

func TestTLS12HasNoNextKeys(t *testing.T) {
	k, _, err := KeyBlock(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, make([]byte, 48), make([]byte, 32), make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	before := k
	if k.Update(); k != before {
		t.Error("Update changed TLS 1.2 keys")
	}
	if len(k.IV()) != 4 || len(k.Key()) != 16 {
		t.Errorf("AES-128-GCM in TLS 1.2 has a key of %d and an IV of %d bytes, want 16 and 4", len(k.Key()), len(k.IV()))
	}
}
