package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// TestOverlaps checks the overlap reported for each kind of other owner of a part of the
// mesh prefixes, and that a mesh moved to the proposed free prefix has no overlap.
func TestOverlaps(t *testing.T) {
	for _, tt := range []struct {
		about  string
		change func(*Mesh, *Host)
		want   string
	}{
		{"none", nil, ""},
		{"another VPN", func(_ *Mesh, h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"utun4", prefixes("100.99.1.1/32", "fd6d:6573:6800:99::1/128")})
			h.Routes = append(h.Routes, Route{prefix("100.101.2.3/32"), "utun4"}, Route{prefix("100.101.2.3/32"), "utun4"}, Route{prefix("100.100.100.100/32"), "utun4"})
		}, `2 utun4 100.64.0.0/10 [100.99.1.1/32] [] [] false
2 utun4 fd6d:6573:6800::/48 [fd6d:6573:6800:99::1/128] [] [] false
3 utun4 100.64.0.0/10 [100.100.100.100/32 100.101.2.3/32] [] [] false`},
		{"a peer's address", func(_ *Mesh, h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"utun4", prefixes("100.64.0.2/24")})
			h.Routes = append(h.Routes, Route{prefix("100.64.0.0/24"), "utun4"})
		}, "2 utun4 100.64.0.0/10 [100.64.0.2/24] [a c] [a] false"},
		{"the host's own address", func(_ *Mesh, h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"lo0", prefixes("100.64.0.1/32")})
		}, "2 lo0 100.64.0.0/10 [100.64.0.1/32] [] [] true"},
		{"a route around the prefix", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix("100.0.0.0/8"), "utun4"})
		}, "3 utun4 100.64.0.0/10 [100.0.0.0/8] [a c] [] false"},
		{"a carrier's uplink", func(_ *Mesh, h *Host) {
			h.Interfaces[0].Addresses = prefixes("100.80.0.7/20")
			h.Router4 = addr("100.80.0.1")
		}, "1 en0 100.64.0.0/10 [100.80.0.1/32 100.80.0.7/32] [] [] false"},
		{"resolvers, and IPsec", func(_ *Mesh, h *Host) {
			h.Resolvers = []netip.Addr{addr("100.100.2.136"), addr("9.9.9.9")}
			h.IPsec = prefixes("100.70.0.0/16", "10.0.0.0/8")
		}, `4  100.64.0.0/10 [100.70.0.0/16] [] [] false
5  100.64.0.0/10 [100.100.2.136/32] [] [] false`},
		{"a default route in two halves", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix("0.0.0.0/1"), "utun4"}, Route{prefix("128.0.0.0/1"), "utun4"})
		}, ""},
		{"routes of the mesh interface and of loopback", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix("100.64.0.0/10"), "utun7"}, Route{prefix("100.101.2.3/32"), "lo0"})
		}, ""},
	} {
		m, h := picture(7), pictureHost()
		if tt.change != nil {
			tt.change(&m, &h)
		}
		r := compile(t, m, h)
		var got []string
		for _, o := range r.Overlaps() {
			got = append(got, fmt.Sprint(o.Kind, " ", o.Interface, " ", o.Mesh, " ", o.Prefixes, " ", o.Peers, " ", o.Equal, " ", o.Own))
		}
		if g := strings.Join(got, "\n"); g != tt.want {
			t.Errorf("%s: %s\nwant %s", tt.about, g, tt.want)
		}
		for _, like := range r.Mesh().Addresses {
			free, ok := r.Free(like)
			if !ok {
				t.Errorf("%s: no free prefix like %v", tt.about, like)
				continue
			}
			m.Prefixes = []netip.Prefix{free}
			m.Addresses, m.Peers = nil, nil
			moved := compile(t, m, h)
			if got := moved.Overlaps(); len(got) > 0 {
				t.Errorf("%s: the free prefix %v overlaps %+v", tt.about, free, got)
			}
		}
	}
	// Once a whole private range is routed, Free takes a prefix of the next range, and fails
	// when all ranges are routed.
	m, h := picture(0), pictureHost()
	for _, all := range []string{"10.0.0.0/8", "172.16.0.0/12"} {
		if p, ok := compile(t, m, h).Free(hostA4); !ok || h.routedOverlaps(p) {
			t.Errorf("before %s: %v, %v", all, p, ok)
		}
		h.Routes = append(h.Routes, Route{prefix(all), "utun3"})
	}
	if p, ok := compile(t, m, h).Free(hostA4); ok {
		t.Errorf("every range is in use, but %v is proposed as free", p)
	}
}

func (h Host) routedOverlaps(p netip.Prefix) bool {
	for _, q := range h.routed() {
		if q.Overlaps(p) {
			return true
		}
	}
	return false
}
