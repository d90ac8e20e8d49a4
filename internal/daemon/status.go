package daemon

import (
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/plain"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Status returns what holds now.
func (d *Daemon) Status() api.Status {
	c, _ := d.condition()
	doc := d.wanted.Document()
	s := api.Status{
		Version: d.opts.Version, Name: d.wanted.Settings().Name, Platform: d.opts.Host.Name,
		Interface: c.iface, PublicKey: d.id.Key.String(), ListenPort: c.listenPort,
		Addresses:    d.id.Own.List(),
		MeshPrefixes: d.id.List(),
		Generation:   doc.Generation, Enforced: c.enforced, State: c.state,
		Uplink: c.host.Uplink4, Forwarding: api.Families(c.forwarding), Repairs: c.repairs,
		Problems: []api.Problem{},
	}
	if e, _ := d.endpoint(c); e.Host != "" && e.Port != 0 {
		s.Endpoint = e.String()
	}
	if s.Uplink == "" {
		s.Uplink = c.host.Uplink6
	}
	found := d.problems(c)
	for _, p := range append(found, d.more(c, found)...) {
		s.Problems = append(s.Problems, shown(p))
	}
	s.Peers = d.views(doc, c)
	return s
}

// problems returns what was found wrong: what keeps the policy from being in force first.
func (d *Daemon) problems(c condition) []host.Problem {
	out := slices.Clone(c.problems)
	if p, bad := d.wanted.Problem(); bad {
		out = append(out, host.Problem{Step: p.Step, Message: p.Message, Hint: p.Hint})
	}
	return slices.Concat(out, c.foreign, d.obstacles())
}

// Peer returns the peer that ref names.
func (d *Daemon) Peer(ref string) (api.Peer, error) {
	doc := d.wanted.Document()
	i, err := doc.Find(ref)
	if err != nil {
		return api.Peer{}, err
	}
	return d.view(&doc.Peers[i], d.wanted.Now()), nil
}

// views returns all peers of doc.
func (d *Daemon) views(doc *wanted.Document, c condition) []api.Peer {
	now, numbers := d.wanted.Now(), c.numbers()
	out := make([]api.Peer, len(doc.Peers))
	for i := range doc.Peers {
		out[i] = d.viewOf(&doc.Peers[i], numbers, now)
	}
	return out
}

// view returns one peer with its numbers.
func (d *Daemon) view(p *mesh.Peer, now time.Time) api.Peer {
	c, _ := d.condition()
	return d.viewOf(p, c.numbers(), now)
}

// numbers are what tunnel and guard counted, by peer.
type numbers struct {
	tunnel map[mesh.PublicKey]tunnel.PeerStats
	guard  map[mesh.PublicKey]guard.PeerStats
}

// shown is a problem as the socket shows it.
func shown(p host.Problem) api.Problem {
	return api.Problem{Step: p.Step, Message: plain.Text(p.Message), Hint: plain.Text(p.Hint)}
}

// readNumbers returns nothing of a tunnel that is closed, and with an error nothing of
// one that can't be read.
func readNumbers(c condition) (n numbers, err error) {
	if c.tunnel == nil {
		return n, nil
	}
	n.guard = c.guard.Stats()
	n.tunnel, err = c.tunnel.Stats()
	return n, err
}

// numbers returns what readNumbers can tell; the loop says in the problems where it can't.
func (c condition) numbers() numbers {
	n, _ := readNumbers(c)
	return n
}

// routesFor is how long after its last packet a peer still routes now.
const routesFor = 10 * time.Second

func (d *Daemon) viewOf(p *mesh.Peer, n numbers, now time.Time) api.Peer {
	s, g := n.tunnel[p.PublicKey], n.guard[p.PublicKey]
	t := d.learned.Totals(p.PublicKey, countedOf(s, g))
	out := api.Peer{
		Name: p.Name, PublicKey: p.PublicKey.String(), Kind: p.Kind, Addresses: p.Addresses[:],
		Permissions: permissionsOf(p, now), Tunnel: wanted.Sends(p, now), Endpoint: p.Endpoint,
		RxBytes: t.Rx, TxBytes: t.Tx,
		Routing: api.Routing{
			Now:     !g.Routed.Last.IsZero() && time.Since(g.Routed.Last) < routesFor,
			RxBytes: t.RoutedRx, TxBytes: t.RoutedTx,
		},
		Refused: api.Refused(t.Refused),
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

// refusedOf adds what died in the tunnel, whose source wasn't the peer's, to
// what the guard refused.
func refusedOf(s tunnel.PeerStats, g guard.PeerStats) api.Refused {
	return api.Refused{
		Martian: g.Refused[policy.Martian], Self: g.Refused[policy.Self], Mesh: g.Refused[policy.InMesh],
		LAN: g.Refused[policy.OnLAN], Internet: g.Refused[policy.Internet],
		Spoofed: g.Refused[policy.Spoofed] + s.Spoofed,
	}
}

// permissionsOf shows the grants as of now: one that has ended is none.
func permissionsOf(p *mesh.Peer, now time.Time) (out api.Permissions) {
	have := p.Permissions.At(now)
	for i, one := range mesh.AllPermissions {
		if !have.Has(one.Set) {
			continue
		}
		out[i] = api.Permission{Allowed: true, Until: p.Permissions[i].Until}
		if !have.Has(one.Needs) {
			out[i].Effective = new(bool)
		}
	}
	return out
}
