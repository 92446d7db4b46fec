// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"crypto/sha256"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// settled is how long ago a file has to have changed for its times to be believed: file systems count them in steps, of
// two seconds at worst (FAT), and a second change within one step leaves no trace.
const settled = 3 * time.Second

// Stamp tells whether a file is what it was when it was read. The zero Stamp is no file's.
type Stamp struct {
	id  fileID
	sum [sha256.Size]byte // of the content
}

// fileID changes when a file is replaced, written, or given to somebody else.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // in nanoseconds
	believed     bool  // it had settled when it was read
}

// NewStamp is the stamp of a file with that content, looked at before it was read.
func NewStamp(info fs.FileInfo, content []byte) Stamp {
	return Stamp{newFileID(info), sha256.Sum256(content)}
}

func newFileID(info fs.FileInfo) (id fileID) {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		id = fileID{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano(), false}
		age := time.Since(time.Unix(0, max(id.mtime, id.ctime)))
		id.believed = age > settled
	}
	return id
}

// Unread says whether the file at path is the one of the stamp, without reading it. If it may not be, only its content
// can tell: see Same.
func (s Stamp) Unread(path string) bool {
	info, err := os.Stat(path)
	return err == nil && s.id.believed && newFileID(info) == s.id
}

// Same says whether two stamps are of the same content.
func (s Stamp) Same(other Stamp) bool { return s.id != fileID{} && s.sum == other.sum }
