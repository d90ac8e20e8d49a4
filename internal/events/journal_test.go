package events

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/plain"
)

const eventsFile = "events.jsonl"

// openJournal opens the journal in a folder.
func openJournal(dir string) *Journal {
	j := NewJournal(time.Now, func(Event) {})
	j.Open(filepath.Join(dir, eventsFile), slog.New(slog.DiscardHandler))
	return j
}

// flushed waits until all recorded events are written.
func flushed(t *testing.T, j *Journal) {
	t.Helper()
	stop := make(chan struct{})
	timer := time.AfterFunc(time.Minute, func() { close(stop) })
	defer timer.Stop()
	j.Flush(stop)
}

// TestEventsOutlastARestart records events in one journal and reads them from the next one: a
// reader that continues after its last Seq gets each event once, in order.
func TestEventsOutlastARestart(t *testing.T) {
	dir := t.TempDir()
	first := openJournal(dir)
	for i := range 5 {
		first.Record(Event{Kind: Change, Message: fmt.Sprint(i)})
	}
	flushed(t, first)
	seen, _ := first.Since(0)
	last := seen[len(seen)-1].Seq
	if last != 5 {
		t.Fatalf("the last of 5 events has Seq %d", last)
	}
	second := openJournal(dir)
	second.Record(Event{Kind: Change, Message: "5"})
	all, _ := second.Since(0)
	for i, e := range all {
		if e.Message != fmt.Sprint(i) {
			t.Errorf("event %d has the message %q", i, e.Message)
		}
	}
	if len(all) != 6 {
		t.Errorf("%d events after a restart, want 6", len(all))
	}
	if more, _ := second.Since(last); len(more) != 1 || more[0].Message != "5" {
		t.Errorf("after Seq %d: %v, want the event of the second helper", last, more)
	}
	// A reader may have got events that the first helper couldn't write any more. The second
	// helper doesn't use their Seqs again, so the reader misses none of its events.
	if more, _ := second.Since(last + 100); len(more) != 1 {
		t.Errorf("after the Seq of an event that wasn't written: %d events, want 1", len(more))
	}
	flushed(t, second)
	// A reader with a Seq of another journal gets all events of this one.
	if more, _ := second.Since(1 << 40); len(more) != 6 {
		t.Errorf("a reader of another journal gets %d events, want 6", len(more))
	}
}

// TestJournalIsBounded records more than the file has room for, and breaks its last line: the
// file stays small, and the newest maxEvents events are kept.
func TestJournalIsBounded(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, eventsFile)
	j := openJournal(dir)
	for i := range 3 * maxEvents {
		j.Record(Event{Kind: Change, Message: fmt.Sprintf("%d %s", i, strings.Repeat("x", 800))})
		if i%100 == 0 {
			flushed(t, j)
		}
	}
	flushed(t, j)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > 2*maxJournal || info.Mode().Perm() != 0o600 {
		t.Errorf("the file has %d bytes and mode %v", info.Size(), info.Mode())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(text, `{"seq":99`...), 0o600); err != nil {
		t.Fatal(err)
	}
	next := openJournal(dir)
	all, _ := next.Since(0)
	if len(all) != maxEvents || !strings.HasPrefix(all[maxEvents-1].Message, fmt.Sprint(3*maxEvents-1)) {
		t.Errorf("%d events are kept, the last one is %.10q", len(all), all[len(all)-1].Message)
	}
	// The next event begins a new line after the broken one.
	next.Record(Event{Kind: Change, Message: "after"})
	flushed(t, next)
	if all, _ := openJournal(dir).Since(0); all[len(all)-1].Message != "after" {
		t.Errorf("the last event is %.10q", all[len(all)-1].Message)
	}
}

// TestForeignJournal opens a journal that no helper wrote: it is too large, a link, or has the
// wrong mode. The next event replaces it.
func TestForeignJournal(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"zeros":    func(path string) error { return os.Truncate(path, 300<<20) },
		"a link":   func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/etc/hostname", path)) },
		"too open": func(path string) error { return os.Chmod(path, 0o666) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, eventsFile)
			if err := errors.Join(os.WriteFile(path, nil, 0o600), make(path)); err != nil {
				t.Fatal(err)
			}
			j := openJournal(dir)
			j.Record(Event{Kind: Change, Message: "x"})
			flushed(t, j)
			info, err := os.Lstat(path)
			if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o600 || info.Size() > 1000 {
				t.Errorf("%v, %v", info, err)
			}
			if all, _ := openJournal(dir).Since(0); len(all) != 1 {
				t.Errorf("%d events are kept, want 1", len(all))
			}
		})
	}
}

// TestClosedJournalWritesNothing has a writer that is still busy after Close: it writes
// nothing, as another helper may use the folder by then.
func TestClosedJournalWritesNothing(t *testing.T) {
	j := openJournal(t.TempDir())
	j.idle = make(chan struct{}) // the writer is still busy
	j.events, j.last = []Event{{Seq: 1, Kind: Change}}, 1
	j.path = ""
	j.write(j.idle)
	if j.failed {
		t.Error("the writer tried to write to a closed journal")
	}
}

// TestJournalThatCannotBeWritten records events in a folder that doesn't exist: Record doesn't
// block, and the events are available while the helper runs.
func TestJournalThatCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := openJournal(filepath.Join(t.TempDir(), "missing"))
		for range 10 {
			j.Record(Event{Kind: Change, Message: "x"})
		}
		synctest.Wait()
		if all, _ := j.Since(0); len(all) != 10 {
			t.Errorf("%d events, want 10", len(all))
		}
	})
}

// FuzzDecodeEvents checks that the events of any file have increasing Seqs, can be encoded, and
// have only text that is safe for a terminal.
func FuzzDecodeEvents(f *testing.F) {
	f.Add([]byte(`{"seq":1,"time":"2026-01-02T15:04:05Z","kind":"change","message":"x"}` + "\n" + `{"seq":2`))
	f.Add([]byte(`{"seq":1,"kind":"change\u001b[2J","peer":"\u202e","message":"x\nok"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var last uint64
		for _, e := range decodeEvents(text) {
			if e.Seq <= last || e.Seq >= 1<<62 {
				t.Fatalf("Seq %d follows %d", e.Seq, last)
			}
			last = e.Seq
			if _, err := json.Marshal(e); err != nil {
				t.Fatal(err)
			}
			for _, text := range []string{string(e.Kind), e.Peer, e.Message} {
				if plain.Text(text) != text {
					t.Fatalf("%q has characters that aren't safe for a terminal", text)
				}
			}
		}
	})
}
