package linux

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestJournalSurvives(t *testing.T) {
	dir := t.TempDir()
	j := &journal{Version: journalVersion, Boot: "this", Changed: []sysctlChange{{"ipv4/conf/eth0/forwarding", 2, "0", "1"}}}
	for range 2 {
		if err := j.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readJournal(dir, "this")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(j, got); diff != "" {
		t.Errorf("(-wrote +read)\n%s", diff)
	}
	if got, err := readJournal(dir, "another boot"); err != nil || len(got.Changed) != 0 {
		t.Errorf("the journal of another boot gave %v, %v", got, err)
	}
	j.Changed = nil
	if err := j.write(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("an empty journal left %v, %v", left, err)
	}
}

func TestJournalThatCantBeWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	j := &journal{Version: journalVersion, Changed: []sysctlChange{{"ipv4/conf/eth0/forwarding", 2, "0", "1"}}}
	if err := j.write(dir); err == nil {
		t.Error("a journal was written to a directory that doesn't exist")
	}
}

// FuzzParseJournal checks that whatever is in the file, only our own sysctls are
// ever written, and only with small numbers.
func FuzzParseJournal(f *testing.F) {
	for _, s := range []string{
		`{"version":1,"boot":"b","changed":[{"name":"ipv6/conf/eth0/accept_ra","index":2,"found":"1","set":"2"}]}`,
		`{"version":1,"changed":[{"name":"ipv4/conf/../../kernel/forwarding","found":"1","set":"0"}]}`,
		`{"version":1,"changed":[{"name":"ipv4/conf/eth0/forwarding","found":"-1","set":"11"}]}`,
		`{"version":2}`, `[]`, `{`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := parseJournal(b)
		if err != nil {
			return
		}
		for _, s := range j.Changed {
			iface, _, ok := splitSysctl(s.Name)
			if !ok || filepath.Base(filepath.Dir(filepath.Join("/x", s.Name))) != iface || len(s.Found) != 1 || len(s.Set) != 1 {
				t.Errorf("accepted %+v", s)
			}
		}
		again, err := json.Marshal(j)
		if err != nil {
			t.Fatal(err)
		}
		if j2, err := parseJournal(again); err != nil || !cmp.Equal(j, j2) {
			t.Errorf("%s became %+v, %v", again, j2, err)
		}
	})
}
