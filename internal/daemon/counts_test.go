package daemon

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// TestCountsOutlastARestart counts in two helpers' lives, and wants the sum in the third.
func TestCountsOutlastARestart(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		for life := uint64(1); life <= 2; life++ {
			r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{RxBytes: 1000, TxBytes: 200, Spoofed: 3})
			r.after(DefaultTick)
			r.stop()
			r.start()
			p, err := r.d.Peer("phone")
			if err != nil {
				t.Fatal(err)
			}
			if p.RxBytes != life*1000 || p.TxBytes != life*200 || p.Refused.Spoofed != life*3 {
				t.Errorf("after %d restarts: %d bytes received, %d sent, %d spoofed", life, p.RxBytes, p.TxBytes, p.Refused.Spoofed)
			}
		}
	})
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
