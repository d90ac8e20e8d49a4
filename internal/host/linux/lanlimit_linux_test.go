package linux

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestNewHostsAreBounded has peers with lan send to thousands of unused addresses of an
// attached network. The kernel's neighbour table, which everything shares, keeps room for
// the host, and one peer's flood costs another nothing.
func TestNewHostsAreBounded(t *testing.T) {
	for family := range 2 {
		t.Run([]string{"IPv4", "IPv6"}[family], func(t *testing.T) {
			w := newWorld(t)
			wide := []string{"172.20.0.1/16", "fd20::1/64"}[family]
			if err := w.pic.B.AddAddr(netlab.LAN, netip.MustParsePrefix(wide)); err != nil {
				t.Fatal(err)
			}
			w.open()
			defer w.close()
			many := crowd(30)
			for i := range many.Peers {
				many.Peers[i].Permissions = mesh.Granted(mesh.Routing | mesh.LAN)
			}
			w.enforce(many)
			to := netip.MustParseAddr([]string{"172.20.1.0", "fd20::1:0"}[family])
			search := func(from netip.Addr, hosts int) {
				for i := range hosts {
					to = to.Next()
					w.inject(netlab.UDPPacket(netip.AddrPortFrom(from, uint16(4000+i)), netip.AddrPortFrom(to, 5000), word(1)))
				}
			}
			search(many.Peers[0].Addresses[family], 3000)
			one := w.neighbours(t, family)
			if one > 500 {
				t.Errorf("one peer fills %d entries of the kernel's table of neighbours", one)
			}
			a := netlab.Addresses()
			l := a.L.List()[family]
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(many.Peers[1].Addresses[family], 4000), netip.AddrPortFrom(l, 5000), word(2)))
			w.settle([][]byte{word(2)})
			if got := w.arrivals(word(2)); len(got) != 1 {
				t.Errorf("while one peer searches, another's packet arrives at %v", got)
			}
			for _, p := range many.Peers {
				search(p.Addresses[family], 200)
			}
			all := w.neighbours(t, family)
			if all > 900 {
				t.Errorf("all peers fill %d entries", all)
			}
			// The host itself has to resolve L again.
			w.forgetNeighbours(t, l)
			w.hostSendsTo(l, 0, word(3))
			w.settle([][]byte{word(3)})
			if got := w.arrivals(word(3)); len(got) != 1 {
				t.Errorf("while peers search, the host's packet arrives at %v", got)
			}
			t.Logf("%d entries of one peer that sends to 3000 addresses, %d of 30", one, all)
		})
	}
}

// neighbours counts the host's neighbour entries on the LAN.
func (w *world) neighbours(t *testing.T, family int) int {
	t.Helper()
	l, err := w.pic.B.Netlink().LinkByName(netlab.LAN)
	if err != nil {
		t.Fatal(err)
	}
	list, err := w.pic.B.Netlink().NeighList(l.Attrs().Index, []int{netlink.FAMILY_V4, netlink.FAMILY_V6}[family])
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// forgetNeighbours deletes the neighbour entries of an address.
func (w *world) forgetNeighbours(t *testing.T, a netip.Addr) {
	t.Helper()
	nl := w.pic.B.Netlink()
	list, err := nl.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range list {
		if addrOf(n.IP) == a {
			if err := nl.NeighDel(&n); err != nil {
				t.Fatal(err)
			}
		}
	}
}
