package pfconf

import (
	"strings"
	"testing"
)

// TestRefused checks texts that pfctl refuses, most of them although they match its
// grammar, and the reason in the error.
func TestRefused(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		// Protocols, ports and ICMP.
		{"pass proto icmp to port 80", "a port needs proto tcp or udp"},
		{"pass proto { tcp gre } to port 80", "a port needs proto tcp or udp"},
		{"scrub in from any port 53 to any", "a port needs proto tcp or udp"},
		{"pass inet6 proto icmp", "their own address family"},
		{"pass inet proto icmp6", "their own address family"},
		{"pass inet proto tcp icmp-type echoreq", "an ICMP type needs proto icmp"},
		{"pass inet proto icmp icmp6-type echoreq", "an ICMP type needs proto icmp"},
		{"pass proto icmp icmp-type echoreq", "needs inet or inet6"},
		{"pass inet proto icmp icmp-type nosuch", "expected an ICMP type"},
		{"pass inet proto icmp icmp-type unreach code nosuch", "expected a code of that ICMP type"},
		{"pass inet proto icmp icmp-type 256", "256 is no ICMP type"},
		{"pass proto 0", "protocol 0 can't be used"},
		{"pass proto 256", "256 is no protocol"},
		{"pass proto tcp to port 1:2:3", "expected a port or the name of a service"},
		{"pass proto tcp to port = 1:2", "a range takes no other operator"},
		{"pass proto tcp to port 1:2 >< 5", "a range takes no other operator"},
		{"pass proto tcp to port -1", "-1 is no port"},
		{"pass proto tcp to port 0x10000", "0x10000 is no port"},
		// Flags, states and their options.
		{"pass proto udp flags S/SA", "flags and os need proto tcp"},
		{"pass proto udp from any os Linux to any", "flags and os need proto tcp"},
		{"pass flags SA/S", "the flags can never match"},
		{"pass keep state (max-src-nodes 5, source-track global)", "source-track global goes with"},
		{"pass keep state (max-src-conn-rate 5000000/1)", "max-src-conn-rate is too high"},
		{"pass keep state (max-src-conn-rate 5/0)", "0 is no number of seconds"},
		{"pass keep state (max-src-states 0)", "must be above 0"},
		{"pass keep state (overload <b>)", "overload needs max-src-conn"},
		{"pass keep state (if-bound, floating)", "floating for the second time"},
		{"pass keep state (no-sync, no-sync)", "no-sync for the second time"},
		{"pass keep state (udp.first 1, udp.first 2)", "udp.first for the second time"},
		{"pass keep state (frag 1)", "expected an option of the state"},
		{"pass keep state (in)", "expected an option of the state"},
		{"pass no state (max 1)", "expected the end of the line"},
		{"block keep state", "a block rule keeps no state"},
		{"block allow-opts", "allow-opts is for pass only"},
		{"pass proto tcp from any port 1 to any fragment", "a fragment has no ports"},
		{"pass fragment flags S/SA", "a fragment has no ports"},
		{"block return-rst", "return-rst needs proto tcp"},
		{"block return-icmp(nosuch)", "expected a code of ICMP unreachable"},
		{"block return-rst(ttl 256) proto tcp", "256 is no time to live"},
		{"pass tos 0", "expected lowdelay"},
		{"pass probability 101%", "expected a probability"},
		{"pass probability nan", "expected a probability"},
		{"pass probability in", "expected a probability"},
		{"pass tos 1 tos 1", "tos for the second time"},
		// Users.
		{"pass user > unknown", "user unknown can only be = or !="},
		{"pass user 1 >< root", "two numbers around the operator"},
		{"pass group \"\"", "expected a group"},
		// Addresses.
		{"pass inet from fd00::1", "stands for no packet"},
		{"pass from 10.0.0.1 to fd00::1", "stands for no packet"},
		{"pass from 10.0.0.1 - fd00::1", "is no range of addresses"},
		{"pass from 10.0.0.1 - en0", "is no range of addresses"},
		{"pass to urpf-failed", "urpf-failed is no destination"},
		{"pass from en0:network/24", "takes no prefix length"},
		{"pass from en0:network:peer", "expected an address, a table or an interface"},
		{"pass from (1en0)", "expected an interface, perhaps with"},
		{"pass from (\"\")", "expected an interface, perhaps with"},
		{"pass from 10", "expected an address, a table or an interface"},
		{"pass from fd00::/129", "129 is no prefix length"},
		{"pass from \"10.0.0.0/33\"", "10.0.0.0/33 is no network"},
		{"pass from ! { 10.0.0.1 }", "expected an address, a table or an interface"},
		{"pass from ! any", "expected an address, a table or an interface"},
		{"pass from averyveryverylongname0", "longer than 15 bytes"},
		// Translation.
		{"no nat on en0 all -> 10.0.0.1", "a rule with no takes no ->"},
		{"no binat on en0 from 10.0.0.1 -> 10.0.0.2", "a rule with no takes no ->"},
		{"binat on en0 from 10.0.0.1", "-> and an address are missing"},
		{"no nat pass all", "pass makes no sense with no"},
		{"nat inet all -> fd00::1", "no address behind -> is of the family"},
		{"nat all -> { 10.0.0.1 10.0.0.2 } random", "several addresses go with round-robin only"},
		{"nat all -> <t> bitmask", "round-robin only"},
		{"nat all -> (en0) random", "round-robin only"},
		{"nat all -> 10.0.0.1 static-port static-port", "static-port for the second time"},
		{"nat all -> 10.0.0.1 random bitmask", "a second pool type"},
		{"nat all -> 10.0.0.1 port 5 static-port", "static-port doesn't go with a port"},
		{"nat all -> 10.0.0.1 source-hash 0x12", "expected a key of 0x and 32"},
		{"nat all -> 10.0.0.1 extfilter xx", "expected ei or ad or apd"},
		{"no nat all static-port", "static-port is for nat only"},
		{"rdr proto tcp all -> 10.0.0.1 static-port", "static-port is for nat only"},
		{"rdr all -> 10.0.0.1 port 80", "a port needs proto tcp or udp"},
		{"rdr proto tcp to port > 80 -> 10.0.0.1", "the port of rdr takes no operator"},
		{"binat from (en0:0) to any -> (en0:0)", "inet or inet6 is missing"},
		{"binat from 10.0.0.1 to fd00::1 -> 10.0.0.2", "two families"},
		{"binat inet from 10.0.0.1 -> fd00::2", "no address behind -> is of the family"},
		{"binat from 10.0.0.0/24 -> 10.0.1.0/25", "prefix lengths"},
		{"binat from 10.0.0.1 to { 1.1.1.1 2.2.2.2 } -> 10.0.0.2", "binat takes one address a side"},
		{"binat from <t> to 10.0.0.1 -> 10.0.0.2", "binat takes no table"},
		// Routes.
		{"pass route-to en0", "needs in or out"},
		{"pass in route-to { (en0 10.0.0.1) (en1 fd00::1) }", "the hops are of two families"},
		{"pass in route-to (en0 10.0.0.1) inet6", "no address is of the family"},
		{"pass in route-to { en0 en1 } random", "several addresses go with round-robin only"},
		// Anchors.
		{"anchor", "the name of the anchor or its rules in braces"},
		{"anchor _x", "pf's own"},
		{"anchor \"a/_x\"", "pf's own"},
		{"anchor \"a//b\"", "a name that is empty"},
		{"anchor x keep state", "takes no: a state"},
		{"anchor x {pass}", "a newline after {"},
		{"anchor \"../x\" {\n}\nanchor \"" + strings.Repeat("a", 64) + "\"", "longer than 63 bytes"},
		{"rdr-anchor x proto tcp from any port 1 to any", "takes no source port"},
		{"rdr-anchor x proto tcp to port { 1 2 }", "takes one port"},
		{"rdr-anchor x proto tcp to port > 1", "without operator"},
		{"binat-anchor x from 10.0.0.1", "takes no addresses"},
		{"binat-anchor x proto { tcp udp }", "takes one protocol"},
		{"nat-anchor x in", "expected the end of the line"},
		// Scrub, options, tables.
		{"scrub in reassemble tcp", "reassemble tcp takes no direction"},
		{"scrub reassemble udp", "expected tcp"},
		{"scrub no-df no-df", "no-df for the second time"},
		{"scrub min-ttl 256", "256 is no time to live"},
		{"set limit nosuch 5", "no limit nosuch"},
		{"set skip on ! lo0", "set skip can't be negated"},
		{"set hostid 0", "the hostid is from 1"},
		{"set hostid x", "expected a number"},
		{"set ruleset-optimization much", `set ruleset-optimization can't be "much"`},
		{"set require-order maybe", "expected yes or no"},
		{"set state-policy loose", "expected if-bound or floating"},
		{"table <t> { (en0) }", "a table holds addresses and networks only"},
		{"table <t> { 10.0.0.1 - 10.0.0.2 }", "a table holds addresses and networks only"},
		{"table <t> file \"\"", "the file has no name"},
		{"antispoof for en0 label a label b", "a second label"},
		{"antispoof for averyveryverylongname0", "longer than 15 bytes"},
		{"load anchor a", "expected from"},
	} {
		if _, err := Parse(tt.text + "\n"); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q:\n got %v\nwant %s", tt.text, err, tt.want)
		}
	}
}

// TestRefusedInMain checks statements that pfctl validates only in the main ruleset. The
// first one is a syntax error everywhere.
func TestRefusedInMain(t *testing.T) {
	for _, text := range []string{"set debug no", "set optimization nosuch", "set loginterface averyveryverylongname0",
		"set timeout nosuch.first 5", "set timeout udp.first 2147483648", "anchor \"../x\""} {
		rs, err := Parse(text + "\n")
		if text == "set debug no" {
			if err == nil {
				t.Errorf("%q: a keyword was accepted as a value", text)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if rs.Validate() == nil {
			t.Errorf("%q: Validate accepted it", text)
		}
		if _, err := rs.Expand("", nil); err == nil {
			t.Errorf("%q: loaded into main", text)
		}
		if _, err := rs.Expand("a", nil); err != nil {
			t.Errorf("%q in an anchor: %v", text, err)
		}
	}
}

// TestAccepted checks texts that look wrong but are valid.
func TestAccepted(t *testing.T) {
	for _, text := range []string{
		"pass proto tcp to port 9:1", "pass on nosuch9", "pass from (nosuch9)", "pass from <nosuch>", "set skip",
		"pass tag A tag B", "pass fragment fragment", "pass log (all, all, group)", "pass proto udp flags any",
		"pass keep state (max 0, max 5)", "pass tos 0x10;", "pass proto tcp to port 0x50", "pass proto TCP", "set hostid 0xff",
		"nat-anchor a b", "set timeout UDP.First 5", "table <t> persist persist { 10.0.0.1 } { }", "antispoof for nosuch9",
		"pass quick log", "nat all -> 10.0.0.1 port 50001:60000 static-port", "nat all -> 10.0.0.0/8 source-hash some key",
		"pass proto udp synproxy state", "block from { any }", "pass from { { 10.0.0.1 } any }", "pass in fastroute",
		"binat inet from (en0:0) to ! 10.0.0.1 -> (en1:0)", "rdr inet proto tcp all -> 10.0.0.1 port 5:*", "no rdr all random",
		"pass in route-to { en0 en1 } sticky-address", "scrub set-tos lowdelay tagged X rtable 3", "anchor {\n\n}",
		"pass \\\n", "x = y\nx = z\npass on $x",
	} {
		rs, err := Parse(text + "\n")
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if _, err := rs.Expand("", testHost()); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}
