package linux

import (
	"context"
	"os/exec"
	"strings"
	"testing"
)

// program runs a program of other software on the host.
func (g *rig) program(stdin, name string, args ...string) {
	g.t.Helper()
	_, stderr, status, err := g.pic.B.Run(context.Background(), stdin, name, args...)
	if err != nil || status != 0 {
		g.t.Fatalf("%s %s: status %d, %v\n%s", name, strings.Join(args, " "), status, err, stderr)
	}
}

// installed skips the test where a program isn't installed.
func installed(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("other software's rules are loaded with %s: %v", name, err)
	}
}

func TestLegacyTablesAreNamed(t *testing.T) {
	const (
		begin = "rules of iptables-legacy in "
		end   = " may drop peers' packets: what they do isn't evaluated"
	)
	for _, tt := range []struct {
		name string
		load map[string]string // by the program
		want []string
	}{
		{"nothing", nil, nil},
		{"empty", map[string]string{"iptables-legacy-restore": "*filter\n:FORWARD ACCEPT\nCOMMIT\n"}, nil},
		{"a rule", map[string]string{"iptables-legacy-restore": "*filter\n:FORWARD ACCEPT\n-A FORWARD -i " + meshName + " -j DROP\nCOMMIT\n"},
			[]string{begin + "table filter" + end}},
		{"a policy", map[string]string{"iptables-legacy-restore": "*filter\n:INPUT ACCEPT\n:FORWARD DROP\n:OUTPUT ACCEPT\nCOMMIT\n"},
			[]string{begin + "table filter" + end}},
		{"several", map[string]string{"iptables-legacy-restore": "*raw\n-A PREROUTING -p udp -j DROP\nCOMMIT\n*mangle\n:FORWARD ACCEPT\nCOMMIT\n*filter\n:INPUT DROP\nCOMMIT\n"},
			[]string{begin + "tables filter, raw" + end}},
		{"both families", map[string]string{
			"iptables-legacy-restore":  "*filter\n-A FORWARD -j ACCEPT\nCOMMIT\n",
			"ip6tables-legacy-restore": "*filter\n:FORWARD DROP\nCOMMIT\n",
		}, []string{begin + "table filter" + end, strings.Replace(begin, "ip", "ip6", 1) + "table filter" + end}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			installed(t, "iptables-legacy-restore")
			g := newRig(t)
			for program, rules := range tt.load {
				g.program(rules, program)
			}
			g.open()
			defer g.close()
			var got []string
			for _, p := range g.others(g.enforce(mesh(grants{ann: all}))) {
				got = append(got, p.Message)
			}
			if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("problems are %q, want %q", got, tt.want)
			}
		})
	}
}

func FuzzLegacyTable(f *testing.F) {
	info := make([]byte, legacyInfoSize)
	info[legacyNameSize] = 0x0e
	f.Add(info, make([]byte, 1024))
	f.Add(make([]byte, legacyInfoSize), []byte{})
	f.Fuzz(func(_ *testing.T, info, entries []byte) {
		for _, k := range legacyKinds {
			_, _ = k.parse("filter", info, entries)
		}
	})
}
