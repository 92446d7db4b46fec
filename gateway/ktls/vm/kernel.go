// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// modules are what tls needs, in the order in which they can be loaded: nobody answers the kernel's own requests for
// them there. What one kernel has as a module another has built in, or under no name at all.
var modules = []string{"crypto_null", "cryptd", "crypto_simd", "gf128mul", "libchacha", "libpoly1305", "ghash-generic", "ctr", "gcm",
	"ccm", "chacha_generic", "chacha", "poly1305_generic", "libchacha20poly1305", "chacha20poly1305", "aesni-intel", "ghash-clmulni-intel", "chacha-x86_64",
	"poly1305-x86_64", "tls"}

// versioned is what a package that has the files of a kernel is called.
var versioned = regexp.MustCompile(`^linux-image-\d+\.\d+\.\d+`)

// kernel is one of Debian's, unpacked, not installed.
type kernel struct {
	image   string   // path of vmlinuz
	modules []string // paths, in order
}

// fetch finds the package that the meta package stands for, and unpacks what is needed of it into the cache.
func fetch(meta string) (*kernel, error) {
	name, err := concrete(meta)
	if err != nil {
		return nil, err
	}
	cache, err := cacheDir(name)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(cache, "complete")); err != nil {
		fmt.Println("download", name)
		if err := unpack(name, cache); err != nil {
			return nil, err
		}
	}
	k := &kernel{image: filepath.Join(cache, "vmlinuz")}
	for _, m := range modules {
		for _, suffix := range []string{".ko", ".ko.xz"} {
			if path := filepath.Join(cache, m+suffix); exists(path) {
				k.modules = append(k.modules, path)
			}
		}
	}
	return k, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// concrete is the versioned package behind a meta package, or is given itself.
func concrete(meta string) (string, error) {
	out, err := exec.Command("apt-cache", "depends", "--important", meta).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w", meta, err)
	}
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			return "linux-image-" + name, nil
		}
	}
	if versioned.MatchString(meta) && len(out) > 0 {
		return meta, nil
	}
	return "", fmt.Errorf("apt knows no package %s; 'apt-get update' may help", meta)
}

func cacheDir(name string) (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		base = os.TempDir()
	}
	dir := filepath.Join(base, "tlsnat", "kernels", name)
	return dir, os.MkdirAll(dir, 0o755)
}

func unpack(name, cache string) error {
	tmp, err := os.MkdirTemp("", "kernel")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	download := exec.Command("apt-get", "-qq", "download", name)
	download.Dir = tmp
	if out, err := download.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download %s: %w\n%s", name, err, out)
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages", name, len(debs))
	}
	var errs bytes.Buffer
	files := exec.Command("dpkg-deb", "--fsys-tarfile", debs[0])
	files.Stderr = &errs
	out, err := files.StdoutPipe()
	if err != nil {
		return err
	}
	if err := files.Start(); err != nil {
		return err
	}
	err = pick(out, cache)
	if waited := files.Wait(); err == nil && waited != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", waited, errs.Bytes())
	}
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(cache, "complete"), nil, 0o644)
}

// pick takes the image and the modules out of the package's files.
func pick(files io.Reader, cache string) error {
	wanted := map[string]bool{}
	for _, m := range modules {
		wanted[m+".ko"], wanted[m+".ko.xz"] = true, true
	}
	for r := tar.NewReader(files); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the package: %w", err)
		}
		name := filepath.Base(h.Name)
		if strings.HasPrefix(name, "vmlinuz-") {
			name = "vmlinuz"
		} else if !wanted[name] {
			continue
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return fmt.Errorf("read %s: %w", h.Name, err)
		}
		if err := os.WriteFile(filepath.Join(cache, name), content, 0o644); err != nil {
			return err
		}
	}
}
