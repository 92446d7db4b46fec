// SPDX-License-Identifier: Apache-2.0

//go:build profile

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"time"
)

// With the build tag profile the process writes a CPU profile of every two seconds of its life into the directory that
// PROFILE_DIR names. go run ./bench/profile makes default.pgo of them, which the compiler uses in every ordinary build.
func init() {
	if dir := os.Getenv("PROFILE_DIR"); dir != "" {
		go writeProfiles(dir)
	}
}

func writeProfiles(dir string) {
	const slice = 2 * time.Second
	for n := 0; ; n++ {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%d-%d.part", os.Getpid(), n)))
		if err != nil {
			return
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return
		}
		time.Sleep(slice)
		pprof.StopCPUProfile()
		_ = f.Close()
		_ = os.Rename(f.Name(), f.Name()+".pprof") // whole ones only
	}
}
