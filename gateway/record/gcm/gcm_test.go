// SPDX-License-Identifier: Apache-2.0

package gcm

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
)

var keySizes = []int{16, 32}

// random is the same in each run: what fails fails again.
func random(seed uint64) *rand.ChaCha8 {
	return rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed)))
}

func randomBytes(r *rand.ChaCha8, n int) []byte {
	b := make([]byte, n)
	r.Read(b)
	return b
}

// both are New's and the standard library's AES-GCM under one key.
func both(t testing.TB, key []byte) (ours, standard cipher.AEAD) {
	t.Helper()
	ours, err := New(key)
	standard, err2 := newStandard(key)
	if err := cmp.Or(err, err2); err != nil {
		t.Fatal(err)
	}
	return ours, standard
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAcceleratesWhereItCan fails when the self-test does.
func TestAcceleratesWhereItCan(t *testing.T) {
	ok, why := Accelerated()
	t.Log(ok, why)
	if can := missing() == "" && !fips140.Enabled(); ok != can || ok == (why != "") {
		t.Errorf("accelerated: %v, %q; missing: %q", ok, why, missing())
	}
	aead, err := New(make([]byte, 16))
	if err != nil {
		t.Fatal(err)
	}
	if _, accelerated := aead.(interface{ Wipe() }); accelerated != ok {
		t.Errorf("New made a %T", aead)
	}
}

// TestSpecification are the cases of the GCM specification with nonces of 12 bytes (D. McGrew, J. Viega, "The
// Galois/Counter Mode of Operation", appendix B: 1-4 and 13-16).
func TestSpecification(t *testing.T) {
	const (
		key   = "feffe9928665731c6d6a8f9467308308"
		nonce = "cafebabefacedbaddecaf888"
		text  = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
		data  = "feedfacedeadbeeffeedfacedeadbeefabaddad2"
		s128  = "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091"
		s256  = "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
	)
	zeros := strings.Repeat("00", 32)
	for i, c := range []struct{ key, nonce, text, data, sealed string }{
		{zeros[:32], zeros[:24], "", "", "58e2fccefa7e3061367f1d57a4e7455a"},
		{zeros[:32], zeros[:24], zeros[:32], "", "0388dace60b6a392f328c2b971b2fe78" + "ab6e47d42cec13bdf53a67b21257bddf"},
		{key, nonce, text + "1aafd255", "", s128 + "473f5985" + "4d5c2af327cd64a62cf35abd2ba6fab4"},
		{key, nonce, text, data, s128 + "5bc94fbc3221a5db94fae95ae7121a47"},
		{zeros, zeros[:24], "", "", "530f8afbc74536b9a963b4f1c4cb738b"},
		{zeros, zeros[:24], zeros[:32], "", "cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919"},
		{key + key, nonce, text + "1aafd255", "", s256 + "898015ad" + "b094dac5d93471bdec1a502270e3cc6c"},
		{key + key, nonce, text, data, s256 + "76fc6ece0f4e1768cddf8853bb2d551b"},
	} {
		ours, _ := both(t, unhex(t, c.key))
		nonce, data, sealed := unhex(t, c.nonce), unhex(t, c.data), unhex(t, c.sealed)
		if got := ours.Seal(nil, nonce, unhex(t, c.text), data); !bytes.Equal(got, sealed) {
			t.Errorf("case %d: sealed %x", i, got)
		}
		if got, err := ours.Open(nil, nonce, sealed, data); err != nil || hex.EncodeToString(got) != c.text {
			t.Errorf("case %d: opened %x, %v", i, got, err)
		}
	}
}

// agree seals and opens m, in place and from one memory to another, and holds the results to the standard library's.
func agree(t testing.TB, ours, standard cipher.AEAD, m message) {
	t.Helper()
	want := standard.Seal(nil, m.nonce, m.text, m.data)
	apart := ours.Seal(make([]byte, 0, len(want)), m.nonce, m.text, m.data)
	inPlace := append(make([]byte, 0, len(want)), m.text...)
	inPlace = ours.Seal(inPlace[:0], m.nonce, inPlace, m.data)
	if !bytes.Equal(apart, want) || !bytes.Equal(inPlace, want) {
		t.Fatalf("%d bytes with %d: sealed\n%x, in place\n%x, want\n%x", len(m.text), len(m.data), apart, inPlace, want)
	}
	apart, err := ours.Open(make([]byte, 0, len(m.text)), m.nonce, want, m.data)
	inPlace, err2 := ours.Open(inPlace[:0], m.nonce, inPlace, m.data)
	if cmp.Or(err, err2) != nil || !bytes.Equal(apart, m.text) || !bytes.Equal(inPlace, m.text) {
		t.Fatalf("%d bytes with %d: opened %v\n%x, in place %v\n%x, want\n%x", len(m.text), len(m.data), err, apart, err2, inPlace, m.text)
	}
}

// TestAgreesWithStandardLibrary goes through all lengths up to some over four chunks of 256 bytes, with all lengths of
// additional data up to some over two blocks.
func TestAgreesWithStandardLibrary(t *testing.T) {
	for _, keySize := range keySizes {
		t.Run(fmt.Sprint(keySize), func(t *testing.T) {
			r := random(uint64(keySize))
			ours, standard := both(t, randomBytes(r, keySize))
			pool := randomBytes(r, 4096)
			for n := range 1101 {
				for d := range 41 {
					from := r.Uint64() % 1024
					agree(t, ours, standard, message{pool[from : from+12], pool[from+12:][:n], pool[from+2048:][:d]})
				}
			}
		})
	}
}

// TestKeysAndTexts are as different as chance makes them: every other key, carries of the counter out of its first and
// second byte, the largest records.
func TestKeysAndTexts(t *testing.T) {
	r := random(3)
	for _, n := range []int{0, 5, 4063, 4064, 4080, 4096, 16384, 16385, 16640, 1<<20 - 32, 1<<20 + 1000} {
		for _, keySize := range keySizes {
			for range 1 + 200_000/(n+2000) {
				ours, standard := both(t, randomBytes(r, keySize))
				agree(t, ours, standard, message{randomBytes(r, 12), randomBytes(r, n), randomBytes(r, int(r.Uint64()%100))})
			}
		}
	}
}

// TestExtremeBits: all ones and all zeros are where a carry, a reduction or a shift that is wrong shows.
func TestExtremeBits(t *testing.T) {
	for _, keySize := range keySizes {
		for _, b := range []byte{0, 0x80, 1, 0xff} {
			fill := bytes.Repeat([]byte{b}, 1000)
			ours, standard := both(t, fill[:keySize])
			for n := range 600 {
				agree(t, ours, standard, message{fill[:12], fill[:n], fill[:n%40]})
			}
		}
	}
}

// TestForgeriesAreRefused: no single bit of what was sealed, the additional data or the nonce can be changed, nothing
// can be cut off or added; and what would have been the text is cleared.
func TestForgeriesAreRefused(t *testing.T) {
	for _, keySize := range keySizes {
		for _, n := range []int{0, 1, 16, 41, 300, 600} {
			r := random(uint64(n))
			ours, _ := both(t, randomBytes(r, keySize))
			nonce, text, data := randomBytes(r, 12), randomBytes(r, n), randomBytes(r, 13)
			sealed := ours.Seal(nil, nonce, text, data)
			refused := func(what string, sealed []byte) {
				t.Helper()
				out := bytes.Clone(sealed)
				got, err := ours.Open(out[:0], nonce, out, data)
				if err == nil || got != nil {
					t.Fatalf("%d bytes, %s: opened", n, what)
				}
				if end := max(len(out)-16, 0); !bytes.Equal(out[:end], make([]byte, end)) || !bytes.Equal(out[end:], sealed[end:]) {
					t.Fatalf("%d bytes, %s: left %x", n, what, out)
				}
			}
			for name, b := range map[string][]byte{"sealed": sealed, "data": data, "nonce": nonce} {
				for bit := range len(b) * 8 {
					b[bit/8] ^= 1 << (bit % 8)
					refused(fmt.Sprint(name, " bit ", bit), sealed)
					b[bit/8] ^= 1 << (bit % 8)
				}
			}
			for cut := 1; cut <= min(len(sealed), 40); cut++ {
				refused("cut", sealed[:len(sealed)-cut])
			}
			refused("longer", append(bytes.Clone(sealed), 0))
			data = data[:12]
			refused("less data", sealed)
		}
	}
}

// TestUnalignedBuffers, with what lies around them left alone.
func TestUnalignedBuffers(t *testing.T) {
	r := random(4)
	ours, standard := both(t, randomBytes(r, 16))
	for _, n := range []int{1, 64, 257, 777} {
		nonce, text := randomBytes(r, 12), randomBytes(r, n)
		want := standard.Seal(nil, nonce, text, nil)
		for from := range 65 {
			for to := range 65 {
				in, out := make([]byte, from+n), bytes.Repeat([]byte{0xa5}, to+n+16+80)
				copy(in[from:], text)
				ours.Seal(out[to:to], nonce, in[from:], nil)
				around := bytes.Count(out[:to], []byte{0xa5}) + bytes.Count(out[to+n+16:], []byte{0xa5})
				if !bytes.Equal(out[to:to+n+16], want) || around != to+80 {
					t.Fatalf("%d bytes from %d to %d: %x", n, from, to, out)
				}
				clear(in)
				if got, err := ours.Open(in[from:from], nonce, out[to:to+n+16], nil); err != nil || !bytes.Equal(got, text) {
					t.Fatalf("%d bytes from %d to %d: opened %x, %v", n, to, from, got, err)
				}
			}
		}
	}
}

// fenced is size bytes of memory, a multiple of the page's, between pages that no one may touch.
func fenced(t testing.TB, size int) []byte {
	t.Helper()
	page := os.Getpagesize()
	b, err := syscall.Mmap(-1, 0, size+2*page, syscall.PROT_NONE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Munmap(b) })
	inner := b[page : page+size : page+size]
	if err := syscall.Mprotect(inner, syscall.PROT_READ|syscall.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	return inner
}

// TestNothingBeyondIsTouched: everything ends where the next byte is a fault, and then begins behind one.
func TestNothingBeyondIsTouched(t *testing.T) {
	size := os.Getpagesize()
	key, nonce, text, sealed, data := fenced(t, size), fenced(t, size), fenced(t, size), fenced(t, size), fenced(t, size)
	random(5).Read(text)
	for name, edge := range map[string]func(b []byte, n int) []byte{
		"end":   func(b []byte, n int) []byte { return b[size-n:] },
		"begin": func(b []byte, n int) []byte { return b[:n:n] },
	} {
		for _, keySize := range keySizes {
			ours, standard := both(t, edge(key, keySize))
			for n := range 600 {
				m := message{edge(nonce, 12), edge(text, n), edge(data, n%18)}
				got := ours.Seal(edge(sealed, n+16)[:0], m.nonce, m.text, m.data)
				if !bytes.Equal(got, standard.Seal(nil, m.nonce, m.text, m.data)) {
					t.Fatalf("%s, %d bytes: sealed %x", name, n, got)
				}
				if opened, err := ours.Open(got[:0], m.nonce, got, m.data); err != nil || !bytes.Equal(opened, m.text) {
					t.Fatalf("%s, %d bytes: opened %x, %v", name, n, opened, err)
				}
			}
		}
	}
}

// TestAppends: what dst holds stays, and there need not be room.
func TestAppends(t *testing.T) {
	ours, standard := both(t, make([]byte, 16))
	nonce, text := make([]byte, 12), []byte("text")
	for _, spare := range []int{0, 3, 4, 19, 20, 21, 100} {
		dst := append(make([]byte, 0, 6+spare), "before"...)
		sealed := ours.Seal(dst, nonce, text, nil)
		if want := standard.Seal([]byte("before"), nonce, text, nil); !bytes.Equal(sealed, want) {
			t.Errorf("%d spare: sealed %x, want %x", spare, sealed, want)
		}
		if (&sealed[0] == &dst[0]) != (spare >= 20) {
			t.Errorf("%d spare: not where there was room", spare)
		}
		opened, err := ours.Open(dst[:6:6+min(spare, 4)], nonce, bytes.Clone(sealed[6:]), nil)
		if err != nil || string(opened) != "beforetext" {
			t.Errorf("%d spare: opened %q, %v", spare, opened, err)
		}
	}
}

// TestMisuseIsAsWithTheStandardLibrary: what panics there panics here, and nothing else does.
func TestMisuseIsAsWithTheStandardLibrary(t *testing.T) {
	const tooLong = (1<<32-2)*16 + 1
	huge, err := syscall.Mmap(-1, 0, 1<<37, syscall.PROT_NONE, syscall.MAP_ANON|syscall.MAP_PRIVATE|syscall.MAP_NORESERVE)
	if err != nil {
		t.Skip("no address space for a text that is too long:", err)
	}
	t.Cleanup(func() { syscall.Munmap(huge) })
	buf, nonce, apart := make([]byte, 200), make([]byte, 12), make([]byte, 100)
	for name, c := range map[string]struct {
		panics bool
		use    func(a cipher.AEAD)
	}{
		"in place":              {false, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, buf[:50], apart) }},
		"apart":                 {false, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, apart, apart) }},
		"side by side":          {false, func(a cipher.AEAD) { a.Seal(buf[100:100], nonce, buf[50:100], buf[:100]) }},
		"side by side, open":    {false, func(a cipher.AEAD) { a.Open(buf[50:50], nonce, buf[100:150], buf[84:]) }},
		"no nonce":              {true, func(a cipher.AEAD) { a.Seal(nil, nil, buf, nil) }},
		"short nonce":           {true, func(a cipher.AEAD) { a.Open(nil, nonce[:11], buf, nil) }},
		"long nonce":            {true, func(a cipher.AEAD) { a.Seal(nil, buf[:13], buf, nil) }},
		"overlap behind":        {true, func(a cipher.AEAD) { a.Seal(buf[1:1], nonce, buf[:50], nil) }},
		"overlap before":        {true, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, buf[1:50], nil) }},
		"overlap with the tag":  {true, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, buf[65:115], nil) }},
		"overlap, open":         {true, func(a cipher.AEAD) { a.Open(buf[1:1], nonce, buf[:50], nil) }},
		"overlap, open, before": {true, func(a cipher.AEAD) { a.Open(buf[:0], nonce, buf[16:80], nil) }},
		"data in the text":      {true, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, buf[:50], buf[40:45]) }},
		"data in the tag":       {true, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, buf[:50], buf[65:70]) }},
		"data behind the tag":   {false, func(a cipher.AEAD) { a.Seal(buf[:0], nonce, buf[:50], buf[66:70]) }},
		"data in what opens":    {true, func(a cipher.AEAD) { a.Open(buf[:0], nonce, buf[:50], buf[33:40]) }},
		"data in the old tag":   {false, func(a cipher.AEAD) { a.Open(buf[:0], nonce, buf[:50], buf[34:40]) }},
		"nothing to open":       {false, func(a cipher.AEAD) { a.Open(nil, nonce, nil, nil) }},
		"too long":              {true, func(a cipher.AEAD) { a.Seal(nil, nonce, huge[:tooLong], nil) }},
		"too long to open":      {false, func(a cipher.AEAD) { a.Open(nil, nonce, huge[:tooLong+16], nil) }},
	} {
		ours, standard := both(t, make([]byte, 32))
		if got, want := panics(func() { c.use(ours) }), panics(func() { c.use(standard) }); got != c.panics || want != c.panics {
			t.Errorf("%s: panics here: %v, there: %v", name, got, want)
		}
	}
}

func panics(f func()) (yes bool) {
	defer func() { yes = recover() != nil }()
	f()
	return false
}

func TestKeysOfOtherSizesAreRefused(t *testing.T) {
	for n := range 66 {
		a, err := New(make([]byte, n))
		if ok := n == 16 || n == 32; ok != (err == nil) || ok != (a != nil) || !ok && err != aes.KeySizeError(n) {
			t.Errorf("%d bytes: %v, %v", n, a, err)
		}
	}
	a, _ := New(make([]byte, 16))
	if a.NonceSize() != 12 || a.Overhead() != 16 {
		t.Errorf("nonce of %d bytes, tag of %d", a.NonceSize(), a.Overhead())
	}
}

// TestNothingIsShared: goroutines use one AEAD and one each, while the collector stops them where it may.
func TestNothingIsShared(t *testing.T) {
	key := make([]byte, 32)
	shared, standard := both(t, key)
	text := randomBytes(random(6), 20000)
	var workers sync.WaitGroup
	done := make(chan struct{})
	var collector sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				runtime.GC()
			}
		}
	})
	for i := range 4 {
		workers.Go(func() {
			own, err := New(key)
			if err != nil {
				t.Error(err)
				return
			}
			buf := make([]byte, 20000+16)
			for j := range 100 {
				nonce, n := bytes.Repeat([]byte{byte(i), byte(j)}, 6), (i*7919+j*1009)%20000
				copy(buf, text)
				sealed := shared.Seal(buf[:0], nonce, buf[:n], text[:5])
				if !bytes.Equal(sealed, standard.Seal(nil, nonce, text[:n], text[:5])) {
					t.Errorf("goroutine %d: %d bytes sealed wrongly", i, n)
				}
				if got, err := own.Open(buf[:0], nonce, sealed, text[:5]); err != nil || !bytes.Equal(got, text[:n]) {
					t.Errorf("goroutine %d: %d bytes opened wrongly: %v", i, n, err)
				}
			}
		})
	}
	workers.Wait()
	close(done)
	collector.Wait()
}

func TestNothingIsAllocated(t *testing.T) {
	ours, _ := both(t, make([]byte, 16))
	buf, nonce := make([]byte, 5+16384+16), make([]byte, 12)
	if n := testing.AllocsPerRun(100, func() {
		ours.Seal(buf[5:5], nonce, buf[5:5+16384], buf[:5])
		if _, err := ours.Open(buf[5:5], nonce, buf[5:], buf[:5]); err != nil {
			t.Fatal(err)
		}
		ours.Open(buf[5:5], nonce, buf[5:], buf[:5])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// faulty goes wrong in one way only.
type faulty struct {
	cipher.AEAD
	seal func(plaintext, sealed []byte)
	open func(opened []byte, err error) ([]byte, error)
}

func (f *faulty) Seal(dst, nonce, plaintext, data []byte) []byte {
	n := len(plaintext)
	sealed := f.AEAD.Seal(dst, nonce, plaintext, data)
	if f.seal != nil {
		f.seal(sealed[:n], sealed)
	}
	return sealed
}

func (f *faulty) Open(dst, nonce, ciphertext, data []byte) ([]byte, error) {
	opened, err := f.AEAD.Open(dst, nonce, ciphertext, data)
	if f.open != nil {
		return f.open(opened, err)
	}
	return opened, err
}

// TestSelfTestFindsFaults of the kinds that a processor, or an assembler, could have.
func TestSelfTestFindsFaults(t *testing.T) {
	for name, f := range map[string]faulty{
		"none":                        {},
		"a bit of the tag":            {seal: func(_, s []byte) { s[len(s)-1] ^= 1 }},
		"a bit of the text":           {seal: func(p, _ []byte) { flipLast(p) }},
		"only in the sixteenth block": {seal: func(p, _ []byte) { flipLast(p[:min(len(p), 256)][min(len(p), 255):]) }},
		"only behind a chunk":         {seal: func(p, _ []byte) { flipLast(p[min(len(p), 256):]) }},
		"only behind a byte of count": {seal: func(p, _ []byte) { flipLast(p[min(len(p), 4096):]) }},
		"opens to something else":     {open: func(o []byte, err error) ([]byte, error) { flipLast(o); return o, err }},
		"opens forgeries":             {open: func(o []byte, _ error) ([]byte, error) { return o, nil }},
		"opens nothing":               {open: func([]byte, error) ([]byte, error) { return nil, os.ErrInvalid }},
	} {
		got := agrees(func(key []byte) cipher.AEAD {
			f.AEAD, _ = newStandard(key)
			return &f
		})
		if got != (name == "none") {
			t.Errorf("%s: agrees: %v", name, got)
		}
	}
}

func flipLast(b []byte) {
	if len(b) > 0 {
		b[len(b)-1] ^= 0x80
	}
}

// FuzzAgreesWithStandardLibrary: texts are what the fuzzer has, over and over, up to some over a record's length.
func FuzzAgreesWithStandardLibrary(f *testing.F) {
	f.Fuzz(func(t *testing.T, secret, text, data []byte, n uint16, long bool) {
		hash := sha256.Sum256(secret)
		key, nonce := hash[:16], hash[20:]
		if long {
			key = hash[:]
		}
		whole := make([]byte, int(n)%17000)
		for at := 0; at < len(whole) && len(text) > 0; {
			at += copy(whole[at:], text)
		}
		ours, standard := both(t, key)
		m := message{nonce, whole, data}
		agree(t, ours, standard, m)

		sealed := ours.Seal(nil, m.nonce, m.text, m.data)
		at := int(hash[0]) * len(sealed) / 256
		sealed[at] ^= hash[1] | 1
		if _, err := ours.Open(sealed[:0], m.nonce, sealed, m.data); err == nil {
			t.Fatalf("byte %d of %d forged: opened", at, len(sealed))
		}
	})
}

// A fuzz target without seeds runs nothing in an ordinary test.
func TestFuzzTargetHasSeeds(t *testing.T) {
	seeds, err := os.ReadDir(filepath.Join("testdata", "fuzz", "FuzzAgreesWithStandardLibrary"))
	if err != nil || len(seeds) == 0 {
		t.Error("no seeds:", err)
	}
}

// eachSize sets ours beside the standard library's, on records as TLS has them: behind a header of five bytes, which
// is the additional data too.
func eachSize(b *testing.B, f func(b *testing.B, a cipher.AEAD, record []byte)) {
	for _, keySize := range keySizes {
		ours, standard := both(b, make([]byte, keySize))
		for _, who := range []struct {
			name string
			aead cipher.AEAD
		}{{"ours", ours}, {"std", standard}} {
			for _, n := range []int{256, 1400, 16384} {
				b.Run(fmt.Sprintf("%s/%d/aes%d", who.name, n, keySize*8), func(b *testing.B) {
					b.SetBytes(int64(n))
					b.ReportAllocs()
					f(b, who.aead, make([]byte, 5+n+16))
				})
			}
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	nonce := make([]byte, 12)
	eachSize(b, func(b *testing.B, a cipher.AEAD, record []byte) {
		for b.Loop() {
			a.Seal(record[5:5], nonce, record[5:len(record)-16], record[:5])
		}
	})
}

// BenchmarkOpen opens to memory elsewhere, because opening in place leaves nothing to be opened again.
func BenchmarkOpen(b *testing.B) {
	nonce := make([]byte, 12)
	eachSize(b, func(b *testing.B, a cipher.AEAD, record []byte) {
		a.Seal(record[5:5], nonce, record[5:len(record)-16], record[:5])
		opened := make([]byte, len(record))
		for b.Loop() {
			if _, err := a.Open(opened[5:5], nonce, record[5:], record[:5]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkNew(b *testing.B) {
	for _, keySize := range keySizes {
		key := make([]byte, keySize)
		for name, fresh := range map[string]func([]byte) (cipher.AEAD, error){"ours": New, "std": newStandard} {
			b.Run(fmt.Sprintf("%s/aes%d", name, keySize*8), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := fresh(key); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkSelfTest is what every start of the program pays.
func BenchmarkSelfTest(b *testing.B) {
	if why := missing(); why != "" {
		b.Skip(why)
	}
	for b.Loop() {
		if !agrees(newAEAD) {
			b.Fatal("failed")
		}
	}
}
