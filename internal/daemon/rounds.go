package daemon

import "context"

// EachRound calls f at once, and then after rounds of the loop until ctx ends, with the phase
// that the round ended in: api.Starting, api.Enforcing or api.Closed. Rounds that end while f
// runs count as one. f isn't called while a round hangs, so a service manager's watchdog that
// is fed by f notices that; see reconcile.RoundLimit.
func (d *Daemon) EachRound(ctx context.Context, f func(phase string)) {
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
