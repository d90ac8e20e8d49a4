package tunnel

import (
	"encoding/hex"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

const (
	// answerTime is how long a peer has to answer where it was last heard before the device
	// turns to its configured endpoint: three attempts, which WireGuard makes 5 s and up to
	// a third of a second apart (Rekey-Timeout, whitepaper section 6.1), and some time for
	// the answer to the last.
	answerTime = 12 * time.Second
	// answerPause is the least time between two looks at which peers answered, which cost
	// as much as Stats does.
	answerPause = time.Second
)

// tryLearned has a peer that the device just got, and that begins at a learned endpoint,
// answer there at once. The caller holds d.mu.
func (d *Device) tryLearned(peer Peer, learned netip.AddrPort) {
	d.contact(peer.PublicKey)
	if !peer.Endpoint.IsValid() || peer.Endpoint == learned {
		return
	}
	d.trying[peer.PublicKey] = time.Now().Add(d.answer)
	if d.answered == nil {
		d.answered = time.AfterFunc(d.answer, d.giveUpLearned)
	}
}

// contact makes the device send the peer a keepalive, and before that a handshake
// where there is no session.
func (d *Device) contact(key mesh.PublicKey) {
	if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
		handle.SendKeepalive()
	}
}

// giveUpLearned turns to the configured endpoints of the peers that had time to answer at
// a learned one and weren't heard at all, there or elsewhere.
func (d *Device) giveUpLearned() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answered = nil
	if d.closed || len(d.trying) == 0 {
		return
	}
	heard, err := d.readStats()
	if err != nil {
		d.log.Error("see which peers answered where they were last heard", "error", err)
		return // they stay there
	}
	now, next := time.Now(), time.Duration(0)
	for key, due := range d.trying {
		if left := due.Sub(now); left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		delete(d.trying, key)
		if !heard[key].LastHandshake.IsZero() {
			continue
		}
		at := d.peers[key].Endpoint
		config := "public_key=" + hex.EncodeToString(key[:]) + "\nupdate_only=true\nendpoint=" + at.String() + "\n"
		if err := d.configure(config); err != nil {
			d.log.Error("turn to a peer's configured endpoint", "endpoint", at, "error", err)
			continue
		}
		d.log.Info("a peer doesn't answer where it was last heard; turning to its configured endpoint", "endpoint", at)
		if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
			handle.ExpireCurrentKeypairs() // the next handshake needn't wait for the last one's 5 s
		}
		d.contact(key)
	}
	if next > 0 {
		d.answered = time.AfterFunc(max(next, answerPause), d.giveUpLearned)
	}
}
