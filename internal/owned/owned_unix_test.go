//go:build unix

package owned

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

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
	for _, mode := range []os.FileMode{0o644, 0o755} {
		for _, umask := range []int{0, 0o077} {
			was := unix.Umask(umask)
			err := errors.Join(os.Chmod(path, 0o666), ReplaceFrom(path, strings.NewReader("for others too"), mode))
			unix.Umask(was)
			must(t, err)
			var info unix.Stat_t
			must(t, unix.Lstat(path, &info))
			if uint32(info.Mode) != unix.S_IFREG|uint32(mode) || int(info.Uid) != os.Geteuid() || os.Geteuid() == 0 && info.Gid != 0 {
				t.Errorf("under umask %#o it is %#o of user %d and group %d, want %#o of root's", umask, info.Mode, info.Uid, info.Gid, mode)
			}
		}
	}
	if err := ReplaceFrom(path, iotest.ErrReader(errors.New("half")), 0o644); err == nil {
		t.Error("half a file took its place")
	}
	if text, _ := os.ReadFile(path); string(text) != "for others too" {
		t.Errorf("after half a file there is %q", text)
	}
	gone := filepath.Join(dir, "gone")
	must(t, Replace(gone, nil), Remove(gone), Remove(gone))
	if _, err := os.Lstat(gone); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a removed file: %v", err)
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

// TestReplaceGivesRootsGroup replaces a file in a folder that hands on its group.
func TestReplaceGivesRootsGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder to another group")
	}
	dir := t.TempDir()
	must(t, os.Chown(dir, 0, otherUser), os.Chmod(dir, 0o755|os.ModeSetgid))
	path := filepath.Join(dir, "file")
	must(t, ReplaceFrom(path, strings.NewReader("x"), 0o644))
	var info unix.Stat_t
	must(t, unix.Lstat(path, &info))
	if info.Gid != 0 {
		t.Errorf("the file belongs to group %d", info.Gid)
	}
}

// TestTidy leaves in a folder what isn't left of a replacement.
func TestTidy(t *testing.T) {
	dir := t.TempDir()
	other := []string{"file", ".hidden", ".file.tmp", ".file.12x.tmp", "file.12.tmp", ".file.12", ".12.tmp"}
	for _, name := range other {
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	left := func(name string) string {
		path, err := WriteTemp(dir, name, strings.NewReader("x"), 0o600)
		must(t, err)
		return filepath.Base(path)
	}
	check := func(want ...string) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		must(t, err)
		var got []string
		for _, e := range entries {
			got = append(got, e.Name())
		}
		want = slices.Sorted(slices.Values(append(want, other...)))
		if !slices.Equal(got, want) {
			t.Errorf("left %q, want %q", got, want)
		}
	}
	a, longer := left("org.a"), left("org.a.b")
	check(a, longer)
	Tidy(dir, "org.a")
	check(longer)
	left("org.a")
	Tidy(dir)
	check()
	Tidy(filepath.Join(dir, "none"))
}
