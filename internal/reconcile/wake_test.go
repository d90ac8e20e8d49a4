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
		check := func(want time.Duration) {
			t.Helper()
			if got := w.slept(time.Now(), time.Now().Add(set)); got != want {
				t.Errorf("slept %v, want %v", got, want)
			}
		}
		check(0) // the first call has nothing to compare with
		for range 720 {
			time.Sleep(5 * time.Second)
			check(0)
		}
		set += 8 * time.Hour
		time.Sleep(5 * time.Second)
		check(8 * time.Hour)
		check(0) // it is reported once
		set += time.Second
		check(0)         // a clock that is put right by a little isn't a sleep
		set -= time.Hour // set back
		check(0)         // is none either,
		time.Sleep(time.Minute)
		check(0)
		set += time.Hour // and a sleep after that counts whole
		check(time.Hour)
	})
}
