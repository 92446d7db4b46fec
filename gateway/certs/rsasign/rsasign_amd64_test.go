// SPDX-License-Identifier: Apache-2.0

//go:build !purego

package rsasign

import (
	"crypto/fips140"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestFIPSModeUsesTheStandardLibrary starts itself in that mode.
func TestFIPSModeUsesTheStandardLibrary(t *testing.T) {
	if fips140.Enabled() {
		if ok, why := Accelerated(); ok || !strings.Contains(why, "FIPS") {
			t.Errorf("accelerated: %v, %q", ok, why)
		}
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=on")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
}
