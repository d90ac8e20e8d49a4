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

// openJournal opens the journal of a folder.
func openJournal(dir string) *Journal {
	j := NewJournal(time.Now, func(Event) {})
	j.Open(filepath.Join(dir, eventsFile), slog.New(slog.DiscardHandler))
	return j
}

// flushed waits until all is written.
func flushed(t *testing.T, j *Journal) {
	t.Helper()
	stop := make(chan struct{})
	timer := time.AfterFunc(time.Minute, func() { close(stop) })
	defer timer.Stop()
	j.Flush(stop)
}

// TestEventsOutlastARestart records in one journal, and reads from the next: a reader
// that goes on where it was sees each event once, in order.
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
			t.Errorf("event %d says %q", i, e.Message)
		}
	}
	if len(all) != 6 {
		t.Errorf("%d events after a restart, want 6", len(all))
	}
	if more, _ := second.Since(last); len(more) != 1 || more[0].Message != "5" {
		t.Errorf("after Seq %d come %v, want the one of the second helper", last, more)
	}
	// What the first helper told and couldn't write any more has Seqs of its own.
	if more, _ := second.Since(last + 100); len(more) != 1 {
		t.Errorf("after an event that was told and not written come %d, want 1", len(more))
	}
	flushed(t, second)
	// A reader that knows another journal gets all of this one.
	if more, _ := second.Since(1 << 40); len(more) != 6 {
		t.Errorf("a reader of another journal gets %d events, want 6", len(more))
	}
}

// TestJournalIsBounded fills the file over its bound and breaks a line: what is
// remembered stays, and the file small.
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
		t.Errorf("%d events are remembered, the last %.10q", len(all), all[len(all)-1].Message)
	}
	// The first event after the broken line isn't part of it.
	next.Record(Event{Kind: Change, Message: "after"})
	flushed(t, next)
	if all, _ := openJournal(dir).Since(0); all[len(all)-1].Message != "after" {
		t.Errorf("the last event is %.10q", all[len(all)-1].Message)
	}
}

// TestForeignJournal finds a file that no helper wrote: too large, or no file at all. It is
// replaced with the next event.
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

// TestClosedJournalWritesNothing records after the end: the folder may be another
// helper's by then.
func TestClosedJournalWritesNothing(t *testing.T) {
	j := openJournal(t.TempDir())
	j.idle = make(chan struct{}) // a writer that is still busy
	j.events, j.last = []Event{{Seq: 1, Kind: Change}}, 1
	j.path = ""
	j.write(j.idle)
	if j.failed {
		t.Error("it tried to write without a folder")
	}
}

// TestJournalThatCannotBeWritten records where no file can be: nothing waits, and the
// events are there while the helper runs.
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

func FuzzDecodeEvents(f *testing.F) {
	f.Add([]byte(`{"seq":1,"time":"2026-01-02T15:04:05Z","kind":"change","message":"x"}` + "\n" + `{"seq":2`))
	f.Add([]byte(`{"seq":1,"kind":"change\u001b[2J","peer":"\u202e","message":"x\nok"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var last uint64
		for _, e := range decodeEvents(text) {
			if e.Seq <= last || e.Seq >= 1<<62 {
				t.Fatalf("Seq %d comes after %d", e.Seq, last)
			}
			last = e.Seq
			if _, err := json.Marshal(e); err != nil {
				t.Fatal(err)
			}
			for _, text := range []string{string(e.Kind), e.Peer, e.Message} {
				if plain.Text(text) != text {
					t.Fatalf("%q isn't for a terminal", text)
				}
			}
		}
	})
}
