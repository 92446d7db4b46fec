// SPDX-License-Identifier: Apache-2.0

package ktls

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// supported skips the test where the kernel has no TLS, and fails it where it has to have it: in the VM (see vm).
func supported(t *testing.T) *Support {
	t.Helper()
	s := Probe()
	if s.Absent == nil {
		return s
	}
	if os.Getenv("KTLS_REQUIRED") != "" {
		t.Fatal(s)
	}
	t.Skip(s)
	return s
}

// TestKTLSPassesItsProbe: every version and cipher, in both directions.
func TestKTLSPassesItsProbe(t *testing.T) {
	before := Stat()
	s := supported(t)
	t.Log(s)
	for _, k := range Kinds() {
		for way, err := range map[string]error{"TX": s.TX(k.suite()), "RX": s.RX(k.suite())} {
			if err != nil {
				t.Errorf("%s: %v", way, err)
			}
		}
	}
	after := Stat()
	for _, name := range []string{"TlsTxSw", "TlsRxSw"} {
		if n := after[name] - before[name]; n < uint64(kinds) {
			t.Errorf("%s counted %d of %d", name, n, kinds)
		}
	}
	var name unix.Utsname
	_ = unix.Uname(&name)
	release := unix.ByteSliceToString(name.Release[:])
	if old := strings.HasPrefix(release, "6.1.") || strings.HasPrefix(release, "6.12."); old && s.Rekey {
		t.Errorf("Linux %s can renew keys?", release)
	}
}

// TestMendedByRelease: a kernel is trusted with what strangers send only if its version tells.
func TestMendedByRelease(t *testing.T) {
	for release, want := range map[string]bool{
		"6.1.0-40-cloud-amd64": false, "6.12.48+deb13-cloud-amd64": false, "6.18.0": false, "6.19.11-1-default": false,
		"7.0.0-rc7": false, "7.0-rc7-amd64": false, "7.0.0": true, "7.0-amd64": true, "7.1.0-rc1": true, "10.2.3": true,
		"": false, "7": false, "linux": false, "-7.1": false,
	} {
		if got := mended(release); got != want {
			t.Errorf("%q: mended is %v", release, got)
		}
	}
}

// TestSupportSaysWhatIsNotUsed: what the log and 'tlsnat version' say names the setting that takes an old kernel.
func TestSupportSaysWhatIsNotUsed(t *testing.T) {
	for mended, want := range map[bool]bool{false: true, true: false} {
		text := (&Support{Mended: mended}).String()
		if strings.Contains(text, "TLSNAT_KTLS=rx") != want || strings.Contains(text, "Linux 7.0") != want {
			t.Errorf("mended %v: %q", mended, text)
		}
	}
}

// TestKTLSProbeTellsADamagedKey: the probe is no formality.
func TestKTLSProbeTellsADamagedKey(t *testing.T) {
	supported(t)
	for _, k := range Kinds() {
		err := try(k, func(p *pair) error {
			_, other, err := testKeys(k)
			if err != nil {
				return err
			}
			if err := SetTX(p.kernel, &other, 0x0102); err != nil {
				t.Fatal(err)
			}
			if err := p.write(pattern(100)); err != nil {
				t.Fatal(err)
			}
			return p.expect(pattern(100))
		})
		if e, ok := errors.AsType[*record.Error](err); !ok || e.Alert != record.AlertBadRecordMAC {
			t.Errorf("%s: %v", k, err)
		}
	}
}

// TestKTLSSentTellsWhatTheKernelKeeps: as long as a peer does not read, the kernel's TLS has more than TCP; and it's told
// when that's over.
func TestKTLSSentTellsWhatTheKernelKeeps(t *testing.T) {
	supported(t)
	for _, kind := range Kinds() {
		if err := try(kind, func(p *pair) error { return fillAndDrain(t, p, kind) }); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

func fillAndDrain(t *testing.T, p *pair, kind Kind) error {
	k, seq := p.reader.Export()
	if err := SetTX(p.kernel, &k, seq); err != nil {
		return err
	}
	if err := unix.SetNonblock(int(p.kernel), true); err != nil {
		return err
	}
	base, err := Sent(p.kernel)
	if err != nil {
		return err
	}
	wrote := 0
	for {
		n, err := unix.Write(int(p.kernel), pattern(50000))
		if err != nil {
			if err != unix.EAGAIN {
				return err
			}
			break
		}
		wrote += n
	}
	kept := func() uint64 {
		next, err1 := NextTX(p.kernel, kind.suite())
		sent, err2 := Sent(p.kernel)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		return base + uint64(wrote) + (next-seq)*uint64(Overhead(kind.suite())) - sent
	}
	full := kept()
	t.Logf("%s: wrote %d bytes, of which the kernel keeps %d from TCP", kind, wrote, int64(full))
	if int64(full) < 0 {
		t.Errorf("%s: TCP has %d bytes more than the kernel sealed", kind, -int64(full))
	}
	for read := 0; read < wrote; {
		rec, err := p.next()
		if err != nil {
			return err
		}
		read += len(rec.Data)
	}
	if n := kept(); n != 0 {
		t.Errorf("%s: everything was read, and %d bytes of %d are left", kind, int64(n), full)
	}
	return nil
}

// TestKTLSAbsentSaysWhatToDo: where there is no module the reason is one an operator can act on.
func TestKTLSAbsentSaysWhatToDo(t *testing.T) {
	s := Probe()
	if s.Absent == nil {
		t.Skip("this kernel has TLS")
	}
	if !strings.Contains(s.String(), "modprobe tls") {
		t.Errorf("%q", s)
	}
	for _, k := range Kinds() {
		if s.TX(k.suite()) == nil || s.RX(k.suite()) == nil {
			t.Errorf("%s is said to work", k)
		}
	}
}

// TestKTLSInfoIsLaidOutAsTheKernelReads: struct tls12_crypto_info_aes_gcm_128 and its sisters.
func TestKTLSInfoIsLaidOutAsTheKernelReads(t *testing.T) {
	for _, k := range Kinds() {
		keys, _, err := testKeys(k)
		if err != nil {
			t.Fatal(err)
		}
		var buf [maxInfoLen]byte
		b := k.info(&buf, &keys, 0x0102030405060708)
		if len(b) != k.infoLen() || string(b[len(b)-8:]) != "\x01\x02\x03\x04\x05\x06\x07\x08" {
			t.Errorf("%s: %x", k, b)
		}
		key := b[infoLen+8:][:len(keys.Key())]
		if k.cipher() == cipherChaCha20 {
			key = b[infoLen+12:][:32]
		}
		if string(key) != string(keys.Key()) {
			t.Errorf("%s: the key is not in its place", k)
		}
		if got, ok := KindOf(k.suite()); !ok || got != k {
			t.Errorf("%s is found as %s", k, got)
		}
	}
	if _, ok := KindOf(0x002f); ok {
		t.Error("a CBC suite has a kind")
	}
}

// BenchmarkHandOver is what it costs to give one direction to the kernel; BenchmarkTwoCopies what a mebibyte costs that
// goes through user space instead: read into it and written out of it again. Their ratio tells from which size on the
// kernel pays.
func BenchmarkHandOver(b *testing.B) {
	if s := Probe(); s.Absent != nil {
		b.Skip(s)
	}
	down, _, err := testKeys(TLS13AES128)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.StopTimer()
		p, err := newPair()
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		_, sent := Sent(p.kernel)
		if err := errors.Join(Attach(p.kernel), sent, SetTX(p.kernel, &down, 0)); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		p.close()
		b.StartTimer()
	}
}

func BenchmarkTwoCopies(b *testing.B) {
	p, err := newPair()
	if err != nil {
		b.Fatal(err)
	}
	defer p.close()
	buf := make([]byte, 64<<10) // what a pipe takes
	for b.Loop() {
		for range 16 {
			if n, err := unix.Write(p.pipe[1], buf); err != nil || n != len(buf) {
				b.Fatal(n, err)
			}
			if n, err := unix.Read(p.pipe[0], buf); err != nil || n != len(buf) {
				b.Fatal(n, err)
			}
		}
	}
}
