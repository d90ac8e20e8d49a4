package macos

import (
	"flag"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

var update = flag.Bool("update", false, "write the generated part of docs/pf.md")

// TestDocumentation keeps the anchor in docs/pf.md equal to the generated one.
func TestDocumentation(t *testing.T) {
	const file, begin, end = "../../../docs/pf.md", "<!-- generated from here -->\n\n", "<!-- to here -->\n"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), begin)
	listed, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks %q or %q", file, begin, end)
	}
	m := testMesh(3, everything, mesh.Incoming, mesh.Routing)
	m.ListenPort = 51820
	m.Former = []netip.Addr{netip.MustParseAddr("100.64.0.9"), netip.MustParseAddr("fd6d:6573:6800::9")}
	h := testHost()
	h.Source6 = netip.MustParseAddr("2001:db8:1::1")
	h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("10.77.0.0/16"), Interface: loopback})
	a, err := Compile(mustRuleset(t, m, h), AnchorOptions{Cut: []netip.Addr{netip.MustParseAddr("100.64.0.4")}})
	if err != nil {
		t.Fatal(err)
	}
	want := a.Listing()
	if *update {
		if err := os.WriteFile(file, []byte(head+begin+want+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if d := cmp.Diff(want, listed); d != "" {
		t.Errorf("%s: run go test ./internal/host/macos -run TestDocumentation -update\n%s", file, d)
	}
}

// TestLoads checks, for every kind of mesh and host, that the printed anchor parses to
// the same ruleset and loads.
func TestLoads(t *testing.T) {
	for have := range everything + 1 {
		for _, peers := range []int{0, 1, 50} {
			h := testHost()
			h.Forwarding.IPv4, h.FoundForwarding.IPv6 = have%2 == 0, have%3 == 0
			a := mustAnchor(t, mustRuleset(t, testMesh(peers, have, everything), h))
			text := a.Ruleset().String()
			back, err := pfconf.Parse(text)
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			if again := back.String(); again != text {
				t.Errorf("parsed and printed again (-first +second): %s", cmp.Diff(text, again))
			}
			w := world{mesh: testMesh(peers, have), host: h}
			m, err := w.newMachine(1, appleMain)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.LoadAnchor(a.Path, back); err != nil {
				t.Error(err)
			}
		}
	}
}

func BenchmarkCompileAndPrint(b *testing.B) {
	for name, peers := range map[string]int{"60": 60, "10000": 10_000} {
		r := mustRuleset(b, testMesh(peers, everything, 0, mesh.Routing), testHost())
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				a, err := Compile(r, AnchorOptions{})
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(a.Ruleset().String())))
			}
		})
	}
}
