package macos

import (
	"context"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// neighbour is other software's part of a Mac's pf ruleset.
type neighbour struct {
	main    string
	anchors map[string]string
	// wins says that its position lets it decide before our anchor.
	wins bool
}

// hooks are the main ruleset's calls of com.apple's child anchors.
const hooks = scrubHook + translationHooks

const (
	scrubHook        = "scrub-anchor \"com.apple/*\"\n"
	translationHooks = "nat-anchor \"com.apple/*\"\nrdr-anchor \"com.apple/*\"\n"
)

const filterHook = "anchor \"com.apple/*\"\n"

// neighbours are configurations seen on Macs. The conformance vectors have anchors of the
// same shapes.
var neighbours = map[string]neighbour{
	"Internet Sharing, behind": {
		main: hooks + "nat-anchor \"com.apple.internet-sharing/*\"\n" + filterHook + "anchor \"com.apple.internet-sharing/*\"\n",
		anchors: map[string]string{"com.apple.internet-sharing/base_v4": `nat on en0 inet from 192.168.77.0/24 to any -> (en0)
pass in on en1 keep state
pass out on en0
`, "com.apple.internet-sharing/network_isolation": "block drop quick from 192.168.77.0/24 to 192.168.78.0/24\n"},
	},
	"Internet Sharing, before": {
		main: scrubHook + "nat-anchor \"com.apple.internet-sharing/*\"\n" + translationHooks + "anchor \"com.apple.internet-sharing/*\"\n" + filterHook,
		anchors: map[string]string{"com.apple.internet-sharing/base_v4": `nat on en0 inet from 192.168.77.0/24 to any -> (en0)
pass in on en1 keep state
pass out on en0
`},
	},
	"Internet Sharing in com.apple, translating all": {
		main:    appleMain,
		anchors: map[string]string{"com.apple/100.internet-sharing": "nat on en0 inet from any to any -> (en0)\npass on en1 no state\n"},
	},
	"kill switch, behind": {
		main:    hooks + filterHook + "anchor \"killswitch\"\n",
		anchors: map[string]string{"killswitch": "block drop out all\npass out quick on lo0\npass out quick on en0 proto udp to 198.51.100.7 port 51820\npass quick on utun7\n"},
	},
	// Drawn destination ports don't include the VPN's own port: its rule would pass a
	// peer's packet there, as in "before and quick".
	"kill switch, before": {
		main:    hooks + "anchor \"vpn\"\n" + filterHook,
		anchors: map[string]string{"vpn": "block drop all\npass quick on lo0\npass out quick on en0 proto udp to 8.8.8.8 port 1194 keep state\n"},
	},
	"kill switch, before and quick": {
		main:    hooks + "anchor \"vpn\"\n" + filterHook,
		anchors: map[string]string{"vpn": "pass out quick on en0 proto udp to 8.8.8.8 port 51820 keep state\nblock drop out quick on en0 all\n"},
		wins:    true,
	},
	"firewall that blocks all, behind": {main: appleMain + "block drop all\n"},
	"firewall that blocks all, before": {main: hooks + "block drop all\n" + filterHook},
	"firewall that passes all, behind": {main: appleMain + "pass all keep state\n"},
	"firewall that passes all, before": {main: hooks + "pass all keep state\n" + filterHook},
	"application firewall": {
		main: appleMain,
		anchors: map[string]string{"com.apple/250.ApplicationFirewall": "pass in quick inet proto tcp from any to any port 443 flags S/SA keep state\n" +
			"block drop in quick proto udp from any to any port 53\n"},
		wins: true,
	},
	"AirDrop": {
		main: appleMain,
		anchors: map[string]string{
			"com.apple":                           "anchor \"200.AirDrop/*\"\nanchor \"250.ApplicationFirewall/*\"\n",
			"com.apple/200.AirDrop/x":             "pass in quick on awdl0 proto udp to any port 5353\n",
			"com.apple/250.ApplicationFirewall/x": "block drop in quick all\n",
		},
	},
	"redirection to a peer":     {main: hooks + "rdr on en0 inet proto tcp from any to any port 443 -> 100.64.0.2\nnat on en1 inet from any to any -> (en1)\n" + filterHook},
	"translation into the mesh": {main: hooks + "nat on utun7 inet from any to any -> (utun7)\n" + filterHook},
	"an earlier anchor passes all": {
		main: appleMain, anchors: map[string]string{"com.apple/100.x": "block drop in quick on utun7 proto tcp to any port 8080\npass all\n"},
		wins: true,
	},
	"an earlier anchor passes all for good": {
		main: appleMain, anchors: map[string]string{"com.apple/100.x": "pass quick all\n"},
		wins: true,
	},
	"an earlier redirection":             {main: scrubHook + "rdr on utun7 inet proto tcp from any to any port 443 -> 8.8.8.8\n" + translationHooks + filterHook, wins: true},
	"an empty main ruleset":              {main: "", wins: true},
	"a main ruleset without filter":      {main: hooks, wins: true},
	"a main ruleset without translation": {main: filterHook},
	"the tunnel skipped":                 {main: "set skip on { lo0 utun7 }\n" + appleMain, wins: true},
}

// load loads a neighbour's anchors.
func (n neighbour) load(t failer, m *pfsim.PF) {
	for path, text := range n.anchors {
		rs, err := pfconf.Parse(text)
		if err == nil {
			err = m.LoadAnchor(path, rs)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestNeighbours checks that beside other software's rules our anchor never passes more
// than the policy allows, unless a foreign rule decides first. FindForeign names that
// rule.
func TestNeighbours(t *testing.T) {
	for name, n := range neighbours {
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				w := drawWorld(t)
				next := drawChange(t, w)
				seed := rapid.Uint64().Draw(t, "packets")
				wider := n.isWider(t, w, next, seed)
				if wider != "" && !n.wins {
					t.Fatal(wider)
				}
				if wider == "" {
					return
				}
				found := n.foreign(t, w)
				for _, f := range append(found, n.foreign(t, next)...) {
					if f.Wider {
						return
					}
				}
				t.Fatalf("a foreign rule wins, but FindForeign doesn't name it: %v\n%s", found, wider)
			})
		})
	}
}

// isWider returns a packet that passes although the policy blocks it, or "".
func (n neighbour) isWider(t failer, w, next world, seed uint64) (packet string) {
	defer func() {
		if p := recover(); p != nil {
			d, ok := p.(difference)
			if !ok {
				panic(p)
			}
			packet = string(d)
		}
	}()
	c := newComparison(catcher{}, w, seed, n.main, nil)
	n.load(t, c.m)
	c.subset = true
	defer func() { amongNeighbours.add(*c.tally, n.wins) }()
	c.round(next)
	return ""
}

func (n neighbour) foreign(t failer, w world) []Foreign {
	m, err := w.newMachine(1, n.main)
	if err != nil {
		t.Fatal(err)
	}
	n.load(t, m)
	r, err := policy.Compile(w.mesh, w.host, start)
	if err != nil {
		t.Fatal(err)
	}
	a, err := Compile(r, AnchorOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.LoadAnchor(a.Path, a.Ruleset()); err != nil {
		t.Fatal(err)
	}
	found, err := FindForeign(context.Background(), &m.Machine, a, r)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestFindForeign checks the report about each neighbour on one host.
func TestFindForeign(t *testing.T) {
	w := world{mesh: testMesh(8, everything, 0, mesh.Routing, mesh.Incoming), host: testHost()}
	for _, tt := range []struct{ neighbour, want string }{
		{"Internet Sharing, behind", ""},
		{"Internet Sharing, before", ""},
		{"kill switch, behind", ""},
		{"firewall that blocks all, before", ""},
		{"AirDrop", ""},
		{"kill switch, before", "the rule `pass out quick on en0 inet proto udp from any to 8.8.8.8 port 1194 keep state (floating)` of the anchor vpn lets through udp"},
		{"kill switch, before and quick", "the rule `pass out quick on en0 inet proto udp from any to 8.8.8.8 port 51820 keep state (floating)` of the anchor vpn lets through udp 100.64.0.2 port 49152 > 8.8.8.8 port 51820 in on utun7 out on en0\n" +
			"the rule `block drop out quick on en0 all` of the anchor vpn stops or changes tcp 100.64.0.2"},
		{"application firewall", "the rule `pass in quick inet proto tcp from any to any port 443 flags S/SA keep state (floating)` of the anchor com.apple/250.ApplicationFirewall lets through"},
		{"Internet Sharing in com.apple, translating all", "the rule `nat on en0 inet all -> (en0) round-robin` of the anchor com.apple/100.internet-sharing stops or changes"},
		{"an earlier redirection", "the rule `rdr on utun7 inet proto tcp from any to any port 443 -> 8.8.8.8` of the main ruleset lets through"},
		{"an empty main ruleset", "nothing calls our anchor, or not all of it, which lets through"},
		{"a main ruleset without filter", "nothing calls our anchor, or not all of it, which lets through"},
		{"a main ruleset without translation", "nothing calls our anchor, or not all of it, which stops"},
		{"the tunnel skipped", "the packet filter is off or skips an interface, which lets through"},
	} {
		var got []string
		for _, f := range neighbours[tt.neighbour].foreign(t, w) {
			got = append(got, f.String())
		}
		all := strings.Join(got, "\n")
		if tt.want == "" && all != "" || !strings.HasPrefix(all, tt.want) {
			t.Errorf("%s:\n got %s\nwant %s", tt.neighbour, all, tt.want)
		}
	}
}
