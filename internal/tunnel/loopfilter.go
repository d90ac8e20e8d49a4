package tunnel

import (
	"maps"
	"net/netip"
	"sync/atomic"

	"github.com/gaissmai/bart"
)

// loopFilter holds the addresses that can't be another device's underlay endpoint: a
// datagram sent to one comes back into this device, or reaches nothing. The zero value
// holds none.
//
// Readers consult it for every datagram and take no lock: both tables are replaced, never
// modified. The Device serialises the writers.
type loopFilter struct {
	mesh atomic.Pointer[bart.Lite]               // single addresses inside the tunnel; nil for none
	self atomic.Pointer[map[netip.AddrPort]bool] // the device's own endpoints, without zones
}

// loops reports whether at is an address inside the tunnel (the host's own or that of a
// known peer), one of the device's own endpoints, or no endpoint at all: the unspecified
// address or port 0.
func (f *loopFilter) loops(at netip.AddrPort) bool {
	if at.Addr().IsUnspecified() || at.Port() == 0 {
		return true
	}
	if at.Addr().Zone() != "" {
		at = netip.AddrPortFrom(at.Addr().WithZone(""), at.Port())
	}
	if mesh := f.mesh.Load(); mesh != nil && mesh.Contains(at.Addr()) {
		return true
	}
	self := f.self.Load()
	return self != nil && (*self)[at]
}

// add adds addresses inside the tunnel.
func (f *loopFilter) add(addrs ...netip.Addr) {
	t := f.tree()
	for _, a := range addrs {
		t = t.InsertPersist(netip.PrefixFrom(a, a.BitLen()))
	}
	f.mesh.Store(t)
}

// addPrefixes adds the single-address prefixes, which are a peer's own mesh addresses. It
// skips shorter ones: the tunnel leads to a default route, say, but endpoints of peers
// outside the tunnel lie in it as well.
func (f *loopFilter) addPrefixes(prefixes []netip.Prefix) {
	f.update(prefixes, (*bart.Lite).InsertPersist)
}

// removePrefixes undoes addPrefixes.
func (f *loopFilter) removePrefixes(prefixes []netip.Prefix) {
	f.update(prefixes, (*bart.Lite).DeletePersist)
}

// update replaces the table by one that is changed for each single-address prefix.
func (f *loopFilter) update(prefixes []netip.Prefix, change func(*bart.Lite, netip.Prefix) *bart.Lite) {
	t := f.tree()
	for _, a := range prefixes {
		if a.IsSingleIP() {
			t = change(t, a)
		}
	}
	f.mesh.Store(t)
}

// tree returns the current table of mesh addresses, which the caller must not modify: its
// methods ending in Persist return a changed copy.
func (f *loopFilter) tree() *bart.Lite {
	if t := f.mesh.Load(); t != nil {
		return t
	}
	return new(bart.Lite)
}

// setSelf replaces the device's own endpoints, which have no zones. Equal ones keep the
// current map, as the helper calls it in every round.
func (f *loopFilter) setSelf(at []netip.AddrPort) {
	self := make(map[netip.AddrPort]bool, len(at))
	for _, a := range at {
		self[a] = true
	}
	if old := f.self.Load(); old == nil || !maps.Equal(self, *old) {
		f.self.Store(&self)
	}
}
