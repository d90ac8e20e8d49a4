package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/plain"
)

const (
	// maxEvents is how many events a journal keeps.
	maxEvents = 1024
	// maxJournal limits the size of the file in bytes; an event takes about 200. A larger file
	// is replaced by one with only the kept events.
	maxJournal = 1 << 20
	// seqStep separates the Seqs of two runs of the helper: each run starts at the next
	// multiple of seqStep, plus 1. The last events of a run may not be in the file. With a
	// greater Seq in the next run, a reader that continues after such an event misses nothing.
	seqStep = 10000
)

// Journal keeps the latest maxEvents events in memory and in a file. Readers read at their own
// pace; a slow one misses events, but delays no other. A goroutine writes the file while there
// is something to write. Nothing waits for it, and events that it can't write are only in
// memory. A Journal is safe for concurrent use.
type Journal struct {
	wall func() time.Time

	mu     sync.Mutex
	last   uint64        // the newest event's Seq
	events []Event       // by Seq; fewer than 2*maxEvents, so that few appends copy them
	newer  chan struct{} // closed and replaced by each event
	listen func(Event)   // must not block

	path    string // of the file; "" is none
	log     *slog.Logger
	written uint64        // events up to this Seq are in the file, or couldn't be written
	idle    chan struct{} // closed when write ends; nil while it doesn't run
	failed  bool          // the last write failed, so the next replaces the file
}

// NewJournal returns an empty journal without a file; see Open. listen is called with each
// event, in the goroutine that records it, and must not block.
func NewJournal(wall func() time.Time, listen func(Event)) *Journal {
	return &Journal{wall: wall, newer: make(chan struct{}), listen: listen}
}

// Record adds an event with the present time and wakes the readers that wait for one. It calls
// listen without the lock held, so that the log can't delay a reader.
func (j *Journal) Record(e Event) {
	j.listen(j.add(e))
}

// add is Record without the call of listen. It returns the event as recorded, with its message
// as printable text.
func (j *Journal) add(e Event) Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last++
	e.Seq, e.Time = j.last, j.wall().UTC().Round(0)
	e.Message = plain.Text(e.Message)
	j.events = append(j.events, e)
	if len(j.events) >= 2*maxEvents {
		j.events = slices.Clone(j.events[len(j.events)-maxEvents:])
	}
	close(j.newer)
	j.newer = make(chan struct{})
	if j.path != "" && j.idle == nil {
		j.idle = make(chan struct{})
		go j.write(j.idle)
	}
	return e
}

// Since returns the kept events with a greater Seq, and a channel that is closed when there
// are newer ones. A seq that no event has yet is from another journal, and Since returns all.
func (j *Journal) Since(seq uint64) ([]Event, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if seq > j.last {
		seq = 0
	}
	return slices.Clone(after(j.events[max(0, len(j.events)-maxEvents):], seq)), j.newer
}

// after returns the events with a Seq greater than seq, which are at the end of events.
func after(events []Event, seq uint64) []Event {
	return events[sort.Search(len(events), func(i int) bool { return events[i].Seq > seq }):]
}

// Open reads the events of earlier runs from the file at path, and writes new ones there from
// then on. A file that can't be read is logged, and counts as empty.
func (j *Journal) Open(path string, log *slog.Logger) {
	dir, file := filepath.Split(path)
	// Temporary files of a helper that was killed while it replaced the file.
	temps, _ := filepath.Glob(filepath.Join(dir, "."+file+".*")) // none without the folder
	for _, t := range temps {
		_ = os.Remove(t)
	}
	text, err := owned.Read(path, 2*maxJournal)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn(fmt.Sprintf("read the events of earlier runs: %v", err))
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.path, j.log = path, log
	j.events = decodeEvents(text)
	if n := len(j.events); n > 0 {
		j.last = (j.events[n-1].Seq/seqStep + 1) * seqStep
	}
	j.written = j.last
	// The first write replaces a file that couldn't be read, and one whose last line was cut
	// by a loss of power, since an event appended to that line would be lost with it.
	unread := err != nil && !errors.Is(err, fs.ErrNotExist)
	j.failed = unread || len(text) > 0 && text[len(text)-1] != '\n'
}

// decodeEvents returns the last maxEvents events of a journal's file. It skips lines that
// aren't events, such as one cut by a loss of power, and events out of order.
func decodeEvents(text []byte) []Event {
	var out []Event
	for line := range bytes.Lines(text) {
		var e Event
		if json.Unmarshal(line, &e) != nil || e.Seq == 0 || e.Seq >= 1<<62 || e.Kind == "" {
			continue
		}
		if n := len(out); n > 0 && out[n-1].Seq >= e.Seq {
			continue
		}
		// The file may have been edited: its texts go to terminals, too.
		e.Kind, e.Peer, e.Message = Kind(plain.Text(string(e.Kind))), plain.Text(e.Peer), plain.Text(e.Message)
		out = append(out, e)
	}
	return slices.Clone(out[max(0, len(out)-maxEvents):])
}

// write writes events to the file until all are written, and then closes idle.
func (j *Journal) write(idle chan struct{}) {
	for {
		j.mu.Lock()
		news := slices.Clone(after(j.events, j.written))
		if len(news) == 0 || j.path == "" {
			j.idle = nil
			close(idle)
			j.mu.Unlock()
			return
		}
		j.written = j.last
		all := slices.Clone(j.events[max(0, len(j.events)-maxEvents):])
		path, failed := j.path, j.failed
		j.mu.Unlock()
		err := keepEvents(path, all, news, failed)
		if err != nil && !failed {
			j.log.Info(fmt.Sprintf("save events: %v", err)) // an event about it couldn't be saved either
		}
		j.mu.Lock()
		j.failed = err != nil
		j.mu.Unlock()
	}
}

// keepEvents appends news to the file. If the file is too large or missing, or with anew, it
// instead replaces the file by one with all events.
func keepEvents(path string, all, news []Event, anew bool) error {
	info, err := os.Lstat(path)
	if anew || err != nil || !info.Mode().IsRegular() || info.Size() > maxJournal {
		return owned.Replace(path, encodeEvents(all))
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(encodeEvents(news))
	return errors.Join(err, f.Close())
}

// encodeEvents returns events as JSON lines.
func encodeEvents(events []Event) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	for _, e := range events {
		// Neither a bytes.Buffer nor the types of an Event can fail.
		_ = enc.Encode(e)
	}
	return b.Bytes()
}

// Close waits, at most for limit, until the recorded events are written, and writes none after
// that: the directory may be another helper's from then on.
func (j *Journal) Close(limit time.Duration) {
	wait, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	j.Flush(wait.Done())
	j.mu.Lock()
	defer j.mu.Unlock()
	j.path = ""
}

// Flush waits until the recorded events are written, or stop is closed.
func (j *Journal) Flush(stop <-chan struct{}) {
	j.mu.Lock()
	idle := j.idle
	j.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-stop:
	}
}
