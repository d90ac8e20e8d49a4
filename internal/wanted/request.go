package wanted

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// newPeer validates a request to add a peer and returns the peer that it describes, with
// defaults for what it leaves open. Refusals are *api.Error with a hint. Whether the name,
// key and addresses are free is checked by admit.
func (s *State) newPeer(doc *Document, p api.NewPeer, now time.Time) (*mesh.Peer, error) {
	out := &mesh.Peer{Name: p.Name, Kind: p.Kind}
	if err := checkName(p.Name); err != nil {
		return nil, err
	}
	if out.Kind == "" {
		out.Kind = mesh.External
	}
	if out.Kind != mesh.Own && out.Kind != mesh.External {
		return nil, api.Errorf(api.CodeBadRequest, "kind %q is unknown", p.Kind).WithHint("it is own or external")
	}
	var err error
	if out.PublicKey, err = s.readKey(p.PublicKey); err != nil {
		return nil, err
	}
	if err := setEndpoint(out, p.Endpoint); err != nil {
		return nil, err
	}
	if err := setKeepalive(out, p.Keepalive); err != nil {
		return nil, err
	}
	if out.Tunnel = p.Tunnel; p.Tunnel != "" && p.Tunnel != mesh.TunnelFull && p.Tunnel != mesh.TunnelSplit {
		return nil, api.Errorf(api.CodeBadRequest, "tunnel %q is unknown", p.Tunnel).WithHint("it is full or split")
	}
	out.Permissions = mesh.Granted(mesh.DefaultPermissions(out.Kind))
	if err := setPermissions(out, p.Permissions, now); err != nil {
		return nil, err
	}
	out.Addresses, err = s.chooseAddresses(doc, out, p.Addresses)
	return out, err
}

// readKey parses a peer's public key and refuses the host's own.
func (s *State) readKey(text string) (mesh.PublicKey, error) {
	key, err := mesh.ParsePublicKey(text)
	if err != nil {
		hint := "it has 44 characters, as `wg pubkey` prints it"
		if errors.Is(err, mesh.ErrWeakKey) {
			hint = "make a key pair on the other device, for instance with `wg genkey` and `wg pubkey`, and give its public key"
		}
		return key, api.Errorf(api.CodeBadKey, "the public key is not valid: %s", strings.TrimPrefix(err.Error(), "parse public key: ")).
			WithHint("%s", hint)
	}
	if key == s.id.Key {
		return key, api.Errorf(api.CodeKeyTaken, "public key %v is this host's own", key).
			WithHint("give the other device's key")
	}
	return key, nil
}

// setEndpoint sets the configured endpoint, HOST:PORT; an empty text clears it.
func setEndpoint(p *mesh.Peer, text string) error {
	p.Endpoint = ""
	if text == "" {
		return nil
	}
	e, err := mesh.ParseEndpoint(text, 0)
	if err != nil {
		return api.Errorf(api.CodeBadEndpoint, "endpoint %q: %v", text, errors.Unwrap(err)).WithHint("it is HOST:PORT, an IPv6 address in brackets")
	}
	if err := checkRemote(e); err != nil {
		return api.Errorf(api.CodeBadEndpoint, "endpoint %q: %v", text, err).WithHint("give the address or the name by which this host reaches the peer")
	}
	p.Endpoint = e.String()
	return nil
}

// checkRemote refuses an endpoint at which no other device is reached: loopback, by address
// or by the name that always means it (RFC 6761 section 6.3), and an IPv6 link-local address,
// which needs an interface besides. It isn't applied to a saved one, so that a document that
// has it still loads.
func checkRemote(e mesh.Endpoint) error {
	a, err := netip.ParseAddr(e.Host)
	name := strings.ToLower(strings.TrimSuffix(e.Host, "."))
	switch a = a.Unmap(); {
	case err == nil && a.IsLoopback(), err != nil && (name == "localhost" || strings.HasSuffix(name, ".localhost")):
		return fmt.Errorf("%s is this host itself", e.Host)
	case err == nil && a.Is6() && a.IsLinkLocalUnicast():
		return fmt.Errorf("%v is a link-local address, which says nothing without an interface", a)
	}
	return nil
}

// setKeepalive sets the interval of persistent keepalives, whole seconds from 0 to
// mesh.MaxKeepalive in Go's duration syntax; an empty text or 0s turns them off.
func setKeepalive(p *mesh.Peer, text string) error {
	p.Keepalive = 0
	if text == "" {
		return nil
	}
	k, err := time.ParseDuration(text)
	if err != nil || k < 0 || k > mesh.MaxKeepalive || k%time.Second != 0 {
		return api.Errorf(api.CodeBadRequest, "keepalive %q is not valid", text).
			WithHint("it is a number of whole seconds up to 65535, such as 25s, or 0s")
	}
	p.Keepalive = uint16(k / time.Second)
	return nil
}

// MaxTimed limits how far ahead a permission's end may be. A longer duration is rather a
// mistake, or meant to be without an end.
const MaxTimed = 10 * 365 * 24 * time.Hour

// setPermissions sets the permissions named in changes and leaves the others.
func setPermissions(p *mesh.Peer, changes map[string]api.PermissionChange, now time.Time) error {
	for name, c := range changes {
		one, err := mesh.ParsePermission(name)
		if err != nil {
			return api.Errorf(api.CodeBadPermission, "permission %q is unknown", name).WithHint("it is one of %s", strings.Join(mesh.PermissionNames(), ", "))
		}
		until, err := parseEnd(c, now)
		if err != nil {
			return api.Errorf(api.CodeBadPermission, "permission %s: %v", name, err).WithHint("say for how long, such as 30m or 2h")
		}
		*p.Permissions.Of(one.Set) = mesh.Grant{Allowed: c.Allowed, Until: until}
	}
	return nil
}

// parseEnd returns when a permission ends, or the zero time for one without an end. An end
// given as a duration is rounded down to milliseconds.
func parseEnd(c api.PermissionChange, now time.Time) (time.Time, error) {
	var until time.Time
	switch {
	case c.For == nil && c.Until == nil:
		return time.Time{}, nil
	case !c.Allowed:
		return time.Time{}, errors.New("a permission that is taken away has no end")
	case c.For != nil && c.Until != nil:
		return time.Time{}, errors.New("both for and until are given")
	case c.For != nil:
		length, err := time.ParseDuration(*c.For)
		if err != nil {
			return time.Time{}, fmt.Errorf("%q is not a duration", *c.For)
		}
		until = now.Add(length).Truncate(time.Millisecond)
	default:
		until = c.Until.UTC().Round(0)
	}
	if length := until.Sub(now); length <= 0 || length > MaxTimed {
		return time.Time{}, fmt.Errorf("the end %v isn't in the next ten years", until.Format(time.RFC3339))
	}
	return until, nil
}

// chooseAddresses returns the addresses for a new peer: the given ones, at most one of each
// family, and for the rest those derived from the peer's key. If a peer has that key already
// and no address is given, it returns that peer's addresses, so that a repeated request
// compares equal.
func (s *State) chooseAddresses(doc *Document, p *mesh.Peer, given []string) (out mesh.Addresses, err error) {
	var have [2]bool
	for _, text := range given {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return out, api.Errorf(api.CodeBadRequest, "address %q is not valid", text).WithHint("give a bare IPv4 or IPv6 address")
		}
		if err := s.id.Prefixes.Check(a); err != nil {
			return out, api.Errorf(api.CodeBadAddress, "%v", err).WithHint("%s", s.freeHint(doc, p.PublicKey))
		}
		family := familyOf(a)
		if have[family] {
			return out, api.Errorf(api.CodeBadAddress, "address %v is a second of its family", a).WithHint("a peer has one IPv4 and one IPv6 address")
		}
		out[family], have[family] = a, true
	}
	if have[0] && have[1] {
		return out, nil
	}
	if i := doc.ByKey(p.PublicKey); i >= 0 && len(given) == 0 {
		return doc.Peers[i].Addresses, nil
	}
	derived, err := s.id.Prefixes.Derive(p.PublicKey)
	if err != nil {
		return out, s.refuseAddress(doc, p.PublicKey, api.Errorf(api.CodeAddressTaken, "%v", err))
	}
	for family, a := range derived.List() {
		if !have[family] {
			out[family] = a
		}
	}
	return out, nil
}

// freeHint returns a hint that proposes free addresses for a key.
func (s *State) freeHint(doc *Document, key mesh.PublicKey) string {
	free, err := s.id.Prefixes.Propose(key, func(a netip.Addr) bool { return s.owner(doc, a) != "" })
	if err != nil {
		return "remove a peer, or take larger mesh prefixes: meshhelper settings mesh-prefix4 PREFIX"
	}
	return fmt.Sprintf("add --address %v --address %v", free[0], free[1])
}

// refuseAddress returns refusal with a hint that proposes free addresses, or, if none is
// left, an error with code mesh_full.
func (s *State) refuseAddress(doc *Document, key mesh.PublicKey, refusal *api.Error) error {
	_, err := s.id.Prefixes.Propose(key, func(a netip.Addr) bool { return s.owner(doc, a) != "" })
	if errors.Is(err, mesh.ErrMeshFull) {
		refusal = api.Errorf(api.CodeMeshFull, "the mesh is full: %v", err)
	}
	return refusal.WithHint("%s", s.freeHint(doc, key))
}

// owner returns a description of the owner of an address, for messages, or "" if the
// address is free.
func (s *State) owner(doc *Document, a netip.Addr) string {
	if a == s.id.Own[0] || a == s.id.Own[1] {
		return "this host"
	}
	if i := doc.byAddress(a); i >= 0 {
		return fmt.Sprintf("peer %q", doc.Peers[i].Name)
	}
	return ""
}

// HasAddress reports whether this host or a peer has the mesh address a.
func (s *State) HasAddress(a netip.Addr) bool { return s.owner(s.Document(), a) != "" }

// admit refuses a new peer whose key or addresses belong to another, or that exceeds
// maxPeers. Its name is known to be free.
func (s *State) admit(doc *Document, p *mesh.Peer, request api.NewPeer) error {
	if len(doc.Peers) >= maxPeers {
		return api.Errorf(api.CodeMeshFull, "the mesh has %d peers, which is the limit", maxPeers).WithHint("remove a peer")
	}
	if other := doc.likeName(p.Name, p.Name); other != "" {
		return refuseLike(p.Name, other)
	}
	if i := doc.ByKey(p.PublicKey); i >= 0 {
		return api.Errorf(api.CodeKeyTaken, "peer %q already has the key %v", doc.Peers[i].Name, p.PublicKey).
			WithHint("run: meshhelper peer rename %s %s", doc.Peers[i].Name, p.Name)
	}
	for _, a := range p.Addresses {
		if owner := s.owner(doc, a); owner != "" {
			return s.refuseAddress(doc, p.PublicKey, api.Errorf(api.CodeAddressTaken, "address %v belongs to %s", a, owner))
		}
	}
	return nil
}

// checkSamePeer returns an error if an existing peer differs from the requested one of the
// same name. Fields that the request leaves open don't count.
func checkSamePeer(is, wanted *mesh.Peer, request api.NewPeer, now time.Time) error {
	var differs string
	switch {
	case is.PublicKey != wanted.PublicKey:
		return api.Errorf(api.CodeNameTaken, "peer %q already exists, with another key", is.Name).
			WithHint("choose another name, or run: meshhelper peer remove %s", is.Name)
	case request.Kind != "" && is.Kind != wanted.Kind:
		differs = "as " + string(is.Kind)
	case len(request.Addresses) > 0 && is.Addresses != wanted.Addresses:
		differs = fmt.Sprintf("with the addresses %v and %v", is.Addresses[0], is.Addresses[1])
	case request.Endpoint != "" && is.Endpoint != wanted.Endpoint:
		differs = fmt.Sprintf("with endpoint %q", is.Endpoint)
	case request.Keepalive != "" && is.Keepalive != wanted.Keepalive:
		differs = fmt.Sprintf("with keepalive %ds", is.Keepalive)
	case request.Tunnel != "" && is.Tunnel != wanted.Tunnel:
		differs = "with another --tunnel"
	default:
		return checkSamePermissions(is, request, now)
	}
	return api.Errorf(api.CodeNameTaken, "peer %q already exists, %s", is.Name, differs).
		WithHint("run: meshhelper peer remove %s, and add it again", is.Name)
}

// checkSamePermissions is checkSamePeer for the permissions. Two ends aren't compared: a
// request with a duration gets another end each time it is repeated.
func checkSamePermissions(is *mesh.Peer, request api.NewPeer, now time.Time) error {
	for i, one := range mesh.AllPermissions {
		name := one.Name
		c, wanted := request.Permissions[name]
		if !wanted {
			continue
		}
		has, limit := is.Permissions[i], ""
		if c.For != nil {
			limit = " --for " + *c.For
		}
		timed := c.For != nil || c.Until != nil
		differs := ""
		switch {
		case has.In(now) != c.Allowed:
			differs = "without " + name
		case c.Allowed && timed && has.Until.IsZero():
			differs = "with " + name + " for good"
		case c.Allowed && !timed && !has.Until.IsZero():
			differs = fmt.Sprintf("with %s until %s", name, has.Until.Format(time.RFC3339))
		}
		if differs != "" {
			return api.Errorf(api.CodeNameTaken, "peer %q already exists, %s", is.Name, differs).
				WithHint("run: meshhelper peer allow %s %s%s", is.Name, name, limit)
		}
	}
	return nil
}

// applyChange applies a change request to peer i of doc. After an error doc may be changed
// in part; the caller drops it.
func (s *State) applyChange(doc *Document, i int, c api.PeerChange, now time.Time) error {
	p := &doc.Peers[i]
	if c.PublicKey != "" {
		if err := s.rekey(doc, i, c.PublicKey); err != nil {
			return err
		}
	}
	if c.Endpoint != nil {
		if err := setEndpoint(p, *c.Endpoint); err != nil {
			return err
		}
	}
	if c.Keepalive != nil {
		if err := setKeepalive(p, *c.Keepalive); err != nil {
			return err
		}
	}
	if err := setPermissions(p, c.Permissions, now); err != nil {
		return err
	}
	if c.Name == "" || c.Name == p.Name {
		return nil
	}
	return doc.rename(i, c.Name)
}

// rekey gives a peer another key. Addresses that were derived from the old key are derived
// from the new one, as other hosts of the mesh derive them, too; chosen addresses stay.
func (s *State) rekey(doc *Document, i int, text string) error {
	p := &doc.Peers[i]
	key, err := s.readKey(text)
	if err != nil || key == p.PublicKey {
		return err
	}
	if other := doc.ByKey(key); other >= 0 {
		return api.Errorf(api.CodeKeyTaken, "peer %q already has the key %v", doc.Peers[other].Name, key).WithHint("make a new key")
	}
	old, oldErr := s.id.Prefixes.Derive(p.PublicKey)
	next, err := s.id.Prefixes.Derive(key)
	for family, a := range old.List() {
		if oldErr != nil || a != p.Addresses[family] {
			continue
		}
		if err != nil {
			return api.Errorf(api.CodeAddressTaken, "%v", err).WithHint("make another key")
		}
		moved := next.List()[family]
		if owner := s.owner(doc, moved); owner != "" && moved != a {
			return api.Errorf(api.CodeAddressTaken, "address %v belongs to %s", moved, owner).WithHint("make another key")
		}
		p.Addresses[family] = moved
	}
	p.PublicKey = key
	return nil
}

// familyOf returns the index of an address in mesh.Addresses: 0 for IPv4, 1 for IPv6.
func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
