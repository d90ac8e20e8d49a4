package daemon

import (
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// sighting is what the loop saw at its last look at the clocks and the tunnel.
type sighting struct {
	at         time.Time // with its monotonic part
	wall       time.Time
	handshakes map[wireguard.PublicKey]time.Time
}

// look finds what nobody reports: that the host slept, and that peers came.
func (l *loop) look() {
	now, wall := time.Now(), l.d.opts.Wall().Round(0)
	if !l.seen.at.IsZero() && l.tunnel != nil {
		if slept := wall.Sub(l.seen.wall) - now.Sub(l.seen.at); slept > jump {
			l.d.opts.Logger.Info("woke from sleep, or the clock was set", "by", slept)
			l.wakePeers()
		}
	}
	l.seen.at, l.seen.wall = now, wall
	l.greet()
}

// greet records the handshakes since the last look: those of peers that weren't
// heard for a while, not the ones that renew a session every two minutes
// (REJECT_AFTER_TIME, whitepaper 6.1).
func (l *loop) greet() {
	if l.tunnel == nil {
		return
	}
	stats, err := l.tunnel.Stats()
	if err != nil {
		l.addProblem(err)
		return
	}
	const session = 3 * time.Minute
	next := make(map[wireguard.PublicKey]time.Time, len(stats))
	for _, p := range l.d.wanted.Load().Peers {
		last := stats[p.PublicKey].LastHandshake
		if last.IsZero() {
			continue
		}
		next[p.PublicKey] = last
		if before, ok := l.seen.handshakes[p.PublicKey]; ok && last.Sub(before) < session {
			continue
		}
		l.d.journal.Record(api.Event{
			Kind: api.EventHandshake, Peer: p.Name,
			Message: fmt.Sprintf("%s connected from %v", p.Name, stats[p.PublicKey].Endpoint),
		})
	}
	l.seen.handshakes = next
}
