package wanted

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
)

func FuzzMark(f *testing.F) {
	f.Add([]byte(`{"saved":"2026-01-02T15:04:05Z"}`))
	f.Add([]byte(`{"saved":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		at, err := decodeMark(text)
		if err != nil && !at.IsZero() {
			t.Errorf("time %v together with an error", at)
		}
	})
}

// FuzzDocument checks that an accepted document can be encoded and decoded again, and that its
// encoding is stable.
func FuzzDocument(f *testing.F) {
	f.Add([]byte(`{"version":1,"generation":3,"saved":"2026-01-02T15:04:05Z","peers":[]}`))
	f.Add([]byte(`{"version":1,"generation":1,"peers":[{"name":"phone","publicKey":"` + keyOf("phone") +
		`","kind":"own","addresses":["100.64.0.1","fd6d:6573:6800::1"],"endpoint":"a.example:1","keepalive":25,` +
		`"permissions":{"incoming":{"allowed":true},"routing":{"allowed":true,"until":"2026-01-02T15:04:05Z"},"lan":{"allowed":false}}}],` +
		`"former":[{"name":"x","now":"phone"}],"removed":[{"addresses":["100.64.0.2","fd6d:6573:6800::2"],"at":"2026-01-02T15:04:05Z"}]}`))
	f.Add([]byte(`{"version":1,"generation":1,"mesh":{"a":1},"peers":[{"name":"phone","publicKey":"` + keyOf("phone") +
		`","kind":"own","addresses":["100.64.0.1","fd6d:6573:6800::1"],"note":"x","permissions":{"incoming":{"allowed":true,"by":"me"},"send":{"allowed":true}}}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"generation":1,"peers":[{}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		doc, err := Decode(text)
		if err != nil {
			return
		}
		again, err := doc.Encode()
		if err != nil {
			t.Fatalf("encode the decoded document: %v", err)
		}
		same, err := Decode(again)
		if err != nil {
			t.Fatalf("decode the encoded document: %v\n%s", err, again)
		}
		twice, err := same.Encode()
		if err != nil || string(twice) != string(again) {
			t.Fatalf("encoding isn't stable: %v\n%s\n%s", err, again, twice)
		}
	})
}

// TestRemovedBounded removes more peers than Document.Removed has room for: the oldest are
// dropped. Those that are older than removedFor are dropped as well.
func TestRemovedBounded(t *testing.T) {
	doc := &Document{Version: documentVersion}
	start := time.Unix(1e9, 0)
	v4, v6 := netip.MustParseAddr("100.64.0.0"), netip.MustParseAddr("fd6d:6573:6800::")
	for i := range maxRemoved + 10 {
		v4, v6 = v4.Next(), v6.Next()
		before := &Document{Peers: []mesh.Peer{{Addresses: mesh.Addresses{v4, v6}}}}
		doc.retire(before, start.Add(time.Duration(i)*time.Second))
	}
	if n := len(doc.Removed); n != maxRemoved || doc.Removed[n-1].Addresses[0] != v4 {
		t.Errorf("%d removed, the last is %v", n, doc.Removed[n-1])
	}
	if err := doc.validate(); err != nil {
		t.Error(err)
	}
	doc.retire(&Document{}, start.Add(removedFor+time.Hour))
	if n := len(doc.Removed); n != maxRemoved+10-3601 {
		t.Errorf("%d removed peers are left an hour after removedFor, want %d", n, maxRemoved+10-3601)
	}
}

// TestMeshPrefixCollisions moves a mesh to a prefix in which the derived addresses of the
// peers collide: each gets an address of its own, and a chosen address that fits stays. More
// peers than the prefix has room for are refused.
func TestMeshPrefixCollisions(t *testing.T) {
	key := func(name string) mesh.PublicKey {
		k, err := mesh.ParsePublicKey(keyOf(name))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	doc := &Document{Version: documentVersion}
	old := mesh.DefaultPrefixes()
	taken := map[netip.Addr]bool{}
	names := []string{"peer-a", "peer-b", "peer-c", "peer-d", "peer-e"}
	for _, name := range names {
		a, err := old.Propose(key(name), func(a netip.Addr) bool { return taken[a] })
		if err != nil {
			t.Fatal(err)
		}
		taken[a[0]], taken[a[1]] = true, true
		doc.Peers = append(doc.Peers, mesh.Peer{Name: name, PublicKey: key(name), Kind: mesh.Own, Addresses: mesh.Addresses{a[0], a[1]}})
	}
	given := netip.MustParseAddr("10.9.8.4")
	doc.Peers[4].Addresses[0] = given
	move := func(prefix string, peers int) (*Document, Identity, error) {
		m := Identity{Prefixes: mesh.Prefixes{V4: netip.MustParsePrefix(prefix), V6: old.V6}, Key: key("host")}
		var err error
		if m.Own, err = m.Prefixes.Propose(m.Key, func(a netip.Addr) bool { return a == given }); err != nil {
			t.Fatal(err)
		}
		d := doc.Clone()
		d.Peers = d.Peers[len(d.Peers)-peers:]
		next, err := d.Renumbered(m, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
		return next, m, err
	}
	// A /29 has six usable addresses, which five peers and the host take.
	next, m, err := move("10.9.8.0/29", 5)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.validate(); err != nil {
		t.Error(err)
	}
	if err := next.checkFits(m); err != nil {
		t.Error(err)
	}
	if got := next.Peers[4].Addresses[0]; got != given {
		t.Errorf("the chosen address, which fits the prefix, became %v", got)
	}
	if len(next.Removed) != 4 {
		t.Errorf("%d removed pairs of addresses, want those of the 4 peers that moved", len(next.Removed))
	}
	again, _, err := move("10.9.8.0/29", 5)
	if err != nil || !slices.Equal(again.Peers, next.Peers) {
		t.Errorf("renumbering the same document again gives %v, %v", again.Peers, err)
	}
	doc.Peers = append(doc.Peers, mesh.Peer{Name: "peer-f", PublicKey: key("peer-f"), Kind: mesh.Own, Addresses: mesh.Addresses{netip.MustParseAddr("100.70.1.1"), netip.MustParseAddr("fd6d:6573:6800::77")}})
	if _, _, err := move("10.9.8.0/29", 6); err == nil || !strings.Contains(err.Error(), "no room for all 6 peers") {
		t.Errorf("six peers and the host with six addresses: %v, want an error", err)
	}
}

// FuzzSettings checks that accepted settings are the same after they are written and read.
func FuzzSettings(f *testing.F) {
	f.Add([]byte(`{"version":1,"settings":{"endpoint":"home.example:51820","dns":"9.9.9.9,2620:fe::9"}}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		kept, err := decodeSettings(text)
		if err != nil {
			return
		}
		again, err := encodeSettings(kept)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeSettings(again); err != nil || !maps.Equal(back, kept) {
			t.Errorf("%v became %v, %v", kept, back, err)
		}
	})
}

// TestKeyIsOfTheFileThatWasChecked replaces the key file all the time, by a file of root and
// one of another user in turn, while the key is loaded: the other user's key is never used.
func TestKeyIsOfTheFileThatWasChecked(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file to another user")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, keyFile)
	var keys [2]mesh.PrivateKey
	for i := range keys {
		var err error
		if keys[i], err = mesh.GeneratePrivateKey(rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	put := func(i int) error {
		err := owned.Replace(path+".new", []byte(keys[i].Reveal()))
		return errors.Join(err, os.Chown(path+".new", 12345*i, 0), os.Rename(path+".new", path))
	}
	if err := put(0); err != nil {
		t.Fatal(err)
	}
	go func() {
		var err error
		for i := 1; err == nil; i = 1 - i {
			select {
			case <-stop:
				ended <- nil
				return
			default:
				err = put(i)
			}
		}
		ended <- err
	}()
	taken, refused := 0, 0
	for n := 0; !t.Failed() && n < 60000 && (taken < 3000 || refused < 3000); n++ {
		d := new(State)
		d.disk.store.dir, d.disk.store.files = dir, DiskFiles{}
		switch err := d.loadKey(false); {
		case err == nil && d.key.Equal(keys[1]):
			t.Error("another user's key was read")
		case err == nil:
			taken++
		default:
			refused++
		}
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	t.Logf("root's key read %d times, another user's file refused %d times", taken, refused)
}

// keyOf returns the public key, in base64, of a private key made from a text.
func keyOf(text string) string {
	var private mesh.PrivateKey
	copy(private[:], text)
	return private.Public().String()
}

// open locks and opens a state directory, with callbacks that do nothing.
func open(t *testing.T, dir string) *State {
	t.Helper()
	taken, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Release() })
	s, err := Open(Options{
		Dir: taken, Logger: slog.New(slog.DiscardHandler), Record: func(events.Event) {},
		Narrow: func(*Document) {}, Changed: func(_, _ *Document) {}, SettingsChanged: func() {},
		Prefixes: mesh.DefaultPrefixes(), Wait: time.Minute, Tick: time.Second, Wall: time.Now, Random: rand.Reader,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestOlderDocumentIsNotSaved calls saveAhead with a document made before a deny that is on
// disk by now: the save is refused, and the deny stays on disk.
func TestOlderDocumentIsNotSaved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	do := func(o Outcome, err error) {
		t.Helper()
		if err == nil {
			err = s.AwaitSaved(t.Context(), o)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	allow := func(yes bool) map[string]api.PermissionChange {
		return map[string]api.PermissionChange{"routing": {Allowed: yes}}
	}
	do(s.AddPeer(t.Context(), api.NewPeer{Name: "phone", PublicKey: keyOf("phone")}))
	do(s.ChangePeer(t.Context(), "phone", api.PeerChange{Permissions: allow(true)}))
	base := s.Document()
	next := base.Clone()
	next.Generation++
	next.Peers[0].Permissions.Of(mesh.LAN).Allowed = true
	do(s.ChangePeer(t.Context(), "phone", api.PeerChange{Permissions: allow(false)}))
	if err := s.disk.saveAhead(t.Context(), base, next); !errors.Is(err, errOvertaken) {
		t.Errorf("got %v, want errOvertaken", err)
	}
	doc, err := readDocument(filepath.Join(dir, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	if may := doc.Peers[0].Permissions; may.Of(mesh.Routing).Allowed || may.Of(mesh.LAN).Allowed {
		t.Errorf("the document on disk has the permissions %+v, want neither routing nor lan", may)
	}
}

// TestDocumentRefused decodes documents with a generation that can't be increased, or isn't a
// generation, and with times that JSON can't represent when they are written again.
func TestDocumentRefused(t *testing.T) {
	peer := `{"name":"phone","publicKey":"` + keyOf("phone") + `","kind":"own","addresses":["100.64.0.1","fd6d:6573:6800::1"],` +
		`"permissions":{"incoming":{"allowed":true},"routing":{"allowed":true,"until":"%s"},"lan":{"allowed":false}}}`
	document := func(generation, saved, until, removed string) []byte {
		return []byte(`{"version":1,` + generation + `"saved":"` + saved + `","peers":[` + fmt.Sprintf(peer, until) +
			`],"removed":[{"addresses":["100.64.0.2","fd6d:6573:6800::2"],"at":"` + removed + `"}]}`)
	}
	const good, late = "2026-01-02T15:04:05Z", "9999-12-31T23:59:59-01:00" // late is in the year 10000 in UTC
	if _, err := Decode(document(`"generation":9007199254740991,`, good, good, good)); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		text []byte
		want string
	}{
		"no generation":          {document("", good, good, good), "generation 0"},
		"generation 0":           {document(`"generation":0,`, good, good, good), "generation 0"},
		"generation 2^53":        {document(`"generation":9007199254740992,`, good, good, good), "generation 9007199254740992"},
		"the last generation":    {document(`"generation":18446744073709551615,`, good, good, good), "generation 18446744073709551615"},
		"saved too late":         {document(`"generation":1,`, late, good, good), "saved: the year"},
		"until too late":         {document(`"generation":1,`, good, late, good), `"phone": until: the year`},
		"removed too late":       {document(`"generation":1,`, good, good, late), "removed: the year"},
		"saved before the years": {document(`"generation":1,`, "0000-01-01T00:00:00Z", good, good), "saved: the year"},
	} {
		if _, err := Decode(c.text); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", what, err, c.want)
		}
	}
	if at, err := decodeMark([]byte(`{"saved":"` + late + `"}`)); err == nil {
		t.Errorf("a mark in the year 10000 is accepted: %v", at)
	}
}

// TestEditPanics has an edit panic. net/http recovers the panic of a request, so the state must
// stay usable: the next change is made.
func TestEditPanics(t *testing.T) {
	dir, err := Lock(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Release()
	s, err := Open(Options{
		Dir: dir, Logger: slog.New(slog.DiscardHandler), Record: func(events.Event) {},
		Narrow: func(*Document) {}, Changed: func(_, _ *Document) {}, SettingsChanged: func() {},
		Prefixes: mesh.DefaultPrefixes(), Wait: time.Minute, Tick: time.Minute, Wall: time.Now, Random: rand.Reader,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx, func() {}) }()
	defer func() {
		if stop(); !t.Failed() { // Run would wait for the lock if the edit had kept it
			<-ended
		}
	}()
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the edit doesn't panic")
			}
		}()
		_, _ = s.Edit(ctx, func(*Document, time.Time) (mesh.PublicKey, error) { panic("a fault of ours") })
	}()
	limit, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	added := make(chan error, 1)
	go func() {
		_, err := s.AddPeer(limit, api.NewPeer{Name: "phone", PublicKey: keyOf("phone")})
		added <- err
	}()
	select {
	case err := <-added:
		if err != nil {
			t.Error(err)
		}
	case <-limit.Done():
		t.Fatal("the next change isn't made")
	}
}
