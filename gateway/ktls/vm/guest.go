// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// exitMark begins the line on the console that says how the tests ended.
const exitMark = "ktls-vm: exit "

// guest is the machine's first process: it makes a system of it, runs the tests, and switches it off.
func guest() {
	fmt.Println(startMark)
	err := boot()
	if err == nil {
		err = runTests()
	}
	if err != nil {
		fmt.Println(err)
	}
	fmt.Printf("%s%d\n", exitMark, exitCode(err))
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // with -no-reboot that's the end of the machine
	select {}
}

func exitCode(err error) int {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	if err != nil {
		return 1
	}
	return 0
}

func boot() error {
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	return loopbackUp()
}

// loadModules loads what the initramfs has, in the order of the names.
func loadModules() error {
	files, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	slices.Sort(files)
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		flags := 0
		if strings.HasSuffix(path, ".xz") {
			flags = unix.MODULE_INIT_COMPRESSED_FILE
		}
		// What a machine lacks the instructions for says ENODEV, and what a kernel has built in EEXIST.
		if err := unix.FinitModule(int(f.Fd()), "", flags); err != nil && strings.Contains(path, "-tls.ko") {
			return fmt.Errorf("load %s: %w", path, err)
		}
		_ = f.Close()
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// runTests runs the test programs one after the other. The first failure is what counts, but all of them run.
func runTests() error {
	text, err := os.ReadFile("/tests/arguments")
	if err != nil {
		return err
	}
	arguments := strings.Split(string(text), "\n")
	size, eager, arguments := arguments[0], arguments[1], arguments[2:]
	return errors.Join(
		runTest("ktls.test", arguments, size),
		runTest("gateway.test", arguments, size),
		runTest("gateway.test", append(arguments, eager), "KTLS_EAGER=1"))
}

func runTest(name string, arguments []string, env ...string) error {
	fmt.Println("===", name, strings.Join(env, " "))
	cmd := exec.Command("/tests/"+name, arguments...)
	cmd.Dir = "/tmp"
	cmd.Env = append(append(os.Environ(), "KTLS_REQUIRED=1", "TMPDIR=/tmp", "HOME=/tmp"), env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	return cmd.Run()
}
