package macos

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// scratchLabel names an anchor that no helper uses. It doesn't affect the Mac's traffic:
// its rules are for an interface that doesn't exist.
const scratchLabel = "org.meshhelper.mactest"

// compiledTable returns rulesets whose anchors differ in structure.
func compiledTable() map[string]*policy.Ruleset {
	out := map[string]*policy.Ruleset{}
	for have := range everything + 1 {
		for _, found := range []bool{false, true} {
			for _, peers := range []int{0, 1, 200} {
				h := testHost()
				h.Interface = "utun4095"
				h.FoundForwarding = policy.Families{IPv4: found, IPv6: found}
				m := testMesh(peers, have, mesh.Incoming)
				m.ListenPort, m.Former = 51820, []netip.Addr{netip.MustParseAddr("100.64.200.1"), netip.MustParseAddr("fd6d:6573:6800::c801")}
				r, err := policy.Compile(m, h, start)
				if err != nil {
					panic(err)
				}
				out[fmt.Sprintf("%d peers with %v, forwarding found %v", peers, have, found)] = r
			}
		}
	}
	return out
}

// checkCompiled loads the table's anchors through a Mac's pfctl, changes one in place,
// and has the backend read back what pf holds. It keeps pfctl's output in artifacts.
func checkCompiled(t *testing.T, runner darwin.Runner, kernel darwin.Kernel, artifacts string) {
	p, err := New(Options{StateDir: t.TempDir(), Label: scratchLabel, Runner: runner, Kernel: kernel})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.pf.Flush(context.Background(), p.path); err != nil {
			t.Error(err)
		}
	})
	if artifacts != "" {
		if err := os.MkdirAll(artifacts, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, r := range compiledTable() {
		t.Run(name, func(t *testing.T) {
			a, err := Compile(r, AnchorOptions{Label: scratchLabel, Cut: r.Mesh().Former})
			if err != nil {
				t.Fatal(err)
			}
			err = p.loadAnchor(t.Context(), a)
			rules, nat, showErr := p.showAnchor(t.Context(), p.path)
			if artifacts != "" {
				text := fmt.Sprintf("# loaded\n%s\n# pfctl -s nat\n%s\n# pfctl -s rules\n%s", a.text(), nat, rules)
				if err := os.WriteFile(filepath.Join(artifacts, "compiled-"+strings.NewReplacer(" ", "-", ",", "").Replace(name)+".txt"), []byte(text), 0o644); err != nil {
					t.Error(err)
				}
			}
			if err != nil || showErr != nil {
				t.Fatalf("%v %v", err, showErr)
			}
			if fewer := *a; len(a.tables()[tableSelf].Addrs) > 1 {
				own := *a.tables()[tableSelf]
				own.Addrs = own.Addrs[1:]
				fewer.Lines = append([]Line{}, a.Lines...)
				for i, l := range fewer.Lines {
					if l.Statement == a.tables()[tableSelf] {
						fewer.Lines[i].Statement = &own
					}
				}
				var steps []string
				p.o.Step = func(step string) { steps = append(steps, step) }
				if err := p.ensureAnchor(t.Context(), &fewer); err != nil || !slices.Equal(slices.Compact(steps), []string{StepTables}) {
					t.Errorf("in place, by %q: %v", steps, err)
				}
				p.o.Step = func(string) {}
			}
		})
	}
}

func TestCompiled(t *testing.T) {
	m := simmac.New(simmac.Options{Seed: 1})
	checkCompiled(t, m, m, "")
}
