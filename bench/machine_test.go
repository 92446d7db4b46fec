// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what the run may use: the gateway's core, the core of everything else, and how many descriptors a process may hold.
type machine struct {
	gatewayCore, loadCore int
	fds                   int
}

// here is set once, before any test runs.
var here machine

// wantedFDs carries 8,000 connections through a gateway that holds six descriptors for each (two sockets, two pipes), with room to spare.
const wantedFDs = 65536

// lookAround picks the first and the last core this process may use (one and the same where there is only one) and raises the file limit as far as allowed.
func lookAround() (machine, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return machine{}, fmt.Errorf("sched_getaffinity: %w", err)
	}
	m := machine{gatewayCore: -1}
	for cpu := range len(set) * 64 {
		if !set.IsSet(cpu) {
			continue
		}
		if m.gatewayCore < 0 {
			m.gatewayCore = cpu
		}
		m.loadCore = cpu
	}
	m.fds = raiseFileLimit()
	return m, nil
}

// raiseFileLimit returns the limit that holds afterwards; only root may go beyond the hard limit.
func raiseFileLimit() int {
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		return 1024
	}
	for _, want := range []uint64{wantedFDs, had.Max} {
		if want <= had.Cur {
			break
		}
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: max(want, had.Max)}) == nil {
			return int(want)
		}
	}
	return int(had.Cur)
}

// crowd is how many of n connections the file limit and a short round leave. A gateway needs two descriptors for each.
func (m machine) crowd(n int) int {
	if short {
		n = max(n/20, min(n, 64))
	}
	return min(n, (m.fds-200)/2)
}

// settleHere binds every thread of this process to a core; threads that follow inherit it.
func settleHere(core int) error {
	runtime.GOMAXPROCS(1)
	return eachThread(func(tid int) error { return pin(tid, core) })
}

// yieldToOthers lets every other process go first: for load that must not delay what is being timed.
func yieldToOthers() error {
	return eachThread(func(tid int) error { return unix.Setpriority(unix.PRIO_PROCESS, tid, 10) })
}

// eachThread goes over the threads twice, since the runtime may start one from a thread that was not reached yet.
func eachThread(do func(tid int) error) error {
	for range 2 {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				return err
			}
			if err := do(tid); err != nil && err != unix.ESRCH {
				return err
			}
		}
	}
	return nil
}

// anyCore as a core is the gateway's and the load's together.
const anyCore = -1

func pin(tid, core int) error {
	var set unix.CPUSet
	if core == anyCore {
		set.Set(here.gatewayCore)
		core = here.loadCore
	}
	set.Set(core)
	if err := unix.SchedSetaffinity(tid, &set); err != nil {
		return fmt.Errorf("pin thread %d to core %d: %w", tid, core, err)
	}
	return nil
}

// cpuTime reads the CPU clock of another process: user and system time in nanoseconds, of threads that have ended too. It is what
// clock_getcpuclockid(3) names: the complement of the pid, shifted by 3, with CPUCLOCK_SCHED (2).
func cpuTime(pid int) (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|2, &ts); err != nil {
		return 0, fmt.Errorf("cpu clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}
