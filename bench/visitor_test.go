// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/crypto/cryptobyte"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// visitor makes whole TLS 1.3 connections at a third of what they cost crypto/tls: the one key share is made beforehand, and the certificate is not
// verified, since the load knows whom it talks to. Finished is: nobody else could make it. With a ticket it resumes (psk_dhe_ke), always the same one.
// One may be used by many at once.
type visitor struct {
	addr, name  string
	key         *ecdh.PrivateKey
	ticket, psk []byte
	ageAdd      uint32
	since       time.Time
}

// what the load offers: one suite, one group, whose numbers are in RFC 8446 B.4 and 4.2.7
const (
	suite  = tls.TLS_AES_128_GCM_SHA256
	x25519 = uint16(tls.X25519)
)

const (
	typeCCS, typeAlert, typeHandshake, typeData                                   = 20, 21, 22, 23
	sayClientHello, sayServerHello, sayTicket, sayFinished                        = 1, 2, 4, 20
	extName, extGroups, extSignatures, extPSK, extVersions, extPSKModes, extShare = 0, 10, 13, 41, 43, 45, 51
)

func (w way) visitor() (*visitor, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	return &visitor{addr: w.addr, name: w.tls.ServerName, key: key}, err
}

// visit is one whole connection: handshake, 256 bytes there and back, close_notify and FIN.
func (v *visitor) visit() (resumed bool, took time.Duration, err error) {
	began := time.Now()
	t, resumed, err := v.open()
	if err != nil {
		return false, 0, fmt.Errorf("handshake: %w", err)
	}
	defer t.conn.Close()
	if err := echoOnce(t, message(256), make([]byte, 256)); err != nil {
		return false, 0, err
	}
	if _, err := t.conn.Write(t.out.seal(nil, typeAlert, []byte{1, 0})); err != nil {
		return false, 0, fmt.Errorf("close_notify: %w", err)
	}
	return resumed, time.Since(began), nil
}

// keepTicket makes a first visit whose ticket all later ones come with.
func (v *visitor) keepTicket() error {
	t, _, err := v.open()
	if err != nil {
		return err
	}
	defer t.conn.Close()
	if err := echoOnce(t, message(256), make([]byte, 256)); err != nil {
		return err
	}
	if t.ticket == nil {
		return errors.New("there came no ticket before the echo")
	}
	p := cryptobyte.String(t.ticket)
	var nonce, ticket cryptobyte.String
	if !p.Skip(4) || !p.ReadUint32(&v.ageAdd) || !p.ReadUint8LengthPrefixed(&nonce) || !p.ReadUint16LengthPrefixed(&ticket) {
		return errors.New("the ticket is cut off")
	}
	v.ticket, v.psk, v.since = ticket, expandLabel(t.resumption, "resumption", nonce), time.Now()
	return nil
}

// talk13 is a connection after its handshake.
type talk13 struct {
	conn       net.Conn
	in, out    *guard
	buf        []byte // what has come: records, the first of them perhaps not complete
	at         int    // where the next one begins
	said       []byte // handshake messages that have come and are not understood yet
	data       []byte // application data that nobody has read
	ticket     []byte // the last that came
	resumption []byte // the secret that goes with it
}

func (v *visitor) open() (*talk13, bool, error) {
	c, err := net.DialTimeout("tcp", v.addr, patience)
	if err != nil {
		return nil, false, err
	}
	c.SetDeadline(time.Now().Add(patience))
	t := &talk13{conn: c, buf: make([]byte, 0, 4096)}
	resumed, err := v.shake(t)
	if err != nil {
		c.Close()
	}
	return t, resumed, err
}

// shake is the client's side of RFC 8446 2 and 7.1.
func (v *visitor) shake(t *talk13) (resumed bool, err error) {
	early := extract(v.psk, nil)
	hello, err := v.hello(early)
	if err != nil {
		return false, err
	}
	if _, err := t.conn.Write(plainRecord(typeHandshake, hello)); err != nil {
		return false, err
	}
	said, err := t.message()
	if err != nil {
		return false, err
	}
	share, resumed, err := readServerHello(said)
	if err != nil {
		return false, err
	}
	if !resumed && v.psk != nil {
		return false, errors.New("the gateway does not take its ticket")
	}
	theirs, err := ecdh.X25519().NewPublicKey(share)
	if err != nil {
		return false, err
	}
	shared, err := v.key.ECDH(theirs)
	if err != nil {
		return false, err
	}
	transcript := sha256.New()
	transcript.Write(hello)
	transcript.Write(said)
	secret := extract(shared, next(early))
	clients := expandLabel(secret, "c hs traffic", transcript.Sum(nil))
	servers := expandLabel(secret, "s hs traffic", transcript.Sum(nil))
	if t.in, err = newGuard(servers); err != nil {
		return false, err
	}
	if t.out, err = newGuard(clients); err != nil {
		return false, err
	}
	for said[0] != sayFinished {
		before := transcript.Sum(nil)
		if said, err = t.message(); err != nil {
			return false, err
		}
		transcript.Write(said)
		if said[0] == sayFinished && !hmac.Equal(said[4:], finished(servers, before)) {
			return false, errors.New("this Finished is of another handshake")
		}
	}
	there := transcript.Sum(nil)
	said = append([]byte{sayFinished, 0, 0, sha256.Size}, finished(clients, there)...)
	if _, err := t.conn.Write(t.out.seal(plainRecord(typeCCS, []byte{1}), typeHandshake, said)); err != nil {
		return false, err
	}
	transcript.Write(said)
	secret = extract(nil, next(secret))
	if v.psk == nil {
		t.resumption = expandLabel(secret, "res master", transcript.Sum(nil))
	}
	if t.out, err = newGuard(expandLabel(secret, "c ap traffic", there)); err != nil {
		return false, err
	}
	t.in, err = newGuard(expandLabel(secret, "s ap traffic", there))
	return resumed, err
}

// hello is a ClientHello as browsers send it, as far as the load goes: with a session ID, so that servers send ChangeCipherSpec.
func (v *visitor) hello(early []byte) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddUint8(sayClientHello)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		random := make([]byte, 64)
		rand.Read(random)
		b.AddUint16(tls.VersionTLS12)
		b.AddBytes(random[:32])
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(random[32:]) })
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint16(suite) })
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint8(0) })
		b.AddUint16LengthPrefixed(v.extensions)
	})
	hello, err := b.Bytes()
	if err != nil || v.psk == nil {
		return hello, err
	}
	// The binder is over all but the binders themselves: two lengths and one proof (RFC 8446 4.2.11.2).
	head := hello[:len(hello)-2-1-sha256.Size]
	hash := sha256.Sum256(head)
	copy(hello[len(head)+2+1:], finished(expandLabel(early, "res binder", emptyHash[:]), hash[:]))
	return hello, nil
}

func (v *visitor) extensions(b *cryptobyte.Builder) {
	extension := func(number uint16, body func(b *cryptobyte.Builder)) {
		b.AddUint16(number)
		b.AddUint16LengthPrefixed(body)
	}
	list16 := func(numbers ...uint16) func(b *cryptobyte.Builder) {
		return func(b *cryptobyte.Builder) {
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
				for _, n := range numbers {
					b.AddUint16(n)
				}
			})
		}
	}
	extension(extName, func(b *cryptobyte.Builder) {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint8(0)
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(v.name)) })
		})
	})
	extension(extGroups, list16(x25519))
	extension(extSignatures, list16(uint16(tls.ECDSAWithP256AndSHA256), uint16(tls.PSSWithSHA256)))
	extension(extVersions, func(b *cryptobyte.Builder) {
		b.AddUint8(2)
		b.AddUint16(tls.VersionTLS13)
	})
	extension(extPSKModes, func(b *cryptobyte.Builder) { b.AddBytes([]byte{1, 1}) }) // psk_dhe_ke
	extension(extShare, func(b *cryptobyte.Builder) {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint16(x25519)
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(v.key.PublicKey().Bytes()) })
		})
	})
	if v.psk == nil {
		return
	}
	extension(extPSK, func(b *cryptobyte.Builder) {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(v.ticket) })
			b.AddUint32(uint32(time.Since(v.since).Milliseconds()) + v.ageAdd)
		})
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(make([]byte, sha256.Size)) })
		})
	})
}

// readServerHello takes the key share out of a ServerHello, and whether it goes on with the session.
func readServerHello(said []byte) (share []byte, resumed bool, err error) {
	if said[0] != sayServerHello {
		return nil, false, fmt.Errorf("message %d where ServerHello was due", said[0])
	}
	p := cryptobyte.String(said[4:])
	var chosen, group uint16
	var id, extensions cryptobyte.String
	if !p.Skip(2+32) || !p.ReadUint8LengthPrefixed(&id) || !p.ReadUint16(&chosen) || !p.Skip(1) || !p.ReadUint16LengthPrefixed(&extensions) || chosen != suite {
		return nil, false, errors.New("not the ServerHello that was asked for")
	}
	for !extensions.Empty() {
		var number uint16
		var body, key cryptobyte.String
		if !extensions.ReadUint16(&number) || !extensions.ReadUint16LengthPrefixed(&body) {
			return nil, false, errors.New("extensions cut off")
		}
		switch number {
		case extShare:
			if !body.ReadUint16(&group) || !body.ReadUint16LengthPrefixed(&key) || group != x25519 {
				return nil, false, errors.New("another group")
			}
			share = key
		case extPSK:
			resumed = true
		}
	}
	return share, resumed, nil
}

// message is the next handshake message, its header included.
func (t *talk13) message() ([]byte, error) {
	for len(t.said) < 4 || len(t.said) < t.saidLen() {
		typ, p, err := t.record()
		if err != nil {
			return nil, err
		}
		if typ == typeHandshake {
			t.said = append(t.said, p...)
		} else if typ != typeCCS {
			return nil, fmt.Errorf("a record of type %d in the handshake: % x", typ, p[:min(len(p), 8)])
		}
	}
	n := t.saidLen()
	said := t.said[:n:n]
	t.said = t.said[n:]
	return said, nil
}

func (t *talk13) saidLen() int { return 4 + int(t.said[1])<<16 + int(t.said[2])<<8 + int(t.said[3]) }

// record is the content of the next record, valid until the next call.
func (t *talk13) record() (typ byte, p []byte, err error) {
	for {
		rest := t.buf[t.at:]
		if len(rest) >= 5 {
			if n := 5 + int(binary.BigEndian.Uint16(rest[3:])); len(rest) >= n {
				t.at += n
				if t.in != nil && rest[0] == typeData {
					return t.in.open(rest[:n])
				}
				return rest[0], rest[5:n], nil
			}
		}
		t.buf = append(t.buf[:0], rest...)
		t.at = 0
		if len(t.buf) == cap(t.buf) {
			t.buf = append(make([]byte, 0, 2*cap(t.buf)), t.buf...)
		}
		n, err := t.conn.Read(t.buf[len(t.buf):cap(t.buf)])
		if t.buf = t.buf[:len(t.buf)+n]; err != nil {
			return 0, nil, err
		}
	}
}

// Write sends p as one record.
func (t *talk13) Write(p []byte) (int, error) {
	if _, err := t.conn.Write(t.out.seal(nil, typeData, p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Read brings application data, and keeps a ticket that comes before it.
func (t *talk13) Read(p []byte) (int, error) {
	for len(t.data) == 0 {
		typ, got, err := t.record()
		switch {
		case err != nil:
			return 0, err
		case typ == typeData:
			t.data = got
		case typ == typeHandshake && len(got) > 4 && got[0] == sayTicket:
			t.ticket = append([]byte(nil), got[4:]...)
		case typ == typeAlert:
			return 0, fmt.Errorf("%w: alert % x", io.ErrUnexpectedEOF, got)
		}
	}
	n := copy(p, t.data)
	t.data = t.data[n:]
	return n, nil
}

// guard protects the records of one direction (RFC 8446 5.2 and 5.3).
type guard struct {
	aead cipher.AEAD
	iv   []byte
	seq  uint64
}

func newGuard(secret []byte) (*guard, error) {
	keys, err := record.TrafficKeys(suite, secret)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(keys.Key())
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	return &guard{aead: aead, iv: keys.IV()}, err
}

func (g *guard) nonce() []byte {
	n := make([]byte, 12)
	binary.BigEndian.PutUint64(n[4:], g.seq)
	for i := range n {
		n[i] ^= g.iv[i]
	}
	g.seq++
	return n
}

func (g *guard) open(rec []byte) (typ byte, p []byte, err error) {
	p, err = g.aead.Open(rec[5:5], g.nonce(), rec[5:], rec[:5])
	if err != nil || len(p) == 0 {
		return 0, nil, fmt.Errorf("a record that does not open: %v", err)
	}
	return p[len(p)-1], p[:len(p)-1], nil
}

// seal appends a record to dst.
func (g *guard) seal(dst []byte, typ byte, p []byte) []byte {
	head := binary.BigEndian.AppendUint16([]byte{typeData, 3, 3}, uint16(len(p)+1+16))
	return g.aead.Seal(append(dst, head...), g.nonce(), append(p[:len(p):len(p)], typ), head)
}

func plainRecord(typ byte, p []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{typ, 3, 3}, uint16(len(p))), p...)
}

// The key schedule of RFC 8446 7.1, with SHA-256.

var emptyHash = sha256.Sum256(nil)

// next is the salt that a secret becomes for the one after it.
func next(secret []byte) []byte { return expandLabel(secret, "derived", emptyHash[:]) }

// extract is HKDF-Extract; without a secret it takes zeros. Its sizes are ours, so it can't fail.
func extract(secret, salt []byte) []byte {
	if secret == nil {
		secret = make([]byte, sha256.Size)
	}
	out, err := hkdf.Extract(sha256.New, secret, salt)
	if err != nil {
		panic(err)
	}
	return out
}

func expandLabel(secret []byte, label string, context []byte) []byte {
	info := append([]byte{0, sha256.Size, byte(len("tls13 ") + len(label))}, "tls13 "+label...)
	info = append(append(info, byte(len(context))), context...)
	out, err := hkdf.Expand(sha256.New, secret, string(info), sha256.Size)
	if err != nil {
		panic(err)
	}
	return out
}

// finished is the proof that one has the secret and has seen the same messages.
func finished(secret, transcript []byte) []byte {
	mac := hmac.New(sha256.New, expandLabel(secret, "finished", nil))
	mac.Write(transcript)
	return mac.Sum(nil)
}
