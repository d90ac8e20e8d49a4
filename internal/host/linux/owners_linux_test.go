package linux

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Addresses of removed peers.
var (
	gone4 = netip.MustParseAddr("100.64.0.77")
	gone6 = netip.MustParseAddr("fd6d:6573:6800::77")
	// moved4 was a peer's address when the mesh had another prefix.
	moved4 = netip.MustParseAddr("10.213.0.77")
)

// resolver4 is a cloud's resolver in the mesh prefix.
var resolver4 = netip.MustParseAddr("100.100.2.136")

// meshPort is WireGuard's port on the host.
const meshPort = 51820

// ip runs ip(8) on a host, one command per line.
func (g *rig) ip(h *netlab.Host, commands string) {
	g.t.Helper()
	for line := range strings.Lines(commands) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		err := h.Do(func() error {
			out, err := exec.Command("ip", words...).CombinedOutput()
			if err != nil {
				g.t.Logf("ip %s: %s", strings.TrimSpace(line), out)
			}
			return err
		})
		if err != nil {
			g.t.Fatal(err)
		}
	}
}

// hostSendsTo sends a datagram from a port of the host, 0 for any. A packet that the
// filter drops may come back as an error.
func (w *world) hostSendsTo(dst netip.Addr, port int, b []byte) {
	w.t.Helper()
	w.do(func() error {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		if err != nil {
			return err
		}
		_, _ = conn.WriteToUDPAddrPort(b, netip.AddrPortFrom(dst, 4242))
		return conn.Close()
	})
}

// ownersMesh is a mesh with two peers and a removed one.
func ownersMesh() policy.Mesh {
	m := meshOf(grants{ann: all, bob: all})
	m.Former, m.ListenPort = []netip.Addr{gone4, gone6, moved4}, meshPort
	return m
}

// TestOwners gives a part of the mesh prefix to another owner, as other software and
// networks do, and sends packets there and around it.
func TestOwners(t *testing.T) {
	a := netlab.Addresses()
	addr := netip.MustParseAddr
	reach := func(where string, dsts ...string) (out []struct{ dst, where string }) {
		for _, d := range dsts {
			out = append(out, struct{ dst, where string }{d, where})
		}
		return out
	}
	for _, tt := range []struct {
		name      string
		commands  string // commands of ip(8) on the host
		resolvers string
		reaches   []struct{ dst, where string }
		refused   string // besides those of peers and removed peers
		// arrives is a source whose packets reach the host's address at on the VPN's
		// link.
		arrives, at string
	}{
		{
			name: "no other owner",
			refused: `100.101.2.3 100.100.100.100 100.100.2.136 100.127.0.1
				fd6d:6573:6800::53 fd6d:6573:6800:ffff::1`,
		},
		{
			name: "another VPN's peers in a table of their own, as Tailscale has them",
			commands: `addr add 100.99.1.1/32 dev vpn0
				addr add fd6d:6573:6800:99::1/128 dev vpn0
				route add 100.101.2.3/32 via ` + a.VPNPeer.V4.String() + ` dev vpn0 table 52
				route add 100.100.100.100/32 via ` + a.VPNPeer.V4.String() + ` dev vpn0 table 52
				-6 route add fd6d:6573:6800:99::/64 via ` + a.VPNPeer.V6.String() + ` dev vpn0 table 52
				rule add pref 5270 table 52
				-6 rule add pref 5270 table 52`,
			reaches: reach(netlab.VPN, "100.101.2.3", "100.100.100.100", "fd6d:6573:6800:99::5"),
			refused: "100.101.2.4 fd6d:6573:6800:98::5",
			arrives: "100.101.2.3", at: "100.99.1.1",
		},
		{
			name: "a VPN whose network has peers inside, as NetBird has it",
			commands: `route add 100.64.0.0/16 via ` + a.VPNPeer.V4.String() + ` dev vpn0
				addr add 100.64.9.9/32 dev vpn0`,
			reaches: reach(netlab.VPN, "100.64.0.99", "100.64.200.1"),
			refused: "100.65.0.1",
			arrives: "100.64.200.1", at: "100.64.9.9",
		},
		{
			name:     "a carrier's uplink, with its gateway and servers outside the attached prefix",
			commands: "addr add 100.80.0.7/20 dev wan0",
			reaches:  reach(netlab.Uplink, "100.80.255.1", "100.127.0.1", "100.64.0.99"),
			refused:  "fd6d:6573:6800::53",
		},
		{
			name:      "a cloud's resolver by the default route",
			resolvers: "nameserver 100.100.2.136\nnameserver fd6d:6573:6800::53\n",
			reaches:   reach(netlab.Uplink, "100.100.2.136", "fd6d:6573:6800::53"),
			refused:   "100.100.2.137 fd6d:6573:6800::54",
		},
		{
			name:     "a cloud's resolver by a route of its own",
			commands: "route add 100.100.2.136/32 via " + a.VPNPeer.V4.String() + " dev vpn0",
			reaches:  reach(netlab.VPN, "100.100.2.136"),
			refused:  "100.100.2.137",
		},
		{
			name: "pods",
			commands: `route add 100.96.1.5/32 via ` + a.L.V4.String() + ` dev lan0
				route add 100.96.2.0/24 via ` + a.L.V4.String() + ` dev lan0`,
			reaches: reach(netlab.LAN, "100.96.1.5", "100.96.2.77"),
			refused: "100.96.1.6",
		},
		{
			name: "a route around the mesh prefix",
			commands: `route add 100.0.0.0/8 via ` + a.VPNPeer.V4.String() + ` dev vpn0
				route add blackhole 100.120.0.0/16`,
			reaches: reach(netlab.VPN, "100.127.0.1"),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.open()
			defer w.close()
			w.ip(w.pic.B, tt.commands)
			if err := os.WriteFile(w.resolvers(), []byte(tt.resolvers), 0o644); err != nil {
				t.Fatal(err)
			}
			r := w.enforce(ownersMesh())
			n := 0
			var want, all [][]byte
			expect := map[string]string{} // expected place of each word
			about := map[string]netip.Addr{}
			routed := true
			send := func(dst netip.Addr, port int, where string) {
				n++
				b := word(n)
				expect[string(b)], about[string(b)] = where, dst
				if all = append(all, b); where != "" {
					want = append(want, b)
				}
				w.hostSendsTo(dst, port, b)
				if v := r.FromHost(policy.Packet{Src: own4, Dst: dst, Proto: policy.ProtoUDP, SrcPort: uint16(port)}); dst.Is4() && routed && v.Pass != (where != "") {
					t.Errorf("the policy says of %v: %+v", dst, v)
				}
			}
			for _, x := range tt.reaches {
				send(addr(x.dst), 0, x.where)
			}
			for _, d := range strings.Fields(tt.refused) {
				send(addr(d), 0, "")
			}
			for _, d := range []netip.Addr{bob4, bob6} {
				send(d, 0, "mesh")
			}
			if report := w.inspect(r); len(report.Drift) > 0 {
				t.Errorf("drift: %v", report.Drift)
			}
			// Without any route into the mesh, nothing leaves unencrypted.
			w.ip(w.pic.B, "route del "+bob4.String()+" dev "+meshName+"\n-6 route del "+bob6.String()+" dev "+meshName)
			routed = false
			for _, d := range []netip.Addr{bob4, bob6, gone4, gone6, moved4} {
				send(d, 0, "")
			}
			// A peer can't reach another owner's part.
			for _, x := range tt.reaches {
				n++
				src := ann4
				if addr(x.dst).Is6() {
					src = ann6
				}
				expect[string(word(n))], about[string(word(n))] = "", addr(x.dst)
				all = append(all, word(n))
				w.inject(netlab.UDPPacket(netip.AddrPortFrom(src, 1), netip.AddrPortFrom(addr(x.dst), 2), word(n)))
			}
			if tt.arrives != "" {
				n++
				expect[string(word(n))], about[string(word(n))] = "host", addr(tt.arrives)
				all, want = append(all, word(n)), append(want, word(n))
				w.send(netlab.VPN, netlab.UDPPacket(netip.AddrPortFrom(addr(tt.arrives), 1), netip.AddrPortFrom(addr(tt.at), 2), word(n)))
			}
			w.settle(want)
			for _, b := range all {
				got, where := w.arrivals(b), expect[string(b)]
				if where == "" && len(got) > 0 || where != "" && (len(got) != 1 || got[0].where != where) {
					t.Errorf("%v: came out at %v, want %q", about[string(b)], got, where)
				}
			}
		})
	}
}

// TestWireGuardsOwn checks that WireGuard's own packets pass in both directions, whatever
// a peer's endpoint is, and that no other program's packets pass because of that.
func TestWireGuardsOwn(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	a := netlab.Addresses()
	w.enforce(ownersMesh())
	outer := netip.MustParseAddr("100.90.5.2")
	n := 0
	next := func() []byte { n++; return word(n) }
	check := func(what string, b []byte, where string) {
		t.Helper()
		if where != "" {
			w.settle([][]byte{b})
		} else {
			w.settle(nil)
		}
		got := w.arrivals(b)
		if where == "" && len(got) > 0 || where != "" && (len(got) != 1 || got[0].where != where) {
			t.Errorf("%s: came out at %v, want %q", what, got, where)
		}
	}
	for _, dst := range []netip.Addr{outer, gone4, gone6, netip.MustParseAddr("fd6d:6573:6800:90::2")} {
		b := next()
		w.hostSendsTo(dst, meshPort, b)
		check("WireGuard to "+dst.String(), b, netlab.Uplink)
		b = next()
		w.hostSendsTo(dst, meshPort+1, b)
		check("another port to "+dst.String(), b, "")
		b, at := next(), a.BUplink.V4
		if dst.Is6() {
			at = a.BUplink.V6
		}
		w.send(netlab.Uplink, netlab.UDPPacket(netip.AddrPortFrom(dst, 9), netip.AddrPortFrom(at, meshPort), b))
		check("to WireGuard from "+dst.String(), b, "host")
		// A forwarded packet has the port but no socket.
		b = next()
		w.send(netlab.LAN, netlab.UDPPacket(netip.AddrPortFrom(a.L.List()[len(dst.AsSlice())/16], meshPort), netip.AddrPortFrom(dst, 9), b))
		check("forwarded to "+dst.String(), b, "")
	}
	for i, peer := range []netip.Addr{bob4, bob6} {
		// The tunnel doesn't carry itself, in either direction.
		b := next()
		w.hostSendsTo(peer, meshPort, b)
		check("WireGuard to a peer's mesh address", b, "")
		for _, at := range []netip.Addr{[]netip.Addr{own4, own6}[i], a.BUplink.List()[i], a.BLAN.List()[i]} {
			b = next()
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(peer, 9), netip.AddrPortFrom(at, meshPort), b))
			check("a peer to WireGuard at "+at.String(), b, "")
			b = next()
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(peer, 9), netip.AddrPortFrom(at, meshPort+1), b))
			check("a peer to another port at "+at.String(), b, "host")
		}
		b = next()
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(peer, 9), netip.AddrPortFrom(a.I.List()[i], meshPort), b))
		check("a peer to another host's WireGuard", b, netlab.Uplink)
	}
	// Another user may get the port while the helper is down, or at an address of its
	// own. The thread with that user's IDs is discarded.
	b := next()
	w.do(func() error {
		if err := unix.Setfsuid(65534); err != nil {
			return err
		}
		conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: meshPort})
		if err != nil {
			return err
		}
		_, _ = conn.WriteToUDPAddrPort(b, netip.AddrPortFrom(outer, 4242))
		return conn.Close()
	})
	check("another user from WireGuard's port", b, "")
}

// TestLoopbackAliases checks that sockets at addresses of the loopback interface are the
// host's: for peers with incoming, and for the host itself.
func TestLoopbackAliases(t *testing.T) {
	const alias4, alias6 = "10.254.254.254", "fd10:254::254"
	w := newWorld(t)
	w.findForwarding("0")
	w.open()
	defer w.close()
	w.ip(w.pic.B, "addr add "+alias4+"/32 dev lo\n-6 addr add "+alias6+"/128 dev lo\naddr add 203.0.113.200/32 dev lo")
	r := w.enforce(meshOf(grants{ann: mesh.Routing | mesh.LAN, bob: mesh.Incoming}))
	n := 0
	for _, text := range []string{alias4, alias6, "203.0.113.200"} {
		dst := netip.MustParseAddr(text)
		if got := r.Class(dst); got != policy.Self {
			t.Errorf("%v is %v", dst, got)
		}
		pair := []netip.Addr{ann4, bob4}
		if dst.Is6() {
			pair = []netip.Addr{ann6, bob6}
		}
		for i, src := range pair {
			n++
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(src, 1), netip.AddrPortFrom(dst, 2), word(n)))
			want := [][]byte{word(n)}
			if i == 0 {
				want = nil
			}
			w.settle(want)
			if got := w.arrivals(word(n)); len(got) != len(want) || len(got) == 1 && got[0].where != "host" {
				t.Errorf("%v to %v: came out at %v", src, dst, got)
			}
		}
		n++
		w.hostSendsTo(dst, 0, word(n))
		w.settle([][]byte{word(n)})
		if got := w.arrivals(word(n)); len(got) != 1 || got[0].where != "host" {
			t.Errorf("the host to %v: came out at %v", dst, got)
		}
	}
}

// TestOddInterfaceNames has an interface whose name can't be written in a rule: its part
// of the mesh prefix still belongs to its owner, and its attached networks aren't
// internet.
func TestOddInterfaceNames(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	nl := w.pic.B.Netlink()
	link, err := nl.LinkByName(netlab.LAN)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{nl.LinkSetDown(link), nl.LinkSetName(link, "ev\x1b[31m"), nl.LinkSetUp(link)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	odd, neighbour := netip.MustParsePrefix("100.70.0.1/16"), netip.MustParseAddr("100.70.0.2")
	if err := nl.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: odd.Addr().AsSlice(), Mask: net.CIDRMask(16, 32)}}); err != nil {
		t.Fatal(err)
	}
	w.ip(w.pic.L, "addr add 100.70.0.2/16 dev eth0")
	r := w.enforce(meshOf(grants{ann: mesh.Routing, bob: all}))
	if h := r.Host(); h.Uplink4 != netlab.Uplink {
		t.Errorf("the uplink is %q", h.Uplink4)
	}
	lan := netlab.Addresses().L.V4
	if r.Class(lan) != policy.OnLAN || r.Class(netlab.Addresses().BLAN.V4) != policy.Self || !r.IsOthers(neighbour) || len(r.Overlaps()) == 0 {
		t.Errorf("classes %v and %v, others' %v, overlaps %v", r.Class(lan), r.Class(netlab.Addresses().BLAN.V4), r.IsOthers(neighbour), r.Overlaps())
	}
	w.hostSendsTo(neighbour, 0, word(1))
	w.settle([][]byte{word(1)})
	if got := w.arrivals(word(1)); len(got) != 1 || got[0].where != netlab.LAN {
		t.Errorf("the host's own packet came out at %v", got)
	}
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 20000), netip.AddrPortFrom(lan, 9), word(2)))
	w.settle([][]byte{word(2)})
	if got := w.arrivals(word(2)); len(got) > 0 {
		t.Errorf("a packet of a peer without lan came out at %v", got)
	}
	// It can't be the uplink, because no rule could let peers' packets out there.
	w.ip(w.pic.B, "route del default via "+netlab.Addresses().W.V4.String()+" dev wan0")
	if err := nl.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: neighbour.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	if h := w.enforce(meshOf(grants{ann: mesh.Routing})).Host(); h.Uplink4 != "" {
		t.Errorf("the uplink is %q", h.Uplink4)
	}
}

// TestOtherProtocols has peers with every permission send protocols other than TCP, UDP
// and ICMP, and the host send them to peers.
func TestOtherProtocols(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all, bob: all}))
	a := netlab.Addresses()
	seen := make(chan netlab.Packet, 100)
	for _, h := range []*netlab.Host{w.pic.W, w.pic.L} {
		watch, err := h.Watch(func(p netlab.Packet) bool {
			if !p.Out && slices.Contains([]uint8{0, 41, 47, 50, 51, 132, 136}, p.Proto) {
				seen <- p
			}
			return false
		})
		if err != nil {
			t.Fatal(err)
		}
		w.watches = append(w.watches, watch)
	}
	for _, proto := range []uint8{4, 41, 47, 50, 51, 132, 136, policy.ProtoICMPv6} {
		for _, dst := range []netip.Addr{a.I.V4, a.L.V4, own4, bob4} {
			w.inject(netlab.IPPacket(ann4, dst, proto, make([]byte, 24)))
		}
	}
	for _, proto := range []uint8{4, 41, 47, 50, 132, 136, policy.ProtoICMP} {
		for _, dst := range []netip.Addr{a.I.V6, a.L.V6, own6, bob6} {
			w.inject(netlab.IPPacket(ann6, dst, proto, make([]byte, 24)))
		}
	}
	w.do(func() error {
		conn, err := net.ListenPacket("ip4:47", "0.0.0.0")
		if err != nil {
			return err
		}
		_, _ = conn.WriteTo([]byte("word99999999"), &net.IPAddr{IP: ann4.AsSlice()})
		// The host may send anything to other destinations.
		if _, err = conn.WriteTo([]byte("word99999998"), &net.IPAddr{IP: a.L.V4.AsSlice()}); err != nil {
			return err
		}
		return conn.Close()
	})
	var first netlab.Packet
	select {
	case first = <-seen:
	case <-time.After(10 * time.Second):
	}
	w.settle(nil)
	if first.Proto != 47 || first.Src != a.BLAN.V4 || len(seen) > 0 {
		t.Errorf("came out: %v and %d more", first, len(seen))
	}
	w.rig.mu.Lock()
	defer w.rig.mu.Unlock()
	for _, b := range w.out {
		if p, ok := netlab.ParsePacket(b); ok && p.Proto != policy.ProtoICMP && p.Proto != policy.ProtoICMPv6 {
			t.Errorf("to the mesh: %v", p)
		}
	}
}

// TestLastingAddresses gives the uplink addresses that may be told to others, and each
// kind of those that may not: the router anycast address of each prefix, which the kernel
// answers to while the host forwards, and temporary, deprecated and tentative ones.
func TestLastingAddresses(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	a := netlab.Addresses()
	// The kernel adds a temporary address to one with mngtmpaddr. An address with this
	// many probes stays tentative for 255 s.
	g.ip(g.pic.B, "-6 addr add 2001:db8:5::5/64 dev wan0 nodad\n"+
		"-6 addr add 2001:db8:6::6/64 dev wan0 nodad preferred_lft 0 valid_lft 1000\n"+
		"addr add 203.0.113.198/24 dev wan0\n"+
		"addr add 203.0.113.197/24 dev wan0 preferred_lft 0 valid_lft 1000")
	g.do(func() error {
		for name, value := range map[string]string{"use_tempaddr": "2", "dad_transmits": "255", "accept_dad": "1"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/wan0/"+name, []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	})
	g.ip(g.pic.B, "-6 addr add 2001:db8:7::7/64 dev wan0\n"+
		"-6 addr add 2001:db8:8:0:5054:ff:fe12:3456/64 dev wan0 nodad mngtmpaddr preferred_lft 1000 valid_lft 2000")
	var h policy.Host
	g.do(func() (err error) { h, err = g.p.Observe(context.Background()); return err })
	want := []netip.Addr{a.BUplink.V4, netip.MustParseAddr("203.0.113.198"), a.BUplink.V6,
		netip.MustParseAddr("2001:db8:5::5"), netip.MustParseAddr("2001:db8:8:0:5054:ff:fe12:3456")}
	slices.SortFunc(want, netip.Addr.Compare)
	if !slices.Equal(h.Lasting, want) {
		t.Errorf("lasting %v, want %v", h.Lasting, want)
	}
	// All kinds exist, and are the host's for everything else.
	own := map[netip.Addr]bool{}
	temporary := false
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			own[p.Addr()] = true
			temporary = temporary || netip.MustParsePrefix("2001:db8:8::/64").Contains(p.Addr()) &&
				p.Addr() != netip.MustParseAddr("2001:db8:8::") && p.Addr() != netip.MustParseAddr("2001:db8:8:0:5054:ff:fe12:3456")
		}
	}
	for _, one := range []string{"2001:db8:5::", "2001:db8:6::6", "2001:db8:7::7", "203.0.113.197"} {
		if !own[netip.MustParseAddr(one)] {
			t.Errorf("%s isn't the host's", one)
		}
	}
	if !temporary {
		t.Error("the kernel made no temporary address")
	}
}

// TestUplinkFacts checks the uplink's source and router, and the resolvers.
func TestUplinkFacts(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	a := netlab.Addresses()
	facts := func() (h policy.Host) {
		g.do(func() (err error) { h, err = g.p.Observe(context.Background()); return err })
		return h
	}
	if err := os.WriteFile(g.resolvers(), []byte("nameserver 9.9.9.9\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	h := facts()
	if h.Source4 != a.BUplink.V4 || h.Source6 != a.BUplink.V6 || h.Router4 != a.W.V4 || !h.Router6.IsLinkLocalUnicast() ||
		!slices.Equal(h.Resolvers, []netip.Addr{netip.MustParseAddr("9.9.9.9")}) {
		t.Errorf("source %v %v, router %v %v, resolvers %v", h.Source4, h.Source6, h.Router4, h.Router6, h.Resolvers)
	}
	// A route's preferred source wins over the kernel's choice.
	g.ip(g.pic.B, "addr add 203.0.113.199/32 dev wan0\nroute replace default via "+a.W.V4.String()+" dev wan0 src 203.0.113.199")
	if h = facts(); h.Source4 != netip.MustParseAddr("203.0.113.199") {
		t.Errorf("source %v", h.Source4)
	}
	g.ip(g.pic.B, "route del default")
	if h = facts(); h.Source4.IsValid() || h.Router4.IsValid() || h.Uplink4 != "" {
		t.Errorf("without an uplink: %q, source %v, router %v", h.Uplink4, h.Source4, h.Router4)
	}
}

// TestNexthops has a default route that only refers to a nexthop object, or to a group of
// them.
func TestNexthops(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	a := netlab.Addresses()
	if err := g.pic.B.SetSysctl("net.ipv4.nexthop_compat_mode", "0"); err != nil {
		t.Skip("this kernel has no nexthops of their own:", err)
	}
	for _, tt := range []struct{ about, commands string }{
		{"one", "nexthop add id 7 via " + a.W.V4.String() + " dev wan0\nroute replace default nhid 7\nroute add 198.19.0.0/16 nhid 7"},
		{"a group", "nexthop add id 8 group 7\nroute replace default nhid 8"},
	} {
		g.ip(g.pic.B, tt.commands)
		var h policy.Host
		g.do(func() (err error) { h, err = g.p.Observe(context.Background()); return err })
		if h.Uplink4 != netlab.Uplink || h.Router4 != a.W.V4 || h.Source4 != a.BUplink.V4 {
			t.Errorf("%s: uplink %q, router %v, source %v", tt.about, h.Uplink4, h.Router4, h.Source4)
		}
		if !slices.Contains(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("198.19.0.0/16"), Interface: netlab.Uplink}) {
			t.Errorf("%s: routes %v", tt.about, h.Routes)
		}
	}
}

// TestNexthopsOfIPv6 has default routes that refer to IPv6 nexthops: for IPv6, and for
// IPv4 by a router with an IPv6 address (RFC 5549).
func TestNexthopsOfIPv6(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	if err := g.pic.B.SetSysctl("net.ipv4.nexthop_compat_mode", "0"); err != nil {
		t.Skip("this kernel has no nexthops of their own:", err)
	}
	g.ip(g.pic.B, `nexthop add id 9 via fe80::77 dev wan0
		route replace default nhid 9
		-6 route add default nhid 9 metric 10`)
	var h policy.Host
	g.do(func() (err error) { h, err = g.p.Observe(context.Background()); return err })
	if err := h.Validate(); err != nil || h.Uplink4 != netlab.Uplink || h.Uplink6 != netlab.Uplink || h.Router6 != netip.MustParseAddr("fe80::77") {
		t.Errorf("uplinks %q and %q, router %v: %v", h.Uplink4, h.Uplink6, h.Router6, err)
	}
	g.ip(g.pic.B, `nexthop add id 10 dev vpn0
		route replace default nhid 10`)
	g.do(func() (err error) { h, err = g.p.Observe(context.Background()); return err })
	if h.Uplink4 != netlab.VPN {
		t.Errorf("by an interface alone: %q", h.Uplink4)
	}
}
