// SPDX-License-Identifier: Apache-2.0

// Command vm runs the tests of the kernel engine where there is a kernel for them: in virtual machines with Debian's
// kernels, emulated, so that it needs neither rights nor hardware.
//
//	go run ./gateway/ktls/vm                      everything, on each kernel
//	go run ./gateway/ktls/vm -run TestKTLSCarries -v
//
// It needs Linux on x86-64, Go, and of Debian apt and qemu-system-x86. Kernels are downloaded, unpacked into the user's
// cache and not installed.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// startMark is the first line of our own on the console.
	startMark = "ktls-vm: start"
	// A machine boots in 5 s, in 20 s on a busy host. One of some forty never does.
	bootTime = 60 * time.Second
)

// overKernelHalves are tests of the gateway that know nothing of the kernel's TLS, and have to hold with it.
var overKernelHalves = []string{"^TestEndsAreCarriedOver$/terminate", "TestEndBehindTheHelloIsCarriedOver", "TestHalfCloseKeepsReply",
	"TestAThousandConversations", "TestViolationIsAnsweredWithItsAlert",
	"TestUpdateRequestAfterTheEndIsNoError", "TestDataWithTheFinishedIsNotLost"}

func main() {
	if os.Getpid() == 1 {
		guest()
	}
	kernels := flag.String("kernels", "linux-image-cloud-amd64,linux-image-6.12-cloud-amd64", "Debian packages, separated by commas")
	run := flag.String("run", "^TestKTLS", "which tests, as for go test")
	eager := flag.String("eager", strings.Join(overKernelHalves, "|"), "which of the gateway's tests run a second time, over kernel halves")
	full := flag.Bool("full", false, "64 MiB for each cipher instead of 16, all pairs of halves with each of them")
	verbose := flag.Bool("v", false, "as for go test")
	limit := flag.Duration("timeout", 8*time.Minute, "for each machine")
	flag.Parse()
	size := "KTLS_FULL="
	if *full {
		size += "1"
	}
	arguments := []string{size, "-test.run=" + *eager, "-test.run=" + *run, "-test.timeout=" + limit.String()}
	if *verbose {
		arguments = append(arguments, "-test.v")
	}
	if err := host(strings.Split(*kernels, ","), arguments, *limit); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// host builds the programs, and runs them on each kernel.
func host(kernels, arguments []string, limit time.Duration) error {
	dir, err := os.MkdirTemp("", "ktls-vm")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	programs, err := build(dir)
	if err != nil {
		return err
	}
	errs := make([]error, len(kernels))
	var running sync.WaitGroup
	for i, meta := range kernels {
		k, err := fetch(meta)
		if err != nil {
			return err
		}
		initrd := filepath.Join(dir, fmt.Sprintf("initrd%d", i))
		if err := pack(initrd, k, programs, arguments); err != nil {
			return err
		}
		running.Go(func() { errs[i] = test(meta, k, initrd, limit) })
	}
	running.Wait()
	return errors.Join(errs...)
}

// test runs one machine. What it says is shown at its end, as more than one run at once.
func test(meta string, k *kernel, initrd string, limit time.Duration) error {
	runtime.LockOSThread() // Pdeathsig is bound to the thread that starts the machine
	began := time.Now()
	var said bytes.Buffer
	err := boots(&said, k.image, initrd, limit)
	fmt.Printf("### %s\n%s### %s: %.0f s\n", meta, said.Bytes(), meta, time.Since(began).Seconds())
	if err != nil {
		return fmt.Errorf("%s: %w", meta, err)
	}
	return nil
}

// program is a file for the machine.
type program struct{ name, path string }

// build makes what runs there: this command, as the first process, and the tests, all of them static.
func build(dir string) ([]program, error) {
	const module = "github.com/tlsnat/tlsnat/gateway"
	all := []program{{"init", filepath.Join(dir, "init")}, {"tests/ktls.test", filepath.Join(dir, "ktls.test")},
		{"tests/gateway.test", filepath.Join(dir, "gateway.test")}}
	for i, args := range [][]string{{"build", "-o", all[0].path, module + "/ktls/vm"}, {"test", "-c", "-o", all[1].path, module + "/ktls"},
		{"test", "-c", "-o", all[2].path, module}} {
		cmd := exec.Command("go", append(args[:len(args)-1:len(args)-1], "-trimpath", "-ldflags=-s -w", args[len(args)-1])...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s: %w\n%s", all[i].name, err, out)
		}
	}
	return all, nil
}

// pack writes the initramfs. The first of the arguments is a variable of the tests' environment, the second one
// belongs to the round over kernel halves, the others to every test program.
func pack(path string, k *kernel, programs []program, arguments []string) error {
	var a archive
	a.console()
	for _, d := range []string{"proc", "sys", "tmp", "modules", "tests"} {
		a.dir(d)
	}
	for i, m := range k.modules {
		content, err := os.ReadFile(m)
		if err != nil {
			return err
		}
		a.file(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(m)), 0o644, content)
	}
	for _, p := range programs {
		content, err := os.ReadFile(p.path)
		if err != nil {
			return err
		}
		a.file(p.name, 0o755, content)
	}
	a.file("tests/arguments", 0o644, []byte(strings.Join(arguments, "\n")))
	return os.WriteFile(path, a.bytes(), 0o644)
}

// boots runs the machine to its end. One that never came to our first process gets a second chance.
func boots(out io.Writer, image, initrd string, limit time.Duration) error {
	for try := 1; ; try++ {
		c := &console{out: out}
		err := emulate(c, image, initrd, limit)
		switch {
		case c.exit == "0":
			return nil
		case c.exit != "":
			return fmt.Errorf("tests failed (exit %s)", c.exit)
		case c.started.Load() || try == 2:
			return fmt.Errorf("the machine ended without a result, after its time or by a fault: %w", err)
		}
		fmt.Fprintln(out, "the machine did not boot; once more")
	}
}

// emulate runs qemu until the machine ends, or its time is over.
func emulate(c *console, image, initrd string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	booted := time.AfterFunc(bootTime, func() {
		if !c.started.Load() {
			cancel()
		}
	})
	defer booted.Stop()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off",
		"-smp", "2", "-m", "768", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=con,signal=on,mux=off", "-serial", "chardev:con", "-kernel", image, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdout, cmd.Stderr = c, os.Stderr
	return cmd.Run()
}

// console is what the machine writes, from our first line on.
type console struct {
	out     io.Writer
	rest    []byte
	started atomic.Bool
	exit    string // the tests' exit code; empty: they have not ended
}

func (c *console) Write(p []byte) (int, error) {
	c.rest = append(c.rest, p...)
	for {
		line, rest, whole := bytes.Cut(c.rest, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		c.line(strings.TrimRight(string(line), "\r"))
		c.rest = rest
	}
}

func (c *console) line(text string) {
	switch code, ended := strings.CutPrefix(text, exitMark); {
	case strings.Contains(text, startMark):
		c.started.Store(true)
	case ended:
		c.exit = code
	case c.started.Load():
		fmt.Fprintln(c.out, text)
	}
}
