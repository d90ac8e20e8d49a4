package linux

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// runningFlow is a UDP flow that ann opened, or that the host opened to her.
type runningFlow struct {
	opened host.Packet
	// link is the link that it left by; "" for the host itself.
	link string
	// far and near are the flow's addresses as its far end sees them, after translation.
	far, near netip.AddrPort
	// conn is the host's socket if the host is an end.
	conn *net.UDPConn
}

func (f runningFlow) String() string {
	return fmt.Sprintf("flow %v:%d to %v:%d by %q", f.opened.Src, f.opened.SrcPort, f.opened.Dst, f.opened.DstPort, f.link)
}

// openFlows opens a flow of ann to every class of destination in both families.
func (w *world) openFlows(n *int) []runningFlow {
	w.t.Helper()
	a := netlab.Addresses()
	var out []runningFlow
	for i, ann := range []netip.Addr{ann4, ann6} {
		for _, to := range []struct {
			link string
			at   netlab.Pair
		}{
			{netlab.Uplink, a.I}, {netlab.Uplink, a.Metadata}, {netlab.LAN, a.L}, {netlab.Public, a.P},
			{netlab.VPN, a.Behind}, {"", a.BLAN}, {"", a.BUplink}, {"", netlab.Pair{V4: own4, V6: own6}},
		} {
			*n++
			f := runningFlow{link: to.link, opened: host.Packet{In: meshName, Packet: policy.Packet{
				Src: ann, Dst: to.at.List()[i], Proto: policy.ProtoUDP,
				SrcPort: uint16(21000 + *n), DstPort: uint16(31000 + *n),
			}}}
			f.far = netip.AddrPortFrom(f.opened.Dst, f.opened.DstPort)
			f.near = netip.AddrPortFrom(ann, f.opened.SrcPort)
			if f.link == "" {
				f.conn = w.socket(f.far)
			}
			out = append(out, f)
		}
	}
	for i := range out {
		*n++
		w.inject(netlab.UDPPacket(out[i].near, out[i].far, word(*n)))
		w.settle([][]byte{word(*n)})
		got := w.arrivals(word(*n))
		if len(got) != 1 {
			w.t.Fatalf("%v: came out at %v", out[i], got)
		}
		if out[i].link != "" {
			out[i].near = netip.AddrPortFrom(got[0].packet.Src, got[0].packet.SrcPort)
		}
	}
	return out
}

// reopen continues ann's flows through the host that she may open. Those that were cut
// get a new port.
func (w *world) reopen(r *policy.Ruleset, flows []runningFlow, n *int) {
	w.t.Helper()
	for i := range flows {
		f := &flows[i]
		if f.link == "" || f.opened.In == "" || !f.opened.Judge(r).Pass {
			continue
		}
		*n++
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(f.opened.Src, f.opened.SrcPort), f.far, word(*n)))
		w.settle([][]byte{word(*n)})
		got := w.arrivals(word(*n))
		if len(got) != 1 {
			w.t.Fatalf("%v: came out at %v", *f, got)
		}
		f.near = netip.AddrPortFrom(got[0].packet.Src, got[0].packet.SrcPort)
	}
}

// hostFlows opens a flow of the host to ann in both families.
func (w *world) hostFlows(n *int) []runningFlow {
	var out []runningFlow
	for i, own := range []netip.Addr{own4, own6} {
		*n++
		f := runningFlow{opened: host.Packet{Packet: policy.Packet{
			Src: own, Dst: []netip.Addr{ann4, ann6}[i], Proto: policy.ProtoUDP,
			SrcPort: uint16(21000 + *n), DstPort: uint16(31000 + *n),
		}}}
		f.near, f.far = netip.AddrPortFrom(f.opened.Dst, f.opened.DstPort), netip.AddrPortFrom(own, f.opened.SrcPort)
		f.conn = w.socket(f.far)
		w.hostSends(f, word(*n))
		w.settle([][]byte{word(*n)})
		out = append(out, f)
	}
	return out
}

// socket is an application on the host.
func (w *world) socket(at netip.AddrPort) *net.UDPConn {
	var c *net.UDPConn
	w.do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	w.t.Cleanup(func() { c.Close() })
	return c
}

// hostSends sends from the application to ann. A packet that the filter drops may come
// back as an error.
func (w *world) hostSends(f runningFlow, b []byte) {
	_, _ = f.conn.WriteToUDPAddrPort(b, f.near)
}

// probe is one packet on a running flow, with the expected result.
type probe struct {
	what string
	flow runningFlow
	word []byte
	// pass is the policy's verdict. With mayDrop, dropping is right, too. With strayed, a
	// packet that may not pass may reach the host itself and be answered: it is for an
	// address of the host, but no longer on a flow.
	pass, mayDrop, strayed bool
	where                  string
}

// probes returns every kind of packet on a flow.
func (w *world) probes(r *policy.Ruleset, f runningFlow, n *int) []probe {
	w.t.Helper()
	var out []probe
	next := func(what string, v policy.Verdict, where string) []byte {
		*n++
		out = append(out, probe{what: what, flow: f, word: word(*n), pass: v.Pass, where: where})
		return word(*n)
	}
	at := f.link
	if at == "" {
		at = "host"
	}
	if f.opened.In == "" {
		// The host's own flow: ann answers, the host continues.
		w.inject(netlab.UDPPacket(f.near, f.far, next("ann's answer", r.Reply(policy.ByHost, f.opened.Packet, meshName), "host")))
		w.hostSends(f, next("the host", f.opened.Judge(r), "mesh"))
		return out
	}
	src := netip.AddrPortFrom(f.opened.Src, f.opened.SrcPort)
	w.inject(netlab.UDPPacket(src, f.far, next("ann", f.opened.Judge(r), at)))
	if f.conn != nil {
		w.hostSends(f, next("the host's answer", r.Reply(policy.ByPeer, f.opened.Packet, ""), "mesh"))
		return out
	}
	for _, in := range []string{netlab.Uplink, netlab.LAN, netlab.Public, netlab.VPN} {
		raw := netlab.UDPPacket(f.far, f.near, next("an answer by "+in, r.Reply(policy.ByPeer, f.opened.Packet, in), "mesh"))
		out[len(out)-1].mayDrop, out[len(out)-1].strayed = in != f.link, true
		w.send(in, raw)
		quoted := netlab.UDPPacket(f.near, f.far, next("an ICMP error by "+in, r.MayOpen(policy.ByPeer, f.opened.Packet), "mesh error"))
		out[len(out)-1].strayed = true
		w.send(in, icmpError(router(f.far.Addr()), f.near.Addr(), quoted))
	}
	// ann may send errors about packets that she received, bob may not.
	heard := netlab.UDPPacket(f.far, src, next("ann's ICMP error", r.MayOpen(policy.ByPeer, f.opened.Packet), at+" error"))
	w.inject(icmpError(src.Addr(), f.far.Addr(), heard))
	heard = netlab.UDPPacket(f.far, src, next("bob's ICMP error about ann's flow", policy.Verdict{}, ""))
	w.inject(icmpError(map[bool]netip.Addr{true: bob4, false: bob6}[src.Addr().Is4()], f.far.Addr(), heard))
	return out
}

// router is a host on the way that is no end of any flow.
func router(of netip.Addr) netip.Addr {
	r := netlab.Addresses().RNear
	if of.Is4() {
		return r.V4
	}
	return r.V6
}

// icmpError returns a port unreachable message.
func icmpError(src, dst netip.Addr, quoted []byte) []byte {
	if src.Is4() {
		return netlab.ICMPPacket(src, dst, 3, 3, 0, quoted)
	}
	return netlab.ICMPPacket(src, dst, 1, 4, 0, quoted)
}

// TestFlowsFollowTheirOpener opens flows with all permissions, and then judges every kind
// of packet on them under each set of permissions.
func TestFlowsFollowTheirOpener(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	w.open()
	defer w.close()
	n := 0
	old := w.enforce(meshOf(grants{ann: all, bob: all}))
	flows := append(w.openFlows(&n), w.hostFlows(&n)...)
	judged, passed := 0, 0
	for _, have := range []mesh.Permissions{all, 0, mesh.Incoming, mesh.Routing, mesh.LAN, mesh.Routing | mesh.LAN,
		mesh.Incoming | mesh.Routing, mesh.Incoming | mesh.LAN, all} {
		r := w.enforce(meshOf(grants{ann: have, bob: all}))
		w.cut(r, policy.Diff(old, r))
		old = r
		w.reopen(r, flows, &n)
		var sent []probe
		var want [][]byte
		for _, f := range flows {
			for _, p := range w.probes(r, f, &n) {
				sent = append(sent, p)
				if p.pass && !p.mayDrop {
					want = append(want, p.word)
				}
			}
		}
		w.settle(want)
		for _, p := range sent {
			got := w.captures(p.word)
			if !p.pass && p.strayed {
				got = slices.DeleteFunc(got, func(g capture) bool { return !strings.HasPrefix(g.where, "mesh") })
			}
			switch {
			case !p.pass && len(got) > 0:
				t.Errorf("ann %v: %s on %v: refused, but came out at %v", have, p.what, p.flow, got[0].where)
			case p.pass && !p.mayDrop && !once(got, p.where):
				t.Errorf("ann %v: %s on %v: passes, but came out at %v", have, p.what, p.flow, got)
			}
			judged++
			if len(got) > 0 {
				passed++
			}
		}
	}
	t.Logf("%d packets on %d flows judged, %d came out", judged, len(flows), passed)
}

// once reports whether a packet came out at one place, not counting errors about it.
func once(got []capture, where string) bool {
	n := 0
	for _, g := range got {
		if g.where == where {
			n++
		} else if !strings.HasSuffix(g.where, " error") {
			return false
		}
	}
	return n == 1
}

func (w *world) cut(r *policy.Ruleset, narrowed []policy.Narrowed) {
	w.t.Helper()
	w.do(func() error { return w.p.Cut(context.Background(), r, narrowed) })
}

// TestCutFlowsStayDead has the host's applications keep sending on flows to them that
// were cut, also after conntrack has forgotten the flows.
func TestCutFlowsStayDead(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	n := 0
	wide := w.enforce(meshOf(grants{ann: all}))
	flows := slices.DeleteFunc(w.openFlows(&n), func(f runningFlow) bool { return f.conn == nil })
	closed := w.enforce(meshOf(grants{}))
	w.cut(closed, policy.Diff(wide, closed))
	silent := func(when string) {
		t.Helper()
		from := n
		for _, f := range flows {
			n++
			w.hostSends(f, word(n))
		}
		w.settle(nil)
		for i := from + 1; i <= n; i++ {
			if got := w.captures(word(i)); len(got) > 0 {
				t.Errorf("%s: the host's packet came out at %v", when, got[0].where)
			}
		}
	}
	silent("after the cut")
	w.forget()
	silent("after conntrack forgot")
	w.do(func() error { w.p.filter.loaded = nil; return nil })
	w.enforce(meshOf(grants{}))
	silent("after a reload")

	w.enforce(meshOf(grants{ann: mesh.Incoming}))
	for _, f := range flows {
		n += 2
		w.inject(netlab.UDPPacket(f.near, f.far, word(n-1)))
		w.settle([][]byte{word(n - 1)})
		w.hostSends(f, word(n))
		w.settle([][]byte{word(n)})
		if !once(w.captures(word(n-1)), "host") || !once(w.captures(word(n)), "mesh") {
			t.Errorf("%v: allowed again, but doesn't run: %v, %v", f, w.captures(word(n-1)), w.captures(word(n)))
		}
	}
}

// forget empties the host's conntrack table.
func (g *rig) forget() {
	g.t.Helper()
	g.do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		return h.ConntrackTableFlush(netlink.ConntrackTable)
	})
}
