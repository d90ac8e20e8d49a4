package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// Kind says whose device a peer is.
type Kind string

// The kinds of peer.
const (
	Own      Kind = "own"      // the same person's device
	External Kind = "external" // another person's
)

// Permissions is a set of permissions.
type Permissions uint8

// The permissions that a host can give a peer, each as the set that holds it alone, in
// the order of [AllPermissions].
const (
	// Incoming lets the peer connect to the host itself.
	Incoming Permissions = 1 << iota
	// Routing lets the peer reach the internet through the host.
	Routing
	// LAN lets the peer reach the host's other networks. It has no effect
	// without Routing.
	LAN
)

// Permission describes one permission to people and programs.
type Permission struct {
	// Set holds the permission and no other.
	Set Permissions
	// Name is what commands, the socket and the document on disk call it.
	Name string
	// Verb completes "the peer may …".
	Verb string
	// Opens says what a peer can do with it, in the words of the commands' help.
	Opens string
	// Needs are the permissions without which it has no effect.
	Needs Permissions
	// Default lists the kinds of peer that have it from the start.
	Default []Kind
}

// AllPermissions is the table of permissions, in the order in which commands show them.
var AllPermissions = [...]Permission{
	{
		Set: Incoming, Name: "incoming", Verb: "connect to this host",
		Opens: "connect to this host", Default: []Kind{Own},
	},
	{
		Set: Routing, Name: "routing", Verb: "route",
		Opens: "reach the internet through this host",
	},
	{
		Set: LAN, Name: "lan", Verb: "reach this host's networks",
		Opens: "reach this host's other networks", Needs: Routing,
	},
}

// All is the set of all permissions.
const All = Permissions(1<<len(AllPermissions) - 1)

// ParsePermission returns the permission of a name. The error lists the names.
func ParsePermission(name string) (*Permission, error) {
	for i := range AllPermissions {
		if AllPermissions[i].Name == name {
			return &AllPermissions[i], nil
		}
	}
	return nil, fmt.Errorf("permission %q is unknown: it is one of %s", name, strings.Join(PermissionNames(), ", "))
}

// PermissionNames returns the names of all permissions, in their order.
func PermissionNames() []string {
	names := make([]string, len(AllPermissions))
	for i, p := range AllPermissions {
		names[i] = p.Name
	}
	return names
}

// DefaultPermissions returns what a new peer of a kind may without being asked.
func DefaultPermissions(kind Kind) Permissions {
	var out Permissions
	for _, p := range AllPermissions {
		for _, k := range p.Default {
			if k == kind {
				out |= p.Set
			}
		}
	}
	return out
}

// Has reports whether all of q is in the set.
func (p Permissions) Has(q Permissions) bool { return p&q == q }

// List returns the permissions in the set, in the order of [AllPermissions].
func (p Permissions) List() []Permission {
	var out []Permission
	for _, one := range AllPermissions {
		if p.Has(one.Set) {
			out = append(out, one)
		}
	}
	return out
}

// String returns the names in the set separated by ", ", or "none".
func (p Permissions) String() string {
	var names []string
	for _, one := range p.List() {
		names = append(names, one.Name)
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ", ")
}

// Effective returns the set without the permissions that have no effect in it, because
// one that they need is missing.
func (p Permissions) Effective() Permissions {
	out := p
	for _, one := range AllPermissions {
		if !p.Has(one.Needs) {
			out &^= one.Set
		}
	}
	return out
}

// index returns the place of a single permission in AllPermissions.
func (p Permissions) index() int { return bits.TrailingZeros8(uint8(p)) }

// Grant says whether one permission is given, and until when.
type Grant struct {
	Allowed bool `json:"allowed"`
	// Until is when the grant ends by itself; zero means never. At Until it is
	// no longer in force.
	Until time.Time `json:"until,omitzero"`
}

// In reports whether the grant is in force at the time now.
func (g Grant) In(now time.Time) bool {
	return g.Allowed && (g.Until.IsZero() || now.Before(g.Until))
}

// And returns what both grants allow, until the earlier of their ends.
func (g Grant) And(h Grant) Grant {
	switch {
	case !g.Allowed || !h.Allowed:
		return Grant{}
	case g.Until.IsZero() || !h.Until.IsZero() && h.Until.Before(g.Until):
		return h
	}
	return g
}

// Grants holds a peer's grants, one for each permission, in the order of
// [AllPermissions]. In JSON it is an object with the permissions' names; names that
// aren't known are left out.
type Grants [len(AllPermissions)]Grant

// Granted returns grants that give a set of permissions without an end.
func Granted(set Permissions) (g Grants) {
	for i, one := range AllPermissions {
		g[i].Allowed = set.Has(one.Set)
	}
	return g
}

// Of returns the grant of a single permission, to be read or changed in place.
func (g *Grants) Of(one Permissions) *Grant { return &g[one.index()] }

// At returns the permissions in force at the time now, those that have no effect
// included.
func (g Grants) At(now time.Time) Permissions {
	var set Permissions
	for i, one := range AllPermissions {
		if g[i].In(now) {
			set |= one.Set
		}
	}
	return set
}

// Allowed returns the permissions that are given, whenever they end.
func (g Grants) Allowed() Permissions {
	var set Permissions
	for i, one := range AllPermissions {
		if g[i].Allowed {
			set |= one.Set
		}
	}
	return set
}

// MarshalJSON writes an object with the permissions' names. It is written by hand because
// the whole document is, for each change, and a mesh may have thousands of peers.
func (g Grants) MarshalJSON() ([]byte, error) {
	out := make([]byte, 0, 160)
	for i, one := range AllPermissions {
		out = append(out, "{,"[min(i, 1)], '"')
		out = append(out, one.Name...)
		out = append(out, `":{"allowed":`...)
		out = strconv.AppendBool(out, g[i].Allowed)
		if !g[i].Until.IsZero() {
			until, err := g[i].Until.MarshalJSON()
			if err != nil {
				return nil, fmt.Errorf("permission %s: %w", one.Name, err)
			}
			out = append(out, `,"until":`...)
			out = append(out, until...)
		}
		out = append(out, '}')
	}
	return append(out, '}'), nil
}

// UnmarshalJSON reads what MarshalJSON writes.
func (g *Grants) UnmarshalJSON(text []byte) error { return UnmarshalPermissions(text, g[:]) }

// MarshalPermissions writes one value for each permission, in the order of
// [AllPermissions], as a JSON object with the permissions' names.
func MarshalPermissions[T any](values []T) ([]byte, error) {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	for i, one := range AllPermissions {
		separator := byte(',')
		if i == 0 {
			separator = '{'
		}
		out.WriteByte(separator)
		fmt.Fprintf(&out, "%q:", one.Name)
		if err := enc.Encode(values[i]); err != nil {
			return nil, err
		}
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

// UnmarshalPermissions reads what MarshalPermissions writes. A permission that the
// object doesn't have gets the zero value; a name that isn't a permission's is skipped.
func UnmarshalPermissions[T any](text []byte, values []T) error {
	var named map[string]json.RawMessage
	if err := json.Unmarshal(text, &named); err != nil {
		return err
	}
	clear(values)
	for i, one := range AllPermissions {
		value, ok := named[one.Name]
		if !ok {
			continue
		}
		if err := json.Unmarshal(value, &values[i]); err != nil {
			return fmt.Errorf("permission %s: %w", one.Name, err)
		}
	}
	return nil
}
