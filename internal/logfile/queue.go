package logfile

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// queueSize bounds the lines waiting in a Queue, in bytes: some thousand lines.
const queueSize = 1 << 20

// A Queue stands between a program and a writer that may block forever: a pipe that
// isn't read, a stopped terminal, a file on a disk that hangs. Write only queues the
// line, and a goroutine that exists while lines wait writes them one by one. If the
// writer doesn't keep up, new lines are dropped, and a line with their number takes
// their place.
//
// If the writer returns an error, its line is lost; reporting that is up to the writer.
// The methods may be called by several goroutines.
type Queue struct {
	to  io.Writer
	max int

	mu      sync.Mutex
	lines   [][]byte
	size    int           // of lines, in bytes
	dropped int           // lines since the last one that was queued
	idle    chan struct{} // closed once no line waits; nil while none does
}

// NewQueue returns a queue of at most 1 MiB of lines for the writer to.
func NewQueue(to io.Writer) *Queue { return &Queue{to: to, max: queueSize} }

// Write queues a line, cut to MaxLine, or drops it. It never blocks and never fails.
func (q *Queue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	kept, note := cut(line), q.note()
	if q.size+len(note)+len(kept) > q.max {
		q.dropped++
	} else {
		if note != nil {
			q.dropped = 0
			q.push(note)
		}
		q.push(append([]byte(nil), kept...))
	}
	if q.idle == nil {
		q.idle = make(chan struct{})
		// The goroutine ends once no line waits. The program doesn't wait for one that is
		// stuck in a write when it exits.
		go q.drain()
	}
	return len(line), nil
}

// note returns the line that says how many lines were dropped, or nil.
func (q *Queue) note() []byte {
	if q.dropped == 0 {
		return nil
	}
	return fmt.Appendf(nil, "level=WARN msg=\"lines were dropped: the log's writer is too slow\" lines=%d\n", q.dropped)
}

func (q *Queue) push(line []byte) {
	q.lines = append(q.lines, line)
	q.size += len(line)
}

// drain writes lines until none waits.
func (q *Queue) drain() {
	for line := q.next(); line != nil; line = q.next() {
		_, _ = q.to.Write(line)
	}
}

// next removes and returns the oldest line. If there is none, it marks the queue as idle
// and returns nil.
func (q *Queue) next() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case len(q.lines) > 0:
		line := q.lines[0]
		q.lines[0] = nil
		q.lines = q.lines[1:]
		q.size -= len(line)
		return line
	case q.dropped > 0:
		line := q.note()
		q.dropped = 0
		return line
	}
	q.lines = nil
	close(q.idle)
	q.idle = nil
	return nil
}

// Flush waits at most for limit until all queued lines are written, and reports whether
// they are.
func (q *Queue) Flush(limit time.Duration) bool {
	q.mu.Lock()
	idle := q.idle
	q.mu.Unlock()
	if idle == nil {
		return true
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-idle:
		return true
	case <-timer.C:
		return false
	}
}
