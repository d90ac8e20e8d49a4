package linux

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Lines of a snapshot that goldens leave out: nftables, which is shown in its own
// language, and what every new interface has. The kernel's local routes follow from
// addresses.
var leftOut = regexp.MustCompile(`^. (table|chain|set|element|rule|object|flowtable) |` +
	`^. sysctl net/ipv[46]/(conf|neigh)/` + meshName + `/(?:[^f]|f[^o])|force_|^. route .* table 255 `)

// dump returns all differences from the host as it was found, and the contents of the
// sets.
func (g *rig) dump(r *policy.Ruleset, before netlab.Snapshot) string {
	g.t.Helper()
	if drift := g.inspect(r).Drift; len(drift) > 0 {
		g.t.Errorf("right after Enforce: %v", drift)
	}
	lines := slices.DeleteFunc(before.Diff(g.snapshot()), leftOut.MatchString)
	for _, s := range g.p.filter.loaded.sets {
		if len(s.elements) > 0 {
			lines = append(lines, fmt.Sprint(s.name, " ", s.elements))
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

// TestStates applies a list of rulesets to one backend and compares the whole host after
// each one, so that leftovers of an earlier one show.
func TestStates(t *testing.T) {
	g := newRig(t)
	before := g.snapshot()
	g.open()
	var text strings.Builder
	seen := map[string]string{}
	for _, state := range []struct {
		name string
		mesh policy.Mesh
	}{
		{"two peers, nothing allowed", meshOf(grants{})},
		{"ann may route", meshOf(grants{ann: mesh.Routing})},
		{"ann may reach the lan, bob the host", meshOf(grants{ann: mesh.Routing | mesh.LAN, bob: mesh.Incoming})},
		{"ann has lan without routing", meshOf(grants{ann: mesh.LAN})},
		{"bob is gone", policy.Mesh{Prefixes: meshPrefixes(), Addresses: meshOf(grants{}).Addresses, Peers: meshOf(grants{}).Peers[:1]}},
		{"no peer is left", policy.Mesh{Prefixes: meshPrefixes(), Addresses: meshOf(grants{}).Addresses}},
		{"ann may route", meshOf(grants{ann: mesh.Routing})},
		{"two peers, nothing allowed", meshOf(grants{})},
	} {
		dump := g.dump(g.enforce(state.mesh), before)
		if old, ok := seen[state.name]; ok && old != dump {
			t.Errorf("%s: not as the first time:\n%s", state.name, cmp.Diff(strings.Split(old, "\n"), strings.Split(dump, "\n")))
		}
		seen[state.name] = dump
		fmt.Fprintf(&text, "== %s\n%s\n", state.name, dump)
	}
	g.close()
	if diff := before.Diff(g.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
	golden(t, "states.golden", text.String())
}
