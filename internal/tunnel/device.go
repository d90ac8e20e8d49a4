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

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Peer is how the host reaches one peer.
type Peer struct {
	PublicKey mesh.PublicKey // required
	Addresses mesh.Addresses // required: its allowed IPs, as /32 and /128
	Endpoint  netip.AddrPort // optional: zero leaves it to what the peer last sent from
	Keepalive time.Duration  // optional: whole seconds up to mesh.MaxKeepalive, zero for none

	// Learned is where the peer was last heard, before this device had it. It is
	// looked at only when the device gets the peer anew and Endpoint is zero: the
	// peer is greeted there at once, so that it isn't dark until it sends by
	// itself, and its first valid packet from another place moves it. A Peer that
	// differs in Learned only is the same.
	Learned netip.AddrPort // optional
}

// same reports whether the device makes no difference between p and q, once it
// has the peer.
func (p Peer) same(q Peer) bool {
	p.Learned, q.Learned = netip.AddrPort{}, netip.AddrPort{}
	return p == q
}

// validate reports what the device would refuse, or silently misunderstand.
func (p Peer) validate() error {
	switch {
	case p.PublicKey.IsZero():
		return errors.New("no public key")
	case p.Addresses.Validate() != nil:
		return p.Addresses.Validate()
	case p.Keepalive < 0 || p.Keepalive > mesh.MaxKeepalive || p.Keepalive%time.Second != 0:
		return fmt.Errorf("keepalive %v is not a number of whole seconds from 0 to 65535", p.Keepalive)
	case p.Endpoint != (netip.AddrPort{}) && (!p.Endpoint.IsValid() || p.Endpoint.Port() == 0):
		return fmt.Errorf("endpoint %v has no address or no port", p.Endpoint)
	case p.Learned != (netip.AddrPort{}) && (!p.Learned.IsValid() || p.Learned.Port() == 0):
		return fmt.Errorf("learned endpoint %v has no address or no port", p.Learned)
	}
	return nil
}

// Options are what NewDevice needs.
type Options struct {
	TUN        tun.Device      // required: closed with the Device
	PrivateKey mesh.PrivateKey // required
	Logger     *slog.Logger    // required

	ListenPort uint16       // optional: UDP, 0 lets the system choose
	Addresses  []netip.Addr // optional: the host's own in the mesh; see Sockets
	// Sockets are kept by the caller, so that the port stays the host's from one
	// device to the next.
	Sockets       *Sockets         // optional: the device's own, closed with it
	Now           func() time.Time // optional: time.Now
	StatsInterval time.Duration    // optional: see Stats, one second
}

// Device is the WireGuard device of the host: a userspace WireGuard around a
// tun.Device. All methods may be called concurrently.
type Device struct {
	wg      *device.Device
	own     mesh.PublicKey
	sockets *Sockets
	release func() // of the sockets, at the end

	mu    sync.Mutex // serialises changes, so that peers and owner are what wg holds
	peers map[mesh.PublicKey]Peer
	owner map[netip.Addr]mesh.PublicKey // by allowed IP
	port  uint16

	// counters of spoofed packets, by the device's own handle for a peer.
	// Read in the packet path, hence no mutex.
	spoofed sync.Map // *device.Peer -> *atomic.Uint64

	stats stats
}

// NewDevice starts a WireGuard device without peers and brings it up: some
// platforms never report their tunnel device as up, so the device wouldn't come up
// by itself. On an error o.TUN is closed.
func NewDevice(o Options) (*Device, error) {
	if o.TUN == nil || o.Logger == nil || o.PrivateKey.IsZero() {
		return nil, errors.New("start WireGuard: tunnel device, logger and private key are required")
	}
	release := func() {}
	if o.Sockets == nil {
		o.Sockets = NewSockets(o.Logger)
		release = o.Sockets.Release
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.StatsInterval <= 0 {
		o.StatsInterval = time.Second
	}
	d := &Device{
		own:     o.PrivateKey.Public(),
		sockets: o.Sockets, release: release,
		peers: make(map[mesh.PublicKey]Peer),
		owner: make(map[netip.Addr]mesh.PublicKey),
	}
	log := &logger{slog: o.Logger, now: o.Now, dropped: d.countSpoofed}
	d.sockets.serve(o.Addresses, d.reopened)
	d.wg = device.NewDevice(o.TUN, o.Sockets, log.device())
	d.stats = stats{now: o.Now, interval: o.StatsInterval, read: d.readStats}
	if err := d.start(o); err != nil {
		d.Close()
		return nil, fmt.Errorf("start WireGuard: %w", err)
	}
	return d, nil
}

func (d *Device) start(o Options) error {
	config := "private_key=" + hex.EncodeToString(o.PrivateKey[:]) + "\n" + listenPortLine(o.ListenPort)
	if err := d.wg.IpcSet(config); err != nil {
		return err
	}
	if err := d.wg.Up(); err != nil {
		return err
	}
	return d.learnPort()
}

func listenPortLine(port uint16) string {
	return "listen_port=" + strconv.Itoa(int(port)) + "\n"
}

// learnPort asks the device which port it listens on. Called while there are
// no peers, or after the port changed, since the answer lists every peer.
func (d *Device) learnPort() error {
	got := newStatsReader()
	if err := d.wg.IpcGetOperation(got); err != nil {
		return err
	}
	d.port = got.port
	return nil
}

// PublicKey returns the host's own public key.
func (d *Device) PublicKey() mesh.PublicKey { return d.own }

// ListenPort returns the UDP port that the device listens on.
func (d *Device) ListenPort() uint16 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.port
}

// Set adds peer, or changes the one with its public key, touching no other
// peer's session. Repeating a Set does nothing. An endpoint taken back (set to
// zero) stays in use until the peer sends from another: WireGuard has no way
// to forget one. Set refuses an address that another peer has, which WireGuard
// would silently take away from that one.
func (d *Device) Set(peer Peer) error {
	if err := peer.validate(); err != nil {
		return fmt.Errorf("set peer %v: %w", peer.PublicKey, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.set(peer)
}

func (d *Device) set(peer Peer) error {
	// WireGuard takes its own key for a peer without a word and ignores it.
	if peer.PublicKey == d.own {
		return fmt.Errorf("set peer %v: that is the host's own key", peer.PublicKey)
	}
	for _, a := range peer.Addresses.List() {
		if owner, ok := d.owner[a]; ok && owner != peer.PublicKey {
			return fmt.Errorf("set peer %v: address %v belongs to peer %v", peer.PublicKey, a, owner)
		}
	}
	old, known := d.peers[peer.PublicKey]
	if known && old.same(peer) {
		return nil
	}
	if err := d.wg.IpcSet(peerConfig(old, peer, known)); err != nil {
		return d.abandon(peer.PublicKey, fmt.Errorf("set peer %v: %w", peer.PublicKey, err))
	}
	learned := !known && !peer.Endpoint.IsValid() && peer.Learned.IsValid()
	peer.Learned = netip.AddrPort{}
	if !known || old.Addresses != peer.Addresses {
		d.forget(old)
		for _, a := range peer.Addresses.List() {
			d.owner[a] = peer.PublicKey
		}
		d.sockets.know(peer.Addresses.List()...)
	}
	d.peers[peer.PublicKey] = peer
	d.watchSpoofed(peer.PublicKey)
	if learned {
		d.greet(peer.PublicKey)
	}
	return nil
}

// greet makes the device send the peer a keepalive, and before that a handshake
// where there is no session.
func (d *Device) greet(key mesh.PublicKey) {
	if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
		handle.SendKeepalive()
	}
}

// abandon removes a peer of which the device took only a part, so that what is
// known here and what the device holds don't differ.
func (d *Device) abandon(key mesh.PublicKey, cause error) error {
	if err := d.remove(key); err != nil {
		return errors.Join(cause, err)
	}
	return cause
}

// peerConfig returns what turns old into peer in the configuration protocol
// (https://www.wireguard.com/xplatform/): only lines for what differs. Replacing
// the allowed IPs isn't atomic in the device; in between, the peer's packets
// are dropped.
func peerConfig(old, peer Peer, known bool) string {
	var b strings.Builder
	b.WriteString("public_key=" + hex.EncodeToString(peer.PublicKey[:]) + "\n")
	if known {
		b.WriteString("update_only=true\n")
	}
	switch {
	case peer.Endpoint != old.Endpoint && peer.Endpoint.IsValid():
		b.WriteString("endpoint=" + peer.Endpoint.String() + "\n")
	case !known && peer.Learned.IsValid():
		// With the peer's creation: it can't have been heard yet.
		b.WriteString("endpoint=" + peer.Learned.String() + "\n")
	}
	if peer.Keepalive != old.Keepalive {
		b.WriteString("persistent_keepalive_interval=" + strconv.Itoa(int(peer.Keepalive/time.Second)) + "\n")
	}
	if peer.Addresses != old.Addresses {
		b.WriteString("replace_allowed_ips=true\n")
		for _, a := range peer.Addresses.List() {
			b.WriteString("allowed_ip=" + netip.PrefixFrom(a, a.BitLen()).String() + "\n")
		}
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

func (d *Device) remove(key mesh.PublicKey) error {
	handle := d.wg.LookupPeer(device.NoisePublicKey(key))
	// update_only: without it a key that the device doesn't know would be made
	// a peer first.
	config := "public_key=" + hex.EncodeToString(key[:]) + "\nupdate_only=true\nremove=true\n"
	if err := d.wg.IpcSet(config); err != nil {
		return fmt.Errorf("remove peer %v: %w", key, err)
	}
	d.forget(d.peers[key])
	delete(d.peers, key)
	if handle != nil {
		d.spoofed.Delete(handle)
	}
	return nil
}

// forget drops the addresses of a peer, or of none, from owner.
func (d *Device) forget(old Peer) {
	for _, a := range old.Addresses.List() {
		if a.IsValid() {
			delete(d.owner, a)
			d.sockets.forget(a)
		}
	}
}

// Sync makes the device's peers equal to want: removes first, so that an
// address may move from one peer to another, then adds and changes. Peers that
// already are as wanted aren't touched. It does all it can and returns the
// errors joined.
func (d *Device) Sync(want []Peer) error {
	var errs []error
	wanted := make(map[mesh.PublicKey]Peer, len(want))
	for _, p := range want {
		if err := p.validate(); err != nil {
			errs = append(errs, fmt.Errorf("set peer %v: %w", p.PublicKey, err))
			continue
		}
		wanted[p.PublicKey] = p
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for key := range d.peers {
		if _, ok := wanted[key]; !ok {
			errs = append(errs, d.remove(key))
		}
	}
	var changed []Peer
	for key, p := range wanted {
		if !d.peers[key].same(p) {
			changed = append(changed, p)
		}
	}
	for _, p := range changed {
		errs = append(errs, d.vacate(p, wanted))
	}
	for _, p := range changed {
		errs = append(errs, d.set(p))
	}
	return errors.Join(errs...)
}

// vacate removes the peers that have an address of p's and are to have another,
// which changes them too, so Sync adds them again: they have to let go of it
// before p can have it, and two may trade theirs.
func (d *Device) vacate(p Peer, wanted map[mesh.PublicKey]Peer) error {
	var errs []error
	for _, a := range p.Addresses.List() {
		owner, ok := d.owner[a]
		if ok && owner != p.PublicKey && !slices.Contains(wanted[owner].Addresses.List(), a) {
			errs = append(errs, d.remove(owner))
		}
	}
	return errors.Join(errs...)
}

// Peers returns what the device was last set to, in no order.
func (d *Device) Peers() []Peer {
	d.mu.Lock()
	defer d.mu.Unlock()
	peers := make([]Peer, 0, len(d.peers))
	for _, p := range d.peers {
		peers = append(peers, p)
	}
	return peers
}

// Rebind is for a change of networks or a wake from sleep: it replaces sockets
// that the system ended, forgets which of the host's addresses each peer was
// answered from, and sends a keepalive to every peer with a session, for peers
// don't know where the host is now. It waits until the port is served, however
// long that takes, or until ctx or the device ends.
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
	if err := d.sockets.renew(ctx); err != nil {
		return err
	}
	d.wg.SendKeepalivesToPeersWithCurrentKeypair()
	return nil
}

// reopened tells the peers with a session that the host hears them again. In a
// task of its own: it waits for senders, and they may wait for the receiver that
// calls it.
func (d *Device) reopened() { go d.wg.SendKeepalivesToPeersWithCurrentKeypair() }

// Listening returns nil while the UDP port is served, else why it isn't; see
// Sockets.
func (d *Device) Listening() error { return d.sockets.Listening() }

// SetSelf says where datagrams reach this device: at each address of the host, with its
// port. These are no peer's endpoint from now on; see Sockets. Saying the same again
// changes nothing.
func (d *Device) SetSelf(places []netip.AddrPort) { d.sockets.setSelf(places) }

// Looped returns how many datagrams were discarded because they came from or
// were for a mesh address or the host's own place; see Sockets.
func (d *Device) Looped() uint64 { return d.sockets.looped.Load() }

// Done is closed when the device has ended: by Close, or because its tunnel
// device died, after which a new Device is needed.
func (d *Device) Done() <-chan struct{} { return d.wg.Wait() }

// Close ends the device and closes its tunnel device, and its own sockets. It may
// be called again.
func (d *Device) Close() {
	d.wg.Close()
	d.release()
}

// watchSpoofed starts to count for a peer that may be new in the device.
func (d *Device) watchSpoofed(key mesh.PublicKey) {
	if handle := d.wg.LookupPeer(device.NoisePublicKey(key)); handle != nil {
		d.spoofed.LoadOrStore(handle, new(atomic.Uint64))
	}
}

// countSpoofed counts a packet that carried another source than the peer's.
func (d *Device) countSpoofed(handle *device.Peer) {
	if n, ok := d.spoofed.Load(handle); ok {
		n.(*atomic.Uint64).Add(1)
	}
}

// spoofedBy returns the count of the peer with key.
func (d *Device) spoofedBy(key mesh.PublicKey) uint64 {
	handle := d.wg.LookupPeer(device.NoisePublicKey(key))
	if n, ok := d.spoofed.Load(handle); ok {
		return n.(*atomic.Uint64).Load()
	}
	return 0
}
