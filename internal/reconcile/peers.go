package reconcile

import (
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// tunnelPeers returns doc's peers for Tunnel.Sync, in its order. The allowed IPs of all peers
// share one array, because thousands of small ones in each round are a burden to the collector.
func (l *Loop) tunnelPeers(doc *wanted.Document) []tunnel.Peer {
	names, now := l.o.Learned.Names(), l.o.Wall()
	out := make([]tunnel.Peer, len(doc.Peers))
	allowed := make([]netip.Prefix, 0, 2*len(doc.Peers))
	for i := range doc.Peers {
		p := &doc.Peers[i]
		own := p.Addresses.Prefixes()
		allowed = append(allowed, own[:]...)
		out[i] = tunnel.Peer{
			PublicKey:  p.PublicKey,
			AllowedIPs: allowed[2*i : 2*i+2 : 2*i+2],
			Endpoint:   resolveEndpoint(p.Endpoint, names),
			Learned:    l.o.Learned.Endpoint(p.PublicKey, p.Endpoint != "", now),
			Keepalive:  time.Duration(p.Keepalive) * time.Second,
		}
	}
	return out
}

// resolveEndpoint returns the address and port of a configured endpoint, by the resolved names. It
// is zero if there is none or its name isn't resolved: then the peer must connect first.
func resolveEndpoint(text string, names map[string]netip.Addr) netip.AddrPort {
	if text == "" {
		return netip.AddrPort{}
	}
	e, err := mesh.ParseEndpoint(text, 0)
	if err != nil {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddr(e.Host)
	if err != nil {
		a = names[e.Host]
	}
	if !a.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, e.Port)
}

// withoutTakeovers leaves out the peers that take over another peer's address: the ruleset that is
// enforced still gives that address the other peer's permissions.
func (l *Loop) withoutTakeovers(peers []tunnel.Peer) []tunnel.Peer {
	if l.current == nil {
		return peers
	}
	return slices.DeleteFunc(slices.Clone(peers), func(p tunnel.Peer) bool {
		return slices.ContainsFunc(p.AllowedIPs, func(a netip.Prefix) bool {
			i, known := l.current.PeerByAddr(a.Addr())
			return known && a.IsSingleIP() && l.current.Peers()[i].PublicKey != p.PublicKey
		})
	})
}
