package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
)

// README has parts that only a clone of the repository has a use for, between these
// two lines. Archives have it without them, and name the executable where they have it.
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
			return nil, fmt.Errorf("run this where the module is: %w", err)
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

// archiveReadme takes what is about the source out of README.
func archiveReadme(text []byte) ([]byte, error) {
	var out []byte
	for {
		before, rest, found := bytes.Cut(text, []byte(sourceBegin))
		if bytes.Contains(before, []byte(sourceEnd)) {
			return nil, errors.New("a part about the source ends that didn't begin")
		}
		out = append(out, before...)
		if !found {
			return bytes.ReplaceAll(out, []byte("bin/meshhelper"), []byte("./meshhelper")), nil
		}
		_, after, found := bytes.Cut(rest, []byte(sourceEnd))
		if !found {
			return nil, errors.New("a part about the source doesn't end")
		}
		text = after
	}
}
