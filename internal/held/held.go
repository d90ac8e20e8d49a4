// Package held has what a host was found to enforce, as a value that is published after
// each round and never changed afterwards.
//
// It is the third of the helper's three states. What is wanted belongs to the people who
// asked for it (package wanted), what was learned to the network (package learned), and
// what is held to the host: the loop of package reconcile alone writes it, from what the
// host was told and from what was read back of it. The helper's answers (package explain
// and the status) are made of a [State], so that no question waits for a look at the host.
package held

import (
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// State is what holds after a round. Its zero value is that of a helper that hasn't looked
// at the host yet, but for the phase.
type State struct {
	// Phase is api.Starting, api.Enforcing or api.Closed.
	Phase string
	// Enforced is the generation of the wanted state that is in force, or 0.
	Enforced uint64

	// Interface is the name of the mesh interface, such as "utun4", or "" before there
	// is one.
	Interface string
	// ListenPort is WireGuard's UDP port, or 0 while it isn't known.
	ListenPort uint16
	// Host is what was seen at the last look at the host.
	Host policy.Host

	// Ruleset is the wanted policy on this host, also where it isn't in force. It is nil
	// before the first look at the host.
	Ruleset *policy.Ruleset
	// Loaded is the ruleset that the host was last told to enforce: Ruleset, or one
	// without any permission. It is nil before the host was told anything.
	Loaded *policy.Ruleset
	// Read is Loaded once the host was found to hold it, and nil while it isn't known to.
	Read *policy.Ruleset
	// Render writes a ruleset as the host loaded Loaded. It is nil where the host can't
	// show its rules, or has none loaded.
	Render func(*policy.Ruleset) (anchor, text string, err error)
	// Forwarding says for which families the host forwards.
	Forwarding policy.Families
	// Repairs counts how often something was put right that other software had changed.
	Repairs uint64

	// Problems keep the wanted policy from being in force. The first is the cause.
	Problems []host.Problem
	// Foreign are problems that the host told of besides, such as forwarding that other
	// software switched on.
	Foreign []host.Problem
	// Unexamined is [host.Report.Unexamined] of the last report.
	Unexamined map[host.ProblemKind]string

	// Tunnel and Guard are nil before there is a mesh interface.
	Tunnel Tunnel
	Guard  *guard.Device
	// Counted are the numbers that the loop read in this round. A peer's numbers of the
	// moment are in Numbers.
	Counted Numbers
	// Limits are those of the host's packet filter when the guard was made.
	Limits host.Limits
}

// Tunnel is what can be asked of the WireGuard device at any time.
type Tunnel interface {
	// Stats returns what the device counted, by peer. It is empty once the device is closed.
	Stats() (map[mesh.PublicKey]tunnel.PeerStats, error)
	// Listening returns why the UDP port isn't served, and nil while it is.
	Listening() error
}

// Numbers are what tunnel and guard counted, by peer.
type Numbers struct {
	Tunnel map[mesh.PublicKey]tunnel.PeerStats
	Guard  map[mesh.PublicKey]guard.PeerStats
}

// ReadNumbers returns the numbers as of now, not as of the state. They are empty while
// there is no tunnel. With an error, the guard's are there alone.
func (s *State) ReadNumbers() (n Numbers, err error) {
	if s.Tunnel == nil {
		return n, nil
	}
	n.Guard = s.Guard.Stats()
	n.Tunnel, err = s.Tunnel.Stats()
	return n, err
}

// Numbers returns what ReadNumbers can tell. The loop, which reads them each round, says
// in the problems where it can't.
func (s *State) Numbers() Numbers {
	n, _ := s.ReadNumbers()
	return n
}

// Totals returns what was counted of a peer since the tunnel was made.
func (n Numbers) Totals(peer mesh.PublicKey) learned.Totals {
	t, g := n.Tunnel[peer], n.Guard[peer]
	return learned.Totals{
		Rx: t.RxBytes, Tx: t.TxBytes, RoutedRx: g.Routed.RxBytes, RoutedTx: g.Routed.TxBytes,
		Refused: learned.Refused{
			Martian: g.Refused[policy.Martian], Self: g.Refused[policy.Self], Mesh: g.Refused[policy.InMesh],
			LAN: g.Refused[policy.OnLAN], Internet: g.Refused[policy.Internet],
			// A packet whose source isn't the peer's dies in the tunnel, before the guard.
			Spoofed: g.Refused[policy.Spoofed] + t.Spoofed,
		},
	}
}
