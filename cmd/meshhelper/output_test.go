//go:build unix

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOutputInAnotherUsersFolder has the owner of the folder of --output put something else
// in the place of the folder or the file, after the file was made: no other file is removed,
// and the command doesn't say that the configuration is there.
func TestOutputInAnotherUsersFolder(t *testing.T) {
	for name, swap := range map[string]func(dir, victims, file string) error{
		"a link to another folder": func(dir, victims, _ string) error {
			if err := os.Rename(dir, dir+".was"); err != nil {
				return err
			}
			return os.Symlink(victims, dir)
		},
		"a link in the file's place": func(_, victims, file string) error {
			if err := os.Rename(file, file+".was"); err != nil {
				return err
			}
			return os.Symlink(filepath.Join(victims, "phone.conf"), file)
		},
		"another file": func(_, _, file string) error {
			if err := os.Rename(file, file+".was"); err != nil {
				return err
			}
			return os.WriteFile(file, nil, 0o600)
		},
	} {
		for _, written := range []bool{false, true} {
			top := t.TempDir()
			dir, victims := filepath.Join(top, "dir"), filepath.Join(top, "victims")
			file, victim := filepath.Join(dir, "phone.conf"), filepath.Join(victims, "phone.conf")
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			must(os.Mkdir(dir, 0o755))
			must(os.Mkdir(victims, 0o755))
			must(os.WriteFile(victim, []byte("another's"), 0o600))
			o := &peerAddOptions{output: file}
			must(o.openOutput())
			must(swap(dir, victims, file))
			var err error
			if written {
				if err = o.file.write("PrivateKey = x\n"); err == nil || !strings.Contains(err.Error(), "no longer leads to the file that was created") {
					t.Errorf("%s: writing it says %v", name, err)
				}
			}
			inPlace := name == "a link to another folder"
			if err := o.closeOutput(nil); (err == nil) != inPlace {
				t.Errorf("%s: ending it says %v", name, err)
			}
			if text, err := os.ReadFile(victim); string(text) != "another's" {
				t.Errorf("%s, written %v: the other file has %q, %v", name, written, text, err)
			}
			if _, err := os.Lstat(file); err != nil {
				t.Errorf("%s, written %v: what is in the place is gone: %v", name, written, err)
			}
			if left, _ := os.ReadDir(dir + ".was"); len(left) > 0 {
				t.Errorf("%s, written %v: the file that was made is left", name, written)
			}
		}
	}
}
