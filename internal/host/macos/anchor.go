package macos

import (
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// DefaultLabel is the name of the service, and the last part of its anchor's
// path, unless the operator chose another.
const DefaultLabel = "org.meshhelper"

// anchorParent is the ruleset whose direct children a Mac's main ruleset
// evaluates: anchor "com.apple/*" and its like for translation and scrub in
// /etc/pf.conf.
const anchorParent = "com.apple/"

// AnchorOptions are what the anchor depends on besides the policy.
type AnchorOptions struct {
	// Label names the service: a reverse domain name of at most 63 bytes.
	Label string // optional; DefaultLabel
	// Interface is the mesh interface, if it isn't the one that the ruleset was
	// compiled for.
	Interface string // optional
	// MTU is that of the mesh interface in bytes, from 1280 to 65535.
	MTU int // optional; DefaultMTU
	// Cut are peers' addresses that lost access to this host a short time ago. This
	// host's own next segment of a connection that was cut must not open it the other
	// way round.
	Cut []netip.Addr // optional
	// Before are other interfaces that peers' packets could leave by at some time.
	// Rules for one that comes and goes stay, so that the anchor needn't be loaded
	// each time.
	PastEgress []Egress // optional
	// Ports is the range that peers' packets leave with, in which this host has no
	// socket and gives none a port. NoPorts says that there is none: then nothing is
	// translated, and so none of them leaves.
	Ports   darwin.PortRange // optional; 20000:49151, without WireGuard's port
	NoPorts bool             // optional
	// IKE says that a socket of this host has UDP port 500, which pf gives to a
	// peer's packets from port 500 too.
	IKE bool // optional
}

// DefaultMTU is that of WireGuard over an Ethernet of 1500 bytes: less 40 for
// IPv6, 8 for UDP and 32 for WireGuard itself.
const DefaultMTU = 1420

// Anchor is the ruleset of one pf anchor.
type Anchor struct {
	// Path is where it is to be loaded, such as com.apple/org.meshhelper.
	Path  string
	Lines []Line
}

// Line is one line of an anchor and the reason for it.
type Line struct {
	Statement pfconf.Statement
	Why       string
}

// Ruleset returns the anchor's lines without the reasons.
func (a *Anchor) Ruleset() *pfconf.Ruleset {
	rs := &pfconf.Ruleset{Statements: make([]pfconf.Statement, len(a.Lines))}
	for i, l := range a.Lines {
		rs.Statements[i] = l.Statement
	}
	return rs
}

// text returns what pfctl is given to load.
func (a *Anchor) text() string { return a.Ruleset().String() }

// AnchorPath returns the path of the anchor of the service with this label. Of
// the anchors in com.apple it comes after Apple's own, whose names begin with a
// digit, so that what the application firewall blocks stays blocked.
func AnchorPath(label string) (string, error) {
	if err := host.CheckLabel(label); err != nil {
		return "", err
	}
	return anchorParent + label, nil
}

// Compile makes the anchor that holds the policy on a Mac.
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
