package linux

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// withTTL sets the TTL or hop limit of a packet.
func withTTL(packet []byte, ttl byte) []byte {
	if packet[0]>>4 == 6 {
		packet[7] = ttl
		return packet
	}
	packet[8] = ttl
	sumHeader(packet)
	return packet
}

// TestStrangersGetNoAnswer sends packets of hosts of the LAN and the internet through a
// host that was found not to forward: with a TTL that ends there, to destinations without
// a route, and back to their senders. While a peer has lan and routing, the host forwards
// on those interfaces, but doesn't answer them.
func TestStrangersGetNoAnswer(t *testing.T) {
	for _, found := range []string{"0", "1"} {
		t.Run("forwarding found "+found, func(t *testing.T) {
			w := newWorld(t)
			w.findForwarding(found)
			w.ip(w.pic.B, "route add unreachable 192.0.2.0/24\n-6 route add unreachable 2001:db8:9::/48")
			w.open()
			defer w.close()
			w.enforce(meshOf(grants{ann: all}))
			a := netlab.Addresses()
			answers := make(chan netlab.Packet, 1000)
			for _, h := range []*netlab.Host{w.pic.L, w.pic.W} {
				watch, err := h.Watch(func(p netlab.Packet) bool {
					mine := slices.Concat(a.BLAN.List(), a.BUplink.List())
					if !p.Out && slices.Contains(mine, p.Src) && answersFor(p) {
						answers <- p
					}
					return false
				})
				if err != nil {
					t.Fatal(err)
				}
				w.watches = append(w.watches, watch)
			}
			n := 0
			for i := range 2 {
				l, far := a.L.List()[i], a.I.List()[i]
				for _, s := range []struct {
					in       string
					src, dst netip.Addr
					ttl      byte
				}{
					{netlab.LAN, l, far, 1},
					{netlab.Uplink, far, l, 1},
					{netlab.LAN, l, []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:9::1")}[i], 64},
					{netlab.LAN, l, l.Next().Next(), 64}, // goes back to the LAN
				} {
					n++
					w.send(s.in, withTTL(netlab.UDPPacket(netip.AddrPortFrom(s.src, 4000), netip.AddrPortFrom(s.dst, 5000), word(n)), s.ttl))
				}
			}
			if found == "1" {
				select {
				case <-answers:
				case <-time.After(10 * time.Second):
					t.Error("where forwarding was found on, transit isn't left alone")
				}
				return
			}
			w.settle(nil)
			// Packets to B itself are delivered, and a peer gets answers.
			w.inject(withTTL(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4000), netip.AddrPortFrom(a.I.V4, 5000), word(50)), 1))
			c := w.socket(netip.AddrPortFrom(a.BLAN.V4, 5000))
			w.send(netlab.LAN, netlab.UDPPacket(netip.AddrPortFrom(a.L.V4, 4000), netip.AddrPortFrom(a.BLAN.V4, 5000), word(51)))
			if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := c.ReadFromUDPAddrPort(make([]byte, 100)); err != nil {
				t.Error("what is for the host doesn't arrive:", err)
			}
			w.settle(nil)
			w.rig.mu.Lock()
			told := slices.ContainsFunc(w.out, func(b []byte) bool {
				p, ok := netlab.ParsePacket(b)
				return ok && p.Dst == ann4 && answersFor(p)
			})
			w.rig.mu.Unlock()
			if !told {
				t.Error("a peer whose packet's TTL ends at the host isn't told")
			}
			for len(answers) > 0 {
				t.Errorf("a stranger was answered: %v", <-answers)
			}
			for i := range n {
				if got := w.captures(word(i + 1)); len(got) > 0 {
					t.Errorf("transit %d came out at %s", i+1, got[0].where)
				}
			}
		})
	}
}

// answersFor reports whether a packet is an ICMP error or a redirect.
func answersFor(p netlab.Packet) bool {
	q := policy.Packet{Src: p.Src, Dst: p.Dst, Proto: p.Proto, ICMPType: p.Type}
	return q.IsICMPError() || q.IsRedirect()
}

// TestBridgedFramesPass makes the host a bridge whose frames its packet filter sees: they
// aren't transit.
func TestBridgedFramesPass(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	for _, name := range []string{"iptables", "ip6tables"} {
		if err := w.pic.B.SetSysctl("net/bridge/bridge-nf-call-"+name, "1"); err != nil {
			t.Skip("the kernel's packet filter doesn't see a bridge's frames:", err)
		}
	}
	w.ip(w.pic.B, `link add br7 type bridge
link set br7 up
link set lan0 master br7
link set pub0 master br7`)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	a := netlab.Addresses()
	to, err := w.pic.P.Netlink().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		payload := netlab.UDPPacket(netip.AddrPortFrom(a.L.List()[i], 4000), netip.AddrPortFrom(a.P.List()[i], 5000), word(i+1))
		seen := make(chan struct{}, 10)
		watch, err := w.pic.P.Watch(func(p netlab.Packet) bool {
			if !p.Out && string(p.Payload) == string(word(i+1)) {
				seen <- struct{}{}
			}
			return false
		})
		if err != nil {
			t.Fatal(err)
		}
		w.watches = append(w.watches, watch)
		arrived := false
		for try := 0; try < 50 && !arrived; try++ { // a bridge port doesn't forward at first
			if err := w.pic.L.Do(func() error { return frame(to, payload) }); err != nil {
				t.Fatal(err)
			}
			select {
			case <-seen:
				arrived = true
			case <-time.After(time.Second):
			}
		}
		if !arrived {
			t.Errorf("a bridged frame to %v doesn't arrive", a.P.List()[i])
		}
	}
}

// frame sends a packet on eth0 to an interface's hardware address.
func frame(to netlink.Link, packet []byte) error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	by, err := nl.LinkByName("eth0")
	if err != nil {
		return err
	}
	proto := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		proto = unix.ETH_P_IPV6
	}
	addr := &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: by.Attrs().Index}
	addr.Halen = uint8(copy(addr.Addr[:], to.Attrs().HardwareAddr))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, packet, 0, addr)
}
