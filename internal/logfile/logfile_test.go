//go:build unix

package logfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// newLog returns a log and its path, in a new folder unless o has a path.
func newLog(t *testing.T, o Options) (*File, string) {
	t.Helper()
	if o.Path == "" {
		o.Path = filepath.Join(t.TempDir(), "helper.log")
	}
	f, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, o.Path
}

func write(t *testing.T, f *File, line string) {
	t.Helper()
	if n, err := f.Write([]byte(line)); err != nil || n != len(line) {
		t.Fatalf("write %q: %d, %v", line, n, err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestRotates writes more lines than fit into all files: the newest lines are kept, each in one
// file, and no file is larger than MaxSize.
func TestRotates(t *testing.T) {
	f, path := newLog(t, Options{MaxSize: MaxLine, Keep: 2})
	line := strings.Repeat("x", 1023)
	for i := range 100 { // 16 lines a file
		write(t, f, fmt.Sprintf("%03d%s\n", i, line[:1020]))
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) != 3 {
		t.Fatalf("%v, %v", files, err)
	}
	for name, want := range map[string]string{"": "096", ".1": "080", ".2": "064"} {
		got := read(t, path+name)
		if !strings.HasPrefix(got, want) || len(got) > MaxLine || !strings.HasSuffix(got, "\n") {
			t.Errorf("helper.log%s has %d bytes from %.3s, want from %s", name, len(got), got, want)
		}
	}
}

// TestRotatesWithoutOldFiles fills a log that keeps no old files: it begins anew.
func TestRotatesWithoutOldFiles(t *testing.T) {
	f, path := newLog(t, Options{MaxSize: MaxLine})
	write(t, f, strings.Repeat("a", MaxLine))
	write(t, f, "b\n")
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 || read(t, path) != "b\n" {
		t.Errorf("%v, %v", files, err)
	}
}

// TestContinues opens an existing log: its size counts, so the next line rotates it.
func TestContinues(t *testing.T) {
	f, path := newLog(t, Options{MaxSize: MaxLine, Keep: 1})
	write(t, f, strings.Repeat("a", MaxLine-2)+"\n")
	f.Close()
	if _, err := f.Write([]byte("late\n")); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	g, _ := newLog(t, Options{Path: path, MaxSize: MaxLine, Keep: 1})
	write(t, g, "b\n") // doesn't fit into the file any more
	if read(t, path) != "b\n" || len(read(t, path+".1")) != MaxLine-1 {
		t.Error("the size of the existing file isn't counted")
	}
}

// TestMode checks that the mode of the log doesn't depend on the umask.
func TestMode(t *testing.T) {
	f, path := newLog(t, Options{})
	old := syscall.Umask(0o077)
	write(t, f, "x\n")
	syscall.Umask(old)
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// TestLongLine writes a line longer than MaxLine: it is cut and marked as such, and the
// caller's bytes don't change.
func TestLongLine(t *testing.T) {
	f, path := newLog(t, Options{})
	long := strings.Repeat("x", 1<<20)
	write(t, f, long)
	if got := read(t, path); len(got) != MaxLine || !strings.HasSuffix(got, "x [cut]\n") {
		t.Errorf("%d bytes are left", len(got))
	}
	if strings.Trim(long, "x") != "" {
		t.Error("the caller's bytes changed")
	}
}

// TestRefusesLinks has another user replace the log or its folder by a link, a pipe or a
// folder: Write returns an error, Failed is called once, and the target of a link isn't
// written.
func TestRefusesLinks(t *testing.T) {
	for name, put := range map[string]func(path, victim string) error{
		"a link":           func(path, victim string) error { return os.Symlink(victim, path) },
		"a dangling link":  func(path, victim string) error { return os.Symlink(victim+".new", path) },
		"a pipe":           func(path, _ string) error { return syscall.Mkfifo(path, 0o600) },
		"a folder":         func(path, _ string) error { return os.Mkdir(path, 0o700) },
		"a linked folder":  func(path, victim string) error { return relink(filepath.Dir(path), filepath.Dir(victim)) },
		"no folder at all": func(path, _ string) error { return os.Remove(filepath.Dir(path)) },
	} {
		t.Run(name, func(t *testing.T) {
			victim := filepath.Join(t.TempDir(), "helper.log")
			if err := os.WriteFile(victim, []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "log")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			told := 0
			f, path := newLog(t, Options{Path: filepath.Join(dir, "helper.log"), Failed: func(error) { told++ }})
			if err := put(path, victim); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, err := f.Write([]byte("x\n")); err == nil {
					t.Error("Write succeeds")
				}
			}
			if told != 1 {
				t.Errorf("Failed was called %d times", told)
			}
			if read(t, victim) != "mine" {
				t.Error("another user's file was written")
			}
			if _, err := os.Lstat(victim + ".new"); err == nil {
				t.Error("a file was created where the link points")
			}
		})
	}
}

// relink replaces dir by a link to another folder.
func relink(dir, to string) error {
	return errors.Join(os.Remove(dir), os.Symlink(to, dir))
}

// TestReplacesLinkedOldFile has a link at the path of an old file: the rotation replaces the
// link, and doesn't write to the file to which it points.
func TestReplacesLinkedOldFile(t *testing.T) {
	f, path := newLog(t, Options{MaxSize: MaxLine, Keep: 1})
	victim := filepath.Join(t.TempDir(), "victim")
	if err := errors.Join(os.WriteFile(victim, []byte("mine"), 0o600), os.Symlink(victim, path+".1")); err != nil {
		t.Fatal(err)
	}
	write(t, f, strings.Repeat("a", MaxLine))
	write(t, f, "b\n")
	if info, err := os.Lstat(path + ".1"); err != nil || !info.Mode().IsRegular() || read(t, victim) != "mine" {
		t.Errorf("%v, %v", info, err)
	}
}

// fullDisk is an open file on a disk with a given number of free bytes.
type fullDisk struct {
	handle
	free *int
}

func (d fullDisk) Write(b []byte) (int, error) {
	n := min(len(b), *d.free)
	*d.free -= n
	n, err := d.handle.Write(b[:n])
	if err == nil && n < len(b) {
		err = syscall.ENOSPC
	}
	return n, err
}

// TestFullDisk writes to a full disk: no part of a line is left, Failed is called once, and
// once there is room again, the log has the number of lost lines.
func TestFullDisk(t *testing.T) {
	var told []error
	f, path := newLog(t, Options{Failed: func(err error) { told = append(told, err) }})
	free := 8
	f.open = func(path string) (handle, error) {
		h, err := openFile(path)
		return fullDisk{h, &free}, err
	}
	write(t, f, "one\n")
	for range 3 { // four bytes of the first line fit
		if _, err := f.Write([]byte("a line\n")); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v", err)
		}
	}
	if got := read(t, path); got != "one\n" {
		t.Errorf("a part of a line is left: %q", got)
	}
	free = 1 << 20
	write(t, f, "two\n")
	write(t, f, "three\n")
	if got, want := read(t, path), "one\nlevel=WARN msg=\"lines of this log were lost\" lines=3\ntwo\nthree\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(told) != 1 || !errors.Is(told[0], syscall.ENOSPC) {
		t.Errorf("Failed was called with %v, want ENOSPC once", told)
	}
}

// TestStuckRotation has a log whose full file can't be renamed: the file doesn't grow over its
// bound, and the log goes on once the rename succeeds.
func TestStuckRotation(t *testing.T) {
	f, path := newLog(t, Options{MaxSize: MaxLine, Keep: 1})
	stuck := filepath.Join(path+".1", "x") // path+".1" is a folder that isn't empty
	if err := os.MkdirAll(stuck, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, f, strings.Repeat("a", MaxLine))
	for range 100 {
		if _, err := f.Write([]byte("b\n")); err == nil {
			t.Fatal("a line is written beyond the bound")
		}
	}
	if n := len(read(t, path)); n != MaxLine {
		t.Errorf("the file has %d bytes, want %d", n, MaxLine)
	}
	if err := os.RemoveAll(path + ".1"); err != nil {
		t.Fatal(err)
	}
	write(t, f, "c\n")
	if got := read(t, path); !strings.HasSuffix(got, "lines=100\nc\n") {
		t.Errorf("got %q", got)
	}
}

// TestManyWriters writes from several goroutines over several rotations: no line is lost or
// mixed with another.
func TestManyWriters(t *testing.T) {
	f, path := newLog(t, Options{MaxSize: MaxLine, Keep: 9})
	var g sync.WaitGroup
	for i := range 8 {
		g.Go(func() {
			for j := range 200 {
				fmt.Fprintf(f, "%d %03d %s\n", i, j, strings.Repeat("x", 50))
			}
		})
	}
	g.Wait()
	lines := 0
	for i := range 10 {
		b, err := os.ReadFile(f.name(i))
		if err != nil {
			break
		}
		for line := range strings.Lines(string(b)) {
			if lines++; len(line) != 57 {
				t.Errorf("%s: line %q", path, line)
			}
		}
	}
	if lines != 1600 {
		t.Errorf("%d lines, want 1600", lines)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, o := range map[string]Options{
		"no path":        {},
		"relative":       {Path: "helper.log"},
		"too small":      {Path: "/x/y", MaxSize: 1},
		"too many":       {Path: "/x/y", Keep: 10},
		"less than none": {Path: "/x/y", Keep: -1},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestBound checks that Bound empties a file that is larger than the bound, and accepts a pipe.
func TestBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stderr.log")
	h, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, want := range []int{4, 8, 4} { // the third call finds 8 bytes, more than the bound
		if err := Bound(h, 7); err != nil {
			t.Fatal(err)
		}
		if _, err := h.WriteString("boom"); err != nil || len(read(t, path)) != want {
			t.Errorf("%d bytes, want %d, %v", len(read(t, path)), want, err)
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := Bound(w, 0); err != nil {
		t.Errorf("a pipe: %v", err)
	}
}
