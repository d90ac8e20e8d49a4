package tunnel

import (
	"maps"
	"net/netip"
	"sync/atomic"

	"github.com/gaissmai/bart"
)

// places are where no encrypted packet comes from or goes to. The zero value has none. It
// is read for each datagram, so it is replaced rather than changed; its writers are
// serialised by the Device.
type places struct {
	mesh atomic.Pointer[bart.Lite]               // addresses inside the tunnel
	self atomic.Pointer[map[netip.AddrPort]bool] // where the device itself is reached
}

// loops reports whether what is sent to a place comes back here, or reaches no other device:
// it is at a mesh address of the host or a known peer, at the device's own place, or nowhere.
func (p *places) loops(at netip.AddrPort) bool {
	if at.Addr().IsUnspecified() || at.Port() == 0 {
		return true
	}
	if at.Addr().Zone() != "" {
		at = netip.AddrPortFrom(at.Addr().WithZone(""), at.Port())
	}
	if mesh := p.mesh.Load(); mesh != nil && mesh.Contains(at.Addr()) {
		return true
	}
	self := p.self.Load()
	return self != nil && (*self)[at]
}

// add puts addresses inside the tunnel.
func (p *places) add(addrs ...netip.Addr) {
	t := p.tree()
	for _, a := range addrs {
		t = t.InsertPersist(netip.PrefixFrom(a, a.BitLen()))
	}
	p.mesh.Store(t)
}

// addPrefixes puts those prefixes inside the tunnel that are one address each: a peer's own.
// Of a longer list of addresses, such as a default route, it is only known that the tunnel
// leads there, and endpoints of peers may be in it.
func (p *places) addPrefixes(prefixes []netip.Prefix) {
	t := p.tree()
	for _, a := range prefixes {
		if a.IsSingleIP() {
			t = t.InsertPersist(a)
		}
	}
	p.mesh.Store(t)
}

// removePrefixes takes out what addPrefixes put in.
func (p *places) removePrefixes(prefixes []netip.Prefix) {
	t := p.tree()
	for _, a := range prefixes {
		if a.IsSingleIP() {
			t = t.DeletePersist(a)
		}
	}
	p.mesh.Store(t)
}

func (p *places) tree() *bart.Lite {
	if t := p.mesh.Load(); t != nil {
		return t
	}
	return new(bart.Lite)
}

// setSelf says where the device is reached, without zones.
func (p *places) setSelf(at []netip.AddrPort) {
	self := make(map[netip.AddrPort]bool, len(at))
	for _, a := range at {
		self[a] = true
	}
	if old := p.self.Load(); old == nil || !maps.Equal(self, *old) {
		p.self.Store(&self)
	}
}
