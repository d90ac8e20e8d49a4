//go:build unix

package launchd

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// Lstat returns the owner and mode of the file at path, without following a symbolic link.
func Lstat(path string) (File, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return File{}, fmt.Errorf("stat file: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return File{}, &fs.PathError{Op: "lstat", Path: path, Err: fs.ErrInvalid}
	}
	return File{Path: path, UID: st.Uid, GID: st.Gid, Mode: fi.Mode()}, nil
}
