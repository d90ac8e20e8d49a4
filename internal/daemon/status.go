package daemon

import (
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// Status returns what holds now.
func (d *Daemon) Status() api.Status {
	c, _ := d.condition()
	doc := d.wanted.Load()
	s := api.Status{
		Version: d.opts.Version, Platform: d.opts.PlatformName,
		Interface: c.iface, PublicKey: d.mesh.key.String(), ListenPort: c.listenPort,
		Addresses:    d.mesh.own.List(),
		MeshPrefixes: []netip.Prefix{d.mesh.prefixes.V4, d.mesh.prefixes.V6},
		Generation:   doc.Generation, Enforced: c.enforced, State: c.state,
		Uplink: c.host.Uplink4, Forwarding: c.forwarding, Repairs: c.repairs,
		Problems: []api.Problem{},
	}
	if s.Uplink == "" {
		s.Uplink = c.host.Uplink6
	}
	for _, p := range slices.Concat(c.problems, c.foreign) {
		s.Problems = append(s.Problems, api.Problem(p))
	}
	s.Peers = d.views(doc, c)
	return s
}

// Peer returns the peer that ref names.
func (d *Daemon) Peer(ref string) (api.Peer, error) {
	doc := d.wanted.Load()
	i, err := doc.find(ref)
	if err != nil {
		return api.Peer{}, err
	}
	return d.view(&doc.Peers[i], d.clock.now()), nil
}

// views returns all peers of doc.
func (d *Daemon) views(doc *document, c condition) []api.Peer {
	now := d.clock.now()
	stats := statsOf(c.tunnel)
	out := make([]api.Peer, len(doc.Peers))
	for i := range doc.Peers {
		out[i] = viewOf(&doc.Peers[i], stats[doc.Peers[i].PublicKey], now)
	}
	return out
}

// view returns one peer with its numbers.
func (d *Daemon) view(p *peer, now time.Time) api.Peer {
	c, _ := d.condition()
	return viewOf(p, statsOf(c.tunnel)[p.PublicKey], now)
}

// statsOf returns the tunnel's numbers, and none where they can't be read: the
// loop says so in the problems.
func statsOf(t Tunnel) map[wireguard.PublicKey]wireguard.PeerStats {
	if t == nil {
		return nil
	}
	stats, err := t.Stats()
	if err != nil {
		return nil
	}
	return stats
}

func viewOf(p *peer, s wireguard.PeerStats, now time.Time) api.Peer {
	out := api.Peer{
		Name: p.Name, PublicKey: p.PublicKey.String(), Kind: p.Kind, Addresses: p.Addresses[:],
		Permissions: permissionsOf(p, now), Endpoint: p.Endpoint,
		RxBytes: s.RxBytes, TxBytes: s.TxBytes,
		Refused: api.Refused{Spoofed: s.Spoofed},
	}
	if s.Endpoint.IsValid() {
		out.Endpoint = s.Endpoint.String()
	}
	if !s.LastHandshake.IsZero() {
		at := s.LastHandshake.UTC().Round(0)
		out.LastHandshake = &at
	}
	return out
}

// permissionsOf shows the grants as of now: one that has ended is none.
func permissionsOf(p *peer, now time.Time) api.Permissions {
	show := func(one policy.Permissions) api.Permission {
		g := *p.Permissions.of(one)
		if !policy.Grant(g).In(now) {
			return api.Permission{}
		}
		return api.Permission{Allowed: true, Until: g.Until}
	}
	out := api.Permissions{Incoming: show(policy.Incoming), Routing: show(policy.Routing), LAN: show(policy.LAN)}
	if out.LAN.Allowed && !out.Routing.Allowed {
		out.LAN.Effective = new(bool)
	}
	return out
}
