package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// The mesh prefixes used when the operator chooses none. 100.64.0.0/10 is the
// shared address space of RFC 6598; the IPv6 prefix is a unique local one (RFC
// 4193) whose digits spell "mesh".
var (
	DefaultPrefix4 = netip.MustParsePrefix("100.64.0.0/10")
	DefaultPrefix6 = netip.MustParsePrefix("fd6d:6573:6800::/48")
)

// Permissions is a set of permissions.
type Permissions uint8

// The permissions a host can give a peer.
const (
	// Incoming lets the peer connect to the host itself.
	Incoming Permissions = 1 << iota
	// Routing lets the peer reach the internet through the host.
	Routing
	// LAN lets the peer reach the host's other networks. It has no effect
	// without Routing.
	LAN
)

// AllPermissions lists the single permissions in the order in which commands
// show them.
var AllPermissions = [...]Permissions{Incoming, Routing, LAN}

// ParsePermission returns the permission that commands and the socket call by
// this name.
func ParsePermission(name string) (Permissions, error) {
	for _, p := range AllPermissions {
		if p.String() == name {
			return p, nil
		}
	}
	return 0, fmt.Errorf("permission %q is unknown: it is one of incoming, routing, lan", name)
}

// Has reports whether all of q is in the set.
func (p Permissions) Has(q Permissions) bool { return p&q == q }

// String returns the names in the set separated by ", ", or "none".
func (p Permissions) String() string {
	var names []string
	for i, name := range [...]string{"incoming", "routing", "lan"} {
		if p&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ", ")
}

// effective drops what has no effect: lan without routing.
func (p Permissions) effective() Permissions {
	if !p.Has(Routing) {
		return p &^ LAN
	}
	return p
}

// Grant says whether one permission is given, and until when.
type Grant struct {
	Allowed bool
	// Until is when the grant ends by itself; zero means never. At Until it is
	// no longer in force.
	Until time.Time
}

// In reports whether the grant is in force at the time now.
func (g Grant) In(now time.Time) bool {
	return g.Allowed && (g.Until.IsZero() || now.Before(g.Until))
}

// Grants holds a peer's three grants.
type Grants struct {
	Incoming, Routing, LAN Grant
}

// Of returns the grant of a single permission, and nil for any other set, so
// that it can be changed in place.
func (g *Grants) Of(p Permissions) *Grant {
	switch p {
	case Incoming:
		return &g.Incoming
	case Routing:
		return &g.Routing
	case LAN:
		return &g.LAN
	}
	return nil
}

// At returns the permissions in force at the time now, lan without routing
// included.
func (g Grants) At(now time.Time) Permissions {
	var p Permissions
	for _, one := range AllPermissions {
		if g.Of(one).In(now) {
			p |= one
		}
	}
	return p
}

// PeerID identifies a peer across rulesets: its WireGuard public key.
type PeerID [32]byte

// Peer is a device that the host knows.
type Peer struct {
	ID   PeerID
	Name string
	// Addresses are the peer's own mesh addresses, normally one IPv4 and one
	// IPv6.
	Addresses []netip.Addr
	Grants    Grants
}

// Mesh is the wanted state as far as it matters for what may pass.
type Mesh struct {
	// Prefixes are the mesh prefixes of both families.
	Prefixes []netip.Prefix
	// Addresses are the host's own mesh addresses.
	Addresses []netip.Addr
	Peers     []Peer
	// Former are mesh addresses of peers that were removed less than a day ago, or got
	// others, also with other mesh prefixes than now: what the host still sends there is
	// kept in. Where a peer, or the host
	// itself, has such an address again, that counts.
	Former []netip.Addr
	// ListenPort is the UDP port of the host's WireGuard, or 0 where it isn't
	// known: no peer reaches it through the tunnel, or the tunnel would carry
	// itself; outside of the tunnel what it sends and gets is never refused.
	ListenPort uint16
	// ThroughPeer says that the host routes its own traffic to other networks through a
	// peer. Without it nothing is open for that: what the host sends into the tunnel is
	// for a peer, and what comes out of it has a peer's source.
	ThroughPeer bool
	// DNS says that the helper serves DNS on the host's mesh addresses, so that
	// port 53 there is open with routing alone.
	DNS bool
}
