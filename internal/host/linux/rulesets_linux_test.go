package linux

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/rulesets"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// tunnelPort is WireGuard's port in this test.
const tunnelPort = 51820

// virtual is a network of virtual machines on the host.
var virtual = []netip.Addr{netip.MustParseAddr("192.168.122.2"), netip.MustParseAddr("fd22::2")}

// neighbourhood is a host with other software's rulesets beside our table, and with
// captures that tell whether a packet of each kind gets through.
type neighbourhood struct {
	*rig
	out  *netlab.Watch // what leaves by an interface of the host
	raws []int         // nonblocking sockets that receive what is delivered to the host
	in   [][]byte      // what they received
	send [2]*net.UDPConn
	n    int // number of packets so far
}

func newNeighbourhood(t *testing.T) *neighbourhood {
	b := &neighbourhood{rig: newRig(t)}
	a := netlab.Addresses()
	machine, err := b.pic.Lab.Host("M")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.pic.Lab.Link(
		netlab.Port{Host: b.pic.B, Name: "virbr0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.168.122.1/24"), netip.MustParsePrefix("fd22::1/64")}},
		netlab.Port{Host: machine, Name: "eth0"},
	); err != nil {
		t.Fatal(err)
	}
	b.ip(b.pic.B, `neigh replace 192.168.122.2 lladdr 02:00:5e:00:53:22 dev virbr0 nud permanent
		-6 neigh replace fd22::2 lladdr 02:00:5e:00:53:22 dev virbr0 nud permanent`)
	b.open()
	t.Cleanup(func() { b.close() })
	m := meshOf(grants{ann: all})
	m.ListenPort = tunnelPort
	b.enforce(m)
	b.do(func() error {
		for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
			protos := []int{unix.IPPROTO_UDP, unix.IPPROTO_TCP, unix.IPPROTO_ICMP}
			if f == unix.AF_INET6 {
				protos[2] = unix.IPPROTO_ICMPV6
			}
			for _, proto := range protos {
				fd, err := unix.Socket(f, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
				if err != nil {
					return err
				}
				t.Cleanup(func() { unix.Close(fd) })
				b.raws = append(b.raws, fd)
			}
		}
		for i, own := range a.BUplink.List() {
			c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(own, tunnelPort)))
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			b.send[i] = c
		}
		return nil
	})
	b.out, err = b.pic.B.Watch(func(p netlab.Packet) bool { return p.Link != "lo" && bytes.Contains(p.Payload, []byte("packet ")) })
	if err != nil {
		t.Fatal(err)
	}
	// Rulesets may drop neighbour discovery, which isn't tested here.
	b.warm(a)
	return b
}

// warm makes the host resolve its neighbours and keeps the entries.
func (b *neighbourhood) warm(a netlab.PictureAddrs) {
	for i := range 2 {
		for _, to := range []netip.Addr{a.I.List()[i], a.L.List()[i]} {
			w := way{name: "warm", from: []netip.Addr{ann4, ann6}[i], to: to, port: 40001, proto: unix.IPPROTO_UDP, in: meshName}
			at := b.sent(w)
			if !b.wait(func() bool { return b.leaves(at, to) }) {
				b.t.Fatalf("nothing reaches %v", to)
			}
		}
	}
	for _, line := range strings.Split(b.listing("ip", "neigh", "show"), "\n") {
		w := strings.Fields(line)
		if i := slices.Index(w, "lladdr"); i > 0 && !slices.Contains(w, "PERMANENT") {
			b.ip(b.pic.B, fmt.Sprintf("neigh replace %s lladdr %s dev %s nud permanent", w[0], w[i+1], w[2]))
		}
	}
}

func (b *neighbourhood) listing(name string, args ...string) string {
	out, _, _, err := b.pic.B.Run(context.Background(), "", name, args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// way is a kind of packet.
type way struct {
	name     string
	in, out  string // "" for the host itself
	from, to netip.Addr
	proto    uint8
	port     uint16
	reply    bool
}

// ways returns the kinds of packets of a family that the policy lets pass.
func ways(i int) []way {
	a := netlab.Addresses()
	peer, own := []netip.Addr{ann4, ann6}[i], []netip.Addr{own4, own6}[i]
	far, up := a.I.List()[i], a.BUplink.List()[i]
	icmp := []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6}[i]
	return []way{
		{name: "net udp", in: meshName, out: netlab.Uplink, from: peer, to: far, proto: unix.IPPROTO_UDP, port: 40001},
		{name: "net tcp", in: meshName, out: netlab.Uplink, from: peer, to: far, proto: unix.IPPROTO_TCP, port: 443},
		{name: "net dns", in: meshName, out: netlab.Uplink, from: peer, to: far, proto: unix.IPPROTO_UDP, port: 53},
		{name: "net ping", in: meshName, out: netlab.Uplink, from: peer, to: far, proto: icmp},
		{name: "lan udp", in: meshName, out: netlab.LAN, from: peer, to: a.L.List()[i], proto: unix.IPPROTO_UDP, port: 40001},
		{name: "vm udp", in: meshName, out: "virbr0", from: peer, to: virtual[i], proto: unix.IPPROTO_UDP, port: 40001},
		{name: "host udp", in: meshName, from: peer, to: own, proto: unix.IPPROTO_UDP, port: 40001},
		{name: "host tcp", in: meshName, from: peer, to: own, proto: unix.IPPROTO_TCP, port: 22},
		{name: "host ping", in: meshName, from: peer, to: own, proto: icmp},
		{name: "answer", in: netlab.Uplink, out: meshName, from: far, to: peer, proto: unix.IPPROTO_UDP, port: 4001, reply: true},
		{name: "wg in", in: netlab.Uplink, from: far, to: up, proto: unix.IPPROTO_UDP, port: tunnelPort},
		{name: "wg out", out: netlab.Uplink, from: up, to: far, proto: unix.IPPROTO_UDP},
	}
}

// trial is a packet that was sent.
type trial struct {
	way
	text         string
	sport, dport uint16
}

// sent sends a packet of a kind, on a flow of its own.
func (b *neighbourhood) sent(w way) trial {
	b.t.Helper()
	b.n++
	t := trial{way: w, text: fmt.Sprintf("packet %d.", b.n), sport: uint16(20000 + b.n), dport: w.port}
	src, dst := netip.AddrPortFrom(w.from, t.sport), netip.AddrPortFrom(w.to, w.port)
	switch {
	case w.in == "":
		t.sport, t.dport = tunnelPort, uint16(20000+b.n)
		c := b.send[0]
		if w.to.Is6() {
			c = b.send[1]
		}
		// A filter's reject on the way out is an error for the sender.
		_, _ = c.WriteToUDPAddrPort([]byte(t.text), netip.AddrPortFrom(w.to, t.dport))
	case w.in == netlab.Uplink:
		if err := b.pic.W.Forge("b0", netlab.UDPPacket(src, dst, []byte(t.text))); err != nil {
			b.t.Fatal(err)
		}
	case w.proto == unix.IPPROTO_UDP:
		b.inject(netlab.UDPPacket(src, dst, []byte(t.text)))
	case w.proto == unix.IPPROTO_TCP:
		b.inject(netlab.TCPPacket(src, dst, netlab.SYN, 1, 0, []byte(t.text)))
	default:
		t.dport = t.sport
		b.inject(netlab.EchoPacket(w.from, w.to, false, t.sport, 1, []byte(t.text)))
	}
	return t
}

// flow opens a flow of the peer to the internet and returns the kind of its answer.
func (b *neighbourhood) flow(w way) (back way, from, to netip.AddrPort) {
	b.t.Helper()
	t := b.sent(way{in: meshName, out: netlab.Uplink, from: w.to, to: w.from, proto: w.proto, port: 40001})
	var got netlab.Packet
	if !b.wait(func() (ok bool) { got, ok = b.left(t, w.from); return ok }) {
		b.t.Fatal("a flow to the internet isn't let through")
	}
	w.port = t.sport
	return w, netip.AddrPortFrom(w.from, 40001), netip.AddrPortFrom(got.Src, got.SrcPort)
}

// left returns a packet that left the host for a destination.
func (b *neighbourhood) left(t trial, to netip.Addr) (netlab.Packet, bool) {
	if err := b.out.Sync(); err != nil {
		b.t.Fatal(err)
	}
	ps, err := b.out.Packets()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, p := range slices.Backward(ps) {
		if p.Out && p.Dst == to && p.Link != meshName && bytes.Contains(p.Payload, []byte(t.text)) {
			return p, true
		}
	}
	return netlab.Packet{}, false
}

func (b *neighbourhood) leaves(t trial, to netip.Addr) bool {
	_, ok := b.left(t, to)
	return ok
}

// receive reads what the host's own sockets received.
func (b *neighbourhood) receive() {
	buf := make([]byte, 1<<16)
	for _, fd := range b.raws {
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				break
			}
			if bytes.Contains(buf[:n], []byte("packet ")) {
				b.in = append(b.in, bytes.Clone(buf[:n]))
			}
		}
	}
}

// delivered reports whether the host's own sockets received a packet.
func (b *neighbourhood) delivered(t trial) bool {
	b.receive()
	port := []byte{byte(t.port >> 8), byte(t.port)}
	return slices.ContainsFunc(b.in, func(p []byte) bool {
		// The ports are unique, or the destination port is 8 bytes before the text.
		return bytes.Contains(p, []byte(t.text)) && (t.port == 0 || bytes.Contains(p, port))
	})
}

// arrived reports whether a packet reached its destination.
func (b *neighbourhood) arrived(t trial) bool {
	switch {
	case t.out == meshName:
		_, ok := b.toMesh([]byte(t.text), 0)
		return ok
	case t.out == "":
		return b.delivered(t)
	}
	return b.leaves(t, t.to)
}

// wait waits for a condition, for a long time: if it never holds, that is a fault.
func (b *neighbourhood) wait(is func() bool) bool {
	for end := time.Now().Add(5 * time.Second); ; {
		b.receive() // before packets that the watch sends to itself fill the sockets
		if is() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
}

// load loads a ruleset with the program that it is written for.
func (b *neighbourhood) load(r rulesets.Ruleset) {
	b.t.Helper()
	r = r.For(meshName, netlab.Uplink, netlab.LAN)
	if r.NFT != "" {
		b.program(r.NFT, "nft", "-f", "-")
	}
	if r.IPTables != "" {
		b.program(r.IPTables, "iptables-nft-restore")
		b.program(r.IP6Tables(), "ip6tables-nft-restore")
	}
}

// unload deletes all tables but ours.
func (b *neighbourhood) unload() {
	b.t.Helper()
	for line := range strings.Lines(b.listing("nft", "list", "tables")) {
		w := strings.Fields(line)
		if len(w) == 3 && !strings.HasPrefix(w[2], tableName) {
			b.program("", "nft", "delete", "table", w[1], w[2])
		}
	}
}

// TestRulesetsOfOthers loads rulesets as other software loads them, sends a packet of
// each kind that the policy lets pass, and compares the result with the evaluation.
func TestRulesetsOfOthers(t *testing.T) {
	installed(t, "nft")
	installed(t, "iptables-nft-restore")
	b := newNeighbourhood(t)
	if len(rulesets.All) < 40 {
		t.Errorf("only %d rulesets", len(rulesets.All))
	}
	for _, r := range rulesets.All {
		t.Run(r.Name, func(t *testing.T) {
			b.t = t
			defer b.unload()
			b.tryRuleset(r)
		})
	}
	b.t = t
}

// TestRulesetsThatChange replaces a ruleset while it is read. Each of two rulesets marks
// and drops forwarded packets, but the first half of one with the second half of the
// other does neither.
func TestRulesetsThatChange(t *testing.T) {
	installed(t, "nft")
	g := newRig(t)
	g.open()
	defer g.close()
	g.enforce(meshOf(grants{ann: all}))
	const work, none = "meta mark set 7", "counter"
	load := func(first, second string) {
		g.program(`table inet other
flush table inet other
table inet other {
	chain first { `+first+`; }
	chain second { `+second+`; }
	chain before { type filter hook prerouting priority mangle; jump first; jump second; }
	chain through { type filter hook forward priority filter; meta mark 7 drop; }
}`, "nft", "-f", "-")
	}
	s := sample{iif: meshName, oif: netlab.Uplink, src: ann4, dst: netlab.Addresses().I.V4, proto: unix.IPPROTO_UDP, sport: 40000, dport: 40001}
	for _, tt := range []struct {
		name   string
		always bool
	}{{"once", false}, {"all the time", true}} {
		t.Run(tt.name, func(t *testing.T) {
			load(none, work)
			err := g.p.others.run(t.Context(), func() error {
				e, err := g.p.others.newEvaluator(t.Context())
				if err != nil {
					return err
				}
				ask, lists := e.ask, 0
				e.ask = func(m mdlayher.Message) ([]mdlayher.Message, error) {
					if m.Header.Type&0xff == unix.NFT_MSG_GETRULE {
						// The third chain that is read is the second one in before.
						if lists++; lists == 3 || tt.always {
							load(work, none)
						}
					}
					return ask(m)
				}
				if mark := e.markOf(s); !tt.always && mark != 7 || tt.always && mark != 0 {
					t.Errorf("the mark is %d", mark)
				}
				load(none, work)
				lists = 0
				if f := e.run(s); f.unclear != tt.always || !tt.always && f.outcome != dropped {
					t.Errorf("outcome %v, unclear %t, %s", f.outcome, f.unclear, f.where())
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestObstaclesOnTheWayToNetworks has libvirt reject packets to its virtual machines.
func TestObstaclesOnTheWayToNetworks(t *testing.T) {
	installed(t, "nft")
	b := newNeighbourhood(t)
	i := slices.IndexFunc(rulesets.All, func(r rulesets.Ruleset) bool { return r.Name == "libvirt by nft" })
	b.load(rulesets.All[i])
	for _, tt := range []struct {
		permissions mesh.Permissions
		want        []string
	}{
		{all, []string{
			"table ip libvirt_network (rule with handle", "table ip6 libvirt_network (rule with handle",
		}},
		{mesh.Incoming | mesh.Routing, nil},
	} {
		m := meshOf(grants{ann: tt.permissions})
		m.ListenPort = tunnelPort
		found := b.others(b.enforce(m))
		if len(found) != len(tt.want) {
			t.Errorf("problems are %v, want %d", found, len(tt.want))
			continue
		}
		for i, p := range found {
			if !strings.Contains(p.Message, tt.want[i]) || !strings.Contains(p.Message, "drops packets from peers to the network at virbr0") {
				t.Errorf("problem %q, want %q", p.Message, tt.want[i])
			}
		}
	}
}

func (b *neighbourhood) tryRuleset(r rulesets.Ruleset) {
	type answer struct{ from, to netip.AddrPort }
	var answers [2]answer
	kinds := [2][]way{ways(0), ways(1)}
	for i := range kinds {
		for j, w := range kinds[i] {
			if w.reply {
				kinds[i][j], answers[i].from, answers[i].to = b.flow(w)
			}
		}
	}
	b.load(r)
	var matrix []string
	for i := range kinds {
		for _, w := range kinds[i] {
			var at trial
			if w.reply {
				b.n++
				at = trial{way: w, text: fmt.Sprintf("packet %d.", b.n), sport: 40001, dport: w.port}
				if err := b.pic.W.Forge("b0", netlab.UDPPacket(answers[i].from, answers[i].to, []byte(at.text))); err != nil {
					b.t.Fatal(err)
				}
			} else {
				at = b.sent(w)
			}
			by, err := b.p.ByOthers(b.t.Context(), host.Packet{In: w.in, Packet: policy.Packet{
				Src: w.from, Dst: w.to, Proto: w.proto, SrcPort: at.sport, DstPort: at.dport,
			}}, w.out, w.reply)
			if err != nil {
				b.t.Fatal(err)
			}
			matrix = append(matrix, b.compare(r, at, by))
		}
	}
	b.t.Log(strings.Join(matrix, "\n"))
}

// compare compares the result for a packet with the evaluation.
func (b *neighbourhood) compare(r rulesets.Ruleset, at trial, by host.ByOthers) string {
	family := "IPv4"
	if at.from.Is6() {
		family = "IPv6"
	}
	said := by.Does
	if said == "" {
		said = "pass"
	}
	if by.Unclear {
		said = "unclear, " + said
	}
	if by.Unclear != listed(r.Unclear, at.name, at.from.Is6()) {
		b.t.Errorf("%s, %s: said %q at %s; unclear is expected only of %q", at.name, family, said, by.Where, r.Unclear)
	}
	var got bool
	switch {
	case by.Unclear:
		got = b.arrived(at)
	case by.Does == "":
		if got = b.wait(func() bool { return b.arrived(at) }); !got {
			b.t.Errorf("%s, %s: said that it passes, and it was dropped", at.name, family)
		}
	default:
		if at.in == netlab.Uplink { // only these may still be under way
			b.wait(func() bool {
				ps, _ := b.out.Packets()
				return slices.ContainsFunc(ps, func(p netlab.Packet) bool { return !p.Out && bytes.Contains(p.Payload, []byte(at.text)) })
			})
		}
		if got = b.arrived(at); got {
			b.t.Errorf("%s, %s: said %q at %s, and it passed", at.name, family, said, by.Where)
		}
	}
	if stops := listed(r.Stops, at.name, at.from.Is6()); !by.Unclear && stops == got {
		b.t.Errorf("%s, %s: passed is %t; the ruleset was written for stopping %q", at.name, family, got, r.Stops)
	}
	return fmt.Sprintf("%-10s %s %-5t %s %s", at.name, family, got, said, by.Where)
}

// listed reports whether a comma-separated list has a kind.
func listed(list, name string, six bool) bool {
	family := map[bool]string{false: "4", true: "6"}[six]
	first, _, _ := strings.Cut(name, " ")
	for _, w := range strings.Split(list, ", ") {
		if w == name || w == first || w == "all" || w == name+" "+family || w == first+" "+family || w == "all "+family {
			return true
		}
	}
	return false
}
