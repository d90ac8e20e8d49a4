package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/meshhelper/meshhelper/internal/owned"
)

// maxJournal bounds what is read back of a journal, in bytes. The largest, of a Linux host
// with a thousand interfaces, has a tenth of it.
const maxJournal = 4 << 20

// Journal is what a host writes to disk before it changes the computer: the values that it
// found, from which it, or the next helper after a crash, restores them.
type Journal interface {
	// OfBoot returns the ID of the boot in which the changes were made. None of them
	// outlives it.
	OfBoot() string
	// IsEmpty reports whether everything is as it was found.
	IsEmpty() bool
}

// ReadJournal returns the journal at path, or empty if there is none or it is of another
// boot than empty. parse refuses entries that the host doesn't make: what is read is
// written to the system as root. A file that another user may have written is an error.
func ReadJournal[J Journal](path string, empty J, parse func([]byte) (J, error)) (J, error) {
	b, err := owned.Read(path, maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		return empty, nil
	}
	if err != nil {
		return empty, fmt.Errorf("read journal: %w", err)
	}
	j, err := parse(b)
	if err != nil {
		return empty, fmt.Errorf("read journal %s: %w", path, err)
	}
	if j.OfBoot() != empty.OfBoot() {
		return empty, nil
	}
	return j, nil
}

// WriteJournal replaces the journal at path, or removes it if j is empty. It returns once
// the content and the name are synced, so that they survive a loss of power.
func WriteJournal(path string, j Journal) error {
	if j.IsEmpty() {
		if err := owned.Remove(path); err != nil {
			return fmt.Errorf("remove journal: %w", err)
		}
		return nil
	}
	b, err := json.MarshalIndent(j, "", "\t")
	if err == nil {
		err = owned.Replace(path, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}
