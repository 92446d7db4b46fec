// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// An errand is load beside the load that is timed, in a process of its own that steps back behind everybody else. The test binary starts itself again
// with BENCH_ERRAND set; the errand lasts as long as its standard input.
type errand struct {
	Do    string  // "backend", "stream" or "knock"
	Addr  string  // the gateway
	TLS   bool    // stream through TLS, or plain where there is no gateway
	Rate  float64 // knocks a second; MiB a second of each stream, 0: as much as goes
	Count int     // streams
}

const errandVariable = "BENCH_ERRAND"

// runErrand is the main function of such a process.
func runErrand(text string) error {
	var e errand
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		return fmt.Errorf("%s: %w", errandVariable, err)
	}
	if e.Do == "backend" {
		return runBackend()
	}
	if err := settleHere(here.loadCore); err != nil {
		return err
	}
	if err := yieldToOthers(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(done)
	}()
	fmt.Println("ready")
	if e.Do == "stream" {
		go e.stream()
		<-done
		return nil
	}
	fmt.Println(e.knockAlong(done))
	return nil
}

// stream keeps bulk coming down until the process ends, a piece at a time: at its rate, or as fast as it comes.
func (e errand) stream() {
	const piece = 1 << 20
	size, pause := 64*piece, time.Duration(0)
	if e.Rate > 0 {
		size, pause = piece, time.Duration(float64(time.Second)/e.Rate)
	}
	w := way{addr: e.Addr}
	if e.TLS {
		w.tls = clientConfig(ecdsaDoor)
	}
	together(e.Count, func(int) error {
		s, err := newSwarm()
		if err == nil {
			err = s.join(1, w)
		}
		for next := time.Now(); err == nil; time.Sleep(time.Until(next)) {
			err = s.bulk(size, 0)
			next = next.Add(pause)
		}
		fmt.Fprintln(os.Stderr, err)
		return err
	})
}

// knockAlong begins connections at the given rate and never has more than 512 open; those that find no place are not begun. It returns how many were
// begun a second.
func (e errand) knockAlong(done <-chan struct{}) float64 {
	var begun atomic.Int64
	places := make(chan struct{}, 512)
	start, owed := time.Now(), 0.0
	for tick := time.NewTicker(2 * time.Millisecond); ; {
		select {
		case <-done:
			return float64(begun.Load()) / time.Since(start).Seconds()
		case <-tick.C:
		}
		for owed = e.Rate*time.Since(start).Seconds() - owed; owed >= 1; owed-- {
			select {
			case places <- struct{}{}:
				begun.Add(1)
				go func() {
					knock(e.Addr)
					<-places
				}()
			default:
			}
		}
	}
}

// helper is a running errand.
type helper struct {
	*process
	in  io.Closer
	out *bufio.Reader
}

// send starts an errand and returns with its first line.
func (e errand) send(dir string) (*helper, string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	text, err := json.Marshal(e)
	if err != nil {
		return nil, "", err
	}
	cmd := exec.Command(self)
	cmd.Env = append(cleanEnv(), errandVariable+"="+string(text))
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, "", err
	}
	out, w, err := os.Pipe()
	if err != nil {
		return nil, "", err
	}
	cmd.Stdout = w
	run, err := start(here.loadCore, cmd, filepath.Join(dir, e.Do+".log"))
	w.Close()
	if err != nil {
		return nil, "", err
	}
	h := &helper{process: run, in: in, out: bufio.NewReader(out)}
	line, err := h.out.ReadString('\n')
	if err != nil {
		h.stop()
		return nil, "", fmt.Errorf("%s: %w: %s", e.Do, err, h.lastWords())
	}
	return h, strings.TrimSpace(line), nil
}

// recall ends the errand and returns its last line, if it has one.
func (h *helper) recall() string {
	h.in.Close()
	line, _ := h.out.ReadString('\n')
	h.stop()
	return strings.TrimSpace(line)
}
