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

// appleMain is the main ruleset that every Mac is shipped with, without the line
// that loads com.apple's own rules (/etc/pf.conf).
const appleMain = `scrub-anchor "com.apple/*"
nat-anchor "com.apple/*"
rdr-anchor "com.apple/*"
dummynet-anchor "com.apple/*"
anchor "com.apple/*"
`

// Foreign is something of another product that decides in our anchor's place.
type Foreign struct {
	// Anchor is where Rule is, "" being the main ruleset.
	Anchor string
	// Rule is the rule as pfctl shows it; empty when no rule decides: the packet
	// filter is off or skips the interface, or nothing calls our anchor.
	Rule string
	// Skipped says that the packet filter is off, or skips the interface.
	Skipped bool
	// Example is a packet that it decides about.
	Example string
	// Wider says that something passes that our anchor stops; otherwise something
	// is stopped, or translated otherwise, that our anchor lets through.
	Wider bool
	// Transit says that what passes is forwarded between others, which this host
	// didn't do before we switched forwarding on.
	Transit bool
	// Unread says that the rule isn't understood, and counts as one that matches
	// everything. Without an example it decided nothing.
	Unparsed bool
}

// String says it in a sentence without a full stop.
func (f Foreign) String() string {
	verb := "stops or changes"
	if f.Wider {
		verb = "lets through"
	}
	switch {
	case f.Unparsed && f.Example == "":
		return f.where() + " isn't understood, so it can't be said what it decides"
	case f.Unparsed:
		return fmt.Sprintf("%s isn't understood; if it matches everything, it %s %s", f.where(), verb, f.Example)
	case f.Rule == "":
		return f.where() + ", which " + verb + " " + f.Example
	}
	return fmt.Sprintf("%s %s %s", f.where(), verb, f.Example)
}

// where names what decides.
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

// FindForeign says which rules of others win over our anchor a, which is loaded
// in m, as is everything else that the host's packet filter holds. It sends
// probes through m and through a machine that has nothing but a in Apple's main
// ruleset: each kind of peer to each class of destination, and strangers to both,
// with the ports and addresses that the rules of others mention. m's states are
// gone afterwards. The result holds each rule once or, if it does both, twice:
// first what is wider. It ends with ctx's error when that is done.
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

// oursAlone returns a machine with those interfaces that holds our anchor, if ours
// isn't nil, and nothing else but Apple's main ruleset.
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

func sortForeign(found map[Foreign]string) []Foreign {
	var out []Foreign
	for f, example := range found {
		f.Example = example
		out = append(out, f)
	}
	slices.SortFunc(out, compareForeign)
	return out
}

// compareForeign orders by weight: what lets transit through first.
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

// compareProbe compares what became of a probe with what our anchor alone makes
// of it.
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
			// The other hook tells, or others may do as they like.
		case foreignNAT:
			return Foreign{Anchor: h.got.TranslationAnchor, Rule: h.got.Translation.String()}, true
		case passes && isFloating(h.got):
			return deciderAt(h.got, ours, true), true
		case passes && h.got.State != h.alone.State:
			return deciderAt(h.got, ours, false), true // answers will be stopped
		}
	}
	return Foreign{}, false
}

// isLoose reports whether a packet made a state that isn't bound to an interface.
func isFloating(h *pfsim.Hook) bool {
	return h.State == pfsim.StateCreated && (h.Rule == nil || h.Rule.StateOptions.Policy != pfconf.IfBound)
}

// decidedBy names what decided at a hook. Where our own anchor stops what it lets
// through when it is alone, a part of it isn't called.
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

// probe is a packet and its way.
type probe struct {
	packet  pfsim.Packet
	in, out string
	// redirected is the packet as rules of others send it on; nil: they don't. Our
	// anchor alone, which redirects nothing, is asked about it.
	redirected *pfsim.Packet
}

// String returns the packet and its way.
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

// isTransit reports whether the probe is forwarded between others than peers.
func (p probe) isTransit(r *policy.Ruleset) bool {
	tunnel := r.Host().Interface
	return p.in != "" && p.in != tunnel && p.out != "" && p.out != tunnel
}

// afterRedirect returns the probe as it goes on after the redirection.
func (p probe) afterRedirect() probe {
	if p.redirected != nil {
		p.packet = *p.redirected
	}
	return p
}

func (p probe) send(m *pfsim.Machine) pfsim.Judgement {
	switch {
	case p.out == "":
		return m.Receive(p.packet, p.in)
	case p.in == "":
		return m.Send(p.packet, p.out)
	}
	return m.Forward(p.packet, p.in, p.out)
}

// Bounds of what is tried, whatever a foreign ruleset holds.
const (
	maxProbePeers  = 16
	maxProbePorts  = 32
	maxProbeDsts   = 48
	maxProbeAnchor = 1024
)

// probes is what probes are made of.
type probes struct {
	r     *policy.Ruleset
	host  policy.Host
	peers []netip.Addr
	// interfaces are all of the machine's, also those without an address that the
	// facts list.
	interfaces []pfconf.Interface
	dsts       []netip.Addr
	ports      []uint16
}

// newProbes collects the addresses and ports to try.
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
	// Addresses in the middle of the internet, and an unused mesh address.
	p.dsts = append(p.dsts, netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("2620:fe::fe"),
		netip.MustParseAddr("100.127.255.254"), netip.MustParseAddr("224.0.0.251"))
	p.addFromRules(m, "", a.Path, new(int))
	return p
}

func (p *probes) addDst(prefix netip.Prefix) {
	a := prefix.Addr()
	if !prefix.IsSingleIP() {
		a = a.Next()
	}
	if len(p.dsts) < maxProbeDsts && a.IsValid() && !slices.Contains(p.dsts, a) {
		p.dsts = append(p.dsts, a)
	}
}

// addMentioned collects what the rules below an anchor mention, ours excepted.
func (p *probes) addFromRules(m *pfsim.Machine, anchor, ours string, seen *int) {
	if *seen++; anchor == ours || *seen > maxProbeAnchor {
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
		p.addFromRules(m, child, ours, seen)
	}
}

// all returns the probes: from each peer, from this host and from a stranger on
// each interface, to each destination, by each protocol.
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

// stranger is an address that no host has here, for documentation (RFC 5737,
// RFC 3849).
func documentationAddr(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return netip.MustParseAddr("192.0.2.77")
	}
	return netip.MustParseAddr("2001:db8:ffff::77")
}

// besideOwn is an address of the network that an interface is attached to, not the
// interface's own.
func neighborAddr(attached netip.Prefix) netip.Addr {
	a := attached.Masked().Addr().Next()
	if a == attached.Addr() {
		a = a.Next()
	}
	return a
}

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

// way returns the interface by which a packet leaves, "" when this host keeps it,
// and whether there is one.
func (p *probes) routeTo(dst netip.Addr, in string) (out string, ok bool) {
	switch {
	case !p.r.IsForwarded(dst):
		return "", in != "" // others may do on loopback as they like
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
