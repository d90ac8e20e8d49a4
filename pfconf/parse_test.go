package pfconf

import (
	"errors"
	"strings"
	"testing"
)

// TestSyntaxErrors pins the messages and positions of errors.
func TestSyntaxErrors(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"pas in all\n", `line 1, column 1: found "pas", expected pass, block, nat, rdr, binat, no, scrub, anchor, table, set, antispoof, load or a macro`},
		{"pass\npass in quik all\n", `line 2, column 9: found "quik", expected the end of the line or another option`},
		{"pass in on\n", `line 1, column 11: found the end of the line, expected the name of an interface`},
		{"pass", `line 1, column 5: found the end of the text, expected a newline after the last line`},
		{"pass in proto foo\n", `line 1, column 15: found "foo", expected a protocol`},
		{"pass in proto { tcp udp\n", `line 2, column 1: found the end of the text, expected }`},
		{"pass proto tcp to port 65536\n", `line 1, column 24: 65536 is no port: it is from 0 to 65535`},
		{"pass proto tcp to port nosuch\n", `line 1, column 24: found "nosuch", expected a port or the name of a service`},
		{"pass from 10.0.0.300\n", `line 1, column 11: found "10.0.0.300", expected an address, a table or an interface`},
		{"pass from 10.0.0.0/33\n", `line 1, column 11: 10.0.0.0/33 is no network`},
		{"pass from $nets\n", `line 1, column 11: macro $nets isn't defined`},
		{"x = \"10.0.0.1 10.0.0.2\"\npass from $x\n", `line 2, column 11: found "10.0.0.2", expected the end of the line or another option`},
		{"pass label \"x\n", `line 1, column 12: found a quoted string without end, expected "`},
		{"pass \\\n  in \\\n  onn en0\n", `line 3, column 3: found "onn", expected the end of the line or another option`},
		{"pass # comment \\\nstill comment\nblok\n", `line 3, column 1: found "blok", expected pass, block, nat, rdr, binat, no, scrub, anchor, table, set, antispoof, load or a macro`},
		{"pass all\nscrub in all\n", `line 2, column 1: out of order: options come first, then scrub, translation and filter rules`},
		{"pass to port 80\n", `line 1, column 1: a port needs proto tcp or udp`},
		{"pass label a label b\n", `line 1, column 14: label for the second time`},
		{"pass keep state (max 5, max 6)\n", `line 1, column 25: max for the second time`},
		{"block in keep state\n", `line 1, column 1: a block rule keeps no state`},
		{"nat on en0 from any to any\n", `line 1, column 1: -> and an address are missing`},
		{"anchor x {\npass\nnat\n}\n", `line 3, column 1: found "nat", expected pass, block, anchor or }`},
		{"anchor x {\n  pass to port 80\n}\n", `line 2, column 3: a port needs proto tcp or udp`},
		{"table <t> { 10.0.0.1, }\n", `line 1, column 23: found "}", expected an address, a table or an interface`},
		{"table t persist\n", `line 1, column 7: found "t", expected <`},
		{"table <t> counters\n", `line 1, column 11: found "counters", expected persist, const, file or {`},
		{"set timeout udp.first -1\n", `line 1, column 23: -1 is no value of a timeout: it is from 0 to 4294967295`},
		{"pass flags Q/SA proto tcp\n", `line 1, column 12: found "Q", expected TCP flags, letters out of FSRPAUEW`},
		{"pass\x00\n", "line 1, column 5: found \"\\x00\", expected the end of the line or another option"},
	} {
		_, err := Parse(tt.text)
		var syntax *SyntaxError
		if !errors.As(err, &syntax) || err.Error() != tt.want {
			t.Errorf("%q:\n got %v\nwant %s", tt.text, err, tt.want)
		}
	}
}

// TestParsePrint parses rulesets in the form that people write, and prints them.
func TestParsePrint(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"pass\n", "pass all\n"},
		{"pass   in quick log on {en0,en1} proto{tcp udp}from any to any port ssh\n",
			"pass in log quick on { en0, en1 } proto { tcp, udp } from any to any port 22\n"},
		{"if=\"en0\"\npass from $if:network to ($if)\n", "if = \"en0\"\npass from en0:network to (en0)\n"},
		{"a=\"1.1.1.1\"\nb=\"{\" $a 2.2.2.2 \"}\"\npass from $b\n",
			"a = \"1.1.1.1\"\nb = \"{ 1.1.1.1 2.2.2.2 }\"\npass from { 1.1.1.1, 2.2.2.2 } to any\n"},
		{"pass from { 10/8\n 172.16/12,\n192.168/16\n} to {{ any }}\n",
			"pass from { 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 } to { any }\n"},
		{"pass from 192.0.2.77/24\n", "pass from 192.0.2.0/24 to any\n"},
		{"pass from { <t>, ! (en0:0)/24, self }\n", "pass from { <t>, ! (en0:0)/24, self } to any\n"},
		{"pass proto 47 user root group { > 5 1 >< 9 }\n", "pass proto gre all user root group { > 5, 1 >< 9 }\n"},
		{"block return-icmp6 (3)\n", "block return-icmp6(addr-unr) all\n"},
		{"table <t> { } persist\n", "table <t> persist { }\n"},
		{"pass tag a b\n", "pass all tag \"a b\"\n"},
		{"dummynet in on en0 all pipe 1 # shaping\n", "dummynet in on en0 all pipe 1\n"},
		{"load anchor com.apple from \"/etc/pf.anchors/com.apple\"\n", "load anchor \"com.apple\" from \"/etc/pf.anchors/com.apple\"\n"},
		{"set limit { states 10, frags 20 }\nset skip on lo0\n", "set limit { states 10, frags 20 }\nset skip on lo0\n"},
		{"anchor \"a\" {\npass\nanchor {\nblock\n}\n}\n", "anchor \"a\" all {\n    pass all\n    anchor all {\n        block all\n    }\n}\n"},
		{"pass keep state (floating, max-src-conn 5, overload <b> flush)\n",
			"pass all keep state (max-src-conn 5, overload <b> flush, floating)\n"},
		{"nat on en0 inet from 10/8 -> (en0) extfilter ei\n", "nat on en0 inet from 10.0.0.0/8 to any -> (en0) extfilter ei\n"},
	} {
		rs, err := Parse(tt.text)
		if err != nil {
			t.Errorf("%q: %v", tt.text, err)
			continue
		}
		if got := rs.String(); got != tt.want {
			t.Errorf("%q:\n got %q\nwant %q", tt.text, got, tt.want)
		}
	}
}

func TestUnknownIsReported(t *testing.T) {
	rs, err := Parse("altq on en0 priq queue { a, b }\ndummynet in all pipe 1\npass all\n")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, u := range rs.Unknown() {
		got = append(got, u.Text)
	}
	if strings.Join(got, "|") != "altq on en0 priq queue { a , b }|dummynet in all pipe 1" {
		t.Errorf("got %q", got)
	}
}

// TestBounds parses texts that would expand indefinitely without limits.
func TestBounds(t *testing.T) {
	doubling := "a = \"" + strings.Repeat("x ", 1000) + "\"\n"
	for range 40 {
		doubling += "a = $a $a\n"
	}
	product := "pass proto tcp from {" + strings.Repeat(" 10.0.0.1", 1000) + " } to {" + strings.Repeat(" 10.0.0.2", 1000) + " }\n"
	for name, text := range map[string]string{
		"macros that double":    doubling,
		"uses of a long macro":  "a = \"" + strings.Repeat("x", 8000) + "\"\n" + strings.Repeat("pass tag $a\n", 100000),
		"a product of lists":    product,
		"a long word":           "pass on " + strings.Repeat("x", 1<<20) + "\n",
		"a long string":         "pass label \"" + strings.Repeat("x", 1<<20) + "\"\n",
		"many digits":           "pass proto " + strings.Repeat("1", 1<<20) + "\n",
		"anchors within":        strings.Repeat("anchor {\n", 1000) + strings.Repeat("}\n", 1000),
		"lists within":          "pass from " + strings.Repeat("{", 1000) + " any " + strings.Repeat("}", 1000) + "\n",
		"a tag of many strings": "pass tag " + strings.Repeat("xxxxxxxx ", 1<<17) + "\n",
	} {
		if _, err := Parse(text); err == nil {
			t.Errorf("%s: no error", name)
		} else if len(err.Error()) > 400 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

func TestNames(t *testing.T) {
	n := Names{
		Service: func(name string) (uint16, bool) { return 5353, name == "local-dns" },
		Proto:   func(name string) (uint8, bool) { return 99, name == "local-proto" },
	}
	rs, err := n.Parse("pass proto udp to port local-dns\npass proto local-proto\n")
	if err != nil {
		t.Fatal(err)
	}
	if got := rs.String(); got != "pass proto udp from any to any port 5353\npass proto 99 all\n" {
		t.Errorf("got %q", got)
	}
	if _, err := Parse("pass proto udp to port local-dns\n"); err == nil {
		t.Error("an unknown service was parsed")
	}
}
