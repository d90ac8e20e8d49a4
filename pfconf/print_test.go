package pfconf

import (
	"net/netip"
	"testing"
)

// TestStrings pins the text of each statement and field, built from types.
func TestStrings(t *testing.T) {
	num := func(n uint8) *uint8 { return &n }
	prefix := func(s string) Address { return Address{Kind: AddrPrefix, Prefix: netip.MustParsePrefix(s)} }
	from := func(a ...Address) Endpoint { return Endpoint{Addrs: a} }
	for _, tt := range []struct {
		s    Statement
		want string
	}{
		{&Rule{}, "pass all"},
		{&Rule{Action: Block}, "block all"},
		{&Rule{Action: Block, Return: Return{Kind: ReturnAll}, Direction: Out, Quick: true}, "block return out quick all"},
		{&Rule{Action: Block, Return: Return{Kind: ReturnRST, TTL: 5}, Protos: []Proto{ProtoTCP}}, "block return-rst(ttl 5) proto tcp all"},
		{&Rule{Action: Block, Return: Return{Kind: ReturnICMP}}, "block return-icmp all"},
		{&Rule{Action: Block, Return: Return{Kind: ReturnICMP, Code: num(13)}}, "block return-icmp(filter-prohib) all"},
		{&Rule{Action: Block, Return: Return{Kind: ReturnICMP, Code6: num(77)}}, "block return-icmp6(77) all"},
		{&Rule{Action: Block, Return: Return{Kind: ReturnICMP, Code: num(1), Code6: num(1)}}, "block return-icmp(host-unr, admin-unr) all"},
		{&Rule{Log: &Log{}}, "pass log all"},
		{&Rule{Log: &Log{All: true, User: true, To: "pflog0"}}, "pass log (all, user, to pflog0) all"},
		{&Rule{Interfaces: []InterfaceMatch{{Name: "en0"}}}, "pass on en0 all"},
		{&Rule{Interfaces: []InterfaceMatch{{Name: "en0", Not: true}, {Name: "in"}}}, `pass on { ! en0, "in" } all`},
		{&Rule{Family: Inet6, Protos: []Proto{1, 200}}, "pass inet6 proto { icmp, 200 } all"},
		{&Rule{From: from(prefix("10.0.0.0/8"))}, "pass from 10.0.0.0/8 to any"},
		{&Rule{To: from(prefix("0.0.0.0/0"), prefix("::/0"))}, "pass from any to { 0.0.0.0/0, ::/0 }"},
		{&Rule{To: from(prefix("::a00:1/128"), prefix("::1/128"))}, "pass from any to { ::10.0.0.1, ::1 }"},
		{&Rule{To: from(Address{Kind: AddrPrefix, Prefix: netip.MustParsePrefix("fe80::/64"), Zone: "en0"})}, "pass from any to fe80::%en0/64"},
		{&Rule{To: from(Address{Kind: AddrTable, Name: "a b", Not: true})}, `pass from any to ! <"a b">`},
		{&Rule{To: from(Address{Kind: AddrDynamic, Name: "en0", Mod: ModNetwork | ModNoAlias, Bits: num(24)})}, "pass from any to (en0:network:0)/24"},
		{&Rule{To: from(Address{Kind: AddrInterface, Name: "self", Mod: ModPeer})}, "pass from any to self:peer"},
		{&Rule{To: from(Address{Kind: AddrNoRoute})}, "pass from any to no-route"},
		{&Rule{OS: []string{"Linux", "in"}}, `pass from any os { "Linux", "in" } to any`},
		{&Rule{To: Endpoint{Ports: []Port{{Lo: 1}, {Op: NotEqual, Lo: 2}, {Op: LessEqual, Lo: 3}, {Op: Range, Lo: 4, Hi: 5}, {Op: Inside, Lo: 6, Hi: 7}}}},
			"pass from any to any port { 1, != 2, <= 3, 4:5, 6 >< 7 }"},
		{&Rule{Users: []IDMatch{{Lo: 5}}, Groups: []IDMatch{{Op: NotEqual, Unknown: true}, {Name: "9"}}}, `pass all user 5 group { != unknown, "9" }`},
		{&Rule{Flags: &Flags{}}, "pass all flags any"},
		{&Rule{Flags: &Flags{Mask: FlagSYN | FlagCWR}}, "pass all flags /SW"},
		{&Rule{ICMP: []ICMPMatch{{Type: 3, Code: num(4)}, {Type: 99}}}, "pass all icmp-type { unreach code needfrag, 99 }"},
		{&Rule{ICMP: []ICMPMatch{{V6: true, Type: 130}}, TOS: num(8)}, "pass all icmp6-type groupqry tos 0x08"},
		{&Rule{State: NoState}, "pass all no state"},
		{&Rule{State: KeepState, StateOptions: StateOptions{Max: 1, NoSync: true, SourceTrack: SourceTrackPlain, MaxSrcStates: 2,
			MaxSrcConn: 3, MaxSrcConnRate: Rate{4, 5}, MaxSrcNodes: 6, Overload: "b", Flush: FlushGlobal, Policy: Floating,
			Timeouts: []Timeout{{"udp.first", 7}}}},
			"pass all keep state (max 1, no-sync, source-track, max-src-states 2, max-src-conn 3, max-src-conn-rate 4/5, " +
				"max-src-nodes 6, overload <b> flush global, floating, udp.first 7)"},
		{&Rule{State: SynproxyState, Fragment: true, AllowOpts: true, Probability: 0.25}, "pass all synproxy state probability 0.25 fragment allow-opts"},
		{&Rule{Label: `a "b"`, Queue: "q", PriQueue: "p", Tag: "T", Tagged: "in", NotTagged: true, RTable: num(0)},
			`pass all label 'a "b"' queue (q, p) tag T ! tagged "in" rtable 0`},
		{&Rule{Direction: In, Route: &Route{Kind: DupTo, Hops: []Hop{{Interface: "en0"}, {Interface: "en1", Addr: &Address{Kind: AddrTable, Name: "t"}}},
			PoolOptions: PoolOptions{Kind: RoundRobin, Sticky: true}}}, "pass in dup-to { en0, (en1 <t>) } round-robin sticky-address all"},
		{&Rule{Direction: In, Route: &Route{Kind: Fastroute}}, "pass in fastroute all"},
		{&Rule{Action: Scrub, Normalize: Normalize{NoDF: true, RandomID: true, MinTTL: 1, MaxMSS: 2, SetTOS: num(4), Fragment: FragmentDropOvl, ReassembleTCP: true}},
			"scrub all no-df random-id min-ttl 1 max-mss 2 set-tos 0x04 reassemble tcp fragment drop-ovl"},
		{&Rule{Action: NoScrub, Direction: In}, "no scrub in all"},
		{&Rule{Action: Nat, Pass: true, Tag: "T", Pool: &Pool{Addrs: []Address{prefix("10.0.0.1/32"), prefix("10.0.1.0/24")}, PortLo: 1, PortHi: 2,
			PoolOptions: PoolOptions{Kind: SourceHash, Key: "k y", StaticPort: true, ExtFilter: "ei", ExtMap: "ad"}}},
			`nat pass all tag T -> { 10.0.0.1, 10.0.1.0/24 } port 1:2 source-hash "k y" static-port extfilter ei extmap ad`},
		{&Rule{Action: NoNat, Pool: &Pool{PoolOptions: PoolOptions{Kind: Random}}}, "no nat all random"},
		{&Rule{Action: Rdr, Pool: &Pool{Addrs: []Address{prefix("10.0.0.1/32")}, PortLo: 80, PortStar: true}}, "rdr all -> 10.0.0.1 port 80:*"},
		{&Rule{Action: Binat, From: from(prefix("10.0.0.1/32")), Pool: &Pool{Addrs: []Address{prefix("10.0.0.2/32")}}}, "binat from 10.0.0.1 to any -> 10.0.0.2"},
		{&Rule{Action: ScrubAnchor, Anchor: "a/*"}, `scrub-anchor "a/*" all`},
		{&Rule{Action: Anchor, Anchor: "a", Body: &Ruleset{Statements: []Statement{&Rule{}}}}, "anchor \"a\" all {\n    pass all\n}"},
		{&Macro{Name: "in", Value: "a"}, `"in" = "a"`},
		{&Option{Name: "skip", Values: []string{"lo0", "in"}}, `set skip on { lo0, "in" }`},
		{&Option{Name: "loginterface", Values: []string{"none"}}, "set loginterface none"},
		{&Option{Name: "timeout", Values: []string{"a b 5"}}, `set timeout "a b" 5`},
		{&Table{Name: "t", Persist: true, Const: true, HasAddrs: true, Files: []string{"/a b"}}, `table <t> persist const { } file "/a b"`},
		{&Antispoof{Quick: true, Log: &Log{}, Interfaces: []AntispoofInterface{{Name: "en0", Dynamic: true}}, Family: Inet, Label: "l", RTable: num(2)},
			`antispoof log quick for (en0) inet label "l" rtable 2`},
		{&LoadAnchor{Anchor: "a", File: "/f"}, `load anchor "a" from "/f"`},
		{&Text{Text: "dummynet in pipe 1"}, "dummynet in pipe 1"},
	} {
		if got := tt.s.String(); got != tt.want {
			t.Errorf(" got %s\nwant %s", got, tt.want)
		}
	}
}

// TestShownForms pins the forms that pfctl shows differently from its input.
func TestShownForms(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"block return-icmp(net-unr) inet6", "block return-icmp6(3) inet6 all"},
		{"block return-icmp6(net-unr)", ""},
		{"block return-icmp(99) inet", "block return-icmp(99) inet all"},
		{"pass log (to pflog0)", "pass log all flags S/SA keep state"},
		{"pass probability 1", "pass all flags S/SA keep state probability 100%"},
		{"pass probability 0.1%", "pass all flags S/SA keep state probability 0.1%"},
		{"pass keep state (floating, udp.first 1) probability 5%", "pass all flags S/SA keep state probability 5% (udp.first 1)"},
		{"pass user 5 group >= 9", "pass all user = 5 group >= 9 flags S/SA keep state"},
		{"pass flags any no state", "pass all no state"},
		{"pass proto tcp flags any", "pass proto tcp all flags any keep state"},
		{"block from ! 0.0.0.0/0", "block drop inet from ! any to any"},
		{"block from 0.0.0.0/8", "block drop inet from 0.0.0.0/8 to any"},
		{"block from fe80::1%en0", "block drop on en0 inet6 from fe80::1 to any"},
		{"block inet from (en0)/32", "block drop inet from (en0) to any"},
		{"block from (en0)/32", "block drop from (en0)/32 to any"},
		{"pass tag \"a b\" queue (q, p)", "pass all flags S/SA keep state queue(q, p) tag a b"},
		{"nat inet all -> { (en0) (en1) }", "nat inet all -> { (en0), (en1) } round-robin"},
		{"nat inet all -> (en0:0) port 50001:65535", "nat inet all -> (en0:0)"},
		{"rdr inet proto tcp all -> 10.0.0.1 port 5:5", "rdr inet proto tcp all -> 10.0.0.1 port 5"},
		{"no nat all random", "no nat all"},
		{"scrub set-tos 16 reassemble tcp", "scrub all set-tos 0x10 reassemble tcp fragment reassemble"},
	} {
		ld, err := loadText(tt.text+"\n", "", testHost())
		if tt.want == "" {
			if err == nil {
				t.Errorf("%s: loaded as %s", tt.text, show(ld))
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.text, err)
		} else if got := show(ld); got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.text, got, tt.want)
		}
	}
}
