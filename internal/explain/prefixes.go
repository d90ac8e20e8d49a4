package explain

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// stepPrefix is Problem.Step of problems with the mesh prefixes, and the name of their check.
const stepPrefix = "mesh prefix"

// shownNames and shownPrefixes are how many names and prefixes a message lists before it gives
// the number of the others: it should fit a line or two of a terminal.
const (
	shownNames    = 5
	shownPrefixes = 3
)

// overlapProblems returns a problem for each other owner of a part of the mesh prefixes, such as
// another VPN in 100.64.0.0/10 (RFC 6598), the default. The hint is the way out: another prefix,
// or a restart if another one was set already.
func overlapProblems(r *policy.Ruleset, s *wanted.Settings) []host.Problem {
	var out []host.Problem
	for _, o := range r.Overlaps() {
		p := Overlap(r, o)
		next, known := s.PrefixesAfter()
		if after := next.Of(o.Mesh.Addr()); known && after != o.Mesh {
			p.Hint = fmt.Sprintf("restart the helper: the mesh prefix is %v then, as it was set", after)
		}
		out = append(out, p)
	}
	return out
}

// Overlap describes another owner of a part of a mesh prefix as a problem: which interface,
// route, IPsec policy or DNS server has which addresses, which peers or addresses of this host
// that affects, and which command gets out of its way. The overlap itself harms nothing else:
// the other owner keeps what it has.
func Overlap(r *policy.Ruleset, o policy.Overlap) host.Problem {
	texts := make([]string, len(o.Prefixes))
	for i, p := range o.Prefixes {
		if texts[i] = p.String(); o.Kind == policy.OverlapUplink || o.Kind == policy.OverlapResolver {
			texts[i] = p.Addr().String()
		}
	}
	list := joinSome(texts, shownPrefixes)
	p := host.Problem{Step: stepPrefix, Kind: host.KindPrefix, Hint: "this host reaches them as before, peers don't; " + WayOut(r, o.Mesh)}
	in := fmt.Sprintf("inside the mesh prefix %v", o.Mesh)
	if o.Prefixes[0].Bits() < o.Mesh.Bits() {
		in = fmt.Sprintf("around the mesh prefix %v", o.Mesh)
	}
	switch o.Kind {
	case policy.OverlapUplink:
		p.Message = fmt.Sprintf("the uplink %s or its router has %s, %s: what this host sends there leaves by the uplink, but for what is for a peer", o.Interface, list, in)
		p.Hint = WayOut(r, o.Mesh)
	case policy.OverlapAddress:
		p.Message = fmt.Sprintf("the interface %s has %s, %s", o.Interface, list, in)
	case policy.OverlapRoute:
		p.Message = fmt.Sprintf("routes by %s lead to %s, %s", o.Interface, list, in)
	case policy.OverlapIPsec:
		p.Message = fmt.Sprintf("IPsec policies take what goes to %s, %s", list, in)
	case policy.OverlapResolver:
		p.Message = fmt.Sprintf("the host's DNS servers %s are %s", list, in)
	}
	switch {
	case o.Own:
		p.Message += "; one is this host's own mesh address, so that peers don't reach the host by it"
		p.Hint = "give this host another one (run --address), or " + WayOut(r, o.Mesh)
	case len(o.Equal) > 0:
		p.Message += fmt.Sprintf("; it has the very mesh address of %s, which this host doesn't reach", joinSome(o.Equal, shownNames))
		p.Hint = fmt.Sprintf("give the peer another address (meshhelper peer rekey %s), or %s", o.Equal[0], WayOut(r, o.Mesh))
	case len(o.Peers) > 0:
		p.Message += fmt.Sprintf("; the mesh addresses of %s are among them and stay theirs: nothing else is reached there", joinSome(o.Peers, shownNames))
	}
	return p
}

// nearlyProblems returns a problem for each interface whose routes are nearly a default
// route, as of a VPN that excludes a few networks: such destinations are class lan, which the
// owner of the routes may not expect.
func nearlyProblems(h policy.Host) []host.Problem {
	var out []host.Problem
	for _, n := range h.NearlyDefault() {
		missing := make([]string, len(n.Missing))
		for i, p := range n.Missing {
			missing[i] = p.String()
		}
		out = append(out, host.Problem{
			Step: "default route",
			Message: fmt.Sprintf("routes by %s lead to most of the internet, but not to %s: they are no default route, so what they lead to is class lan, which peers reach with routing and lan only",
				n.Interface, joinSome(missing, shownPrefixes)),
			Hint: "have the program that made them route everything (0.0.0.0/0, ::/0), or everything but private networks; or leave it so",
		})
	}
	return out
}

// outerProblems returns a problem for each peer whose outer address is in a mesh prefix. An
// address in a part that another owner has is left to the owner's problem.
func outerProblems(r *policy.Ruleset, peers []mesh.Peer, n held.Numbers) []host.Problem {
	var out []host.Problem
	for i := range peers {
		a := n.Tunnel[peers[i].PublicKey].Endpoint.Addr().Unmap().WithZone("")
		mesh, inside := r.MeshOf(a)
		if !inside {
			continue
		}
		at, known := r.PeerByAddr(a)
		p := host.Problem{Step: stepPrefix, Kind: host.KindPrefix}
		switch {
		case known:
			p.Message = fmt.Sprintf("%s is to be reached at %v, which is the mesh address of %s: the tunnel doesn't carry itself", peers[i].Name, a, r.Peers()[at].Name)
			p.Hint = "give the peer an endpoint outside the mesh, or " + WayOut(r, mesh)
		case r.IsOthers(a):
			continue
		default:
			p.Message = fmt.Sprintf("%s is reached at %v, inside the mesh prefix %v: WireGuard's packets pass, other packets of this host to it are dropped", peers[i].Name, a, mesh)
			p.Hint = WayOut(r, mesh)
		}
		out = append(out, p)
	}
	return out
}

// WayOut says how the mesh gets a prefix that nothing on this host overlaps.
func WayOut(r *policy.Ruleset, mesh netip.Prefix) string {
	return "to get out of the way: " + changePrefix(r, mesh.Addr()) + " (it lists the peers whose configurations change)"
}

// changePrefix returns the command that gives the mesh another prefix of like's family.
func changePrefix(r *policy.Ruleset, like netip.Addr) string {
	key, prefix := wanted.SettingMeshPrefix6, "PREFIX"
	if like.Is4() {
		key = wanted.SettingMeshPrefix4
	}
	if free, ok := r.Free(like); ok {
		prefix = free.String()
	}
	return fmt.Sprintf("meshhelper settings %s %s", key, prefix)
}

// joinSome joins the first n texts with commas, and adds the number of the others.
func joinSome(texts []string, n int) string {
	if len(texts) <= n {
		return strings.Join(texts, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(texts[:n], ", "), len(texts)-n)
}
