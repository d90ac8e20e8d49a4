package macos

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// appleMain is the main ruleset of Apple's /etc/pf.conf, without the line that loads
// com.apple's own rules.
const appleMain = `scrub-anchor "com.apple/*"
nat-anchor "com.apple/*"
rdr-anchor "com.apple/*"
dummynet-anchor "com.apple/*"
anchor "com.apple/*"
`

// Foreign is a rule or a setting of other software that overrides our anchor.
type Foreign struct {
	// Anchor is the path of the anchor that has Rule; empty for the main ruleset.
	Anchor string
	// Rule is the rule as pfctl shows it. It is empty if no rule decides: pf is
	// disabled or skips the interface, or no rule calls our anchor.
	Rule string
	// Skipped means that pf is disabled or skips the interface (set skip on).
	Skipped bool
	// Example is a packet that it decides about.
	Example string
	// Wider means that a packet passes which our anchor blocks. Otherwise a packet
	// that our anchor passes is blocked, or translated differently.
	Wider bool
	// Transit means that the packet that passes is forwarded between two hosts that
	// aren't peers, and that this host didn't do so before we enabled forwarding.
	Transit bool
	// Unparsed means that the rule isn't understood, and is evaluated as if it matched
	// every packet. Without an example it decided about none.
	Unparsed bool
}

// String returns a sentence without a full stop.
func (f Foreign) String() string {
	verb := "stops or changes"
	if f.Wider {
		verb = "lets through"
	}
	switch {
	case f.Unparsed && f.Example == "":
		return f.where() + " isn't understood, so its effect isn't known"
	case f.Unparsed:
		return fmt.Sprintf("%s isn't understood; if it matches everything, it %s %s", f.where(), verb, f.Example)
	case f.Rule == "":
		return f.where() + ", which " + verb + " " + f.Example
	}
	return fmt.Sprintf("%s %s %s", f.where(), verb, f.Example)
}

// where names the rule or setting.
func (f Foreign) where() string {
	switch {
	case f.Skipped:
		return "the packet filter is off or skips an interface"
	case f.Rule == "":
		return "nothing calls our anchor, or not all of it"
	case f.Anchor == "":
		return fmt.Sprintf("the rule `%s` of the main ruleset", f.Rule)
	}
	return fmt.Sprintf("the rule `%s` of the anchor %s", f.Rule, f.Anchor)
}

// FindForeign returns the rules of other software that override our anchor a. The
// simulated m holds everything that the host's pf holds, a included. FindForeign sends
// probe packets through m and through a machine with only a and Apple's main ruleset,
// and compares: from each kind of peer, from this host and from other hosts, to each
// class of destination, with the ports and addresses that foreign rules mention. It
// flushes m's states. The result has each rule once, or twice if it both widens and
// narrows, with the widening ones first. It returns ctx's error when ctx is done.
func FindForeign(ctx context.Context, m *pfsim.Machine, a *Anchor, r *policy.Ruleset) ([]Foreign, error) {
	alone, err := oursAlone(m.Interfaces(), a.Path, a.Ruleset())
	if err != nil {
		return nil, fmt.Errorf("find foreign rules: %w", err)
	}
	found := map[Foreign]string{}
	probes := newProbes(m, a, r)
	transit, err := probes.transitProbes(ctx, m, a.Path)
	if err != nil {
		return nil, fmt.Errorf("find foreign rules: %w", err)
	}
	for _, p := range append(probes.all(), transit...) {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("find foreign rules: %w", err)
		}
		m.FlushStates()
		alone.FlushStates()
		if f, ok := compareProbe(p.send(m), p.afterRedirect().send(alone), a.Path); ok {
			f.Transit = f.Wider && p.isTransit(r)
			if _, known := found[f]; !known {
				found[f] = p.String()
			}
		}
	}
	return sortForeign(found), nil
}

// oursAlone returns an enabled machine with these interfaces, Apple's main ruleset and,
// unless ours is nil, our anchor.
func oursAlone(interfaces []pfconf.Interface, path string, ours *pfconf.Ruleset) (*pfsim.Machine, error) {
	m := pfsim.New(pfsim.Options{})
	for _, i := range interfaces {
		m.AddInterface(i)
	}
	main, err := pfconf.Parse(appleMain)
	if err == nil {
		err = m.LoadMain(main)
	}
	if err == nil && ours != nil {
		err = m.LoadAnchor(path, ours)
	}
	if err == nil {
		err = m.Enable()
	}
	return m, err
}

// sortForeign moves the examples into the elements and sorts them.
func sortForeign(found map[Foreign]string) []Foreign {
	var out []Foreign
	for f, example := range found {
		f.Example = example
		out = append(out, f)
	}
	slices.SortFunc(out, compareForeign)
	return out
}

// compareForeign orders by severity: what passes transit comes first.
func compareForeign(x, y Foreign) int {
	return cmp.Or(trueFirst(x.Transit, y.Transit), trueFirst(x.Wider, y.Wider), cmp.Compare(x.Anchor, y.Anchor), cmp.Compare(x.Rule, y.Rule))
}

// trueFirst orders true before false.
func trueFirst(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return -1
	}
	return 1
}

// compareProbe compares the verdict on a probe with that of our anchor alone, hook by
// hook, and returns the rule that made the difference; false if there is none.
func compareProbe(got, alone pfsim.Judgement, ours string) (Foreign, bool) {
	passes, should := got.Verdict == pfsim.VerdictPass, alone.Verdict == pfsim.VerdictPass
	isOurs := alone.In.Anchor == ours || alone.Out.Anchor == ours
	for _, h := range []struct{ got, alone *pfsim.Hook }{{&got.In, &alone.In}, {&got.Out, &alone.Out}} {
		if !h.got.Seen {
			continue
		}
		foreignNAT := h.got.Translation != nil && h.got.TranslationAnchor != ours
		switch {
		case passes && !should && !h.alone.Pass(), !passes && should && !h.got.Pass() && isOurs:
			return deciderAt(h.got, ours, passes), true
		case passes != should || h.alone.Anchor != ours:
			// The other hook decided, or our anchor has no rule about the packet.
		case foreignNAT:
			return Foreign{Anchor: h.got.TranslationAnchor, Rule: h.got.Translation.String()}, true
		case passes && isFloating(h.got):
			return deciderAt(h.got, ours, true), true
		case passes && h.got.State != h.alone.State:
			return deciderAt(h.got, ours, false), true // the answers will be blocked
		}
	}
	return Foreign{}, false
}

// isFloating reports whether a packet created a state that isn't bound to an interface,
// by which packets with the same addresses enter on any other.
func isFloating(h *pfsim.Hook) bool {
	return h.State == pfsim.StateCreated && (h.Rule == nil || h.Rule.StateOptions.Policy != pfconf.IfBound)
}

// deciderAt returns the foreign rule that decided at a hook. Rule stays empty if our own
// anchor blocks what it passes when it is alone: then only a part of it is called,
// such as its filter rules without its nat rules.
func deciderAt(h *pfsim.Hook, ours string, wider bool) Foreign {
	f := Foreign{Wider: wider, Skipped: h.Decider == pfsim.DecidedBySkip}
	switch {
	case h.Translation != nil && h.TranslationAnchor != ours:
		f.Anchor, f.Rule = h.TranslationAnchor, h.Translation.String()
	case h.Rule != nil && h.Anchor != ours:
		f.Anchor, f.Rule = h.Anchor, h.Rule.String()
	}
	return f
}

// A probe is a packet and its path through this host.
type probe struct {
	packet pfsim.Packet
	// in and out are interfaces: in is empty for a packet that this host sends, out for
	// one that it receives.
	in, out string
	// redirected is the packet after a foreign rdr rule; nil if none matches. Our
	// anchor has no rdr rule, so it is evaluated with this one.
	redirected *pfsim.Packet
}

// String returns the packet and its interfaces.
func (p probe) String() string {
	s := p.packet.String()
	if p.in != "" {
		s += " in on " + p.in
	}
	if p.out != "" {
		s += " out on " + p.out
	}
	return s
}

// isTransit reports whether the probe is forwarded between two hosts that aren't peers.
func (p probe) isTransit(r *policy.Ruleset) bool {
	tunnel := r.Host().Interface
	return p.in != "" && p.in != tunnel && p.out != "" && p.out != tunnel
}

// afterRedirect returns the probe with its packet as redirected.
func (p probe) afterRedirect() probe {
	if p.redirected != nil {
		p.packet = *p.redirected
	}
	return p
}

// send runs the probe through m's hooks: in, out, or both.
func (p probe) send(m *pfsim.Machine) pfsim.Judgement {
	switch {
	case p.out == "":
		return m.Receive(p.packet, p.in)
	case p.in == "":
		return m.Send(p.packet, p.out)
	}
	return m.Forward(p.packet, p.in, p.out)
}

// Bounds on the probes, whatever a foreign ruleset contains: their number is about the
// product of the first three.
const (
	maxProbePeers  = 16   // addresses of peers, of two peers for each set of permissions
	maxProbePorts  = 32   // destination ports
	maxProbeDsts   = 48   // destination addresses
	maxProbeAnchor = 1024 // anchors that are searched for ports and addresses
)

// probes has the addresses and ports that probes are built from.
type probes struct {
	r     *policy.Ruleset
	host  policy.Host
	peers []netip.Addr
	// interfaces are all of the machine's; host lists only those with addresses.
	interfaces []pfconf.Interface
	dsts       []netip.Addr
	ports      []uint16
}

// newProbes collects the addresses and ports to probe with.
func newProbes(m *pfsim.Machine, a *Anchor, r *policy.Ruleset) *probes {
	p := &probes{r: r, host: r.Host(), interfaces: m.Interfaces(), ports: []uint16{22, 53, 443}}
	kinds := map[mesh.Permissions]int{}
	for _, peer := range r.Peers() {
		if kinds[peer.Permissions]++; kinds[peer.Permissions] <= 2 && len(p.peers) < maxProbePeers {
			p.peers = append(p.peers, peer.Addresses[:]...)
		}
	}
	for _, s := range [][]netip.Prefix{r.Sets().Self, r.Sets().Peers, r.Sets().LAN} {
		for _, prefix := range s[:min(len(s), maxProbeDsts/4)] {
			p.addDst(prefix)
		}
	}
	// Public resolvers' addresses for class internet, an unused mesh address, and
	// mDNS's multicast group.
	p.dsts = append(p.dsts, netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("2620:fe::fe"),
		netip.MustParseAddr("100.127.255.254"), netip.MustParseAddr("224.0.0.251"))
	p.addFromRules(m, "", a.Path, new(int))
	return p
}

// addDst adds one address of a prefix to the destinations.
func (p *probes) addDst(prefix netip.Prefix) {
	a := prefix.Addr()
	if !prefix.IsSingleIP() {
		a = a.Next()
	}
	if len(p.dsts) < maxProbeDsts && a.IsValid() && !slices.Contains(p.dsts, a) {
		p.dsts = append(p.dsts, a)
	}
}

// addFromRules adds the ports and addresses in the rules of an anchor and its children,
// except ours. visited counts the anchors.
func (p *probes) addFromRules(m *pfsim.Machine, anchor, ours string, visited *int) {
	if *visited++; anchor == ours || *visited > maxProbeAnchor {
		return
	}
	l, err := m.Snapshot(anchor)
	if err != nil {
		return // gone between the two calls
	}
	for _, rule := range slices.Concat(l.Nat, l.Binat, l.Rdr, l.Filter) {
		for _, end := range []pfconf.Endpoint{rule.From, rule.To} {
			for _, port := range end.Ports {
				if len(p.ports) < maxProbePorts && !slices.Contains(p.ports, port.Lo) {
					p.ports = append(p.ports, port.Lo)
				}
			}
			for _, a := range end.Addrs {
				if a.Kind == pfconf.AddrPrefix {
					p.addDst(a.Prefix)
				}
			}
		}
	}
	for _, child := range m.Anchors(anchor) {
		p.addFromRules(m, child, ours, visited)
	}
}

// all returns the probes: from each peer, from this host, and from a host beyond and
// one on the link of each other interface, to each destination, with each protocol.
func (p *probes) all() []probe {
	var out []probe
	for _, dst := range p.dsts {
		for _, src := range p.peers {
			out = p.add(out, src, dst, p.host.Interface)
		}
		for _, src := range p.r.Mesh().Addresses {
			out = p.add(out, src, dst, "")
		}
		for _, i := range p.interfaces {
			if i.Name == p.host.Interface || i.Name == loopback {
				continue
			}
			out = p.add(out, documentationAddr(dst), dst, i.Name)
			for _, attached := range i.Addresses {
				out = p.add(out, neighborAddr(attached), dst, i.Name)
			}
		}
	}
	return out
}

// documentationAddr returns an address of dst's family that no host has: one for
// documentation (RFC 5737, RFC 3849).
func documentationAddr(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return netip.MustParseAddr("192.0.2.77")
	}
	return netip.MustParseAddr("2001:db8:ffff::77")
}

// neighborAddr returns the first address of an attached prefix that isn't the
// interface's own.
func neighborAddr(attached netip.Prefix) netip.Addr {
	a := attached.Masked().Addr().Next()
	if a == attached.Addr() {
		a = a.Next()
	}
	return a
}

// add appends a TCP and a UDP probe for each port, and an echo request. It appends none
// if the families differ or dst has no route.
func (p *probes) add(out []probe, src, dst netip.Addr, in string) []probe {
	if src.Is4() != dst.Is4() || src == dst {
		return out
	}
	to, ok := p.routeTo(dst, in)
	if !ok {
		return out
	}
	packet := pfsim.Packet{Src: src, Dst: dst, SrcPort: 49152}
	for _, port := range p.ports {
		packet.DstPort = port
		packet.Proto, packet.Flags, packet.Window = pfconf.ProtoTCP, pfconf.FlagSYN, 65535
		out = append(out, probe{packet: packet, in: in, out: to})
		packet.Proto, packet.Flags, packet.Window = pfconf.ProtoUDP, 0, 0
		out = append(out, probe{packet: packet, in: in, out: to})
	}
	packet.SrcPort, packet.DstPort = 0, 0
	packet.Proto, packet.ICMPType, packet.ICMPID = pfconf.ProtoICMP, 8, 1
	if dst.Is6() {
		packet.Proto, packet.ICMPType = pfconf.ProtoICMPv6, 128
	}
	return append(out, probe{packet: packet, in: in, out: to})
}

// routeTo returns the interface by which a packet leaves, or "" if it is for this host.
// It returns false if there is no route, or if the host sends it to itself.
func (p *probes) routeTo(dst netip.Addr, in string) (out string, ok bool) {
	switch {
	case !p.r.IsForwarded(dst):
		return "", in != "" // foreign rules on loopback don't concern the anchor
	case p.r.Class(dst) == policy.InMesh:
		return p.host.Interface, true
	}
	best := -1
	for _, i := range p.host.Interfaces {
		for _, a := range i.Addresses {
			if a.Contains(dst) && a.Bits() > best {
				best, out = a.Bits(), i.Name
			}
		}
	}
	for _, r := range p.host.Routes {
		if r.Prefix.Contains(dst) && r.Prefix.Bits() > best {
			best, out = r.Prefix.Bits(), r.Interface
		}
	}
	if best < 0 {
		out = p.host.Uplink(dst)
	}
	return out, out != ""
}
