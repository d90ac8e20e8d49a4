package pfconf

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// testHost returns interfaces of each kind.
func testHost() []Interface {
	p := netip.MustParsePrefix
	return []Interface{
		{Name: "lo0", Addresses: []netip.Prefix{p("127.0.0.1/8"), p("::1/128")}},
		{Name: "en0", Addresses: []netip.Prefix{p("192.0.2.7/24"), p("192.0.2.8/24"), p("fe80::7/64"), p("2001:db8::7/64")}},
		{Name: "en1", Addresses: []netip.Prefix{p("198.51.100.9/28")}},
		{Name: "utun4", Addresses: []netip.Prefix{p("100.64.0.1/10"), p("fd00::1/48")}},
	}
}

// seeds use each part of the grammar.
var seeds = []string{
	"pass\n", "block return-icmp(host-unr, addr-unr) in log (all, to pflog1) quick on { en0 ! en1 } inet6 all\n",
	"ext = \"en0\"\nnet = \"{ 10/8, ! 10.1.0.0/16 }\"\npass in on $ext proto { tcp udp } from $net to ($ext:network) port { 22, 80:90 }\n",
	"table <t> persist const { 10.0.0.0/8 !10.1.0.0/16 self en0:network } file \"/etc/t\"\nblock from <t>\n",
	"set skip on { lo0 en0 }\nset timeout { tcp.first 5, udp.first 6 }\nset limit states 10\nset block-policy return\n",
	"scrub in on en0 all no-df min-ttl 3 max-mss 1380 random-id fragment crop\nno scrub on lo0\n",
	"nat pass log on en0 inet from 10/8 to any tag X -> { 192.0.2.1 192.0.2.2 } port 2000:3000 round-robin sticky-address\n",
	"rdr on en0 proto tcp to port 80:90 -> 127.0.0.1 port 8080:*\nno rdr all\nbinat on en0 from 10.0.0.1 to <t> -> 192.0.2.9\n",
	"nat on en0 from 10/8 to any -> (en0:0) source-hash 0x0123456789abcdef0123456789abcdef static-port\n",
	"scrub-anchor \"com.apple/*\"\nnat-anchor x\nrdr-anchor y on en0\nbinat-anchor z\ndummynet-anchor d\nanchor \"com.apple/*\"\nload anchor \"a\" from \"/f\"\n",
	"anchor \"a\" in on en0 {\npass\nanchor {\nblock\n}\n}\n",
	"antispoof log quick for { lo0 (en0) } inet label \"s\"\n",
	"pass in route-to { (en0 10.0.0.1) (en1 10.0.0.2) } round-robin proto tcp from any os \"Linux\" to any user { root >= 500 } group != 0 flags S/SA tos 0x10 modulate state (max 10, if-bound, source-track rule, max-src-conn-rate 5/2, overload <b> flush global, udp.first 3) label \"$if $nr\" queue (a, b) tag T ! tagged U rtable 1 probability 20%\n",
	"pass inet6 proto icmp6 icmp6-type { echoreq, unreach code 4, 200 } no state\npass inet proto icmp icmp-type unreach code needfrag\n",
	"pass from fe80::1%en0 to ::ffff:1.2.3.4\npass from 10.0.0.1 - 10.0.0.9 to \"10.1.0.0/16\"\npass from { any { no-route urpf-failed } } to ! self\n",
	"altq on en0 priq queue { a b }\ndummynet in on en0 all pipe 1\n", "pass \\\n  in # comment \\\n goes on\n",
	"a = \"x x x x\"\nb = $a $a $a\nc = $b $b $b\n", "pass tag \"in\" label 'say \"x\"'\n", "pass in from <\"1\"> to any port <> 5\n",
	"pass proto 47\nblock return-rst (ttl 5) proto tcp\nblock return-icmp6(3) inet6\npass in fastroute\n", "x = -5\npass port $x\n",
}

// FuzzParse parses any text without a panic, and checks that the printed ruleset parses
// to the same ruleset, prints the same and loads the same rules.
func FuzzParse(f *testing.F) {
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := Parse(text)
		if err != nil {
			if _, ok := err.(*SyntaxError); !ok {
				t.Fatalf("error of type %T", err)
			}
			return
		}
		printed := rs.String()
		again, err := Parse(printed)
		if err != nil {
			t.Fatalf("printed %q: %v", printed, err)
		}
		if !reflect.DeepEqual(rs, again) {
			t.Fatalf("printed %q\nparsed as %q", printed, again)
		}
		if again.String() != printed {
			t.Fatalf("printed %q, then %q", printed, again)
		}
		fuzzExpand(t, rs, again)
	})
}

func fuzzExpand(t *testing.T, rs, again *Ruleset) {
	for _, anchor := range []string{"", "com.apple/x"} {
		one, err := rs.Expand(anchor, testHost())
		two, err2 := again.Expand(anchor, testHost())
		if (err == nil) != (err2 == nil) {
			t.Fatalf("loads with %v, printed with %v", err, err2)
		}
		if err != nil {
			continue
		}
		if a, b := show(one), show(two); a != b {
			t.Fatalf("loads as %q, printed as %q", a, b)
		}
		ParseShown(show(one))
	}
}

func show(ld *Loaded) string {
	return strings.Join(append(ld.ShowNat(), ld.ShowRules()...), "\n")
}

// FuzzParseShown checks that each line of rules is parsed or kept as unknown.
func FuzzParseShown(f *testing.F) {
	for _, s := range append(seeds, shownSamples...) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s := ParseShown(text)
		for _, u := range s.Unknown {
			if u.Err == nil || u.Line < 1 {
				t.Fatalf("unknown line %+v", u)
			}
		}
		for _, r := range s.Rules {
			if r.Rule == nil || r.Err != nil && len(s.Unknown) == 0 {
				t.Fatalf("rule %+v", r)
			}
		}
		// All rules and stand-ins load, so one strange rule of pf can't prevent the
		// evaluation of the others.
		rs := s.Ruleset(nil)
		_ = rs.String()
		ld, err := rs.Expand(deepest, testHost())
		if err != nil && !strings.Contains(err.Error(), "more than") {
			t.Fatalf("load %q: %v", rs, err)
		} else if err == nil {
			show(ld)
		}
	})
}

// deepest is the path of an anchor deep enough that no relative call leaves the main
// ruleset.
var deepest = strings.Repeat("x/", 1<<12) + "x"

// FuzzOutputs runs all parsers of pfctl's output on any text.
func FuzzOutputs(f *testing.F) {
	for _, s := range outputSamples {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ParseAnchors(text)
		ParseInterfaces(text)
		ParseTables(text)
		if entries, err := ParseTableEntries(text); err == nil {
			for _, a := range entries {
				if !a.Prefix.IsValid() {
					t.Fatalf("entry %+v", a)
				}
			}
		}
		if info, err := ParseInfo(text); err == nil && info.For < 0 {
			t.Fatalf("info %+v", info)
		}
		if refs, err := ParseReferences(text); err == nil {
			for _, r := range refs {
				if r.Age < 0 {
					t.Fatalf("reference %+v", r)
				}
			}
		}
		if states, err := ParseStates(text); err == nil {
			for _, s := range states {
				if !s.Inner.Addr().IsValid() || !s.Outer.Addr().IsValid() || s.Direction == Both {
					t.Fatalf("state %+v", s)
				}
			}
		}
		_, _ = ParseToken(text)
	})
}
