package daemon

import (
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
)

// maxEvents is how many events are remembered.
const maxEvents = 1024

// journal is a ring of the last events. Readers take from it at their own pace;
// one that is too slow misses some, and doesn't slow down the others.
type journal struct {
	wall func() time.Time

	mu     sync.Mutex
	last   uint64 // the newest event's Seq
	ring   [maxEvents]api.Event
	newer  chan struct{}
	listen func(api.Event) // logs, and never blocks: see Options.Logger
}

func newJournal(wall func() time.Time, listen func(api.Event)) *journal {
	return &journal{wall: wall, newer: make(chan struct{}), listen: listen}
}

// Record adds an event and wakes the readers that wait for one. The log hears of it
// when the lock is free again: readers of the status, too, may need that.
func (j *journal) Record(e api.Event) {
	j.listen(j.add(e))
}

func (j *journal) add(e api.Event) api.Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last++
	e.Seq, e.Time = j.last, j.wall().UTC().Round(0)
	j.ring[j.last%maxEvents] = e
	close(j.newer)
	j.newer = make(chan struct{})
	return e
}

// Since returns the remembered events after seq.
func (j *journal) Since(seq uint64) ([]api.Event, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last > maxEvents {
		seq = max(seq, j.last-maxEvents)
	}
	var out []api.Event
	for n := seq + 1; n <= j.last; n++ {
		out = append(out, j.ring[n%maxEvents])
	}
	return out, j.newer
}
