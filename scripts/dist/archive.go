package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

// A file is one file of an archive.
type file struct {
	name string
	mode fs.FileMode
	data []byte
}

// pack returns a tar.gz of one folder with the files and their checksums, in the
// form of sha256sum(1). The result depends only on the arguments.
func pack(folder string, files []file, modified time.Time) ([]byte, error) {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b file) int { return cmp.Compare(a.name, b.name) })
	var sums bytes.Buffer
	for _, f := range files {
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(f.data), f.name)
	}
	files = append(files, file{"SHA256SUMS", 0o644, sums.Bytes()})

	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	t := tar.NewWriter(z)
	for _, f := range files {
		if err := addFile(t, folder+"/"+f.name, f, modified); err != nil {
			return nil, fmt.Errorf("pack %s: %w", f.name, err)
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// addFile writes one file. Its owner is 0 without a name, which is root on every system.
func addFile(t *tar.Writer, name string, f file, modified time.Time) error {
	h := &tar.Header{
		Typeflag: tar.TypeReg, Format: tar.FormatUSTAR,
		Name: name, Mode: int64(f.mode), Size: int64(len(f.data)), ModTime: modified.Truncate(time.Second),
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err := t.Write(f.data)
	return err
}
