package linux

import (
	"context"
	"encoding/binary"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// program runs another program on the host.
func (g *rig) program(stdin, name string, args ...string) {
	g.t.Helper()
	_, stderr, status, err := g.pic.B.Run(context.Background(), stdin, name, args...)
	if err != nil || status != 0 {
		g.t.Fatalf("%s %s: status %d, %v\n%s", name, strings.Join(args, " "), status, err, stderr)
	}
}

// installed skips the test if a program isn't installed.
func installed(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("other software's rules are loaded with %s: %v", name, err)
	}
}

func TestLegacyTablesAreNamed(t *testing.T) {
	const (
		begin = "rules of iptables-legacy in "
		end   = " may drop peers' packets: they aren't evaluated"
	)
	for _, tt := range []struct {
		name string
		load map[string]string // rulesets by program
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
			for _, p := range g.others(g.enforce(meshOf(grants{ann: all}))) {
				got = append(got, p.Message)
			}
			if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("problems are %q, want %q", got, tt.want)
			}
		})
	}
}

// TestLegacyTableIsRead has the kernel answer for a table with rules, whose entries
// aren't requested, and for one that is replaced between the two requests.
func TestLegacyTableIsRead(t *testing.T) {
	k := legacyKinds[0]
	for _, tt := range []struct {
		name    string
		entries uint32
		changes int // how often the table is replaced before its entries are requested
		asked   int // number of requests for entries
		want    legacyTable
		err     error
	}{
		{name: "rules", entries: 11, want: legacyTable{name: "filter", rules: 10}},
		{name: "no rules", entries: 1, asked: 1, want: legacyTable{name: "filter"}},
		{name: "one that changes", entries: 1, changes: 2, asked: 3, want: legacyTable{name: "filter"}},
		{name: "one that always changes", entries: 1, changes: 100, asked: maxTableReads, err: unix.EAGAIN},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked := 0
			got, err := k.table("filter", func(option int, value []byte) error {
				switch option {
				case legacyGetInfo:
					binary.NativeEndian.PutUint32(value[legacyNameSize+4*(1+2*legacyHooks):], tt.entries)
					binary.NativeEndian.PutUint32(value[legacyInfoSize-4:], 176*tt.entries)
				case legacyGetEntries:
					if asked++; asked <= tt.changes {
						return unix.EAGAIN
					}
				}
				return nil
			})
			if got != tt.want || !errors.Is(err, tt.err) || asked != tt.asked {
				t.Errorf("%+v, %v, and entries were asked for %d times; want %+v, %v, %d", got, err, asked, tt.want, tt.err, tt.asked)
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
