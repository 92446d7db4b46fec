// SPDX-License-Identifier: Apache-2.0

package registers

import (
	"strings"
	"testing"

	"golang.org/x/sys/cpu"
)

// TestWhatIsLeftIsSeen: Read sees each register, and an error names the one that holds something.
func TestWhatIsLeftIsSeen(t *testing.T) {
	if !cpu.X86.HasAVX512BW || !cpu.X86.HasAVX512DQ {
		t.Skip("the processor has no AVX-512 with BW and DQ")
	}
	var left State
	Fill()
	Read(&left)
	for i, lanes := range left.Vector {
		for lane, value := range lanes {
			if value != filling && !(i == 15 && lane < 2) { // Go keeps zero in X15
				t.Errorf("lane %d of Z%d is %#x, not what was planted", lane, i, value)
			}
		}
	}
	for i, value := range left.Mask {
		if value != filling {
			t.Errorf("K%d is %#x", i, value)
		}
	}
	for i, value := range left.General {
		if value != filling {
			t.Errorf("R%d is %#x", 8+i, value)
		}
	}
	if err := left.All(); err != nil {
		t.Errorf("nothing was used: %v", err)
	}
	for name, plant := range map[string]func(*State){
		"lane 7 of Z31": func(s *State) { s.Vector[31][7] = 1 },
		"lane 0 of Z0":  func(s *State) { s.Vector[0][0] = 1 },
		"K7":            func(s *State) { s.Mask[7] = 1 },
		"R11":           func(s *State) { s.General[3] = 1 },
	} {
		planted := left
		plant(&planted)
		if err := planted.All(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s holds 1: %v", name, err)
		}
	}
}
