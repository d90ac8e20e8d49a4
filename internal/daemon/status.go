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

// Status returns the state of the helper and of all peers. It asks the host nothing: the facts
// are those of the loop's last round, except for the peers' numbers, which are current.
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
		s.Problems = append(s.Problems, apiProblem(p))
	}
	s.Peers = d.peers(doc, c)
	return s
}

// Peer returns the peer with a name, a mesh address or a public key ref.
func (d *Daemon) Peer(ref string) (api.Peer, error) {
	doc := d.wanted.Document()
	i, err := doc.Find(ref)
	if err != nil {
		return api.Peer{}, err
	}
	return d.currentPeer(&doc.Peers[i], d.wanted.Now()), nil
}

// peers returns all peers of doc, in its order. It reads the numbers once for all of them.
func (d *Daemon) peers(doc *wanted.Document, c held.State) []api.Peer {
	now, numbers := d.wanted.Now(), c.Numbers()
	out := make([]api.Peer, len(doc.Peers))
	for i := range doc.Peers {
		out[i] = d.apiPeer(&doc.Peers[i], numbers, now)
	}
	return out
}

// currentPeer returns one peer with its present numbers.
func (d *Daemon) currentPeer(p *mesh.Peer, now time.Time) api.Peer {
	c, _ := d.loop.State()
	return d.apiPeer(p, c.Numbers(), now)
}

// apiProblem returns a problem for an answer. The text may quote other software's names, so
// what a terminal wouldn't print is escaped.
func apiProblem(p host.Problem) api.Problem {
	return api.Problem{Step: p.Step, Message: plain.Text(p.Message), Hint: plain.Text(p.Hint)}
}

// routingFor is how long after its last routed packet a peer counts as routing now. It bridges
// the pauses of a connection that is in use.
const routingFor = 10 * time.Second

// apiPeer returns a peer for an answer: its wanted fields, the endpoint that it was last heard
// from or else the configured one, and its totals over all tunnels and helpers, as far as those
// were saved.
func (d *Daemon) apiPeer(p *mesh.Peer, n held.Numbers, now time.Time) api.Peer {
	s, g := n.Tunnel[p.PublicKey], n.Guard[p.PublicKey]
	t := d.learned.Totals(p.PublicKey, n.Totals(p.PublicKey))
	out := api.Peer{
		Name: p.Name, PublicKey: p.PublicKey.String(), Kind: p.Kind, Addresses: p.Addresses[:],
		Permissions: permissionsOf(p, now), Tunnel: wanted.Sends(p, now), Endpoint: p.Endpoint,
		RxBytes: t.Rx, TxBytes: t.Tx,
		Routing: api.Routing{
			Now:     !g.Routed.Last.IsZero() && time.Since(g.Routed.Last) < routingFor,
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

// permissionsOf returns a peer's permissions at now: one that has ended counts as not granted,
// even before the loop removes it. Effective is false for one that needs another permission
// which the peer doesn't have, such as lan without routing.
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
