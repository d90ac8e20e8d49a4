package daemon

import (
	"testing"

	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// TestCountsOutlastARestart counts traffic in two helpers one after the other, and expects
// the sum from a third.
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
