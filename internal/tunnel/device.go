package tunnel

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Peer is the configuration of one peer.
//
// It has two endpoints: Endpoint is the configured one, and Learned is the one that the
// caller saw the peer use. As with WireGuard's own tools, an endpoint is only a start: once
// the peer sends an authenticated packet from another one, the device sends there. A Set or
// a Sync moves the peer back only if it changes Endpoint, and then at once.
//
// Unlike with those tools, a new device, after a restart or a change of the port, starts at
// Learned rather than Endpoint: otherwise a peer that roamed is unreachable until it sends
// something itself. If it doesn't answer there within learnedTimeout, the device switches to
// Endpoint, and stays with it until the peer sends from elsewhere.
type Peer struct {
	PublicKey mesh.PublicKey // required

	// AllowedIPs are the addresses behind the peer: the device sends it the packets to them,
	// and accepts from it only packets with such a source. They have no host bits set.
	//
	// No two peers have the same prefix. One peer's prefix may lie inside another's, as all
	// lie inside a default route: the longest prefix that contains an address wins, in both
	// directions and in whatever order the peers were set. So a prefix of one address, /32
	// or /128, proves that a packet's source is this peer; a shorter one only proves that
	// it isn't a peer with a longer one.
	AllowedIPs []netip.Prefix // optional: without any, no packet passes

	Endpoint  netip.AddrPort // optional: zero if only the peer's own packets tell it
	Keepalive time.Duration  // optional: whole seconds up to mesh.MaxKeepalive, zero for none

	// Learned is the endpoint that the peer was last heard from. Only adding the peer to
	// the device uses it, and sends a handshake there at once. Two Peers that differ in
	// Learned alone are equal.
	Learned netip.AddrPort // optional
}

// same reports whether p and q are the same configuration for a peer that the device has.
func (p Peer) same(q Peer) bool {
	return p.PublicKey == q.PublicKey && p.Endpoint == q.Endpoint && p.Keepalive == q.Keepalive && slices.Equal(p.AllowedIPs, q.AllowedIPs)
}

// validate returns an error for what wireguard-go would refuse, or silently take for
// something else.
func (p Peer) validate() error {
	switch {
	case p.PublicKey.IsZero():
		return errors.New("no public key")
	case p.Keepalive < 0 || p.Keepalive > mesh.MaxKeepalive || p.Keepalive%time.Second != 0:
		return fmt.Errorf("keepalive %v is not a number of whole seconds from 0 to 65535", p.Keepalive)
	case p.Endpoint != (netip.AddrPort{}) && (!p.Endpoint.IsValid() || p.Endpoint.Port() == 0):
		return fmt.Errorf("endpoint %v has no address or no port", p.Endpoint)
	case p.Learned != (netip.AddrPort{}) && (!p.Learned.IsValid() || p.Learned.Port() == 0):
		return fmt.Errorf("learned endpoint %v has no address or no port", p.Learned)
	}
	for _, at := range []netip.AddrPort{p.Endpoint, p.Learned} {
		if !mesh.ValidZone(at.Addr().Zone()) { // it would be more lines of the configuration protocol
			return fmt.Errorf("endpoint %q has a zone that is no interface's", at)
		}
	}
	for _, a := range p.AllowedIPs {
		if !a.IsValid() || a != a.Masked() || a.Addr().Is4In6() {
			return fmt.Errorf("allowed IP %v is not a prefix, or has host bits set", a)
		}
	}
	return nil
}

// Underlay is an optional interface of a conn.Bind. A Bind without it can't filter
// loops, and is reopened after a change of networks; see Rebind.
type Underlay interface {
	// Attach is called by each device before it opens the Bind. From then on the Bind
	// neither accepts datagrams from, nor sends any to, an endpoint for which loops returns
	// true: it lies inside the tunnel or is the device's own. loops may be called
	// concurrently. The Bind calls onReopen, which doesn't block, when it receives again
	// after a failure.
	Attach(loops func(netip.AddrPort) bool, onReopen func())
	// Renew is called after a change of networks or a wake from sleep. It returns nil once
	// the Bind works, or, when ctx ends, the reason that it doesn't.
	Renew(ctx context.Context) error
	// Listening returns nil while the Bind receives, else the reason that it doesn't.
	Listening() error
}

// Options are what NewDevice needs.
type Options struct {
	TUN        tun.Device      // required: closed with the Device
	PrivateKey mesh.PrivateKey // required
	Logger     *slog.Logger    // required

	ListenPort uint16       // optional: UDP, 0 lets the system choose
	Addresses  []netip.Addr // optional: the host's own in the mesh, for the filter of loops
	// Bind carries the encrypted packets. It belongs to the caller and may outlive the
	// device. If it implements Underlay, the device uses that too.
	Bind          conn.Bind        // optional: the device's own Sockets, released by Close
	Now           func() time.Time // optional: time.Now
	StatsInterval time.Duration    // optional: least age at which Stats reads again; one second
}

// Device is the WireGuard device of the host: a userspace WireGuard around a
// tun.Device. All methods may be called concurrently.
type Device struct {
	wg       *device.Device
	own      mesh.PublicKey // the host's
	log      *slog.Logger
	bind     conn.Bind
	underlay Underlay // bind, if it implements that, else nil
	// configure is wg's IpcSet; tests replace it to see or to refuse a configuration.
	configure  func(config string) error
	release    func() // releases Sockets that the device made itself
	loopFilter loopFilter

	mu    sync.Mutex // serialises changes, so that peers and owner are what wg holds
	peers map[mesh.PublicKey]Peer
	owner map[netip.Prefix]mesh.PublicKey // by allowed IP
	port  uint16                          // UDP, that the device listens on; fixed once New returns
	// onLearned are the peers that were added at a learned endpoint and have a different
	// configured one, with the time by which they must have answered; see startLearned.
	onLearned      map[mesh.PublicKey]time.Time
	learnedTimer   *time.Timer   // calls expireLearned; nil if nothing is due
	learnedTimeout time.Duration // the constant outside tests
	closed         bool

	// spoofed counts packets whose source isn't the peer's, by wireguard-go's handle for the
	// peer. The packet path writes it, hence no mutex.
	spoofed sync.Map // *device.Peer -> *atomic.Uint64

	stats stats
}

// NewDevice starts a WireGuard device without peers and brings it up: some
// platforms never report their tunnel device as up, so wireguard-go wouldn't bring it up
// by itself. On an error o.TUN is closed.
func NewDevice(o Options) (*Device, error) {
	if o.TUN == nil || o.Logger == nil || o.PrivateKey.IsZero() {
		return nil, errors.New("start WireGuard: tunnel device, logger and private key are required")
	}
	release := func() {}
	if o.Bind == nil {
		own := NewSockets(o.Logger)
		o.Bind, release = own, own.Release
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.StatsInterval <= 0 {
		o.StatsInterval = time.Second
	}
	d := &Device{
		own: o.PrivateKey.Public(), log: o.Logger,
		bind: o.Bind, release: release,
		peers:          make(map[mesh.PublicKey]Peer),
		owner:          make(map[netip.Prefix]mesh.PublicKey),
		onLearned:      make(map[mesh.PublicKey]time.Time),
		learnedTimeout: learnedTimeout,
	}
	d.loopFilter.add(o.Addresses...)
	if d.underlay, _ = o.Bind.(Underlay); d.underlay != nil {
		d.underlay.Attach(d.loopFilter.loops, d.announce)
	}
	log := &logger{slog: o.Logger, now: o.Now, dropped: d.countSpoofed}
	d.wg = device.NewDevice(o.TUN, o.Bind, log.device())
	d.configure = d.wg.IpcSet
	d.stats = stats{now: o.Now, interval: o.StatsInterval, read: d.readStats}
	if err := d.start(o); err != nil {
		d.Close()
		return nil, fmt.Errorf("start WireGuard: %w", err)
	}
	return d, nil
}

// start gives the device its key and port, brings it up, and reads back the port.
// start gives the device its key and port, brings it up, and reads back the port.
func (d *Device) start(o Options) error {
	config := "private_key=" + hex.EncodeToString(o.PrivateKey[:]) + "\n" + listenPortLine(o.ListenPort)
	if err := d.configure(config); err != nil {
		return err
	}
	if err := d.wg.Up(); err != nil {
		return err
	}
	return d.readPort()
}

// listenPortLine returns the line of the configuration protocol that sets the port; 0 lets
// the system choose one.
// listenPortLine returns the line of the configuration protocol that sets the port; 0 lets
// the system choose one.
func listenPortLine(port uint16) string {
	return "listen_port=" + strconv.Itoa(int(port)) + "\n"
}

// readPort reads the port that the device listens on. It is for a device without peers, as
// the answer lists every peer.
func (d *Device) readPort() error {
	r := newStatsReader()
	if err := d.wg.IpcGetOperation(r); err != nil {
		return err
	}
	d.port = r.port
	return nil
}

// PublicKey returns the host's own public key.
func (d *Device) PublicKey() mesh.PublicKey { return d.own }

// ListenPort returns the UDP port that the device listens on.
func (d *Device) ListenPort() uint16 { return d.port }

// Set adds peer, or changes the one with its public key, and leaves the sessions of other
// peers alone. Repeating a Set does nothing. An endpoint set to zero stays in use until the
// peer sends from another: WireGuard has no way to remove one. Set refuses a prefix that
// another peer has, which WireGuard would silently move; see Peer.AllowedIPs. If the device
// fails midway, the peer is removed.
func (d *Device) Set(peer Peer) error {
	if err := peer.validate(); err != nil {
		return fmt.Errorf("set peer %v: %w", peer.PublicKey, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.peers[peer.PublicKey].same(peer) {
		return nil
	}
	for _, a := range peer.AllowedIPs {
		if owner, ok := d.owner[a]; ok && owner != peer.PublicKey {
			return prefixConflict(peer, a, owner)
		}
	}
	if err := d.set(peer); err != nil {
		return err
	}
	return d.removeExtra(peer)
}

// prefixConflict returns the error for a prefix of peer that owner has.
func prefixConflict(peer Peer, a netip.Prefix, owner mesh.PublicKey) error {
	if a.IsSingleIP() {
		return fmt.Errorf("set peer %v: address %v belongs to peer %v", peer.PublicKey, a.Addr(), owner)
	}
	return fmt.Errorf("set peer %v: prefix %v belongs to peer %v", peer.PublicKey, a, owner)
}

// set adds or changes a peer, but doesn't remove allowed IPs that it no longer has; see
// removeExtra. A prefix of another peer moves in one step: if it had no owner even for a
// moment, its packets would match a shorter prefix, and pass for those of another peer.
func (d *Device) set(peer Peer) error {
	// wireguard-go silently ignores a peer with the device's own key.
	if peer.PublicKey == d.own {
		return fmt.Errorf("set peer %v: that is the host's own key", peer.PublicKey)
	}
	old, known := d.peers[peer.PublicKey]
	begin := netip.AddrPort{}
	switch {
	case !known && peer.Learned.IsValid():
		begin = peer.Learned // in one step with adding the peer, which can't have sent anything yet
	case peer.Endpoint != old.Endpoint:
		begin = peer.Endpoint
		delete(d.onLearned, peer.PublicKey)
	}
	gets := without(peer.AllowedIPs, old.AllowedIPs)
	if err := d.configure(peerConfig(peer, old, known, begin, gets)); err != nil {
		touched := []mesh.PublicKey{peer.PublicKey}
		for _, a := range gets {
			if from, ok := d.owner[a]; ok {
				touched = append(touched, from)
			}
		}
		return d.removePartial(fmt.Errorf("set peer %v: %w", peer.PublicKey, err), touched...)
	}
	for _, a := range gets {
		if from, ok := d.owner[a]; ok && from != peer.PublicKey {
			other := d.peers[from]
			other.AllowedIPs = without(other.AllowedIPs, []netip.Prefix{a})
			d.peers[from] = other
		}
		d.owner[a] = peer.PublicKey
	}
	d.loopFilter.addPrefixes(gets)
	learned := peer.Learned
	peer.Learned, peer.AllowedIPs = netip.AddrPort{}, slices.Concat(old.AllowedIPs, gets)
	d.peers[peer.PublicKey] = peer
	d.watchSpoofed(peer.PublicKey)
	if !known && learned.IsValid() {
		d.startLearned(peer, learned)
	}
	return nil
}

// removeExtra completes set: it removes the allowed IPs that the device still has for the
// peer and peer doesn't list, and records the rest in the order of peer, which same compares.
func (d *Device) removeExtra(peer Peer) error {
	held, known := d.peers[peer.PublicKey]
	if !known {
		return nil // a later set failed, and removePartial removed it
	}
	if lost := without(held.AllowedIPs, peer.AllowedIPs); len(lost) > 0 {
		config := "public_key=" + hex.EncodeToString(peer.PublicKey[:]) + "\nupdate_only=true\n"
		for _, a := range lost {
			config += "allowed_ip=-" + a.String() + "\n"
		}
		if err := d.configure(config); err != nil {
			return d.removePartial(fmt.Errorf("set peer %v: %w", peer.PublicKey, err), peer.PublicKey)
		}
		d.releasePrefixes(lost)
	}
	held.AllowedIPs = slices.Clone(peer.AllowedIPs)
	d.peers[peer.PublicKey] = held
	return nil
}

// releasePrefixes records that no peer has these prefixes any more.
func (d *Device) releasePrefixes(prefixes []netip.Prefix) {
	for _, a := range prefixes {
		delete(d.owner, a)
	}
	d.loopFilter.removePrefixes(prefixes)
}

// without returns the prefixes of a that aren't in b, in the order of a.
func without(a, b []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(a), func(p netip.Prefix) bool { return slices.Contains(b, p) })
}

// removePartial removes peers whose configuration failed midway, so that the device holds
// what d records. It returns cause, joined with the errors of the removals.
func (d *Device) removePartial(cause error, keys ...mesh.PublicKey) error {
	errs := []error{cause}
	for _, key := range keys {
		errs = append(errs, d.remove(key))
	}
	return errors.Join(errs...)
}

// peerConfig returns the lines of the configuration protocol
// (https://www.wireguard.com/xplatform/) that turn old into peer, except for removals of
// allowed IPs. known is whether the device has the peer. begin is its new endpoint, or
// invalid to leave that alone, and gets are the allowed IPs to add.
func peerConfig(peer, old Peer, known bool, begin netip.AddrPort, gets []netip.Prefix) string {
	var b strings.Builder
	b.WriteString("public_key=" + hex.EncodeToString(peer.PublicKey[:]) + "\n")
	if known {
		b.WriteString("update_only=true\n")
	}
	if begin.IsValid() {
		b.WriteString("endpoint=" + begin.String() + "\n")
	}
	if peer.Keepalive != old.Keepalive {
		b.WriteString("persistent_keepalive_interval=" + strconv.Itoa(int(peer.Keepalive/time.Second)) + "\n")
	}
	for _, a := range gets {
		b.WriteString("allowed_ip=" + a.String() + "\n")
	}
	return b.String()
}

// Remove removes the peer with key and ends its session. Removing a peer that
// doesn't exist does nothing.
func (d *Device) Remove(key mesh.PublicKey) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.peers[key]; !ok {
		return nil
	}
	return d.remove(key)
}

// remove removes a peer. The caller holds d.mu.
func (d *Device) remove(key mesh.PublicKey) error {
	handle := d.wg.LookupPeer(device.NoisePublicKey(key))
	// Without update_only, a key that the device doesn't know would first be added.
	config := "public_key=" + hex.EncodeToString(key[:]) + "\nupdate_only=true\nremove=true\n"
	if err := d.configure(config); err != nil {
		return fmt.Errorf("remove peer %v: %w", key, err)
	}
	d.releasePrefixes(d.peers[key].AllowedIPs)
	delete(d.peers, key)
	delete(d.onLearned, key)
	if handle != nil {
		d.spoofed.Delete(handle)
	}
	return nil
}

// Sync makes the device's peers equal to want. It doesn't touch peers that already are, and
// the others keep their sessions; an allowed IP moves between peers in one step. If several
// peers want the same one, the peer that has it keeps it, or else the first in want gets it,
// and the others stay as they were. Sync continues after an error, and returns all of them
// joined.
func (d *Device) Sync(want []Peer) error {
	var errs []error
	wanted := make(map[mesh.PublicKey]int, len(want)) // index in want; of duplicates the last
	for i, p := range want {
		if err := p.validate(); err != nil {
			errs = append(errs, fmt.Errorf("set peer %v: %w", p.PublicKey, err))
			continue
		}
		wanted[p.PublicKey] = i
	}
	// conflict returns an error if another peer has a prefix of p, and is to keep it.
	conflict := func(p Peer) error {
		for _, a := range p.AllowedIPs {
			if owner, ok := d.owner[a]; ok && owner != p.PublicKey {
				if i, ok := wanted[owner]; ok && slices.Contains(want[i].AllowedIPs, a) {
					return prefixConflict(p, a, owner)
				}
			}
		}
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var changed []Peer
	for i, p := range want {
		if at, ok := wanted[p.PublicKey]; !ok || at != i || d.peers[p.PublicKey].same(p) {
			continue
		}
		err := conflict(p)
		if err == nil {
			err = d.set(p)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		changed = append(changed, p)
	}
	// Removals come last, so that a prefix that moves always has an owner; see set.
	for _, p := range changed {
		errs = append(errs, d.removeExtra(p))
	}
	for key := range d.peers {
		if _, ok := wanted[key]; !ok {
			errs = append(errs, d.remove(key))
		}
	}
	return errors.Join(errs...)
}

// Peers returns the peers that the device has, as they were last set, in no order.
func (d *Device) Peers() []Peer {
	d.mu.Lock()
	defer d.mu.Unlock()
	peers := make([]Peer, 0, len(d.peers))
	for _, p := range d.peers {
		peers = append(peers, p)
	}
	return peers
}

// Rebind is called after a change of networks or a wake from sleep. It has the Bind check
// its sockets, and then sends a keepalive to every peer with a session, from which they
// learn the host's current endpoint. It waits until the Bind works, however long that takes,
// or until ctx or the device ends.
func (d *Device) Rebind(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-d.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	if d.underlay == nil {
		if err := d.wg.BindUpdate(); err != nil {
			return fmt.Errorf("reopen the UDP sockets: %w", err)
		}
	} else if err := d.underlay.Renew(ctx); err != nil {
		return err
	}
	d.wg.SendKeepalivesToPeersWithCurrentKeypair()
	return nil
}

// announce sends a keepalive to every peer with a session, so that they learn the host's
// endpoint after the sockets were reopened. It starts a goroutine because a receiver calls
// it: sending waits for other senders, which may wait for that receiver.
func (d *Device) announce() { go d.wg.SendKeepalivesToPeersWithCurrentKeypair() }

// Listening returns nil while the Bind receives, else the reason that it doesn't. It is
// always nil for a Bind that isn't an Underlay.
func (d *Device) Listening() error {
	if d.underlay == nil {
		return nil
	}
	return d.underlay.Listening()
}

// SetOwnEndpoints sets the endpoints that reach this device: each address of the host, with
// the device's port, without zones. From then on no peer can have one of them; see Sockets.
func (d *Device) SetOwnEndpoints(at []netip.AddrPort) { d.loopFilter.setSelf(at) }

// Done returns a channel that is closed when the device has ended: by Close, or because its
// tunnel device failed, after which the caller needs a new Device.
func (d *Device) Done() <-chan struct{} { return d.wg.Wait() }

// Close ends the device, closes its tunnel device, and releases sockets of its own. Closing
// it again does nothing.
func (d *Device) Close() {
	d.mu.Lock()
	d.closed = true
	if d.learnedTimer != nil {
		d.learnedTimer.Stop()
	}
	d.mu.Unlock()
	d.wg.Close()
	d.release()
}

// watchSpoofed gives a peer a counter of spoofed packets, unless it has one.
func (d *Device) watchSpoofed(key mesh.PublicKey) {
	if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
		d.spoofed.LoadOrStore(handle, new(atomic.Uint64))
	}
}

// countSpoofed counts a packet whose source isn't among the allowed IPs of the peer that
// sent it.
func (d *Device) countSpoofed(handle *device.Peer) {
	if n, ok := d.spoofed.Load(handle); ok {
		n.(*atomic.Uint64).Add(1)
	}
}

// spoofedBy returns how many packets of the peer with key countSpoofed counted.
func (d *Device) spoofedBy(key mesh.PublicKey) uint64 {
	handle := d.wg.LookupPeer(device.NoisePublicKey(key))
	if n, ok := d.spoofed.Load(handle); ok {
		return n.(*atomic.Uint64).Load()
	}
	return 0
}
