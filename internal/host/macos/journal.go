package macos

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// journalName is the journal's file in the state directory.
const journalName = "macos-journal.json"

// journalVersion is written into the journal; another one isn't understood.
const journalVersion = 1

// journal is what we changed of the host, with what was found. It is on disk
// before the change, and gone when everything is as it was.
type journal struct {
	Version int `json:"version"`
	// Boot is kern.bootsessionuuid: nothing of this outlives a boot.
	Boot string `json:"boot"`
	// Forwarding are the families that we switched forwarding on for; it was
	// found off.
	Forwarding policy.Families `json:"forwarding"`
	// Anchor is the path of the anchor that may hold our rules; empty for none.
	Anchor string `json:"anchor,omitempty"`
	// Token keeps the packet filter on; 0 for none.
	Token uint64 `json:"token,omitempty"`
	// Enabling is set while a token is asked for: if we are killed before it is
	// in Token, it is the one that isn't among Others.
	Enabling bool     `json:"enabling,omitempty"`
	Others   []uint64 `json:"others,omitempty"`
}

// OfBoot implements [host.Journal].
func (j *journal) OfBoot() string { return j.Boot }

// IsEmpty implements [host.Journal].
func (j *journal) IsEmpty() bool {
	return j.Forwarding == policy.Families{} && j.Anchor == "" && j.Token == 0 && !j.Enabling
}

// readJournal returns the journal of this boot, which is empty if there is none.
func readJournal(dir, boot string) (*journal, error) {
	empty := &journal{Version: journalVersion, Boot: boot}
	return host.ReadJournal(filepath.Join(dir, journalName), empty, parseJournal)
}

// write replaces the journal on disk, or removes an empty one, and returns once that is synced.
func (j *journal) write(dir string) error {
	return host.WriteJournal(filepath.Join(dir, journalName), j)
}

// parseJournal refuses what would have us flush an anchor that isn't ours.
func parseJournal(b []byte) (*journal, error) {
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, err
	}
	if j.Version != journalVersion {
		return nil, fmt.Errorf("version %d is unknown: want %d", j.Version, journalVersion)
	}
	if j.Anchor != "" {
		label, ok := strings.CutPrefix(j.Anchor, anchorParent)
		if path, err := AnchorPath(label); !ok || err != nil || path != j.Anchor {
			return nil, fmt.Errorf("anchor %q is not ours", j.Anchor)
		}
	}
	return &j, nil
}
