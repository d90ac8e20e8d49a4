package logfile

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// gate is a writer that blocks while the test holds its lock.
type gate struct {
	mu   sync.Mutex // held by the test to block Write
	text bytes.Buffer
	err  error
}

func (g *gate) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return 0, g.err
	}
	return g.text.Write(b)
}

const generous = time.Minute

// TestQueueWritesInOrder writes lines from a buffer that is reused: all arrive unchanged and in
// order.
func TestQueueWritesInOrder(t *testing.T) {
	g := &gate{}
	q := NewQueue(g)
	var want strings.Builder
	buffer := make([]byte, 0, 16)
	for i := range 1000 {
		buffer = fmt.Appendf(buffer[:0], "line %d\n", i) // the buffer is reused, as slog does
		want.Write(buffer)
		if n, err := q.Write(buffer); n != len(buffer) || err != nil {
			t.Fatal(n, err)
		}
	}
	if !q.Flush(generous) {
		t.Fatal("the lines aren't written")
	}
	if got := g.text.String(); got != want.String() {
		t.Errorf("got %d bytes, want %d", len(got), want.Len())
	}
}

// TestQueueNeverBlocks writes more lines than fit while the writer is blocked: no call waits,
// the memory is bounded, and the number of lost lines is written where they are missing.
func TestQueueNeverBlocks(t *testing.T) {
	g := &gate{}
	q := NewQueue(g)
	q.max = 1000
	g.mu.Lock()
	line := strings.Repeat("x", 99) + "\n"
	for range 500 {
		fmt.Fprint(q, line)
	}
	if q.Flush(time.Nanosecond) {
		t.Error("Flush reports that a blocked writer has got all lines")
	}
	q.mu.Lock()
	if q.size > q.max || len(q.lines) > 10 {
		t.Errorf("%d bytes are queued, want at most %d", q.size, q.max)
	}
	q.mu.Unlock()
	g.mu.Unlock()
	if !q.Flush(generous) {
		t.Fatal("the lines aren't written")
	}
	fmt.Fprint(q, "after\n")
	if !q.Flush(generous) {
		t.Fatal("the lines aren't written")
	}
	got := strings.Split(g.text.String(), "\n")
	// The goroutine may have taken one line from the queue before it was full.
	kept := strings.Count(g.text.String(), line)
	if kept < 10 || kept > 11 {
		t.Errorf("%d lines are kept, want 10 or 11", kept)
	}
	if want := fmt.Sprintf("lines=%d", 500-kept); !strings.HasSuffix(got[kept], want) || got[kept+1] != "after" {
		t.Errorf("after the kept lines: %q, want %s and after", got[kept:], want)
	}
}

// TestQueueSaysWhereLinesAreMissing has a slow writer that takes some lines after others were
// lost: the note is between the lines kept before the loss and those after it.
func TestQueueSaysWhereLinesAreMissing(t *testing.T) {
	q := NewQueue(nil)
	q.max = 200
	q.idle = make(chan struct{}) // no goroutine drains the queue
	for i := range 7 {
		fmt.Fprintf(q, "%d%s\n", i, strings.Repeat("x", 48))
	}
	q.next()
	q.next()
	q.next()
	fmt.Fprint(q, "last\n")
	var got []string
	for l := q.next(); l != nil; l = q.next() {
		got = append(got, string(l))
	}
	if len(got) != 3 || got[0][0] != '3' || !strings.Contains(got[1], "lines=3") || got[2] != "last\n" {
		t.Errorf("got %q", got)
	}
}

// TestQueueOutlivesErrors has the writer fail once: that line is lost, and the next is written.
func TestQueueOutlivesErrors(t *testing.T) {
	g := &gate{err: errors.New("broken pipe")}
	q := NewQueue(g)
	fmt.Fprintln(q, "lost")
	if !q.Flush(generous) {
		t.Fatal("the queue stops after an error")
	}
	g.err = nil
	fmt.Fprintln(q, "kept")
	if !q.Flush(generous) || g.text.String() != "kept\n" {
		t.Errorf("got %q", g.text.String())
	}
}

// TestQueueLongLine writes a line longer than MaxLine: it is cut, and the caller's bytes don't
// change.
func TestQueueLongLine(t *testing.T) {
	g := &gate{}
	q := NewQueue(g)
	long := strings.Repeat("x", 1<<20)
	fmt.Fprint(q, long)
	if !q.Flush(generous) || g.text.Len() != MaxLine || strings.Trim(long, "x") != "" {
		t.Errorf("%d bytes", g.text.Len())
	}
}

// TestQueueIsIdle checks that no goroutine runs while the queue is empty.
func TestQueueIsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(&gate{})
		for range 10 {
			fmt.Fprintln(q, "x")
			synctest.Wait()
		}
		if !q.Flush(0) {
			t.Error("Flush reports that lines are still queued")
		}
	}) // synctest.Test fails if a goroutine is left
}
