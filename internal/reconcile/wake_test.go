package reconcile

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestSleepWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w sleepWatch
		var set time.Duration // by which the wall clock is ahead
		look := func(want time.Duration) {
			t.Helper()
			if got := w.slept(time.Now(), time.Now().Add(set)); got != want {
				t.Errorf("slept %v, want %v", got, want)
			}
		}
		look(0) // the first look has nothing to compare with
		for range 720 {
			time.Sleep(5 * time.Second)
			look(0)
		}
		set += 8 * time.Hour
		time.Sleep(5 * time.Second)
		look(8 * time.Hour)
		look(0) // it is told once
		set += time.Second
		look(0)          // a clock that is put right by a little isn't a sleep
		set -= time.Hour // set back
		look(0)          // is none either,
		time.Sleep(time.Minute)
		look(0)
		set += time.Hour // and a sleep after that counts whole
		look(time.Hour)
	})
}
