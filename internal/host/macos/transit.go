package macos

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// A foreign "pass in quick" rule before our anchor may pass transit: packets forwarded
// between two hosts that aren't peers. Whether it does depends on what it matches, so
// probes are built for each such rule: packets that it matches, on each interface,
// from each kind of source that it names to each kind of destination. Evaluating them
// in both simulated machines shows the effect.

// Bounds on the probes for transit. With more foreign rules than these the evaluation
// fails, and forwarding stays disabled.
const (
	maxTransitRules  = 2000
	maxTransitProbes = 200_000
	maxAddresses     = 6 // of each end of a rule
)

// errTooManyRules means that there are more foreign rules than are evaluated.
var errTooManyRules = errors.New("there are too many rules to judge")

// transitProbes returns probes for each foreign rule that passes incoming packets with
// quick, its own or a calling anchor rule's, and for each that redirects them.
func (p *probes) transitProbes(ctx context.Context, m *pfsim.Machine, ours string) ([]probe, error) {
	var out []probe
	rules := 0
	try := func(probes []probe) error {
		if rules++; rules > maxTransitRules || len(out)+len(probes) > maxTransitProbes {
			return errTooManyRules
		}
		out = append(out, probes...)
		return ctx.Err()
	}
	var walk func(anchor string, calls []*pfconf.Rule) error
	walk = func(anchor string, calls []*pfconf.Rule) error {
		if anchor == ours {
			return nil
		}
		l, err := m.Snapshot(anchor)
		if err != nil {
			return nil // removed between the two calls
		}
		for _, rule := range l.Filter {
			if rule.Action == pfconf.Anchor {
				calls = append(calls[:len(calls):len(calls)], rule)
			}
			// A match below a quick anchor call ends the evaluation, too.
			quick := rule.Quick || slices.ContainsFunc(calls, func(c *pfconf.Rule) bool { return c.Quick })
			if rule.Action != pfconf.Pass || !quick || rule.Direction == pfconf.Out {
				continue
			}
			if err := try(p.ruleProbes(m, anchor, rule, calls)); err != nil {
				return err
			}
		}
		for _, rule := range slices.Concat(l.Rdr, l.Binat) {
			if rule.Action != pfconf.Rdr && rule.Action != pfconf.Binat {
				continue
			}
			if err := try(p.redirectProbes(m, anchor, rule)); err != nil {
				return err
			}
		}
		for _, child := range m.Anchors(anchor) {
			if err := walk(child, calls); err != nil {
				return err
			}
		}
		return nil
	}
	return out, walk("", nil)
}

// ruleProbes returns forwarded packets that match a rule's interfaces, addresses,
// protocols and ports, and the addresses of the anchor calls that lead to it. Other
// conditions, such as a socket's user or a tag, are assumed to match.
func (p *probes) ruleProbes(m *pfsim.Machine, anchor string, rule *pfconf.Rule, calls []*pfconf.Rule) []probe {
	var out []probe
	from, to := p.addressesOf(m, anchor, rule.From), p.addressesOf(m, anchor, rule.To)
	for _, call := range calls {
		from, to = append(from, p.addressesOf(m, "", call.From)...), append(to, p.addressesOf(m, "", call.To)...)
	}
	for _, i := range m.Interfaces() {
		if i.Name == loopback || i.Name == p.host.Interface || !matchesInterface(rule, i.Name) {
			continue
		}
		sources := slices.Clone(from)
		for _, attached := range i.Addresses {
			sources = append(sources, neighborAddr(attached))
		}
		for _, family := range []pfconf.Family{pfconf.Inet, pfconf.Inet6} {
			if rule.Family != pfconf.AnyFamily && rule.Family != family {
				continue
			}
			for _, src := range ofFamily(sources, family) {
				for _, dst := range ofFamily(to, family) {
					if to, ok := p.routeTo(dst, i.Name); ok && to != "" && to != i.Name && src != dst {
						out = append(out, packetsFor(rule, src, dst, i.Name, to)...)
					}
				}
			}
		}
	}
	return out
}

// redirectProbes returns packets that an rdr or binat rule redirects to another host;
// their destinations include this host's own addresses. m decides which rule applies
// and what the filter makes of them.
func (p *probes) redirectProbes(m *pfsim.Machine, anchor string, rule *pfconf.Rule) []probe {
	in := *rule // with From and To as an incoming packet has them
	if rule.Action == pfconf.Binat {
		in.From, in.To = rule.To, pfconf.Endpoint{}
		if rule.Pool != nil {
			in.To.Addrs = rule.Pool.Addrs
		}
	}
	from, to := p.addressesOf(m, anchor, in.From), p.addressesOf(m, anchor, in.To)
	for _, i := range m.Interfaces() {
		for _, attached := range i.Addresses {
			from, to = append(from, neighborAddr(attached)), append([]netip.Addr{attached.Addr()}, to...)
		}
	}
	var out []probe
	for _, i := range m.Interfaces() {
		if i.Name == loopback || i.Name == p.host.Interface || !matchesInterface(rule, i.Name) {
			continue
		}
		for _, family := range []pfconf.Family{pfconf.Inet, pfconf.Inet6} {
			for _, src := range ofFamily(from, family) {
				for _, dst := range ofFamily(to, family) {
					out = append(out, p.redirected(m, packetsFor(&in, src, dst, i.Name, ""))...)
				}
			}
		}
	}
	return out
}

// redirected returns those probes that m redirects to another host, with the interface
// by which they leave.
func (p *probes) redirected(m *pfsim.Machine, all []probe) []probe {
	var out []probe
	for _, try := range all {
		m.FlushStates()
		h := m.Receive(try.packet, try.in).In
		if !h.Pass() || h.Packet.Dst == try.packet.Dst {
			continue
		}
		if to, ok := p.routeTo(h.Packet.Dst, try.in); ok && to != "" {
			try.out, try.redirected = to, &h.Packet
			out = append(out, try)
		}
	}
	return out
}

// matchesInterface reports whether a rule's "on" matches an interface.
func matchesInterface(rule *pfconf.Rule, name string) bool {
	for _, i := range rule.Interfaces {
		if (i.Name == name) == i.Not {
			return false
		}
	}
	return true
}

// addressesOf returns sample addresses that an end of a rule matches: the first and the
// last of each prefix and of each entry of a table. For any other end it returns
// addresses outside every network here and one in each attached network.
func (p *probes) addressesOf(m *pfsim.Machine, anchor string, end pfconf.Endpoint) []netip.Addr {
	var out []netip.Addr
	for _, a := range end.Addrs {
		switch {
		case a.Not:
		case a.Kind == pfconf.AddrPrefix:
			out = append(out, endsOf(a.Prefix)...)
		case a.Kind == pfconf.AddrTable:
			t, err := m.Table(anchor, a.Name)
			if err != nil {
				t, err = m.Table("", a.Name)
			}
			if err != nil {
				continue
			}
			for _, entry := range t.Addrs[:min(len(t.Addrs), maxAddresses)] {
				if !entry.Not {
					out = append(out, endsOf(entry.Prefix)...)
				}
			}
		}
	}
	if len(out) > 0 {
		return out
	}
	// The end is "any", negated, or an interface.
	out = append(out, documentationAddr(netip.IPv4Unspecified()), documentationAddr(netip.IPv6Unspecified()),
		netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("2620:fe::fe"))
	for _, i := range m.Interfaces() {
		for _, attached := range i.Addresses {
			if i.Name != loopback && i.Name != p.host.Interface {
				out = append(out, neighborAddr(attached))
			}
		}
	}
	return out
}

// endsOf returns the first and the last address of a prefix, without the network and
// broadcast addresses if it has more than two addresses.
func endsOf(p netip.Prefix) []netip.Addr {
	if p.IsSingleIP() {
		return []netip.Addr{p.Addr()}
	}
	first, b := p.Masked().Addr(), p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	if p.Bits() < first.BitLen()-1 {
		first, last = first.Next(), last.Prev()
	}
	return []netip.Addr{first, last}
}

// ofFamily returns the addresses of a family, at most [maxAddresses] of them.
func ofFamily(all []netip.Addr, family pfconf.Family) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		if isFamily(a, family) && !(a.Is6() && a.IsLinkLocalUnicast()) && !slices.Contains(out, a) && len(out) < maxAddresses {
			out = append(out, a)
		}
	}
	return out
}

// protoESP is the protocol number of ESP (RFC 4303), used as a sample of protocols
// without ports.
const protoESP pfconf.Proto = 50

// packetsFor returns a probe for each protocol that a rule matches, with ports, flags
// and an ICMP type that it matches.
func packetsFor(rule *pfconf.Rule, src, dst netip.Addr, in, out string) []probe {
	icmp, echo := pfconf.ProtoICMP, uint8(8)
	if dst.Is6() {
		icmp, echo = pfconf.ProtoICMPv6, 128
	}
	protos := rule.Protos
	if len(protos) == 0 {
		protos = []pfconf.Proto{pfconf.ProtoTCP, pfconf.ProtoUDP, icmp, protoESP}
	}
	var all []probe
	for _, proto := range protos {
		packet := pfsim.Packet{Src: src, Dst: dst, Proto: proto, Len: 8}
		switch proto {
		case pfconf.ProtoTCP:
			packet.SrcPort, packet.DstPort = portFor(rule.From.Ports, 49152), portFor(rule.To.Ports, 443)
			packet.Flags, packet.Window = pfconf.FlagSYN, 65535
			if rule.Flags != nil && rule.Flags.Mask != 0 {
				packet.Flags = rule.Flags.Set
			}
		case pfconf.ProtoUDP:
			packet.SrcPort, packet.DstPort = portFor(rule.From.Ports, 49152), portFor(rule.To.Ports, 443)
		case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
			if proto != icmp {
				continue
			}
			packet.ICMPType, packet.ICMPID = echo, 1
			if len(rule.ICMP) > 0 {
				packet.ICMPType = rule.ICMP[0].Type
			}
		}
		all = append(all, probe{packet: packet, in: in, out: out})
	}
	return all
}

// portFor returns a port that one of the comparisons matches; otherwise if there is
// none.
func portFor(ports []pfconf.Port, otherwise uint16) uint16 {
	for _, p := range ports {
		switch p.Op {
		case pfconf.Equal, pfconf.LessEqual, pfconf.GreaterEqual, pfconf.Range:
			return p.Lo
		case pfconf.Less, pfconf.Outside:
			if p.Lo > 0 {
				return p.Lo - 1
			}
			return p.Hi + 1
		case pfconf.Greater, pfconf.Inside:
			return p.Lo + 1
		case pfconf.NotEqual:
			if p.Lo == otherwise {
				return otherwise + 1
			}
		}
	}
	return otherwise
}
