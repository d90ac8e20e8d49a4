package trial

// A state directory on a disk that is full, or read-only.

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/api"
)

// TestFolderThatTakesNothing puts the state directory on a small file system that fills
// up and is made read-only: status and doctor report it with a remedy, a grant is
// refused, a revocation takes effect, and the problem disappears once there is room.
func TestFolderThatTakesNothing(t *testing.T) {
	m := newStage(t)
	onB := func(t *testing.T, do func() error) {
		t.Helper()
		if err := m.B.Do(do); err != nil {
			t.Fatal(err)
		}
	}
	onB(t, func() error {
		return errors.Join(os.MkdirAll(m.stateDir, 0o700), unix.Mount("small", m.stateDir, "tmpfs", 0, "size=1m,mode=0700"))
	})
	if err := m.Start(t.Context(), "--tick", "200ms"); err != nil {
		t.Fatal(err)
	}
	addPeers(t, m)
	ballast := filepath.Join(m.stateDir, "ballast")
	for _, tt := range []struct {
		name, says string
		spoil      func() error
		mend       func() error
	}{
		{"full", "no space left on device", func() error {
			f, err := os.Create(ballast)
			if err != nil {
				return err
			}
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			f.Close()
			if !errors.Is(err, unix.ENOSPC) {
				return err
			}
			return nil
		}, func() error { return os.Remove(ballast) }},
		{"read-only", "read-only file system",
			func() error { // a second mount of the file system on top, because the helper's lock keeps the first one writable
				return errors.Join(unix.Mount(m.stateDir, m.stateDir, "", unix.MS_BIND, ""),
					unix.Mount("", m.stateDir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			},
			func() error { return unix.Unmount(m.stateDir, 0) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onB(t, tt.spoil)
			m.awaitFolder(t, true)
			checks := (&oracle{Mesh: m, t: t}).doctor()
			i := slices.IndexFunc(checks, func(c api.Check) bool { return c.Name == "state folder" })
			if c := checks[i]; c.OK || !strings.Contains(c.Message, tt.says) || !strings.Contains(c.Hint, m.stateDir) {
				t.Errorf("doctor says %+v", c)
			}
			if o, err := m.Do(t.Context(), "peer", "allow", "C", "routing"); err == nil || !strings.Contains(o.Stderr, "nothing was changed") || !strings.Contains(o.Stderr, m.stateDir) {
				t.Errorf("allow: %+v", o)
			}
			onB(t, tt.mend)
			m.awaitFolder(t, false)
			if got := failed((&oracle{Mesh: m, t: t}).doctor(), "state folder"); len(got) > 0 {
				t.Errorf("after the repair, doctor says %q", got)
			}
		})
	}
}

// awaitFolder waits until status reports that the state directory can't be written, or no
// longer does.
func (m *Mesh) awaitFolder(t *testing.T, told bool) {
	t.Helper()
	for end := time.Now().Add(startWait); ; time.Sleep(20 * time.Millisecond) {
		s := status(t, m)
		is := false
		for _, p := range s.Problems {
			is = is || p.Step == "state folder" && strings.Contains(p.Message, m.stateDir) && strings.Contains(p.Hint, "make room")
		}
		if is == told {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("status reports the state folder: %v, want %v: %+v", is, told, s.Problems)
		}
	}
}
