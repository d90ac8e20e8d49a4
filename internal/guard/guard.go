// Package guard judges every packet of every peer in our own process, before
// the kernel or WireGuard sees it: a tun.Device around a tun.Device. No other
// program can switch it off. It enforces all of the policy that can be decided at the
// tunnel, so the packet filter behind it may fail.
//
// How a daemon uses it:
//
//	g := guard.New(inner, guard.Options{})       // nothing passes yet
//	wg, err := tunnel.NewDevice(tunnel.Options{TUN: g, ...})
//	g.Set(ruleset)                               // returns when it is in force
//	g.Set(nil)                                   // closed again: nothing passes
//	stats := g.Stats()                           // per peer, for status
//
// Set may be called at any time and from any goroutine; when it returns, no
// packet is judged by an older ruleset any more, and the flows that the new one
// refuses are cut. Closing g closes inner.
//
// Package flow describes how a packet is judged. This package does the rest: batches
// are judged in place; a packet refused for a missing permission is answered with an
// ICMP error, which the peer receives by way of Read.
//
// # The host's packets to itself
//
// On macOS the IPv4 address of a point-to-point interface has a host route into
// that interface (in_ifinit in xnu bsd/netinet/in.c), so the host's packets to
// its own mesh address come out of the tunnel device instead of going by the
// loopback interface. WireGuard has no peer for them. The guard writes them back
// into the device, whether open or closed: they concern no peer, and aren't
// judged or counted.
package guard

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/flow"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Options configure New.
type Options struct {
	// Own are the host's mesh addresses, for as long as no ruleset was in force.
	Own []netip.Addr     // optional
	Now func() time.Time // optional: time.Now

	// Clock tells the time that grants end by. It may be set, and may stand still
	// while the host sleeps, not both at once.
	Clock func() time.Time // optional: time.Now, without its monotonic part

	// The bounds of the peers' flows; see flow.Options.
	PerPeer      int // optional: chosen by the number of peers
	States       int // optional: entries that the host's packet filter holds; 0: memory alone is bounded
	PerForwarded int // optional: 1
	Reassembly   int // optional: 4 MiB

	// ClearDF takes Don't Fragment off what comes from peers in fragments, for a host
	// whose packet filter drops such fragments. A whole packet keeps it, and path MTU
	// discovery with it.
	ClearDF bool // optional
}

// Traffic is what the host routed for a peer: the bytes of packets of the classes lan and
// internet that passed, with their IP headers.
type Traffic struct {
	RxBytes uint64    // from the peer
	TxBytes uint64    // towards the peer
	Last    time.Time // when the last one passed; zero if never
}

// Refused is a packet that was refused, for people to read.
type Refused = flow.Refused

// PeerStats counts a peer's packets by their treatment, since the peer was first in a
// ruleset.
type PeerStats struct {
	Refused    [policy.NumClasses]uint64 // packets, by class; index 0 counts those towards the peer
	Routed     Traffic
	Flows, Cut int // flows remembered now, running ones and cut ones
	// Held is how many entries of the host's packet filter the flows take that the
	// peer opened, and Limit how many they may. Full counts the packets that were
	// refused for it, or because all peers together have too many, or because they
	// opened flows too fast; Refused counts those as well.
	Held, Limit int
	Full        uint64
	// Example is where one of the packets that were refused lately was to go.
	Example Refused
}

// Device is a tun.Device that enforces the policy. All methods may be called
// concurrently, Read by one goroutine at a time.
type Device struct {
	inner   tun.Device
	table   *flow.Table
	view    atomic.Pointer[flow.View] // nil: nothing passes
	batch   sync.RWMutex              // held for reading while a batch is judged and written
	answers answers
	wake    deadliner // to interrupt a Read of inner; nil where it can't be
	own     atomic.Pointer[own]
	turned  [][]byte // of the batch that Read has
	clearDF bool     // see Options
	confine atomic.Bool

	clock endClock

	setting sync.Mutex
	last    *flow.View      // the last view that was in force
	given   *policy.Ruleset // to Set; the view's lacks the grants that have ended since
}

// deadliner is a device whose blocked Read can be interrupted.
type deadliner interface {
	SetReadDeadline(t time.Time) error
}

// New returns a guard around inner that lets nothing pass until Set. Where
// neither inner nor its file has read deadlines, an answer to a peer waits for
// the next packet that inner has to read.
func New(inner tun.Device, o Options) *Device {
	d := &Device{inner: inner, clearDF: o.ClearDF, table: flow.New(flow.Options{
		Now: o.Now, PerPeer: o.PerPeer, States: o.States, PerForwarded: o.PerForwarded, Reassembly: o.Reassembly,
	})}
	d.clock.init(o.Clock, o.Now)
	d.own.Store(newOwn(o.Own))
	if w, ok := inner.(deadliner); ok {
		d.wake = w
	} else if f := inner.File(); f != nil {
		d.wake = f
	}
	if d.wake != nil && d.wake.SetReadDeadline(time.Time{}) != nil {
		d.wake = nil
	}
	return d
}

// Set puts r in force; nil lets nothing pass. When it returns, no packet is
// judged by the previous ruleset any more, and the flows that r refuses are cut. It
// doesn't stop packets while it works.
//
// Grants that end by themselves do so here, without another Set: from the end of a grant
// on, packets are judged by the rest of r. See [Options] for the clock; a grant that has
// ended stays so, whatever the clock says.
func (d *Device) Set(r *policy.Ruleset) {
	d.setting.Lock()
	defer d.setting.Unlock()
	if r == nil {
		d.view.Store(nil)
		d.drain()
		return
	}
	if d.view.Load() != nil && d.given == r {
		return
	}
	timed := d.given != nil && !d.given.Expires().IsZero()
	d.given = r
	d.clock.begin(timed)
	d.force(r.At(d.clock.now()))
}

// force has packets judged by r. d.setting is held.
func (d *Device) force(r *policy.Ruleset) {
	v := d.table.Use(r)
	d.own.Store(newOwn(r.Mesh().Addresses))
	d.view.Store(v)
	d.drain()
	v.CutRefused(d.last)
	d.last = v
}

// Confine keeps packets of the classes lan and internet from passing, in both
// directions, for as long as it is on: a peer's packets there need the packet filter
// behind the guard. Flows aren't cut, so that they go on afterwards. When it returns,
// no packet is judged as before any more.
func (d *Device) Confine(on bool) {
	d.setting.Lock()
	defer d.setting.Unlock()
	if d.confine.Swap(on) != on {
		d.drain()
	}
}

// confined turns the decision on a packet that needs the packet filter into a drop.
func confined(v flow.Decision) flow.Decision {
	if v.Action == flow.Pass && (v.Class == policy.OnLAN || v.Class == policy.Internet) {
		v.Action = flow.Drop
	}
	return v
}

// drain returns once every batch that began before the call has been judged and written.
func (d *Device) drain() {
	d.batch.Lock()
	defer d.batch.Unlock()
}

// Stats returns the counts of every peer in the ruleset in force, by its public key, and
// nil while closed.
func (d *Device) Stats() map[mesh.PublicKey]PeerStats {
	v := d.view.Load()
	if v == nil {
		return nil
	}
	stats := make(map[mesh.PublicKey]PeerStats, len(v.Ruleset().Peers()))
	for i, p := range v.Ruleset().Peers() {
		s := v.Stats(i)
		stats[p.PublicKey] = PeerStats{
			Refused: s.Refused, Flows: s.Flows, Cut: s.Cut, Held: s.Held, Limit: s.Limit, Full: s.Full, Example: s.Example,
			Routed: Traffic{s.RxBytes, s.TxBytes, s.LastRouted},
		}
	}
	return stats
}

// Read reads packets towards peers. One that is refused, or that was turned round,
// has size 0, which WireGuard skips.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		if n := d.answers.pop(bufs, sizes, offset); n > 0 {
			return n, nil
		}
		n, err := d.inner.Read(bufs, sizes, offset)
		if n == 0 && d.wake != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			// Reset before looking for answers again: one that comes later
			// sets it again.
			if err := d.wake.SetReadDeadline(time.Time{}); err != nil {
				return 0, err
			}
			continue
		}
		d.turned = d.judgeRead(bufs[:n], sizes, offset, d.turned[:0])
		d.turnRound(offset)
		return n, err
	}
}

// judgeRead sets the size of refused packets to 0, and of the host's packets to itself,
// which it appends to turned.
func (d *Device) judgeRead(bufs [][]byte, sizes []int, offset int, turned [][]byte) [][]byte {
	v := d.begin()
	defer d.batch.RUnlock()
	own, now, confine := d.own.Load(), d.table.Now(), d.confine.Load()
	var tally flow.Tally
	for i, b := range bufs {
		if sizes[i] == 0 {
			continue
		}
		packet := b[offset : offset+sizes[i]]
		if own.toSelf(packet) {
			turned = append(turned, b[:offset+sizes[i]])
			sizes[i] = 0
			continue
		}
		if v == nil {
			sizes[i] = 0
			continue
		}
		decision := v.Judge(packet, flow.ToPeer, now)
		if confine {
			decision = confined(decision)
		}
		tally.Add(decision, packet, flow.ToPeer, now)
		if decision.Action != flow.Pass {
			sizes[i] = 0
		}
	}
	tally.Flush(flow.ToPeer, now)
	return turned
}

// turnRound writes the host's packets to itself back into the device. The bytes
// before offset are room for the device's own header: 4 bytes of address family on
// macOS, 10 of virtio on Linux; WireGuard leaves 16.
func (d *Device) turnRound(offset int) {
	if len(d.turned) == 0 {
		return
	}
	// Packets that the device doesn't accept are lost, as on any link.
	_, _ = d.inner.Write(d.turned, offset)
	clear(d.turned) // WireGuard uses the buffers for other packets
}

// Write writes those of the peers' packets that pass. Refused ones count as written.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	v := d.begin()
	defer d.batch.RUnlock()
	pass := d.judgeWrite(v, bufs, offset)
	if len(pass) == 0 {
		return len(bufs), nil
	}
	_, err := d.inner.Write(pass, offset)
	return len(bufs), err
}

// judgeWrite moves the packets that pass to the front of bufs and returns them.
func (d *Device) judgeWrite(v *flow.View, bufs [][]byte, offset int) [][]byte {
	if v == nil {
		return nil
	}
	now, confine := d.table.Now(), d.confine.Load()
	var tally flow.Tally
	pass := bufs[:0]
	for _, b := range bufs {
		decision := v.Judge(b[offset:], flow.FromPeer, now)
		if confine {
			decision = confined(decision)
		}
		tally.Add(decision, b[offset:], flow.FromPeer, now)
		switch decision.Action {
		case flow.Pass:
			if d.clearDF {
				clearDF(b[offset:])
			}
			pass = append(pass, b)
		case flow.Answer:
			d.answer(v, b[offset:])
		}
	}
	tally.Flush(flow.FromPeer, now)
	return pass
}

// clearDF clears Don't Fragment in an IPv4 fragment and updates the header's checksum
// (RFC 1624). It is in the 16 bits of flags and offset at byte 6.
func clearDF(b []byte) {
	const df, rest = 0x40, 0x3f
	if len(b) < header4 || b[0]>>4 != 4 || b[6]&df == 0 || b[6]&rest == 0 && b[7] == 0 {
		return
	}
	old := binary.BigEndian.Uint16(b[6:])
	b[6] &^= df
	sum := uint32(^binary.BigEndian.Uint16(b[10:])) + uint32(^old) + uint32(binary.BigEndian.Uint16(b[6:]))
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
}

// past is a deadline that is over.
var past = time.Unix(1, 0)

// answer queues an ICMP error about a refused packet and makes Read fetch it.
func (d *Device) answer(v *flow.View, packet []byte) {
	if d.answers.push(packet, v.Ruleset().Mesh().Addresses) && d.wake != nil {
		// It fails only when the device is closed.
		_ = d.wake.SetReadDeadline(past)
	}
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
