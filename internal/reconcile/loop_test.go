package reconcile

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestRebindOfTheNewTunnel: a request to rebind still waits for a tunnel that hangs when another
// tunnel replaces it. The new tunnel's request isn't lost.
func TestRebindOfTheNewTunnel(t *testing.T) {
	type device struct{ Tunnel }
	old, next := &boundedTunnel{Tunnel: &device{}}, &boundedTunnel{Tunnel: &device{}}
	l := &Loop{rebind: make(chan Tunnel, 1), tunnel: old}
	l.requestRebind()
	l.tunnel = next
	l.requestRebind()
	if got := <-l.rebind; got != next {
		t.Error("the new tunnel isn't rebound: the old one's request is still there")
	}
}

// TestNarrowedStaysBounded: while cutting flows fails, each narrowed peer is listed once, with all
// that it lost.
func TestNarrowedStaysBounded(t *testing.T) {
	l := &Loop{}
	for i := range 1000 {
		l.addNarrowed([]policy.Narrowed{
			{PublicKey: mesh.PublicKey{1}, Lost: mesh.LAN, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{100, 64, 0, byte(i % 2)})}},
			{PublicKey: mesh.PublicKey{2}, Lost: mesh.Routing, Removed: i == 500},
			{PublicKey: mesh.PublicKey{1}, Lost: mesh.Incoming},
		})
	}
	if len(l.narrowed) != 2 || len(l.narrowed[0].Addresses) != 2 || l.narrowed[0].Lost != mesh.LAN|mesh.Incoming || !l.narrowed[1].Removed {
		t.Errorf("kept %+v", l.narrowed)
	}
}

func TestExample(t *testing.T) {
	for _, c := range []struct {
		refused guard.Refused
		want    string
	}{
		{guard.Refused{}, ""},
		{guard.Refused{To: netip.MustParseAddr("192.168.1.5"), Proto: policy.ProtoTCP, Port: 80}, "; lately tcp to 192.168.1.5:80"},
		{guard.Refused{To: netip.MustParseAddr("fd00::1"), Proto: policy.ProtoUDP, Port: 53}, "; lately udp to [fd00::1]:53"},
		{guard.Refused{To: netip.MustParseAddr("192.0.2.1"), Proto: policy.ProtoICMP}, "; lately icmp to 192.0.2.1"},
		{guard.Refused{To: netip.MustParseAddr("192.0.2.1"), Proto: 47}, "; lately protocol 47 to 192.0.2.1"},
	} {
		if got := example(c.refused); got != c.want {
			t.Errorf("%+v: %q, want %q", c.refused, got, c.want)
		}
	}
}
