package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// brokenDisk fails every operation after some.
type brokenDisk struct {
	wanted.FileSystem
	after int
}

func (b *brokenDisk) fail() error {
	if b.after--; b.after >= 0 {
		return nil
	}
	return &os.PathError{Op: "write", Path: "disk", Err: syscall.ENOSPC}
}

func (b *brokenDisk) WriteTemp(dir, name string, content []byte) (string, error) {
	if err := b.fail(); err != nil {
		return "", err
	}
	return b.FileSystem.WriteTemp(dir, name, content)
}

func (b *brokenDisk) Rename(from, to string) error {
	if err := b.fail(); err != nil {
		return err
	}
	return b.FileSystem.Rename(from, to)
}

func (b *brokenDisk) SyncDir(dir string) error {
	if err := b.fail(); err != nil {
		return err
	}
	return b.FileSystem.SyncDir(dir)
}

// TestDiskFull breaks the disk at each operation of a change that grants something: up to
// the rename that makes the change, the old state stays in force and the command reports
// it; afterwards the change is made, and the command says what isn't certain. No temporary
// file is left, and the files on disk are complete.
func TestDiskFull(t *testing.T) {
	const operations, renamed = 5, 2 // two files, two renames, one sync of the folder
	for after := range operations {
		inBubble(t, func(t *testing.T, r *rig) {
			r.add("phone")
			before := r.d.Status()
			r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}, after: after})
			_, err := r.allow("phone", "routing", "")
			e := wantCode(t, err, api.CodeNotSaved)
			wantMessage, want, generation := "nothing was changed", mesh.Permissions(0), before.Generation
			if after > renamed {
				wantMessage, want, generation = "in force now, and saved, but whether it outlasts a loss of power isn't known", mesh.Routing, generation+1
			}
			if !strings.Contains(e.Message, wantMessage) {
				t.Errorf("after %d operations: message %q, want %q", after, e.Message, wantMessage)
			}
			r.wantLoaded("phone", want)
			s := r.d.Status()
			if s.Generation != generation || s.State != api.Enforcing {
				t.Errorf("generation %d, want %d; state %s", s.Generation, generation, s.State)
			}
			if said := len(s.Problems) == 1 && strings.Contains(s.Problems[0].Message, wantMessage); said != (after > renamed) {
				t.Errorf("after %d operations: problems %v", after, s.Problems)
			}
			if got := names(t, r.dir); !cmp.Equal(got, []string{"host.key", "lock", "state.json", "state.last.json"}) {
				t.Errorf("files %q", got)
			}
			for _, f := range []string{"state.json", "state.last.json"} {
				if _, err := readDocument(filepath.Join(r.dir, f)); err != nil {
					t.Error(err)
				}
			}
			if doc, err := readDocument(filepath.Join(r.dir, "state.json")); err != nil || doc.Generation != generation {
				t.Errorf("on disk: generation %d, want %d; %v", doc.Generation, generation, err)
			}
			r.setDisk(wanted.DiskFiles{})
			r.mustAllow("phone", "routing", "")
			r.wantLoaded("phone", mesh.Routing)
			if s := r.d.Status(); len(s.Problems) != 0 {
				t.Errorf("problems that stay: %v", s.Problems)
			}
		})
	}
}

// The journal's file is left out: it is written at any time.
func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(e.Name(), eventsFile) {
			out = append(out, e.Name())
		}
	}
	return out
}

// contents returns every file of dir by its name.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, name := range names(t, dir) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(text)
	}
	return out
}

// TestRefusesToStart starts on damaged or unsafe state directories. Each must be refused
// with the cause and a hint, and no file changed.
func TestRefusesToStart(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.stop()
		state := filepath.Join(r.dir, "state.json")
		good := contents(t, r.dir)
		for _, c := range []struct {
			name   string
			do     func() error
			reason string
			hint   string
		}{
			{"cut off", func() error { return os.Truncate(state, 40) }, "unexpected end", "last good copy is"},
			{"empty", func() error { return os.Truncate(state, 0) }, "unexpected end", "state.last.json"},
			{"garbage", write(state, "\x00\xff garbage"), "invalid character", "generation 2, 1 peers"},
			{"newer", write(state, `{"version":2,"x":1}`), "newer meshhelper", "run the newer meshhelper"},
			{"newer in a field of other letters", write(state, `{"Version":2,"peers":[]}`), "newer meshhelper", "run the newer meshhelper"},
			{"twice", write(state, good["state.json"]+good["state.json"]), "after top-level value", "last good copy"},
			{"gone", func() error { return os.Remove(state) }, "missing", "last good copy"},
			{"both bad", both(write(state, "x"), write(filepath.Join(r.dir, "state.last.json"), "y")), "invalid character", "no good copy"},
			{"key gone", func() error { return os.Remove(filepath.Join(r.dir, "host.key")) }, "host's key", "put the key back"},
			{"key exposed", func() error { return os.Chmod(filepath.Join(r.dir, "host.key"), 0o644) }, "access", "chmod 600"},
			{"key damaged", write(filepath.Join(r.dir, "host.key"), "short"), "not a WireGuard key", "put the key back"},
			{"folder open", func() error { return os.Chmod(r.dir, 0o777) }, "others may write", "chmod"},
			{"folder open to its group", func() error { return os.Chmod(r.dir, 0o770) }, "others may write", "chmod"},
			{"folder another user's", own(r.dir, 12345), "belongs to user 12345", "chown"},
			{"parent another user's", own(filepath.Dir(r.dir), 12345), "belongs to user 12345", "leads through no folder of another user's"},
			{"parent open", func() error { return os.Chmod(filepath.Dir(r.dir), 0o777) }, "any user may replace", "chmod o-w"},
			{"state another user's", own(state, 12345), "belongs to user 12345", "last good copy"},
			{"state open to its group", func() error { return os.Chmod(state, 0o660) }, "others may write", "last good copy"},
			{"state a link", link(state, filepath.Join(r.dir, "state.last.json")), "is a link", "last good copy"},
			{"state a FIFO", both(remove(state), func() error { return mkfifo(state) }), "not a regular file", "last good copy"},
			{"state a device", link(state, "/dev/zero"), "is a link", "last good copy"},
			{"key another user's", own(filepath.Join(r.dir, "host.key"), 12345), "belongs to user 12345", "nothing was touched"},
			{"key a link", link(filepath.Join(r.dir, "host.key"), state), "is a link", "nothing was touched"},
			{"lock a link", link(filepath.Join(r.dir, "lock"), "/etc/passwd"), "is a link", ""},
			{"lock another user's", own(filepath.Join(r.dir, "lock"), 12345), "belongs to user 12345", ""},
		} {
			if strings.Contains(c.name, "another user's") && os.Geteuid() != 0 {
				t.Logf("%s: not tried: only root gives a file to another user", c.name)
				continue
			}
			if err := c.do(); err != nil {
				t.Fatal(err)
			}
			before := listing(t, r.dir)
			d, err := New(r.options())
			switch {
			case err == nil:
				t.Errorf("%s: it started", c.name)
				d.Close()
			case !strings.Contains(err.Error(), c.reason) || !strings.Contains(err.Error(), c.hint):
				t.Errorf("%s: %v; want %q and %q", c.name, err, c.reason, c.hint)
			}
			if diff := cmp.Diff(before, listing(t, r.dir)); diff != "" {
				t.Errorf("%s: files were touched: %s", c.name, diff)
			}
			restore(t, r.dir, good)
		}
		r.start() // and with everything put back it starts
		if _, err := r.d.Peer("phone"); err != nil {
			t.Error(err)
		}
	})
}

// listing returns each file's mode and size, and its content where it has one to read.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, name := range names(t, dir) {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		out[name] = fmt.Sprint(info.Mode(), info.Size())
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			out[name] += string(text)
		}
	}
	return out
}

func own(path string, uid int) func() error { return func() error { return os.Chown(path, uid, uid) } }

func remove(path string) func() error { return func() error { return os.Remove(path) } }

func link(path, to string) func() error {
	return both(remove(path), func() error { return os.Symlink(to, path) })
}

func write(path, text string) func() error {
	return func() error { return os.WriteFile(path, []byte(text), 0o600) }
}

func both(a, b func() error) func() error { return func() error { return errors.Join(a(), b()) } }

func restore(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for _, at := range []string{dir, filepath.Dir(dir)} {
		if err := errors.Join(os.Chmod(at, 0o700), os.Chown(at, os.Geteuid(), os.Getegid())); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKilledWhileSaving starts after a helper that was killed at each operation of saving a
// change: the mesh is the old one or the new one, complete, and no temporary file is left.
func TestKilledWhileSaving(t *testing.T) {
	for at := range 6 {
		inBubble(t, func(t *testing.T, r *rig) {
			r.add("phone")
			before := r.d.wanted.Document().Generation
			r.setDisk(&killedDisk{brokenDisk{FileSystem: wanted.DiskFiles{}, after: at}})
			_, err := r.allow("phone", "routing", "")
			if killed := at < 5; killed != (err != nil) {
				t.Errorf("operation %d: %v", at, err)
			}
			r.stop()
			// Of one that was killed while it tried the disk, and while it wrote the journal.
			for _, name := range []string{"trial", eventsFile} {
				if _, err := owned.WriteTemp(r.dir, name, strings.NewReader("x"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			r.start()
			switch got := r.d.wanted.Document(); {
			case got.Generation != before && got.Generation != before+1:
				t.Errorf("operation %d: generation %d after %d", at, got.Generation, before)
			case len(got.Peers) != 1:
				t.Errorf("operation %d: %d peers", at, len(got.Peers))
			}
			if got := names(t, r.dir); !cmp.Equal(got, []string{"host.key", "lock", "state.json", "state.last.json"}) {
				t.Errorf("operation %d: files %q", at, got)
			}
		})
	}
}

// killedDisk is a disk of which a process that was killed sees no more: it can't
// tidy up either.
type killedDisk struct{ brokenDisk }

func (k *killedDisk) Remove(string) error { return os.ErrClosed }

func TestOtherPrefixes(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.stop()
		o := r.options()
		o.Prefixes = mesh.DefaultPrefixes()
		o.Prefixes.V4 = mesh.DefaultPrefixes().V4
		o.Prefixes.V6 = netipPrefix("fd00:1::/48")
		_, err := New(o)
		e := wantCode(t, err, api.CodeInternal)
		if !strings.Contains(e.Message, `peer "phone"`) || !strings.Contains(e.Hint, "--mesh-prefix6") {
			t.Errorf("%v", e)
		}
	})
}

// TestOneHelper starts a second helper on the same state directory.
func TestOneHelper(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		_, err := New(r.options())
		wantCode(t, err, api.CodeInternal)
	})
}

// TestKeysStayPrivate looks for the host's private key in all files but its own, and checks
// the files' modes.
func TestKeysStayPrivate(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		for name, text := range contents(t, r.dir) {
			if name != "host.key" && strings.Contains(text, r.d.wanted.Key().Reveal()) {
				t.Errorf("%s has the host's private key", name)
			}
			info, err := os.Stat(filepath.Join(r.dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", name, info.Mode())
			}
		}
	})
}

// TestUnknownFieldsAreKept starts on a document of a later version with fields that this
// one doesn't know: they open nothing, are still in the document after a change and after
// another name and key of their peer, and are gone with the peer.
func TestUnknownFieldsAreKept(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.add("laptop")
		r.stop()
		path := filepath.Join(r.dir, "state.json")
		edit := func(f func(doc map[string]any)) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var doc map[string]any
			if err := json.Unmarshal(text, &doc); err != nil {
				t.Fatal(err)
			}
			f(doc)
			if text, err = json.Marshal(doc); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		edit(func(doc map[string]any) {
			doc["invites"] = []any{map[string]any{"for": "ann"}}
			phone := doc["peers"].([]any)[0].(map[string]any)
			phone["note"] = "Ann's"
			may := phone["permissions"].(map[string]any)
			may["send"] = map[string]any{"allowed": true}
			may["incoming"].(map[string]any)["by"] = "root"
		})
		found := func() (doc, phone map[string]any) {
			r.after(0)
			edit(func(m map[string]any) { doc = m })
			for _, p := range doc["peers"].([]any) {
				if p := p.(map[string]any); p["note"] != nil {
					phone = p
				}
			}
			return doc, phone
		}
		want := func(when, name string) {
			t.Helper()
			doc, phone := found()
			if doc["invites"] == nil || phone == nil || phone["name"] != name {
				t.Fatalf("%s: the document is %v", when, doc)
			}
			may := phone["permissions"].(map[string]any)
			if may["send"] == nil || may["incoming"].(map[string]any)["by"] != "root" {
				t.Errorf("%s: the phone's permissions are %v", when, may)
			}
		}
		r.start()
		change := func(ref string, c api.PeerChange) {
			t.Helper()
			if _, err := r.d.ChangePeer(t.Context(), ref, c); err != nil {
				t.Fatal(err)
			}
		}
		on := map[string]api.PermissionChange{"routing": {Allowed: true}}
		change("laptop", api.PeerChange{Permissions: on})
		want("another peer changed", "phone")
		change("phone", api.PeerChange{Permissions: on, Name: "pad"})
		want("the peer changed", "pad")
		change("pad", api.PeerChange{PublicKey: keyOf("another")})
		want("another key", "pad")
		if _, err := r.d.RemovePeer(t.Context(), "pad"); err != nil {
			t.Fatal(err)
		}
		r.add("another")
		if doc, phone := found(); phone != nil || doc["invites"] == nil {
			t.Errorf("with the peer's key again: %v", doc)
		}
	})
}
