package simmac

// The compiled anchor on the simulated Mac alone, by bytes and without the product's
// guard.

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// The picture that must never leak: A and C are peers of the host, C may route
// and even reach the LAN. This Mac has the compiled anchor loaded through the
// commands and judges packets in bytes, without the guard.
var picture = struct{ host, a, c mesh.Peer }{
	host: mesh.Peer{Addresses: mesh.Addresses(addresses("100.64.0.1", "fd6d:6573:6800::1"))},
	a:    mesh.Peer{PublicKey: mesh.PublicKey{1}, Name: "a", Addresses: mesh.Addresses(addresses("100.64.0.2", "fd6d:6573:6800::2"))},
	c:    mesh.Peer{PublicKey: mesh.PublicKey{2}, Name: "c", Addresses: mesh.Addresses(addresses("100.64.0.3", "fd6d:6573:6800::3"))},
}

func addresses(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// newPicture returns the Mac with the ruleset enforced, and its tunnel's name.
func newPicture(t *testing.T, forA, forC mesh.Permissions) (*Mac, string) {
	t.Helper()
	m := newMac(t)
	_, name := newTunnel(t, m)
	n, err := darwin.Observe(m)
	must(t, err)
	host := policy.Host{Interface: name, Uplink4: "en0", Uplink6: "en0", Forwarding: policy.Families{IPv4: true, IPv6: true}}
	for _, i := range n.Interfaces {
		pi := policy.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			pi.Addresses = append(pi.Addresses, a.Prefix)
		}
		host.Interfaces = append(host.Interfaces, pi)
	}
	for _, r := range n.Routed() {
		host.Routes = append(host.Routes, policy.Route{Prefix: r.Prefix, Interface: r.Interface})
	}
	a, c := picture.a, picture.c
	a.Permissions, c.Permissions = mesh.Granted(forA), mesh.Granted(forC)
	wanted := policy.Mesh{
		Prefixes:  []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
		Addresses: picture.host.Addresses.List(),
		Peers:     []mesh.Peer{a, c},
	}
	rules, err := policy.Compile(wanted, host, time.Now())
	must(t, err)
	compiled, err := macos.Compile(rules, macos.AnchorOptions{})
	must(t, err)
	var routes []netip.Prefix
	for _, p := range []mesh.Peer{a, c} {
		for _, addr := range p.Addresses {
			routes = append(routes, netip.PrefixFrom(addr, addr.BitLen()))
		}
	}
	must(t, darwin.NewRouter(m).Set(n.Interface(name).Index, routes))
	pf := darwin.NewPF(m)
	must(t, pf.Load(t.Context(), compiled.Path, compiled.Ruleset().String()))
	_, err = pf.Enable(t.Context())
	must(t, err)
	for _, f := range []darwin.Family{darwin.IPv4, darwin.IPv6} {
		must(t, darwin.NewSysctl(m, m).SetForwarding(t.Context(), f, true))
	}
	return m, name
}

// syn is the first segment from one address to another.
func syn(src, dst netip.Addr) []byte {
	return netlab.TCPPacket(netip.AddrPortFrom(src, 40000), netip.AddrPortFrom(dst, 443), netlab.SYN, 1, 0, nil)
}

func TestPicture(t *testing.T) {
	everything := mesh.Incoming | mesh.Routing | mesh.LAN
	internet := addresses("198.51.100.9", "2001:db8:99::9")
	lan := netip.MustParseAddr("192.168.77.7")
	for _, forA := range []mesh.Permissions{0, everything} {
		for _, forC := range []mesh.Permissions{0, mesh.Routing, everything} {
			t.Run(fmt.Sprintf("A %v, C %v", forA, forC), func(t *testing.T) {
				m, tun := newPicture(t, forA, forC)
				check := func(what string, want bool, o Outcome) {
					t.Helper()
					if got := o.Fate != Dropped; got != want {
						t.Errorf("%s passes %v, want %v: %s by %q, %s", what, got, want, o.Fate, o.Link, o.Why)
					}
				}
				for i, c := range picture.c.Addresses {
					check("C to the internet", forC.Has(mesh.Routing), m.Inject(tun, syn(c, internet[i])))
					check("C to A", false, m.Inject(tun, syn(c, picture.a.Addresses[i])))
					check("A to C", false, m.Inject(tun, syn(picture.a.Addresses[i], c)))
					check("C to the host", forC.Has(mesh.Incoming), m.Inject(tun, syn(c, picture.host.Addresses[i])))
					check("C with A's source from the uplink", false, m.Inject("en0", syn(picture.a.Addresses[i], internet[i])))
					check("the internet to C", false, m.Inject("en0", syn(internet[i], c)))
					check("the LAN to the host's mesh address", false, m.Inject("en5", syn(lanOf(i), picture.host.Addresses[i])))
				}
				check("C to the LAN", forC.Has(mesh.Routing|mesh.LAN), m.Inject(tun, syn(picture.c.Addresses[0], lan)))
			})
		}
	}
}

// lanOf returns an address of a host on the LAN, of the nth family.
func lanOf(n int) netip.Addr { return addresses("192.168.77.7", "2001:db8:5::7")[n] }

// A packet goes out with the uplink's address, its answer comes back to the
// peer's, and the checksums are right on the way.
func TestPictureTranslates(t *testing.T) {
	m, tun := newPicture(t, 0, mesh.Routing)
	var wire [][]byte
	m.Wire(func(link string, b []byte) { wire = append(wire, b) })
	c, server := picture.c.Addresses[0], netip.MustParseAddr("198.51.100.9")
	if o := m.Inject(tun, syn(c, server)); o.Fate != Forwarded || o.Link != "en0" {
		t.Fatalf("%s by %q, %s", o.Fate, o.Link, o.Why)
	}
	if len(wire) != 1 {
		t.Fatalf("%d packets on the wire", len(wire))
	}
	sent, ok := netlab.ParsePacket(wire[0])
	if !ok || sent.Src != netip.MustParseAddr("203.0.113.1") || sent.Dst != server || sent.DstPort != 443 {
		t.Fatalf("on the wire: %v", sent)
	}
	want := netlab.TCPPacket(netip.AddrPortFrom(sent.Src, sent.SrcPort), netip.AddrPortFrom(server, 443), netlab.SYN, 1, 0, nil)
	if string(want) != string(wire[0]) {
		t.Errorf("on the wire\n%x\nwant\n%x", wire[0], want)
	}
	answer := netlab.TCPPacket(netip.AddrPortFrom(server, 443), netip.AddrPortFrom(sent.Src, sent.SrcPort), netlab.SYN|netlab.ACK, 9, 2, nil)
	o := m.Inject("en0", answer)
	if o.Fate != Forwarded || o.Link != tun || o.Packet.Dst != c || o.Packet.DstPort != 40000 {
		t.Errorf("the answer: %s by %q to %v:%d, %s", o.Fate, o.Link, o.Packet.Dst, o.Packet.DstPort, o.Why)
	}
}

// Without the hooks in the main ruleset the anchor is loaded and does nothing. What
// keeps the peers apart then is the guard. The simulated Mac must show the leak,
// or it would hide one.
func TestPictureWithoutHooksLeaks(t *testing.T) {
	m, tun := newPicture(t, 0, 0)
	c, a := picture.c.Addresses[0], picture.a.Addresses[0]
	if o := m.Inject(tun, syn(c, a)); o.Fate != Dropped || o.Why != "pf" {
		t.Fatalf("with hooks: %s, %s", o.Fate, o.Why)
	}
	m.FlushMain()
	if o := m.Inject(tun, syn(c, a)); o.Fate != Forwarded {
		t.Errorf("without hooks: %s, %s", o.Fate, o.Why)
	}
	m.Kernel.SetVariable("net.inet.ip.forwarding", "0")
	if o := m.Inject(tun, syn(c, a)); o.Fate != Dropped || o.Why != "not forwarding" {
		t.Errorf("without forwarding: %s, %s", o.Fate, o.Why)
	}
}

func TestWeakEndSystem(t *testing.T) {
	m := newMac(t)
	newTunnel(t, m)
	p := syn(lanOf(0), picture.host.Addresses[0])
	if o := m.Inject("en5", p); o.Fate != Dropped {
		t.Errorf("a tunnel's address on another interface, not forwarding: %s", o.Fate)
	}
	m.Kernel.SetVariable("net.inet.ip.forwarding", "1")
	if o := m.Inject("en5", p); o.Fate != Delivered {
		t.Errorf("a tunnel's address on another interface, forwarding: %s, %s", o.Fate, o.Why)
	}
	if o := m.Emit(syn(picture.host.Addresses[0], netip.MustParseAddr("198.51.100.9"))); o.Fate != Sent || o.Link != "en0" {
		t.Errorf("to the internet: %s by %q, %s", o.Fate, o.Link, o.Why)
	}
}

// Through the device as the WireGuard device uses it.
func TestTunnelDevice(t *testing.T) {
	m := newMac(t)
	d, name := newTunnel(t, m)
	n, err := darwin.Observe(m)
	must(t, err)
	must(t, darwin.NewRouter(m).Set(n.Interface(name).Index, []netip.Prefix{netip.MustParsePrefix("100.64.0.3/32")}))
	var local []byte
	m.Local(func(b []byte) { local = b })

	in := syn(picture.c.Addresses[0], picture.host.Addresses[0])
	if _, err := d.Write([][]byte{append(make([]byte, 16), in...)}, 16); err != nil {
		t.Fatal(err)
	}
	if string(local) != string(in) {
		t.Errorf("the Mac got %x", local)
	}
	if _, err := d.Write([][]byte{in}, 0); err == nil {
		t.Error("wrote without room for the family")
	}
	out := syn(picture.host.Addresses[0], picture.c.Addresses[0])
	if o := m.Emit(out); o.Fate != Sent || o.Link != name {
		t.Fatalf("%s by %q, %s", o.Fate, o.Link, o.Why)
	}
	buf, sizes := make([]byte, 2000), make([]int, 1)
	if _, err := d.Read([][]byte{buf}, sizes, 16); err != nil || string(buf[16:16+sizes[0]]) != string(out) {
		t.Errorf("the device gave %x, %v", buf[16:16+sizes[0]], err)
	}
}
