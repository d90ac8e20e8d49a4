package linux

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFillOfConntrack(t *testing.T) {
	for _, c := range []struct {
		name, count, most string
		problem, fails    bool
	}{
		{"empty", "0", "1000", false, false},
		{"below", "899", "1000", false, false},
		{"nearly full", "900", "1000", true, false},
		{"full", "1000", "1000", true, false},
		{"over, after the maximum was lowered", "5000", "1000", true, false},
		{"the largest numbers", "4294967295", "4294967295", true, false},
		{"no bound", "5", "0", false, false},
		{"no conntrack", "", "", false, false},
		{"no number", "many", "1000", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "netfilter"), 0o755); err != nil {
				t.Fatal(err)
			}
			for name, v := range map[string]string{flowCount: c.count, flowMax: c.most} {
				if v == "" {
					continue
				}
				if err := os.WriteFile(filepath.Join(root, name), []byte(v+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := fillProblems(sysctls{root})
			if (err != nil) != c.fails || len(got) > 0 != c.problem {
				t.Fatalf("%v, %v", got, err)
			}
			for _, p := range got {
				if p.Hint == "" || !strings.Contains(p.Message, c.count+" of at most "+c.most) {
					t.Errorf("%+v", p)
				}
			}
		})
	}
}
