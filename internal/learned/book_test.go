package learned

import (
	"errors"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
)

var (
	phone  = mesh.PublicKey{1: 9, 2: 1}
	tablet = mesh.PublicKey{1: 9, 2: 2}
	home   = netip.MustParseAddrPort("203.0.113.9:51820")
	cafe   = netip.MustParseAddrPort("[2001:db8::7]:1")
	noon   = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
)

// note records the given peers, and forgets all others.
func (b *Book) note(now map[mesh.PublicKey]Peer) {
	var keys []mesh.PublicKey
	for key := range now {
		keys = append(keys, key)
	}
	b.Note(keys, func(key mesh.PublicKey) Peer { return now[key] })
}

// reopened saves b and returns the book that the next start of the helper reads.
func reopened(t *testing.T, b *Book) *Book {
	t.Helper()
	path := filepath.Join(t.TempDir(), "learned.json")
	if err := b.Save(func(content []byte) error { return owned.Replace(path, content) }); err != nil {
		t.Fatal(err)
	}
	if b.Changed() {
		t.Error("the book has changes that aren't saved")
	}
	next, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// TestEndpoint records from where peers were heard, and checks the learned endpoint of each
// before and after a restart. With a configured endpoint it is used for Age only.
func TestEndpoint(t *testing.T) {
	b := newBook()
	want := func(about string, key mesh.PublicKey, configured bool, after time.Duration, at netip.AddrPort) {
		t.Helper()
		for _, b := range []*Book{b, reopened(t, b)} {
			if got := b.Endpoint(key, configured, noon.Add(after)); got != at {
				t.Errorf("%s: %v, want %v", about, got, at)
			}
		}
	}
	none := netip.AddrPort{}
	want("never heard", phone, false, 0, none)
	b.note(map[mesh.PublicKey]Peer{phone: {Endpoint: home}, tablet: {Endpoint: cafe, Seen: noon.Add(time.Second / 2)}})
	want("endpoint in use, never heard", phone, false, 0, none)
	want("heard", tablet, false, 0, cafe)
	b.note(map[mesh.PublicKey]Peer{phone: {Endpoint: home, Seen: noon}, tablet: {Endpoint: home}})
	want("not heard since", tablet, true, 0, cafe)
	want("heard for the first time", phone, true, 0, home)
	want("a day ago", phone, true, Age-time.Second, home)
	want("longer ago than Age, one is configured", phone, true, Age, none)
	want("long ago, and none is configured", phone, false, 1000*Age, home)
	want("the clock was set back", phone, true, -1000*Age, home)
	b.note(map[mesh.PublicKey]Peer{phone: {}})
	want("a removed peer", tablet, false, 0, none)
	want("a peer that stayed", phone, false, 0, home)
}

// TestTotals counts traffic over several tunnels and a restart: the totals never decrease, even
// for counters that were read before those noted last.
func TestTotals(t *testing.T) {
	b := newBook()
	counters := Totals{}
	want := func(about string, rx, spoofed uint64) {
		t.Helper()
		if got := b.Totals(phone, counters); got.Rx != rx || got.Refused.Spoofed != spoofed || got.Tx != 0 || got.Refused.LAN != 0 {
			t.Errorf("%s: %+v, want %d received and %d spoofed", about, got, rx, spoofed)
		}
	}
	note := func() { b.note(map[mesh.PublicKey]Peer{phone: {Totals: counters}}) }
	count := func(rx, spoofed uint64) { counters = Totals{Rx: rx, Refused: Refused{Spoofed: spoofed}} }
	count(100, 3)
	want("not noted yet", 100, 3)
	note()
	want("noted", 100, 3)
	count(150, 3)
	note()
	count(120, 3)
	want("read before those noted last", 150, 3)
	count(0, 0) // the tunnel was removed
	want("without a tunnel", 150, 3)
	note()
	want("without a tunnel, noted", 150, 3)
	count(30, 1)
	want("of the next tunnel", 180, 4)
	note()
	count(20, 2) // two tunnels later
	note()
	want("of the tunnel after it", 200, 5)
	b, counters = reopened(t, b), Totals{}
	want("after a restart", 200, 5)
	count(7, 0)
	note()
	note()
	want("counted on after the restart", 207, 5)
	b.note(nil)
	want("of a peer that was forgotten", 7, 0)
}

// TestTotalsHasAllNumbers counts traffic of every kind over two tunnels: all numbers are summed
// up and saved.
func TestTotalsHasAllNumbers(t *testing.T) {
	b, one := newBook(), Totals{1, 2, 3, 4, Refused{5, 6, 7, 8, 9, 10}}
	b.note(map[mesh.PublicKey]Peer{phone: {Totals: one}})
	b.note(map[mesh.PublicKey]Peer{phone: {}})
	want := Totals{2, 4, 6, 8, Refused{10, 12, 14, 16, 18, 20}}
	if diff := cmp.Diff(want, reopened(t, b).Totals(phone, one)); diff != "" {
		t.Error(diff)
	}
}

// TestChanged checks that only a change that differs from the saved content is to be saved.
func TestChanged(t *testing.T) {
	b := newBook()
	peer := Peer{Endpoint: home, Seen: noon, Totals: Totals{Rx: 1}}
	names := map[string]netip.Addr{"home.example": home.Addr()}
	outside := Outside{Name: "home.example", Addresses: []netip.Addr{home.Addr()}}
	for _, step := range []struct {
		name string
		do   func()
		want bool
	}{
		{"nothing", func() { b.note(nil) }, false},
		{"a peer of which nothing is known", func() { b.note(map[mesh.PublicKey]Peer{phone: {}}) }, false},
		{"heard", func() { b.note(map[mesh.PublicKey]Peer{phone: peer}) }, true},
		{"the same", func() { b.note(map[mesh.PublicKey]Peer{phone: peer}) }, false},
		{"a part of a second later", func() {
			peer.Seen = peer.Seen.Add(time.Second / 2)
			b.note(map[mesh.PublicKey]Peer{phone: peer})
		}, false},
		{"later", func() { peer.Seen = peer.Seen.Add(time.Minute); b.note(map[mesh.PublicKey]Peer{phone: peer}) }, true},
		{"counted", func() { peer.Totals.Tx++; b.note(map[mesh.PublicKey]Peer{phone: peer}) }, true},
		{"the tunnel is gone", func() { b.note(map[mesh.PublicKey]Peer{phone: {}}) }, false},
		{"gone", func() { b.note(map[mesh.PublicKey]Peer{tablet: {}}) }, true},
		{"a name", func() { b.SetNames(names) }, true},
		{"the same name", func() { b.SetNames(maps.Clone(names)) }, false},
		{"outside", func() {
			if !b.SetOutside(outside) {
				t.Error("SetOutside reports no change")
			}
		}, true},
		{"the same, but more that has no room", func() {
			outside.Left = 3
			if b.SetOutside(outside) || b.Outside().Left != 3 {
				t.Error("SetOutside reports a change, or the number of left addresses is wrong")
			}
		}, false},
	} {
		step.do()
		if got := b.Changed(); got != step.want {
			t.Errorf("%s: changed %v", step.name, got)
		}
		_ = b.Save(func([]byte) error { return nil })
	}
	full := errors.New("full")
	b.SetNames(nil)
	if err := b.Save(func([]byte) error { return full }); !errors.Is(err, full) || !b.Changed() {
		t.Errorf("a full disk: %v, changed %v", err, b.Changed())
	}
}

// TestForgedAnswers mixes forged answers for this host's own name with true ones. A single
// forged answer neither fills the list nor keeps the router's next address out, addresses that
// are seen again stay, and Add returns the number of addresses that don't count.
func TestForgedAnswers(t *testing.T) {
	forged := func(from, n int) (out []netip.Addr) {
		for i := range n {
			out = append(out, netip.AddrFrom4([4]byte{1, 0, byte((from + i) >> 8), byte(from + i)}))
		}
		return out
	}
	next := netip.MustParseAddr("203.0.113.10")
	a, now := Outside{}.Answers("home.example", noon), noon
	add := func(about string, answer []netip.Addr, counts, left int) {
		t.Helper()
		now = now.Add(time.Minute)
		if got := a.Add(answer, now); got != left || len(a.Sorted()) != counts {
			t.Errorf("%s: %d count and %d don't, want %d and %d", about, len(a.Sorted()), got, counts, left)
		}
	}
	has := func(about string, want bool, addrs ...netip.Addr) {
		t.Helper()
		for _, one := range addrs {
			if slices.Contains(a.Sorted(), one) != want {
				t.Errorf("%s: %v counts: %v", about, one, !want)
			}
		}
	}
	add("true", []netip.Addr{home.Addr()}, 1, 0)
	add("forged once", forged(0, MaxOutside), 1+maxNew, MaxOutside-maxNew)
	add("true again", []netip.Addr{home.Addr()}, 1+maxNew, 0)
	add("and the next", []netip.Addr{next}, 2+maxNew, 0)
	has("after one forged answer", true, home.Addr(), next)
	for i := range 2 {
		add("forged", forged(maxNew*(1+i), maxNew), 2+maxNew*(2+i), 0)
	}
	add("forged until there is no room", forged(3*maxNew, maxNew), MaxOutside, 2)
	has("those that were seen last", true, append(forged(3*maxNew, maxNew), home.Addr(), next)...)
	has("those that were seen first", false, forged(0, 2)...)
	add("no room, and a third", []netip.Addr{cafe.Addr()}, MaxOutside, 3)
	has("no room, and a third", true, home.Addr(), next, cafe.Addr())
	add("one that gave way", forged(0, 1), MaxOutside, 3)
	has("one that gave way", true, forged(0, 1)...)

	// Several forged answers in a row replace the true addresses.
	for i := range 4 {
		a.Add(forged(1000+maxNew*i, maxNew), now)
	}
	has("forged four times in a row", false, home.Addr(), next)
	add("true at last", []netip.Addr{next, home.Addr()}, MaxOutside, MaxOutside-1) // no other addresses are remembered
	has("true at last", true, home.Addr(), next)

	now = now.Add(OutsideFor)
	add("a day later", []netip.Addr{next}, 1, 0)

	// Addresses of one answer that is too long don't replace each other.
	many := append(forged(0, MaxOutside+3), next)
	for left := MaxOutside + 3 - maxNew; left > 4; left -= maxNew {
		add("many", many, MaxOutside+4-left, left)
	}
	for range 3 {
		add("too many", many, MaxOutside, 4)
		has("too many", true, append(forged(0, MaxOutside-1), next)...)
	}
}

// TestFormerFile reads a file without the later fields, and invalid files: an invalid one
// gives an error, and an empty book that can be used.
func TestFormerFile(t *testing.T) {
	dir := t.TempDir()
	read := func(text string) (*Book, error) {
		path := filepath.Join(dir, "learned.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Open(path)
	}
	b, err := read(`{"endpoints":{"` + phone.String() + `":"203.0.113.9:51820","` + tablet.String() + `":"203.0.113.9:0"},` +
		`"counts":{"` + tablet.String() + `":{"rx":1,"tx":2,"routedRx":3,"routedTx":4,"refused":{"martian":5,"self":6,"mesh":7,"lan":8,"internet":9,"spoofed":10}}},` +
		`"outside":{"name":"home.example","addresses":["203.0.113.9","fe80::1%en0"]},"later":{"a":1}}`)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.Endpoint(phone, false, noon); got != home {
		t.Errorf("the phone's endpoint is %v, want %v", got, home)
	}
	if got := b.Endpoint(phone, true, noon); got.IsValid() {
		t.Errorf("with a configured endpoint and without a time, the phone's endpoint is %v", got)
	}
	if got := b.Endpoint(tablet, false, noon); got.IsValid() {
		t.Errorf("the tablet's endpoint, with port 0, is %v", got)
	}
	if diff := cmp.Diff(Totals{1, 2, 3, 4, Refused{5, 6, 7, 8, 9, 10}}, b.Totals(tablet, Totals{})); diff != "" {
		t.Error(diff)
	}
	if o := b.Outside(); o.Name != "home.example" || len(o.Addresses) != 1 || o.Addresses[0] != home.Addr() {
		t.Errorf("outside %+v", o)
	}
	if b.Changed() {
		t.Error("a book that was only read is to be saved")
	}
	for _, text := range []string{"", "}", `{"endpoints":3}`, `{"endpoints":{"x":"203.0.113.9:1"}}`, strings.Repeat(" ", maxFile+1)} {
		b, err := read(text)
		if err == nil || !strings.HasPrefix(err.Error(), "read learned endpoints: ") {
			t.Errorf("%.20q: %v", text, err)
		}
		b.note(map[mesh.PublicKey]Peer{phone: {Endpoint: home, Seen: noon}}) // the book can be used all the same
		if got := b.Endpoint(phone, false, noon); got != home {
			t.Errorf("%.20q: %v", text, got)
		}
	}
	if err := os.Remove(filepath.Join(dir, "learned.json")); err != nil {
		t.Fatal(err)
	}
	if b, err := Open(filepath.Join(dir, "learned.json")); err != nil || b.Changed() || len(b.Names()) != 0 {
		t.Errorf("no file: %v", err)
	}
}

// TestFullBook saves a book with as many entries as a mesh can have, each of its maximum
// length: the file fits the bound up to which it is read.
func TestFullBook(t *testing.T) {
	const peers = 1 << 14
	all := Totals{}.merge(Totals{}, func(uint64, uint64) uint64 { return math.MaxUint64 })
	now, names := map[mesh.PublicKey]Peer{}, map[string]netip.Addr{}
	label := strings.Repeat("a", 60)
	for i := range peers {
		a := netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, byte(i>>8) | 0x80, byte(i)})
		now[mesh.PublicKey{1: 9, 2: byte(i), 3: byte(i >> 8)}] = Peer{Endpoint: netip.AddrPortFrom(a, 65535), Seen: noon, Totals: all}
		name := strings.Repeat(label+".", 4)[:236] + strings.Repeat("b", 6) + string([]byte{'a' + byte(i&15), 'a' + byte(i>>4&15), 'a' + byte(i>>8&15), 'a' + byte(i>>12&15)})
		names[name] = a
	}
	b := newBook()
	b.note(now)
	b.SetNames(names)
	next := reopened(t, b)
	if len(next.Names()) != peers || len(next.peers) != peers {
		t.Errorf("%d names and %d peers are read back, want %d", len(next.Names()), len(next.peers), peers)
	}
}

// TestConcurrently calls the methods of a Book at the same time, as the daemon does. Run it
// with -race.
func TestConcurrently(t *testing.T) {
	b := newBook()
	var wg sync.WaitGroup
	for _, do := range []func(i int){
		func(i int) {
			b.note(map[mesh.PublicKey]Peer{phone: {Endpoint: home, Seen: noon.Add(time.Duration(i) * time.Second)}})
		},
		func(int) { b.Endpoint(phone, true, noon) },
		func(int) { b.Totals(phone, Totals{Rx: 1}) },
		func(int) { _ = b.Save(func([]byte) error { return nil }) },
		func(int) { b.SetNames(map[string]netip.Addr{"home.example": home.Addr()}); _ = maps.Clone(b.Names()) },
		func(i int) { b.SetOutside(Outside{Left: i}); b.Outside(); b.Changed() },
	} {
		wg.Go(func() {
			for i := range 200 {
				do(i)
			}
		})
	}
	wg.Wait()
}

// FuzzLearned checks that a book read from any file has usable endpoints and addresses only,
// and is the same after it is saved and read again.
func FuzzLearned(f *testing.F) {
	f.Add([]byte(`{"endpoints":{"` + phone.String() + `":"203.0.113.9:51820"},"seen":{"` + phone.String() + `":"2026-06-01T12:00:00Z"}}`))
	f.Add([]byte(`{"endpoints":{"x":"[fe80::1%en0]:1"}}`))
	f.Add([]byte(`{"endpoints":null}`))
	f.Add([]byte(`{"endpoints":{"` + phone.String() + `":"203.0.113.9:1"},"seen":{"` + phone.String() + `":"9999-12-31T23:59:59-23:00"}}`))
	f.Add([]byte(`{"names":{"home.example":"203.0.113.9","a b":"203.0.113.9","c":"fe80::1%en0"},"outside":{"name":"x","addresses":["::1"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := decode(text)
		if err != nil {
			return
		}
		for key, e := range b.peers {
			if at := e.endpoint; at != (netip.AddrPort{}) && (!at.IsValid() || at.Port() == 0) {
				t.Errorf("peer %v has the endpoint %v", key, at)
			}
		}
		for name, a := range b.Names() {
			if !a.IsValid() || a.Zone() != "" {
				t.Errorf("name %q has the address %v", name, a)
			}
		}
		if o := b.Outside(); len(o.Addresses) > MaxOutside {
			t.Errorf("%d outside addresses", len(o.Addresses))
		}
		// A book that was read can be saved, and is the same when it is read again.
		var first, second []byte
		if err := b.Save(func(content []byte) error { first = content; return nil }); err != nil {
			t.Fatal(err)
		}
		again, err := decode(first)
		if err != nil {
			t.Fatalf("%q can't be read: %v", first, err)
		}
		if err := again.Save(func(content []byte) error { second = content; return nil }); err != nil {
			t.Fatal(err)
		}
		if string(first) != string(second) {
			t.Errorf("%q\nis written again as\n%q", first, second)
		}
	})
}

// TestImpossibleAddresses reads an endpoint whose zone has line breaks, which would add lines
// to WireGuard's configuration, and IPv4-mapped addresses, which the policy refuses: they are
// dropped.
func TestImpossibleAddresses(t *testing.T) {
	text := `{"endpoints":{` +
		`"` + phone.String() + `":"[fe80::1%x]:1\npublic_key=00\nendpoint=[fe80::2%y]:9",` +
		`"` + tablet.String() + `":"[fe80::1%en0]:9"},` +
		`"names":{"home.example":"::ffff:192.0.2.1"},"outside":{"name":"home.example","addresses":["::ffff:192.0.2.1","192.0.2.2"]}}`
	b, err := decode([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if at := b.peers[phone].endpoint; at.IsValid() {
		t.Errorf("the phone's endpoint is %q", at)
	}
	if at := b.peers[tablet].endpoint; at.String() != "[fe80::1%en0]:9" {
		t.Errorf("the tablet's endpoint is %q", at)
	}
	if o := b.Outside(); len(o.Addresses) != 1 || o.Addresses[0] != netip.MustParseAddr("192.0.2.2") || len(b.Names()) != 0 {
		t.Errorf("outside %v, names %v", o.Addresses, b.Names())
	}
}
