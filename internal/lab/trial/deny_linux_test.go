package trial

// The end of running flows when their permission ends.

import (
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// afterwards is how many more packets each end sends after a change.
const afterwards = 200

// flows starts one flow of each protocol in each family and waits until they run.
func flows(t *testing.T, m *Mesh, from, to *netlab.Host, at netlab.Pair) []*netlab.Flow {
	t.Helper()
	return flowsEvery(t, m, from, to, at, 5*time.Millisecond)
}

// bystanders starts flows that must lose nothing. They send slowly, so that a loss isn't
// a queue overflow on a busy machine.
func bystanders(t *testing.T, m *Mesh, from, to *netlab.Host, at netlab.Pair) []*netlab.Flow {
	t.Helper()
	return flowsEvery(t, m, from, to, at, 20*time.Millisecond)
}

func flowsEvery(t *testing.T, m *Mesh, from, to *netlab.Host, at netlab.Pair, every time.Duration) []*netlab.Flow {
	t.Helper()
	var list []*netlab.Flow
	for _, addr := range at.List() {
		for _, proto := range protos {
			f, err := m.Lab.Flow(netlab.FlowOptions{From: from, To: to, Addr: addr, Proto: proto, Every: every})
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, f)
		}
	}
	for _, f := range list {
		if err := f.WaitBothWays(20, generous); err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// settle is how long a packet that was sent before a change may be in flight. It matters
// only for TCP retransmissions, which carry the time of their first transmission. observe
// is the time to watch for them, long enough for several.
const settle, observe = time.Second, 3 * time.Second

// watchSegments captures what the ends of TCP flows receive. B isn't captured: the
// capture point is before its packet filter.
func watchSegments(t *testing.T, m *Mesh, list []*netlab.Flow, ends ...*netlab.Host) (watches []*netlab.Watch) {
	t.Helper()
	ports := map[uint16]bool{}
	for _, f := range list {
		ports[f.Target().Port()] = true
	}
	for _, h := range ends {
		if h == m.B {
			continue
		}
		w, err := h.Watch(func(p netlab.Packet) bool {
			return !p.Out && p.Is(netlab.TCP) && (ports[p.SrcPort] || ports[p.DstPort])
		})
		if err != nil {
			t.Fatal(err)
		}
		watches = append(watches, w)
	}
	return watches
}

// mustBeSilent reports segments that an end received after when.
func mustBeSilent(t *testing.T, watches []*netlab.Watch, when time.Time) {
	t.Helper()
	time.Sleep(time.Until(when.Add(observe)))
	for _, w := range watches {
		if err := w.Sync(); err != nil {
			t.Error(err)
		}
		packets, err := w.Packets()
		if err != nil {
			t.Error(err)
		}
		if len(packets) == 0 {
			t.Error("a watch captured no packet of a running flow, so the test proves nothing")
		}
		for _, p := range packets {
			if p.Time.After(when.Add(settle)) {
				t.Errorf("%s, %s after the command had returned", p, p.Time.Sub(when))
			}
		}
	}
}

// mustEnd waits until both ends have sent many more packets on their own, and reports
// every packet that was sent after when and still arrived.
func mustEnd(t *testing.T, list []*netlab.Flow, when time.Time) {
	t.Helper()
	var sent [][2]uint64
	start := time.Now()
	for _, f := range list {
		sent = append(sent, [2]uint64{f.Sent(netlab.Forth), f.Sent(netlab.Back)})
	}
	total := uint64(0)
	for i, f := range list {
		for _, way := range []netlab.Way{netlab.Forth, netlab.Back} {
			for f.Sent(way) < sent[i][way]+afterwards {
				if time.Since(start) > generous {
					t.Fatalf("%s: the %s end stopped sending on its own", f, way)
				}
				time.Sleep(time.Millisecond)
			}
			total += f.Sent(way) - sent[i][way]
		}
	}
	for _, f := range list {
		for _, way := range []netlab.Way{netlab.Forth, netlab.Back} {
			if late := f.SentAfter(way, when); len(late) > 0 {
				t.Errorf("%s: %d packets %s arrived that were sent after the command had returned, the first after %s, the last after %s",
					f, len(late), way, late[0].Sent.Sub(when), late[len(late)-1].Sent.Sub(when))
			}
		}
	}
	t.Logf("%d packets were sent afterwards by both ends of %d flows", total, len(list))
}

// mustLast ends flows that no command may have disturbed, and reports their lost packets
// that were sent between the start of the command and a second after its return. A loss
// at another time isn't the command's effect: on a busy machine, wireguard-go alone loses
// a packet in some hundred thousand.
func mustLast(t *testing.T, list []*netlab.Flow, began, returned time.Time) {
	t.Helper()
	for _, f := range list {
		if forth, back := f.Finish(settle); forth+back == 0 {
			continue
		}
		for _, way := range []netlab.Way{netlab.Forth, netlab.Back} {
			for _, a := range f.Gaps(way) {
				report := t.Logf
				if a.Sent.After(began) && a.Sent.Before(returned.Add(settle)) {
					report = t.Errorf
				}
				report("%s, which wasn't denied, lost packets %s before packet %d, which was sent %s after the command had returned",
					f, way, a.Number, a.Sent.Sub(returned))
			}
		}
		later := returned.Add(settle)
		if len(f.SentAfter(netlab.Forth, later)) == 0 || len(f.SentAfter(netlab.Back, later)) == 0 {
			t.Errorf("%s, which wasn't denied, ended", f)
		}
	}
}

// TestDenyEndsRunningFlows revokes each permission while flows that need it run: no
// packet that either end sends after the command returned arrives, and other flows on the
// same host lose nothing.
func TestDenyEndsRunningFlows(t *testing.T) {
	at := netlab.Addresses()
	for _, c := range []struct {
		deny string
		need mesh.Permissions
		to   func(*Mesh) (*netlab.Host, netlab.Pair)
	}{
		{"routing", mesh.Routing, func(m *Mesh) (*netlab.Host, netlab.Pair) { return m.I, at.I }},
		{"lan", mesh.Routing | mesh.LAN, func(m *Mesh) (*netlab.Host, netlab.Pair) { return m.L, at.L }},
		{"incoming", mesh.Incoming, func(m *Mesh) (*netlab.Host, netlab.Pair) { return m.B, status(t, m).Address() }},
	} {
		t.Run(c.deny, func(t *testing.T) {
			m := newMesh(t)
			permit(t, m, "C", c.need)
			permit(t, m, "D", everything)
			host, to := c.to(m)
			cut := flows(t, m, m.C, host, to)
			others := bystanders(t, m, m.D, host, to)
			// The host's own flow to the same peer doesn't need the peer's permission.
			others = append(others, bystanders(t, m, m.B, m.C, m.Peers["C"].Addresses)...)

			watches := watchSegments(t, m, cut, m.C, host)
			if err := cut[1].WaitBothWays(20, generous); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			do(t, m, "peer", "deny", "C", c.deny)
			denied := time.Now()
			mustEnd(t, cut, denied)
			mustBeSilent(t, watches, denied)
			mustLast(t, others, began, denied)
			// A cut flow isn't revived either by its other end, when the kernel has
			// forgotten which end opened it.
			if err := m.B.ForgetFlows(); err != nil {
				t.Fatal(err)
			}
			mustEnd(t, cut, denied)
			for _, f := range cut {
				f.Stop()
			}
			// A revoked permission can be granted again.
			permit(t, m, "C", c.need)
			for _, f := range flows(t, m, m.C, host, to) {
				f.Stop()
			}
		})
	}
}

// TestRemoveEndsRunningFlows removes a peer with every permission.
func TestRemoveEndsRunningFlows(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", everything)
	at := netlab.Addresses()
	cut := flows(t, m, m.C, m.I, at.I)
	cut = append(cut, flows(t, m, m.C, m.B, status(t, m).Address())...)
	cut = append(cut, flows(t, m, m.B, m.C, m.Peers["C"].Addresses)...)
	do(t, m, "peer", "remove", "C")
	mustEnd(t, cut, time.Now())
}

// TestTimedPermissionEnds has a permission expire while flows run. No command returns
// here, so the flows may outlive the permission by the helper's reaction time, which the
// test logs but doesn't limit.
func TestTimedPermissionEnds(t *testing.T) {
	m := newMesh(t)
	do(t, m, "peer", "allow", "C", "routing", "--for", "3s")
	until := grant(t, m, "C", "routing").Until
	cut := flows(t, m, m.C, m.I, netlab.Addresses().I)
	for deadline := time.Now().Add(generous); grant(t, m, "C", "routing").Allowed; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("routing for 3 s never ended")
		}
	}
	var last time.Time
	for deadline := time.Now().Add(generous); ; time.Sleep(50 * time.Millisecond) {
		last = lastSent(cut)
		if time.Since(last) > settle {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("packets still arrive")
		}
	}
	mustEnd(t, cut, last)
	t.Logf("the last packet that arrived was sent %s after the permission had ended", last.Sub(until).Round(time.Millisecond))
}

// lastSent returns the sending time of the last packet that arrived on any flow.
func lastSent(list []*netlab.Flow) (last time.Time) {
	for _, f := range list {
		for _, way := range []netlab.Way{netlab.Forth, netlab.Back} {
			for _, a := range f.Arrivals(way) {
				if a.Sent.After(last) {
					last = a.Sent
				}
			}
		}
	}
	return last
}

// grant returns a peer's permission as shown by status.
func grant(t *testing.T, m *Mesh, peer, permission string) Grant {
	t.Helper()
	for _, p := range status(t, m).Peers {
		if p.Name == peer {
			return p.Permissions[permission]
		}
	}
	t.Fatalf("status knows no peer %q", peer)
	return Grant{}
}
