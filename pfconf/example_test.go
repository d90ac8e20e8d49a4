package pfconf_test

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Parse reads a ruleset and String prints it in one form, with macros expanded.
func ExampleParse() {
	rs, err := pfconf.Parse(`
uplink = "en0"
block in all                          # the last match wins,
pass in quick on $uplink proto tcp \
     from any to ($uplink) port {ssh https}   # unless one is quick
`)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Print(rs)
	// Output:
	// uplink = "en0"
	// block in all
	// pass in quick on en0 proto tcp from any to (en0) port { 22, 443 }
}

// A SyntaxError has the position of the mistake and says what was expected.
func ExampleSyntaxError() {
	_, err := pfconf.Parse("block all\npass in quik on en0\n")
	var syntax *pfconf.SyntaxError
	if errors.As(err, &syntax) {
		fmt.Println(syntax.Line, syntax.Column, syntax.Found)
	}
	fmt.Println(err)
	// Output:
	// 2 9 "quik"
	// line 2, column 9: found "quik", expected the end of the line or another option
}

// A program can build a ruleset from types. pfctl loads every ruleset that Validate
// accepts.
func ExampleRuleset_Validate() {
	peers := []pfconf.Address{{Kind: pfconf.AddrTable, Name: "peers"}}
	uplink := []pfconf.InterfaceMatch{{Name: "en0"}}
	rs := &pfconf.Ruleset{Statements: []pfconf.Statement{
		&pfconf.Table{Name: "peers", HasAddrs: true, Addrs: []pfconf.Address{
			{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("100.64.0.2/32")},
		}},
		&pfconf.Rule{Action: pfconf.Nat, Interfaces: uplink, Family: pfconf.Inet, From: pfconf.Endpoint{Addrs: peers},
			Pool: &pfconf.Pool{Addrs: []pfconf.Address{{Kind: pfconf.AddrDynamic, Name: "en0"}}}},
		&pfconf.Rule{Action: pfconf.Block, Return: pfconf.Return{Kind: pfconf.ReturnDrop}, Direction: pfconf.In},
		&pfconf.Rule{Action: pfconf.Pass, Direction: pfconf.In, From: pfconf.Endpoint{Addrs: peers},
			State: pfconf.KeepState, StateOptions: pfconf.StateOptions{Policy: pfconf.IfBound}},
	}}
	if err := rs.Validate(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Print(rs)
	// Output:
	// table <peers> { 100.64.0.2 }
	// nat on en0 inet from <peers> to any -> (en0)
	// block drop in all
	// pass in from <peers> to any keep state (if-bound)
}

// Expand makes one rule for each combination, with defaults written out.
func ExampleRuleset_Expand() {
	rs, err := pfconf.Parse("nat on en0 from 10/8 to any -> (en0)\npass in proto { tcp udp } to en0 port domain\n")
	if err != nil {
		fmt.Println(err)
		return
	}
	loaded, err := rs.Expand("", []pfconf.Interface{{Name: "en0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}}})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, line := range append(loaded.ShowNat(), loaded.ShowRules()...) {
		fmt.Println(line)
	}
	// Output:
	// nat on en0 inet from 10.0.0.0/8 to any -> (en0) round-robin
	// pass in inet proto tcp from any to 192.0.2.7 port = 53 flags S/SA keep state
	// pass in inet proto udp from any to 192.0.2.7 port = 53 keep state
}

// ParseShown reads pfctl's output rule by rule and keeps the lines that it can't read.
func ExampleParseShown() {
	shown := pfconf.ParseShown(`anchor "com.apple/*" all
block drop in quick on utun7 all
pass in wonderful
`)
	for _, r := range shown.Rules {
		if r.Err != nil {
			fmt.Printf("can't read %q, which may be as wide as: ", r.Text)
		}
		fmt.Println(r.Rule)
	}
	// Output:
	// anchor "com.apple/*" all
	// block drop in quick on utun7 all
	// can't read "pass in wonderful", which may be as wide as: pass all flags any keep state (floating) allow-opts
}

// Only the token identifies a reference to pf.
func ExampleParseReferences() {
	refs, err := pfconf.ParseReferences(`TOKENS:
PID      Process Name                 TOKEN                    TIMESTAMP
4063     pfctl                        15053025338191571182     0 days 00:01:00
`)
	fmt.Println(refs[0].Token, refs[0].Age, err)
	// Output:
	// 15053025338191571182 1m0s <nil>
}
