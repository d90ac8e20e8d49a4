package macos

import (
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/hosttest"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// TestSuite runs the suite of all hosts on a simulated Mac.
func TestSuite(t *testing.T) {
	hosttest.Run(t, hosttest.Harness{New: newComputer, Steps: Steps})
}

// newComputer returns a simulated Mac for the suite. It has no sockets of its own.
func newComputer(t *testing.T) *hosttest.Computer {
	g := &rig{t: t, mac: simmac.New(simmac.Options{Seed: 1}), dir: t.TempDir()}
	g.must(g.mac.AddEthernet("en0", []string{"203.0.113.1/24", "2001:db8:1::1/64"}, "203.0.113.254", "2001:db8:1::fe"))
	g.must(g.mac.AddEthernet("en5", []string{"192.168.77.1/24", "2001:db8:77::1/64"}))
	m := testMesh(2, everything)
	var dev tun.Device
	return &hosttest.Computer{
		Start: func(step func(string)) (host.Host, error) {
			s := simmac.NewStepper(g, g.mac, step)
			p, err := New(Options{StateDir: g.dir, Runner: s, Kernel: s, Step: s.Step, CreateTUN: func(name string, mtu int) (tun.Device, error) {
				var err error
				dev, err = g.mac.CreateTUN(name, mtu)
				return dev, err
			}})
			if err != nil {
				return host.Host{}, err
			}
			g.p = p
			t.Cleanup(func() { p.cuts.save(time.Minute) }) // before the directory is removed
			return p.Host(), nil
		},
		Kill: func() {
			if dev != nil {
				dev.Close()
			}
		},
		Interface: host.Interface{MTU: 1420, Addresses: m.Addresses, Prefixes: m.Prefixes},
		Peers:     [2]mesh.Addresses{m.Peers[0].Addresses, m.Peers[1].Addresses},
		Neighbours: map[string][]netip.Addr{
			"en0": {addrOf("203.0.113.9"), addrOf("2001:db8:1::9")}, "en5": {addrOf("192.168.77.9"), addrOf("2001:db8:77::9")},
		},
		Destinations: []netip.Addr{
			addrOf("9.9.9.9"), addrOf("2620:fe::fe"), addrOf("192.168.77.9"), addrOf("2001:db8:77::9"), addrOf("192.168.77.1"),
			addrOf("203.0.113.1"), addrOf("2001:db8:1::1"), addrOf("100.64.9.9"), addrOf("fd6d:6573:6800::99"),
		},
		Send: func(packets []host.Packet, _ []bool) []bool {
			out := make([]bool, len(packets))
			for i, p := range packets {
				one := pfsim.Packet{Src: p.Src, Dst: p.Dst, Proto: pfconf.Proto(p.Proto), SrcPort: p.SrcPort, DstPort: p.DstPort, Flags: pfconf.FlagSYN, Seq: 1000, Window: 65535}
				fate := g.mac.Receive(one, p.In).Fate
				out[i] = fate == simmac.Forwarded || fate == simmac.Delivered
			}
			return out
		},
		State: func() string {
			state := g.mac.Dump()
			if g.journalExists() {
				state += "a journal\n"
			}
			return state
		},
		Blind: func() func() {
			g.p.pf = darwin.NewPF(badRunner{g, true, func(string) bool { return true }})
			return func() { g.p.pf = darwin.NewPF(g) }
		},
		StopPeers: func() (func() error, error) {
			const path = "com.apple/100.other"
			undo := func() error { g.mac.FlushAnchor(path); return nil }
			return undo, g.mac.LoadAnchor(path, "block drop in quick on "+g.p.name+" all\n")
		},
		Changes: map[string]func() error{
			"the anchor is flushed":    func() error { g.mac.FlushAnchor(g.p.path); return nil },
			"the anchor is replaced":   func() error { return g.mac.LoadAnchor(g.p.path, "pass all\n") },
			"the packet filter is off": func() error { g.mac.PF.Disable(); return nil },
			"IPv4 forwarding is off":   func() error { g.mac.Kernel.SetVariable("net.inet.ip.forwarding", "0"); return nil },
			"IPv6 forwarding is off":   func() error { g.mac.Kernel.SetVariable("net.inet6.ip6.forwarding", "0"); return nil },
			"an address is deleted":    func() error { return g.mac.Kernel.RemoveAddress(g.p.name, addrOf("100.64.0.1")) },
			"a route is deleted":       func() error { return g.mac.Kernel.DeleteRoute(netip.MustParsePrefix(first + "/32")) },
		},
	}
}
