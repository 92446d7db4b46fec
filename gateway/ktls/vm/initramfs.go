// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io/fs"
)

// archive is an initramfs in the cpio format "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	b     bytes.Buffer
	inode int
}

func (a *archive) dir(name string) { a.add(name, 0o040755, nil) }

func (a *archive) file(name string, mode fs.FileMode, content []byte) {
	a.add(name, 0o100000|uint32(mode.Perm()), content)
}

// console is what the first process reads and writes, before there is a /dev.
func (a *archive) console() {
	a.dir("dev")
	a.entry("dev/console", 0o020600, nil, 5, 1)
}

func (a *archive) add(name string, mode uint32, content []byte) { a.entry(name, mode, content, 0, 0) }

func (a *archive) entry(name string, mode uint32, content []byte, major, minor int) {
	a.inode++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, device, device of a node, namesize, check
	fmt.Fprintf(&a.b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", a.inode, mode, 0, 0, 1, 0,
		len(content), 0, 0, major, minor, len(name)+1, 0)
	a.b.WriteString(name)
	a.b.WriteByte(0)
	a.pad()
	a.b.Write(content)
	a.pad()
}

// pad fills up to four bytes, as header with name, and content, are.
func (a *archive) pad() {
	for a.b.Len()%4 != 0 {
		a.b.WriteByte(0)
	}
}

func (a *archive) bytes() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.b.Bytes()
}
