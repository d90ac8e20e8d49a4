package reconcile

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// observed is what readTunnel saw in the round before, to find what changed since.
type observed struct {
	clocks     sleepWatch
	handshakes map[mesh.PublicKey]time.Time       // the last of each peer
	refused    map[mesh.PublicKey]refusals        // as last recorded
	guard      map[mesh.PublicKey]guard.PeerStats // the last that could be read
}

// refusals are the numbers of a peer's refused packets in the last event about them.
type refusals struct {
	counts   api.Refused
	recorded time.Time // with its monotonic part
}

// readTunnel reads the tunnel and the guard at the end of a round, and finds what no event
// reports: that the host slept, that the UDP port isn't served, that peers connected, and that
// packets of theirs were refused.
func (l *Loop) readTunnel() {
	now := time.Now()
	slept := l.seen.clocks.slept(now, l.o.Wall())
	l.counted = held.Numbers{}
	if l.tunnel == nil {
		return
	}
	if slept > 0 {
		l.o.Logger.Info("woke from sleep, or the clock was set", "by", slept)
		l.requestRebind()
	}
	if err := l.tunnel.Listening(); err != nil {
		l.addProblem(host.AtStep(stepTunnel, err))
	}
	n, err := (&held.State{Tunnel: l.tunnel, Guard: l.guard}).ReadNumbers()
	if err != nil {
		l.addProblem(host.AtStep(stepTunnel, err))
		return
	}
	l.seen.guard, l.counted = n.Guard, n
	l.noteLearned(n)
	peers := l.o.Wanted.Document().Peers
	l.recordHandshakes(peers, n)
	l.recordRefused(peers, n, now)
}

// noteLearned stores the peers' endpoints, handshakes and totals in what was learned, which
// outlasts the tunnel and the helper.
func (l *Loop) noteLearned(n held.Numbers) {
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

// sessionLimit is how long after a handshake a session lasts (REJECT_AFTER_TIME, WireGuard
// whitepaper 6.1). Until then a handshake renews the session, which happens every two minutes
// (REKEY_AFTER_TIME).
const sessionLimit = 3 * time.Minute

// recordHandshakes records an event for each peer that connected since the round before: with a
// handshake that doesn't just renew a session.
func (l *Loop) recordHandshakes(peers []mesh.Peer, n held.Numbers) {
	next := make(map[mesh.PublicKey]time.Time, len(peers))
	for i := range peers {
		p := &peers[i]
		last := n.Tunnel[p.PublicKey].LastHandshake
		if last.IsZero() {
			continue
		}
		next[p.PublicKey] = last
		if before, ok := l.seen.handshakes[p.PublicKey]; ok && last.Sub(before) < sessionLimit {
			continue
		}
		l.o.Record(events.Event{
			Kind: events.Handshake, Peer: p.Name,
			Message: fmt.Sprintf("%s connected from %v", p.Name, n.Tunnel[p.PublicKey].Endpoint),
		})
	}
	l.seen.handshakes = next
}

// example returns a clause with the destination of a refused packet, or "" if none is known.
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

// refusedInterval is the shortest time between two events about a peer's refused packets, which
// the peer could otherwise use to push all others out of the journal.
const refusedInterval = time.Minute

// recordRefused records an event for each peer of which more packets were refused than the last
// event about it says.
func (l *Loop) recordRefused(peers []mesh.Peer, n held.Numbers, now time.Time) {
	next := make(map[mesh.PublicKey]refusals, len(peers))
	for i := range peers {
		p := &peers[i]
		was := l.seen.refused[p.PublicKey]
		counts := api.Refused(n.Totals(p.PublicKey).Refused)
		if counts != was.counts && (was.recorded.IsZero() || now.Sub(was.recorded) >= refusedInterval) {
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
