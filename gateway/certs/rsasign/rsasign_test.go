// SPDX-License-Identifier: Apache-2.0

package rsasign

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1"
	"crypto/sha256"
	_ "crypto/sha512"
	"math/big"
	"sync"
	"testing"
)

func accelerated(t testing.TB) {
	t.Helper()
	if ok, why := Accelerated(); !ok {
		t.Skip("not accelerated: ", why)
	}
}

func newKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// textbook is RSASP1 with one exponentiation.
func textbook(key *rsa.PrivateKey, message []byte) []byte {
	x := new(big.Int).SetBytes(message)
	return x.Exp(x, key.D, key.N).FillBytes(make([]byte, len(message)))
}

func TestPowerIsRSASP1(t *testing.T) {
	accelerated(t)
	for range 4 {
		key := newKey(t, 2048)
		fast := accelerate(key)
		p, q, n := key.Primes[0], key.Primes[1], key.N
		less := func(x *big.Int) *big.Int { return new(big.Int).Sub(x, big.NewInt(1)) }
		messages := []*big.Int{new(big.Int), big.NewInt(1), big.NewInt(2), p, q, less(p), less(q), less(n),
			new(big.Int).Lsh(p, 1000), new(big.Int).Lsh(big.NewInt(1), 1040), less(new(big.Int).Lsh(big.NewInt(1), 1040))}
		for range 100 {
			x, err := rand.Int(rand.Reader, n)
			if err != nil {
				t.Fatal(err)
			}
			messages = append(messages, x)
		}
		for _, x := range messages {
			if x.Cmp(n) >= 0 {
				continue
			}
			var message [256]byte
			x.FillBytes(message[:])
			if got, want := fast.power(&message), textbook(key, message[:]); !bytes.Equal(got[:], want) {
				t.Fatalf("%x to the power of D is\n%x, want\n%x", x, *got, want)
			}
		}
	}
}

// FuzzMultiply: whatever the digits are, the product is congruent to what math/big says, and within its bounds. The bytes
// are a, b and m, one after the other; every other modulus is one whose digits make carries run far.
func FuzzMultiply(f *testing.F) {
	ones := bytes.Repeat([]byte{0xff}, 3*primeBits/8)
	f.Add(ones)
	f.Add(append(make([]byte, primeBits/4), ones[:primeBits/8]...))
	f.Add(bytes.Repeat([]byte{0x80, 0, 0, 0, 0, 0, 1}, 60))
	f.Fuzz(func(t *testing.T, data []byte) {
		accelerated(t)
		var all [3 * primeBits / 8]byte
		copy(all[:], data)
		part := func(i int) *big.Int { return new(big.Int).SetBytes(all[i*primeBits/8 : (i+1)*primeBits/8]) }
		a, b, m := part(0), part(1), part(2)
		m.SetBit(m.SetBit(m, primeBits-1, 1), 0, 1)
		full := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), primeBits), big.NewInt(1))
		both := [2]*big.Int{m, full}
		var moduli moduli
		digit := new(big.Int).Lsh(big.NewInt(1), digitBits)
		for i, m := range both {
			moduli.m[i] = numberOf(m)
			moduli.k0[i] = digit.Uint64() - new(big.Int).ModInverse(m, digit).Uint64()
		}
		x, y := pair{numberOf(a), numberOf(b)}, pair{numberOf(b), numberOf(a)}
		z := x
		multiply(&z, &z, &y, &moduli)
		want := new(big.Int).Mul(a, b)
		for i, m := range both {
			got := valueOf(t, &z[i])
			if got.Cmp(new(big.Int).Lsh(m, 1)) >= 0 {
				t.Errorf("%x is not below twice %x", got, m)
			}
			got.Lsh(got, digits*digitBits)
			if got.Sub(got, want).Mod(got, m).Sign() != 0 {
				t.Errorf("modulo %x: wrong product of %x and %x", m, a, b)
			}
		}
	})
}

// valueOf insists on digits, and on zeros behind them.
func valueOf(t *testing.T, n *number) *big.Int {
	t.Helper()
	x := new(big.Int)
	for d := len(n) - 1; d >= 0; d-- {
		if n[d] > digitMask || d >= digits && n[d] != 0 {
			t.Errorf("digit %d is %x", d, n[d])
		}
		x.Lsh(x, digitBits).Add(x, new(big.Int).SetUint64(n[d]))
	}
	return x
}

func TestChooseTakesEitherHalfFromAnyEntry(t *testing.T) {
	accelerated(t)
	var table [entries]pair
	for i := range table {
		for half := range table[i] {
			for d := range table[i][half] {
				table[i][half][d] = uint64(i<<16 | half<<8 | d)
			}
		}
	}
	for i := range entries {
		for j := range entries {
			var got pair
			choose(&got, &table, uint64(i), uint64(j))
			if want := (pair{table[i][0], table[j][1]}); got != want {
				t.Fatalf("%d and %d give %v", i, j, got)
			}
		}
	}
}

// options are all that TLS can ask for, and more.
var options = map[string]crypto.SignerOpts{
	"PSS, SHA-256":                 &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256},
	"PSS, SHA-384":                 &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA384},
	"PSS, SHA-512":                 &rsa.PSSOptions{SaltLength: 64, Hash: crypto.SHA512},
	"PSS, SHA-256, automatic salt": &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256},
	"PSS, SHA-256, short salt":     &rsa.PSSOptions{SaltLength: 8, Hash: crypto.SHA256},
	"PKCS #1, SHA-1":               crypto.SHA1,
	"PKCS #1, SHA-224":             crypto.SHA224,
	"PKCS #1, SHA-256":             crypto.SHA256,
	"PKCS #1, SHA-384":             crypto.SHA384,
	"PKCS #1, SHA-512":             crypto.SHA512,
}

func verify(key *rsa.PublicKey, opts crypto.SignerOpts, digest, signature []byte) error {
	if pss, ok := opts.(*rsa.PSSOptions); ok {
		return rsa.VerifyPSS(key, pss.Hash, digest, signature, pss)
	}
	return rsa.VerifyPKCS1v15(key, opts.HashFunc(), digest, signature)
}

func digestOf(hash crypto.Hash) []byte {
	h := hash.New()
	h.Write([]byte("signed"))
	return h.Sum(nil)
}

func TestSignaturesVerify(t *testing.T) {
	accelerated(t)
	key := newKey(t, 2048)
	signer := Signer(key)
	for name, opts := range options {
		digest := digestOf(opts.HashFunc())
		s, err := signer.Sign(rand.Reader, digest, opts)
		if err != nil {
			t.Fatal(name, err)
		}
		if err := verify(&key.PublicKey, opts, digest, s); err != nil {
			t.Error(name, err)
		}
		if _, isPSS := opts.(*rsa.PSSOptions); !isPSS {
			if standard, err := key.Sign(rand.Reader, digest, opts); err != nil || !bytes.Equal(standard, s) {
				t.Errorf("%s: not the standard library's signature (%v)", name, err)
			}
		}
	}
	for name, fast := range map[string]bool{"PSS, SHA-256": true, "PSS, SHA-384": true, "PSS, SHA-512": true, "PKCS #1, SHA-256": true,
		"PKCS #1, SHA-384": true, "PKCS #1, SHA-512": true, "PSS, SHA-256, short salt": false} {
		opts := options[name]
		if s := signer.(*Key).sign(digestOf(opts.HashFunc()), opts); (s != nil) != fast {
			t.Errorf("%s: fast is %v", name, s != nil)
		}
	}
}

func TestPSSSaltsDiffer(t *testing.T) {
	accelerated(t)
	k, opts := accelerate(newKey(t, 2048)), options["PSS, SHA-256"]
	digest := digestOf(crypto.SHA256)
	if bytes.Equal(k.sign(digest, opts), k.sign(digest, opts)) {
		t.Error("two signatures are the same")
	}
}

func TestDigestOfWrongLengthIsRefused(t *testing.T) {
	accelerated(t)
	signer := Signer(newKey(t, 2048))
	for name, opts := range options {
		if s, err := signer.Sign(rand.Reader, make([]byte, 17), opts); err == nil {
			t.Errorf("%s: %x", name, s)
		}
	}
}

// TestFaultNeverLeaves: a computation that goes wrong modulo one prime would tell it. The standard library signs instead.
func TestFaultNeverLeaves(t *testing.T) {
	accelerated(t)
	key := newKey(t, 2048)
	for name, spoil := range map[string]func(k *Key){
		"exponent": func(k *Key) { k.exponents[1][3] ^= 4 },
		"prime":    func(k *Key) { k.primes.m[0][2] ^= 1 << 20 },
		"inverse":  func(k *Key) { k.inverse[0][7]++ },
	} {
		k := accelerate(key)
		spoil(k)
		for _, opts := range []crypto.SignerOpts{options["PSS, SHA-256"], options["PKCS #1, SHA-384"]} {
			digest := digestOf(opts.HashFunc())
			if k.sign(digest, opts) != nil {
				t.Errorf("%s: a wrong signature was given away", name)
			}
			if s, err := k.Sign(rand.Reader, digest, opts); err != nil || verify(&key.PublicKey, opts, digest, s) != nil {
				t.Errorf("%s: no signature (%v)", name, err)
			}
		}
	}
}

// TestNothingIsLeftOfASignature: what a signature was computed with is cleared before the next one may have it.
func TestNothingIsLeftOfASignature(t *testing.T) {
	accelerated(t)
	w, taken := new(work), 0
	works = sync.Pool{New: func() any { taken++; return w }}
	defer func() { works = sync.Pool{New: newWork} }()
	if accelerate(newKey(t, 2048)).sign(digestOf(crypto.SHA256), crypto.SHA256) == nil || taken != 1 {
		t.Fatal("no signature")
	}
	if *w != (work{}) {
		t.Error("something is left")
	}
}

func TestOtherKeysAreLeftAlone(t *testing.T) {
	for _, bits := range []int{1024, 3072} {
		if key := newKey(t, bits); Signer(key) != crypto.Signer(key) {
			t.Errorf("%d bits: not the key itself", bits)
		}
	}
}

// TestKeyStaysWhatItIs for crypto/tls, which looks at the public key, and for others that decrypt.
func TestKeyStaysWhatItIs(t *testing.T) {
	key := newKey(t, 2048)
	signer := Signer(key)
	if !key.PublicKey.Equal(signer.Public()) {
		t.Error("another public key")
	}
	secret, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &key.PublicKey, []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := signer.(crypto.Decrypter).Decrypt(rand.Reader, secret, &rsa.OAEPOptions{Hash: crypto.SHA256}); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
}

func BenchmarkSign(b *testing.B) {
	key := newKey(b, 2048)
	digest := sha256.Sum256(nil)
	opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	for name, signer := range map[string]crypto.Signer{"standard": key, "fast": Signer(key)} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := signer.Sign(rand.Reader, digest[:], opts); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
