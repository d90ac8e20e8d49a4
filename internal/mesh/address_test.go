package mesh

import (
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// TestDeriveVectors fixes the results of Derive, as other results would renumber every existing
// mesh. The vectors were computed by another program from the formula at Derive.
func TestDeriveVectors(t *testing.T) {
	small := Prefixes{V4: netip.MustParsePrefix("10.9.0.0/20"), V6: netip.MustParsePrefix("fd00:1:2:3::/64")}
	for _, v := range []struct {
		prefixes     Prefixes
		key          string
		want4, want6 string
	}{
		{DefaultPrefixes(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=", "100.65.250.48", "fd6d:6573:6800:b124:a54a:3d5f:dc41:76b3"},
		{DefaultPrefixes(), "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=", "100.65.178.142", "fd6d:6573:6800:ad9f:cf16:4c6c:3488:8ca8"},
		{small, "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=", "10.9.10.48", "fd00:1:2:3:a54a:3d5f:dc41:76b3"},
	} {
		key, err := ParsePublicKey(v.key)
		if err != nil {
			t.Fatal(err)
		}
		got, err := v.prefixes.Derive(key)
		want := Addresses{netip.MustParseAddr(v.want4), netip.MustParseAddr(v.want6)}
		if err != nil || got != want {
			t.Errorf("Derive(%s) = %v, %v, want %v", v.key, got, err, want)
		}
	}
}

func TestCheck(t *testing.T) {
	p := DefaultPrefixes()
	for a, want := range map[string]error{
		"100.64.0.1":                       nil,
		"100.100.1.100":                    nil,
		"100.127.255.254":                  nil,
		"fd6d:6573:6800::1":                nil,
		"fd6d:6573:6800:1:200:5eff:ff00:1": nil,

		"100.64.0.0":                           ErrReserved,
		"100.127.255.255":                      ErrReserved,
		"100.70.3.255":                         ErrReserved,
		"100.70.3.0":                           ErrReserved,
		"100.100.100.100":                      ErrReserved,
		"100.100.100.200":                      ErrReserved,
		"100.100.2.136":                        ErrReserved,
		"100.115.93.7":                         ErrReserved,
		"fd6d:6573:6800::":                     ErrReserved,
		"fd6d:6573:6800:5::":                   ErrReserved,
		"fd6d:6573:6800:5:fdff:ffff:ffff:ff80": ErrReserved,
		"fd6d:6573:6800:5:ffff:ffff:ffff:fffe": ErrReserved,
		"fd6d:6573:6800:5:200:5eff:fe00:5213":  ErrReserved,
	} {
		if err := p.Check(netip.MustParseAddr(a)); !errors.Is(err, want) {
			t.Errorf("Check(%s) = %v, want %v", a, err, want)
		}
	}
	for _, a := range []string{"100.128.0.1", "10.0.0.1", "fd00::1", "2001:db8::1", "::ffff:100.64.0.1", "fd6d:6573:6800::1%eth0"} {
		if err := p.Check(netip.MustParseAddr(a)); err == nil || errors.Is(err, ErrReserved) {
			t.Errorf("Check(%s) = %v, want an error that it is outside the mesh", a, err)
		}
	}
	// The broadcast address of a prefix other than a /24.
	small := Prefixes{V4: netip.MustParsePrefix("10.0.0.64/29"), V6: p.V6}
	if err := small.Check(netip.MustParseAddr("10.0.0.71")); !errors.Is(err, ErrReserved) {
		t.Errorf("broadcast address of a /29: %v", err)
	}
}

func TestPrefixesValidate(t *testing.T) {
	if err := DefaultPrefixes().Validate(); err != nil {
		t.Error(err)
	}
	for _, p := range [][2]string{
		{"fd00::/48", "100.64.0.0/10"},
		{"100.64.0.1/10", "fd00::/48"},
		{"10.0.0.0/30", "fd00::/48"},
		{"8.8.8.0/24", "fd00::/48"},
		{"10.0.0.0/7", "fd00::/48"},
		{"127.0.0.0/8", "fd00::/48"},
		{"10.0.0.0/8", "2001:db8::/32"},
		{"10.0.0.0/8", "fd00::/120"},
		{"10.0.0.0/8", "::ffff:10.0.0.0/104"},
	} {
		prefixes := Prefixes{netip.MustParsePrefix(p[0]), netip.MustParsePrefix(p[1])}
		if err := prefixes.Validate(); err == nil {
			t.Errorf("%v is accepted", p)
		}
	}
	if err := (Prefixes{}).Validate(); err == nil {
		t.Error("zero prefixes are accepted")
	}
}

// drawPrefixes draws prefixes that Validate accepts.
func drawPrefixes(t *rapid.T) Prefixes {
	block4 := rapid.SampledFrom(allowed[:5]).Draw(t, "block4")
	bits4 := rapid.IntRange(block4.Bits(), 29).Draw(t, "bits4")
	bits6 := rapid.IntRange(8, 112).Draw(t, "bits6")
	p6, _ := netip.MustParseAddr("fd12:3456:789a:bcde:f012::").Prefix(bits6)
	p := Prefixes{V4: netip.PrefixFrom(block4.Addr(), bits4), V6: p6}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestProposeProperties fills random meshes: each proposed address is free, inside the prefix
// and not reserved, and Propose reports a full mesh only when no address is left.
func TestProposeProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPrefixes(t)
		taken := make(map[netip.Addr]bool)
		for range rapid.IntRange(1, 300).Draw(t, "peers") {
			var key PublicKey
			copy(key[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "key"))
			a, err := p.Propose(key, func(a netip.Addr) bool { return taken[a] })
			if errors.Is(err, ErrMeshFull) {
				checkFull(t, p.V4, len(taken)/2, p)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, addr := range a.List() {
				if err := p.Check(addr); err != nil || taken[addr] {
					t.Fatalf("proposed %v: already taken %v, check %v", addr, taken[addr], err)
				}
				taken[addr] = true
			}
			if derived, err := p.Derive(key); err == nil && !taken[derived[0]] && derived[0] != a[0] {
				t.Fatalf("%v is proposed, though the derived %v is free", a, derived)
			}
		}
	})
}

// checkFull checks that no usable address of a prefix is left, counting them one by one.
func checkFull(t *rapid.T, prefix netip.Prefix, taken int, p Prefixes) {
	usable := 0
	for a := prefix.Addr(); prefix.Contains(a); a = a.Next() {
		if p.Check(a) == nil {
			usable++
		}
	}
	if taken != usable {
		t.Fatalf("%v is reported as full with %d of %d addresses taken", prefix, taken, usable)
	}
}

// TestGenerateFreeUntilFull generates keys until a small mesh is full: each derives a free
// address, and the next attempt returns ErrMeshFull.
func TestGenerateFreeUntilFull(t *testing.T) {
	p := Prefixes{V4: netip.MustParsePrefix("192.168.7.0/28"), V6: DefaultPrefixes().V6}
	taken := make(map[netip.Addr]bool)
	random := testRandom(10)
	for range 14 { // 16 without the network and the broadcast address
		key, a, err := p.GenerateFree(random, func(a netip.Addr) bool { return taken[a] })
		if err != nil {
			t.Fatalf("after %d: %v", len(taken), err)
		}
		if derived, err := p.Derive(key.Public()); err != nil || derived != a || taken[a[0]] {
			t.Fatalf("key with %v, returned %v, taken %v, %v", derived, a, taken[a[0]], err)
		}
		taken[a[0]] = true
	}
	if _, _, err := p.GenerateFree(random, func(a netip.Addr) bool { return taken[a] }); !errors.Is(err, ErrMeshFull) {
		t.Errorf("a full mesh gives %v", err)
	}
}

// TestDeriveSpread counts collisions among the addresses of many keys: they must be as rare as
// with random addresses.
func TestDeriveSpread(t *testing.T) {
	p, random := DefaultPrefixes(), testRandom(11)
	seen := make(map[netip.Addr]int)
	const keys = 20_000
	reserved := 0
	for range keys {
		var key PublicKey
		_, _ = random.Read(key[:])
		a, err := p.Derive(key)
		if errors.Is(err, ErrReserved) {
			reserved++
			continue
		}
		seen[a[0]]++
		if seen[a[1]]++; seen[a[1]] > 1 {
			t.Errorf("two of %d keys have the IPv6 address %v", keys, a[1])
		}
	}
	// With 20,000 keys and 2^22 addresses 47.7 pairs are expected to collide. 2 of 256 addresses
	// are reserved.
	collisions := 2*(keys-reserved) - len(seen)
	if collisions < 15 || collisions > 100 {
		t.Errorf("%d collisions among %d keys, expected about 48", collisions, keys)
	}
	if reserved < 80 || reserved > 260 {
		t.Errorf("%d of %d keys refused, expected about 160", reserved, keys)
	}
}
