package simmac

// The path of one packet through the Mac: pf, the routing table, an interface.

import (
	"net/netip"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// A Fate is what became of a packet.
type Fate int

// The fates.
const (
	Dropped   Fate = iota // see Outcome.Why
	Delivered             // to the Mac itself
	Forwarded             // out of another interface
	Sent                  // the Mac's own, out of an interface
)

func (f Fate) String() string {
	return [...]string{"dropped", "delivered", "forwarded", "sent"}[f]
}

// An Outcome is what became of a packet, and why.
type Outcome struct {
	Fate Fate
	// Link is the interface that it left by.
	Link string
	// Packet is the packet at the end of its path, after any translation.
	Packet pfsim.Packet
	// In and Out are the results of pf's hooks. Seen is false for a hook that the packet
	// didn't reach.
	In, Out pfsim.Hook
	// Why says why it was dropped: "pf", or the IP stack's reason.
	Why string
}

// Receive handles a packet that arrives on an interface: pf's inbound hook, delivery if
// it is for the Mac, otherwise forwarding with pf's outbound hook (xnu
// bsd/netinet/ip_input.c and ip_output.c; ip6_input.c and ip6_forward.c).
func (m *Mac) Receive(p pfsim.Packet, link string) Outcome {
	n := m.engine.observe()
	if i := n.Interface(link); i == nil || i.Flags&darwin.InterfaceUp == 0 {
		return Outcome{Packet: p, Why: "no such interface"}
	}
	o := Outcome{Packet: p}
	m.Judge(func(pf *pfsim.PF) { o.In = pf.Receive(p, link).In })
	if !o.In.Pass() {
		o.Why = "pf"
		return o
	}
	o.Packet = o.In.Packet
	forwards := m.forwards(p.Dst)
	if owner := owner(n, o.Packet.Dst); owner != "" {
		// Without forwarding, packets to a tunnel's address on another interface
		// are dropped (ip_input.c, ip_checkinterface hybrid); with it they aren't.
		if !forwards && owner != link && m.drops(p.Dst, owner) {
			o.Why = "not this interface's address"
			return o
		}
		o.Fate = Delivered
		return o
	}
	// Listeners there aren't simulated; nothing routes multicast (ip_input.c and
	// ip6_input.c give it to the host, ip_mforward isn't built).
	if o.Packet.Dst.IsMulticast() || o.Packet.Dst == broadcast {
		o.Fate = Delivered
		return o
	}
	if !forwards {
		o.Why = "not forwarding"
		return o
	}
	return m.output(n, o, Forwarded)
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Send handles a packet that the Mac itself sends. To an own address it goes through
// loopback, where pf sees it out and in; but to an IPv4 address on a utun it leaves by
// the utun, as its route says. Packets that come back from there are the device's to
// write.
func (m *Mac) Send(p pfsim.Packet) Outcome {
	n := m.engine.observe()
	if !byLoopback(n, p.Dst) {
		return m.output(n, Outcome{Packet: p}, Sent)
	}
	o := Outcome{Packet: p, Why: "pf"}
	m.Judge(func(pf *pfsim.PF) {
		if o.Out = pf.Send(p, "lo0").Out; o.Out.Pass() {
			o.In = pf.Receive(o.Out.Packet, "lo0").In
		}
	})
	if o.In.Seen && o.In.Pass() {
		o.Fate, o.Packet, o.Why = Delivered, o.In.Packet, ""
	}
	return o
}

// byLoopback reports whether the Mac's packets to a, an address of its own, go through
// loopback. On a broadcast interface ARP does that (arp_rtrequest in xnu
// bsd/netinet/in_arp.c, useloopback), on others the route decides.
func byLoopback(n *darwin.Network, a netip.Addr) bool {
	i := n.Interface(owner(n, a))
	if i == nil {
		return false
	}
	return i.Flags&darwin.InterfacePointToPoint == 0 || lookup(n, a) == "lo0"
}

// output looks up the packet's route and runs pf's outbound hook.
func (m *Mac) output(n *darwin.Network, o Outcome, fate Fate) Outcome {
	link := lookup(n, o.Packet.Dst)
	if link == "" {
		o.Why = "no route"
		return o
	}
	m.Judge(func(pf *pfsim.PF) { o.Out = pf.Send(o.Packet, link).Out })
	if !o.Out.Pass() {
		o.Why = "pf"
		return o
	}
	o.Fate, o.Link, o.Packet = fate, link, o.Out.Packet
	return o
}

// forwards reports whether the kernel forwards packets to addresses like a.
func (m *Mac) forwards(a netip.Addr) bool {
	name := "net.inet.ip.forwarding"
	if a.Is6() {
		name = "net.inet6.ip6.forwarding"
	}
	return m.Kernel.Variable(name) != "0"
}

// drops reports whether the kernel, not forwarding, drops packets to an address of
// the interface that arrive on another one.
func (m *Mac) drops(a netip.Addr, owner string) bool {
	name := "net.inet.ip.check_interface"
	if a.Is6() {
		name = "net.inet6.ip6.check_interface"
	}
	switch m.Kernel.Variable(name) {
	case "0":
		return false
	case "1":
		return isTunnel(owner)
	}
	return true
}

// owner returns the interface that has the address.
func owner(n *darwin.Network, a netip.Addr) string {
	for _, i := range n.Interfaces {
		for _, o := range i.Addresses {
			if o.Prefix.Addr() == a {
				return i.Name
			}
		}
	}
	return ""
}

func isTunnel(name string) bool {
	return strings.HasPrefix(name, "utun") || strings.HasPrefix(name, "ipsec")
}

// lookup returns the interface of the longest route to a; empty if there is none, or if
// it rejects or discards. Scoped routes don't count: only sockets bound to an interface
// use them.
func lookup(n *darwin.Network, a netip.Addr) string {
	best := darwin.Route{}
	for _, r := range n.Routes {
		if r.Flags&darwin.RouteUp == 0 || r.Flags&darwin.RouteScoped != 0 || !r.Dst.Contains(a) {
			continue
		}
		if !best.Dst.IsValid() || r.Dst.Bits() > best.Dst.Bits() {
			best = r
		}
	}
	if !best.Dst.IsValid() || best.Flags&(darwin.RouteReject|darwin.RouteBlackhole) != 0 {
		return ""
	}
	for _, i := range n.Interfaces {
		if i.Index == best.Index {
			return i.Name
		}
	}
	return ""
}
