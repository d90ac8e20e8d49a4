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

// trialLimit bounds how long Doctor waits for the trial write. A disk that hangs (a frozen or
// a network file system) would block it for ever.
const trialLimit = 2 * time.Second

// checkStateDir writes a file into the state directory and removes it again, so that a full
// or read-only disk is reported before a change can't be saved. The write is queued behind
// those of the wanted state, so that it never runs beside one of them.
func (x *Explainer) checkStateDir(ctx context.Context) api.Check {
	dir := x.o.StateDir
	check := api.Check{Name: nameStateDir, Hint: stateDirHint(dir)}
	limit, cancel := context.WithTimeout(ctx, trialLimit)
	defer cancel()
	trial := x.o.Wanted.Queue("try", func() error { return writeTrial(dir) })
	select {
	case <-trial.Done():
		if check.OK = trial.Err() == nil; check.OK {
			check.Message = fmt.Sprintf("%s takes what is written", dir)
		} else {
			check.Message = fmt.Sprintf("nothing can be written into %q: %v", dir, trial.Err())
		}
	case <-limit.Done():
		check.Message = fmt.Sprintf("the disk of %q doesn't answer", dir)
	}
	return check
}

// stateDirHint is the hint for a state directory that can't be written to.
func stateDirHint(dir string) string {
	return fmt.Sprintf("make room on the disk of %q, or make it writable: a change made meanwhile is lost at a restart", dir)
}

// queueSpaceCheck has stateDirProblem set or cleared according to checkSpace, for status, which
// writes nothing: it runs after each round. The caller doesn't wait for the disk.
func (x *Explainer) queueSpaceCheck() {
	dir := x.o.StateDir
	x.o.Wanted.Queue("room", func() error {
		err := checkSpace(dir)
		var problem *host.Problem
		if err != nil {
			problem = &host.Problem{Step: nameStateDir, Message: fmt.Sprintf("nothing can be written into %q: %v", dir, err), Hint: stateDirHint(dir)}
		}
		x.stateDirProblem.Store(problem) // once, or a status in between would list none
		return err
	})
}

// trialBytes is the size of the trial file: large enough that it fits neither in the rest of a
// block nor in the inode (ext4's inline_data) of a file system that is full.
const trialBytes = 64 << 10

// writeTrial writes a file and removes it. Only a real write detects an exhausted quota, a file
// system that went read-only after an error, or a full disk whose last blocks are root's.
func writeTrial(dir string) error {
	temp, err := owned.WriteTemp(dir, "trial", bytes.NewReader(make([]byte, trialBytes)), 0o600)
	if err != nil {
		return err
	}
	return os.Remove(temp)
}
