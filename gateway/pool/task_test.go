// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestTasksShareWakes: a hundred that are done every five seconds, give or take a tenth, wake the process twice a second
// and not twenty times; and each is as often done as it would be on its own.
func TestTasksShareWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many, every, rounds = 100, 5 * time.Second, 20
		e := NewTasks()
		defer e.Close()
		wakes, done := map[time.Time]bool{}, make([]int, many)
		for i := range many {
			e.Start(time.Duration(rand.Int64N(int64(every))), func(*Task) time.Duration {
				e.mu.Lock()
				defer e.mu.Unlock()
				wakes[time.Now()] = true
				done[i]++
				return Jittered(every)
			})
		}
		time.Sleep(rounds * every)
		synctest.Wait()
		e.mu.Lock()
		defer e.mu.Unlock()
		for i, n := range done {
			if n < rounds*9/10-1 || n > rounds*11/10+2 {
				t.Errorf("task %d was done %d times in %d rounds", i, n, rounds)
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

// TestTasksAreBounded: one machine has a third of all places at most, the others when it is their turn; one that is stopped is
// not done, one that says Never is not done again, and nothing is when all have ended.
func TestTasksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := NewTasks()
		var begun, undone atomic.Int32
		release := make(chan struct{})
		for range TasksAtOnce + 100 {
			e.Start(time.Second, func(*Task) time.Duration {
				begun.Add(1)
				<-release
				return Never
			})
		}
		stopped := e.Start(time.Minute, func(*Task) time.Duration {
			undone.Add(1)
			return Never
		})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := begun.Load(); n != TasksAtOnce/3+1 {
			t.Errorf("%d run at once", n)
		}
		close(release)
		synctest.Wait()
		if n := begun.Load(); n != TasksAtOnce+100 {
			t.Errorf("%d were done", n)
		}
		stopped.Stop()
		stopped.Stop()
		time.Sleep(time.Hour)
		if n, m := begun.Load(), undone.Load(); n != TasksAtOnce+100 || m != 0 || len(e.agenda) != 0 {
			t.Errorf("later %d were done, and %d that were stopped; %d wait", n, m, len(e.agenda))
		}
		e.Start(time.Minute, func(*Task) time.Duration {
			undone.Add(1)
			return time.Minute
		})
		e.Close()
		e.Start(0, func(*Task) time.Duration {
			undone.Add(1)
			return Never
		})
		time.Sleep(time.Hour)
		if n := undone.Load(); n != 0 {
			t.Errorf("%d were done after the end", n)
		}
	})
}

// TestTasksThatHangHoldUpNobody: names that are not answered, and checks of machines that do not answer, leave places for what is
// answered and for other kinds.
func TestTasksThatHangHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := NewTasks()
		defer e.Close()
		var quick, other atomic.Int32
		rounds := func(n *atomic.Int32) func(*Task) time.Duration {
			return func(*Task) time.Duration {
				n.Add(1)
				return time.Second
			}
		}
		e.StartFor(CheckTask, "quick", time.Second, rounds(&quick))
		time.Sleep(2500 * time.Millisecond)
		hang := func(x *Task) time.Duration {
			<-x.ctx.Done()
			return Never
		}
		for i := range 2000 {
			e.StartFor(LookupTask, fmt.Sprint("name", i), 0, hang)
			e.StartFor(CheckTask, fmt.Sprint("host", i), 0, hang)
			e.StartFor(ProbeTask, "one host", 0, hang)
		}
		time.Sleep(time.Second)
		before := quick.Load()
		e.Start(0, rounds(&other))
		time.Sleep(10 * time.Second)
		if n := quick.Load() - before; n < 9 {
			t.Errorf("a check that is answered was made %d times in 10 s", n)
		}
		if n := other.Load(); n < 9 {
			t.Errorf("a task of another kind was done %d times in 10 s", n)
		}
		if running, waiting := e.Status(); running > TasksAtOnce || running < TasksAtOnce/2 || waiting < 6000-TasksAtOnce {
			t.Errorf("%d run at once, and %d wait", running, waiting)
		}
	})
}
