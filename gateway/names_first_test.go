// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"testing"
	"time"
)

// TestAllNamesHaveTheirTurnAtTheStart: however many are not answered, the last one is asked for before the start goes on, and few
// of them are waited for as long as ever.
func TestAllNamesHaveTheirTurnAtTheStart(t *testing.T) {
	for _, n := range []int{0, 1, lookupsAtOnce, lookupsAtOnce + 1, 2000, 100_000} {
		each := firstPatience(n)
		if n <= lookupsAtOnce && each != firstLookups {
			t.Errorf("%d names are waited for %v each", n, each)
		}
		rounds := (n + lookupsAtOnce - 1) / lookupsAtOnce
		if all := time.Duration(rounds) * each; all > firstLookups || each <= 0 {
			t.Errorf("%d names take %v, at %v each", n, all, each)
		}
	}
}
