package linux

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/meshhelper/meshhelper/internal/host"
)

// journalName is the name of the journal's file in the state directory.
const journalName = "linux-journal.json"

// journalVersion is the version of the format. A journal of another one is refused.
const journalVersion = 1

// journal is the sysctls that were changed, with the values that were found. It is
// written before the change, and removed when everything is restored.
type journal struct {
	Version int `json:"version"`
	// Boot is the ID of the boot; sysctls don't outlive one.
	Boot    string         `json:"boot"`
	Changed []sysctlChange `json:"changed"`
}

// sysctlChange is one changed sysctl.
type sysctlChange struct {
	// Name is the path below /proc/sys/net, such as ipv4/conf/eth0/forwarding.
	Name string `json:"name"`
	// Index is that of the interface, which stays when it is renamed; 0 for "all" and
	// "default".
	Index int `json:"index,omitempty"`
	// Found is the value before the change, Set the one that was written.
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

// parseJournal refuses entries that would write anything but a small number, or to
// anything but a sysctl that this package changes.
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

// isSmallNumber reports whether s is a value that forwarding and accept_ra may have.
func isSmallNumber(s string) bool { return len(s) == 1 && s[0] >= '0' && s[0] <= '9' }

// journalWriter writes the journal in a goroutine, one write at a time; of several that
// wait, only the last is written. So a change that closes needn't wait for a frozen disk
// (fsfreeze(8) blocks fsync for seconds).
type journalWriter struct {
	dir string

	mu      sync.Mutex
	busy    bool
	next    *journal
	waiting []chan error
}

// write queues the journal as it is now. The channel receives the error of the write that
// includes it, which may be a later one.
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

// run writes until nothing is queued.
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
