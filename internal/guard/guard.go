// Package guard judges every packet of every peer in our own process, before
// the kernel or WireGuard sees it: a tun.Device around a tun.Device.
//
// How a daemon uses it:
//
//	g := guard.New(inner, guard.Options{})       // nothing passes yet
//	wg, err := wireguard.NewDevice(wireguard.Options{TUN: g, ...})
//	g.Set(ruleset)                               // returns when it is in force
//	g.Set(nil)                                   // closed again: nothing passes
//	stats := g.Stats()                           // per peer, for status
//
// Set may be called at any time and from any goroutine; when it returns, no
// packet is judged by an older ruleset any more, and the flows that the new one
// refuses are cut. Closing g closes inner.
package guard

import (
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Options are what New can be told.
type Options struct {
	Now func() time.Time // optional: time.Now
}

// Traffic is what the host routed for a peer: packets of the classes lan and
// internet that passed.
type Traffic struct {
	RxPackets, RxBytes uint64    // from the peer
	TxPackets, TxBytes uint64    // towards the peer
	Last               time.Time // when the last one passed; zero if never
}

// PeerStats counts what the guard did with a peer's packets since the peer was
// first in a ruleset.
type PeerStats struct {
	Refused [policy.NumClasses]uint64 // packets, by class; index 0 counts those towards the peer
	Routed  Traffic
}

// Device is a tun.Device that lets pass what the policy lets pass.
type Device struct {
	inner tun.Device
	rules atomic.Pointer[policy.Ruleset]
	batch sync.RWMutex // held for reading while a batch is judged and handed on
}

// New returns a guard around inner that lets nothing pass until Set.
func New(inner tun.Device, _ Options) *Device { return &Device{inner: inner} }

// Set puts r in force; nil lets nothing pass. See the package comment.
func (d *Device) Set(r *policy.Ruleset) {
	d.rules.Store(r)
	d.batch.Lock()
	defer d.batch.Unlock()
}

// Stats returns the counts of every peer in the ruleset, by its ID.
func (d *Device) Stats() map[policy.PeerID]PeerStats {
	stats := make(map[policy.PeerID]PeerStats)
	if r := d.rules.Load(); r != nil {
		for _, p := range r.Peers() {
			stats[p.ID] = PeerStats{}
		}
	}
	return stats
}

// passes judges without memory of flows: towards a peer passes what the host
// sends and what could answer the peer.
func (d *Device) passes(packet []byte, towards bool) bool {
	r := d.rules.Load()
	if r == nil || len(packet) == 0 {
		return false
	}
	var p policy.Packet
	switch {
	case packet[0]>>4 == 4 && len(packet) >= 20:
		p.Src, p.Dst, p.Proto = netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:])), packet[9]
	case packet[0]>>4 == 6 && len(packet) >= 40:
		p.Src, p.Dst, p.Proto = netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:])), packet[6]
	default:
		return false
	}
	if towards {
		if v := r.Decide(p); v.Pass && v.Exit == policy.ExitMesh {
			return true
		}
		p.Src, p.Dst = p.Dst, p.Src
	}
	p.In = r.Host().Interface
	return r.Decide(p).Pass
}

// Read reads packets towards peers; refused ones have size 0, which WireGuard
// skips.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := d.inner.Read(bufs, sizes, offset)
	d.batch.RLock()
	defer d.batch.RUnlock()
	for i := range n {
		if !d.passes(bufs[i][offset:offset+sizes[i]], true) {
			sizes[i] = 0
		}
	}
	return n, err
}

// Write writes those of the peers' packets that pass.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	d.batch.RLock()
	defer d.batch.RUnlock()
	pass := bufs[:0]
	for _, b := range bufs {
		if d.passes(b[offset:], false) {
			pass = append(pass, b)
		}
	}
	if len(pass) == 0 {
		return len(bufs), nil
	}
	_, err := d.inner.Write(pass, offset)
	return len(bufs), err
}

// File returns the inner device's file.
func (d *Device) File() *os.File { return d.inner.File() }

// MTU returns the inner device's MTU.
func (d *Device) MTU() (int, error) { return d.inner.MTU() }

// Name returns the inner device's name.
func (d *Device) Name() (string, error) { return d.inner.Name() }

// Events returns the inner device's events.
func (d *Device) Events() <-chan tun.Event { return d.inner.Events() }

// BatchSize returns the inner device's batch size.
func (d *Device) BatchSize() int { return d.inner.BatchSize() }

// Close closes the inner device.
func (d *Device) Close() error { return d.inner.Close() }
