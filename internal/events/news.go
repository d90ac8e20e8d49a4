package events

import (
	"maps"
	"time"
)

// News tells what is worth an event from what an event told of already. A problem that
// comes and goes from round to round is one problem: it is news again when it wasn't found
// for [newsFor]. It isn't safe for several goroutines.
type News[K comparable] struct {
	last map[K]time.Time // when each was last found
}

// What News remembers.
const (
	newsFor = 10 * time.Minute
	// maxNews bounds the memory for problems whose text changes each time. Beyond it
	// nothing is news until something is forgotten; the status has it nevertheless.
	maxNews = 256
)

// Is reports whether k, which was found now, is news.
func (n *News[K]) Is(k K) bool {
	now := time.Now()
	last, known := n.last[k]
	if !known && len(n.last) >= maxNews {
		maps.DeleteFunc(n.last, func(_ K, at time.Time) bool { return now.Sub(at) >= newsFor })
		if len(n.last) >= maxNews {
			return false
		}
	}
	if n.last == nil {
		n.last = map[K]time.Time{}
	}
	n.last[k] = now
	return !known || now.Sub(last) >= newsFor
}
