// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// absent skips a test for want of a peer; where everything must be there, it fails.
func absent(t *testing.T, why error) {
	t.Helper()
	testkit.Missing(t, "%v", why)
}

func TestEveryPeerCarriesEveryDoor(t *testing.T) {
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			if p.missing != nil {
				absent(t, p.missing)
			}
			g := p.openFor(t, false)
			for _, d := range p.doors {
				if _, _, err := g.way(d).visit(); err != nil {
					t.Errorf("%s: %v", d, err)
				}
				if err := swarmFor(t, g, d, 2).bulk(3<<20, 1<<20); err != nil {
					t.Errorf("%s: %v", d, err)
				}
			}
		})
	}
}

func TestEveryPeerResumes(t *testing.T) {
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			if p.missing != nil {
				absent(t, p.missing)
			}
			g := p.openFor(t, false)
			w := g.way(ecdsaDoor)
			if w.tls == nil {
				t.Skip("plain TCP")
			}
			w.tls.ClientSessionCache = new(firstTicket)
			for visit := range 3 {
				resumed, _, err := w.visit()
				if err != nil || resumed != (visit > 0) {
					t.Fatalf("visit %d: resumed %v, %v", visit, resumed, err)
				}
			}
			for _, resume := range []bool{false, true} {
				v, err := g.way(ecdsaDoor).visitors(resume, true)
				if err != nil {
					t.Fatalf("the cheaper client: %v", err)
				}
				if err := visits(v)(new(bill)); err != nil {
					t.Errorf("the cheaper client, resuming %v: %v", resume, err)
				}
			}
		})
	}
}

// TestCPUClockCountsEndedThreads spins on a thread that ends with its goroutine, since that never unlocks it.
func TestCPUClockCountsEndedThreads(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	spent := make(chan int)
	spin := func() {
		runtime.LockOSThread()
		for began := threadTime(); threadTime()-began < 50*time.Millisecond; {
		}
		spent <- unix.Gettid()
	}
	go spin()
	thread := <-spent
	if thread == os.Getpid() { // the main thread is parked for ever instead of ended
		go spin()
		thread = <-spent
	}
	for began := time.Now(); running(thread); time.Sleep(time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatal("the thread does not end")
		}
	}
	after, err := cpuTime(os.Getpid())
	if err != nil || after-before < 50*time.Millisecond {
		t.Errorf("the clock went from %v to %v, %v", before, after, err)
	}
}

func threadTime() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano())
}

func TestCPUTimeCountsChildren(t *testing.T) {
	p, err := start(here.gatewayCore, exec.Command("sh", "-c", "(while :; do :; done) & wait"), filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		own, err := cpuTime(p.cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		all, err := p.cpu()
		if err != nil {
			t.Fatal(err)
		}
		if all-own > 50*time.Millisecond {
			return
		}
		if time.Since(began) > 20*time.Second {
			t.Fatalf("own time %v, with the spinning child's %v", own, all)
		}
	}
}

func TestStopEndsTheWholeFamily(t *testing.T) {
	// The shell ignores SIGTERM, so that it takes force.
	p, err := start(here.gatewayCore, exec.Command("sh", "-c", "trap '' TERM; sleep 60 & wait; sleep 60"), filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	for len(p.pids()) < 2 {
		time.Sleep(5 * time.Millisecond)
	}
	family := p.pids()
	p.stop()
	for _, pid := range family {
		for began := time.Now(); running(pid); time.Sleep(10 * time.Millisecond) {
			if time.Since(began) > 5*time.Second {
				t.Fatalf("process %d of %v still runs", pid, family)
			}
		}
	}
}

// running is false for a process that has ended, reaped or not.
func running(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // a thread's id will do, too
	if err != nil {
		return false
	}
	var id int
	var name, state string
	fmt.Sscan(string(text), &id, &name, &state)
	return state != "Z" && syscall.Kill(pid, 0) == nil
}

func TestGatewayAndLoadArePinned(t *testing.T) {
	p, err := start(here.gatewayCore, exec.Command("sleep", "60"), filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	for tid, core := range map[int]int{p.cmd.Process.Pid: here.gatewayCore, 0: here.loadCore} {
		if got := allowed(t, tid); !slices.Equal(got, []int{core}) {
			t.Errorf("thread %d may use cores %v, not only %d", tid, got, core)
		}
	}
}

// allowed are the cores that a thread may use; 0 is the caller's.
func allowed(t *testing.T, tid int) []int {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(tid, &set); err != nil {
		t.Fatal(err)
	}
	var cores []int
	for core := range len(set) * 64 {
		if set.IsSet(core) {
			cores = append(cores, core)
		}
	}
	return cores
}

func TestClosedLoopMeasuresEveryEcho(t *testing.T) {
	g := direct.openFor(t, false)
	s := swarmFor(t, g, tcpDoor, 8)
	took, err := s.echo(s.lines, 4096, 3)
	if err != nil || len(took) != 24 || slices.Min(took) <= 0 {
		t.Errorf("%d echoes, %v: %v", len(took), err, took)
	}
}

// TestPacedLoopCountsTheWait lets an echo server pause: the messages that were due meanwhile must show it.
func TestPacedLoopCountsTheWait(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	go func() {
		p := make([]byte, 256)
		for n := 0; ; n++ {
			if _, err := there.Read(p); err != nil {
				return
			}
			if n == 0 {
				time.Sleep(200 * time.Millisecond)
			}
			there.Write(p)
		}
	}()
	took, err := crowd{here}.echoPaced(256, 4, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	for k, least := range []time.Duration{200, 150, 100, 50} {
		if least *= time.Millisecond; took[k] < least-20*time.Millisecond {
			t.Errorf("message %d took %v; it was due %v before the server went on", k, took[k], least)
		}
	}
}

// TestBackendTakesBytesCutAnywhere sends a record to skip and two bulk requests, one byte at a time.
func TestBackendTakesBytesCutAnywhere(t *testing.T) {
	c, err := net.Dial("tcp", backendAt)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	record := binary.BigEndian.AppendUint16([]byte{0x16, 3, 1}, 7)
	for _, part := range [][]byte{record, make([]byte, 7), askBulk(10, 3), {1, 2, 3}} {
		for _, b := range part {
			if _, err := c.Write([]byte{b}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := io.CopyN(io.Discard, c, 11); err != nil {
		t.Fatal(err)
	}
}
