// Package logfile writes a program's log to a file of bounded size.
//
// launchd opens a file for a daemon's standard error and never bounds it, and
// newsyslog(8) renames a file while the daemon keeps writing to the renamed one. So
// the helper writes its own file and rotates it when it is full: helper.log,
// helper.log.1 and so on, up to Options.Keep old files, each of at most
// Options.MaxSize bytes.
//
// A log must never stop the program that writes it. While the disk is full, [File] loses
// lines and counts them; before the next line that fits, it writes one with their number. A
// write to a disk, pipe or terminal can also block forever, so the program writes to a
// [Queue], which doesn't block.
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

// Options are the log's path and its limits.
type Options struct {
	// Path is the file's absolute path. Its folder must exist.
	Path string // required
	// MaxSize is the size limit of each file in bytes, at least MaxLine.
	MaxSize int64 // optional: DefaultMaxSize
	// Keep is how many old files to keep, 0 to 9.
	Keep int // optional: none
	// Failed is called with the error when a line is lost, but only for the first since a
	// line was written. It must not write to the File.
	Failed func(error) // optional
}

const (
	// MaxLine is the length in bytes to which the line of one Write is cut.
	MaxLine = 16 << 10
	// DefaultMaxSize, in bytes, is room for some weeks of a quiet helper's log.
	DefaultMaxSize = 4 << 20

	// maxKeep keeps the numbers of old files at one digit, so that ls sorts them by age.
	maxKeep = 9
	// mode gives read access to root's group, but to no other user: the log has no keys, but
	// it names the mesh's peers.
	mode = 0o640
)

// A File is a log file. Its methods may be called by several goroutines.
type File struct {
	o    Options
	open func(path string) (handle, error) // openFile outside tests

	mu     sync.Mutex
	h      handle // the current file; nil if the next Write has to open it
	size   int64  // of the current file in bytes
	lost   int    // lines lost since the last one that was written
	closed bool   // by Close
}

// A handle is an open file: an *os.File, or in tests a fake on a full disk.
type handle interface {
	io.WriteCloser
	Stat() (fs.FileInfo, error)
	Truncate(size int64) error
}

// New returns a File, or an error if the options are invalid. It doesn't touch the disk: the
// first Write opens the file, since a helper must start even if it can't write its log.
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

// Write appends one line, cut to MaxLine bytes, as a whole or not at all. An error means that
// the line is lost.
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

// cut returns line, or, if it exceeds MaxLine bytes, a copy of its start with a mark.
func cut(line []byte) []byte {
	if len(line) <= MaxLine {
		return line
	}
	const end = " [cut]\n"
	// The capacity is limited so that append copies instead of writing into the caller's line.
	return append(line[:MaxLine-len(end):MaxLine-len(end)], end...)
}

// write writes line, after one with the number of lost lines if there are any. The caller
// holds f.mu.
func (f *File) write(line []byte) error {
	if f.lost > 0 {
		line = append(fmt.Appendf(nil, "level=WARN msg=\"lines of this log were lost\" lines=%d\n", f.lost), line...)
	}
	if err := f.ready(int64(len(line))); err != nil {
		return err
	}
	n, err := f.h.Write(line)
	if err != nil {
		// Remove what was written, or the next line would continue it.
		if f.h.Truncate(f.size) != nil {
			f.size += int64(n)
		}
		return err
	}
	f.size += int64(n)
	f.lost = 0
	return nil
}

// ready opens the file if necessary, and rotates it if n more bytes would exceed MaxSize. A
// line is written to an empty file whatever its size. The caller holds f.mu.
func (f *File) ready(n int64) error {
	if err := f.openCurrent(); err != nil {
		return err
	}
	if f.size == 0 || f.size+n <= f.o.MaxSize {
		return nil
	}
	// If the file can't be renamed, the line is lost: the bound on the size matters more.
	if err := f.rotate(); err != nil {
		return err
	}
	f.h.Close()
	f.h = nil
	return f.openCurrent()
}

// openCurrent opens the current file and reads its size, unless it is open.
func (f *File) openCurrent() error {
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

// rotate renames each file to the next older name, replacing the oldest. rename(2) replaces
// a symbolic link and never follows it. Gaps in the numbers don't matter.
func (f *File) rotate() error {
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

// name returns the path of the i-th old file; 0 is the current one.
func (f *File) name(i int) string {
	if i == 0 {
		return f.o.Path
	}
	return f.o.Path + "." + strconv.Itoa(i)
}

// Close closes the file. Lines written afterwards are lost.
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

// openFile opens the log for appending, or creates it. It refuses a symbolic link, a pipe
// or a device, through which another user could make root write to a file of that user's
// choice, or block.
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
	if err := errors.Join(checkSame(h, path), h.Chmod(mode)); err != nil { // Chmod: the umask may have cleared bits
		h.Close()
		return nil, err
	}
	return h, nil
}

// checkSame returns an error if path isn't the file h any more: it was replaced, by a link
// for example, between the check and the opening.
func checkSame(h *os.File, path string) error {
	opened, err := h.Stat()
	if err != nil {
		return err
	}
	named, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !os.SameFile(opened, named) {
		return errors.New("replaced while being opened")
	}
	return nil
}

// Bound truncates a file that is open for appending to 0 if it has more than max bytes. It
// is for files that no other program bounds, such as the one that launchd opens for
// standard error. It does nothing to anything but a regular file.
func Bound(h *os.File, max int64) error {
	info, err := h.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() <= max {
		return err
	}
	return h.Truncate(0)
}
