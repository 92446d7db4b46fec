// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"encoding/binary"
	"hash/maphash"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// Files are looked at this often, and for no more than a hundredth of the time,
	watchEvery = time.Second
	watchShare = 100
	// but at least this often: on a busy machine a look takes long because it waits.
	watchLeast = 10 * time.Second
)

// watch reloads when what was read is not what is there any more. It looks at files by their names, as the next reload
// will: so it sees what editors rename, what Kubernetes swaps by a symbolic link, and files that are mounted one by
// one or over a network, none of which inotify tells of reliably.
func (g *Gateway) watch(ctx context.Context) {
	pause, before := watchEvery, uint64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		began := time.Now()
		var changed bool
		if changed, before = g.changed(before); changed {
			g.Reload()
		}
		pause = min(max(watchEvery, watchShare*time.Since(began)), watchLeast)
	}
}

// changed says whether the files are not those that were read last, by whatever asked for it and with a mistake in them
// or not: the next change is the next attempt. before is how they were the last time, now how they are: a change counts
// once it has come to rest, so that a certificate isn't read without its key.
func (g *Gateway) changed(before uint64) (changed bool, now uint64) {
	now = fingerprint(g.reloads.seed, g.files())
	return now != g.reloads.read.Load() && now == before, now
}

// noteFiles takes the fingerprint of the files that are going to be read: what changes from here on is a change. A file
// that the map comes to name only now is one, too, and is read twice.
func (g *Gateway) noteFiles() {
	if g.settings.Watch == "on" {
		g.reloads.read.Store(fingerprint(g.reloads.seed, g.files()))
	}
}

// files are what a configuration is read from: files, and directories with all that is in them.
func (g *Gateway) files() (all []string) {
	s := &g.settings
	lists := g.current.Load().config.ListFiles()
	if read := g.reloads.lists.Load(); read != nil {
		lists = *read
	}
	for _, path := range append([]string{s.MapFile, s.Certs, s.BackendCAs}, lists...) {
		if path != "" {
			all = append(all, path)
		}
	}
	return all
}

// fingerprint changes when one of the files does: its size, its time, or which file the name leads to.
func fingerprint(seed maphash.Seed, files []string) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, path := range files {
		addFile(&h, path, 2) // certificates may be one level below their directory
	}
	return h.Sum64()
}

func addFile(h *maphash.Hash, path string, depth int) {
	_, _ = h.WriteString(path)
	info, err := os.Stat(path)
	if err != nil {
		_ = h.WriteByte(0)
		return
	}
	if info.IsDir() {
		if depth > 0 {
			entries, _ := os.ReadDir(path)
			for _, e := range entries {
				if strings.HasPrefix(e.Name(), ".") {
					continue // neither maps nor certificates are read from them: an editor's lock is no change
				}
				addFile(h, filepath.Join(path, e.Name()), depth-1)
			}
		}
		return
	}
	var b [32]byte
	binary.LittleEndian.PutUint64(b[:], uint64(info.Size()))
	binary.LittleEndian.PutUint64(b[8:], uint64(info.ModTime().UnixNano()))
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		binary.LittleEndian.PutUint64(b[16:], st.Ino)
		binary.LittleEndian.PutUint64(b[24:], uint64(st.Ctim.Nano())) // of a file that was made readable nothing else changes
	}
	_, _ = h.Write(b[:])
}
