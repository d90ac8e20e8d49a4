//go:build unix

package owned

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const otherUser = 65534

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// TestCheckAbove looks at folders above which another user has a hand in.
func TestCheckAbove(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder to another user")
	}
	for name, c := range map[string]struct {
		// spoil changes top/middle/last, and says what is at fault, or "".
		spoil func(t *testing.T, top string) (path string)
		says  string
	}{
		"all root's": {func(*testing.T, string) string { return "" }, ""},
		"not there yet": {func(t *testing.T, top string) string {
			must(t, os.Remove(top+"/middle/last"), os.Remove(top+"/middle"))
			return ""
		}, ""},
		"the folder itself": {func(t *testing.T, top string) string {
			must(t, os.Chown(top+"/middle/last", otherUser, otherUser))
			return "" // the caller's to check
		}, ""},
		"parent another user's": {func(t *testing.T, top string) string {
			must(t, os.Chown(top+"/middle", otherUser, otherUser))
			return top + "/middle"
		}, "belongs to user 65534"},
		"grandparent another user's": {func(t *testing.T, top string) string {
			must(t, os.Chown(top, otherUser, otherUser))
			return top
		}, "belongs to user 65534"},
		"another user's and sticky": {func(t *testing.T, top string) string {
			must(t, os.Chown(top, otherUser, otherUser), os.Chmod(top, 0o777|os.ModeSticky))
			return top
		}, "belongs to user 65534"},
		"for all": {func(t *testing.T, top string) string {
			must(t, os.Chmod(top, 0o777))
			return top
		}, "any user may replace"},
		"for all, sticky": {func(t *testing.T, top string) string {
			must(t, os.Chmod(top, 0o777|os.ModeSticky))
			return ""
		}, ""},
		"another user's in a sticky one": {func(t *testing.T, top string) string {
			must(t, os.Chmod(top, 0o777|os.ModeSticky), os.Chown(top+"/middle", otherUser, otherUser))
			return top + "/middle"
		}, "belongs to user 65534"},
		"for a group": {func(t *testing.T, top string) string {
			must(t, os.Chown(top, 0, 100), os.Chmod(top, 0o775))
			return top
		}, "group 100 may replace"},
		"for a system's group": {func(t *testing.T, top string) string {
			must(t, os.Chown(top, 0, 1), os.Chmod(top, 0o775))
			return ""
		}, ""},
		"by a link into another user's folder": {func(t *testing.T, top string) string {
			foreign := filepath.Join(filepath.Dir(top), "foreign")
			must(t, os.MkdirAll(foreign+"/middle/last", 0o755), os.Chown(foreign, otherUser, otherUser))
			must(t, os.RemoveAll(top+"/middle"), os.Symlink("../foreign/middle", top+"/middle"))
			return foreign
		}, "belongs to user 65534"},
		"by another user's link": {func(t *testing.T, top string) string {
			must(t, os.Rename(top+"/middle", top+"/real"), os.Symlink(top+"/real", top+"/middle"), os.Lchown(top+"/middle", otherUser, otherUser))
			return top + "/middle"
		}, "belongs to user 65534"},
		"by a link through another user's folder": {func(t *testing.T, top string) string {
			foreign := filepath.Join(filepath.Dir(top), "foreign")
			must(t, os.Mkdir(foreign, 0o755), os.Rename(top+"/middle", top+"/real"), os.Symlink(top+"/real", foreign+"/link"), os.Chown(foreign, otherUser, otherUser))
			must(t, os.Symlink(foreign+"/link", top+"/middle"))
			return foreign
		}, "belongs to user 65534"},
		"by links without end": {func(t *testing.T, top string) string {
			must(t, os.RemoveAll(top+"/middle"), os.Symlink("middle", top+"/middle"))
			return top + "/middle/last"
		}, "more than 40 links"},
	} {
		t.Run(name, func(t *testing.T) {
			top := filepath.Join(t.TempDir(), "top")
			must(t, os.MkdirAll(top+"/middle/last", 0o755))
			path := c.spoil(t, top)
			err := CheckAbove(top + "/middle/last")
			if path == "" {
				must(t, err)
				return
			}
			if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want %s %s", err, path, c.says)
			}
			var above *AboveError
			if errors.As(err, &above) && above.Hint == "" {
				t.Error("no hint")
			}
		})
	}
}

// TestRead reads only what no other user can have written, and no more than is asked for.
func TestRead(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file to another user")
	}
	for name, c := range map[string]struct {
		spoil func(path string) error
		says  string
	}{
		"good":           {func(string) error { return nil }, ""},
		"another user's": {func(path string) error { return os.Chown(path, otherUser, otherUser) }, "belongs to user 65534"},
		"for its group":  {func(path string) error { return os.Chmod(path, 0o660) }, "others may write to it"},
		"a link": {func(path string) error {
			return errors.Join(os.Rename(path, path+".real"), os.Symlink(path+".real", path))
		}, "is a link"},
		"a FIFO": {func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) }, "not a regular file"},
		"long":   {func(path string) error { return os.WriteFile(path, make([]byte, 9), 0o600) }, "more than 8 bytes"},
		"gone":   {os.Remove, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			must(t, os.WriteFile(path, []byte("12345678"), 0o600), c.spoil(path))
			text, err := Read(path, 8)
			switch {
			case c.says == "" && (err != nil || string(text) != "12345678"):
				t.Errorf("got %q, %v", text, err)
			case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
}

// TestReplace gives a file new content: whole, for its owner alone, and not through a link.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	for name, before := range map[string]func() error{
		"new":   func() error { return nil },
		"older": func() error { return os.WriteFile(path, []byte("a longer text"), 0o644) },
		"a link": func() error {
			return errors.Join(os.Remove(path), os.Symlink(filepath.Join(dir, "target"), path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.WriteFile(path, nil, 0o600), os.WriteFile(filepath.Join(dir, "target"), []byte("other"), 0o600), before())
			must(t, Replace(path, []byte("12345678")))
			text, err := Read(path, 8)
			info, _ := os.Lstat(path)
			if err != nil || string(text) != "12345678" || info.Mode() != 0o600 {
				t.Errorf("got %q, %v, %v", text, info.Mode(), err)
			}
			if text, _ := os.ReadFile(filepath.Join(dir, "target")); string(text) != "other" {
				t.Errorf("what a link led to is %q", text)
			}
		})
	}
	must(t, os.Mkdir(filepath.Join(dir, "folder"), 0o700))
	if err := Replace(filepath.Join(dir, "folder"), nil); err == nil {
		t.Error("a folder was replaced")
	}
	if err := Replace(filepath.Join(dir, "none", "file"), nil); err == nil {
		t.Error("a file in no folder was written")
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) != 3 {
		t.Errorf("left %v, want the file, the target and the folder", entries)
	}
}
