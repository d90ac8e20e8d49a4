package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// pairEdit is an edit of a peer, which is found by its first name or its first key.
type pairEdit func(r *rig, byKey bool) error

// changeTo makes an edit of a peer out of what is to change.
func changeTo(name string, c api.PeerChange) pairEdit {
	return func(r *rig, byKey bool) error {
		ref := name
		if byKey {
			ref = keyOf(name)
		}
		_, err := r.d.ChangePeer(context.Background(), ref, c)
		return err
	}
}

func perms(changes ...string) map[string]api.PermissionChange {
	out := map[string]api.PermissionChange{}
	for _, c := range changes {
		out[c[1:]] = api.PermissionChange{Allowed: c[0] == '+'}
	}
	return out
}

func addAs(name, key string) pairEdit {
	return func(r *rig, _ bool) error {
		_, err := r.d.AddPeer(context.Background(), api.NewPeer{Name: name, PublicKey: keyOf(key)})
		return err
	}
}

func removal(ref string) pairEdit {
	return func(r *rig, _ bool) error {
		_, err := r.d.RemovePeer(context.Background(), ref)
		return err
	}
}

// pairEnd is when the timed permission of the first document ends, from its start on,
// and pairThaw when the disk answers again.
const (
	pairEnd  = 2 * time.Second
	pairThaw = 3 * time.Second
)

// pairEdits are edits of a mesh with a phone, which may incoming for pairEnd and routing
// for good, and a tablet.
var pairEdits = map[string]pairEdit{
	"add":                  addAs("watch", "watch"),
	"add phone's new key":  addAs("watch", "new phone"),
	"remove":               removal("phone"),
	"remove tablet":        removal("tablet"),
	"allow":                changeTo("phone", api.PeerChange{Permissions: perms("+lan")}),
	"allow for good":       changeTo("phone", api.PeerChange{Permissions: perms("+incoming")}),
	"allow tablet":         changeTo("tablet", api.PeerChange{Permissions: perms("+lan", "+routing")}),
	"deny":                 changeTo("phone", api.PeerChange{Permissions: perms("-routing")}),
	"deny incoming":        changeTo("phone", api.PeerChange{Permissions: perms("-incoming")}),
	"one for another":      changeTo("phone", api.PeerChange{Permissions: perms("-routing", "+lan")}),
	"rename":               changeTo("phone", api.PeerChange{Name: "mobile"}),
	"rename tablet":        changeTo("tablet", api.PeerChange{Name: "mobile"}),
	"rename and deny":      changeTo("phone", api.PeerChange{Name: "mobile", Permissions: perms("-routing")}),
	"rekey":                changeTo("phone", api.PeerChange{PublicKey: keyOf("new phone")}),
	"rekey tablet":         changeTo("tablet", api.PeerChange{PublicKey: keyOf("new phone")}),
	"rekey and allow":      changeTo("phone", api.PeerChange{PublicKey: keyOf("newer phone"), Permissions: perms("+lan")}),
	"endpoint":             changeTo("phone", api.PeerChange{Endpoint: ptr("192.0.2.7:51820")}),
	"endpoint and allow":   changeTo("phone", api.PeerChange{Endpoint: ptr("192.0.2.8:51820"), Permissions: perms("+lan")}),
	"end of incoming":      func(*rig, bool) error { time.Sleep(pairEnd + time.Millisecond); synctest.Wait(); return nil },
	"keepalive and rename": changeTo("phone", api.PeerChange{Keepalive: ptr("20s"), Name: "handset"}),
}

func ptr[T any](v T) *T { return &v }

// pairResult is what two edits came to.
type pairResult struct {
	answers [2]string // codes, "" for none
	state   string
	events  int // of changes
}

// bareState writes down what of a document doesn't depend on when its edits were made.
func bareState(doc *wanted.Document) string {
	peers := slices.SortedFunc(slices.Values(doc.Peers), func(a, b mesh.Peer) int { return cmp.Compare(a.Name, b.Name) })
	var former, gone []string
	for _, f := range doc.Former {
		former = append(former, f.Name+">"+f.Now)
	}
	for _, r := range doc.Removed {
		gone = append(gone, fmt.Sprint(r.Addresses))
	}
	slices.Sort(former)
	slices.Sort(gone)
	out := ""
	for _, p := range peers {
		incoming := p.Permissions.Of(mesh.Incoming).Allowed
		out += fmt.Sprintf("\n\t%s %v %v %v %q %d incoming %v for good %v routing %v lan %v", p.Name, p.PublicKey, p.Kind, p.Addresses, p.Endpoint, p.Keepalive,
			incoming, incoming && p.Permissions.Of(mesh.Incoming).Until.IsZero(), p.Permissions.Of(mesh.Routing).Allowed, p.Permissions.Of(mesh.LAN).Allowed)
	}
	return out + fmt.Sprintf("\n\tformer %v removed %v", former, gone)
}

// memoryDisk is a disk in memory: what makes files outlive a loss of power takes most of
// the time of a test that saves thousands of times.
type memoryDisk struct {
	mu    sync.Mutex
	files map[string]string
	temps int
}

func (m *memoryDisk) WriteTemp(dir, name string, content []byte) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.temps++
	path := filepath.Join(dir, "."+name+"."+strconv.Itoa(m.temps))
	m.files[path] = string(content)
	return path, nil
}

func (m *memoryDisk) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	text, ok := m.files[from]
	if !ok {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: os.ErrNotExist}
	}
	delete(m.files, from)
	m.files[to] = text
	return nil
}

func (m *memoryDisk) Remove(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.files, path)
	return nil
}

func (m *memoryDisk) SyncDir(string) error { return nil }

func (m *memoryDisk) read(path string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.files[path]
}

// pairFiles returns the files of a helper with the mesh that pairEdits are for. It is
// made once, for a bubble's time always begins at the same moment.
func pairFiles(t *testing.T) (files map[string]string) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.add("tablet")
		r.mustAllow("phone", "routing", "")
		until := time.Now().Add(pairEnd)
		if _, err := r.d.ChangePeer(t.Context(), "phone", api.PeerChange{
			Permissions: map[string]api.PermissionChange{"incoming": {Allowed: true, Until: &until}},
		}); err != nil {
			t.Fatal(err)
		}
		r.stop()
		files = contents(t, r.dir)
	})
	return files
}

// doPair makes two edits on a mesh of these files, the second when the
// first is answered, or while the disk keeps the first from being answered, and returns
// what they came to after pairEnd. The second may find its peer by key.
func doPair(t *testing.T, files map[string]string, first, second string, atOnce, byKey bool) (out pairResult) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		if err := os.Mkdir(r.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r.start()
		defer r.end()
		memory := &memoryDisk{files: map[string]string{filepath.Join(r.dir, "state.json"): files["state.json"]}}
		r.setDisk(memory)
		before := len(r.events(events.Change))
		code := func(err error) string {
			var e *api.Error
			switch {
			case err == nil:
				return ""
			case errors.As(err, &e):
				return e.Code
			}
			return err.Error()
		}
		if atOnce {
			disk := newFrozenDisk()
			disk.FileSystem = memory
			r.setDisk(disk)
			done := [2]chan error{make(chan error, 1), make(chan error, 1)}
			for i, name := range []string{first, second} {
				go func() { done[i] <- pairEdits[name](r, byKey && i == 1) }()
				synctest.Wait()
			}
			time.Sleep(pairThaw)
			close(disk.thawed)
			out.answers = [2]string{code(<-done[0]), code(<-done[1])}
		} else {
			for i, name := range []string{first, second} {
				had, was := len(r.events(events.Change)), r.d.wanted.Document()
				out.answers[i] = code(pairEdits[name](r, byKey && i == 1))
				want := 1
				if name == "end of incoming" || r.d.wanted.Document() == was {
					want = 0
				}
				if got := len(r.events(events.Change)) - had; got != want {
					t.Errorf("%s: %d events of changes, want %d", name, got, want)
				}
			}
		}
		r.after(15 * time.Second)
		doc := r.d.wanted.Document()
		out.state = bareState(doc)
		kept, err := wanted.Decode([]byte(memory.read(filepath.Join(r.dir, "state.json"))))
		if err != nil {
			t.Fatal(err)
		}
		mine, _ := doc.Encode()
		disks, _ := kept.Encode()
		if string(mine) != string(disks) {
			t.Errorf("in memory %s\non disk %s", mine, disks)
		}
		out.events = len(r.events(events.Change)) - before
	})
	return out
}

// inParts are the edits that take something away, at once, and then give something. Where
// the second part is refused, the answer says so.
var inParts = []string{"one for another", "rekey and allow"}

// TestPairsOfEdits makes every pair of edits while the first of them is being saved: the
// result and the answers are those of the two edits one after the other, in one of the two
// orders. No acknowledged edit is lost, and the disk has what is in force.
func TestPairsOfEdits(t *testing.T) {
	names := slices.Sorted(maps.Keys(pairEdits))
	type order struct {
		first, second string
		byKey         bool
	}
	files, known := pairFiles(t), map[order]pairResult{}
	inOrder := func(t *testing.T, o order) pairResult {
		if _, ok := known[o]; !ok {
			known[o] = doPair(t, files, o.first, o.second, false, o.byKey)
		}
		return known[o]
	}
	for _, first := range names {
		for _, second := range names {
			if first == second {
				continue
			}
			t.Run(strings.ReplaceAll(first+", "+second, " ", "_"), func(t *testing.T) {
				got := doPair(t, files, first, second, true, false)
				one, other := inOrder(t, order{first, second, false}), inOrder(t, order{second, first, false})
				slices.Reverse(other.answers[:])
				if i := slices.Index(got.answers[:], api.CodeNotSaved); i >= 0 && slices.Contains(inParts, []string{first, second}[i]) {
					got.answers[i], one.answers[i], other.answers[i] = "", "", ""
				}
				if first == "allow for good" && second == "deny incoming" {
					got.events++ // what is denied meanwhile stays away, so that the first changes nothing
				}
				if got == one || got == other {
					return
				}
				// An edit goes on to be about the peer that it was about when it began.
				if byKey := inOrder(t, order{first, second, true}); got != byKey {
					t.Errorf("answers %q, %d events:%s\nwant as one after the other %q, %d events:%s\nor %q, %d events:%s",
						got.answers, got.events, got.state, one.answers, one.events, one.state, other.answers, other.events, other.state)
				}
			})
		}
	}
}

// TestDeniedMeanwhileStaysAway denies a permission while another change, which allows it
// without an end, is being saved: it stays denied. One that expires meanwhile is allowed.
func TestDeniedMeanwhileStaysAway(t *testing.T) {
	got := doPair(t, pairFiles(t), "allow for good", "deny incoming", true, false)
	for line := range strings.Lines(got.state) {
		if strings.HasPrefix(line, "\tphone ") && !strings.Contains(line, "incoming false") {
			t.Errorf("it is allowed again:%s", got.state)
		}
	}
	// One that ended by itself isn't taken away.
	got = doPair(t, pairFiles(t), "allow for good", "end of incoming", true, false)
	if !strings.Contains(got.state, "incoming true for good true") {
		t.Errorf("it isn't allowed:%s", got.state)
	}
}

// TestDeniedBeforeANewKeyStaysAway denies a permission while another change, which allows
// it, is being saved, and then gives the peer another key.
func TestDeniedBeforeANewKeyStaysAway(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "incoming", "")
		r.mustAllow("phone", "lan", "")
		disk := newFrozenDisk()
		r.setDisk(disk)
		done := make(chan error)
		for _, c := range []api.PeerChange{
			{Permissions: perms("+incoming", "+routing", "+lan")},
			{Permissions: perms("-incoming")},
			{PublicKey: keyOf("new phone"), Permissions: perms("-lan")},
		} {
			go func() {
				_, err := r.d.ChangePeer(context.Background(), "phone", c)
				done <- err
			}()
			synctest.Wait()
		}
		close(disk.thawed)
		for range 3 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if p := r.d.wanted.Document().Peers[0]; p.PublicKey.String() != keyOf("new phone") || p.Permissions.Of(mesh.Incoming).Allowed || p.Permissions.Of(mesh.LAN).Allowed || !p.Permissions.Of(mesh.Routing).Allowed {
			t.Errorf("%v may %+v", p.PublicKey, p.Permissions)
		}
	})
}
