package logfile

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// queueSize is how many bytes of lines a Queue holds: some thousand lines.
const queueSize = 1 << 20

// A Queue is an io.Writer in front of one that may block forever: a pipe without a reader, a
// stopped terminal, a file on a disk that hangs. Write only queues the line. A goroutine,
// which runs only while lines wait, writes them one by one. If the writer doesn't keep up,
// the Queue drops new lines and later writes one with their number.
//
// The Queue ignores the writer's errors, which lose the line; the writer has to report
// them. Its methods may be called by several goroutines.
type Queue struct {
	to  io.Writer
	max int // the most that size may reach

	mu      sync.Mutex
	lines   [][]byte      // that wait, oldest first
	size    int           // of lines in bytes
	dropped int           // lines dropped since the last one that was queued
	idle    chan struct{} // closed once all lines are written; nil if none wait
}

// NewQueue returns a queue of at most 1 MiB of lines in front of the writer to.
func NewQueue(to io.Writer) *Queue { return &Queue{to: to, max: queueSize} }

// Write queues a copy of a line, cut to MaxLine bytes, or drops it if the queue is full. It
// never blocks, and never returns an error.
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
		// The goroutine ends once no line waits. The program can exit while it is blocked in
		// a write.
		go q.drain()
	}
	return len(line), nil
}

// note returns a line with the number of dropped lines, or nil if there are none. The caller
// holds q.mu.
func (q *Queue) note() []byte {
	if q.dropped == 0 {
		return nil
	}
	return fmt.Appendf(nil, "level=WARN msg=\"lines were dropped: the log's writer is too slow\" lines=%d\n", q.dropped)
}

// push appends a line. The caller holds q.mu.
func (q *Queue) push(line []byte) {
	q.lines = append(q.lines, line)
	q.size += len(line)
}

// drain writes lines until none wait.
func (q *Queue) drain() {
	for line := q.next(); line != nil; line = q.next() {
		_, _ = q.to.Write(line)
	}
}

// next removes and returns the oldest line, or else a note about dropped lines. If there is
// neither, it marks the queue as idle and returns nil.
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

// Flush waits until all queued lines are written, at most for limit, and reports whether
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
