package pfsim_test

import (
	"fmt"
	"log"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// A host with an uplink and a tunnel translates one peer and keeps the others
// in.
func ExamplePF() {
	m := pfsim.NewPF(pfsim.Options{})
	m.AddInterface(pfconf.Interface{Name: "en0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.10/24")}})
	m.AddInterface(pfconf.Interface{Name: "utun7", Addresses: []netip.Prefix{netip.MustParsePrefix("100.64.0.1/32")}})

	main, err := pfconf.Parse(`nat-anchor "com.apple/*"
anchor "com.apple/*"
`)
	if err != nil {
		log.Fatal(err)
	}
	mesh, err := pfconf.Parse(`table <routing> persist { 100.64.0.5 }
nat on en0 inet from 100.64.0.0/10 to any -> (en0)
block return in on utun7 all label "refused"
pass in on utun7 from <routing> to any label "routing"
`)
	if err != nil {
		log.Fatal(err)
	}
	if err := m.LoadMain(main); err != nil {
		log.Fatal(err)
	}
	if err := m.LoadAnchor("com.apple/org.example.mesh", mesh); err != nil {
		log.Fatal(err)
	}
	if err := m.Enable(); err != nil {
		log.Fatal(err)
	}

	for _, peer := range []string{"100.64.0.5", "100.64.0.6"} {
		j := m.Forward(pfsim.Packet{
			Src: netip.MustParseAddr(peer), Dst: netip.MustParseAddr("198.51.100.7"),
			Proto: pfconf.ProtoUDP, SrcPort: 40000, DstPort: 53,
		}, "utun7", "en0")
		fmt.Println(peer, j.Verdict, j.In.Rule.Label, j.In.Anchor)
		if j.Verdict == pfsim.VerdictPass {
			fmt.Println("  leaves from", j.Packet().Src)
		}
	}
	fmt.Println("states:", m.StateCount(), "then", m.Advance(time.Hour))
	// Output:
	// 100.64.0.5 pass routing com.apple/org.example.mesh
	//   leaves from 192.0.2.10
	// 100.64.0.6 icmp refused com.apple/org.example.mesh
	// states: 2 then 0
}

// States outlive the rule that made them. To cut a flow, kill both directions
// after the new rules are in force.
func ExamplePF_KillStates() {
	m := pfsim.NewPF(pfsim.Options{})
	m.AddInterface(pfconf.Interface{Name: "utun7"})
	open, err := pfconf.Parse("pass all\n")
	if err != nil {
		log.Fatal(err)
	}
	closed, err := pfconf.Parse("block all\n")
	if err != nil {
		log.Fatal(err)
	}
	if err := m.LoadMain(open); err != nil {
		log.Fatal(err)
	}
	if err := m.Enable(); err != nil {
		log.Fatal(err)
	}
	flow := pfsim.Packet{
		Src: netip.MustParseAddr("100.64.0.5"), Dst: netip.MustParseAddr("100.64.0.1"),
		Proto: pfconf.ProtoUDP, SrcPort: 40000, DstPort: 53,
	}
	fmt.Println("open:", m.Receive(flow, "utun7").Verdict)
	if err := m.LoadMain(closed); err != nil {
		log.Fatal(err)
	}
	fmt.Println("closed:", m.Receive(flow, "utun7").Verdict)

	peer, any4 := netip.MustParsePrefix("100.64.0.5/32"), netip.MustParsePrefix("0.0.0.0/0")
	killed := m.KillStates(peer, netip.Prefix{}) + m.KillStates(any4, peer)
	fmt.Println("after killing", killed, "state:", m.Receive(flow, "utun7").Verdict)
	// Output:
	// open: pass
	// closed: pass
	// after killing 1 state: drop
}
