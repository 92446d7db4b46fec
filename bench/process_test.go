// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a program that this run started, with all it forked since.
type process struct {
	cmd   *exec.Cmd
	log   string // the file its stdout and stderr go to
	ended chan struct{}
}

// launches are carried out by one thread that lives as long as the run: Pdeathsig is bound to the thread that forked, not to its process.
var launches = make(chan func())

func launcher() {
	runtime.LockOSThread()
	for launch := range launches {
		launch()
	}
}

// start runs cmd on a core. Its standard output and error go to a file unless the caller has set them. It gets SIGTERM should this run die, so that
// masters can end their workers.
func start(core int, cmd *exec.Cmd, log string) (*process, error) {
	if cmd.Stderr == nil {
		f, err := os.Create(log)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		cmd.Stderr = f
		if cmd.Stdout == nil {
			cmd.Stdout = f
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	failed := make(chan error)
	launches <- func() {
		if err := pin(0, core); err != nil {
			failed <- err
			return
		}
		failed <- cmd.Start()
	}
	if err := <-failed; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &process{cmd: cmd, log: log, ended: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// stop ends the process and what it forked: asked first, and after two seconds by force. The group is ours alone, so no other process is reached.
func (p *process) stop() {
	family := p.pids()
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(2 * time.Second):
	}
	for _, pid := range family {
		if pgid, err := syscall.Getpgid(pid); err == nil && pgid == p.cmd.Process.Pid {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	<-p.ended
}

// lastWords is the end of what the process wrote, for an error that explains itself.
func (p *process) lastWords() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(text[max(0, len(text)-2000):]))
}

// pids are the process and its descendants, parents first.
func (p *process) pids() []int {
	family := []int{p.cmd.Process.Pid}
	for i := 0; i < len(family); i++ {
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", family[i]))
		for _, list := range lists {
			text, _ := os.ReadFile(list)
			for child := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(child); err == nil {
					family = append(family, pid)
				}
			}
		}
	}
	return family
}

// cpu is the CPU time of the whole family so far. A child that has ended takes its time with it, so no peer is set up to fork while it is measured.
func (p *process) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, pid := range p.pids() {
		spent, err := cpuTime(pid)
		if err != nil {
			return 0, fmt.Errorf("%w; its last words: %s", err, p.lastWords())
		}
		sum += spent
	}
	return sum, nil
}

// pss is the proportional set size of the family, in bytes: pages that n processes share count an n-th in each.
func (p *process) pss() (int64, error) {
	var sum int64
	for _, pid := range p.pids() {
		size, err := pssOf(pid)
		if err != nil {
			return 0, err
		}
		sum += size
	}
	return sum, nil
}

func pssOf(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if errors.Is(err, os.ErrPermission) {
		return 0, fmt.Errorf("%w: tlsnat can't be dumped, so it shows its memory to root only; run the benchmarks as root", err)
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		field := strings.Fields(lines.Text())
		if len(field) == 3 && field[0] == "Pss:" {
			kib, err := strconv.ParseInt(field[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("smaps_rollup has no line Pss:")
}

// settledPSS waits for six seconds, and then until the size stays within 1 % for a second (collectors and allocators give back late), for ten seconds at
// most. A short round waits a fifth of that.
func (p *process) settledPSS() (int64, error) {
	pause := 500 * time.Millisecond
	if short {
		pause /= 5
	}
	time.Sleep(12 * pause)
	last, err := p.pss()
	if err != nil {
		return 0, err
	}
	for calm, tries := 0, 0; calm < 2 && tries < 20; tries++ {
		time.Sleep(pause)
		size, err := p.pss()
		if err != nil {
			return 0, err
		}
		calm++
		if size > last+last/100 || size < last-last/100 {
			calm = 0
		}
		last = size
	}
	return last, nil
}

// fds counts the descriptors that the family holds.
func (p *process) fds() (int, error) {
	sum := 0
	for _, pid := range p.pids() {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return 0, err
		}
		sum += len(open)
	}
	return sum, nil
}
