package linux

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fakeSysctls is a directory like /proc/sys/net with two interfaces and the mesh's.
func fakeSysctls(t *testing.T) (*forwarding, map[string]string) {
	t.Helper()
	root := t.TempDir()
	found := map[string]string{"ipv4/ip_forward": "0"}
	for _, family := range []string{"ipv4", "ipv6"} {
		for _, iface := range []string{"all", "default", "eth0", "eth1", "mesh0"} {
			found[conf(family, iface, "forwarding")] = "0"
		}
	}
	for _, iface := range []string{"eth0", "eth1"} {
		found[conf("ipv6", iface, "accept_ra")] = "1"
	}
	found["ipv6/conf/eth1/accept_ra"] = "0"
	for name, value := range found {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	index := map[string]int{"eth0": 2, "eth1": 3, "mesh0": 4}
	dir := t.TempDir()
	f := &forwarding{
		sys: sysctls{root}, dir: dir, writer: &journalWriter{dir: dir}, boot: "this", step: func(string) {},
		index: func(name string) int { return index[name] },
		byIndex: func(i int) (string, bool) {
			for name, n := range index {
				if n == i {
					return name, true
				}
			}
			return "", false
		},
	}
	if err := f.open(); err != nil {
		t.Fatal(err)
	}
	return f, found
}

// differs lists the sysctls that differ from want.
func (f *forwarding) differs(t *testing.T, want map[string]string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for name, value := range want {
		if now, err := f.sys.read(name); err != nil || now != value {
			out[name] = now
		}
	}
	return out
}

func TestForwardingOpensAsLittleAsNeeded(t *testing.T) {
	f, found := fakeSysctls(t)
	for _, tt := range []struct {
		need need
		want map[string]string
	}{
		{need{mesh: "mesh0"}, nil},
		{need{mesh: "mesh0", ipv4: []string{"mesh0", "eth0"}}, map[string]string{
			"ipv4/conf/mesh0/forwarding": "1", "ipv4/conf/eth0/forwarding": "1",
		}},
		{need{mesh: "mesh0", ipv4: []string{"mesh0", "eth1"}}, map[string]string{
			"ipv4/conf/mesh0/forwarding": "1", "ipv4/conf/eth1/forwarding": "1",
		}},
		{need{mesh: "mesh0"}, nil},
	} {
		if err := f.apply(tt.need); err != nil {
			t.Fatal(err)
		}
		got := f.differs(t, found)
		if len(got) != len(tt.want) || len(got) > 0 && !cmp.Equal(got, tt.want) {
			t.Errorf("need %+v: changed %v, want %v", tt.need, got, tt.want)
		}
		if drift := f.drift(tt.need); len(drift) > 0 {
			t.Errorf("need %+v: drift %v", tt.need, drift)
		}
	}
}

// TestJournalIsThereBeforeTheChange checks the disk at each step.
func TestJournalIsThereBeforeTheChange(t *testing.T) {
	f, found := fakeSysctls(t)
	var steps []string
	f.step = func(s string) {
		if s == StepJournal {
			if d := f.differs(t, found); len(d) > 0 {
				t.Errorf("before the journal, %v was changed", d)
			}
		} else {
			j, err := readJournal(f.dir, "this")
			if err != nil || len(j.Changed) == 0 {
				t.Errorf("before %q the journal is %v, %v", s, j, err)
			}
		}
		steps = append(steps, s)
	}
	if err := f.apply(need{mesh: "mesh0", ipv4: []string{"eth0"}, ipv6: true}); err != nil {
		t.Fatal(err)
	}
	if first := slices.Compact(steps); !slices.Equal(first, []string{StepJournal, StepAcceptRA, StepForwarding}) {
		t.Errorf("steps %v", first)
	}
	// The next process restores from the journal.
	f.step = func(string) {}
	if err := f.open(); err != nil {
		t.Fatal(err)
	}
	if err := f.revert(func(sysctlChange) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if d := f.differs(t, found); len(d) > 0 {
		t.Errorf("not restored: %v", d)
	}
}

// TestHostFlagIsRestoredWithTheOthers has an interface that forwarded IPv6 by a flag of
// its own, which the kernel clears when the host's flag is switched off.
func TestHostFlagIsRestoredWithTheOthers(t *testing.T) {
	f, found := fakeSysctls(t)
	found["ipv6/conf/eth1/forwarding"] = "1"
	if err := f.sys.write("ipv6/conf/eth1/forwarding", "1"); err != nil {
		t.Fatal(err)
	}
	if err := f.apply(need{mesh: "mesh0", ipv6: true}); err != nil {
		t.Fatal(err)
	}
	f.step = func(string) { // as the kernel does when all/forwarding is written
		if v, _ := f.sys.read(allForwarding6); v == "0" {
			f.sys.write("ipv6/conf/eth1/forwarding", "0")
		}
	}
	if err := f.revert(func(sysctlChange) bool { return true }); err != nil {
		t.Fatal(err)
	}
	f.step = func(string) {}
	f.sys.write("ipv6/conf/eth1/forwarding", "1")
	if d := f.differs(t, found); len(d) > 0 {
		t.Errorf("not restored: %v", d)
	}
}

func TestOthersChoicesStay(t *testing.T) {
	f, _ := fakeSysctls(t)
	if err := f.apply(need{mesh: "mesh0", ipv4: []string{"eth0"}, ipv6: true}); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"ipv6/conf/eth0/accept_ra": "0", "ipv4/ip_forward": "1"} {
		if err := f.sys.write(name, value); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.revert(func(sysctlChange) bool { return true }); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"ipv6/conf/eth0/accept_ra": "0", "ipv4/conf/eth0/forwarding": "1", "ipv6/conf/eth0/forwarding": "0"}
	if d := f.differs(t, want); len(d) > 0 {
		t.Errorf("%v, want %v", d, want)
	}
}

func TestSplitSysctl(t *testing.T) {
	for name, want := range map[string]bool{
		"ipv4/conf/eth0/forwarding": true, "ipv6/conf/eth0.100/accept_ra": true, "ipv6/conf/all/forwarding": true,
		"ipv4/conf/eth0/accept_ra": false, "ipv4/conf/../forwarding": false, "ipv4/ip_forward": false,
		"ipv4/conf//forwarding": false, "/ipv4/conf/eth0/forwarding": false, "ipv4/conf/a/b/forwarding": false,
	} {
		if _, _, ok := splitSysctl(name); ok != want {
			t.Errorf("%q: %v, want %v", name, ok, want)
		}
	}
}
