package linux

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestJournalOfAnotherUser checks that a journal that another user wrote isn't restored
// from.
func TestJournalOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file to another user")
	}
	dir := t.TempDir()
	j := &journal{Version: journalVersion, Boot: "boot", Changed: []sysctlChange{{Name: "ipv4/conf/all/forwarding", Found: "0", Set: "1"}}}
	if err := j.write(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := readJournal(dir, "boot"); err != nil || len(got.Changed) != 1 {
		t.Fatalf("its own: %v, %v", got, err)
	}
	path := filepath.Join(dir, journalName)
	if err := os.Chown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if _, err := readJournal(dir, "boot"); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
		t.Errorf("another user's: %v", err)
	}
}
