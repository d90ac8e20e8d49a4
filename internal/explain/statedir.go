package explain

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// tryLimit bounds the wait for the disk of a trial.
const tryLimit = 2 * time.Second

// tryFolder writes a file into the state folder and removes it again, so that a disk that
// is full or read-only is known before a change can't be saved.
func (x *Explainer) tryFolder(ctx context.Context) api.Check {
	dir := x.o.StateDir
	check := api.Check{Name: checkFolder, Hint: folderHint(dir)}
	limit, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	j := x.o.Wanted.Queue("try", func() error { return tryWrite(dir) })
	select {
	case <-j.Done():
		if check.OK = j.Err() == nil; check.OK {
			check.Message = fmt.Sprintf("%s takes what is written", dir)
		} else {
			check.Message = fmt.Sprintf("nothing can be written into %q: %v", dir, j.Err())
		}
	case <-limit.Done():
		check.Message = fmt.Sprintf("the disk of %q doesn't answer", dir)
	}
	return check
}

// folderHint says what a person can do, and what happens until then.
func folderHint(dir string) string {
	return fmt.Sprintf("make room on the disk of %q, or make it writable: a change made meanwhile is lost at a restart", dir)
}

// checkSpaceSoon has the state folder's file system asked, without a write, whether it takes
// anything, for status. The caller doesn't wait for the disk.
func (x *Explainer) checkSpaceSoon() {
	dir := x.o.StateDir
	x.o.Wanted.Queue("room", func() error {
		err := checkSpace(dir)
		if x.full.Store(nil); err != nil {
			x.full.Store(&host.Problem{Step: checkFolder, Message: fmt.Sprintf("nothing can be written into %q: %v", dir, err), Hint: folderHint(dir)})
		}
		return err
	})
}

// tryBytes is the size of the trial: large enough that it doesn't fit in the rest of a block
// or in the inode of a file system that is full.
const tryBytes = 64 << 10

// tryWrite writes a file and removes it. Only a real write finds a quota, a file system that
// went read-only after an error, or a full disk whose last blocks are root's.
func tryWrite(dir string) error {
	temp, err := owned.WriteTemp(dir, "trial", bytes.NewReader(make([]byte, tryBytes)), 0o600)
	if err != nil {
		return err
	}
	return os.Remove(temp)
}
