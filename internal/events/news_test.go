package events

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestNews has problems come and go: each is news once, and again when it was away for
// long. What is remembered stays bounded.
func TestNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n News[string]
		for range 100 {
			if first := n.last == nil; n.Is("closed") != first {
				t.Error("what comes and goes is told again, or not at first")
			}
			time.Sleep(newsFor / 2)
		}
		if time.Sleep(newsFor); !n.Is("closed") {
			t.Error("what was away for long is no news")
		}
		told := 0
		for i := range 10 * maxNews {
			if n.Is(string(rune(i))) {
				told++
			}
		}
		if told != maxNews-1 || len(n.last) != maxNews {
			t.Errorf("%d told and %d remembered, of at most %d", told, len(n.last), maxNews)
		}
		if time.Sleep(newsFor); !n.Is("another") || len(n.last) != 1 {
			t.Errorf("%d remembered after a long time", len(n.last))
		}
	})
}
