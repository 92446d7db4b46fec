// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestErrandsShareWakes: a hundred that are done every five seconds, give or take a tenth, wake the process twice a second
// and not twenty times; and each is as often done as it would be on its own.
func TestErrandsShareWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many, every, rounds = 100, 5 * time.Second, 20
		e := newErrands()
		defer e.close()
		wakes, done := map[time.Time]bool{}, make([]int, many)
		for i := range many {
			e.start(time.Duration(rand.Int64N(int64(every))), func(*errand) time.Duration {
				e.mu.Lock()
				defer e.mu.Unlock()
				wakes[time.Now()] = true
				done[i]++
				return jittered(every)
			})
		}
		time.Sleep(rounds * every)
		synctest.Wait()
		e.mu.Lock()
		defer e.mu.Unlock()
		for i, n := range done {
			if n < rounds*9/10-1 || n > rounds*11/10+2 {
				t.Errorf("errand %d was done %d times in %d rounds", i, n, rounds)
			}
		}
		if most := int(rounds * every / (400 * time.Millisecond)); len(wakes) > most {
			t.Errorf("%d wakes in %v, want at most %d", len(wakes), rounds*every, most)
		}
	})
}

// TestCoarseTimesAreNear: a time is kept to a sixteenth, and what is on a coarse grid is on a finer one.
func TestCoarseTimesAreNear(t *testing.T) {
	for range 10_000 {
		now, in := time.Duration(rand.Int64N(int64(time.Hour))), time.Duration(rand.Int64N(1<<rand.IntN(50)))
		at := coarse(now, in)
		if late := at - now - in; late.Abs() > in/16+1 || at < now {
			t.Fatalf("%d in %d is at %d, %d late", in, now, at, late)
		}
		if again := coarse(now, in/3); coarse(again, at-again) != at {
			t.Fatalf("%d in %d is not on the grid of what is due sooner", in, now)
		}
	}
}

// TestErrandsAreBounded: one machine has a third of all places at most, the others when it is their turn; one that is stopped is
// not done, one that says never is not done again, and nothing is when all have ended.
func TestErrandsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newErrands()
		var begun, undone atomic.Int32
		release := make(chan struct{})
		for range errandsAtOnce + 100 {
			e.start(time.Second, func(*errand) time.Duration {
				begun.Add(1)
				<-release
				return never
			})
		}
		stopped := e.start(time.Minute, func(*errand) time.Duration {
			undone.Add(1)
			return never
		})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := begun.Load(); n != errandsAtOnce/3+1 {
			t.Errorf("%d run at once", n)
		}
		close(release)
		synctest.Wait()
		if n := begun.Load(); n != errandsAtOnce+100 {
			t.Errorf("%d were done", n)
		}
		stopped.stop()
		stopped.stop()
		time.Sleep(time.Hour)
		if n, m := begun.Load(), undone.Load(); n != errandsAtOnce+100 || m != 0 || len(e.agenda) != 0 {
			t.Errorf("later %d were done, and %d that were stopped; %d wait", n, m, len(e.agenda))
		}
		e.start(time.Minute, func(*errand) time.Duration {
			undone.Add(1)
			return time.Minute
		})
		e.close()
		e.start(0, func(*errand) time.Duration {
			undone.Add(1)
			return never
		})
		time.Sleep(time.Hour)
		if n := undone.Load(); n != 0 {
			t.Errorf("%d were done after the end", n)
		}
	})
}

// TestErrandsThatHangHoldUpNobody: names that are not answered, and checks of machines that do not answer, leave places for what is
// answered and for other kinds.
func TestErrandsThatHangHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newErrands()
		defer e.close()
		var quick, other atomic.Int32
		rounds := func(n *atomic.Int32) func(*errand) time.Duration {
			return func(*errand) time.Duration {
				n.Add(1)
				return time.Second
			}
		}
		e.startFor(checkErrand, "quick", time.Second, rounds(&quick))
		time.Sleep(2500 * time.Millisecond)
		hang := func(x *errand) time.Duration {
			<-x.ctx.Done()
			return never
		}
		for i := range 2000 {
			e.startFor(nameErrand, fmt.Sprint("name", i), 0, hang)
			e.startFor(checkErrand, fmt.Sprint("host", i), 0, hang)
			e.startFor(probeErrand, "one host", 0, hang)
		}
		time.Sleep(time.Second)
		before := quick.Load()
		e.start(0, rounds(&other))
		time.Sleep(10 * time.Second)
		if n := quick.Load() - before; n < 9 {
			t.Errorf("a check that is answered was made %d times in 10 s", n)
		}
		if n := other.Load(); n < 9 {
			t.Errorf("an errand of another kind was done %d times in 10 s", n)
		}
		if running, waiting := e.status(); running > errandsAtOnce || running < errandsAtOnce/2 || waiting < 6000-errandsAtOnce {
			t.Errorf("%d run at once, and %d wait", running, waiting)
		}
	})
}
