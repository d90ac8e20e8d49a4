package pfconf

import (
	"strings"
	"testing"
)

// TestExpand compares expanded rules with those that pfctl creates on a host.
func TestExpand(t *testing.T) {
	for _, tt := range []struct{ name, anchor, text, want string }{
		{"link-local addresses bind a rule to their interface", "", "block to en0\n",
			"block drop inet from any to 192.0.2.7\nblock drop inet from any to 192.0.2.8\n" +
				"block drop on en0 inet6 from any to fe80::7\nblock drop inet6 from any to 2001:db8::7"},
		{"no aliases", "", "block inet to en0:0\n", "block drop inet from any to 192.0.2.7"},
		{"networks of an interface leave link-local out", "", "block inet6 from en0:network\n", "block drop inet6 from 2001:db8::/64 to any"},
		{"broadcast", "", "block to { en0:broadcast }\n",
			"block drop inet from any to 192.0.2.255\nblock drop inet from any to 192.0.2.255"},
		{"a prefix length on an interface", "", "block inet from en1/16\n", "block drop inet from 198.51.0.0/16 to any"},
		{"any in a list stands for nothing", "", "pass from { any 10.0.0.1 }\n", "pass inet from 10.0.0.1 to any flags S/SA keep state"},
		{"a rule by itself has its number", "", "block label \"$nr\"\nblock in proto { tcp udp } label \"$nr $proto\"\n",
			"block drop all label \"0\"\nblock drop in proto tcp all label \"1 tcp\"\nblock drop in proto udp all label \"2 udp\""},
		{"an inline anchor of main", "", "anchor \"a\" {\npass\n}\n", "anchor \"a\" all"},
		{"only the last name of an inline anchor counts", "", "anchor \"a/b\" {\npass\n}\n", "anchor \"b\" all"},
		{"an inline anchor in an anchor has its whole path", "x", "anchor \"a\" {\npass\n}\n", "anchor \"x/a\" all"},
		{"a nameless anchor shows its rules", "", "anchor in {\npass\n}\nblock\n",
			"anchor in all {\n  pass all flags S/SA keep state\n}\nblock drop all"},
		{"a nameless anchor in an anchor too", "x", "anchor {\npass\n}\n", "anchor all {\n  pass all flags S/SA keep state\n}"},
		{"block-policy counts in an anchor", "x", "set block-policy return\nblock\n", "block return all"},
		{"state-policy counts for rules that don't say", "", "set state-policy if-bound\npass\npass keep state (floating)\n",
			"pass all flags S/SA keep state (if-bound)\npass all flags S/SA keep state"},
		{"rdr to as many ports", "", "rdr on en0 proto tcp to port 80:90 -> 10.0.0.1 port 8000:*\n",
			"rdr on en0 inet proto tcp from any to any port 80:90 -> 10.0.0.1 port 8000:8010"},
		{"a pool of the rule's family", "", "nat on en0 inet6 from fd00::/8 to any -> en0\n",
			"nat on en0 inet6 from fd00::/8 to any -> { fe80::7, 2001:db8::7 } round-robin"},
		{"a key is hashed", "", "nat on en0 inet from any to any -> 10.0.0.0/8 source-hash secret\n",
			"nat on en0 inet all -> 10.0.0.0/8 source-hash 0x5ebe2294ecd0e0f08eab7690d2a6ee69"},
		{"translation is shown by kind", "", "binat on en0 from 10.0.0.1 to any -> 10.0.0.2\nrdr on en0 all -> 10.0.0.1\nno nat on en0 all\n",
			"no nat on en0 all\nrdr on en0 inet all -> 10.0.0.1\nbinat on en0 inet from 10.0.0.1 to any -> 10.0.0.2"},
		{"binat takes the first of its lists", "", "binat on { en0 en1 } proto { tcp udp } from 10.0.0.1 to any -> 10.0.0.2\n",
			"binat on en0 inet proto tcp from 10.0.0.1 to any -> 10.0.0.2"},
		{"antispoof of a group of names", "", "antispoof for utun inet\n",
			"block drop in on ! utun inet from 100.64.0.0/10 to any\nblock drop in inet from 100.64.0.1 to any"},
		{"antispoof of lo0 drops its network only", "", "antispoof for lo0 inet\n", "block drop in on ! lo0 inet from 127.0.0.0/8 to any"},
		{"a state option that others imply", "", "pass keep state (max-src-states 3)\n",
			"pass all flags S/SA keep state (source-track global, max-src-states 3)"},
	} {
		ld, err := loadText(tt.text, tt.anchor, testHost())
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if got := show(ld); got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

func TestExpandRefuses(t *testing.T) {
	for _, tt := range []struct{ anchor, text, want string }{
		{"", "pass from nosuch0\n", "nosuch0 is no interface with an address"},
		{"", "pass from utun4:peer\n", "utun4 is no interface"},
		{"", "pass inet6 from en1\n", "stands for no packet"},
		{"", "binat on en0 from en0 to any -> 10.0.0.1\n", "one address a side"},
		{"", "set timeout no.such 5\n", "no timeout no.such"},
		{"", "set timeout tcp.first 4294967295\n", "too long"},
		{"", "anchor a {\npass\n}\nanchor a {\npass\n}\n", "already exists"},
		{"x", "set limit nosuch 5\n", "no limit nosuch"},
		{"x", "anchor \"../../y\"\n", "above the main ruleset"},
		{"", "binat on en0 inet from 10.0.0.1 to any -> (en0)\n", "takes no table"},
		{"", "nat on en0 from any to any -> 10.0.0.1 - 10.0.0.5\n", "a pool holds"},
		{"", "pass log (to pflog16)\n", "one of pflog0 to pflog15"},
	} {
		if _, err := loadText(tt.text, tt.anchor, testHost()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: got %v, want %s", tt.text, err, tt.want)
		}
	}
	if _, err := loadText("set timeout no.such 5\n", "x", testHost()); err != nil {
		t.Errorf("timeouts in an anchor, which pfctl ignores: %v", err)
	}
}

// TestLoadedLists checks that each rule is in the list of its kind and each body at its
// path.
func TestLoadedLists(t *testing.T) {
	ld, err := loadText("set skip on lo0\ntable <a> { en0 }\ntable <b> { 10/8 }\ntable <a> persist { 10.0.0.1 10.0.0.1 !10.0.0.1 }\n"+
		"scrub in\nnat on en0 from <b> to any -> (en0)\ndummynet-anchor \"d\"\nanchor a {\npass from <c>\nanchor b {\nblock\n}\n}\n"+
		"load anchor x from \"/f\"\n", "", testHost())
	if err != nil {
		t.Fatal(err)
	}
	if len(ld.Scrub) != 1 || len(ld.Nat) != 1 || len(ld.Dummynet) != 1 || len(ld.Filter) != 1 || len(ld.Options) != 1 || len(ld.Files) != 1 {
		t.Errorf("lists %+v", ld)
	}
	var tables, paths []string
	for _, table := range ld.Tables {
		tables = append(tables, table.String())
	}
	for _, a := range ld.Anchors {
		paths = append(paths, a.Path)
	}
	if got := strings.Join(tables, "|"); got != "table <a> persist { 10.0.0.1 }|table <b> { 10.0.0.0/8 }" {
		t.Errorf("tables %s", got)
	}
	if got := strings.Join(paths, " "); got != "a/b a" {
		t.Errorf("anchors %s", got)
	}
}

// TestValidate checks that rulesets built from types are refused if they can't be printed
// or loaded.
func TestValidate(t *testing.T) {
	byteOf := func(b uint8) *uint8 { return &b }
	for name, s := range map[string]Statement{
		"a newline in a label":         &Rule{Label: "a\nb"},
		"a backslash at a label's end": &Rule{Label: `a\`},
		"a long tag":                   &Rule{Tag: strings.Repeat("t", 64)},
		"an interface without name":    &Rule{Interfaces: []InterfaceMatch{{}}},
		"a long interface":             &Rule{Interfaces: []InterfaceMatch{{Name: "aaaaaaaaaaaaaaaa"}}},
		"a pool for pass":              &Rule{Pool: &Pool{}},
		"nat without a pool":           &Rule{Action: Nat},
		"a network with host bits":     &Rule{From: Endpoint{Addrs: []Address{{Kind: AddrPrefix, Prefix: hostPrefix(testHost()[1].Addresses[0].Addr())}}}, Action: Nat},
		"urpf-failed as destination":   &Rule{To: Endpoint{Addrs: []Address{{Kind: AddrURPFFailed}}}},
		"any negated":                  &Rule{To: Endpoint{Addrs: []Address{{Not: true}}}},
		"options of no state":          &Rule{State: NoState, StateOptions: StateOptions{Max: 1}},
		"a code for block drop":        &Rule{Action: Block, Return: Return{Kind: ReturnDrop, Code: byteOf(1)}},
		"an answer for pass":           &Rule{Return: Return{Kind: ReturnDrop}},
		"an anchor without name":       &Rule{Action: NatAnchor},
		"a name of pf's own":           &Rule{Action: Anchor, Anchor: "a/_b"},
		"nat in an anchor":             &Rule{Action: Anchor, Anchor: "a", Body: &Ruleset{Statements: []Statement{&Macro{Name: "x", Value: "y"}}}},
		"text of another statement":    &Text{Text: "pass all"},
		"text of two lines":            &Text{Text: "dummynet in\npass all"},
		"a macro without name":         &Macro{Value: "x"},
		"a table in a table":           &Table{Name: "t", HasAddrs: true, Addrs: []Address{{Kind: AddrTable, Name: "u"}}},
		"a long table":                 &Table{Name: strings.Repeat("t", 32)},
		"an unknown option":            &Option{Name: "nosuch", Values: []string{"x"}},
		"an option without value":      &Option{Name: "block-policy"},
		"antispoof for nothing":        &Antispoof{},
		"a probability above 1":        &Rule{Probability: 1.5},
		"a file with a newline":        &LoadAnchor{Anchor: "a", File: "x\ny"},
		"an unknown action":            &Rule{Action: 99},
	} {
		if err := (&Ruleset{Statements: []Statement{s}}).Validate(); err == nil {
			t.Errorf("%s: %s was accepted", name, s)
		}
	}
}
