package netlab

// The network that most tests run on, and the addresses of its hosts.

import (
	"fmt"
	"net/netip"
)

// Picture is the network that the product is made for. B is the host that the
// product runs on; it has an uplink, a LAN, a second network with public
// addresses, and another VPN. Every host has a route to the mesh prefixes through B, as
// an attacker would: a packet that doesn't reach a peer was blocked by B.
//
//	A ──┐                                 ┌── lan0 ── L   192.168.77.0/24
//	C ──┼── W ──────── wan0 ── B ─────────┼── pub0 ── P   203.0.113.128/26
//	D ──┘   │                             └── vpn0 ── V   198.18.0.0/16 behind it
//	        └── R ── I
//
// Every link has IPv4 and IPv6. B learns its IPv6 address and default route on
// wan0 from W's router advertisements. W also answers at 169.254.169.254 and
// fd00:ec2::254, as a cloud's metadata server does.
type Picture struct {
	Lab *Lab

	A *Host // the own peer
	B *Host // the host
	C *Host // the external peer
	D *Host // a second own peer
	L *Host // a host of B's LAN
	I *Host // a host of the internet
	P *Host // a host of the public network on B's second interface
	V *Host // the other end of another VPN of B
	W *Host // the router at B's uplink, which A, C and D are behind too
	R *Host // the internet's other router, between W and I
}

// Names of B's interfaces.
const (
	Uplink = "wan0"
	LAN    = "lan0"
	Public = "pub0"
	VPN    = "vpn0"
)

// Pair is a host's two addresses on one network.
type Pair struct{ V4, V6 netip.Addr }

func pair(v4, v6 string) Pair {
	return Pair{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// List is the pair as a list, IPv4 first.
func (p Pair) List() []netip.Addr { return []netip.Addr{p.V4, p.V6} }

// PictureAddrs are the addresses in the picture.
type PictureAddrs struct {
	BUplink, BLAN, BPublic, BVPN Pair // B on its four networks
	A, C, D                      Pair // the peers' outer addresses
	L, I, P                      Pair // the hosts beside B
	VPNPeer                      Pair // V on its link with B
	Behind                       Pair // an address behind V
	W                            Pair // W on B's uplink
	RNear                        Pair // R on its link with W, as a traceroute to I shows it
	Metadata                     Pair
}

// Addresses returns the addresses of the picture. BUplink's IPv6 address is the
// one that B makes of W's advertised prefix and its own MAC (RFC 4862, 5.5.3).
func Addresses() PictureAddrs {
	return PictureAddrs{
		BUplink:  pair("203.0.113.2", "2001:db8:1:0:0:5eff:fe00:5302"),
		BLAN:     pair("192.168.77.1", "fd77::1"),
		BPublic:  pair("203.0.113.129", "2001:db8:2::1"),
		BVPN:     pair("10.99.0.1", "fd99::1"),
		A:        pair("198.51.100.2", "2001:db8:a::2"),
		C:        pair("198.51.100.18", "2001:db8:c::2"),
		D:        pair("198.51.100.34", "2001:db8:d::2"),
		L:        pair("192.168.77.2", "fd77::2"),
		I:        pair("192.0.2.130", "2001:db8:1111::2"),
		P:        pair("203.0.113.130", "2001:db8:2::2"),
		VPNPeer:  pair("10.99.0.2", "fd99::2"),
		Behind:   pair("198.18.0.1", "2001:db8:9900::1"),
		W:        pair("203.0.113.1", "2001:db8:1::1"),
		RNear:    pair("192.0.2.2", "2001:db8:f::2"),
		Metadata: pair("169.254.169.254", "fd00:ec2::254"),
	}
}

// MeshPrefixes are the product's default mesh prefixes, IPv4 first.
func MeshPrefixes() [2]netip.Prefix {
	return [2]netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd6d:6573:6800::/48")}
}

const (
	uplinkMAC   = "02:00:5e:00:53:02"
	uplinkLocal = "fe80::5eff:fe00:5302" // uplinkMAC's modified EUI-64
)

// NewPicture builds the picture and waits until B has learned its IPv6 uplink.
func NewPicture(l *Lab) (*Picture, error) {
	p := &Picture{Lab: l}
	for _, step := range []func() error{p.addHosts, p.addLinks, p.addRoutes, p.advertise} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("build picture: %w", err)
		}
	}
	return p, nil
}

// Hosts lists the picture's hosts by name.
func (p *Picture) Hosts() []*Host {
	return []*Host{p.A, p.B, p.C, p.D, p.I, p.L, p.P, p.R, p.V, p.W}
}

func (p *Picture) addHosts() (err error) {
	for _, h := range []struct {
		name string
		host **Host
	}{
		{"A", &p.A}, {"B", &p.B}, {"C", &p.C}, {"D", &p.D}, {"L", &p.L},
		{"I", &p.I}, {"P", &p.P}, {"V", &p.V}, {"W", &p.W}, {"R", &p.R},
	} {
		if *h.host, err = p.Lab.Host(h.name); err != nil {
			return err
		}
		if h.name == "B" {
			continue
		}
		// Many probes at once mustn't exhaust a router's limit for ICMP errors.
		for _, name := range []string{"net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"} {
			if err := (*h.host).SetSysctl(name, "0"); err != nil {
				return err
			}
		}
	}
	for _, router := range []*Host{p.W, p.R} {
		for _, name := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
			if err := router.SetSysctl(name, "1"); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *Picture) addLinks() error {
	for _, link := range [][2]Port{
		{{p.B, Uplink, uplinkMAC, prefixes("203.0.113.2/26")}, {p.W, "b0", "", prefixes("203.0.113.1/26", "2001:db8:1::1/64")}},
		{{p.B, LAN, "", prefixes("192.168.77.1/24", "fd77::1/64")}, {p.L, "eth0", "", prefixes("192.168.77.2/24", "fd77::2/64")}},
		{{p.B, Public, "", prefixes("203.0.113.129/26", "2001:db8:2::1/64")}, {p.P, "eth0", "", prefixes("203.0.113.130/26", "2001:db8:2::2/64")}},
		{{p.B, VPN, "", prefixes("10.99.0.1/30", "fd99::1/64")}, {p.V, "eth0", "", prefixes("10.99.0.2/30", "fd99::2/64")}},
		{{p.A, "eth0", "", prefixes("198.51.100.2/28", "2001:db8:a::2/64")}, {p.W, "a0", "", prefixes("198.51.100.1/28", "2001:db8:a::1/64")}},
		{{p.C, "eth0", "", prefixes("198.51.100.18/28", "2001:db8:c::2/64")}, {p.W, "c0", "", prefixes("198.51.100.17/28", "2001:db8:c::1/64")}},
		{{p.D, "eth0", "", prefixes("198.51.100.34/28", "2001:db8:d::2/64")}, {p.W, "d0", "", prefixes("198.51.100.33/28", "2001:db8:d::1/64")}},
		{{p.W, "r0", "", prefixes("192.0.2.1/30", "2001:db8:f::1/64")}, {p.R, "w0", "", prefixes("192.0.2.2/30", "2001:db8:f::2/64")}},
		{{p.R, "i0", "", prefixes("192.0.2.129/25", "2001:db8:1111::1/64")}, {p.I, "eth0", "", prefixes("192.0.2.130/25", "2001:db8:1111::2/64")}},
	} {
		if err := p.Lab.Link(link[0], link[1]); err != nil {
			return err
		}
	}
	// On lo, so that W never answers a traceroute with them.
	for _, a := range prefixes("169.254.169.254/32", "fd00:ec2::254/128") {
		if err := p.W.AddAddr("lo", a); err != nil {
			return err
		}
	}
	for _, a := range prefixes("198.18.0.1/32", "2001:db8:9900::1/128") {
		if err := p.V.AddAddr("lo", a); err != nil {
			return err
		}
	}
	return nil
}

func (p *Picture) addRoutes() error {
	mesh := MeshPrefixes()
	for _, r := range []struct {
		host *Host
		via  Pair
		link string
		to   []netip.Prefix
	}{
		{p.A, pair("198.51.100.1", "2001:db8:a::1"), "", defaultRoutes},
		{p.C, pair("198.51.100.17", "2001:db8:c::1"), "", defaultRoutes},
		{p.D, pair("198.51.100.33", "2001:db8:d::1"), "", defaultRoutes},
		{p.B, pair("203.0.113.1", "::"), "", defaultRoutes[:1]},
		{p.B, pair("10.99.0.2", "fd99::2"), "", prefixes("198.18.0.0/16", "2001:db8:9900::/48")},
		{p.L, pair("192.168.77.1", "fd77::1"), "", append(defaultRoutes, mesh[:]...)},
		{p.P, pair("203.0.113.129", "2001:db8:2::1"), "", append(defaultRoutes, mesh[:]...)},
		{p.V, pair("10.99.0.1", "fd99::1"), "", append(defaultRoutes, mesh[:]...)},
		{p.I, pair("192.0.2.129", "2001:db8:1111::1"), "", append(defaultRoutes, mesh[:]...)},
		{p.R, pair("192.0.2.1", "2001:db8:f::1"), "", append(defaultRoutes, mesh[:]...)},
		{p.W, pair("192.0.2.2", "2001:db8:f::2"), "", prefixes("192.0.2.128/25", "2001:db8:1111::/64")},
		{p.W, pair("203.0.113.2", uplinkLocal), "b0", append(mesh[:], prefixes(
			"192.168.77.0/24", "fd77::/64", "203.0.113.128/26", "2001:db8:2::/64")...)},
	} {
		for _, to := range r.to {
			via := r.via.V4
			if to.Addr().Is6() {
				via = r.via.V6
			}
			if err := r.host.AddRoute(Route{To: to, Via: via, Link: r.link}); err != nil {
				return err
			}
		}
	}
	return nil
}

// advertise starts W's router advertisements and waits until B has used one.
func (p *Picture) advertise() error {
	if err := p.W.Advertise("b0", netip.MustParsePrefix("2001:db8:1::/64")); err != nil {
		return err
	}
	return p.B.waitForRoute(netip.MustParseAddr("2001:db8:1111::2"), Addresses().BUplink.V6)
}

// NarrowHop limits the packets between W and R to mtu bytes. Only traffic to the internet
// crosses that link, and only R and W can report the limit.
func (p *Picture) NarrowHop(mtu int) error {
	if err := p.W.SetMTU("r0", mtu); err != nil {
		return err
	}
	return p.R.SetMTU("w0", mtu)
}

var defaultRoutes = prefixes("0.0.0.0/0", "::/0")

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out[:len(out):len(out)]
}
