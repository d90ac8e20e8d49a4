package reconcile

import (
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// tunnelPeers returns doc's peers as the tunnel takes them.
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
			Endpoint:   endpointOf(p.Endpoint, names),
			Learned:    l.o.Learned.Endpoint(p.PublicKey, p.Endpoint != "", now),
			Keepalive:  time.Duration(p.Keepalive) * time.Second,
		}
	}
	return out
}

// endpointOf returns where to reach an endpoint, or zero where there is none, or its name
// isn't resolved.
func endpointOf(text string, names map[string]netip.Addr) netip.AddrPort {
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

// withoutTakeovers leaves out the peers that take over another's address: what is
// enforced still gives that address the other's permissions.
func (l *Loop) withoutTakeovers(peers []tunnel.Peer) []tunnel.Peer {
	if l.current == nil {
		return peers
	}
	return slices.DeleteFunc(slices.Clone(peers), func(p tunnel.Peer) bool {
		return slices.ContainsFunc(p.AllowedIPs, func(a netip.Prefix) bool {
			i, taken := l.current.PeerByAddr(a.Addr())
			return taken && a.IsSingleIP() && l.current.Peers()[i].PublicKey != p.PublicKey
		})
	})
}
