package pfconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/pfconf/internal/vectors"
)

func TestEqualShown(t *testing.T) {
	for _, c := range []struct{ want, shown string }{
		{"", ""},
		{"pass", "pass all flags S/SA keep state"},
		{"pass from any to any", "pass all flags S/SA keep state"},
		{"block in quick on utun4", "@12 block drop in quick on utun4 all\n  [ Evaluations: 2         Packets: 1         Bytes: 60          States: 0     ]"},
		{"pass in proto { tcp, udp } to port { 22, 53 } no state",
			"pass in proto tcp from any to any port = ssh no state\npass in proto tcp from any to any port = domain no state\n" +
				"pass in proto udp from any to any port = 22 no state\npass in proto udp from any to any port = 53 no state"},
		{"pass in inet6 proto icmp6 from 2001:DB8:0::/32 no state", "pass in inet6 proto 58 from 2001:db8::/32 to any no state"},
		{"pass out on en0 from 10/8 to any keep state (if-bound) label \"x\" tag T",
			"pass out on en0 inet from 10.0.0.0/8 to any flags S/SA tag T keep state (if-bound) label \"x\""},
		{"pass to ! 0.0.0.0/0", "pass inet from any to ! any flags S/SA keep state"},
		{"nat on en0 inet from 10/8 to any -> (en0)", "nat on en0 inet from 10.0.0.0/8 to any -> (en0) round-robin"},
		{"nat on en0 inet from 10/8 to any -> (en0) round-robin", "nat on en0 inet from 10.0.0.0/8 to any -> (en0) extfilter ei"},
		{"nat on en0 inet from 10/8 to any -> 192.0.2.1 source-hash",
			"nat on en0 inet from 10.0.0.0/8 to any -> 192.0.2.1 source-hash 0x0123456789abcdef0123456789abcdef"},
		{"nat on en0 inet from 10/8 to any -> 192.0.2.1 source-hash", "nat on en0 inet from 10.0.0.0/8 to any -> 192.0.2.1 source-hash extfilter ei"},
		{"scrub in", "scrub in all fragment reassemble"},
		{"scrub-anchor \"com.apple/*\"\nanchor \"../x\"", "scrub-anchor \"com.apple/*\" all fragment reassemble\nanchor \"../x\" all"},
		{"anchor {\npass\n}", "anchor all {\n  pass all flags S/SA keep state\n}"},
		{"pass quick route-to utun4 out", "pass quick route-to utun4 out"}, // can't be parsed, but the text is the same
	} {
		if err := EqualShown(strings.Split(c.want, "\n"), c.shown); err != nil {
			t.Errorf("%q: %v", c.want, err)
		}
	}
	names := Names{Service: func(name string) (uint16, bool) { return 51820, name == "wireguard" }}
	if err := names.EqualShown([]string{"pass proto udp to port 51820"}, "pass proto udp from any to any port = wireguard keep state"); err != nil {
		t.Error(err)
	}
}

func TestEqualShownNamesTheDifference(t *testing.T) {
	for _, c := range []struct{ want, shown, message string }{
		{"pass all\nblock all", "pass all flags S/SA keep state", "1 rules instead of 2: `block drop all` is missing"},
		{"pass all", "pass all flags S/SA keep state\nblock drop all", "2 rules instead of 1: `block drop all` is too many"},
		{"", "block drop all", "1 rules instead of 0: `block drop all` is too many"},
		{"pass all\nblock all", "block drop all\npass all", "rule 0 is `block drop all` instead of `pass all flags S/SA keep state`"},
		{"pass all", "pass inet all flags S/SA keep state", "rule 0 is `pass inet all"},
		{"pass all", "pass all flags any keep state", "rule 0 is `pass all flags any"},
		{"pass all", "pass all flags S/SA keep state (if-bound)", "rule 0 is"},
		{"block all", "block return all", "rule 0 is"},
		{"nat on en0 inet all -> (en0)", "nat on en0 inet all -> (en0) extfilter apd", "rule 0 is"},
		{"nat on en0 inet all -> (en0) extfilter apd", "nat on en0 inet all -> (en0) extfilter ei", "rule 0 is"},
		{"nat on en0 inet all -> (en0)", "nat pass on en0 inet all -> (en0)", "rule 0 is"},
		{"nat on en0 inet all -> (en0)", "nat on en0 inet all -> (en0) port 1024:65535", "rule 0 is"},
		{"nat on en0 inet all -> (en0)", "nat on en0 inet all -> (en0) static-port", "rule 0 is"},
		{"pass all", "pass all wonderfully", "rule 0 is `pass all wonderfully` instead"},
		{"pass all", "pass all\npfctl: DIOCGETRULES: Invalid argument", "the shown line 2 can't be read"},
		{"anchor \"x\" all", "anchor all {\n  pass in wonderful\n}", "the shown line 2 can't be read"},
		{"pass label \"a\"", "pass all flags S/SA keep state label \"b\"", "rule 0 is"},
	} {
		err := EqualShown(strings.Split(c.want, "\n"), c.shown)
		if err == nil || !strings.Contains(err.Error(), c.message) {
			t.Errorf("%q and %q: %v", c.want, c.shown, err)
		}
	}
}

// TestEqualShownOfVectors compares the written rules of each vector with pfctl's output
// for them.
func TestEqualShownOfVectors(t *testing.T) {
	n := 0
	vectors.Each(t, "pfsim/testdata/vectors-parse.jsonl.gz", func(s *vectors.Scenario) {
		var host []Interface
		for _, i := range s.Interfaces {
			host = append(host, Interface{Name: i.Name, Addresses: i.Addresses})
		}
		ld, err := loadText(*s.Text, s.Anchor, host)
		var want vectors.ParseWant
		mustUnmarshal(t, s.Want, &want)
		if err != nil || want.Canonical == nil {
			return
		}
		n++
		for _, c := range []struct{ want, shown []string }{
			{ld.ShowRules(), want.Canonical.Rules}, {ld.ShowNat(), want.Canonical.Nat},
		} {
			text := strings.Join(c.shown, "\n")
			if err := EqualShown(c.want, text); err != nil {
				t.Errorf("%s: %v", s.Name, err)
			}
			if err := EqualShown(c.want, text+"\nblock drop in quick on en77 all"); err == nil {
				t.Errorf("%s: an additional rule isn't noticed", s.Name)
			}
			if i := len(c.want) - 1; i >= 0 && !strings.HasSuffix(c.want[i], "}") {
				if err := EqualShown(c.want[:i], text); err == nil {
					t.Errorf("%s: a missing rule isn't noticed", s.Name)
				}
			}
		}
	})
	t.Logf("%d rulesets", n)
	if n < 100 {
		t.Errorf("only %d rulesets", n)
	}
}

// TestStoredEntriesOfVectors compares the tables of each vector with pfctl's output for
// them.
func TestStoredEntriesOfVectors(t *testing.T) {
	n := 0
	for _, file := range vectors.Files(t, "pfsim/testdata") {
		vectors.Each(t, file, func(s *vectors.Scenario) {
			for _, raw := range s.Events {
				var e struct {
					Event, Op string
					Addresses []string
					Want      json.RawMessage
				}
				mustUnmarshal(t, raw, &e)
				if e.Event != "table" || e.Op != "replace" {
					continue
				}
				var want struct {
					RC        int       `json:"rc"`
					Addresses *[]string `json:"addresses"`
				}
				mustUnmarshal(t, e.Want, &want)
				if want.RC != 0 || want.Addresses == nil {
					continue
				}
				n++
				addrs, err := ParseTableEntries(strings.Join(e.Addresses, "\n"))
				if err != nil {
					t.Fatal(err)
				}
				if got, err := StoredEntries(addrs); err != nil || !slices.Equal(got, *want.Addresses) {
					t.Errorf("%s: %q are stored as %q, want %q, %v", s.Name, e.Addresses, got, *want.Addresses, err)
				}
			}
		})
	}
	t.Logf("%d tables", n)
	if n < 10 {
		t.Errorf("only %d tables", n)
	}
}

func TestStoredEntries(t *testing.T) {
	addr := func(s string) Address {
		text, not := strings.CutPrefix(s, "!")
		p, err := netip.ParsePrefix(text)
		if err != nil {
			t.Fatal(err)
		}
		return Address{Kind: AddrPrefix, Prefix: p, Not: not}
	}
	for _, c := range []struct{ written, want string }{
		{"", ""},
		{"0.0.0.0/32 ::/128 !0.0.0.0/32 !::/128", ""},
		{"0.0.0.0/31 ::/127 0.0.0.0/0 !::/0", "!::/0 0.0.0.0/0 0.0.0.0/31 ::/127"},
		{"10.1.2.3/8 10.0.0.0/8 !10.0.0.0/8", "10.0.0.0/8"},
		{"!10.0.0.0/8 10.0.0.0/8 10.0.0.0/9", "!10.0.0.0/8 10.0.0.0/9"},
		{"192.0.2.1/32 2001:db8::1/128", "192.0.2.1 2001:db8::1"},
		{"::ffff:1.2.3.4/128 1.2.3.4/32 ::ffff:0.0.0.0/96", "1.2.3.4 ::ffff:0.0.0.0/96 ::ffff:1.2.3.4"},
		{"::10.0.0.1/128", "::10.0.0.1"},
	} {
		var addrs []Address
		for _, s := range strings.Fields(c.written) {
			addrs = append(addrs, addr(s))
		}
		got, err := StoredEntries(addrs)
		if err != nil || !slices.Equal(got, strings.Fields(c.want)) {
			t.Errorf("%s: got %q, %v", c.written, got, err)
		}
		// The text parsers have already masked the addresses.
		for i, a := range addrs {
			addrs[i].Prefix = a.Prefix.Masked()
		}
		table := &Table{Name: "t", Addrs: addrs, HasAddrs: true, Persist: true}
		if !slices.Equal(table.Entries(), got) {
			t.Errorf("%s: the table has %q", c.written, table.Entries())
		}
	}
	if _, err := StoredEntries([]Address{{Kind: AddrInterface, Name: "self"}}); err == nil {
		t.Error("self has addresses")
	}
}

// TestEqualShownTellsRulesApart compares random rules with pfctl's output for them, and
// with the output after a change to one field of one rule.
func TestEqualShownTellsRulesApart(t *testing.T) {
	equal, changed := 0, map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		rs := &Ruleset{}
		for _, r := range rapid.SliceOfN(plainRule(), 1, 4).Draw(t, "rules") {
			rs.Statements = append(rs.Statements, r)
		}
		slices.SortStableFunc(rs.Statements, func(a, b Statement) int {
			return int(ruleStages[a.(*Rule).Action]) - int(ruleStages[b.(*Rule).Action])
		})
		ld, err := rs.Expand("", testHost())
		if err != nil {
			return
		}
		equal++
		for _, lines := range [][]string{ld.ShowRules(), ld.ShowNat()} {
			if err := EqualShown(lines, disguise(t, lines)); err != nil {
				t.Fatal(err)
			}
		}
		loaded := slices.Concat(ld.Nat, ld.Rdr, ld.Filter)
		if len(loaded) == 0 {
			return
		}
		i := rapid.IntRange(0, len(loaded)-1).Draw(t, "changed rule")
		for name := range mutations {
			if mutate(t, name, loaded[i]) {
				changed[name]++
			}
		}
	})
	t.Logf("%d rulesets, changes %v", equal, changed)
}

// TestEqualShownTellsEachChange makes each kind of change to one of a few rules.
func TestEqualShownTellsEachChange(t *testing.T) {
	ld, err := loadText(`nat on en0 inet proto tcp from 10.0.0.0/8 port 7 to any port 80:90 -> 192.0.2.1
block return in log quick on en0 inet proto tcp from 10.0.0.1 port 7 to <t> port 22 flags S/SA label "l" tag T
pass out
`, "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	for name := range mutations {
		changed := 0
		for _, r := range slices.Concat(ld.Nat, ld.Filter) {
			if mutate(t, name, r) {
				changed++
			}
		}
		if changed == 0 {
			t.Errorf("no rule allows the change %s", name)
		}
	}
}

// mutate makes one change to a copy of a rule, fails if EqualShown doesn't notice it, and
// reports whether the change was possible.
func mutate(t interface{ Fatalf(string, ...any) }, name string, r *Rule) bool {
	one := *r
	if !mutations[name](&one) {
		return false
	}
	before, after := shown(r, ""), shown(&one, "")
	if len(ParseShown(after).Unknown) > 0 {
		return false // pf has no such rule
	}
	if err := EqualShown([]string{before}, after); err == nil {
		t.Fatalf("%s: `%s` counts as equal to `%s`", name, after, before)
	}
	return true
}

// disguise returns rules in the form of -vv, with all in place of any and vice versa.
func disguise(t *rapid.T, lines []string) string {
	var b strings.Builder
	for i, line := range lines {
		if flip(t) && !strings.Contains(line, "<") && !strings.Contains(line, "(en0") {
			fmt.Fprintf(&b, "@%d ", i)
		}
		if flip(t) {
			line = strings.Replace(line, " all ", " from any to any ", 1)
		}
		b.WriteString(line + "\n")
		if flip(t) {
			fmt.Fprintf(&b, "  [ Evaluations: %-8d  Packets: %-8d  Bytes: %-10d  States: %-6d]\n", i, i, i, i)
		}
	}
	return b.String()
}

// mutations change one field of a rule and report whether the change was possible.
var mutations = map[string]func(*Rule) bool{
	"action": func(r *Rule) bool {
		other := map[Action]Action{Nat: Rdr, Rdr: Nat, NoNat: NoRdr, NoRdr: NoNat}
		if r.Action == Pass || r.Action == Block {
			return false
		}
		r.Action = other[r.Action]
		return true
	},
	"direction": func(r *Rule) bool {
		r.Direction = map[Direction]Direction{Both: In, In: Out, Out: In}[r.Direction]
		return r.Action == Pass || r.Action == Block
	},
	"quick": func(r *Rule) bool { r.Quick = !r.Quick; return r.Action == Pass || r.Action == Block },
	"nat pass": func(r *Rule) bool {
		r.Pass = !r.Pass
		return r.Action == Nat || r.Action == Rdr
	},
	"interface": func(r *Rule) bool {
		if len(r.Interfaces) == 0 {
			r.Interfaces = []InterfaceMatch{{Name: "en5"}}
		} else {
			r.Interfaces = []InterfaceMatch{{Name: r.Interfaces[0].Name, Not: !r.Interfaces[0].Not}}
		}
		return true
	},
	"family": func(r *Rule) bool {
		if r.Family != AnyFamily {
			return false // the addresses also determine it
		}
		r.Family = Inet6
		return true
	},
	"protocol": func(r *Rule) bool {
		r.Protos = map[bool][]Proto{true: {ProtoUDP}, false: {ProtoTCP}}[len(r.Protos) > 0 && r.Protos[0] == ProtoTCP]
		return true
	},
	"source": func(r *Rule) bool {
		return mutateAddrs(&r.From)
	},
	"destination": func(r *Rule) bool {
		return mutateAddrs(&r.To)
	},
	"source port":      func(r *Rule) bool { return mutatePorts(&r.From) },
	"destination port": func(r *Rule) bool { return mutatePorts(&r.To) },
	"label": func(r *Rule) bool {
		r.Label += "x"
		return r.Action == Pass || r.Action == Block
	},
	"tag":    func(r *Rule) bool { r.Tag += "x"; return true },
	"tagged": func(r *Rule) bool { r.Tagged += "x"; return true },
	"log": func(r *Rule) bool {
		if r.Log != nil {
			r.Log = nil
		} else {
			r.Log = &Log{}
		}
		return true
	},
	"state": func(r *Rule) bool {
		if r.Action != Pass || r.State == NoState {
			return false
		}
		r.State, r.StateOptions, r.Flags = NoState, StateOptions{}, nil
		return true
	},
	"state limit": func(r *Rule) bool {
		if r.Action != Pass || r.State == NoState {
			return false
		}
		r.StateOptions.Max++
		return true
	},
	"state policy": func(r *Rule) bool {
		if r.Action != Pass || r.State == NoState {
			return false
		}
		r.StateOptions.Policy = map[StatePolicy]StatePolicy{IfBound: Floating, Floating: IfBound}[r.StateOptions.Policy]
		return true
	},
	"timeout": func(r *Rule) bool {
		if r.Action != Pass || r.State == NoState {
			return false
		}
		r.StateOptions.Timeouts = append(slices.Clone(r.StateOptions.Timeouts), Timeout{"udp.multiple", 77})
		return true
	},
	"flags": func(r *Rule) bool {
		if r.Flags == nil || r.Flags.Mask == 0 || r.proto() != 0 && r.proto() != ProtoTCP {
			return false
		}
		r.Flags = &Flags{Set: r.Flags.Set ^ FlagSYN, Mask: r.Flags.Mask | FlagSYN}
		return true
	},
	"answer": func(r *Rule) bool {
		if r.Action != Block {
			return false
		}
		r.Return = Return{Kind: map[ReturnKind]ReturnKind{ReturnAll: ReturnDrop}[r.Return.Kind]}
		if r.Return.Kind == ReturnDefault {
			r.Return.Kind = ReturnAll
		}
		return true
	},
	"routing table": func(r *Rule) bool {
		n := uint8(1)
		if r.RTable != nil {
			n += *r.RTable
		}
		r.RTable = &n
		return r.Action == Pass || r.Action == Block
	},
	"allow-opts": func(r *Rule) bool { r.AllowOpts = !r.AllowOpts; return r.Action == Pass },
	"pool port": func(r *Rule) bool {
		if r.Pool == nil || len(r.Pool.Addrs) == 0 {
			return false
		}
		pool := *r.Pool
		pool.PortLo, pool.PortHi = pool.PortLo+1, 0
		r.Pool = &pool
		return r.Pool.PortLo != 0
	},
	"pool address": func(r *Rule) bool {
		if r.Pool == nil || len(r.Pool.Addrs) == 0 || r.Pool.Addrs[0].Kind != AddrPrefix {
			return false
		}
		pool := *r.Pool
		p := pool.Addrs[0].Prefix
		next := lastAddr(p).Next()
		if !next.IsValid() {
			return false
		}
		pool.Addrs = []Address{{Kind: AddrPrefix, Prefix: netip.PrefixFrom(next, p.Bits())}}
		r.Pool = &pool
		return true
	},
	"sticky": func(r *Rule) bool {
		if r.Pool == nil || len(r.Pool.Addrs) == 0 {
			return false
		}
		pool := *r.Pool
		pool.Sticky = !pool.Sticky
		r.Pool = &pool
		return true
	},
	"extfilter": func(r *Rule) bool {
		if r.Pool == nil || len(r.Pool.Addrs) == 0 {
			return false
		}
		pool := *r.Pool
		pool.ExtFilter = "ad"
		r.Pool = &pool
		return true
	},
}

// lastAddr returns the highest address of a network.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// mutateAddrs negates an address or adds one.
func mutateAddrs(e *Endpoint) bool {
	if len(e.Addrs) == 0 {
		e.Addrs = []Address{{Kind: AddrTable, Name: "mutant"}}
		return true
	}
	a := e.Addrs[0]
	a.Not = !a.Not
	e.Addrs = []Address{a}
	return true
}

func mutatePorts(e *Endpoint) bool {
	if len(e.Ports) == 0 {
		return false
	}
	p := e.Ports[0]
	if p.Op >= Range {
		p.Hi ^= 1
	} else {
		p.Lo ^= 1
	}
	e.Ports = []Port{p}
	return true
}

// FuzzEqualShown checks that any output is equal to itself, and that comparing is
// symmetric and never panics.
func FuzzEqualShown(f *testing.F) {
	for _, s := range append(seeds, shownSamples...) {
		f.Add(s, s)
		f.Add("pass all", s)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		lines := strings.Split(a, "\n")
		s := ParseShown(a)
		_, elsewhere := s.unreadElsewhere()
		if err := EqualShown(lines, a); err != nil && !elsewhere && !strings.Contains(err.Error(), "can't be read") &&
			!strings.Contains(err.Error(), "more than") {
			t.Fatal(err)
		}
		ab, ba := EqualShown(lines, b), EqualShown(strings.Split(b, "\n"), a)
		if (ab == nil) != (ba == nil) && !strings.Contains(a+b, "ext") && !strings.Contains(a+b, "source-hash") {
			t.Fatalf("%q and %q: %v, but in reverse order %v", a, b, ab, ba)
		}
	})
}

func loadText(text, anchor string, ifs []Interface) (*Loaded, error) {
	rs, err := Parse(text)
	if err != nil {
		return nil, err
	}
	return rs.Expand(anchor, ifs)
}

func mustUnmarshal(t *testing.T, raw []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(raw, v); err != nil {
		t.Fatal(err)
	}
}
