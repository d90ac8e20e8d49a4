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

// Kind is whether a peer belongs to the host's owner. It selects the permissions that a new
// peer has; see DefaultPermissions.
type Kind string

// The kinds of peer.
const (
	Own      Kind = "own"      // a device of the host's owner
	External Kind = "external" // a device of another person
)

// Permissions is a set of permissions, a bit for each.
type Permissions uint8

// The permissions that a host can give a peer, each as a set of one, in the order of
// [AllPermissions]: the n-th has bit n.
const (
	// Incoming lets the peer connect to the host itself.
	Incoming Permissions = 1 << iota
	// Routing lets the peer reach the internet through the host.
	Routing
	// LAN lets the peer reach the host's other networks. It has no effect
	// without Routing.
	LAN
)

// Permission is an entry of [AllPermissions].
type Permission struct {
	// Set contains this permission alone.
	Set Permissions
	// Name is its name in commands, on the socket and in the document on disk.
	Name string
	// Verb completes "the peer may …".
	Verb string
	// Opens is what the permission lets a peer do, as the commands' help says it.
	Opens string
	// Needs are the permissions without which it has no effect.
	Needs Permissions
	// Default lists the kinds of peer that have it when they are added.
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

// ParsePermission returns the permission with a name. The error lists the valid names.
func ParsePermission(name string) (*Permission, error) {
	for i := range AllPermissions {
		if AllPermissions[i].Name == name {
			return &AllPermissions[i], nil
		}
	}
	return nil, fmt.Errorf("permission %q is unknown: it is one of %s", name, strings.Join(PermissionNames(), ", "))
}

// PermissionNames returns the names of all permissions, in the order of [AllPermissions].
func PermissionNames() []string {
	names := make([]string, len(AllPermissions))
	for i, p := range AllPermissions {
		names[i] = p.Name
	}
	return names
}

// DefaultPermissions returns the permissions that a new peer of a kind has unless its
// creator gives it others.
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

// index returns the index of a single permission in AllPermissions.
func (p Permissions) index() int { return bits.TrailingZeros8(uint8(p)) }

// Grant is whether a peer has one permission, and until when.
type Grant struct {
	Allowed bool `json:"allowed"` // also after Until, until the grant is removed
	// Until is when the grant ends by itself; zero means never. At Until it is
	// no longer in force.
	Until time.Time `json:"until,omitzero"`
}

// In reports whether the grant is in force at the time now.
func (g Grant) In(now time.Time) bool {
	return g.Allowed && (g.Until.IsZero() || now.Before(g.Until))
}

// And returns a grant that is in force while both g and h are.
func (g Grant) And(h Grant) Grant {
	switch {
	case !g.Allowed || !h.Allowed:
		return Grant{}
	case g.Until.IsZero() || !h.Until.IsZero() && h.Until.Before(g.Until):
		return h
	}
	return g
}

// Grants holds a peer's grants, one for each permission, in the order of [AllPermissions].
// Its JSON form is an object with the permissions' names as keys. Unknown names are skipped,
// such as those in a document of a newer version.
type Grants [len(AllPermissions)]Grant

// Granted returns grants of a set of permissions that never end.
func Granted(set Permissions) (g Grants) {
	for i, one := range AllPermissions {
		g[i].Allowed = set.Has(one.Set)
	}
	return g
}

// Of returns the grant of a single permission. The caller may modify it.
func (g *Grants) Of(one Permissions) *Grant { return &g[one.index()] }

// At returns the permissions in force at the time now, including those that have no effect;
// see Permissions.Effective.
func (g Grants) At(now time.Time) Permissions {
	var set Permissions
	for i, one := range AllPermissions {
		if g[i].In(now) {
			set |= one.Set
		}
	}
	return set
}

// Allowed returns the permissions with a grant, even if it ended.
func (g Grants) Allowed() Permissions {
	var set Permissions
	for i, one := range AllPermissions {
		if g[i].Allowed {
			set |= one.Set
		}
	}
	return set
}

// MarshalJSON implements json.Marshaler; see Grants. It doesn't use encoding/json, which is
// slower: every change writes the whole document, and a mesh may have thousands of peers.
func (g Grants) MarshalJSON() ([]byte, error) {
	out := make([]byte, 0, 160)
	for i, one := range AllPermissions {
		out = append(out, "{,"[min(i, 1)], '"') // { before the first, a comma before the others
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

// UnmarshalJSON implements json.Unmarshaler; see UnmarshalPermissions.
func (g *Grants) UnmarshalJSON(text []byte) error { return UnmarshalPermissions(text, g[:]) }

// MarshalPermissions returns a JSON object with the permissions' names as keys. values has
// one value for each permission, in the order of [AllPermissions].
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

// UnmarshalPermissions parses the output of MarshalPermissions into values, which has one
// value for each permission. A permission that is missing gets the zero value; unknown names
// are skipped.
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
