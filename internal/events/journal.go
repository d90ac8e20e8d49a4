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
	// maxEvents is how many events are remembered.
	maxEvents = 1024
	// maxJournal bounds the journal's file, in bytes; an event has some 200. A larger one is
	// replaced by one with the events that are remembered.
	maxJournal = 1 << 20
	// seqStep is what a helper's first Seq is a multiple of, plus 1: events that the helper
	// before recorded and couldn't write any more had lower ones, so that a reader who goes
	// on after them misses none of this helper's.
	seqStep = 10000
)

// Journal has the last events. Readers take from it at their own pace; one that is too
// slow misses some, and doesn't slow down the others. They are kept in a file, too, by a
// goroutine of its own that exists while there is something to write: nothing waits for
// it, and what it couldn't write is lost without harm.
type Journal struct {
	wall func() time.Time

	mu     sync.Mutex
	last   uint64  // the newest event's Seq
	events []Event // by Seq, maxEvents or some more
	newer  chan struct{}
	listen func(Event) // logs, and never blocks

	path    string // "": kept nowhere
	log     *slog.Logger
	written uint64 // the Seq up to which events are in the file, or were given up
	idle    chan struct{}
	failed  bool // the last attempt to write
}

// NewJournal returns an empty journal that is kept nowhere; see Open. listen hears of each
// event, in any goroutine that records one, and must not block.
func NewJournal(wall func() time.Time, listen func(Event)) *Journal {
	return &Journal{wall: wall, newer: make(chan struct{}), listen: listen}
}

// Record adds an event and wakes the readers that wait for one. The log hears of it
// when the lock is free again: readers of the status, too, may need that.
func (j *Journal) Record(e Event) {
	j.listen(j.add(e))
}

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

// Since returns the remembered events after seq. Where no event has that Seq yet, the
// reader knows another journal, and gets all.
func (j *Journal) Since(seq uint64) ([]Event, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if seq > j.last {
		seq = 0
	}
	return slices.Clone(after(j.events[max(0, len(j.events)-maxEvents):], seq)), j.newer
}

// after returns the events with a Seq over seq.
func after(events []Event, seq uint64) []Event {
	return events[sort.Search(len(events), func(i int) bool { return events[i].Seq > seq }):]
}

// Open reads the events of the helpers before from the file at path, and has new ones kept
// there. What can't be read is said to log, and is as if it were empty.
func (j *Journal) Open(path string, log *slog.Logger) {
	dir, file := filepath.Split(path)
	// What a helper that was killed while it replaced the file has left.
	temps, _ := filepath.Glob(filepath.Join(dir, "."+file+".*")) // no folder, no temps
	for _, t := range temps {
		_ = os.Remove(t)
	}
	text, err := owned.Read(path, 2*maxJournal)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn(fmt.Sprintf("read events of before: %v", err)) // they inform only
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.path, j.log = path, log
	j.events = decodeEvents(text)
	if n := len(j.events); n > 0 {
		j.last = (j.events[n-1].Seq/seqStep + 1) * seqStep
	}
	j.written = j.last
	// A file that isn't ours to read is made anew, as is one of which a loss of power cut
	// off the last line, which mustn't take the next with it.
	unread := err != nil && !errors.Is(err, fs.ErrNotExist)
	j.failed = unread || len(text) > 0 && text[len(text)-1] != '\n'
}

// decodeEvents reads a journal's file: the last events in it, by Seq. What is no event,
// such as a line that a loss of power cut, is left out.
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
		out = append(out, e)
	}
	return slices.Clone(out[max(0, len(out)-maxEvents):])
}

// write writes what isn't in the file yet, until nothing is.
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
			j.log.Info(fmt.Sprintf("keep events: %v", err)) // no event: it couldn't be kept either
		}
		j.mu.Lock()
		j.failed = err != nil
		j.mu.Unlock()
	}
}

// keepEvents adds news to the file, or makes it anew of all where it is too large, or
// where the attempt before failed.
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

func encodeEvents(events []Event) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	for _, e := range events {
		// A buffer takes all, and an event has nothing that JSON hasn't.
		_ = enc.Encode(e)
	}
	return b.Bytes()
}

// Close keeps no more events, after it has waited for limit at most until those that were
// recorded are written: the folder may be another helper's from then on.
func (j *Journal) Close(limit time.Duration) {
	wait, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	j.Flush(wait.Done())
	j.mu.Lock()
	defer j.mu.Unlock()
	j.path = ""
}

// Flush waits until what was recorded is written, or stop is closed.
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
