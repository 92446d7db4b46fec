// SPDX-License-Identifier: Apache-2.0

//go:build !amd64 || purego

package gcm

import "crypto/cipher"

func missing() (why string) { return "no implementation for this platform" }

func newAEAD([]byte) cipher.AEAD { panic("gcm: no implementation for this platform") }
