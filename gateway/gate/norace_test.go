// SPDX-License-Identifier: Apache-2.0

//go:build !race

package gate_test

const raceEnabled = false
