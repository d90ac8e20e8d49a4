package logfile

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// queueSize bounds the lines that wait in a Queue, in bytes: some thousand lines.
const queueSize = 1 << 20

// A Queue stands between a program and a writer that may block for good: a pipe
// that isn't read, a stopped terminal, a file on a disk that hangs. Write only
// notes the line, and a goroutine that exists while lines wait hands them on, one
// by one. Where the writer doesn't keep up, new lines are dropped and counted, and
// a line that says how many stands where they are missing.
//
// An error of the writer loses its line, and is for the writer to tell. The methods
// may be called by several goroutines.
type Queue struct {
	to  io.Writer
	max int

	mu      sync.Mutex
	lines   [][]byte
	size    int           // of lines, in bytes
	dropped int           // lines since the last that was kept
	idle    chan struct{} // closed when nothing waits; nil while nothing does
}

// NewQueue returns an empty queue of at most 1 MiB.
func NewQueue(to io.Writer) *Queue { return &Queue{to: to, max: queueSize} }

// Write notes a line, or drops it. It never waits and never fails.
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
		// It ends when nothing waits. One that is stuck in a write is left behind by the
		// end of the program, which must not wait for it.
		go q.drain()
	}
	return len(line), nil
}

// note says how many lines were dropped, or is nil.
func (q *Queue) note() []byte {
	if q.dropped == 0 {
		return nil
	}
	return fmt.Appendf(nil, "level=WARN msg=\"lines were dropped: the log isn't taken fast enough\" lines=%d\n", q.dropped)
}

func (q *Queue) push(line []byte) {
	q.lines = append(q.lines, line)
	q.size += len(line)
}

// drain writes until nothing waits.
func (q *Queue) drain() {
	for line := q.next(); line != nil; line = q.next() {
		_, _ = q.to.Write(line)
	}
}

// next takes the oldest line, or returns nil and ends the draining.
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

// Flush waits until what was noted is written, at most for limit, and reports
// whether it is.
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
