package linux

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// world captures where packets that carry a word come out: on the host itself, at the
// other end of each of its links, or in the mesh.
type world struct {
	*rig
	watches []*netlab.Watch

	mu   sync.Mutex
	seen map[string][]capture
}

type capture struct {
	where  string // "host", "mesh", or the host's interface
	packet netlab.Packet
}

// wordSize is the size of a packet's payload in bytes, by which the packet is recognized.
const wordSize = 12

func word(n int) []byte { return fmt.Appendf(nil, "word%08d", n) }

// wordOf returns the word in a packet's payload. A packet quoted in an ICMP error doesn't
// count, nor does an echo reply of some kernel.
func wordOf(p netlab.Packet) string {
	if p.Proto == policy.ProtoICMP && p.Type == 0 || p.Proto == policy.ProtoICMPv6 && p.Type == 129 {
		return ""
	}
	if isOther(p.Proto) && bytes.HasPrefix(p.Data[max(0, len(p.Data)-wordSize):], []byte("word")) {
		return string(p.Data[len(p.Data)-wordSize:])
	}
	if len(p.Payload) == wordSize && bytes.HasPrefix(p.Payload, []byte("word")) {
		return string(p.Payload)
	}
	return ""
}

func (w *world) saw(where string, p netlab.Packet) {
	word := wordOf(p)
	if at := bytes.Index(p.Payload, []byte("word")); word == "" && isError(p) && at >= 0 && len(p.Payload) >= at+wordSize {
		// the quoted word
		word, where = string(p.Payload[at:at+wordSize]), where+" error"
	}
	if word != "" {
		w.mu.Lock()
		w.seen[word] = append(w.seen[word], capture{where, p})
		w.mu.Unlock()
	}
}

// isOther reports whether peers may not use a protocol.
func isOther(proto uint8) bool {
	return !slices.Contains([]uint8{policy.ProtoTCP, policy.ProtoUDP, policy.ProtoICMP, policy.ProtoICMPv6}, proto)
}

func isError(p netlab.Packet) bool {
	return policy.Packet{Src: p.Src, Proto: p.Proto, ICMPType: p.Type}.IsICMPError()
}

func (w *world) captures(word []byte) []capture {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.seen[string(word)])
}

// arrivals returns the captures of a packet, without errors about it.
func (w *world) arrivals(word []byte) []capture {
	return slices.DeleteFunc(w.captures(word), func(g capture) bool { return strings.HasSuffix(g.where, " error") })
}

func newWorld(t *testing.T) *world {
	w := &world{rig: newRig(t), seen: map[string][]capture{}}
	w.onMesh = func(b []byte) {
		if p, ok := netlab.ParsePacket(b); ok {
			w.saw("mesh", p)
		}
	}
	for _, end := range []struct {
		link string
		host *netlab.Host
		port string
	}{
		{netlab.Uplink, w.pic.W, "b0"}, {netlab.LAN, w.pic.L, "eth0"},
		{netlab.Public, w.pic.P, "eth0"}, {netlab.VPN, w.pic.V, "eth0"},
	} {
		watch, err := end.host.Watch(func(p netlab.Packet) bool {
			if !p.Out && p.Link == end.port {
				w.saw(end.link, p)
			}
			return false
		})
		if err != nil {
			t.Fatal(err)
		}
		w.watches = append(w.watches, watch)
	}
	w.listen()
	return w
}

// listen captures what the kernel delivers on the host, after the input hook.
func (w *world) listen() {
	for _, s := range []struct{ family, proto int }{
		{unix.AF_INET, unix.IPPROTO_UDP}, {unix.AF_INET, unix.IPPROTO_TCP}, {unix.AF_INET, unix.IPPROTO_ICMP},
		{unix.AF_INET6, unix.IPPROTO_UDP}, {unix.AF_INET6, unix.IPPROTO_TCP}, {unix.AF_INET6, unix.IPPROTO_ICMPV6},
	} {
		var f *os.File
		w.do(func() error {
			fd, err := unix.Socket(s.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, s.proto)
			if err == nil {
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
				f = os.NewFile(uintptr(fd), "raw socket")
			}
			return err
		})
		w.t.Cleanup(func() { f.Close() })
		go w.delivered(f, s.family == unix.AF_INET6, uint8(s.proto))
	}
}

func (w *world) delivered(f *os.File, bare bool, proto uint8) {
	b := make([]byte, 1<<16)
	for {
		n, err := f.Read(b)
		if err != nil {
			return
		}
		packet := bytes.Clone(b[:n])
		if bare { // IPv6 raw sockets deliver no header
			packet = netlab.IPPacket(own6, own6, proto, packet)
		}
		if p, ok := netlab.ParsePacket(packet); ok {
			w.saw("host", p)
		}
	}
}

// settle waits until the packets in want, and those queued in captures, have come out.
func (w *world) settle(want [][]byte) {
	w.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for _, word := range want {
		for len(w.arrivals(word)) == 0 && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	for _, watch := range w.watches {
		if err := watch.Sync(); err != nil {
			w.t.Fatal(err)
		}
	}
}

// destinations are addresses of every class. No packet to them is lost for want of a
// neighbour: unknown addresses are behind the uplink.
func destinations() (v4, v6 []netip.Addr) {
	a := netlab.Addresses()
	parse := func(list string) (out []netip.Addr) {
		for _, s := range strings.Fields(list) {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	v4 = append(parse(`127.0.0.1 0.0.0.0 224.0.0.1 255.255.255.255 240.0.0.1 192.168.77.255 192.168.77.0
		203.0.113.191 8.8.8.8 1.1.1.1 10.1.2.3 172.16.5.5 192.168.200.1 100.127.255.255 192.0.0.8 198.19.0.1`),
		resolver4, gone4, moved4, own4, ann4, bob4, unassigned4, a.BUplink.V4, a.BLAN.V4, a.BPublic.V4, a.BVPN.V4, a.L.V4, a.I.V4, a.P.V4,
		a.VPNPeer.V4, a.Behind.V4, a.W.V4, a.Metadata.V4)
	v6 = append(parse(`::1 :: ff02::1 ff0e::1 fe80::1 2001:4860::8888 2606:4700::1111 fdff::1 ::8.8.8.8 100::1 fec0::1 2001:0:1::1
		64:ff9b::8.8.8.8 64:ff9b::10.1.2.3 64:ff9b::127.0.0.1 64:ff9b:1::8.8.8.8 2002:808:808::1 2002:a01:203::1 2002:6440:1::1`),
		gone6, own6, ann6, bob6, unassigned6, a.BUplink.V6, a.BLAN.V6, a.BPublic.V6, a.BVPN.V6, a.L.V6, a.I.V6, a.P.V6,
		a.VPNPeer.V6, a.Behind.V6, a.W.V6, a.Metadata.V6)
	for _, own := range []netip.Addr{own4, a.BLAN.V4, a.L.V4} {
		b := netip.MustParseAddr("64:ff9b::").As16()
		copy(b[12:], own.AsSlice())
		v6 = append(v6, netip.AddrFrom16(b))
	}
	return v4, v6
}

// portOutside is WireGuard's port on the router in front.
const portOutside = meshPort + 7

// routerAddresses are the router's addresses: some otherwise of class internet, some of
// class lan.
func routerAddresses() []netip.Addr {
	a := netlab.Addresses()
	return []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("2606:4700::1111"), a.L.V4, a.L.V6, a.BLAN.V4}
}

// draw returns a random packet that opens a flow, also in conntrack's view, so that
// policy and kernel can agree.
func draw(rnd *rand.Rand, n int, src, dst netip.Addr) (host.Packet, []byte) {
	p := host.Packet{Packet: policy.Packet{Src: src, Dst: dst, SrcPort: uint16(20000 + n%40000), DstPort: uint16(1024 + rnd.IntN(20000))}}
	from, to := netip.AddrPortFrom(src, p.SrcPort), netip.AddrPortFrom(dst, p.DstPort)
	switch rnd.IntN(6) {
	case 3:
		p.Proto, p.SrcPort, p.DstPort = []uint8{41, 47, 50, 132, 136}[rnd.IntN(5)], 0, 0
		return p, netlab.IPPacket(src, dst, p.Proto, word(n))
	case 0:
		p.Proto = policy.ProtoTCP
		return p, netlab.TCPPacket(from, to, netlab.SYN, rnd.Uint32(), 0, word(n))
	case 1:
		p.Proto, p.ICMPType = policy.ProtoICMP, 8
		if src.Is6() {
			p.Proto, p.ICMPType = policy.ProtoICMPv6, 128
		}
		return p, netlab.EchoPacket(src, dst, false, p.SrcPort, 1, word(n))
	case 2:
		// A message that quotes nothing, or a redirect.
		kinds := []uint8{3, 5, 11, 12}
		p.Proto = policy.ProtoICMP
		if src.Is6() {
			kinds, p.Proto = []uint8{1, 2, 3, 4, 137}, policy.ProtoICMPv6
		}
		p.ICMPType = kinds[rnd.IntN(len(kinds))]
		return p, netlab.ICMPPacket(src, dst, p.ICMPType, 0, 0, word(n))
	}
	p.Proto = policy.ProtoUDP
	if rnd.IntN(6) == 0 {
		p.DstPort = append(servicePorts(), meshPort, portOutside)[rnd.IntN(2+len(policy.AllServices))]
		to = netip.AddrPortFrom(dst, p.DstPort)
	}
	return p, netlab.UDPPacket(from, to, word(n))
}

// servicePorts are the ports of all services.
func servicePorts() (ports []uint16) {
	for _, s := range policy.AllServices {
		ports = append(ports, s.Port)
	}
	return ports
}

// sent is a packet that was sent, with the policy's verdict.
type sent struct {
	packet  host.Packet
	word    []byte
	verdict policy.Verdict
}

// check compares where a packet came out with its verdict.
func (w *world) check(r *policy.Ruleset, s sent) error {
	got := w.arrivals(s.word)
	var where []string
	for _, g := range got {
		where = append(where, g.where)
	}
	if !s.verdict.Pass {
		if len(got) > 0 {
			return fmt.Errorf("refused (%s), came out at %v", s.verdict.Rule, where)
		}
		return nil
	}
	want := map[policy.Exit][]string{
		policy.ExitHost: {"host"}, policy.ExitUplink: {r.Host().Uplink(s.packet.Dst)}, policy.ExitMesh: {"mesh"},
		policy.ExitOther: {netlab.Uplink, netlab.LAN, netlab.Public, netlab.VPN},
		policy.ExitAny:   {"host", netlab.Uplink, netlab.LAN, netlab.Public, netlab.VPN},
	}[s.verdict.Exit]
	if len(got) != 1 || !slices.Contains(want, got[0].where) {
		return fmt.Errorf("passes (%s), came out at %v", s.verdict.Rule, where)
	}
	if s.verdict.NAT() {
		out := got[0]
		i := slices.IndexFunc(r.Host().Interfaces, func(i policy.Interface) bool { return i.Name == out.where })
		if !slices.ContainsFunc(r.Host().Interfaces[i].Addresses, func(p netip.Prefix) bool { return p.Addr() == out.packet.Src }) {
			return fmt.Errorf("left by %s with the source %v", out.where, out.packet.Src)
		}
	}
	return nil
}

// TestSameVerdicts sends random packets from peers and from all other sides, and compares
// where each comes out with the policy.
func TestSameVerdicts(t *testing.T) {
	rounds, packets := 8, 250
	if testing.Short() {
		packets = 60
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for _, found := range []string{"0", "1"} {
		t.Run("forwarding found "+found, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			w := newWorld(t)
			w.findForwarding(found)
			w.open()
			defer w.close()
			w.outside, w.outsidePort = routerAddresses(), portOutside
			if err := os.WriteFile(w.resolvers(), []byte("nameserver "+resolver4.String()), 0o644); err != nil {
				t.Fatal(err)
			}
			n, passed := 0, 0
			for round := range rounds {
				m := meshOf(grants{ann: mesh.Permissions(round), bob: mesh.Permissions(rnd.IntN(int(mesh.All) + 1))})
				m.Serves = policy.Services(round%2) * policy.EveryService
				m.Former, m.ListenPort = []netip.Addr{gone4, gone6, moved4}, meshPort
				r := w.enforce(m)
				all := w.volley(rnd, r, &n, packets)
				for _, s := range all {
					if s.verdict.Pass {
						passed++
					}
					if err := w.check(r, s); err != nil {
						t.Errorf("%v from %q (ann %v, bob %v): %v", s.packet, s.packet.In,
							r.Peers()[0].Permissions, r.Peers()[1].Permissions, err)
					}
				}
			}
			t.Logf("%d packets judged, %d passed", n, passed)
		})
	}
}

// TestServices sends to the port of each service, at the host's mesh addresses and at
// another address of the host, from peers with all sets of permissions.
func TestServices(t *testing.T) {
	for _, service := range policy.AllServices {
		t.Run(service.Name, func(t *testing.T) {
			w := newWorld(t)
			w.findForwarding("0")
			w.open()
			defer w.close()
			n, passed := 0, 0
			for _, serves := range []policy.Services{service.Set, policy.EveryService &^ service.Set} {
				for may := range mesh.All + 1 {
					m := meshOf(grants{ann: may})
					m.Serves, m.ListenPort = serves, meshPort
					r := w.enforce(m)
					var all []sent
					var want [][]byte
					for _, dst := range []netip.Addr{own4, own6, netlab.Addresses().BLAN.V4} {
						src := ann4
						if dst.Is6() {
							src = ann6
						}
						for _, proto := range []uint8{policy.ProtoTCP, policy.ProtoUDP} {
							n++
							p := host.Packet{In: meshName, Packet: policy.Packet{Src: src, Dst: dst, Proto: proto, SrcPort: uint16(20000 + n), DstPort: service.Port}}
							from, to := netip.AddrPortFrom(src, p.SrcPort), netip.AddrPortFrom(dst, service.Port)
							raw := netlab.UDPPacket(from, to, word(n))
							if proto == policy.ProtoTCP {
								raw = netlab.TCPPacket(from, to, netlab.SYN, 1, 0, word(n))
							}
							s := sent{p, word(n), p.Judge(r)}
							if s.verdict.Pass {
								want = append(want, s.word)
								passed++
							}
							all = append(all, s)
							w.inject(raw)
						}
					}
					w.settle(want)
					for _, s := range all {
						if err := w.check(r, s); err != nil {
							t.Errorf("with %v, serving %v: %+v: %v", may, serves.List(), s.packet, err)
						}
					}
				}
			}
			t.Logf("%d packets judged, %d passed", n, passed)
		})
	}
}

// TestHairpinOfTheTunnel sends to WireGuard's port on the router in front, and to other
// ports there, which stay open; so does the same port number by TCP.
func TestHairpinOfTheTunnel(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	w.open()
	defer w.close()
	w.outside, w.outsidePort = routerAddresses(), portOutside
	m := meshOf(grants{ann: mesh.Routing | mesh.LAN})
	m.ListenPort = meshPort
	r := w.enforce(m)
	var all []sent
	var want [][]byte
	n, refused := 0, 0
	for _, dst := range append(routerAddresses(), netip.MustParseAddr("64:ff9b::1.1.1.1"), netip.MustParseAddr("8.8.8.8")) {
		src := ann4
		if dst.Is6() {
			src = ann6
		}
		for _, to := range []uint16{meshPort, portOutside, portOutside + 1} {
			for _, proto := range []uint8{policy.ProtoUDP, policy.ProtoTCP} {
				n++
				p := host.Packet{In: meshName, Packet: policy.Packet{Src: src, Dst: dst, Proto: proto, SrcPort: uint16(20000 + n), DstPort: to}}
				from, at := netip.AddrPortFrom(src, p.SrcPort), netip.AddrPortFrom(dst, to)
				raw := netlab.UDPPacket(from, at, word(n))
				if proto == policy.ProtoTCP {
					raw = netlab.TCPPacket(from, at, netlab.SYN, 1, 0, word(n))
				}
				s := sent{p, word(n), p.Judge(r)}
				switch {
				case s.verdict.Pass:
					want = append(want, s.word)
				case s.verdict.Rule == policy.RuleHairpin:
					refused++
				}
				all = append(all, s)
				w.inject(raw)
			}
		}
	}
	w.settle(want)
	for _, s := range all {
		if err := w.check(r, s); err != nil {
			t.Errorf("%+v: %v", s.packet, err)
		}
	}
	// Both ports at four of the router's addresses, and at the translated one.
	if refused != 10 || len(want) != n-10-6 {
		t.Errorf("of %d packets %d are refused as the tunnel's own and %d pass", n, refused, len(want))
	}
}

// volley sends packets from all sides and waits for them.
func (w *world) volley(rnd *rand.Rand, r *policy.Ruleset, n *int, count int) []sent {
	w.t.Helper()
	a := netlab.Addresses()
	dst4, dst6 := destinations()
	var all []sent
	var want [][]byte
	for range count {
		*n++
		i := rnd.IntN(2)
		pick := func(ps ...netlab.Pair) netip.Addr { return ps[rnd.IntN(len(ps))].List()[i] }
		ann, bob := netlab.Pair{V4: ann4, V6: ann6}, netlab.Pair{V4: bob4, V6: bob6}
		own, none := netlab.Pair{V4: own4, V6: own6}, netlab.Pair{V4: unassigned4, V6: unassigned6}
		dsts := [][]netip.Addr{dst4, dst6}[i]
		dst := dsts[rnd.IntN(len(dsts))]
		src, in := pick(ann, ann, bob, bob, bob, none, own, a.I, a.L), meshName
		if rnd.IntN(4) == 0 {
			in = []string{netlab.Uplink, netlab.LAN, netlab.Public}[rnd.IntN(3)]
			src = pick(ann, bob, none, a.L, a.I)
		}
		p, raw := draw(rnd, *n, src, dst)
		p.In = in
		s := sent{p, word(*n), p.Judge(r)}
		if in != meshName && s.verdict.Pass && !(plausible(src, in) && deliverable(r, s)) {
			continue // the mesh doesn't concern it
		}
		all = append(all, s)
		if s.verdict.Pass {
			want = append(want, s.word)
		}
		w.send(in, raw)
	}
	w.settle(want)
	return all
}

// findForwarding sets the forwarding that the backend finds.
func (w *world) findForwarding(value string) {
	w.t.Helper()
	for _, s := range [][2]string{
		{"net/ipv6/conf/" + netlab.Uplink + "/accept_ra", "2"},
		{"net.ipv4.ip_forward", value}, {"net.ipv6.conf.all.forwarding", value},
	} {
		if err := w.pic.B.SetSysctl(s[0], s[1]); err != nil {
			w.t.Fatal(err)
		}
	}
}

// deliverable reports whether the kernel delivers a packet from elsewhere that the policy
// lets pass.
func deliverable(r *policy.Ruleset, s sent) bool {
	if s.packet.IsRedirect() || s.packet.IsICMPError() {
		return false // quotes nothing, so conntrack has no flow for it
	}
	if isOther(s.packet.Proto) {
		return false // the test has no socket for it
	}
	switch r.Class(s.packet.Dst) {
	case policy.Self, policy.Internet:
		return true
	}
	return false
}

// plausible reports whether the host's kernel accepts a source on an interface and can
// answer it.
func plausible(src netip.Addr, in string) bool {
	a := netlab.Addresses()
	switch in {
	case netlab.Uplink:
		return src == a.I.V4 || src == a.I.V6
	case netlab.LAN:
		return src == a.L.V4 || src == a.L.V6
	}
	return false
}

// send puts a packet on one of the host's interfaces from outside.
func (w *world) send(in string, raw []byte) {
	w.t.Helper()
	from := map[string]struct {
		host *netlab.Host
		port string
	}{
		netlab.Uplink: {w.pic.W, "b0"}, netlab.LAN: {w.pic.L, "eth0"},
		netlab.Public: {w.pic.P, "eth0"}, netlab.VPN: {w.pic.V, "eth0"},
	}
	if in == meshName {
		w.inject(raw)
		return
	}
	if err := from[in].host.Forge(from[in].port, raw); err != nil {
		w.t.Fatal(err)
	}
}
