package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
)

// Parts of README that only apply to a clone of the repository are between these two lines.
// In an archive README is without them, and names the executable by its path there.
const (
	sourceBegin = "<!-- source -->\n"
	sourceEnd   = "<!-- /source -->\n"
)

// pages returns the licence, README as an archive has it, and the pages that it
// refers to.
func pages() ([]file, error) {
	names, err := filepath.Glob("docs/*.md")
	if err != nil {
		return nil, err
	}
	var files []file
	for _, name := range append(names, "LICENSE", "README.md") {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("run this in the module's root: %w", err)
		}
		if name == "README.md" {
			if data, err = archiveReadme(data); err != nil {
				return nil, fmt.Errorf("make README.md: %w", err)
			}
		}
		files = append(files, file{path.Join(filepath.ToSlash(filepath.Dir(name)), filepath.Base(name)), 0o644, data})
	}
	return files, nil
}

// archiveReadme removes the parts about the source from README.
func archiveReadme(text []byte) ([]byte, error) {
	var out []byte
	for {
		before, rest, found := bytes.Cut(text, []byte(sourceBegin))
		if bytes.Contains(before, []byte(sourceEnd)) {
			return nil, errors.New("the end of a part about the source has no beginning")
		}
		out = append(out, before...)
		if !found {
			return bytes.ReplaceAll(out, []byte("bin/meshhelper"), []byte("./meshhelper")), nil
		}
		_, after, found := bytes.Cut(rest, []byte(sourceEnd))
		if !found {
			return nil, errors.New("the beginning of a part about the source has no end")
		}
		text = after
	}
}
