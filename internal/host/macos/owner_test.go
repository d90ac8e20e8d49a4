package macos

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFilesOfAnotherUser checks that a journal and a record of cuts that another user
// owns are ignored.
func TestFilesOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can change a file's owner")
	}
	dir := t.TempDir()
	j := &journal{Version: journalVersion, Boot: "boot", Token: 7}
	if err := j.write(dir); err != nil {
		t.Fatal(err)
	}
	if err := writeCut(dir, []byte(`{"version":1,"boot":"boot","incoming":["100.64.0.2"]}`)); err != nil {
		t.Fatal(err)
	}
	read := func() (journalErr, cutErr error) {
		_, journalErr = readJournal(dir, "boot")
		var book cutRecord
		book.load(dir, "boot", time.Now())
		if book.problem != nil && len(book.granted) != 0 {
			t.Error("an untrusted record of cuts is used")
		}
		return journalErr, book.problem
	}
	if a, b := read(); a != nil || b != nil {
		t.Fatalf("root's files: %v, %v", a, b)
	}
	for _, name := range []string{journalName, cutName} {
		if err := os.Chown(filepath.Join(dir, name), 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	a, b := read()
	for _, err := range []error{a, b} {
		if err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("another user's file: %v", err)
		}
	}
}
