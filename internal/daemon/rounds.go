package daemon

import "context"

// EachRound calls f with the helper's state after rounds of the loop, from the one that
// is known on, until ctx ends. Rounds that follow each other fast may be one to it. While
// a round hangs f isn't called, so that a watchdog that depends on it hears of it.
func (d *Daemon) EachRound(ctx context.Context, f func(state string)) {
	for {
		s, newer := d.loop.State()
		f(s.Phase)
		select {
		case <-ctx.Done():
			return
		case <-newer:
		}
	}
}
