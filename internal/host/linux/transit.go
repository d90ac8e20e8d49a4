package linux

import "net/netip"

// addressTypes are the kinds of destinations that the host itself receives (RTN_LOCAL and
// the following of linux/rtnetlink.h).
var addressTypes = [...]value{bits("local", 2), bits("broadcast", 3), bits("anycast", 4), bits("multicast", 5)}

// linkLocal6 is the prefix of link-local addresses, which are never forwarded (RFC 4291
// 2.5.6).
var linkLocal6 = netip.MustParsePrefix("fe80::/10")

// transit drops packets that are neither from nor to a peer and not for this host, if
// forwarding was found off. It does so before routing, because at the forward hook the
// host would already have answered: with time exceeded for a TTL of 1, with a redirect,
// or with unreachable if there is no route (ip_forward and ip_error in
// net/ipv4/ip_forward.c and route.c).
//
// A destination is the host's own if the kernel or the facts say so: in a VRF the kernel
// looks into another table. A packet that other software marked may be meant for a
// transparent proxy on this host; if it isn't, the forward hook drops it.
func (c *compiler) transit() {
	t := c.hook("transit", "filter", "prerouting", afterDNAT)
	t.accept("", is(iifname, name("lo")))
	t.accept("", is(iifname, c.mesh))
	for _, b := range c.bridges {
		t.accept("frames of a bridge", is(iifname, name(b)))
	}
	for _, f := range families {
		if c.foundForwarding(f) {
			continue
		}
		t.branch("transit"+f.suffix, is(nfproto, f.proto), is(mark, bits("0", 0)), notIn("transit"+f.suffix, iifname))
		s := c.chain("transit" + f.suffix)
		for _, local := range addressTypes {
			s.accept("", is(destinationType, local))
		}
		s.accept("", in("self"+f.suffix, f.dst))
		s.accept("answers to peers", in("peers"+f.suffix, f.dst))
		if f.suffix == "6" {
			// Never forwarded; used by neighbour discovery and router advertisements.
			s.accept("", within(f.dst, linkLocal6))
		}
		s.drop("transit, closed as it was found")
	}
}

// bridged accepts frames that stay on their bridge, which the host doesn't forward
// itself.
func (c *compiler) bridged(f *chain) {
	for _, b := range c.bridges {
		f.accept("frames of a bridge", is(iifname, name(b)), is(oifname, name(b)))
	}
}

// dropIPsec drops what a peer sends to the internet if an IPsec policy applies to it,
// unless a policy covers the whole internet. The kernel applies a new policy at once,
// before it is among the observed facts. The check comes after translation, because
// policies select by the translated source. Before Linux 5.7 a leaving packet has no
// input interface here, and the facts alone hold.
func (c *compiler) dropIPsec(to *chain) {
	if !c.ipsec {
		return
	}
	byIPsec := c.host.InternetByIPsec()
	for _, f := range families {
		if f.suffix == "4" && byIPsec.IPv4 || f.suffix == "6" && byIPsec.IPv6 {
			continue
		}
		to.drop("internet, by an IPsec policy", is(iifname, c.mesh), notIn("lan"+f.suffix, f.dst), exists(rtIPsec))
	}
}
