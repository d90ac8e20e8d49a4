package linux

import (
	"net/netip"
	"strings"
	"testing"
)

func entry(prefix, iface string, metric int) routeEntry {
	return routeEntry{prefix: netip.MustParsePrefix(prefix), iface: iface, metric: metric}
}

func TestUplink(t *testing.T) {
	const mainTable = 254
	plain := []routingRule{{priority: 32766, table: mainTable, suppress: -1, forPeers: true}}
	for _, tt := range []struct {
		name   string
		rules  []routingRule
		tables map[int][]routeEntry
		want   string
	}{
		{"none", plain, map[int][]routeEntry{mainTable: {entry("192.168.1.0/24", "eth0", 0)}}, ""},
		{"one", plain, map[int][]routeEntry{mainTable: {entry("0.0.0.0/0", "eth0", 100)}}, "eth0"},
		{"lower metric", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/0", "wlan0", 600), entry("0.0.0.0/0", "eth0", 100),
		}}, "eth0"},
		{"equal", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/0", "wan1", 100), entry("0.0.0.0/0", "wan0", 100), entry("0.0.0.0/0", "mesh0", 100), entry("0.0.0.0/0", "wwan0", 600),
		}}, "wan0 wan1"},
		{"an equal split", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/1", "tun0", 0), entry("128.0.0.0/1", "tun0", 0), entry("0.0.0.0/1", "tun1", 0), entry("128.0.0.0/1", "tun1", 0),
		}}, "tun0 tun1"},
		{"our own is none", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/0", "mesh0", 0), entry("0.0.0.0/0", "eth0", 100),
		}}, "eth0"},
		{"a VPN splits it", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/0", "eth0", 100), entry("0.0.0.0/1", "tun0", 0), entry("128.0.0.0/1", "tun0", 0),
		}}, "tun0"},
		{"half a split is none", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/0", "eth0", 100), entry("0.0.0.0/1", "tun0", 0),
		}}, "eth0"},
		{"split in four", plain, map[int][]routeEntry{mainTable: {
			entry("0.0.0.0/2", "tun0", 0), entry("64.0.0.0/2", "tun0", 0), entry("128.0.0.0/1", "tun0", 0),
		}}, "tun0"},
		{"what IANA gave out", plain, map[int][]routeEntry{mainTable: {
			entry("2000::/3", "tun0", 0), entry("::/0", "eth0", 100),
		}}, "tun0"},
		{"by a rule, as wg-quick", []routingRule{
			{priority: 1, table: mainTable, suppress: 0, forPeers: true},
			{priority: 2, table: 51820, suppress: -1, forPeers: true},
			{priority: 3, table: mainTable, suppress: -1, forPeers: true},
		}, map[int][]routeEntry{mainTable: {entry("0.0.0.0/0", "eth0", 0)}, 51820: {entry("0.0.0.0/0", "wg0", 0)}}, "wg0"},
		{"by a rule for others", []routingRule{
			{priority: 1, table: 7, suppress: -1}, {priority: 2, table: mainTable, suppress: -1, forPeers: true},
		}, map[int][]routeEntry{mainTable: {entry("0.0.0.0/0", "eth0", 0)}, 7: {entry("0.0.0.0/0", "wwan0", 0)}}, "eth0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, equal := (hostRouting{tt.rules, tt.tables}).uplink("mesh0"); strings.Join(append([]string{got.iface}, equal...), " ") != tt.want {
				t.Errorf("got %q and %q, want %q", got.iface, equal, tt.want)
			}
		})
	}
}
