// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package gcm

import (
	"crypto/cipher"
	"crypto/fips140"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

func skipUnaccelerated(t *testing.T) {
	t.Helper()
	if ok, why := Accelerated(); !ok {
		t.Skip("not accelerated: ", why)
	}
}

// TestFIPSModeUsesTheStandardLibrary starts itself in that mode.
func TestFIPSModeUsesTheStandardLibrary(t *testing.T) {
	if fips140.Enabled() {
		if ok, why := Accelerated(); ok || missing() == "" && !strings.Contains(why, "FIPS") {
			t.Errorf("accelerated: %v, %q", ok, why)
		}
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.v", "-test.run=^("+t.Name()+"|TestSpecification|TestAcceleratesWhereItCan)$")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=on")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "--- PASS") != 3 {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestWipeLeavesNothing: neither a key nor what would work with no key.
func TestWipeLeavesNothing(t *testing.T) {
	skipUnaccelerated(t)
	for _, keySize := range keySizes {
		key := randomBytes(random(7), keySize)
		made, err := New(key)
		if err != nil {
			t.Fatal(err)
		}
		a := made.(*aead)
		if string(a.keys[0][:]) != string(key[:16]) {
			t.Errorf("the first round key is %x, not the key", a.keys[0])
		}
		made.(interface{ Wipe() }).Wipe()
		if *a != (aead{}) {
			t.Errorf("left %x", *a)
		}
		nonce, sealed := make([]byte, 12), make([]byte, 16)
		for name, use := range map[string]func(a cipher.AEAD){
			"Seal": func(a cipher.AEAD) { a.Seal(nil, nonce, nil, nil) },
			"Open": func(a cipher.AEAD) { a.Open(nil, nonce, sealed, nil) },
		} {
			if !panics(func() { use(made) }) {
				t.Errorf("%s works without a key", name)
			}
		}
	}
}

// TestObjectIsSmall: a connection that is not parked has two. 576 bytes are a size class of the allocator and a
// multiple of the 64 that a load takes.
func TestObjectIsSmall(t *testing.T) {
	skipUnaccelerated(t)
	if size := unsafe.Sizeof(aead{}); size > 576 {
		t.Errorf("%d bytes", size)
	}
	key := make([]byte, 32)
	if n := testing.AllocsPerRun(100, func() { New(key) }); n != 1 {
		t.Errorf("New makes %v allocations", n)
	}
}

// TestLastRegisterOfPowersIsInside: four powers are loaded from where the last one is (see gcm_amd64.s, Powers of H).
func TestLastRegisterOfPowersIsInside(t *testing.T) {
	var a aead
	if end := unsafe.Offsetof(a.powers) + 19*16 + 64; end > unsafe.Sizeof(a) {
		t.Errorf("%d bytes are read of %d", end, unsafe.Sizeof(a))
	}
}
