// SPDX-License-Identifier: Apache-2.0

// Package registers is for tests of what works with secrets: it shows what a function leaves in registers and on the stack.
//
//	var left registers.State
//	registers.Fill()
//	function()
//	registers.Read(&left)
//	err := left.Vectors()
//
// It is a package of its own because Go assembles no file whose name ends in _test.s, and because two packages need it.
// Only tests import it, so that no program contains it.
//
// The three calls stand one behind the other: Go code in between may use the same registers. The processor has to have
// AVX-512 with BW and DQ.
package registers

import "fmt"

// filling is what Fill writes everywhere. A lane that still has it was not used.
const filling = 0x5ec2e7005ec2e700

// State is what the registers hold.
type State struct {
	Vector  [32][8]uint64 // Z0 to Z31
	Mask    [8]uint64     // K0 to K7
	General [4]uint64     // R8 to R11
}

// Fill writes a value that is not zero to all registers of a State.
//
//go:noescape
func Fill()

// Read copies the registers to s.
//
//go:noescape
func Read(s *State)

// Below copies to b what the stack holds under the frame of the caller: what functions that it has called left there. The
// first bytes are those of the call itself. The stack has to be as deep.
//
//go:noescape
func Below(b []byte)

// Vectors returns an error for the first vector register that was used since Fill and is not zero. An upper part that
// was cut off, as each write to an X or Y register does it, is zero.
func (s *State) Vectors() error {
	for i, lanes := range s.Vector {
		for lane, value := range lanes {
			if value != 0 && value != filling {
				return fmt.Errorf("lane %d of Z%d is %#x", lane, i, value)
			}
		}
	}
	return nil
}

// All is Vectors, and the same for the other registers.
func (s *State) All() error {
	for i, value := range s.Mask {
		if value != 0 && value != filling {
			return fmt.Errorf("register K%d is %#x", i, value)
		}
	}
	for i, value := range s.General {
		if value != 0 && value != filling {
			return fmt.Errorf("register R%d is %#x", 8+i, value)
		}
	}
	return s.Vectors()
}
