package linux

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/meshhelper/meshhelper/internal/host"
)

// journalName is the journal's file in the state directory.
const journalName = "linux-journal.json"

// journalVersion is the version of the format. A journal of another one is refused.
const journalVersion = 1

// journal is what the host looked like before it was changed. It is on disk
// before the change, and gone when everything is as it was.
type journal struct {
	Version int `json:"version"`
	// Boot is the kernel's boot id: sysctls don't outlive a boot.
	Boot    string         `json:"boot"`
	Changed []sysctlChange `json:"changed"`
}

// saved is one changed sysctl.
type sysctlChange struct {
	// Name is the path below /proc/sys/net, such as ipv4/conf/eth0/forwarding.
	Name string `json:"name"`
	// Index is the interface's, which outlives its name; 0 for all and default.
	Index int    `json:"index,omitempty"`
	Found string `json:"found"`
	Set   string `json:"set"`
}

// find returns the entry of a sysctl, or nil.
func (j *journal) find(name string) *sysctlChange {
	i := slices.IndexFunc(j.Changed, func(s sysctlChange) bool { return s.Name == name })
	if i < 0 {
		return nil
	}
	return &j.Changed[i]
}

// OfBoot implements [host.Journal].
func (j *journal) OfBoot() string { return j.Boot }

// IsEmpty implements [host.Journal].
func (j *journal) IsEmpty() bool { return len(j.Changed) == 0 }

// readJournal returns the journal of this boot, which is empty if there is none.
func readJournal(dir, boot string) (*journal, error) {
	empty := &journal{Version: journalVersion, Boot: boot}
	return host.ReadJournal(filepath.Join(dir, journalName), empty, parseJournal)
}

// write replaces the journal on disk, or removes an empty one, and returns once that is synced.
func (j *journal) write(dir string) error {
	return host.WriteJournal(filepath.Join(dir, journalName), j)
}

// parseJournal refuses what would have us write anything but a small number to
// anything but a sysctl that we change.
func parseJournal(b []byte) (*journal, error) {
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, err
	}
	if j.Version != journalVersion {
		return nil, fmt.Errorf("version %d is unknown: want %d", j.Version, journalVersion)
	}
	for _, s := range j.Changed {
		if _, _, ok := splitSysctl(s.Name); !ok || !isSmallNumber(s.Found) || !isSmallNumber(s.Set) {
			return nil, fmt.Errorf("entry %q: %q changed to %q is not ours", s.Name, s.Found, s.Set)
		}
	}
	return &j, nil
}

// isSmallNumber reports whether a sysctl's value is one that forwarding and
// accept_ra take.
func isSmallNumber(s string) bool { return len(s) == 1 && s[0] >= '0' && s[0] <= '9' }

// saver writes the journal from a task of its own, one write after the other and of
// several that wait only the last, so that a change which closes needn't wait for a
// frozen disk.
type journalWriter struct {
	dir string

	mu      sync.Mutex
	busy    bool
	next    *journal
	waiting []chan error
}

// put has the journal as it is now written. What it returns gets the error of the
// write that it, or a later one, is in.
func (s *journalWriter) write(j *journal) <-chan error {
	done := make(chan error, 1)
	copied := *j
	copied.Changed = slices.Clone(j.Changed)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = &copied
	s.waiting = append(s.waiting, done)
	if !s.busy {
		s.busy = true
		go s.run()
	}
	return done
}

// work writes until nothing waits.
func (s *journalWriter) run() {
	for {
		s.mu.Lock()
		next, waiting := s.next, s.waiting
		s.next, s.waiting = nil, nil
		s.busy = next != nil
		s.mu.Unlock()
		if next == nil {
			return
		}
		err := next.write(s.dir)
		for _, done := range waiting {
			done <- err
		}
	}
}
