//go:build linux || darwin

package explain

import (
	"errors"

	"golang.org/x/sys/unix"
)

// readOnly is the flag of a file system that is mounted read-only: ST_RDONLY in Linux's
// statfs(2), MNT_RDONLY in macOS's sys/mount.h.
const readOnly = 1

// checkSpace returns why nothing can be written into a directory, as far as statfs(2) tells;
// nil if nothing is known to prevent it. writeTrial finds more.
func checkSpace(dir string) error {
	var s unix.Statfs_t
	switch err := unix.Statfs(dir, &s); {
	case err != nil:
		return err
	case s.Flags&readOnly != 0:
		return errors.New("its file system is read-only")
	case uint64(s.Bavail)*uint64(s.Bsize) < trialBytes:
		return errors.New("its file system is full")
	case s.Files > 0 && s.Ffree == 0: // no Files: inodes aren't limited, as on btrfs
		return errors.New("its file system has no room for another file")
	}
	return nil
}
