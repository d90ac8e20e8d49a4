package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// maxLines is how many lines of the log wait at most for one that is being written.
const maxLines = 1024

// logQueue is a slog.Handler that hands its records to another one in a goroutine of
// its own: a log that can't be written, because the disk or the reader of stderr is
// stuck, holds nothing up. What doesn't fit is dropped, and counted.
type logQueue struct {
	to    slog.Handler
	lines *lines
}

// lines are what handlers that were made from one another have in common.
type lines struct {
	root slog.Handler

	mu      sync.Mutex
	waiting []line
	dropped int
	running bool
	idle    chan struct{} // closed when nothing waits; nil while nothing does
}

type line struct {
	to     slog.Handler
	record slog.Record
}

func newLogQueue(to slog.Handler) *logQueue {
	return &logQueue{to: to, lines: &lines{root: to}}
}

// Enabled implements slog.Handler.
func (q *logQueue) Enabled(ctx context.Context, level slog.Level) bool {
	return q.to.Enabled(ctx, level)
}

// Handle implements slog.Handler. It never blocks.
func (q *logQueue) Handle(_ context.Context, r slog.Record) error {
	l := q.lines
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) >= maxLines {
		l.dropped++
		return nil
	}
	l.waiting = append(l.waiting, line{q.to, r.Clone()})
	if !l.running {
		l.running, l.idle = true, make(chan struct{})
		go l.write()
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (q *logQueue) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logQueue{q.to.WithAttrs(attrs), q.lines}
}

// WithGroup implements slog.Handler.
func (q *logQueue) WithGroup(name string) slog.Handler {
	return &logQueue{q.to.WithGroup(name), q.lines}
}

// write writes what waits, until nothing does.
func (l *lines) write() {
	for {
		l.mu.Lock()
		now, dropped := l.waiting, l.dropped
		l.waiting, l.dropped = nil, 0
		if len(now) == 0 && dropped == 0 {
			l.running = false
			close(l.idle)
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		for _, one := range now {
			_ = one.to.Handle(context.Background(), one.record) // there is no other log to say so in
		}
		if dropped > 0 {
			r := slog.NewRecord(time.Now(), slog.LevelWarn, fmt.Sprintf("%d lines of the log were dropped: it wasn't written fast enough", dropped), 0)
			_ = l.root.Handle(context.Background(), r)
		}
	}
}

// flush waits until everything was written, for at most the limit.
func (q *logQueue) flush(limit time.Duration) {
	q.lines.mu.Lock()
	idle := q.lines.idle
	q.lines.mu.Unlock()
	if idle == nil {
		return
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	}
}
