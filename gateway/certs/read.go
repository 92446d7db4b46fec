// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// What ReadFile refuses to read.
var (
	ErrNotRegular = errors.New("is not a regular file")
	ErrTooLarge   = errors.New("is too large")
)

// ReadFile reads a regular file of at most limit bytes, or a link to one. It looks at what it has opened, not at the
// name: between a stat and an open the file may change, and the open of a pipe would wait for a writer.
//
//	openat(path, O_RDONLY|O_NONBLOCK|O_NOCTTY) fstat read… close
func ReadFile(path string, limit int64) ([]byte, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, withoutPath(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, nil, withoutPath(err)
	case !info.Mode().IsRegular():
		return nil, nil, ErrNotRegular
	case info.Size() > limit:
		return nil, nil, fmt.Errorf("%w: it has more than %d KiB", ErrTooLarge, limit>>10)
	}
	data := make([]byte, info.Size())
	n, err := io.ReadFull(f, data) // a file that is growing is read as far as it was
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		clear(data)
		return nil, nil, withoutPath(err)
	}
	return data[:n], info, nil
}

// withoutPath is the error alone: messages begin with the path.
func withoutPath(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}
