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

// Peer is how the host reaches one peer.
//
// Of a peer's endpoints, Endpoint is the wanted one, and Learned was found out. As with
// WireGuard's own tools, an endpoint is where to begin: a peer that is heard from elsewhere,
// by a packet that only it can have made, is sent to there from then on. A Set or a Sync
// moves it back only if its Endpoint is another than before, and then at once.
//
// Unlike with those tools, a device that is made anew, after a restart or a change of the
// port, begins where the peer was last heard, not where it was configured: otherwise a peer
// that moved is dark until it sends by itself. If it doesn't answer there, the device turns
// to Endpoint, and stays with it until the peer is heard elsewhere.
type Peer struct {
	PublicKey mesh.PublicKey // required

	// AllowedIPs are the addresses that are reached through the peer: what is for them is
	// sent to it, and what it sends has to come from them. They have no host bits set.
	//
	// No two peers have the same prefix. One peer's may lie inside another's, as every
	// address does in a default route: the longest prefix that holds an address counts, in
	// both directions and in whatever order the peers were set. So an address that a peer
	// has as a whole prefix, /32 or /128, is its alone, whatever prefixes others have; a
	// shorter one only proves that a source isn't another peer's.
	AllowedIPs []netip.Prefix // optional: without one nothing passes

	Endpoint  netip.AddrPort // optional: zero leaves it to Learned, and to what the peer sends from
	Keepalive time.Duration  // optional: whole seconds up to mesh.MaxKeepalive, zero for none

	// Learned is where the peer was last heard, before this device had it. It is
	// looked at only when the device gets the peer anew: a handshake is sent there at
	// once. A Peer that differs in Learned only is the same.
	Learned netip.AddrPort // optional
}

// same reports whether the device makes no difference between p and q, once it
// has the peer.
func (p Peer) same(q Peer) bool {
	return p.PublicKey == q.PublicKey && p.Endpoint == q.Endpoint && p.Keepalive == q.Keepalive && slices.Equal(p.AllowedIPs, q.AllowedIPs)
}

// validate reports what the device would refuse, or silently misunderstand.
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
	for _, a := range p.AllowedIPs {
		if !a.IsValid() || a != a.Masked() || a.Addr().Is4In6() {
			return fmt.Errorf("allowed IP %v is not a prefix, or has host bits set", a)
		}
	}
	return nil
}

// Underlay is what a Bind may be besides, and what the device then makes use of.
type Underlay interface {
	// Attach is called by each device before it opens the Bind. From then on the Bind
	// discards what comes from, and sends nothing to, a place of which loops says that it
	// is inside the tunnel or the device itself; loops may be called concurrently. The Bind
	// calls reopened, which doesn't block, when it hears the network again after it didn't.
	Attach(loops func(netip.AddrPort) bool, reopened func())
	// Renew is called after a change of networks or a wake from sleep. It returns when the
	// Bind is in order, or when ctx ends, with the reason that it isn't.
	Renew(ctx context.Context) error
	// Listening returns nil while the Bind hears the network, else why it doesn't.
	Listening() error
}

// Options are what NewDevice needs.
type Options struct {
	TUN        tun.Device      // required: closed with the Device
	PrivateKey mesh.PrivateKey // required
	Logger     *slog.Logger    // required

	ListenPort uint16       // optional: UDP, 0 lets the system choose
	Addresses  []netip.Addr // optional: the host's own in the mesh, which only the tunnel reaches
	// Bind carries the encrypted packets. It is the caller's, so that it may outlive the
	// device. If it is an Underlay, too, that is made use of.
	Bind          conn.Bind        // optional: Sockets of the device's own, closed with it
	Now           func() time.Time // optional: time.Now
	StatsInterval time.Duration    // optional: see Stats, one second
}

// Device is the WireGuard device of the host: a userspace WireGuard around a
// tun.Device. All methods may be called concurrently.
type Device struct {
	wg       *device.Device
	own      mesh.PublicKey
	log      *slog.Logger
	bind     conn.Bind
	underlay Underlay // bind as one; nil where it isn't
	// configure is wg's IpcSet; tests look at what it is given.
	configure func(config string) error
	release   func() // of the device's own Sockets, at the end
	places    places

	mu    sync.Mutex // serialises changes, so that peers and owner are what wg holds
	peers map[mesh.PublicKey]Peer
	owner map[netip.Prefix]mesh.PublicKey // by allowed IP
	port  uint16
	// trying are the peers that began at a learned endpoint and have a configured one, by
	// when they are to have answered; see tryLearned. answered is the next look at that.
	trying   map[mesh.PublicKey]time.Time
	answered *time.Timer   // nil where none is due
	answer   time.Duration // answerTime
	closed   bool

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
		peers:  make(map[mesh.PublicKey]Peer),
		owner:  make(map[netip.Prefix]mesh.PublicKey),
		trying: make(map[mesh.PublicKey]time.Time),
		answer: answerTime,
	}
	d.places.add(o.Addresses...)
	if d.underlay, _ = o.Bind.(Underlay); d.underlay != nil {
		d.underlay.Attach(d.places.loops, d.reopened)
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

func (d *Device) start(o Options) error {
	config := "private_key=" + hex.EncodeToString(o.PrivateKey[:]) + "\n" + listenPortLine(o.ListenPort)
	if err := d.configure(config); err != nil {
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
// to forget one. Set refuses a prefix that another peer has, which WireGuard
// would silently take away from that one; see Peer.AllowedIPs.
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
			return taken(peer, a, owner)
		}
	}
	if err := d.set(peer); err != nil {
		return err
	}
	return d.trim(peer)
}

// taken says that a prefix of peer's is another one's.
func taken(peer Peer, a netip.Prefix, owner mesh.PublicKey) error {
	if a.IsSingleIP() {
		return fmt.Errorf("set peer %v: address %v belongs to peer %v", peer.PublicKey, a.Addr(), owner)
	}
	return fmt.Errorf("set peer %v: prefix %v belongs to peer %v", peer.PublicKey, a, owner)
}

// set adds or changes a peer, but leaves it the allowed IPs that it is to have no more;
// trim takes those away. What another peer has moves in one step: at no moment is it
// nobody's, for it would then belong to a peer with a shorter prefix around it.
func (d *Device) set(peer Peer) error {
	// WireGuard takes its own key for a peer without a word and ignores it.
	if peer.PublicKey == d.own {
		return fmt.Errorf("set peer %v: that is the host's own key", peer.PublicKey)
	}
	old, known := d.peers[peer.PublicKey]
	begin := netip.AddrPort{}
	switch {
	case !known && peer.Learned.IsValid():
		begin = peer.Learned // with the peer's creation: it can't have been heard yet
	case peer.Endpoint != old.Endpoint:
		begin = peer.Endpoint
		delete(d.trying, peer.PublicKey)
	}
	gets := without(peer.AllowedIPs, old.AllowedIPs)
	if err := d.configure(peerConfig(peer, old, known, begin, gets)); err != nil {
		touched := []mesh.PublicKey{peer.PublicKey}
		for _, a := range gets {
			if from, ok := d.owner[a]; ok {
				touched = append(touched, from)
			}
		}
		return d.abandon(fmt.Errorf("set peer %v: %w", peer.PublicKey, err), touched...)
	}
	for _, a := range gets {
		if from, ok := d.owner[a]; ok && from != peer.PublicKey {
			other := d.peers[from]
			other.AllowedIPs = without(other.AllowedIPs, []netip.Prefix{a})
			d.peers[from] = other
		}
		d.owner[a] = peer.PublicKey
	}
	d.places.addPrefixes(gets)
	learned := peer.Learned
	peer.Learned, peer.AllowedIPs = netip.AddrPort{}, slices.Concat(old.AllowedIPs, gets)
	d.peers[peer.PublicKey] = peer
	d.watchSpoofed(peer.PublicKey)
	if !known && learned.IsValid() {
		d.tryLearned(peer, learned)
	}
	return nil
}

// trim takes away the allowed IPs that a peer has and isn't to have, and keeps its others
// in the order in which they were given.
func (d *Device) trim(peer Peer) error {
	held, known := d.peers[peer.PublicKey]
	if !known {
		return nil // abandoned since it was set
	}
	if lost := without(held.AllowedIPs, peer.AllowedIPs); len(lost) > 0 {
		config := "public_key=" + hex.EncodeToString(peer.PublicKey[:]) + "\nupdate_only=true\n"
		for _, a := range lost {
			config += "allowed_ip=-" + a.String() + "\n"
		}
		if err := d.configure(config); err != nil {
			return d.abandon(fmt.Errorf("set peer %v: %w", peer.PublicKey, err), peer.PublicKey)
		}
		d.disown(lost)
	}
	held.AllowedIPs = slices.Clone(peer.AllowedIPs)
	d.peers[peer.PublicKey] = held
	return nil
}

// disown notes that no peer has some prefixes any more.
func (d *Device) disown(prefixes []netip.Prefix) {
	for _, a := range prefixes {
		delete(d.owner, a)
	}
	d.places.removePrefixes(prefixes)
}

// without returns those of a that aren't in b.
func without(a, b []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(a), func(p netip.Prefix) bool { return slices.Contains(b, p) })
}

// abandon removes peers of which the device took only a part, so that what is
// known here and what the device holds don't differ.
func (d *Device) abandon(cause error, keys ...mesh.PublicKey) error {
	errs := []error{cause}
	for _, key := range keys {
		errs = append(errs, d.remove(key))
	}
	return errors.Join(errs...)
}

// peerConfig returns what turns old into peer in the configuration protocol
// (https://www.wireguard.com/xplatform/): only lines for what differs. begin is where the
// peer is sent to from now on, if valid, and gets the allowed IPs that it has to get.
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

func (d *Device) remove(key mesh.PublicKey) error {
	handle := d.wg.LookupPeer(device.NoisePublicKey(key))
	// update_only: without it a key that the device doesn't know would be made
	// a peer first.
	config := "public_key=" + hex.EncodeToString(key[:]) + "\nupdate_only=true\nremove=true\n"
	if err := d.configure(config); err != nil {
		return fmt.Errorf("remove peer %v: %w", key, err)
	}
	d.disown(d.peers[key].AllowedIPs)
	delete(d.peers, key)
	delete(d.trying, key)
	if handle != nil {
		d.spoofed.Delete(handle)
	}
	return nil
}

// Sync makes the device's peers equal to want. Peers that already are as wanted
// aren't touched, and the others keep their sessions; an allowed IP that is another
// peer's now moves in one step. Of peers that want the same one, the peer that has it
// keeps it, else the first in want gets it; the others stay as they were. Sync does all
// it can and returns the errors joined.
func (d *Device) Sync(want []Peer) error {
	var errs []error
	wanted := make(map[mesh.PublicKey]int, len(want)) // places in want
	for i, p := range want {
		if err := p.validate(); err != nil {
			errs = append(errs, fmt.Errorf("set peer %v: %w", p.PublicKey, err))
			continue
		}
		wanted[p.PublicKey] = i
	}
	// conflict returns why p can't be as it is wanted.
	conflict := func(p Peer) error {
		for _, a := range p.AllowedIPs {
			if owner, ok := d.owner[a]; ok && owner != p.PublicKey {
				if i, ok := wanted[owner]; ok && slices.Contains(want[i].AllowedIPs, a) {
					return taken(p, a, owner)
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
	// What peers lose comes last, so that what others get of it isn't nobody's in between.
	for _, p := range changed {
		errs = append(errs, d.trim(p))
	}
	for key := range d.peers {
		if _, ok := wanted[key]; !ok {
			errs = append(errs, d.remove(key))
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

// Rebind is for a change of networks or a wake from sleep: it has the Bind see to its
// sockets, and sends a keepalive to every peer with a session, for peers don't know where
// the host is now. It waits until the Bind is in order, however long that takes, or until
// ctx or the device ends.
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
			return fmt.Errorf("open the network again: %w", err)
		}
	} else if err := d.underlay.Renew(ctx); err != nil {
		return err
	}
	d.wg.SendKeepalivesToPeersWithCurrentKeypair()
	return nil
}

// reopened tells the peers with a session that the host hears them again. In a
// task of its own: it waits for senders, and they may wait for the receiver that
// calls it.
func (d *Device) reopened() { go d.wg.SendKeepalivesToPeersWithCurrentKeypair() }

// Listening returns nil while the Bind hears the network, else why it doesn't. Of a Bind
// that isn't an Underlay nothing is known.
func (d *Device) Listening() error {
	if d.underlay == nil {
		return nil
	}
	return d.underlay.Listening()
}

// SetSelf says where datagrams reach this device: at each address of the host, with its
// port. These are no peer's endpoint from now on; see Sockets. Saying the same again
// changes nothing.
func (d *Device) SetSelf(at []netip.AddrPort) { d.places.setSelf(at) }

// Done is closed when the device has ended: by Close, or because its tunnel
// device died, after which a new Device is needed.
func (d *Device) Done() <-chan struct{} { return d.wg.Wait() }

// Close ends the device and closes its tunnel device, and its own sockets. It may
// be called again.
func (d *Device) Close() {
	d.mu.Lock()
	d.closed = true
	if d.answered != nil {
		d.answered.Stop()
	}
	d.mu.Unlock()
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
