package pfsim

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/pfconf"
)

// TestTablesHoldWhatIsStored checks that a table has the entries of
// [pfconf.StoredEntries], in whichever way they are added.
func TestTablesHoldWhatIsStored(t *testing.T) {
	for _, written := range []string{
		"",
		"0.0.0.0/32 ::/128 !0.0.0.0/32 !::/128",
		"0.0.0.0/31 ::/127 0.0.0.0/0 !::/0",
		"10.1.2.3/8 10.0.0.0/8 !10.0.0.0/8",
		"!10.0.0.0/8 10.0.0.0/8 10.0.0.0/9",
		"192.0.2.1/32 2001:db8::1/128",
		"::ffff:1.2.3.4/128 1.2.3.4/32 ::ffff:0.0.0.0/96",
		"::10.0.0.1/128",
	} {
		var addrs []pfconf.Address
		for _, s := range strings.Fields(written) {
			text, not := strings.CutPrefix(s, "!")
			addrs = append(addrs, pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix(text).Masked(), Not: not})
		}
		want, err := pfconf.StoredEntries(addrs)
		if err != nil {
			t.Fatal(err)
		}
		m := NewPF(Options{})
		table := &pfconf.Table{Name: "t", Addrs: addrs, HasAddrs: true, Persist: true}
		if err := m.LoadAnchor("a", &pfconf.Ruleset{Statements: []pfconf.Statement{table}}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.AddToTable("a", "added", addrs); err != nil {
			t.Fatal(err)
		}
		if err := m.ReplaceTable("a", "replaced", addrs); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"t", "added", "replaced"} {
			if table, err := m.Table("a", name); err != nil || !slices.Equal(table.Entries(), want) {
				t.Errorf("%s: table %s is %v, %v", written, name, table, err)
			}
		}
	}
}

// TestTableReadBack writes a table, loads it, shows it and parses the output.
func TestTableReadBack(t *testing.T) {
	entry := rapid.Custom(func(t *rapid.T) pfconf.Address {
		return pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: prefixes().Draw(t, "prefix"), Not: rapid.Bool().Draw(t, "not")}
	})
	odd := rapid.SampledFrom([]pfconf.Address{
		{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("0.0.0.0/32")}, {Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("::/128"), Not: true},
		{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("::/127")}, {Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("::ffff:9.9.9.9/128")},
	})
	rapid.Check(t, func(t *rapid.T) {
		addrs := rapid.SliceOfN(rapid.OneOf(entry, odd), 0, 6).Draw(t, "addrs")
		want := &pfconf.Table{Name: "t", Persist: true, Addrs: addrs, HasAddrs: true}
		rs := &pfconf.Ruleset{Statements: []pfconf.Statement{want}}
		again, err := pfconf.Parse(rs.String())
		if err != nil {
			t.Fatal(err)
		}
		m := NewPF(Options{})
		if err := m.LoadAnchor("a", again); err != nil {
			t.Fatal(err)
		}
		held, err := m.Table("a", "t")
		if err != nil {
			t.Fatal(err)
		}
		got, err := pfconf.ParseTableEntries("   " + strings.Join(held.Entries(), "\n   "))
		if err != nil {
			t.Fatal(err)
		}
		if got := (&pfconf.Table{Addrs: got}).Entries(); !reflect.DeepEqual(got, want.Entries()) {
			t.Fatalf("%s is read back as %q, want %q", want, got, want.Entries())
		}
	})
}

// prefixes draws any prefixes.
func prefixes() *rapid.Generator[netip.Prefix] {
	return rapid.Custom(func(t *rapid.T) netip.Prefix {
		b := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "ip")
		if rapid.Bool().Draw(t, "flip") {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte(b)), rapid.IntRange(0, 32).Draw(t, "bits")).Masked()
		}
		return netip.PrefixFrom(netip.AddrFrom16([16]byte(b)), rapid.IntRange(0, 128).Draw(t, "bits")).Masked()
	})
}
