package linux

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// someHost is a laptop: one interface to the internet, one network beside it.
func someHost() policy.Host {
	return policy.Host{
		Interface: "mesh0", Uplink4: "eth0", Uplink6: "eth0",
		Forwarding: policy.Families{IPv4: true, IPv6: true},
		Interfaces: []policy.Interface{
			{Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("203.0.113.2/26"), netip.MustParsePrefix("2001:db8:1::2/64")}},
			{Name: "eth1", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.77.1/24"), netip.MustParsePrefix("fd77::1/64")}},
		},
		Routes: []policy.Route{{Prefix: netip.MustParsePrefix("198.18.0.0/16"), Interface: "wg7"}},
	}
}

func ruleset(t testing.TB, m policy.Mesh, h policy.Host) *policy.Ruleset {
	t.Helper()
	r, err := policy.Compile(m, h, time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestText compares the whole ruleset with testdata/table.nft, which is good to read.
func TestText(t *testing.T) {
	m := meshOf(grants{ann: mesh.Routing | mesh.LAN, bob: mesh.Incoming})
	m.Serves, m.ListenPort = policy.DNS, 51820
	m.Former = []netip.Addr{netip.MustParseAddr("100.64.0.12"), netip.MustParseAddr("fd6d:6573:6800::12")}
	h := someHost()
	h.Resolvers = []netip.Addr{netip.MustParseAddr("100.100.2.136")}
	h.Outside, h.OutsidePort = []netip.Addr{netip.MustParseAddr("192.0.2.77")}, 4500
	h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("100.96.0.0/16"), Interface: "cni0"})
	golden(t, "table.nft", Text(ruleset(t, m, h), testMTU))
}

// rules returns all rules with their chains' names.
func rules(t *table) []string {
	var out []string
	for _, c := range t.chains {
		for _, r := range c.rules {
			out = append(out, c.name+": "+r.String())
		}
	}
	return out
}

func TestRulesDontGrowWithPeers(t *testing.T) {
	few := compile(ruleset(t, crowd(1), someHost()), params{mtu: testMTU})
	many := compile(ruleset(t, crowd(1000), someHost()), params{mtu: testMTU})
	if diff := cmp.Diff(rules(few), rules(many)); diff != "" {
		t.Errorf("rules differ (-1 +1000 peers):\n%s", diff)
	}
}

// TestWithoutForwardingNothingIsForwarded checks that the rules for forwarding are
// missing.
func TestWithoutForwardingNothingIsForwarded(t *testing.T) {
	h := someHost()
	h.Forwarding.IPv6 = false
	h.Uplink4 = ""
	for _, line := range rules(compile(ruleset(t, meshOf(grants{ann: all}), h), params{mtu: testMTU})) {
		if strings.HasPrefix(line, "permitted6: ") && strings.Contains(line, "return") {
			t.Errorf("IPv6 isn't forwarded, but: %s", line)
		}
		if strings.HasPrefix(line, "permitted4: ") && strings.Contains(line, "may_routing4 return") {
			t.Errorf("there is no IPv4 uplink, but: %s", line)
		}
	}
}

// TestChainsExist follows every jump and goto.
func TestChainsExist(t *testing.T) {
	full := compile(ruleset(t, meshOf(grants{ann: all}), someHost()), params{mtu: testMTU})
	have, sets := map[string]bool{}, map[string]bool{}
	for _, c := range full.chains {
		if have[c.name] {
			t.Errorf("chain %s occurs twice", c.name)
		}
		have[c.name] = true
	}
	for _, s := range full.sets {
		sets[s.name] = true
	}
	for _, c := range full.chains {
		for _, r := range c.rules {
			if r.action.chain != "" && !have[r.action.chain] {
				t.Errorf("%s: there is no chain %s", r, r.action.chain)
			}
			for _, m := range r.matches {
				if (m.op == inSet || m.op == notInSet) && !sets[m.text] {
					t.Errorf("%s: there is no set %s", r, m.text)
				}
			}
		}
	}
}

// TestWithoutLeavesTheRest subtracts prefixes from others.
func TestWithoutLeavesTheRest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		addr := rapid.Custom(func(t *rapid.T) netip.Addr {
			return netip.AddrFrom4([4]byte{rapid.SampledFrom([]byte{0, 10, 255}).Draw(t, "a"), 0, rapid.Byte().Draw(t, "c") & 3, rapid.Byte().Draw(t, "d") & 0xc3})
		})
		prefixes := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
			return netip.PrefixFrom(addr.Draw(t, "address"), rapid.IntRange(0, 32).Draw(t, "bits"))
		}), 0, 6)
		a, b := prefixes.Draw(t, "from"), prefixes.Draw(t, "without")
		s := without("test", "ipv4_addr", a, b)
		for i := 1; i < len(s.elements); i++ {
			if before := s.elements[i-1].after; before == nil || bytes.Compare(before, s.elements[i].key) > 0 {
				t.Fatalf("ranges overlap: %v", s.elements)
			}
		}
		holds := func(ps []netip.Prefix, x netip.Addr) bool {
			return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(x) })
		}
		for _, x := range rapid.SliceOfN(addr, 1, 8).Draw(t, "addresses") {
			got := slices.ContainsFunc(s.elements, func(e element) bool {
				return bytes.Compare(e.key, x.AsSlice()) <= 0 && (e.after == nil || bytes.Compare(x.AsSlice(), e.after) < 0)
			})
			if want := holds(a, x) && !holds(b, x); got != want {
				t.Fatalf("%v in %v without %v: %v, in the set: %v", x, a, b, want, got)
			}
		}
	})
}

// TestRangesHoldWhatThePrefixesHold compares an interval set with its prefixes, address
// by address.
func TestRangesHoldWhatThePrefixesHold(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		addr := rapid.Custom(func(t *rapid.T) netip.Addr {
			// Few varying bits, so that prefixes nest, touch and repeat.
			return netip.AddrFrom4([4]byte{rapid.SampledFrom([]byte{0, 10, 255}).Draw(t, "a"), 0, rapid.Byte().Draw(t, "c") & 3, rapid.Byte().Draw(t, "d") & 0xc3})
		})
		prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
			return netip.PrefixFrom(addr.Draw(t, "address"), rapid.IntRange(0, 32).Draw(t, "bits"))
		})
		ps := rapid.SliceOfN(prefix, 0, 8).Draw(t, "prefixes")
		s := ranges("test", "ipv4_addr", ps)
		for i := 1; i < len(s.elements); i++ {
			if before := s.elements[i-1].after; before == nil || bytes.Compare(before, s.elements[i].key) > 0 {
				t.Fatalf("ranges overlap: %v", s.elements)
			}
		}
		for _, a := range rapid.SliceOfN(addr, 1, 8).Draw(t, "addresses") {
			want, got := false, false
			for _, p := range ps {
				want = want || p.Contains(a)
			}
			for _, e := range s.elements {
				got = got || bytes.Compare(e.key, a.AsSlice()) <= 0 && (e.after == nil || bytes.Compare(a.AsSlice(), e.after) < 0)
			}
			if got != want {
				t.Fatalf("%v in %v: %v, in the set: %v", a, ps, want, got)
			}
		}
	})
}
