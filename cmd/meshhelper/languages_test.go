package main

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestExplain asks about every class of destination, with and without the
// permission, and wants the rule that holds the answer in each language.
func TestExplain(t *testing.T) {
	r := explained(t)
	for _, c := range []struct {
		peer, to string
		pass     bool
		policy   policy.Rule
		pf, nft  string // part of the rule, and where it stands
	}{
		{"all", "100.64.0.1", true, policy.RuleIncoming, `"mesh-incoming"`, "permitted_self4: "},
		{"none", "203.0.113.1", false, policy.RuleNoIncoming, `"mesh-no-incoming"`, "permitted_self4: drop"},
		{"all", "192.168.77.2", true, policy.RuleLAN, `"mesh-lan"`, "@may_lan4 return"},
		{"none", "192.168.77.2", false, policy.RuleNoLAN, `"mesh-no-lan"`, "@lan4 drop"},
		{"all", "192.0.2.77", true, policy.RuleLAN, `"mesh-lan"`, "@may_lan4 return"},
		{"all", "192.0.2.77", false, policy.RuleHairpin, `"mesh-hairpin"`, "ip daddr @outside4"},
		{"all", "192.0.2.9", true, policy.RuleInternet, `"mesh-internet"`, "@may_routing4 return"},
		{"none", "192.0.2.9", false, policy.RuleNoRouting, `"mesh-no-routing"`, "chain permitted4: drop"},
		{"all", "2001:db8::1", true, policy.RuleInternet, `"mesh-internet"`, "@may_routing6 return"},
		{"none", "2001:db8::1", false, policy.RuleNoRouting, `"mesh-no-routing"`, "chain permitted6: drop"},
		{"all", "100.64.0.9", false, policy.RuleMesh, `"mesh-mesh"`, "ip daddr 100.64.0.0/10 drop"},
		{"all", "224.0.0.1", false, policy.RuleMartian, `"mesh-martian"`, "@martian4 drop"},
	} {
		q := api.Question{Peer: c.peer, To: netip.MustParseAddr(c.to), Proto: "udp", Port: 7}
		if c.policy == policy.RuleHairpin {
			q.Port = 51820
		}
		for language, want := range map[string]string{"pf": c.pf, "nft": c.nft, "guard": ""} {
			e, err := explain.Explain(r, q, mesh.Grants{}, languages[language])
			if err != nil {
				t.Fatal(err)
			}
			if e.Pass != c.pass || e.Policy != c.policy.String() {
				t.Errorf("%s to %s: pass %v by %q", c.peer, c.to, e.Pass, e.Policy)
			}
			if !strings.Contains(e.Loaded, want) || (e.Loaded == "") != (want == "") {
				t.Errorf("%s to %s: the rule of %s is %q, want %q", c.peer, c.to, language, e.Loaded, want)
			}
		}
	}
}

// TestEveryPlaceIsThere looks for each rule that the maps name, so that a change
// of the rules can't leave them pointing nowhere.
func TestEveryPlaceIsThere(t *testing.T) {
	r := explained(t)
	for rule := range pfLabels {
		_, text, err := languages["pf"].Render(r)
		if err != nil {
			t.Fatal(err)
		}
		if findPf(text, rule, policy.Packet{Dst: netip.IPv4Unspecified(), Proto: policy.ProtoUDP}) == "" {
			t.Errorf("pf has no rule for %q", rule)
		}
	}
	for _, s := range policy.AllServices {
		p := policy.Packet{Dst: netip.IPv4Unspecified(), Proto: s.Protos[0]}
		for language, find := range map[string]func(string, policy.Rule, policy.Packet) string{"pf": findPf, "nft": findNft} {
			_, text, err := languages[language].Render(r)
			if err != nil {
				t.Fatal(err)
			}
			if got := find(text, s.Rule, p); !strings.Contains(got, " "+strconv.Itoa(int(s.Port))) && !strings.Contains(got, "port domain") {
				t.Errorf("%s: the rule of %s is %q", language, s.Name, got)
			}
		}
	}
	_, text, _ := languages["nft"].Render(r)
	for rule := range nftRules {
		for _, dst := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if findNft(text, rule, policy.Packet{Dst: dst}) == "" {
				t.Errorf("nft has no rule for %q, IPv6 %v", rule, dst.Is6())
			}
		}
	}
}

// TestRuleOfTheProtocol checks that of several rules for one line of the policy the
// one for the packet's protocol and family is named, rendered and as pfctl shows it.
func TestRuleOfTheProtocol(t *testing.T) {
	_, rendered, err := languages["pf"].Render(explained(t))
	if err != nil {
		t.Fatal(err)
	}
	shown := "pass in quick on utun7 proto tcp from <routing> to any label \"mesh-internet\"\n" +
		"pass in quick on utun7 proto udp from <routing> to any label \"mesh-internet\"\n" +
		"pass in quick on utun7 inet proto icmp from <routing> to any label \"mesh-internet\"\n" +
		"pass in quick on utun7 inet6 proto ipv6-icmp from <routing> to any label \"mesh-internet\"\n"
	for _, text := range []string{rendered, shown} {
		for _, tt := range []struct {
			dst   string
			proto uint8
			want  string
		}{
			{"9.9.9.9", policy.ProtoTCP, "tcp"}, {"2620:fe::fe", policy.ProtoUDP, "udp"},
			{"9.9.9.9", policy.ProtoICMP, " icmp "}, {"2620:fe::fe", policy.ProtoICMPv6, "ipv6-icmp"},
		} {
			got := findPf(text, policy.RuleInternet, policy.Packet{Dst: netip.MustParseAddr(tt.dst), Proto: tt.proto})
			if !strings.Contains(got, tt.want) {
				t.Errorf("%s by %d: %q, want one with %q", tt.dst, tt.proto, got, tt.want)
			}
		}
	}
}

// explained compiles a mesh of a peer with every permission and one with none.
func explained(t *testing.T) *policy.Ruleset {
	t.Helper()
	r, err := policy.Compile(policy.Mesh{
		Prefixes:   []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
		Addresses:  []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd6d:6573:6800::1")},
		ListenPort: 51820,
		Serves:     policy.EveryService,
		Peers: []mesh.Peer{
			{PublicKey: mesh.PublicKey{1}, Name: "all", Permissions: mesh.Granted(mesh.All),
				Addresses: mesh.Addresses{netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("fd6d:6573:6800::2")}},
			{PublicKey: mesh.PublicKey{2}, Name: "none",
				Addresses: mesh.Addresses{netip.MustParseAddr("100.64.0.3"), netip.MustParseAddr("fd6d:6573:6800::3")}},
		},
	}, policy.Host{
		Interface: "utun7", Uplink4: "en0", Uplink6: "en0",
		Outside:    []netip.Addr{netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8:9::7")},
		Forwarding: policy.Families{IPv4: true, IPv6: true},
		Interfaces: []policy.Interface{
			{Name: "en0", Addresses: []netip.Prefix{netip.MustParsePrefix("203.0.113.1/24")}},
			{Name: "en5", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.77.1/24")}},
		},
	}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}
