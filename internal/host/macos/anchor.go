package macos

import (
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// DefaultLabel is the default name of the service, and the last component of its
// anchor's path.
const DefaultLabel = "org.meshhelper"

// anchorParent is the ruleset whose direct children the main ruleset evaluates:
// /etc/pf.conf has anchor, nat-anchor, rdr-anchor and scrub-anchor "com.apple/*".
// An anchor that no rule calls loads without an error and has no effect, so a
// top-level anchor of our own would need an edit of the main ruleset.
const anchorParent = "com.apple/"

// AnchorOptions holds what the anchor depends on besides the policy.
type AnchorOptions struct {
	// Label names the service: a reverse domain name of at most 63 bytes.
	Label string // optional; DefaultLabel
	// Interface overrides the mesh interface that the ruleset was compiled for.
	Interface string // optional
	// MTU is the mesh interface's, in bytes: 1280 (the minimum of IPv6, RFC 8200 5)
	// to 65535.
	MTU int // optional; DefaultMTU
	// Cut lists addresses of peers that recently lost access to this host. Without
	// them this host's next segment of a connection that was cut would match the rule
	// for the host's own flows, and revive the connection in the other direction.
	Cut []netip.Addr // optional
	// PastEgress lists interfaces by which peers' packets could leave earlier. Their
	// rules stay, so that the anchor isn't loaded again whenever an interface such as
	// a VM's bridge100 comes back.
	PastEgress []Egress // optional
	// Ports is the range of source ports for peers' translated packets. No socket of
	// this host has a port in it, and the kernel doesn't assign one from it. NoPorts
	// means that no such range exists: nothing is translated, so no packet of a peer
	// leaves.
	Ports   darwin.PortRange // optional; 20000:49151, without WireGuard's port
	NoPorts bool             // optional
	// IKE means that a socket of this host has UDP port 500. pf never changes that
	// source port (pf_get_sport in xnu bsd/net/pf.c), so a peer's flow from port 500
	// would take the answers to that socket.
	IKE bool // optional
}

// DefaultMTU is WireGuard's over an Ethernet MTU of 1500 bytes: less 40 for the
// IPv6 header, 8 for UDP and 32 for WireGuard's own header and tag.
const DefaultMTU = 1420

// Anchor is the ruleset of one pf anchor.
type Anchor struct {
	// Path is the anchor's path, such as com.apple/org.meshhelper.
	Path string
	// Lines are in the order that pf.conf(5) requires: tables, scrub, translation,
	// filter rules.
	Lines []Line
}

// Line is one line of an anchor.
type Line struct {
	Statement pfconf.Statement
	// Why is the reason for it: a sentence without a capital and a full stop.
	Why string
}

// Ruleset returns the anchor's lines without the reasons.
func (a *Anchor) Ruleset() *pfconf.Ruleset {
	rs := &pfconf.Ruleset{Statements: make([]pfconf.Statement, len(a.Lines))}
	for i, l := range a.Lines {
		rs.Statements[i] = l.Statement
	}
	return rs
}

// text returns the input of pfctl -f.
func (a *Anchor) text() string { return a.Ruleset().String() }

// AnchorPath returns the anchor's path for the service with this label, or the error
// of [host.CheckLabel]. pf evaluates the children of com.apple in strcmp order
// (pf_step_into_anchor in xnu bsd/net/pf.c), so ours comes after Apple's 200.AirDrop
// and 250.ApplicationFirewall: what the application firewall blocks stays blocked.
func AnchorPath(label string) (string, error) {
	if err := host.CheckLabel(label); err != nil {
		return "", err
	}
	return anchorParent + label, nil
}

// Compile returns the anchor that enforces r on a Mac.
func Compile(r *policy.Ruleset, o AnchorOptions) (*Anchor, error) {
	if o.Label == "" {
		o.Label = DefaultLabel
	}
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	path, err := AnchorPath(o.Label)
	if err != nil {
		return nil, fmt.Errorf("compile anchor: %w", err)
	}
	if o.MTU < 1280 || o.MTU > 65535 {
		return nil, fmt.Errorf("compile anchor: MTU %d: want 1280 to 65535", o.MTU)
	}
	b := newBuilder(r, o)
	b.clampMSS(o.MTU)
	b.reassemble()
	b.translate()
	b.fromPeers()
	b.towardsPeers()
	b.otherInterfaces()
	b.leavingPackets()
	b.blockTransit()
	return &Anchor{Path: path, Lines: append(b.tableLines(), b.lines...)}, nil
}
