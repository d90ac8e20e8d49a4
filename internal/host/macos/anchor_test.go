package macos

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

var start = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// testHost is a Mac with Wi-Fi as the uplink, an Ethernet LAN and another VPN.
func testHost() policy.Host {
	return policy.Host{
		Interface: "utun7", Uplink4: "en0", Uplink6: "en0",
		Forwarding: policy.Families{IPv4: true, IPv6: true},
		Interfaces: []policy.Interface{
			{Name: "en0", Addresses: prefixes("203.0.113.1/24", "2001:db8:1::1/64")},
			{Name: "en5", Addresses: prefixes("192.168.77.1/24")},
			{Name: "utun7", Addresses: prefixes("100.64.0.1/32", "fd6d:6573:6800::1/128")},
		},
		Routes: []policy.Route{{Prefix: netip.MustParsePrefix("198.18.0.0/16"), Interface: "utun3"}},
	}
}

func prefixes(texts ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(texts))
	for i, t := range texts {
		out[i] = netip.MustParsePrefix(t)
	}
	return out
}

// testMesh returns a mesh of n peers. The elements of have are assigned to them in
// rotation.
func testMesh(n int, have ...mesh.Permissions) policy.Mesh {
	m := policy.Mesh{
		Prefixes:  []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
		Addresses: []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd6d:6573:6800::1")},
		Serves:    policy.EveryService,
	}
	for i := range n {
		k := i + 2
		m.Peers = append(m.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(k), byte(k >> 8), byte(k >> 16)}, Name: fmt.Sprint("p", k),
			Addresses: mesh.Addresses{
				netip.AddrFrom4([4]byte{100, 64 + byte(k>>16), byte(k >> 8), byte(k)}),
				netip.AddrFrom16([16]byte{0xfd, 0x6d, 0x65, 0x73, 0x68, 13: byte(k >> 16), 14: byte(k >> 8), 15: byte(k)}),
			},
			Permissions: mesh.Granted(have[i%len(have)]),
		})
	}
	return m
}

const everything = mesh.All

func mustRuleset(t testing.TB, m policy.Mesh, h policy.Host) *policy.Ruleset {
	t.Helper()
	r, err := policy.Compile(m, h, start)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustAnchor(t testing.TB, r *policy.Ruleset) *Anchor {
	t.Helper()
	a, err := Compile(r, AnchorOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *Anchor) rules() []*pfconf.Rule {
	var out []*pfconf.Rule
	for _, l := range a.Lines {
		if r, ok := l.Statement.(*pfconf.Rule); ok {
			out = append(out, r)
		}
	}
	return out
}

// TestRulesDontGrowWithPeers compiles meshes of one peer and of 3,000: the rules are the
// same, since peers are in tables.
func TestRulesDontGrowWithPeers(t *testing.T) {
	one := mustAnchor(t, mustRuleset(t, testMesh(1, everything), testHost()))
	many := mustAnchor(t, mustRuleset(t, testMesh(3000, everything, 0, mesh.Routing), testHost()))
	if d := cmp.Diff(one.rules(), many.rules(), cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); d != "" {
		t.Error(d)
	}
}

// TestTables checks that the anchor declares exactly the tables that its rules refer to,
// and that none of them is empty.
func TestTables(t *testing.T) {
	for have := range everything + 1 {
		for _, peers := range []int{0, 1, 3} {
			h := testHost()
			h.Forwarding.IPv6 = have%2 == 0
			a := mustAnchor(t, mustRuleset(t, testMesh(peers, have), h))
			declared, used := map[string]bool{}, map[string]bool{}
			for _, l := range a.Lines {
				switch s := l.Statement.(type) {
				case *pfconf.Table:
					declared[s.Name] = len(s.Addrs) > 0
				case *pfconf.Rule:
					for _, a := range slices.Concat(s.From.Addrs, s.To.Addrs) {
						if a.Kind == pfconf.AddrTable {
							used[a.Name] = true
						}
					}
				}
				if l.Why == "" {
					t.Errorf("%+v has no reason", l.Statement)
				}
			}
			if d := cmp.Diff(used, declared); d != "" {
				t.Errorf("%d peers with %v: tables used and declared: %s", peers, have, d)
			}
		}
	}
}

// TestNoFloatingState checks that every state is bound to one interface and that every
// rule but IGMP's is quick, so that no later rule overrides it.
func TestNoFloatingState(t *testing.T) {
	for _, r := range mustAnchor(t, mustRuleset(t, testMesh(2, everything), testHost())).rules() {
		if r.Action != pfconf.Pass && r.Action != pfconf.Block {
			continue
		}
		bound := r.State == pfconf.KeepState && r.StateOptions.Policy == pfconf.IfBound
		if r.Action == pfconf.Pass && !bound && r.State != pfconf.NoState {
			t.Errorf("%s makes floating states", r.Label)
		}
		// A later rule may override the verdict on IGMP.
		if r.Quick == (r.Label == labelPrefix+"igmp") || r.Label == "" {
			t.Errorf("rule %q has quick %v", r.Label, r.Quick)
		}
	}
}

// TestAnchorPath checks which labels are valid as an anchor's name below com.apple.
func TestAnchorPath(t *testing.T) {
	for _, tt := range []struct{ label, path, err string }{
		{"org.meshhelper", "com.apple/org.meshhelper", ""},
		{"a_b-C.9", "com.apple/a_b-C.9", ""},
		{strings.Repeat("x", 63), "com.apple/" + strings.Repeat("x", 63), ""},
		{strings.Repeat("x", 64), "", "64 bytes"},
		{"", "", "0 bytes"},
		{"_org", "", "letter or digit first"},
		{"a/b", "", `unexpected '/'`},
		{"a b", "", `unexpected ' '`},
		{`a"b`, "", `unexpected '"'`},
	} {
		path, err := AnchorPath(tt.label)
		if path != tt.path || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: got %q, %v", tt.label, path, err)
		}
	}
}

// TestCompileRefuses compiles with MTUs that are out of range and with an invalid label.
func TestCompileRefuses(t *testing.T) {
	r := mustRuleset(t, testMesh(1, everything), testHost())
	for _, o := range []AnchorOptions{{MTU: 1279}, {MTU: 65536}, {MTU: -1}, {Label: "com.apple/x"}} {
		if _, err := Compile(r, o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

// TestNATAddress checks that IPv6 packets are translated to the source address in the
// facts, and packets of IPv4 to the interface's address at the time.
func TestNATAddress(t *testing.T) {
	for _, named := range []netip.Addr{{}, netip.MustParseAddr("2001:db8:1::1")} {
		h := testHost()
		h.Source6 = named
		seen := 0
		for _, r := range mustAnchor(t, mustRuleset(t, testMesh(1, everything), h)).rules() {
			if r.Action != pfconf.Nat {
				continue
			}
			seen++
			got := r.Pool.Addrs[0]
			if r.Family == pfconf.Inet6 && r.Interfaces[0].Name == "en0" && named.IsValid() {
				if got.Kind != pfconf.AddrPrefix || got.Prefix != netip.PrefixFrom(named, 128) {
					t.Errorf("with source %v, packets are translated to %+v", named, got)
				}
			} else if got.Kind != pfconf.AddrDynamic || got.Name != r.Interfaces[0].Name {
				t.Errorf("%v packets by %s are translated to %+v", r.Family, r.Interfaces[0].Name, got)
			}
		}
		if seen < 4 {
			t.Errorf("%d translation rules, want at least 4", seen)
		}
	}
}

// TestKills checks which flows end for each way in which a peer's access can narrow.
func TestKills(t *testing.T) {
	all := mustRuleset(t, testMesh(2, everything), testHost())
	elsewhere := testHost()
	elsewhere.Uplink4 = "en5"
	temporary := testHost()
	temporary.Interfaces[0].Addresses = append(temporary.Interfaces[0].Addresses, netip.MustParsePrefix("2001:db8:1::77/64"))
	for _, tt := range []struct {
		about     string
		old, next *policy.Ruleset
		want      string
	}{
		{"nothing narrower", all, all, ""},
		{"routing goes, and lan with it", all, mustRuleset(t, testMesh(2, mesh.Incoming, everything), testHost()),
			"100.64.0.2/32>0.0.0.0/0 fd6d:6573:6800::2/128>::/0"},
		{"incoming goes", all, mustRuleset(t, testMesh(2, everything, mesh.Routing|mesh.LAN), testHost()),
			"100.64.0.3/32>100.64.0.1/32 100.64.0.3/32>192.168.77.1/32 100.64.0.3/32>203.0.113.1/32 " +
				"fd6d:6573:6800::3/128>2001:db8:1::1/128 fd6d:6573:6800::3/128>fd6d:6573:6800::1/128"},
		{"lan goes", all, mustRuleset(t, testMesh(2, everything, mesh.Routing|mesh.Incoming), testHost()),
			"100.64.0.3/32>10.0.0.0/8 100.64.0.3/32>169.254.0.0/16 100.64.0.3/32>172.16.0.0/12 " +
				"100.64.0.3/32>192.168.0.0/16 100.64.0.3/32>198.18.0.0/15 100.64.0.3/32>203.0.113.0/24 " +
				"fd6d:6573:6800::3/128>64:ff9b::a00:0/104 fd6d:6573:6800::3/128>64:ff9b::a9fe:0/112 fd6d:6573:6800::3/128>64:ff9b::ac10:0/108 " +
				"fd6d:6573:6800::3/128>64:ff9b::c0a8:0/112 fd6d:6573:6800::3/128>64:ff9b::c612:0/111 fd6d:6573:6800::3/128>64:ff9b::cb00:7100/120 " +
				"fd6d:6573:6800::3/128>64:ff9b:1::/48 fd6d:6573:6800::3/128>2001:db8:1::/64 " +
				"fd6d:6573:6800::3/128>2002:a00::/24 fd6d:6573:6800::3/128>2002:a9fe::/32 fd6d:6573:6800::3/128>2002:ac10::/28 " +
				"fd6d:6573:6800::3/128>2002:c0a8::/32 fd6d:6573:6800::3/128>2002:c612::/31 fd6d:6573:6800::3/128>2002:cb00:7100::/40 " +
				"fd6d:6573:6800::3/128>fc00::/7"},
		{"a peer goes", all, mustRuleset(t, testMesh(1, everything), testHost()),
			"100.64.0.3/32>0.0.0.0/0 0.0.0.0/0>100.64.0.3/32 fd6d:6573:6800::3/128>::/0 ::/0>fd6d:6573:6800::3/128"},
		{"the uplink moves", mustRuleset(t, testMesh(1, everything), testHost()), mustRuleset(t, testMesh(1, everything), elsewhere),
			"100.64.0.2/32>0.0.0.0/0"},
		{"an address comes", mustRuleset(t, testMesh(1, everything), testHost()), mustRuleset(t, testMesh(1, everything), temporary),
			"fd6d:6573:6800::2/128>2001:db8:1::77/128"},
	} {
		var got []string
		for _, k := range Kills(tt.old, tt.next, policy.Diff(tt.old, tt.next)) {
			got = append(got, k.From.String()+">"+k.To.String())
		}
		if g := strings.Join(got, " "); g != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.about, g, tt.want)
		}
	}
}

// TestKillsAreBounded has ten thousand peers lose a permission at once: coarse kills
// replace one kill per peer, and still end every flow that the fine ones would.
func TestKillsAreBounded(t *testing.T) {
	old := mustRuleset(t, testMesh(10_000, everything), testHost())
	next := mustRuleset(t, testMesh(10_000, mesh.Routing), testHost())
	kills := Kills(old, next, policy.Diff(old, next))
	if len(kills) > maxKills {
		t.Errorf("Kills returned %d kills", len(kills))
	}
	for _, fine := range Kills(old, next, policy.Diff(old, next)[5000:5010]) {
		if !slices.ContainsFunc(kills, func(k Kill) bool {
			return k.From.Overlaps(fine.From) && k.To.Overlaps(fine.To) && k.From.Bits() <= fine.From.Bits() && k.To.Bits() <= fine.To.Bits()
		}) {
			t.Errorf("no kill covers %v", fine)
		}
	}
	all := Kills(nil, next, policy.Diff(old, next))
	if want := 4; len(all) != want {
		t.Errorf("ending all flows takes %d kills, want %d", len(all), want)
	}
}

// Labels returns the sorted labels of the anchor's rules.
func (a *Anchor) Labels() []string {
	var out []string
	for _, r := range a.rules() {
		if r.Label != "" {
			out = append(out, r.Label)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
