package reconcile

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/learned"
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

// readTunnel finds what no event reports: that the host slept, that the UDP port isn't
// served, and that peers connected.
func (l *Loop) readTunnel() {
	now := time.Now()
	slept := l.seen.clocks.slept(now, l.o.Wall())
	l.counted = held.Numbers{}
	if l.tunnel == nil {
		return
	}
	if slept > 0 {
		l.o.Logger.Info("woke from sleep, or the clock was set", "by", slept)
		l.wakePeers()
	}
	if err := l.tunnel.Listening(); err != nil {
		l.addProblem(err)
	}
	n, err := (&held.State{Tunnel: l.tunnel, Guard: l.guard}).ReadNumbers()
	if err != nil {
		l.addProblem(err)
		return
	}
	l.seen.guard, l.counted = n.Guard, n
	l.note(n)
	peers := l.o.Wanted.Document().Peers
	l.recordHandshakes(peers, n)
	l.tellRefused(peers, n, now)
}

// note notes where peers were heard, and what was counted of them.
func (l *Loop) note(n held.Numbers) {
	doc := l.o.Wanted.Document()
	keys := make([]mesh.PublicKey, len(doc.Peers))
	for i := range doc.Peers {
		keys[i] = doc.Peers[i].PublicKey
	}
	l.o.Learned.Note(keys, func(key mesh.PublicKey) learned.Peer {
		t := n.Tunnel[key]
		return learned.Peer{Endpoint: t.Endpoint, Seen: t.LastHandshake, Totals: n.Totals(key)}
	})
}

// recordHandshakes records the handshakes since the last look: those of peers that weren't
// heard for a while, not the ones that renew a session every two minutes
// (REJECT_AFTER_TIME, whitepaper 6.1).
func (l *Loop) recordHandshakes(peers []mesh.Peer, n held.Numbers) {
	const session = 3 * time.Minute
	next := make(map[mesh.PublicKey]time.Time, len(peers))
	for i := range peers {
		p := &peers[i]
		last := n.Tunnel[p.PublicKey].LastHandshake
		if last.IsZero() {
			continue
		}
		next[p.PublicKey] = last
		if before, ok := l.seen.handshakes[p.PublicKey]; ok && last.Sub(before) < session {
			continue
		}
		l.o.Record(events.Event{
			Kind: events.Handshake, Peer: p.Name,
			Message: fmt.Sprintf("%s connected from %v", p.Name, n.Tunnel[p.PublicKey].Endpoint),
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
func (l *Loop) tellRefused(peers []mesh.Peer, n held.Numbers, now time.Time) {
	next := make(map[mesh.PublicKey]refusals, len(peers))
	for i := range peers {
		p := &peers[i]
		was := l.seen.refused[p.PublicKey]
		counts := api.Refused(n.Totals(p.PublicKey).Refused)
		if counts != was.counts && (was.told.IsZero() || now.Sub(was.told) >= refusedInterval) {
			l.o.Record(events.Event{
				Kind: events.Refused, Peer: p.Name,
				Message: fmt.Sprintf("refused of %s so far: %v%s", p.Name, counts,
					example(n.Guard[p.PublicKey].Example)),
			})
			was = refusals{counts, now}
		}
		next[p.PublicKey] = was
	}
	l.seen.refused = next
}
