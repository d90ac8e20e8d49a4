package linux

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// findObstacles returns the other chains and flow tables that stop what the policy allows
// a peer: an accept in our table doesn't override a drop in another one. Docker and ufw
// drop in their FORWARD chains, Tailscale drops packets from 100.64.0.0/10 on other
// interfaces than its own. Those chains are evaluated for sample packets. A result that
// can't be evaluated is reported as unclear, not guessed.
func (o *others) findObstacles(ctx context.Context, h policy.Host, all []sample) ([]host.Problem, error) {
	e, err := o.newEvaluator(ctx)
	if err != nil {
		return nil, err
	}
	o.marks = map[bool]uint32{}
	var out []host.Problem
	type place struct {
		where  string
		tunnel bool
	}
	reported := map[place]bool{} // each place is reported once, and once more for WireGuard's packets
	for _, s := range all {
		f, protocol := e.judge(s)
		if s.what == toInternet {
			o.marks[s.src.Is4()] = e.markOf(s)
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("judge %s: %w", f.where(), err)
		}
		if p, ok := obstacle(s, f, protocol); ok && !reported[place{f.where(), s.tunnel}] {
			reported[place{f.where(), s.tunnel}] = true
			out = append(out, p)
		}
	}
	bypasses, err := o.bypasses(h)
	return append(out, bypasses...), err
}

// stops reports whether the packet doesn't reach its destination unchanged.
func (f finding) stops() bool {
	return f.outcome == dropped || f.outcome == redirected || f.outcome == untracked
}

// judge returns what happens to a sample, and the protocol if it happens to only one of
// UDP and TCP. Peers' packets are tried with TCP, too. An unclear result for TCP is
// ignored: a firewall's limit on new connections would make it unclear on many hosts.
func (e *evaluator) judge(s sample) (f finding, protocol string) {
	if s.tunnel {
		return e.run(s), ""
	}
	f = e.ofAnyPort(s)
	s.proto = unix.IPPROTO_TCP
	switch tcp := e.ofAnyPort(s); {
	case tcp.unclear:
	case tcp.stops() && !f.stops():
		return tcp, "TCP "
	case f.stops() && !tcp.stops():
		return f, "UDP "
	}
	return f, ""
}

// ofAnyPort returns what happens to a sample whatever its ports are: a rule that stops
// only some ports isn't an obstacle.
func (e *evaluator) ofAnyPort(s sample) finding {
	f := e.run(s)
	if f.stops() {
		s.sport, s.dport = 29_876, 29_877
		if other := e.run(s); !other.stops() {
			return other
		}
	}
	return f
}

// obstacle returns the problem of other chains that stop a packet or may stop it.
func obstacle(s sample, f finding, protocol string) (host.Problem, bool) {
	if !f.stops() && !f.unclear {
		return host.Problem{}, false
	}
	verb := map[outcome]string{
		dropped: "drops", redirected: "redirects", untracked: "excludes from connection tracking, and so from translation, all",
	}[f.outcome]
	if f.unclear {
		verb = map[outcome]string{dropped: "may drop", redirected: "may redirect", untracked: "may exclude from connection tracking, and so from translation,"}[f.outcome]
	}
	let := "interface " + s.iif
	switch {
	case s.iif == "":
		let = fmt.Sprintf("UDP from port %d", s.sport)
	case s.oif == "" && s.tunnel:
		let = fmt.Sprintf("UDP to port %d", s.dport)
	case s.reply:
		let = "interface " + s.oif
	}
	kind := host.KindOtherFilters
	if s.tunnel {
		kind = host.KindHostFirewall
	}
	if !f.stops() {
		return host.Problem{
			Step:    stepOthers,
			Message: fmt.Sprintf("what %s does with %spackets %s isn't known", f.where(), protocol, s.what),
			Hint:    fmt.Sprintf("make sure that it lets %s through, in the software that the table belongs to", let),
			Kind:    kind,
		}, true
	}
	return host.Problem{
		Step:    stepOthers,
		Message: fmt.Sprintf("%s %s %spackets %s", f.where(), verb, protocol, s.what),
		Hint:    fmt.Sprintf("let %s through there, in the software that the table belongs to", let),
		Kind:    kind,
	}, true
}

// bypasses reports other software's flow tables on the uplinks: packets of a flow in a
// flow table skip every other rule (Documentation/networking/nf_flowtable.rst).
func (o *others) bypasses(h policy.Host) ([]host.Problem, error) {
	tables, err := o.lists.ListTables(nftables.TableFamilyUnspecified)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	var out []host.Problem
	for _, t := range tables {
		fs, err := o.lists.ListFlowtables(t)
		if err != nil {
			return nil, fmt.Errorf("list flow tables of %s: %w", t.Name, err)
		}
		for _, f := range fs {
			out = append(out, bypass(h, t, f)...)
		}
	}
	return out, nil
}

// bypass reports a flow table that has one of the uplinks.
func bypass(h policy.Host, t *nftables.Table, f *nftables.Flowtable) []host.Problem {
	for _, up := range slices.Concat([]string{h.Uplink4, h.Uplink6}, h.Equal4, h.Equal6) {
		if slices.Contains(f.Devices, up) {
			return []host.Problem{{
				Step: stepOthers, Kind: host.KindOtherFilters,
				Message: fmt.Sprintf("flow table %s of table %s %s takes running flows on %s past every packet filter",
					f.Name, familyName(t.Family), t.Name, up),
				Hint: "keep interface " + h.Interface + " out of the rules that add flows there",
			}}
		}
	}
	return nil
}

// stepOthers is the step under which problems with other software's rules are reported.
const stepOthers = "look at other packet filters"

// toInternet describes the samples from peers to the internet.
const toInternet = "from peers to the internet"

// samples returns packets of what the ruleset allows to peers, one of each kind: rules
// that distinguish peers' addresses are rare, and there may be thousands of peers. It
// also returns WireGuard's own packets, including those to and from the devices at outer.
func samples(r *policy.Ruleset, outer []netip.AddrPort) []sample {
	var out []sample
	add := func(s sample) {
		if !slices.ContainsFunc(out, func(have sample) bool { return have.what == s.what && have.src.Is4() == s.src.Is4() }) {
			s.proto, s.sport, s.dport = unix.IPPROTO_UDP, 40_000, 40_001
			out = append(out, s)
		}
	}
	h := r.Host()
	for _, a := range r.Mesh().Addresses {
		near := false
		for _, p := range r.Peers() {
			i := slices.IndexFunc(p.Addresses[:], func(b netip.Addr) bool { return a.Is4() == b.Is4() })
			if i < 0 {
				continue
			}
			peer, far := p.Addresses[i], netip.MustParseAddr("198.51.100.1")
			if a.Is6() {
				far = netip.MustParseAddr("2001:db8::1")
			}
			for i, up := range h.Uplinks(a) {
				if !p.Permissions.Has(mesh.Routing) || !h.Forwarding.Of(a) {
					break
				}
				by := ""
				if i > 0 {
					by = " by " + up
				}
				add(sample{what: toInternet + by, iif: h.Interface, oif: up, src: peer, dst: far})
				add(sample{what: "from the internet to peers" + by, iif: up, oif: h.Interface, src: far, dst: peer, reply: true})
			}
			if p.Permissions.Has(mesh.Routing|mesh.LAN) && h.Forwarding.Of(a) && !near {
				near = true
				for _, n := range neighbours(h, a.Is4()) {
					add(sample{what: "from peers to the network at " + n.iface, iif: h.Interface, oif: n.iface, src: peer, dst: n.addr})
					add(sample{what: "from the network at " + n.iface + " to peers", iif: n.iface, oif: h.Interface, src: n.addr, dst: peer, reply: true})
				}
			}
			if p.Permissions.Has(mesh.Incoming) {
				add(sample{what: "from peers to this host", iif: h.Interface, src: peer, dst: a})
				add(sample{what: "from this host to peers", oif: h.Interface, src: a, dst: peer, reply: true})
			}
		}
	}
	return append(out, tunnelSamples(r, outer)...)
}

// neighbour is an address in a network that the host is attached to.
type neighbour struct {
	iface string
	addr  netip.Addr
}

// maxNeighbours bounds the number of attached networks per family for which chains are
// evaluated: a host may have hundreds of interfaces for containers.
const maxNeighbours = 16

// neighbours returns an address of another host, of class lan, for each interface with a
// network of the family.
func neighbours(h policy.Host, four bool) []neighbour {
	var own []netip.Addr
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			own = append(own, p.Addr())
		}
	}
	var out []neighbour
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			a := p.Addr()
			if i.Name == h.Interface || a.Is4() != four || p.IsSingleIP() || a.IsLinkLocalUnicast() || a.IsLoopback() || len(out) == maxNeighbours {
				continue
			}
			a = p.Masked().Addr().Next()
			for slices.Contains(own, a) {
				a = a.Next()
			}
			if p.Contains(a) {
				out = append(out, neighbour{i.Name, a})
				break
			}
		}
	}
	return out
}

// tunnelSamples returns packets of WireGuard itself: with an unknown device by the
// uplinks, and with the devices at outer.
func tunnelSamples(r *policy.Ruleset, outer []netip.AddrPort) []sample {
	var out []sample
	h, port := r.Host(), r.Mesh().ListenPort
	if port == 0 {
		return nil
	}
	add := func(far netip.AddrPort, by string, own netip.Addr, from, to string) {
		if by == "" || !own.IsValid() {
			return
		}
		out = append(out, sample{
			what: fmt.Sprintf("of WireGuard (UDP port %d) %s to this host", port, from), tunnel: true,
			iif: by, src: far.Addr(), dst: own, proto: unix.IPPROTO_UDP, sport: far.Port(), dport: port,
		}, sample{
			what: fmt.Sprintf("of WireGuard (UDP port %d) from this host %s", port, to), tunnel: true,
			oif: by, src: own, dst: far.Addr(), proto: unix.IPPROTO_UDP, sport: port, dport: far.Port(),
		})
	}
	for _, far := range []string{"198.51.100.1", "2001:db8::1"} {
		a := netip.MustParseAddr(far)
		add(netip.AddrPortFrom(a, 40_000), h.Uplink(a), h.Source(a), "from devices", "to devices")
	}
	for _, far := range outer {
		by, own := sourceTowards(h, far.Addr())
		add(far, by, own, fmt.Sprintf("from the device at %v", far.Addr()), fmt.Sprintf("to the device at %v", far.Addr()))
	}
	return out
}

// sourceTowards returns the interface by which the host reaches a, by longest prefix, and
// the host's address there.
func sourceTowards(h policy.Host, a netip.Addr) (by string, own netip.Addr) {
	by, own = h.Uplink(a), h.Source(a)
	bits := 0
	longer := func(name string, p netip.Prefix) bool {
		if name == h.Interface || !p.Contains(a) || p.Bits() <= bits {
			return false
		}
		by, bits = name, p.Bits()
		return true
	}
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			if longer(i.Name, p) {
				own = p.Addr()
			}
		}
	}
	for _, route := range h.Routes {
		if longer(route.Interface, route.Prefix) {
			own = addressAt(h, by, a.Is4())
		}
	}
	return by, own
}

// addressAt returns an address of an interface that other hosts can answer.
func addressAt(h policy.Host, name string, four bool) netip.Addr {
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			if a := p.Addr(); i.Name == name && a.Is4() == four && !a.IsLinkLocalUnicast() {
				return a
			}
		}
	}
	return netip.Addr{}
}

// familyName returns nft's name of a table's family.
func familyName(f nftables.TableFamily) string {
	return map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
		nftables.TableFamilyNetdev: "netdev",
	}[f]
}
