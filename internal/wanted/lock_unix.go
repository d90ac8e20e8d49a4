//go:build unix

package wanted

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/owned"
)

// lockDir locks the state directory for this process, by flock(2) on a file in it. The
// kernel releases the lock when the process ends, even after SIGKILL. The error is errHeld
// while another process has the lock.
func lockDir(dir string) (release func() error, err error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", owned.NoLink(path, err))
	}
	if err := owned.Check(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errHeld
		}
		return nil, fmt.Errorf("lock state directory %q: %w", dir, err)
	}
	return f.Close, nil
}
