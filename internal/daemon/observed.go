package daemon

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// observed is what the loop saw at its last look at the clocks and the tunnel.
type observed struct {
	clocks     sleepWatch
	handshakes map[mesh.PublicKey]time.Time
	refused    map[mesh.PublicKey]refusals
	guard      map[mesh.PublicKey]guard.PeerStats
}

// refusals are a peer's refused packets as last told.
type refusals struct {
	counts api.Refused
	told   time.Time // with its monotonic part
}

// look finds what no event reports: that the host slept, and that peers connected.
func (l *loop) look() {
	now := time.Now()
	slept := l.seen.clocks.slept(now, l.d.opts.Wall())
	if l.tunnel == nil {
		return
	}
	if slept > 0 {
		l.d.opts.Logger.Info("woke from sleep, or the clock was set", "by", slept)
		l.wakePeers()
	}
	if err := l.tunnel.Listening(); err != nil {
		l.addProblem(err)
	}
	n, err := readNumbers(condition{tunnel: l.tunnel, guard: l.guard})
	if err != nil {
		l.addProblem(err)
		return
	}
	l.seen.guard = n.guard
	l.d.note(n)
	peers := l.d.wanted.Document().Peers
	l.lookAtPrefixes(peers, n)
	l.recordHandshakes(peers, n)
	l.tellRefused(peers, n, now)
}

// recordHandshakes records the handshakes since the last look: those of peers that weren't
// heard for a while, not the ones that renew a session every two minutes
// (REJECT_AFTER_TIME, whitepaper 6.1).
func (l *loop) recordHandshakes(peers []mesh.Peer, n numbers) {
	const session = 3 * time.Minute
	next := make(map[mesh.PublicKey]time.Time, len(peers))
	for i := range peers {
		p := &peers[i]
		last := n.tunnel[p.PublicKey].LastHandshake
		if last.IsZero() {
			continue
		}
		next[p.PublicKey] = last
		if before, ok := l.seen.handshakes[p.PublicKey]; ok && last.Sub(before) < session {
			continue
		}
		l.d.journal.Record(events.Event{
			Kind: events.Handshake, Peer: p.Name,
			Message: fmt.Sprintf("%s connected from %v", p.Name, n.tunnel[p.PublicKey].Endpoint),
		})
	}
	l.seen.handshakes = next
}

// example says where a refused packet was to go.
func example(r guard.Refused) string {
	if !r.To.IsValid() {
		return ""
	}
	proto, known := map[uint8]string{policy.ProtoTCP: "tcp", policy.ProtoUDP: "udp", policy.ProtoICMP: "icmp", policy.ProtoICMPv6: "icmp"}[r.Proto]
	if !known {
		proto = fmt.Sprintf("protocol %d", r.Proto)
	}
	if r.Port == 0 {
		return fmt.Sprintf("; lately %s to %v", proto, r.To)
	}
	return fmt.Sprintf("; lately %s to %v", proto, netip.AddrPortFrom(r.To, r.Port))
}

// refusedInterval is how often a peer's refusals are worth an event: a peer can
// have any number of packets refused.
const refusedInterval = time.Minute

// tellRefused records what was refused since it was last told.
func (l *loop) tellRefused(peers []mesh.Peer, n numbers, now time.Time) {
	next := make(map[mesh.PublicKey]refusals, len(peers))
	for i := range peers {
		p := &peers[i]
		was := l.seen.refused[p.PublicKey]
		counts := refusedOf(n.tunnel[p.PublicKey], n.guard[p.PublicKey])
		if counts != was.counts && (was.told.IsZero() || now.Sub(was.told) >= refusedInterval) {
			l.d.journal.Record(events.Event{
				Kind: events.Refused, Peer: p.Name,
				Message: fmt.Sprintf("refused of %s so far: %v%s", p.Name, counts,
					example(n.guard[p.PublicKey].Example)),
			})
			was = refusals{counts, now}
		}
		next[p.PublicKey] = was
	}
	l.seen.refused = next
}
