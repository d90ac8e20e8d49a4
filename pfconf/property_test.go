package pfconf

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestPrintedIsReadAsTheSame prints and parses random rulesets that are built from types,
// with names that no user would choose.
func TestPrintedIsReadAsTheSame(t *testing.T) {
	valid := 0
	rapid.Check(t, func(t *rapid.T) {
		rs := rulesets().Draw(t, "ruleset")
		if err := rs.Validate(); err != nil {
			return
		}
		valid += len(rs.Statements)
		text := rs.String()
		again, err := Parse(text)
		if err != nil {
			t.Fatalf("printed %q: %v", text, err)
		}
		if !reflect.DeepEqual(rs, again) {
			t.Fatalf("printed %q\nparsed as %q", text, again)
		}
	})
	t.Logf("%d valid statements", valid)
	if valid < 30 {
		t.Errorf("only %d statements were valid: the generator's rulesets are rarely valid", valid)
	}
}

// TestShownLoadsAsTheSame checks that pfctl's output, parsed, loads the same rules that
// it shows.
func TestShownLoadsAsTheSame(t *testing.T) {
	loaded := 0
	rapid.Check(t, func(t *rapid.T) {
		rs := &Ruleset{Statements: []Statement{plainRule().Draw(t, "rule")}}
		ld, err := rs.Expand("", testHost())
		if err != nil {
			return
		}
		loaded += len(ld.Filter) + len(ld.Nat) + len(ld.Rdr)
		rules, nat := ParseShown(join(ld.ShowRules())), ParseShown(join(ld.ShowNat()))
		if len(rules.Unknown)+len(nat.Unknown) > 0 {
			t.Fatalf("shown %s: not parsed: %v %v", show(ld), rules.Unknown, nat.Unknown)
		}
		again, err := rules.Ruleset(nat).Expand("", testHost())
		if err != nil {
			t.Fatalf("shown %s: %v", show(ld), err)
		}
		if show(again) != show(ld) {
			t.Fatalf("shown\n%s\nloads as\n%s", show(ld), show(again))
		}
	})
	t.Logf("%d rules", loaded)
	if loaded < 5 {
		t.Errorf("only %d rules were loaded: the generator's rulesets are rarely valid", loaded)
	}
}

// TestValidatedLoads checks that a valid ruleset loads. Rulesets with interface names as
// addresses are left out, because only those depend on the host.
func TestValidatedLoads(t *testing.T) {
	loaded := 0
	rapid.Check(t, func(t *rapid.T) {
		rs := rulesets().Draw(t, "ruleset")
		if rs.Validate() != nil || slices.Contains(kindsOf(rs), AddrInterface) {
			return
		}
		loaded += len(rs.Statements)
		if _, err := rs.Expand("", nil); err != nil {
			t.Fatalf("%s: %v", rs, err)
		}
	})
	t.Logf("%d statements", loaded)
	if loaded < 5 {
		t.Errorf("only %d statements were loaded: the generator's rulesets are rarely valid", loaded)
	}
}

// kindsOf returns the kinds of all addresses.
func kindsOf(rs *Ruleset) []AddressKind {
	var kinds []AddressKind
	note := func(addrs []Address) {
		for _, a := range addrs {
			kinds = append(kinds, a.Kind)
		}
	}
	for _, s := range rs.Statements {
		switch s := s.(type) {
		case *Table:
			note(s.Addrs)
		case *Rule:
			note(s.From.Addrs)
			note(s.To.Addrs)
			note(s.poolAddrs())
			if s.Body != nil {
				kinds = append(kinds, kindsOf(s.Body)...)
			}
		}
	}
	return kinds
}

func join(lines []string) string {
	var s string
	for _, l := range lines {
		s += l + "\n"
	}
	return s
}

func rulesets() *rapid.Generator[*Ruleset] {
	return rapid.Custom(func(t *rapid.T) *Ruleset {
		rs := &Ruleset{}
		for _, kind := range []*rapid.Generator[Statement]{macros(), tables(), natRules(), filterRules(), anchorRules()} {
			for _, s := range rapid.SliceOfN(kind, 0, 2).Draw(t, "statements") {
				if (&Ruleset{Statements: []Statement{s}}).Validate() == nil {
					rs.Statements = append(rs.Statements, s)
				}
			}
		}
		return rs
	})
}

// words are names, keywords and strings that need quotes.
func words(most int) *rapid.Generator[string] {
	return rapid.OneOf(
		rapid.SampledFrom([]string{"en0", "in", "all", "a b", "10", "-5", "x'y", `x"y`, "#", "$x", "é", `a\b`, "<t>", "tcp"}),
		rapid.StringMatching(`[a-z][a-z0-9_.-]{0,9}`),
	).Filter(func(s string) bool { return len(s) <= most })
}

func macros() *rapid.Generator[Statement] {
	return rapid.Custom(func(t *rapid.T) Statement {
		return &Macro{Name: words(20).Draw(t, "name"), Value: words(20).Draw(t, "value")}
	})
}

func tables() *rapid.Generator[Statement] {
	return rapid.Custom(func(t *rapid.T) Statement {
		addrs := some(t, "addrs", 3, addresses(AddrPrefix, AddrInterface))
		return &Table{Name: words(maxTable).Draw(t, "name"), Persist: flip(t), Const: flip(t), Addrs: addrs,
			HasAddrs: addrs != nil || flip(t)}
	})
}

func flip(t *rapid.T) bool { return rapid.Bool().Draw(t, "flip") }

// some draws up to n items; no items are nil.
func some[T any](t *rapid.T, label string, n int, g *rapid.Generator[T]) []T {
	if s := rapid.SliceOfN(g, 0, n).Draw(t, label); len(s) > 0 {
		return s
	}
	return nil
}

func prefixes() *rapid.Generator[netip.Prefix] {
	return rapid.Custom(func(t *rapid.T) netip.Prefix {
		b := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "ip")
		if flip(t) {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte(b)), rapid.IntRange(0, 32).Draw(t, "bits")).Masked()
		}
		return netip.PrefixFrom(netip.AddrFrom16([16]byte(b)), rapid.IntRange(0, 128).Draw(t, "bits")).Masked()
	})
}

func addresses(kinds ...AddressKind) *rapid.Generator[Address] {
	return rapid.Custom(func(t *rapid.T) Address {
		a := Address{Kind: rapid.SampledFrom(kinds).Draw(t, "kind"), Not: flip(t)}
		switch a.Kind {
		case AddrAny:
			a.Not = false
		case AddrPrefix:
			a.Prefix = prefixes().Draw(t, "prefix")
		case AddrRange:
			a.Prefix = hostPrefix(prefixes().Draw(t, "first").Addr())
			a.Last = a.Prefix.Addr().Next()
			if !a.Last.IsValid() {
				a.Last = a.Prefix.Addr()
			}
		case AddrTable:
			a.Name = words(maxTable).Draw(t, "table")
		case AddrInterface, AddrDynamic:
			a.Name = rapid.SampledFrom([]string{"en0", "en", "lo0", "self", "a b", "any"}).Draw(t, "interface")
			a.Mod = rapid.SampledFrom([]AddressModifier{0, ModNetwork, ModBroadcast, ModPeer, ModNoAlias, ModNetwork | ModNoAlias}).Draw(t, "mod")
			if flip(t) {
				bits := rapid.Uint8Range(0, 128).Draw(t, "bits")
				a.Bits = &bits
			}
		}
		return a
	})
}

func endpointsOf(t *rapid.T, ports bool) Endpoint {
	e := Endpoint{Addrs: some(t, "addrs", 2, addresses(AddrAny, AddrPrefix, AddrRange, AddrTable, AddrInterface, AddrDynamic, AddrNoRoute))}
	if ports {
		e.Ports = some(t, "ports", 2, portsToMatch())
	}
	return e
}

func portsToMatch() *rapid.Generator[Port] {
	return rapid.Custom(func(t *rapid.T) Port {
		p := Port{Op: CompareOp(rapid.IntRange(0, int(Outside)).Draw(t, "op")), Lo: rapid.Uint16().Draw(t, "lo")}
		if p.Op >= Range {
			p.Hi = rapid.Uint16().Draw(t, "hi")
		}
		return p
	})
}

func interfaceMatches() *rapid.Generator[InterfaceMatch] {
	return rapid.Custom(func(t *rapid.T) InterfaceMatch {
		return InterfaceMatch{Name: words(maxInterface).Draw(t, "interface"), Not: flip(t)}
	})
}

// common draws the fields that all rules have.
func common(t *rapid.T, r *Rule) {
	r.Interfaces = some(t, "interfaces", 2, interfaceMatches())
	r.Family = Family(rapid.IntRange(0, 2).Draw(t, "family"))
	r.Protos = some(t, "protos", 2, rapid.SampledFrom([]Proto{ProtoTCP, ProtoUDP, 47, 200}))
	ports := len(r.Protos) > 0 && r.Protos[0] < 47 && r.Protos[len(r.Protos)-1] < 47
	r.From, r.To = endpointsOf(t, ports), endpointsOf(t, ports)
}

func filterRules() *rapid.Generator[Statement] {
	return rapid.Custom(func(t *rapid.T) Statement {
		r := &Rule{Action: rapid.SampledFrom([]Action{Pass, Block}).Draw(t, "action"), Quick: flip(t)}
		r.Direction = Direction(rapid.IntRange(0, 2).Draw(t, "direction"))
		common(t, r)
		if r.Action == Block {
			r.Return = returns().Draw(t, "return")
		} else {
			statesOf(t, r)
		}
		filterOptionsOf(t, r)
		return r
	})
}

func returns() *rapid.Generator[Return] {
	return rapid.Custom(func(t *rapid.T) Return {
		r := Return{Kind: rapid.SampledFrom([]ReturnKind{ReturnDefault, ReturnDrop, ReturnAll, ReturnICMP}).Draw(t, "kind")}
		if r.Kind == ReturnICMP {
			r.Code, r.Code6 = bytesOf(t, "code"), bytesOf(t, "code6")
		}
		return r
	})
}

func bytesOf(t *rapid.T, label string) *uint8 {
	if flip(t) {
		return nil
	}
	b := rapid.Uint8Range(1, 20).Draw(t, label)
	return &b
}

func statesOf(t *rapid.T, r *Rule) {
	r.State = StateKind(rapid.IntRange(0, int(SynproxyState)).Draw(t, "state"))
	if r.State == StateDefault || r.State == NoState || flip(t) {
		return
	}
	number := func(label string) uint32 { return rapid.Uint32Range(0, 100).Draw(t, label) }
	r.StateOptions = StateOptions{Max: number("max"), NoSync: flip(t), MaxSrcStates: number("states"),
		SourceTrack: SourceTrack(rapid.IntRange(0, 3).Draw(t, "track")), Policy: StatePolicy(rapid.IntRange(0, 2).Draw(t, "policy"))}
	if flip(t) {
		r.StateOptions.MaxSrcConn = number("conn")
		r.StateOptions.MaxSrcConnRate = Rate{5, 7}
		r.StateOptions.Overload, r.StateOptions.Flush = words(maxTable).Draw(t, "overload"), FlushKind(rapid.IntRange(0, 2).Draw(t, "flush"))
	}
	if flip(t) {
		r.StateOptions.Timeouts = []Timeout{{"udp.first", number("first")}, {"tcp.closed", number("closed")}}
	}
}

func filterOptionsOf(t *rapid.T, r *Rule) {
	if flip(t) {
		r.Flags = rapid.SampledFrom([]*Flags{{}, {FlagSYN, FlagSYN | FlagACK}, {0, 0xff}}).Draw(t, "flags")
	}
	if flip(t) {
		r.Label, r.Tag = words(maxLabel).Draw(t, "label"), words(maxTag).Draw(t, "tag")
	}
	if flip(t) {
		r.Tagged, r.NotTagged = words(maxTag).Draw(t, "tagged"), flip(t)
	}
	if flip(t) {
		r.Users = some(t, "users", 2, rapid.SampledFrom([]IDMatch{{Lo: 5}, {Op: GreaterEqual, Lo: 500}, {Op: Outside, Lo: 1, Hi: 9},
			{Name: "root"}, {Name: "10"}, {Op: NotEqual, Unknown: true}}))
		r.Log = rapid.SampledFrom([]*Log{{}, {All: true, To: "pflog3"}, {User: true, To: "pflog0"}}).Draw(t, "log")
	}
	if flip(t) {
		r.TOS, r.RTable = bytesOf(t, "tos"), bytesOf(t, "rtable")
		r.Probability = rapid.SampledFrom([]float64{0, 1, 0.5, 1.0 / 3, minProbability}).Draw(t, "probability")
	}
	if r.Action == Pass && r.Direction != Both && flip(t) {
		ip := Address{Kind: AddrPrefix, Prefix: netip.MustParsePrefix("10.0.0.1/32")}
		r.Route = &Route{Kind: RouteKind(rapid.IntRange(0, 2).Draw(t, "route")), Hops: []Hop{{Interface: words(15).Draw(t, "hop"), Addr: &ip}}}
	}
}

func natRules() *rapid.Generator[Statement] {
	return rapid.Custom(func(t *rapid.T) Statement {
		r := &Rule{Action: rapid.SampledFrom([]Action{Nat, NoNat, Rdr, NoRdr}).Draw(t, "action")}
		common(t, r)
		if r.Action == NoNat || r.Action == NoRdr {
			return r
		}
		r.Pass = flip(t)
		r.Pool = &Pool{Addrs: []Address{addresses(AddrPrefix, AddrDynamic, AddrTable).Draw(t, "target")}}
		r.Pool.Addrs[0].Not = false
		r.Pool.Kind = PoolKind(rapid.IntRange(0, int(RoundRobin)).Draw(t, "pool"))
		r.Pool.Sticky = flip(t)
		if flip(t) && len(r.From.Ports)+len(r.To.Ports) > 0 {
			r.Pool.PortLo = rapid.Uint16().Draw(t, "port")
		}
		if r.Pool.Kind == SourceHash && flip(t) {
			r.Pool.Key = words(30).Draw(t, "key")
		}
		return r
	})
}

func anchorRules() *rapid.Generator[Statement] {
	return rapid.Custom(func(t *rapid.T) Statement {
		r := &Rule{Action: Anchor, Anchor: rapid.SampledFrom([]string{"a", "com.apple/*", "/x y", "in"}).Draw(t, "name"), Quick: flip(t)}
		common(t, r)
		if flip(t) {
			r.Body = &Ruleset{Statements: some(t, "body", 2, filterRules())}
		}
		return r
	})
}

// plainRule draws a rule whose names need no quotes, since pfctl doesn't print quotes.
func plainRule() *rapid.Generator[*Rule] {
	return rapid.Custom(func(t *rapid.T) *Rule {
		r := rapid.OneOf(filterRules(), natRules()).Draw(t, "rule").(*Rule)
		r.Label, r.Tag, r.Tagged, r.NotTagged, r.Interfaces, r.Users = "label", "T", "", false, nil, nil
		r.StateOptions.Overload, r.StateOptions.Flush = "", NoFlush
		if r.Action != Pass && r.Action != Block {
			r.Label = ""
		}
		if r.Pool != nil {
			r.Pool.Key = ""
		}
		if r.Route != nil {
			r.Route.Hops[0].Interface = "en0"
		}
		if r.Return.Code6 == nil {
			r.Return.Code = nil
		}
		for _, addrs := range [][]Address{r.From.Addrs, r.To.Addrs, r.poolAddrs()} {
			for i := range addrs {
				if addrs[i].Name != "" {
					addrs[i].Name = "en0"
				}
				// pfctl itself changes a prefix length that is too long for IPv4 when it
				// reads its own output.
				if b := addrs[i].Bits; b != nil && *b > 32 {
					addrs[i].Bits = nil
				}
			}
		}
		return r
	})
}
