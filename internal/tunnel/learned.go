package tunnel

import (
	"encoding/hex"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

const (
	// learnedTimeout is how long a peer has to answer at its learned endpoint before the
	// device switches to the configured one. It covers three handshake attempts, which
	// WireGuard makes 5 s plus up to a third of a second apart (Rekey-Timeout, whitepaper
	// section 6.1), and the reply to the last.
	learnedTimeout = 12 * time.Second
	// learnedInterval is the least time between two checks of which peers answered. A check
	// costs as much as Stats: the device prints the state of every peer.
	learnedInterval = time.Second
)

// startLearned sends a handshake to a peer that was just added at a learned endpoint, and
// schedules the switch to its configured endpoint, if that is another one. The caller
// holds d.mu.
func (d *Device) startLearned(peer Peer, learned netip.AddrPort) {
	d.sendKeepalive(peer.PublicKey)
	if !peer.Endpoint.IsValid() || peer.Endpoint == learned {
		return
	}
	d.onLearned[peer.PublicKey] = time.Now().Add(d.learnedTimeout)
	if d.learnedTimer == nil {
		d.learnedTimer = time.AfterFunc(d.learnedTimeout, d.expireLearned)
	}
}

// sendKeepalive makes the device send the peer a keepalive. Without a session, it starts
// a handshake first.
func (d *Device) sendKeepalive(key mesh.PublicKey) {
	if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
		handle.SendKeepalive()
	}
}

// expireLearned switches the peers whose time to answer is over to their configured
// endpoints. A peer that completed a handshake from any endpoint stays where it was heard.
func (d *Device) expireLearned() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.learnedTimer = nil
	if d.closed || len(d.onLearned) == 0 {
		return
	}
	heard, err := d.readStats()
	if err != nil {
		d.log.Error("check which peers answered at their learned endpoints", "error", err)
		return // all keep their learned endpoints
	}
	now, next := time.Now(), time.Duration(0)
	for key, due := range d.onLearned {
		if left := due.Sub(now); left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		delete(d.onLearned, key)
		if !heard[key].LastHandshake.IsZero() {
			continue
		}
		at := d.peers[key].Endpoint
		config := "public_key=" + hex.EncodeToString(key[:]) + "\nupdate_only=true\nendpoint=" + at.String() + "\n"
		if err := d.configure(config); err != nil {
			d.log.Error("switch a peer to its configured endpoint", "endpoint", at, "error", err)
			continue
		}
		d.log.Info("a peer doesn't answer at its learned endpoint; switching to its configured one", "endpoint", at)
		// Let the next handshake start now, not Rekey-Timeout (5 s) after the last attempt.
		if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
			handle.ExpireCurrentKeypairs()
		}
		d.sendKeepalive(key)
	}
	if next > 0 {
		d.learnedTimer = time.AfterFunc(max(next, learnedInterval), d.expireLearned)
	}
}
