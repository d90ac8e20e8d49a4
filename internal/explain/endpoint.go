package explain

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// checkEndpoint reports whether peers can reach this host at the endpoint that their
// configurations name: the setting, or without it the uplink's address. It can't be tried from
// outside, so the check compares the endpoint with what is known of the host:
//   - a name that doesn't resolve, or has more addresses than count as this host's, fails;
//   - a public address of this host is OK, a private one fails while there are peers;
//   - an address that isn't this host's is taken for its router's, unless lostAddress knows
//     better.
//
// Whether a router forwards the UDP port can't be seen from here, so an endpoint that may be
// right is OK.
func (x *Explainer) checkEndpoint(c held.State, doc *wanted.Document) api.Check {
	out := api.Check{Name: "endpoint", OK: true}
	e := x.o.Wanted.Settings().Endpoint
	own := hostAddresses(c.Host)
	if e.Host == "" {
		a, ok := c.Host.LastingAddress()
		switch {
		case !ok:
			out.Message = "not known: there is no uplink, nor an endpoint"
		case policy.IsPublic(a):
			out.Message = fmt.Sprintf("peers find the host at the uplink's address %v", a)
		default:
			x.describePrivate(&out, c, doc, fmt.Sprintf("the uplink's address %v", a), a)
		}
		return out
	}
	at, err := netip.ParseAddr(e.Host)
	addresses := []netip.Addr{at.Unmap()} // not valid for a name, whose addresses were learned
	if err != nil {
		err := x.o.NameFailure(e.Host)
		o := x.o.Learned.Outside()
		addresses = o.Addresses
		switch {
		case err != nil:
			out.OK, out.Message = false, fmt.Sprintf("the name %q of this host's endpoint doesn't resolve: %v", e.Host, err)
			if len(addresses) == 0 {
				out.Message += ": new devices don't find this host, and as long as the router's public address isn't known, peers with routing reach the router by that address even without lan"
			}
			out.Hint = "correct the name, or the host's DNS; peers look it up, too"
			return out
		case o.Left > 0:
			out.OK, out.Message = false, fmt.Sprintf("%q has more addresses than count as this host's: %d don't, and peers with routing reach them without lan", e.Host, o.Left)
			out.Hint = "give the endpoint a name that is this host's alone: meshhelper settings endpoint HOST"
			return out
		}
		if len(addresses) == 0 {
			out.Message = fmt.Sprintf("%q is being looked up", e.Host)
			return out
		}
	}
	for _, a := range addresses {
		switch {
		case !slices.Contains(own, a):
			continue
		case !policy.IsPublic(a):
			x.describePrivate(&out, c, doc, fmt.Sprintf("%s, this host's endpoint,", e.Host), a)
		default:
			out.Message = fmt.Sprintf("%s is %v, an address of this host", e.Host, a)
		}
		return out
	}
	a := addresses[0]
	if direct, lost := lostAddress(c.Host, a); lost {
		out.OK = false
		out.Message = fmt.Sprintf("%s, this host's endpoint, is %v, which isn't an address of this host, nor of its router: this host has %v", e.Host, a, direct)
		out.Hint = "correct it (meshhelper settings endpoint HOST) or what its name stands for, and print the peers' configurations again: meshhelper peer config NAME"
		return out
	}
	out.Message = fmt.Sprintf("%s is %v, taken for the router's address: it has to forward the UDP port to this host", e.Host, a)
	return out
}

// describePrivate fills in the check for an endpoint at the host's private address a, which
// the message calls what. Devices elsewhere don't reach it. Without peers that is no problem
// yet.
func (x *Explainer) describePrivate(out *api.Check, c held.State, doc *wanted.Document, what string, a netip.Addr) {
	out.OK = len(doc.Peers) == 0
	out.Message = what + " is private, and nothing is known to be forwarded to it: peers elsewhere don't reach this host"
	out.Hint = fmt.Sprintf("forward UDP port %d on the router to %v, and tell the helper the router's name or public address: meshhelper settings endpoint HOST", c.ListenPort, a)
	if from, heard := x.heardFromOutside(c, doc); heard {
		out.Message = fmt.Sprintf("%s is private: devices elsewhere don't reach it by the configurations that are printed now, although one reaches this host from %v, by another address", what, from)
		out.Hint = "tell the helper that address or name: meshhelper settings endpoint HOST"
	}
}

// lostAddress reports whether an endpoint that isn't an address of the host is stale, because
// it can't be the router's either. It returns the address of the host that shows this: one in
// the endpoint's own private network, or a public one on the uplink, since a host with that has
// no translating router in front of it.
func lostAddress(h policy.Host, endpoint netip.Addr) (direct netip.Addr, lost bool) {
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			a := p.Addr()
			switch {
			case i.Name == h.Interface || a.Is4() != endpoint.Is4() || a.IsLinkLocalUnicast() || a.IsLoopback():
			case !policy.IsPublic(endpoint) && p.Masked().Contains(endpoint), i.Name == h.Uplink(a) && policy.IsPublic(a):
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}

// hostAddresses returns the addresses of all interfaces, including the mesh interface.
func hostAddresses(h policy.Host) (out []netip.Addr) {
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			out = append(out, p.Addr())
		}
	}
	return out
}

// heardFromOutside returns the public address of a peer without a configured endpoint that
// completed a handshake. This host didn't know where the peer was, so the peer must have
// reached it from there.
func (x *Explainer) heardFromOutside(c held.State, doc *wanted.Document) (netip.Addr, bool) {
	stats := c.Numbers().Tunnel
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if s := stats[p.PublicKey]; p.Endpoint == "" && !s.LastHandshake.IsZero() && policy.IsPublic(s.Endpoint.Addr()) {
			return s.Endpoint.Addr(), true
		}
	}
	return netip.Addr{}, false
}

// checkPeerEndpoints fails for the first peer whose endpoint is a name that didn't resolve at
// the resolver's last attempt, or an address of this host, to which packets for the peer would
// come back. It asks no DNS server itself.
func (x *Explainer) checkPeerEndpoints(c held.State, doc *wanted.Document) api.Check {
	out := api.Check{Name: "peers' endpoints", OK: true, Message: "each is an address of another device, or a name that resolves"}
	own := hostAddresses(c.Host)
	for i := range doc.Peers {
		e, err := mesh.ParseEndpoint(doc.Peers[i].Endpoint, 0)
		if err != nil {
			continue
		}
		if a, err := netip.ParseAddr(e.Host); err == nil && slices.Contains(own, a.Unmap()) {
			out.OK = false
			out.Message = fmt.Sprintf("the endpoint %q of %s is an address of this host, so packets for the peer never leave it", doc.Peers[i].Endpoint, doc.Peers[i].Name)
			out.Hint = fmt.Sprintf("remove the peer and add it again with its own address: meshhelper peer remove %s", doc.Peers[i].Name)
			return out
		}
		if failure := x.o.NameFailure(e.Host); failure != nil {
			out.OK = false
			out.Message = fmt.Sprintf("the endpoint %q of %s doesn't resolve: %v", doc.Peers[i].Endpoint, doc.Peers[i].Name, failure)
			out.Hint = "correct it, or the host's DNS; until then the peer has to connect by itself"
			return out
		}
	}
	return out
}
