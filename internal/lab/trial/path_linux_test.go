package trial

// Path MTU discovery and traceroute through the helper.

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestPathMTUIsFound reduces a hop behind B to an MTU of 1280 bytes. ICMP is the only
// hint, and must get back through B in both directions.
func TestPathMTUIsFound(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing|mesh.LAN)
	if err := m.C.SetMTU("wg0", 1420); err != nil {
		t.Fatal(err)
	}
	if err := m.NarrowHop(1280); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		host *netlab.Host
		at   netlab.Pair
		want int
	}{{m.I, netlab.Addresses().I, 1280}, {m.L, netlab.Addresses().L, 1420}} {
		for _, addr := range c.at.List() {
			forth, back, err := m.Lab.PathMTU(t.Context(), m.C, c.host, addr)
			if err != nil || forth != c.want || back != c.want {
				t.Errorf("path MTU to %s is %d there and %d back, %v; want %d", addr, forth, back, err, c.want)
			}
		}
	}
}

// TestTracerouteShowsTheHops traces the path from C to I.
func TestTracerouteShowsTheHops(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	at, own := netlab.Addresses(), status(t, m).Address()
	for i, want := range [][]netip.Addr{
		{own.V4, at.W.V4, at.RNear.V4, at.I.V4},
		{own.V6, at.W.V6, at.RNear.V6, at.I.V6},
	} {
		got, err := m.C.Traceroute(at.I.List()[i], 8)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("hops are %v, %v; want %v", got, err, want)
		}
	}
}

// TestMSSIsClamped opens connections through B in both directions across the tunnel: the
// MSS that each end sees fits into it.
func TestMSSIsClamped(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	at := netlab.Addresses()
	for i, addr := range at.I.List() {
		watch, err := m.I.Watch(func(p netlab.Packet) bool { return !p.Out && p.Flags&netlab.SYN != 0 && p.Dst == addr })
		if err != nil {
			t.Fatal(err)
		}
		back, err := m.C.Watch(func(p netlab.Packet) bool {
			return !p.Out && p.Link == "wg0" && p.Flags&netlab.SYN != 0 && p.Src == addr
		})
		if err != nil {
			t.Fatal(err)
		}
		// The peer announces a larger MSS than B's tunnel allows.
		if err := m.C.SetMTU("wg0", 1500); err != nil {
			t.Fatal(err)
		}
		m.Lab.Probe(t.Context(), netlab.Probe{From: m.C, To: addr, Proto: netlab.TCP})
		for name, w := range map[string]*netlab.Watch{"I": watch, "C": back} {
			if err := w.Wait(1, generous); err != nil {
				t.Fatal(err)
			}
			packets, err := w.Packets()
			if err != nil {
				t.Error(err)
			}
			headers := []int{40, 60}[i]
			if got := packets[0].MSS; got == 0 || got > 1420-headers {
				t.Errorf("%s received an MSS of %d bytes over %s, want at most %d", name, got, addr, 1420-headers)
			}
		}
	}
}
