package pfsim

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// longest returns what prefixSet.lookup must find, by trying all entries.
func longest(entries map[netip.Prefix]bool, a netip.Addr) (not, ok bool) {
	best := -1
	for p, n := range entries {
		if p.Contains(a) && p.Bits() > best {
			best, not, ok = p.Bits(), n, true
		}
	}
	return not, ok
}

// drawAddr draws from few addresses, so that prefixes nest and collide.
func drawAddr(t *rapid.T) netip.Addr {
	if rapid.Bool().Draw(t, "v4") {
		return netip.AddrFrom4([4]byte{10, rapid.Byte().Draw(t, "b") & 3, 0, rapid.Byte().Draw(t, "d")})
	}
	return netip.AddrFrom16([16]byte{0xfd, 7: rapid.Byte().Draw(t, "h") & 3, 8: rapid.Byte().Draw(t, "i") & 3, 15: rapid.Byte().Draw(t, "p")})
}

func drawPrefix(t *rapid.T) netip.Prefix {
	a := drawAddr(t)
	p, err := a.Prefix(rapid.IntRange(0, a.BitLen()).Draw(t, "bits"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPrefixSetIsLongestMatch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var set prefixSet
		model := map[netip.Prefix]bool{}
		for range rapid.IntRange(1, 60).Draw(t, "operations") {
			p := drawPrefix(t)
			if rapid.IntRange(0, 3).Draw(t, "op") == 0 {
				_, had := model[p]
				delete(model, p)
				if set.remove(p) != had {
					t.Fatalf("remove %s: want %t", p, had)
				}
				continue
			}
			not := rapid.Bool().Draw(t, "not")
			model[p] = not
			set.set(p, not)
		}
		comparePrefixSet(t, &set, model)
	})
}

func comparePrefixSet(t *rapid.T, set *prefixSet, model map[netip.Prefix]bool) {
	if set.n != len(model) {
		t.Fatalf("%d entries, want %d", set.n, len(model))
	}
	for p, not := range model {
		if got, ok := set.get(p); !ok || got != not {
			t.Fatalf("get %s: %t %t, want %t", p, got, ok, not)
		}
	}
	for range 50 {
		a := drawAddr(t)
		not, ok := set.lookup(a)
		if wantNot, wantOK := longest(model, a); not != wantNot || ok != wantOK {
			t.Fatalf("lookup %s: %t %t, want %t %t", a, not, ok, wantNot, wantOK)
		}
	}
	got := set.entries()
	if len(got) != len(model) || !slices.IsSortedFunc(got, func(a, b prefixEntry) int { return a.prefix.Addr().Compare(b.prefix.Addr()) }) {
		t.Fatalf("entries %v of %v", got, model)
	}
	for _, e := range got {
		if not, ok := model[e.prefix]; !ok || not != e.not {
			t.Fatalf("entry %v isn't in %v", e, model)
		}
	}
}

func TestPrefixSetForgets(t *testing.T) {
	var set prefixSet
	for i := range 200 {
		set.set(netip.PrefixFrom(meshPeer(i), 32), false)
		set.set(netip.PrefixFrom(meshPeer6(i), 128), true)
	}
	for i := range 200 {
		if !set.remove(netip.PrefixFrom(meshPeer(i), 32)) || !set.remove(netip.PrefixFrom(meshPeer6(i), 128)) {
			t.Fatalf("entry %d was gone", i)
		}
	}
	if set.n != 0 || set.v4 != nil || set.v6 != nil {
		t.Errorf("an emptied set still holds nodes: %+v", set)
	}
}

func BenchmarkPrefixSet(b *testing.B) {
	var set prefixSet
	for i := range 10000 {
		set.set(netip.PrefixFrom(meshPeer(i), 32), false)
		set.set(netip.PrefixFrom(meshPeer6(i), 128), false)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if !set.contains(meshPeer(i%10000)) || !set.contains(meshPeer6(i%10000)) {
			b.Fatal("a peer is missing")
		}
	}
}
