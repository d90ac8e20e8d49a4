package macos

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestWay looks packets' routes up in a Mac's routing table.
func TestWay(t *testing.T) {
	at, cidr := netip.MustParseAddr, netip.MustParsePrefix
	const up = darwin.RouteUp
	n := &darwin.Network{
		Interfaces: []darwin.Interface{
			{Name: "en0", Index: 4, Flags: darwin.InterfaceUp, Addresses: []darwin.Address{{Prefix: cidr("192.168.1.5/24")}}},
			{Name: "utun3", Index: 9, Flags: darwin.InterfaceUp, Addresses: []darwin.Address{{Prefix: cidr("10.8.0.2/32")}}},
		},
		Routes: []darwin.Route{
			{Dst: cidr("0.0.0.0/0"), Gateway: at("192.168.1.1"), Index: 4, Flags: up},
			{Dst: cidr("0.0.0.0/0"), Gateway: at("10.8.0.1"), Index: 9, Flags: up | darwin.RouteScoped},
			{Dst: cidr("192.168.1.0/24"), Index: 4, Flags: up},
			{Dst: cidr("10.0.0.0/8"), Index: 9, Flags: up},
			{Dst: cidr("10.9.0.0/16"), Index: 9, Flags: up | darwin.RouteReject},
			{Dst: cidr("10.10.0.0/16"), Index: 9, Flags: up | darwin.RouteBlackhole},
			{Dst: cidr("198.51.100.0/24"), Index: 77, Flags: up},
		},
	}
	for _, tt := range []struct {
		to   string
		want host.Way
	}{
		{"9.9.9.9", host.Way{Interface: "en0", Router: at("192.168.1.1"), Source: at("192.168.1.5")}},
		{"192.168.1.77", host.Way{Interface: "en0", Source: at("192.168.1.5")}},
		{"10.1.1.1", host.Way{Interface: "utun3", Source: at("10.8.0.2")}},
		{"10.9.1.1", host.Way{Refused: host.WayUnreachable}},
		{"10.10.1.1", host.Way{Refused: host.WayBlackhole}},
		{"192.168.1.5", host.Way{Local: true}},
		{"198.51.100.1", host.Way{Refused: host.WayNone}},
		{"2001:db8::1", host.Way{Refused: host.WayNone}},
	} {
		if got, want := (*Backend)(nil).WayCommand(at(tt.to)), "route -n get "; !strings.HasPrefix(got, want) || strings.Contains(got, "-inet6") != at(tt.to).Is6() {
			t.Errorf("the route to %s is shown by %q", tt.to, got)
		}
		if got := wayOf(n, host.Packet{Packet: policy.Packet{Dst: at(tt.to)}}); got != tt.want {
			t.Errorf("to %s: %+v, want %+v", tt.to, got, tt.want)
		}
	}
}
