package events

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestNews reports problems that come and go: each is news at first, and again after an absence
// of newsFor. The number of remembered problems is bounded.
func TestNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n News[string]
		for range 100 {
			if first := n.last == nil; n.Is("closed") != first {
				t.Error("a problem that comes and goes is news again, or isn't news at first")
			}
			time.Sleep(newsFor / 2)
		}
		if time.Sleep(newsFor); !n.Is("closed") {
			t.Error("a problem that was absent for newsFor isn't news")
		}
		told := 0
		for i := range 10 * maxNews {
			if n.Is(string(rune(i))) {
				told++
			}
		}
		if told != maxNews-1 || len(n.last) != maxNews {
			t.Errorf("%d were news and %d are remembered, of at most %d", told, len(n.last), maxNews)
		}
		if time.Sleep(newsFor); !n.Is("another") || len(n.last) != 1 {
			t.Errorf("%d remembered after newsFor, want only the newest", len(n.last))
		}
	})
}
