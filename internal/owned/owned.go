// Package owned reads files that only root or the user that runs this process can have
// written, and looks at the folders on the way to them: a program that runs as root
// must not believe what another user put there.
//
// Open and Read are for files, CheckAbove is for the folders above. On systems other
// than Unix nothing is checked: access lists, which the folder's set, are another matter.
package owned

import (
	"fmt"
	"io"
)

// Read reads a file, which Open opens, of at most so many bytes.
func Read(path string, most int64) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("more than %d bytes", most)
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	return text, nil
}

// AboveError says of a folder, or of a link, on the way to another that a user who isn't
// trusted could put another in its place.
type AboveError struct {
	Path    string // the folder or the link
	Problem string // what is wrong with it
	Hint    string // what to do about it
}

func (e *AboveError) Error() string { return fmt.Sprintf("%q %s", e.Path, e.Problem) }
