package netlab

// Tunnels between stock WireGuard ends, without the product.

import (
	"net/netip"
	"testing"
)

// plainMesh runs wireguard-go on A, B, C and D. B forwards and filters nothing:
// the mesh that the product must not be.
type plainMesh struct {
	*Picture
	mesh map[string]Pair    // mesh addresses by host name
	ends map[string]*Tunnel // by host name
}

func newPlainMesh(t *testing.T) *plainMesh {
	t.Helper()
	p := newPicture(t)
	m := &plainMesh{Picture: p, ends: map[string]*Tunnel{}, mesh: map[string]Pair{
		"A": pair("100.64.0.1", "fd6d:6573:6800::1"), "B": pair("100.64.0.2", "fd6d:6573:6800::2"),
		"C": pair("100.64.0.3", "fd6d:6573:6800::3"), "D": pair("100.64.0.4", "fd6d:6573:6800::4"),
	}}
	for _, name := range []string{"net.ipv6.conf.wan0.accept_ra", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		value := "1"
		if name == "net.ipv6.conf.wan0.accept_ra" {
			value = "2" // or the learned default route goes with forwarding
		}
		if err := p.B.SetSysctl(name, value); err != nil {
			t.Fatal(err)
		}
	}
	hub := m.config(t, "B")
	hub.ListenPort = 51820
	ends := []*Host{p.A, p.C, p.D}
	var configs []Config
	for _, h := range ends {
		c := m.config(t, h.Name)
		hub.Peers = append(hub.Peers, ConfigPeer{PublicKey: c.PrivateKey.PublicKey(), AllowedIPs: c.Addresses})
		c.Peers = []ConfigPeer{{
			PublicKey:  hub.PrivateKey.PublicKey(),
			AllowedIPs: defaultRoutes,
			Endpoint:   netip.AddrPortFrom(Addresses().BUplink.V4, hub.ListenPort),
		}}
		configs = append(configs, c)
	}
	// B first: an end that finds no peer tries again after five seconds only.
	m.start(t, p.B, hub)
	for i, h := range ends {
		m.start(t, h, configs[i])
	}
	return m
}

func (m *plainMesh) config(t *testing.T, name string) Config {
	t.Helper()
	private, _, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	at := m.mesh[name]
	return Config{PrivateKey: private, MTU: 1420, Addresses: []netip.Prefix{
		netip.PrefixFrom(at.V4, 32), netip.PrefixFrom(at.V6, 128)}}
}

func (m *plainMesh) start(t *testing.T, h *Host, c Config) {
	t.Helper()
	end, err := h.WireGuard("wg0", c.String())
	if err != nil {
		t.Fatal(err)
	}
	m.ends[h.Name] = end
}

// TestTunnels proves that the ends shake hands and that what a peer sends to the
// internet goes by B.
func TestTunnels(t *testing.T) {
	m := newPlainMesh(t)
	at := Addresses()
	for _, h := range []*Host{m.A, m.C, m.D} {
		for _, to := range at.I.List() {
			if err := hello(h, m.I, netip.AddrPortFrom(to, 7)); err != nil {
				t.Errorf("%s to I at %s: %v", h.Name, to, err)
			}
		}
		if when, err := m.ends[h.Name].LastHandshake(); err != nil || when.IsZero() {
			t.Errorf("%s had no handshake: %v", h.Name, err)
		}
	}
	if err := hello(m.C, m.A, netip.AddrPortFrom(m.mesh["A"].V6, 7)); err != nil {
		t.Errorf("C to A: %v", err)
	}
}
