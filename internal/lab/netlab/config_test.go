package netlab

// Parsing of WireGuard configurations.

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const sampleConfig = `# a phone
[Interface]
PrivateKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
Address = 100.70.8.9/32, fd6d:6573:6800::9/128
DNS = 9.9.9.9, 149.112.112.112
MTU = 1420

[Peer] # the host
PublicKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=
AllowedIPs = 0.0.0.0/0,::/0
Endpoint = [2001:db8::1]:51820
PersistentKeepalive = 25
`

func TestParseConfig(t *testing.T) {
	got, err := ParseConfig(sampleConfig)
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		PrivateKey: Key([]byte(strings.Repeat("\x01", 32))),
		Addresses:  []netip.Prefix{netip.MustParsePrefix("100.70.8.9/32"), netip.MustParsePrefix("fd6d:6573:6800::9/128")},
		DNS:        []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("149.112.112.112")},
		MTU:        1420,
		Peers: []ConfigPeer{{
			PublicKey:  Key([]byte(strings.Repeat("\x02", 32))),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
			Endpoint:   netip.MustParseAddrPort("[2001:db8::1]:51820"),
			Keepalive:  25,
		}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	again, err := ParseConfig(got.String())
	if err != nil || again.String() != got.String() {
		t.Errorf("printed and read again: %v\n%s", err, again)
	}
}

func TestParseConfigRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"section":   "[Tunnel]\n",
		"before":    "MTU = 1420\n",
		"no value":  "[Interface]\nMTU\n",
		"short key": "[Interface]\nPrivateKey = AQEB\n",
		"hook":      "[Interface]\nPostUp = reboot\n",
		"prefix":    "[Peer]\nAllowedIPs = 10.0.0.0/33\n",
		"host name": "[Peer]\nEndpoint = vpn.example:51820\n",
		"keepalive": "[Peer]\nPersistentKeepalive = 65536\n",
		"peer name": "[Peer]\nMTU = 1420\n",
	} {
		if c, err := ParseConfig(text); err == nil {
			t.Errorf("%s: %q was read as %v", name, text, c)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add(sampleConfig)
	f.Add("[Peer]\nPersistentKeepalive = off\n")
	f.Add("[Interface]\nAddress = 10.0.0.1, , \n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConfig(text)
		if err != nil {
			return
		}
		again, err := ParseConfig(c.String())
		if err != nil {
			t.Fatalf("printed configuration isn't read: %v\n%s", err, c)
		}
		if again.String() != c.String() {
			t.Fatalf("not stable:\n%s\n%s", c, again)
		}
	})
}
