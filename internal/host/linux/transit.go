package linux

import "net/netip"

// addressTypes are what the kernel calls the destinations that this host itself
// receives (RTN_LOCAL and the following of linux/rtnetlink.h).
var addressTypes = [...]value{bits("local", 2), bits("broadcast", 3), bits("anycast", 4), bits("multicast", 5)}

var linkLocal6 = netip.MustParsePrefix("fe80::/10")

// transit drops what is neither from a peer nor to one and isn't for this host, where
// forwarding was found off, before the host routes it: at the forward hook the host
// would have answered it already, with time exceeded for a TTL of 1, with a redirect,
// or with unreachable where there is no route (ip_forward and ip_error of
// net/ipv4/ip_forward.c and route.c).
//
// A destination is the host's own where the kernel says so, and where the facts do:
// in a VRF the kernel asks another table. What other software has marked may be meant
// for a transparent proxy, which is this host, too; if it isn't, the forward hook
// drops it.
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
			// Never forwarded; neighbour discovery and router advertisements use them.
			s.accept("", within(f.dst, linkLocal6))
		}
		s.drop("transit, closed as it was found")
	}
}

// bridged accepts frames that stay on their bridge: they are no transit of this host.
func (c *compiler) bridged(f *chain) {
	for _, b := range c.bridges {
		f.accept("frames of a bridge", is(iifname, name(b)), is(oifname, name(b)))
	}
}

// secured drops what a peer sends to the internet and an IPsec policy takes, unless
// one takes the whole internet: the kernel applies a policy from its first packet on,
// before it is among the host's facts. It is asked after translation, whose source is
// what policies select by. Before Linux 5.7 a packet that leaves has no input
// interface here, and the facts alone hold.
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
