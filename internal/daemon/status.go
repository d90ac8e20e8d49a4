package daemon

import (
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/plain"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Status returns what holds now.
func (d *Daemon) Status() api.Status {
	c, _ := d.loop.State()
	doc := d.wanted.Document()
	s := api.Status{
		Version: d.opts.Version, Name: d.wanted.Settings().Name, Platform: d.opts.Host.Name,
		Interface: c.Interface, PublicKey: d.id.Key.String(), ListenPort: c.ListenPort,
		Addresses:    d.id.Own.List(),
		MeshPrefixes: d.id.List(),
		Generation:   doc.Generation, Enforced: c.Enforced, State: c.Phase,
		Uplink: c.Host.Uplink4, Forwarding: api.Families(c.Forwarding), Repairs: c.Repairs,
		Problems: []api.Problem{},
	}
	if e, _ := d.endpoint(c); e.Host != "" && e.Port != 0 {
		s.Endpoint = e.String()
	}
	if s.Uplink == "" {
		s.Uplink = c.Host.Uplink6
	}
	for _, p := range d.explain.Problems(c) {
		s.Problems = append(s.Problems, shown(p))
	}
	s.Peers = d.views(doc, c)
	return s
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
func (d *Daemon) views(doc *wanted.Document, c held.State) []api.Peer {
	now, numbers := d.wanted.Now(), c.Numbers()
	out := make([]api.Peer, len(doc.Peers))
	for i := range doc.Peers {
		out[i] = d.viewOf(&doc.Peers[i], numbers, now)
	}
	return out
}

// view returns one peer with its numbers.
func (d *Daemon) view(p *mesh.Peer, now time.Time) api.Peer {
	c, _ := d.loop.State()
	return d.viewOf(p, c.Numbers(), now)
}

// shown is a problem as the socket shows it.
func shown(p host.Problem) api.Problem {
	return api.Problem{Step: p.Step, Message: plain.Text(p.Message), Hint: plain.Text(p.Hint)}
}

// routesFor is how long after its last packet a peer still routes now.
const routesFor = 10 * time.Second

// viewOf returns a peer as the socket shows it: what is wanted of it, where it was heard, and
// its totals of all helpers' time.
func (d *Daemon) viewOf(p *mesh.Peer, n held.Numbers, now time.Time) api.Peer {
	s, g := n.Tunnel[p.PublicKey], n.Guard[p.PublicKey]
	t := d.learned.Totals(p.PublicKey, n.Totals(p.PublicKey))
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
