//go:build linux || darwin

package explain

import (
	"errors"

	"golang.org/x/sys/unix"
)

// checkSpace reports why nothing can be written into a directory, as far as its file system
// tells without a write.
func checkSpace(dir string) error {
	var s unix.Statfs_t
	switch err := unix.Statfs(dir, &s); {
	case err != nil:
		return err
	case s.Flags&1 != 0: // ST_RDONLY, MNT_RDONLY
		return errors.New("its file system is read-only")
	case uint64(s.Bavail)*uint64(s.Bsize) < tryBytes:
		return errors.New("its file system is full")
	case s.Files > 0 && s.Ffree == 0:
		return errors.New("its file system has no room for another file")
	}
	return nil
}
