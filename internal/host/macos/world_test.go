package macos

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// world is a mesh and a Mac whose addresses are close to each other, so that their
// classes often overlap.
type world struct {
	mesh policy.Mesh
	host policy.Host
}

const meshInterface = "utun7"

// listenPort is WireGuard's port, and outsidePort the router's external port if that
// differs.
const listenPort, outsidePort = 51820, 4500

var hostAddresses = []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd6d:6573:6800::1")}

func drawWorld(t *rapid.T) world {
	w := world{
		mesh: policy.Mesh{
			Prefixes:  []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
			Addresses: hostAddresses,
			Serves:    policy.Services(rapid.IntRange(0, int(policy.EveryService)).Draw(t, "serves")),

			ListenPort: rapid.SampledFrom([]uint16{0, listenPort, listenPort}).Draw(t, "listen port"),
		},
		host: policy.Host{Interface: meshInterface},
	}
	for i := range rapid.IntRange(0, 6).Draw(t, "peers") {
		w.mesh.Peers = append(w.mesh.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(i + 1)}, Name: fmt.Sprint("p", i),
			Addresses: mesh.Addresses{
				netip.AddrFrom4([4]byte{100, 64, 0, byte(2 + i)}),
				netip.MustParseAddr(fmt.Sprintf("fd6d:6573:6800::%x", 2+i)),
			},
			Permissions: mesh.Granted(drawPermissions(t)),
		})
	}
	w.host.Forwarding, w.host.FoundForwarding = drawFamilies(t, "forwarding"), drawFamilies(t, "found")
	w.drawInterfaces(t)
	return w
}

func drawPermissions(t *rapid.T) mesh.Permissions {
	return mesh.Permissions(rapid.IntRange(0, int(everything)).Draw(t, "permissions"))
}

// drawFamilies draws both families most of the time.
func drawFamilies(t *rapid.T, label string) policy.Families {
	n := rapid.IntRange(0, 7).Draw(t, label)
	return policy.Families{IPv4: n != 0 && n != 1, IPv6: n != 0 && n != 2}
}

func (w *world) drawInterfaces(t *rapid.T) {
	rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "host"), 1))
	w.host.Interfaces = []policy.Interface{{Name: meshInterface, Addresses: prefixes("100.64.0.1/32", "fd6d:6573:6800::1/128")}}
	for i := range 1 + rng.IntN(4) {
		iface := policy.Interface{Name: fmt.Sprint("en", i)}
		if rng.IntN(6) > 0 {
			iface.Addresses = append(iface.Addresses, randomNetwork(rng, true))
		}
		if rng.IntN(6) > 0 {
			iface.Addresses = append(iface.Addresses, randomNetwork(rng, false))
		}
		if rng.IntN(6) == 0 {
			iface.Addresses = append(iface.Addresses, randomNetwork(rng, rng.IntN(2) == 0))
		}
		w.host.Interfaces = append(w.host.Interfaces, iface)
	}
	for range rng.IntN(4) {
		p := randomNetwork(rng, rng.IntN(2) == 0)
		w.host.Routes = append(w.host.Routes, policy.Route{Prefix: p.Masked(), Interface: "utun3"})
	}
	w.host.Outside, w.host.OutsidePort = nil, []uint16{0, outsidePort}[rng.IntN(2)]
	for range rng.IntN(3) {
		if a := w.randomDst(rng, rng.IntN(3) > 0); a.Zone() == "" {
			w.host.Outside = append(w.host.Outside, a)
		}
	}
	w.mesh.Former = nil
	for range rng.IntN(3) {
		if a := w.randomDst(rng, rng.IntN(3) > 0); a.IsGlobalUnicast() && a.Zone() == "" {
			w.mesh.Former = append(w.mesh.Former, a)
		}
	}
	uplinks := []string{"", "en0", "en0", "en0", "en1"}
	w.host.Uplink4 = uplinks[rng.IntN(len(uplinks))]
	w.host.Uplink6 = uplinks[rng.IntN(len(uplinks))]
	nameSources(&w.host)
}

// nameSources sets the facts' source addresses of peers' packets, as Observe does: the
// uplink's first address, for IPv6 a global one before others.
func nameSources(h *policy.Host) {
	h.Source4, h.Source6 = netip.Addr{}, netip.Addr{}
	if as := addresses(*h, h.Uplink4, pfconf.Inet); len(as) > 0 {
		h.Source4 = as[0]
	}
	as := addresses(*h, h.Uplink6, pfconf.Inet6)
	if i := slices.IndexFunc(as, func(a netip.Addr) bool { return !a.IsPrivate() }); i >= 0 {
		h.Source6 = as[i]
	} else if len(as) > 0 {
		h.Source6 = as[0]
	}
}

var (
	networks4 = prefixes("100.64.0.0/28", "100.66.0.0/16", "192.168.77.0/24", "192.168.78.0/24", "10.0.0.0/8", "203.0.113.0/24", "198.18.0.0/16", "172.16.3.0/30", "8.0.0.0/8")
	networks6 = prefixes("fd6d:6573:6800::/120", "fd00:1::/64", "2001:db8:1::/64", "2001:db8:2::/64", "2a00::/16", "fe80::/64")
)

// randomNetwork returns an address with its network's prefix length.
func randomNetwork(rng *rand.Rand, v4 bool) netip.Prefix {
	pool := networks6
	if v4 {
		pool = networks4
	}
	p := pool[rng.IntN(len(pool))]
	a := randomAddr(rng, p)
	for slices.Contains(hostAddresses, a) {
		a = randomAddr(rng, p)
	}
	return netip.PrefixFrom(a, p.Bits())
}

// randomAddr returns an address in a prefix.
func randomAddr(rng *rand.Rand, p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		mask := byte(0x80 >> (bit % 8))
		b[bit/8] = b[bit/8]&^mask | byte(rng.Uint32())&mask
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

var anywhere4 = append(prefixes("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10", "100.127.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
	"255.255.255.255/32", "192.0.0.0/24", "198.18.0.0/15", "8.8.8.8/32", "1.0.0.0/8", "0.0.0.0/0"), networks4...)

var anywhere6 = append(prefixes("::1/128", "::/128", "fe80::/10", "ff02::/16", "fc00::/7", "fd6d:6573:6800::/48", "2600::/16", "2600::/16", "::/0",
	"::/96", "100::/64", "fec0::/10", "2001::/32", "64:ff9b::/96", "64:ff9b::192.168.77.0/120", "64:ff9b::100.64.0.0/124", "64:ff9b:1::/48",
	"2002::/16", "2002:c0a8:4d00::/40", "2002:6440::/44"), networks6...)

// randomDst returns a destination: random, the host's, a peer's, or a neighbour's.
func (w *world) randomDst(rng *rand.Rand, v4 bool) netip.Addr {
	for range 10 {
		var a netip.Addr
		switch n := rng.IntN(10); {
		case n < 2 && len(w.mesh.Peers) > 0:
			a = w.peerAddr(rng, v4)
		case n < 4:
			a = w.ownAddr(rng, v4)
		case n == 4 && len(w.host.Outside) > 0:
			a = w.host.Outside[rng.IntN(len(w.host.Outside))]
		case n == 5 && len(w.mesh.Former) > 0:
			a = w.mesh.Former[rng.IntN(len(w.mesh.Former))]
		case n < 6:
			i := w.host.Interfaces[rng.IntN(len(w.host.Interfaces))]
			if len(i.Addresses) > 0 {
				a = edgeOf(rng, i.Addresses[rng.IntN(len(i.Addresses))])
			}
		case v4:
			a = randomAddr(rng, anywhere4[rng.IntN(len(anywhere4))])
		default:
			a = randomAddr(rng, anywhere6[rng.IntN(len(anywhere6))])
		}
		if a.IsValid() && a.Is4() == v4 && !a.Is4In6() {
			return a
		}
	}
	if v4 {
		return netip.MustParseAddr("9.9.9.9")
	}
	return netip.MustParseAddr("2620:fe::fe")
}

// edgeOf returns a neighbour's address in a network: the first, the last, or any.
func edgeOf(rng *rand.Rand, p netip.Prefix) netip.Addr {
	switch rng.IntN(4) {
	case 0:
		return p.Masked().Addr()
	case 1:
		b := p.Addr().AsSlice()
		for bit := p.Bits(); bit < len(b)*8; bit++ {
			b[bit/8] |= 0x80 >> (bit % 8)
		}
		a, _ := netip.AddrFromSlice(b)
		return a
	}
	return randomAddr(rng, p)
}

func (w *world) peerAddr(rng *rand.Rand, v4 bool) netip.Addr {
	as := w.mesh.Peers[rng.IntN(len(w.mesh.Peers))].Addresses
	if v4 {
		return as[0]
	}
	return as[1]
}

// ownAddr returns an address of the host, most often its mesh address.
func (w *world) ownAddr(rng *rand.Rand, v4 bool) netip.Addr {
	var all []netip.Addr
	for _, i := range w.host.Interfaces {
		for _, p := range i.Addresses {
			if p.Addr().Is4() == v4 {
				all = append(all, p.Addr())
			}
		}
	}
	if rng.IntN(2) == 0 {
		return all[0] // the mesh interface's
	}
	return all[rng.IntN(len(all))]
}

// interfaceNames returns the names of the host's interfaces except the mesh interface and
// loopback, and one that the facts don't list.
func (w *world) interfaceNames() []string {
	names := []string{"en9", "utun3"}
	for _, i := range w.host.Interfaces {
		if i.Name != meshInterface {
			names = append(names, i.Name)
		}
	}
	for _, u := range []string{w.host.Uplink4, w.host.Uplink6} {
		if u != "" && !slices.Contains(names, u) {
			names = append(names, u)
		}
	}
	return names
}

// utun3Addresses are the other VPN's own addresses, which the facts don't list.
var utun3Addresses = prefixes("172.31.9.9/32", "fd00:9::9/128")

// newMachine returns a pf simulation with the host's interfaces and a main ruleset.
func (w *world) newMachine(seed uint64, main string) (*pfsim.PF, error) {
	m := pfsim.NewPF(pfsim.Options{Rand: rand.New(rand.NewPCG(seed, 2)), StateLimit: 1 << 20})
	m.AddInterface(pfconf.Interface{Name: loopback, Addresses: prefixes("127.0.0.1/8", "::1/128")})
	w.addInterfaces(m)
	rs, err := pfconf.Parse(main)
	if err != nil {
		return nil, err
	}
	if err := m.LoadMain(rs); err != nil {
		return nil, err
	}
	return m, m.Enable()
}

// addInterfaces adds the world's interfaces to the machine, or updates their addresses.
func (w *world) addInterfaces(m *pfsim.PF) {
	for _, name := range w.interfaceNames() {
		i := pfconf.Interface{Name: name}
		if name == "utun3" {
			i.Addresses = utun3Addresses
		}
		m.AddInterface(i)
	}
	for _, i := range w.host.Interfaces {
		m.AddInterface(pfconf.Interface{Name: i.Name, Addresses: i.Addresses})
	}
}
