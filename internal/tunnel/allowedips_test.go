package tunnel

import (
	"bytes"
	"encoding/hex"
	"errors"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/tun/tuntest"
	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

// table is WireGuard's table of allowed IPs: the key of the peer that has each prefix.
type table map[netip.Prefix]mesh.PublicKey

// apply applies lines of the configuration protocol as WireGuard does
// (https://www.wireguard.com/xplatform/), and calls each after every line.
func (t table) apply(config string, each func()) {
	var key mesh.PublicKey
	for line := range strings.Lines(config) {
		switch name, value, _ := strings.Cut(strings.TrimSpace(line), "="); name {
		case "public_key":
			b, _ := hex.DecodeString(value)
			key = mesh.PublicKey(b)
		case "allowed_ip":
			if lost, ok := strings.CutPrefix(value, "-"); !ok {
				t[netip.MustParsePrefix(value)] = key
			} else if p := netip.MustParsePrefix(lost); t[p] == key {
				delete(t, p)
			}
		case "remove", "replace_allowed_ips":
			maps.DeleteFunc(t, func(_ netip.Prefix, its mesh.PublicKey) bool { return its == key })
		}
		each()
	}
}

// through returns the peer to which an address is routed, by the longest matching prefix.
func (t table) through(a netip.Addr) (key mesh.PublicKey) {
	longest := -1
	for p, its := range t {
		if p.Contains(a) && p.Bits() > longest {
			key, longest = its, p.Bits()
		}
	}
	return key
}

// held returns the table of allowed IPs that the device itself reports.
func held(t testing.TB, d *Device) table {
	t.Helper()
	config, err := d.wg.IpcGet()
	if err != nil {
		t.Fatal(err)
	}
	out := table{}
	out.apply(config, func() {})
	return out
}

// TestPrefixInsidePrefix gives one peer a default route and another peer an address in it.
// Whatever the order in which they are set, each sends and receives with its own addresses,
// and a packet with an address of the other is discarded as spoofed.
func TestPrefixInsidePrefix(t *testing.T) {
	for name, order := range map[string][]int{"wide first": {0, 1}, "narrow first": {1, 0}} {
		t.Run(name, func(t *testing.T) {
			host, wide, narrow := newEnd(t, 20), newEnd(t, 21), newEnd(t, 22)
			peers := []Peer{wide.peer(), narrow.peer()}
			peers[0].AllowedIPs = append(peers[0].AllowedIPs, prefixes("0.0.0.0/0", "::/0")...)
			for _, i := range order {
				if err := host.Set(peers[i]); err != nil {
					t.Fatal(err)
				}
			}
			toHost := host.peer()
			toHost.AllowedIPs = prefixes("0.0.0.0/0", "::/0")
			for _, e := range []*end{wide, narrow} {
				if err := e.Set(toHost); err != nil {
					t.Fatal(err)
				}
			}
			elsewhere := netip.MustParseAddr("192.0.2.7")
			for _, hop := range []struct {
				from, to *end
				src, dst netip.Addr
			}{
				{host, wide, host.addr[0], elsewhere},
				{host, narrow, host.addr[0], narrow.addr[0]},
				{wide, host, elsewhere, host.addr[0]},
				{narrow, host, narrow.addr[0], host.addr[0]},
			} {
				want := tuntest.Ping(hop.dst, hop.src)
				hop.from.send(t, want)
				if got := hop.to.receive(t); !bytes.Equal(got, want) {
					t.Errorf("from %v to %v: sent %x, arrived %x", hop.src, hop.dst, want, got)
				}
			}
			wide.send(t, tuntest.Ping(host.addr[0], narrow.addr[0]))
			narrow.send(t, tuntest.Ping(host.addr[0], elsewhere))
			until(t, "a packet of each with the other's source is discarded", func() bool {
				s := host.fresh(t)
				return s[wide.PublicKey()].Spoofed == 1 && s[narrow.PublicKey()].Spoofed == 1
			})
			// The addresses of a default route aren't mesh addresses: datagrams may come from
			// them.
			if host.loopFilter.loops(netip.AddrPortFrom(elsewhere, 51820)) {
				t.Error("a datagram from an address of the default route is discarded")
			}
		})
	}
}

// TestSyncMovesInOneStep syncs random lists of peers, one of which always has a default
// route. After each Sync WireGuard has the wanted prefixes. A prefix that another peer has
// before and after is never routed to the default route in between.
func TestSyncMovesInOneStep(t *testing.T) {
	host := newEnd(t, 20)
	now, look := table{}, func() {}
	host.configure = func(config string) error {
		now.apply(config, look)
		return host.wg.IpcSet(config)
	}
	key := func(i int) mesh.PublicKey { return mesh.PublicKey{1: 9, 2: byte(i)} }
	wide := Peer{PublicKey: key(0), AllowedIPs: prefixes("0.0.0.0/0", "::/0")}
	pool := prefixes("100.64.1.1/32", "100.64.1.2/32", "100.64.1.3/32", "100.64.1.0/30", "fd6d:6573:6800::1/128", "fd6d:6573:6800::/64")
	owners := func(peers []Peer) table {
		out := table{}
		for _, p := range peers {
			for _, a := range p.AllowedIPs {
				out[a] = p.PublicKey
			}
		}
		return out
	}
	before := []Peer{wide}
	if err := host.Sync(before); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		for range 5 {
			want := []Peer{wide}
			for i := 1; i <= 4; i++ {
				if rapid.Bool().Draw(rt, "known") {
					want = append(want, Peer{PublicKey: key(i)})
				}
			}
			for _, a := range pool {
				if i := rapid.IntRange(0, len(want)-1).Draw(rt, a.String()); i > 0 {
					want[i].AllowedIPs = append(want[i].AllowedIPs, a)
				}
			}
			was, is := owners(before), owners(want)
			look = func() {
				for _, a := range pool {
					if was[a] != (mesh.PublicKey{}) && is[a] != (mesh.PublicKey{}) && now.through(a.Addr()) == wide.PublicKey {
						rt.Errorf("%v is routed to the default route in between: %v", a, now)
					}
				}
			}
			if err := host.Sync(want); err != nil {
				rt.Fatal(err)
			}
			if got := held(t, host.Device); !maps.Equal(got, is) || !maps.Equal(host.owner, is) {
				rt.Fatalf("WireGuard has %v, the device %v, want %v", got, host.owner, is)
			}
			for _, p := range want {
				if !host.peers[p.PublicKey].same(p) {
					rt.Errorf("the device has peer %+v, want %+v", host.peers[p.PublicKey], p)
				}
			}
			before = want
		}
	})
}

// TestSyncSharesNothing syncs lists in which two peers want the same prefix. The peer that
// has it keeps it, whatever else changes for that peer; if none has it, the first one in the
// list gets it. The other peer stays as it was, and Sync returns an error.
func TestSyncSharesNothing(t *testing.T) {
	host := newEnd(t, 20)
	peer := func(seed byte, allowed ...string) Peer {
		return Peer{PublicKey: meshtest.Key(t, seed).Public(), AllowedIPs: prefixes(allowed...)}
	}
	const a, b, c = "100.64.1.1/32", "100.64.1.2/32", "192.0.2.0/24"
	for i, step := range []struct{ want, got []Peer }{
		{[]Peer{peer(31, a), peer(32, b)}, []Peer{peer(31, a), peer(32, b)}},
		{[]Peer{peer(31, a, b), peer(32, b)}, []Peer{peer(31, a), peer(32, b)}},
		{[]Peer{peer(31, a, b), peer(32, b, c)}, []Peer{peer(31, a), peer(32, b, c)}},
		{[]Peer{peer(31, a), peer(33, c), peer(32, b, c)}, []Peer{peer(31, a), peer(32, b, c)}},
		{[]Peer{peer(34, "198.51.100.0/24"), peer(33, "198.51.100.0/24")}, []Peer{peer(34, "198.51.100.0/24")}},
	} {
		err := host.Sync(step.want)
		if conflict := i > 0; (err != nil) != conflict || conflict && !strings.Contains(err.Error(), "belongs to peer") {
			t.Errorf("step %d: %v", i, err)
		}
		want := table{}
		for _, p := range step.got {
			for _, a := range p.AllowedIPs {
				want[a] = p.PublicKey
			}
		}
		if got := held(t, host.Device); !maps.Equal(got, want) {
			t.Errorf("step %d: WireGuard has %v, want %v", i, got, want)
		}
	}
}

// TestRefusedConfiguration has WireGuard refuse the configuration that swaps the prefixes of
// two peers: both peers are removed, and the next Sync adds them again.
func TestRefusedConfiguration(t *testing.T) {
	host := newEnd(t, 20)
	x := Peer{PublicKey: meshtest.Key(t, 31).Public(), AllowedIPs: prefixes("100.64.1.1/32")}
	y := Peer{PublicKey: meshtest.Key(t, 32).Public(), AllowedIPs: prefixes("100.64.1.2/32")}
	if err := host.Sync([]Peer{x, y}); err != nil {
		t.Fatal(err)
	}
	x.AllowedIPs, y.AllowedIPs = y.AllowedIPs, x.AllowedIPs
	refused := errors.New("no")
	host.configure = func(config string) error {
		if strings.Contains(config, "allowed_ip=") {
			return refused
		}
		return host.wg.IpcSet(config)
	}
	if err := host.Sync([]Peer{x, y}); !errors.Is(err, refused) {
		t.Errorf("Sync returns %v, want %v", err, refused)
	}
	if got := held(t, host.Device); len(got) != 0 || len(host.owner) != 0 || len(host.peers) != 0 {
		t.Errorf("WireGuard has %v, the device %v, want none", got, host.owner)
	}
	host.configure = host.wg.IpcSet
	if err := host.Sync([]Peer{x, y}); err != nil {
		t.Fatal(err)
	}
	if got, want := held(t, host.Device), (table{x.AllowedIPs[0]: x.PublicKey, y.AllowedIPs[0]: y.PublicKey}); !maps.Equal(got, want) {
		t.Errorf("WireGuard has %v, want %v", got, want)
	}
}
