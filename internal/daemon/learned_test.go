package daemon

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/resolve"
	"github.com/meshhelper/meshhelper/internal/retry"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// wantTunnelPeer compares the endpoints that the tunnel has of its only peer.
func (r *rig) wantTunnelPeer(about, endpoint, learned string) {
	r.t.Helper()
	r.tunnel.mu.Lock()
	defer r.tunnel.mu.Unlock()
	text := func(at netip.AddrPort) string {
		if !at.IsValid() {
			return ""
		}
		return at.String()
	}
	if p := r.tunnel.peers[0]; text(p.Endpoint) != endpoint || text(p.Learned) != learned {
		r.t.Errorf("%s: endpoint %v, learned %v; want %q and %q", about, p.Endpoint, p.Learned, endpoint, learned)
	}
}

// TestLearnedComesBeforeConfigured hears a peer elsewhere than configured: the next tunnel,
// of the same helper or of another one within a day, gets both endpoints, and a later one
// the configured endpoint only.
func TestLearnedComesBeforeConfigured(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		const configured, heard = "203.0.113.1:7", "198.51.100.7:8"
		if _, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "phone", PublicKey: keyOf("phone"), Endpoint: configured}); err != nil {
			t.Fatal(err)
		}
		r.wantTunnelPeer("at first", configured, "")
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{LastHandshake: r.wall(), Endpoint: netip.MustParseAddrPort(heard)})
		r.after(2 * DefaultTick)
		old := r.tunnel
		old.Close() // another program took the interface away
		r.after(time.Minute)
		if r.tunnel == old {
			t.Fatal("no new tunnel")
		}
		r.wantTunnelPeer("of the next tunnel", configured, heard)
		r.stop()
		r.start()
		r.wantTunnelPeer("after a restart", configured, heard)
		r.stop()
		time.Sleep(learned.Age)
		r.start()
		r.wantTunnelPeer("a day later", configured, "")
	})
}

// TestNamesOutlastSilence restarts the helper while the resolver doesn't answer: the tunnel
// has the endpoint of a peer with a name from the start, and a name that no peer has is
// forgotten.
func TestNamesOutlastSilence(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		if _, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "mac", PublicKey: keyOf("mac"), Endpoint: "mac.example:7"}); err != nil {
			t.Fatal(err)
		}
		r.resolveTo("203.0.113.7")
		r.after(resolve.Interval + time.Second)
		r.resolveTo("")
		r.stop()
		r.start()
		r.wantTunnelPeer("after a restart", "203.0.113.7:7", "")
		r.after(10 * resolve.Interval)
		r.wantTunnelPeer("without a resolver", "203.0.113.7:7", "")
		r.resolveTo("203.0.113.8")
		r.after(10 * resolve.Interval)
		r.wantTunnelPeer("looked up again", "203.0.113.8:7", "")
		if _, err := r.d.RemovePeer(t.Context(), "mac"); err != nil {
			t.Fatal(err)
		}
		r.after(2 * resolve.Interval)
		if names := r.d.learned.Names(); len(names) != 0 {
			t.Errorf("names of no peer: %v", names)
		}
	})
}

// TestCountsOutlastTheTunnel ends the tunnel: a peer's totals don't go back.
func TestCountsOutlastTheTunnel(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		want := func(about string, bytes uint64) {
			t.Helper()
			p, err := r.d.Peer("phone")
			if err != nil {
				t.Fatal(err)
			}
			if p.RxBytes != bytes {
				t.Errorf("%s: %d bytes received, want %d", about, p.RxBytes, bytes)
			}
		}
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{RxBytes: 1000})
		r.after(2 * DefaultTick)
		old := r.tunnel
		r.portTaken.Store(true)
		old.Close()
		r.after(time.Minute)
		want("without a tunnel", 1000)
		r.portTaken.Store(false)
		r.after(retry.New().Max)
		if r.tunnel == old {
			t.Fatal("no new tunnel")
		}
		want("of the next tunnel", 1000)
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{RxBytes: 30})
		r.after(2 * DefaultTick)
		want("counted on", 1030)
		r.stop()
		r.start()
		want("after a restart", 1030)
	})
}

// TestLearnedIsSavedSoon learns an endpoint long after the start: it is on disk two ticks
// later, one for the loop that reads it and one for the goroutine that saves.
func TestLearnedIsSavedSoon(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.after(2 * learnInterval)
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{LastHandshake: time.Now(), Endpoint: netip.MustParseAddrPort("203.0.113.9:1")})
		r.after(2 * DefaultTick)
		if text := contents(t, r.dir)[learnedFile]; !strings.Contains(text, "203.0.113.9:1") {
			t.Errorf("on disk: %q", text)
		}
	})
}

// TestRemovalAnswersWithWhatWasCounted removes a peer, with which the tunnel forgets its
// numbers.
func TestRemovalAnswersWithWhatWasCounted(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{LastHandshake: time.Now(), RxBytes: 7, TxBytes: 9})
		r.after(DefaultTick)
		r.host.SetFault(func(step string) error {
			if step == "enforce" {
				r.tunnel.setStats(keyOf("tablet"), tunnel.PeerStats{})
			}
			return nil
		})
		got, err := r.d.RemovePeer(t.Context(), "phone")
		if err != nil || got.Peer.RxBytes != 7 || got.Peer.TxBytes != 9 {
			t.Errorf("%+v, %v", got.Peer, err)
		}
	})
}
