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

// journalVersion is the version of the journal's format, and of cutFile's. Files with
// another version are refused.
const journalVersion = 1

// journal records what the helper changed on the host. It is on disk before the change
// is made, and removed once everything is as it was found.
type journal struct {
	Version int `json:"version"`
	// Boot is kern.bootsessionuuid: no change outlives a boot.
	Boot string `json:"boot"`
	// Forwarding has the families for which forwarding was found disabled and then
	// enabled by us.
	Forwarding policy.Families `json:"forwarding"`
	// Anchor is the path of the anchor that may hold our rules; empty for none.
	Anchor string `json:"anchor,omitempty"`
	// Token is our token, which keeps pf enabled; 0 for none.
	Token uint64 `json:"token,omitempty"`
	// Enabling is set while a token is being acquired. If the helper is killed before
	// Token is recorded, ours is the token that isn't in Others.
	Enabling bool `json:"enabling,omitempty"`
	// Others has the tokens of other programs before ours was acquired.
	Others []uint64 `json:"others,omitempty"`
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

// parseJournal decodes a journal. It refuses an anchor that isn't of the form that
// [AnchorPath] returns, so that a damaged file can't make us flush another program's.
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
