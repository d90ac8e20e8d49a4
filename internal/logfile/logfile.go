// Package logfile writes a program's log to a file that stays small.
//
// launchd gives a daemon a file for its standard error and never looks at it
// again, and newsyslog renames a file while the daemon goes on writing to the
// renamed one. So the helper keeps its own file, and puts it away by itself when
// it is full: helper.log, helper.log.1, up to Keep old ones, each of at most
// MaxSize bytes.
//
// A log must never stop what it tells about. When the disk is full, lines are
// lost and counted, and the next line that fits says how many. What writes to a
// disk, pipe or terminal can also block for good, so the program writes to a
// [Queue], which doesn't.
package logfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
)

// Options say where the log is and how much of it is kept.
type Options struct {
	// Path of the file, absolute. Its folder exists.
	Path string // required
	// MaxSize of each file in bytes, at least MaxLine.
	MaxSize int64 // optional; DefaultMaxSize
	// Keep is how many old files there are, 0 to 9.
	Keep int // optional; none
	// Failed is told once when lines begin to be lost, and again only after a line
	// was written in between.
	Failed func(error) // optional
}

const (
	// MaxLine is the most of one Write that is kept, in bytes.
	MaxLine = 16 << 10
	// DefaultMaxSize holds some weeks of a helper that has little to tell.
	DefaultMaxSize = 4 << 20

	maxKeep = 9
	// mode lets root's group read. What is logged has no keys in it, but it says
	// which peers the mesh has.
	mode = 0o640
)

// A File is a log file. Its methods may be called by several goroutines.
type File struct {
	o    Options
	open func(path string) (handle, error)

	mu     sync.Mutex
	h      handle // nil: to be opened by the next line
	size   int64  // of what h is
	lost   int    // lines since the last that was written
	closed bool
}

// A handle is an open file: an *os.File, or in tests a disk that is full.
type handle interface {
	io.WriteCloser
	Stat() (fs.FileInfo, error)
	Truncate(size int64) error
}

// New checks the options. It doesn't touch the disk: a helper starts also where
// its log can't be written.
func New(o Options) (*File, error) {
	if o.MaxSize == 0 {
		o.MaxSize = DefaultMaxSize
	}
	if o.Failed == nil {
		o.Failed = func(error) {}
	}
	if !filepath.IsAbs(o.Path) || o.MaxSize < MaxLine || o.Keep < 0 || o.Keep > maxKeep {
		return nil, fmt.Errorf("log to %q: not an absolute path, or %d bytes and %d old files out of range", o.Path, o.MaxSize, o.Keep)
	}
	return &File{o: o, open: openFile}, nil
}

// Write adds one line, whole or not at all. An error means that the line is lost.
func (f *File) Write(line []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := fs.ErrClosed
	if !f.closed {
		err = f.write(cut(line))
	}
	if err == nil {
		return len(line), nil
	}
	if f.lost++; f.lost == 1 {
		f.o.Failed(fmt.Errorf("write log %q: %w", f.o.Path, err))
	}
	return 0, err
}

// cut bounds a line.
func cut(line []byte) []byte {
	if len(line) <= MaxLine {
		return line
	}
	const end = " [cut]\n"
	return append(line[:MaxLine-len(end):MaxLine-len(end)], end...)
}

func (f *File) write(line []byte) error {
	if f.lost > 0 {
		line = append(fmt.Appendf(nil, "level=WARN msg=\"lines of this log were lost\" lines=%d\n", f.lost), line...)
	}
	if err := f.ready(int64(len(line))); err != nil {
		return err
	}
	n, err := f.h.Write(line)
	if err != nil {
		// The part that fitted would run into the next line.
		if f.h.Truncate(f.size) != nil {
			f.size += int64(n)
		}
		return err
	}
	f.size += int64(n)
	f.lost = 0
	return nil
}

// ready makes sure that n bytes go into the file that is open.
func (f *File) ready(n int64) error {
	if err := f.reopen(); err != nil {
		return err
	}
	if f.size == 0 || f.size+n <= f.o.MaxSize {
		return nil
	}
	// Without a place for the old file nothing more is written: bounded comes
	// before complete.
	if err := f.shift(); err != nil {
		return err
	}
	f.h.Close()
	f.h = nil
	return f.reopen()
}

func (f *File) reopen() error {
	if f.h != nil {
		return nil
	}
	h, err := f.open(f.o.Path)
	if err != nil {
		return err
	}
	info, err := h.Stat()
	if err != nil {
		h.Close()
		return err
	}
	f.h, f.size = h, info.Size()
	return nil
}

// shift renames each file to the next older name; the oldest is replaced. Names
// are replaced, never followed.
func (f *File) shift() error {
	if f.o.Keep == 0 {
		return os.Remove(f.o.Path)
	}
	for i := f.o.Keep; i > 0; i-- {
		if err := os.Rename(f.name(i-1), f.name(i)); err != nil && (i == 1 || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// name returns the path of the i-th old file; 0 is the present one.
func (f *File) name(i int) string {
	if i == 0 {
		return f.o.Path
	}
	return f.o.Path + "." + strconv.Itoa(i)
}

// Close ends the log. Lines after it are lost.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	if f.h == nil {
		return nil
	}
	err := f.h.Close()
	f.h = nil
	return err
}

// openFile opens the log to append to, or makes it. A symbolic link, a pipe or a
// device in its place is refused: root would write to, or wait for, a file that
// another user chose.
func openFile(path string) (handle, error) {
	if dir, err := os.Lstat(filepath.Dir(path)); err != nil {
		return nil, err
	} else if !dir.IsDir() {
		return nil, fmt.Errorf("%s is not a folder: %v", filepath.Dir(path), dir.Mode().Type())
	}
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("not a regular file: %v", info.Mode().Type())
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	h, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, mode)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(same(h, path), h.Chmod(mode)); err != nil { // whatever the umask is
		h.Close()
		return nil, err
	}
	return h, nil
}

// same makes sure that no link was put there in the meantime.
func same(h *os.File, path string) error {
	opened, err := h.Stat()
	if err != nil {
		return err
	}
	named, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !os.SameFile(opened, named) {
		return errors.New("replaced while it was opened")
	}
	return nil
}

// Bound empties a file that is open for appending and that no other program bounds,
// such as the one that launchd makes of standard error, when it has more than
// max bytes. What isn't a regular file is left alone.
func Bound(h *os.File, max int64) error {
	info, err := h.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() <= max {
		return err
	}
	return h.Truncate(0)
}
