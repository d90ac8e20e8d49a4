package linux

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestNoFlowTakesWhatIsSentToTheHost has ann send from the ports of the host's own
// sockets, to hosts that these talk to. What those hosts answer, or send first, still
// reaches the host's sockets and not ann.
func TestNoFlowTakesWhatIsSentToTheHost(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	a := netlab.Addresses()
	n := 0
	// WireGuard's port, a privileged one, one with a listener, and an ephemeral one.
	for _, p := range []uint16{51820, 123, 5353, 40000} {
		for i, host := range a.BUplink.List() {
			own := netip.AddrPortFrom(host, p)
			w.socket(own)
			w.enforce(meshOf(grants{ann: mesh.Routing}))
			far, peer := netip.AddrPortFrom(a.I.List()[i], 51820), []netip.Addr{ann4, ann6}[i]
			n++
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(peer, p), far, word(n)))
			w.settle([][]byte{word(n)})
			got := w.arrivals(word(n))
			if len(got) != 1 || got[0].packet.Src != host {
				t.Fatalf("ann's packet came out at %v", got)
			}
			if port := got[0].packet.SrcPort; !w.p.ports.now.has(port) || w.p.ports.host.has(port) {
				t.Errorf("ann's packet from port %d left from %d, which may be the host's", p, port)
			}
			n++
			w.send(netlab.Uplink, netlab.UDPPacket(far, own, word(n)))
			w.settle([][]byte{word(n)})
			if got := w.captures(word(n)); !once(got, "host") {
				t.Errorf("what was sent to the host's port %d came out at %v", p, got)
			}
			// Answers on ann's own flow arrive.
			n++
			w.send(netlab.Uplink, netlab.UDPPacket(far, netip.AddrPortFrom(host, got[0].packet.SrcPort), word(n)))
			w.settle([][]byte{word(n)})
			if got := w.captures(word(n)); !once(got, "mesh") {
				t.Errorf("the answer to ann came out at %v", got)
			}
		}
	}
}

// TestPortsAreDrawn sends from one port to many destinations: the port that a flow leaves
// from tells nothing about its source port.
func TestPortsAreDrawn(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	ports, n := map[uint16]bool{}, 0
	for range 40 {
		n++
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 2000), netip.AddrPortFrom(netlab.Addresses().I.V4, uint16(n)), word(n)))
		w.settle([][]byte{word(n)})
		got := w.arrivals(word(n))
		if len(got) != 1 {
			t.Fatalf("packet %d came out at %v", n, got)
		}
		ports[got[0].packet.SrcPort] = true
	}
	if len(ports) < 35 { // two may draw the same one
		t.Errorf("40 flows from port 2000 left from %d ports", len(ports))
	}
}

// TestHostKeepsPorts opens ann's flows to one server from every port: the host itself
// still reaches that server.
func TestHostKeepsPorts(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	far := netlab.Addresses().I.V4
	if err := w.pic.I.Serve(); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 65536; i++ {
		port := uint16(i)
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, port), netip.AddrPortFrom(far, netlab.EchoPort), []byte("flood")))
	}
	w.do(func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(far, netlab.EchoPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		for range 20 { // a datagram may get lost among so many
			if _, err = c.Write([]byte("the host's own")); err != nil {
				return fmt.Errorf("the host doesn't reach the server any more: %w", err)
			}
			c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err = c.Read(make([]byte, 100)); err == nil {
				return nil
			}
		}
		return fmt.Errorf("the server doesn't answer the host: %w", err)
	})
	flows := 0
	w.do(func() error {
		return w.p.flows.each(context.Background(), 2, ann4, func(e *flowEntry) error {
			flows++
			if hasPorts(e.orig.proto) && !w.p.ports.now.has(e.reply.dport) {
				return fmt.Errorf("a flow has port %d", e.reply.dport)
			}
			return nil
		})
	})
	t.Logf("ann had %d flows to one server", flows)
	if flows < 1000 {
		t.Errorf("ann has only %d flows, so nothing is proved", flows)
	}
}

// TestPortsFollowTheHost has a program listen on a port of one of ann's flows, and then
// has a setting reserve all ports for the host.
func TestPortsFollowTheHost(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(meshOf(grants{ann: mesh.Routing}))
	far := netip.AddrPortFrom(netlab.Addresses().I.V4, 5000)
	n := 0
	send := func() (netlab.Packet, bool) {
		n++
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4000), far, word(n)))
		deadline := time.Now().Add(5 * time.Second)
		for len(w.arrivals(word(n))) == 0 && time.Now().Before(deadline) {
			w.settle(nil)
		}
		got := w.arrivals(word(n))
		if len(got) == 0 {
			return netlab.Packet{}, false
		}
		return got[0].packet, true
	}
	first, ok := send()
	if !ok {
		t.Fatal("ann's packet didn't come out")
	}
	if drift := w.inspect(r).Drift; len(drift) > 0 {
		t.Fatalf("drift: %v", drift)
	}
	w.socket(netip.AddrPortFrom(netlab.Addresses().BUplink.V4, first.SrcPort))
	w.do(func() error { _, err := w.p.Observe(context.Background()); return err })
	if drift := w.inspect(r).Drift; len(drift) > 0 {
		t.Errorf("a program that listens on a peer's port: %v", drift)
	}
	if p, ok := send(); !ok || p.SrcPort == first.SrcPort {
		t.Errorf("ann's next packet left from port %d, came out: %t", p.SrcPort, ok)
	}
	n++
	w.send(netlab.Uplink, netlab.UDPPacket(far, netip.AddrPortFrom(netlab.Addresses().BUplink.V4, first.SrcPort), word(n)))
	w.settle([][]byte{word(n)})
	if got := w.captures(word(n)); !once(got, "host") {
		t.Errorf("what was sent to the program came out at %v", got)
	}

	if err := w.pic.B.SetSysctl("net.ipv4.ip_local_port_range", "1024 65535"); err != nil {
		t.Fatal(err)
	}
	r = w.enforce(meshOf(grants{ann: mesh.Routing}))
	if r.FromPeer(policy.Packet{Src: ann4, Dst: far.Addr(), Proto: policy.ProtoUDP, SrcPort: 1, DstPort: 2}).Pass {
		t.Error("without a port that isn't the host's, routing is allowed")
	}
	if problems := w.inspect(r).Problems; len(problems) != 1 || !strings.Contains(problems[0].Message, "no 512 ports in a row") || problems[0].Hint == "" {
		t.Errorf("problems: %v", problems)
	}
	n++
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4001), far, word(n)))
	w.settle(nil)
	if got := w.captures(word(n)); len(got) > 0 {
		t.Errorf("without ports, ann's packet came out at %v", got)
	}
	if err := w.pic.B.SetSysctl("net.ipv4.ip_local_port_range", "32768 60999"); err != nil {
		t.Fatal(err)
	}
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	if _, ok := send(); !ok {
		t.Error("with ports again, ann's packet doesn't come out")
	}
}

// TestBoundPorts binds sockets of every kind: those that an answer could be meant for are
// listed, by netlink and, if the kernel lacks the module, from /proc/net.
func TestBoundPorts(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	var accepted uint16 // port of a connected socket without a listener
	w.do(func() error {
		for _, at := range []string{"127.0.0.1:2345", "[::1]:2346"} {
			l, err := net.Listen("tcp", at)
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
		}
		c, err := net.Dial("tcp", "127.0.0.1:2345")
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		accepted = c.LocalAddr().(*net.TCPAddr).AddrPort().Port()
		connected, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2349}, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9})
		if err != nil {
			return err
		}
		t.Cleanup(func() { connected.Close() })
		return nil
	})
	w.socket(netip.MustParseAddrPort("127.0.0.1:2347"))
	w.socket(netip.MustParseAddrPort("[::1]:2348"))
	dead, err := nlconn.Dial(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	w.do(func() error {
		for name, diag := range map[string]*nlconn.Conn{"netlink": w.p.ports.diag, "/proc/net": dead} {
			bound, err := boundPorts(diag)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			for port := uint16(2345); port <= 2349; port++ {
				if uid, ok := bound[port]; !ok || uid != uint32(os.Geteuid()) {
					t.Errorf("port %d isn't listed by %s as this user's: %t, %d", port, name, ok, uid)
				}
			}
			if _, ok := bound[accepted]; ok {
				t.Errorf("port %d of a connection is listed by %s", accepted, name)
			}
			if _, ok := bound[0]; ok {
				t.Errorf("port 0 is listed by %s", name)
			}
		}
		return nil
	})
}

// TestWireGuardsPortStays reserves a port in the range as WireGuard's while no socket has
// it, as when the tunnel's sockets are being reopened.
func TestWireGuardsPortStays(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	m := meshOf(grants{ann: mesh.Routing})
	m.ListenPort = 5000
	w.enforce(m)
	r := w.enforce(m)
	if w.p.ports.now.has(5000) || w.p.ports.now.size() == 0 {
		t.Errorf("flows are translated to %v, and WireGuard has port 5000", w.p.ports.now)
	}
	if drift := w.inspect(r).Drift; len(drift) > 0 {
		t.Errorf("drift: %v", drift)
	}
}

// TestRunningFlowsKeepTheirPort has a program listen on an unused port of the range, and
// has the range chosen anew, as after a restart: new flows leave from other ports, and a
// running one keeps its port.
func TestRunningFlowsKeepTheirPort(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	far := netip.AddrPortFrom(netlab.Addresses().I.V4, 5000)
	n := 0
	send := func(from uint16) uint16 {
		t.Helper()
		n++
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, from), far, word(n)))
		w.settle([][]byte{word(n)})
		got := w.arrivals(word(n))
		if len(got) != 1 {
			t.Fatalf("ann's packet came out at %v", got)
		}
		return got[0].packet.SrcPort
	}
	had := map[uint16]uint16{}
	for from := uint16(3000); from < 3040; from++ {
		had[from] = send(from)
	}
	w.socket(netip.AddrPortFrom(netlab.Addresses().BUplink.V4, 12000))
	w.do(func() error { w.p.ports.now = portRange{}; return nil })
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	if w.p.ports.now.has(12000) {
		t.Fatalf("flows are translated to %v, and a program has port 12000", w.p.ports.now)
	}
	outside := 0
	for from, port := range had {
		if port == 12000 {
			continue
		}
		if !w.p.ports.now.has(port) {
			outside++
		}
		if got := send(from); got != port {
			t.Errorf("a flow that left from port %d leaves from %d", port, got)
		}
	}
	if outside == 0 {
		t.Error("no flow has a port outside of the new range, so nothing is proved")
	}
}

// TestSocketsAmongThePorts binds every other port of the range and releases them again.
// The range stays, a peer's new flow succeeds with a retransmission, no flow leaves from
// a socket's port, and the table isn't reloaded.
func TestSocketsAmongThePorts(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	// A small range, so that many flows draw a socket's port.
	if err := w.pic.B.SetSysctl("net.ipv4.ip_local_reserved_ports", "1024-29999,61000-65535"); err != nil {
		t.Fatal(err)
	}
	host := netlab.Addresses().BUplink.V4
	w.socket(netip.AddrPortFrom(host, 30000+minPorts-1))
	r := w.enforce(meshOf(grants{ann: mesh.Routing}))
	have := w.p.ports.now
	if have.size() < minPorts {
		t.Fatalf("the range is %v", have)
	}
	loaded := w.p.filter.loaded.chains
	look := func() {
		t.Helper()
		w.do(func() error {
			h, err := w.p.Observe(context.Background())
			if err == nil && !h.Forwarding.IPv4 {
				err = fmt.Errorf("nothing is forwarded")
			}
			return err
		})
		report := w.inspect(r)
		if len(report.Drift) > 0 || w.p.ports.now != have {
			t.Fatalf("sockets changed the range from %v to %v; drift: %v", have, w.p.ports.now, report.Drift)
		}
	}
	look()
	taken := map[uint16]*net.UDPConn{}
	for port := have.first; port < have.last; port += 2 {
		if _, ok := w.p.ports.host.bound[port]; !ok {
			taken[port] = w.socket(netip.AddrPortFrom(host, port))
		}
	}
	look()
	if problems := w.inspect(r).Problems; len(problems) != 1 || !strings.Contains(problems[0].Message, "by the user with the ID 0") {
		t.Errorf("problems: %v", problems)
	}
	n, came := 0, 0
	far := netip.AddrPortFrom(netlab.Addresses().I.V4, 5000)
	for from := uint16(3000); from < 3040; from++ {
		for range 40 { // a packet that drew a socket's port is retransmitted
			n++
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, from), far, word(n)))
			w.settle(nil)
			got := w.arrivals(word(n))
			if len(got) == 0 {
				continue
			}
			came++
			if port := got[0].packet.SrcPort; w.p.ports.host.has(port) || !have.has(port) {
				t.Errorf("a flow left from port %d, which a socket has", port)
			}
			break
		}
	}
	if came != 40 {
		t.Errorf("%d of 40 flows came out", came)
	}
	if n < 45 {
		t.Errorf("%d packets opened 40 flows, so that nothing is proved", n)
	}
	for _, c := range taken {
		c.Close()
	}
	look()
	if got := w.p.ports.host.boundIn(have); len(got) > 1 {
		t.Errorf("ports of closed sockets still count: %v", got)
	}
	if len(loaded) == 0 || &loaded[0] != &w.p.filter.loaded.chains[0] {
		t.Error("the table was loaded anew")
	}
}

func FuzzParseProcPorts(f *testing.F) {
	f.Add("  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000\n", uint32(1<<tcpListen))
	f.Fuzz(func(t *testing.T, text string, states uint32) {
		ports, err := parseProcPorts(text, states)
		if err == nil && len(ports) > strings.Count(text, "\n")+1 {
			t.Errorf("%q gave %d ports", text, len(ports))
		}
	})
}

func FuzzParseFlow(f *testing.F) {
	ip := appendAttr(appendAttr(nil, nl.CTA_IP_V4_SRC, []byte{100, 64, 0, 10}), nl.CTA_IP_V4_DST, []byte{192, 0, 2, 1})
	l4 := appendAttr(appendAttr(appendAttr(nil, nl.CTA_PROTO_NUM, []byte{17}), nl.CTA_PROTO_SRC_PORT, []byte{1, 2}), nl.CTA_PROTO_DST_PORT, []byte{3, 4})
	one := append(appendAttr(nil, nl.CTA_TUPLE_IP, ip), appendAttr(nil, nl.CTA_TUPLE_PROTO, l4)...)
	b := append([]byte{2, 0, 0, 0}, appendAttr(nil, nl.CTA_TUPLE_ORIG, one)...)
	b = append(b, appendAttr(nil, nl.CTA_TUPLE_REPLY, one)...)
	b = append(b, appendAttr(nil, nl.CTA_STATUS, binary.BigEndian.AppendUint32(nil, ipsSourceNAT))...)
	if e, ok := parseFlow(b, nil); !ok || !e.translated() || e.orig.sport != 0x102 || e.reply.dport != 0x304 || e.orig.src != ann4 {
		f.Fatalf("%+v, %t", e, ok)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, ok := parseFlow(b, nil); ok && (!e.orig.src.IsValid() || len(e.name) > len(b)) {
			t.Errorf("%x gave %+v", b, e)
		}
	})
}
