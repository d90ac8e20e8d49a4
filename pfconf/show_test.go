package pfconf

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// shownSamples are outputs of pfctl -sr and -sn, with and without -v.
var shownSamples = []string{
	sampleRules, sampleVerbose, sampleNested, sampleMac,
}

const sampleRules = `No ALTQ support in kernel
ALTQ related functions disabled
scrub-anchor "com.apple/*" all fragment reassemble
anchor "com.apple/*" all
block drop in quick on utun7 inet from any to ! <lan>
pass in proto tcp from any to any port = mdns flags S/SA keep state probability 30% (if-bound)
something new that apple made
`

const sampleVerbose = `@0 scrub in all fragment reassemble
  [ Evaluations: 12        Packets: 3         Bytes: 180         States: 0     ]
  [ Inserted: uid 0 pid 77 State Creations: 0     ]
@0 pass in from <t:2> to (en0:network:1) flags S/SA keep state
  [ Evaluations: 9         Packets: 8         Bytes: 7           States: 6     ]
`

const sampleNested = `anchor all {
  pass in all flags S/SA keep state
  anchor in on en0 all {
    block drop all
  }
}
pass all flags any keep state
`

// sampleMac has rules that Internet Sharing, a VPN and Apple's main ruleset are known to
// load on Macs.
const sampleMac = `scrub on bridge100 all no-df max-mss 1410 fragment reassemble
scrub on en0 proto esp all no-df fragment reassemble
nat on en0 inet from 192.168.77.0/24 to any -> (en0) extfilter ei
nat on pdp_ip0 inet from 172.20.10.0/28 to any -> (pdp_ip0:0) extfilter ei
no nat on bridge100 inet from 172.20.10.1 to 172.20.10.0/28
rdr on bridge100 inet proto tcp from 172.20.10.0/28 to any port = 21 -> 127.0.0.1 port 8021
nat-anchor "com.apple.internet-sharing" all
rdr-anchor "com.apple/*" all
pass on utun9 inet all flags any keep state
pass on utun9 inet proto esp all no state
pass inet proto igmp all keep state allow-opts
pass on bridge100 all flags any keep state rtable 2
pass out log (all) quick inet proto udp from any to 192.0.2.1 port = 51820 user = 0 keep state
pass in quick on lo0 all flags S/SA keep state (if-bound)
pass out quick on en0 inet6 proto ipv6-icmp from any to ff02::/16 icmp6-type neighbrsol code 0 no state
block return quick all
dummynet-anchor "com.apple/*" all
`

// TestMacsAreUnderstood parses the lines of sampleMac and checks that they print
// unchanged.
func TestMacsAreUnderstood(t *testing.T) {
	s := ParseShown("DUMMYNET RULES:\n" + sampleMac)
	for _, u := range s.Unknown {
		t.Errorf("line %d %q: %v", u.Line, u.Text, u.Err)
	}
	for i, line := range strings.Split(strings.TrimSpace(sampleMac), "\n") {
		r := s.Rules[i].Rule
		if r.Action == Scrub {
			r.Normalize.Fragment = FragmentReassemble
		}
		if got := shown(r, r.Anchor); got != line {
			t.Errorf("got %s\nwant %s", got, line)
		}
	}
}

func TestParseInterfaces(t *testing.T) {
	got := ParseInterfaces("ALL\nen0\nlo0 (skip)\n\tCleared:     Thu Jan  1 00:00:00 1970\n")
	want := []ShownInterface{{Name: "ALL"}, {Name: "en0"}, {Name: "lo0", Skip: true}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}

func TestParseShown(t *testing.T) {
	names := Names{Service: func(name string) (uint16, bool) { return 5353, name == "mdns" }}
	s := names.ParseShown(sampleRules)
	want := []string{
		`scrub-anchor "com.apple/*" all`, `anchor "com.apple/*" all`,
		"block drop in quick on utun7 inet from any to ! <lan>",
		"pass in proto tcp from any to any port 5353 flags S/SA keep state (if-bound) probability 0.3",
	}
	var got []string
	for _, r := range s.Rules {
		if r.Err != nil || r.Text == "" {
			t.Errorf("rule %+v", r)
		}
		if r.Number != -1 {
			t.Errorf("rule %s has number %d without -vv", r, r.Number)
		}
		got = append(got, r.String())
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if len(s.Unknown) != 1 || s.Unknown[0].Line != 7 || s.Unknown[0].Text != "something new that apple made" {
		t.Errorf("unknown lines %+v", s.Unknown)
	}
}

// TestUnreadableRuleHasStandIn checks that a line that can't be parsed counts as matching
// every packet, and that the other lines aren't affected.
func TestUnreadableRuleHasStandIn(t *testing.T) {
	const text = `@0 pass in quick on en0 all flags S/SA keep state
@1 pass out quick wormhole (utun4 any) all flags S/SA keep state
@2 block return-rst all
@3 anchor "com.apple/*" sometimes all
@4 pass quick route-to utun4 all flags S/SA keep state
@5 nat on en0 inet6 from any to any through 3 -> (en0)
@6 anchor all sometimes {
@0   block drop upwards all
}
@7 brandnew all
@8 pass in all flags S/SA keep state
`
	s := ParseShown(text)
	want := []struct{ rule, text string }{
		{"pass in quick on en0 all flags S/SA keep state", "pass in quick on en0 all flags S/SA keep state"},
		{"pass quick all flags any keep state (floating) allow-opts",
			"pass out quick wormhole (utun4 any) all flags S/SA keep state"},
		{"block drop all", "block return-rst all"},
		{`anchor "com.apple/*" all`, `anchor "com.apple/*" sometimes all`},
		// The kernel has no rule of this form either: it routes in one direction only.
		{"pass quick all flags any keep state (floating) allow-opts", "pass quick route-to utun4 all flags S/SA keep state"},
		{"nat all", "nat on en0 inet6 from any to any through 3 -> (en0)"},
		{"anchor all {\n    block drop all\n}", "anchor all sometimes {"},
		{"pass in all flags S/SA keep state", "pass in all flags S/SA keep state"},
	}
	if len(s.Rules) != len(want) || len(s.Unknown) != 8 {
		t.Fatalf("%d rules and %d lines unknown: %v", len(s.Rules), len(s.Unknown), s.Unknown)
	}
	unread := 0
	for i, w := range want {
		r := s.Rules[i]
		if r.Err != nil {
			unread++
		}
		if r.String() != w.rule || r.Text != w.text || (r.Err == nil) != (i == 0 || i == 7) {
			t.Errorf("rule %d is %s of %q, %v", i, r, r.Text, r.Err)
		}
	}
	if unread != 6 {
		t.Errorf("%d rules weren't parsed, want 6", unread)
	}
	ld, err := s.Ruleset(nil).Expand("", nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(ld.Filter) != 7 || len(ld.Nat) != 0 {
		t.Errorf("loaded %q and %q", ld.ShowRules(), ld.ShowNat())
	}
	// A stand-in that decided can be identified by its text.
	if got := ld.Filter[1].String(); got != s.Rules[1].String() {
		t.Errorf("a loaded stand-in is %s", got)
	}
}

func TestParseShownVerbose(t *testing.T) {
	s := ParseShown(sampleVerbose)
	if len(s.Rules) != 2 || len(s.Unknown) != 0 {
		t.Fatalf("got %+v", s)
	}
	r := s.Rules[1]
	if r.Number != 0 || r.Evaluations != 9 || r.Packets != 8 || r.Bytes != 7 || r.States != 6 {
		t.Errorf("counters %+v", r)
	}
	if got := r.String(); got != "pass in from <t> to (en0:network) flags S/SA keep state" {
		t.Errorf("rule %s", got)
	}
}

func TestParseShownNested(t *testing.T) {
	s := ParseShown(sampleNested)
	if len(s.Rules) != 2 || len(s.Unknown) != 0 {
		t.Fatalf("got %+v", s)
	}
	ld, err := s.Ruleset(nil).Expand("", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := show(ld) + "\n"; got != sampleNested {
		t.Errorf("shown again:\n%s", got)
	}
}

func TestShownRulesetSortsSections(t *testing.T) {
	rules := ParseShown("scrub in all fragment reassemble\npass all no state\n")
	nat := ParseShown("nat on en0 inet all -> 192.0.2.1\n")
	rs := rules.Ruleset(nat)
	if err := rs.Validate(); err != nil {
		t.Fatal(err)
	}
	want := "scrub in all fragment reassemble\nnat on en0 inet all -> 192.0.2.1\npass all no state\n"
	if rs.String() != want {
		t.Errorf("got %s", rs)
	}
}

const (
	sampleTables  = "bruteforce\npeers\n"
	sampleTablesV = "c-a-r-\tlan\tcom.apple/x\n-pa---\tpeers\n\tAddresses:   2\n"
	sampleEntries = "   10.0.0.0/8\n  !10.1.0.0/16\n   2001:db8::1\n\tCleared:     Thu Jan  1 00:00:00 1970\n" +
		"\tIn/Block:    [ Packets: 0                  Bytes: 0                  ]\n"
	sampleInfo = `Status: Enabled for 1 days 02:03:04           Debug: Urgent

Hostid:   0x12345678
Checksum: 0x00

State Table                          Total             Rate
  current entries                       17
  searches                          123456            1.2/s
Counters
  match                               4711            0.1/s
  bad-offset                             0            0.0/s
`
	sampleReferences = "TOKENS:\nPID      Process Name                 TOKEN                    TIMESTAMP\n" +
		"4063     pfctl                        15053025338191571182     0 days 00:00:07\n" +
		"12       a b                          1     3 days 01:00:00\n"
	sampleStates = `ALL tcp 192.0.2.7:49152 -> 203.0.113.5:443       ESTABLISHED:ESTABLISHED
   [100 + 65535] wscale 6  [200 + 65535] wscale 7
   age 00:01:05, expires in 23:59:59, 10:9 pkts, 1000:900 bytes, anchor 3, rule 5
   id: 00000000deadbeef creatorid: 00000001
en0 udp 100.64.0.9:5000 -> 192.0.2.7:50001 -> 1.1.1.1:53       MULTIPLE:SINGLE
utun4 ipv6-icmp fd00::1[77] <- fd00::9[77]       0:0
ALL icmp ff02::16[0] <- ::[0]       0:0
ALL gre 10.0.0.1 <- 10.0.0.2       SINGLE:NO_TRAFFIC
`
)

var outputSamples = []string{sampleTables, sampleTablesV, sampleEntries, sampleInfo, sampleReferences, sampleStates,
	"No pf starter references held\n", "  com.apple\n  com.apple/200.AirDrop\n", "pf enabled\nToken : 123\n",
	"Status: Disabled                              Debug: Urgent\n"}

func TestParseTables(t *testing.T) {
	if got := ParseTables(sampleTables); !reflect.DeepEqual(got, []ShownTable{{Name: "bruteforce"}, {Name: "peers"}}) {
		t.Errorf("got %+v", got)
	}
	want := []ShownTable{
		{Name: "lan", Anchor: "com.apple/x", Const: true, Referenced: true, Flags: "c-a-r-"},
		{Name: "peers", Persist: true, Flags: "-pa---"},
	}
	if got := ParseTables(sampleTablesV); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}

func TestParseTableEntries(t *testing.T) {
	got, err := ParseTableEntries(sampleEntries)
	if err != nil {
		t.Fatal(err)
	}
	table := &Table{Name: "t", Addrs: got, HasAddrs: true}
	if s := table.String(); s != "table <t> { 10.0.0.0/8, ! 10.1.0.0/16, 2001:db8::1 }" {
		t.Errorf("got %s", s)
	}
	for _, bad := range []string{"10.0.0.256\n", "x\n", "10.0.0.0/33\n", "10.0.0.0/-1\n"} {
		if _, err := ParseTableEntries(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}

func TestParseAnchors(t *testing.T) {
	got := ParseAnchors("  com.apple\n  com.apple/200.AirDrop\n\n")
	if !reflect.DeepEqual(got, []string{"com.apple", "com.apple/200.AirDrop"}) {
		t.Errorf("got %q", got)
	}
}

func TestParseInfo(t *testing.T) {
	info, err := ParseInfo(sampleInfo)
	if err != nil {
		t.Fatal(err)
	}
	want := &Info{Enabled: true, For: 26*time.Hour + 3*time.Minute + 4*time.Second, Debug: "Urgent",
		HostID: "0x12345678", Checksum: "0x00", States: 17, Counters: map[string]map[string]uint64{
			"State Table": {"current entries": 17, "searches": 123456},
			"Counters":    {"match": 4711, "bad-offset": 0},
		}}
	if !reflect.DeepEqual(info, want) {
		t.Errorf("got %+v", info)
	}
	if info, err = ParseInfo("Status: Disabled                              Debug: Urgent\n"); err != nil || info.Enabled {
		t.Errorf("disabled: %+v, %v", info, err)
	}
	for _, bad := range []string{"", "Status: Perhaps\n", "Status: Enabled for ever Debug: Loud\n"} {
		if _, err := ParseInfo(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}

func TestParseReferences(t *testing.T) {
	got, err := ParseReferences(sampleReferences)
	want := []Reference{
		{PID: 4063, Process: "pfctl", Token: 15053025338191571182, Age: 7 * time.Second},
		{PID: 12, Process: "a b", Token: 1, Age: 73 * time.Hour},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err = ParseReferences("No pf starter references held\n"); err != nil || len(got) != 0 {
		t.Errorf("none: %+v, %v", got, err)
	}
	for _, bad := range []string{"x\n", "1 pfctl 2 0 days\n", "1 pfctl x 0 days 00:00:00\n", "x pfctl 1 0 days 00:00:00\n"} {
		if _, err := ParseReferences(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}

func TestParseToken(t *testing.T) {
	got, err := ParseToken("No ALTQ support in kernel\npf enabled\nToken : 15053025338191571182\n")
	if err != nil || got != 15053025338191571182 {
		t.Errorf("got %d, %v", got, err)
	}
	for _, bad := range []string{"", "pf enabled\n", "Token : x\n"} {
		if _, err := ParseToken(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}

func TestParseStates(t *testing.T) {
	got, err := ParseStates(sampleStates)
	if err != nil {
		t.Fatal(err)
	}
	end := netip.MustParseAddrPort
	want := []ShownState{
		{Interface: "ALL", Proto: "tcp", Direction: Out, Inner: end("192.0.2.7:49152"), Translated: end("192.0.2.7:49152"),
			Outer: end("203.0.113.5:443"), Source: "ESTABLISHED", Destination: "ESTABLISHED",
			Age: 65 * time.Second, Expires: 24*time.Hour - time.Second, Packets: [2]uint64{10, 9}, Bytes: [2]uint64{1000, 900},
			Anchor: 3, Rule: 5, More: []string{"[100 + 65535] wscale 6  [200 + 65535] wscale 7",
				"id: 00000000deadbeef creatorid: 00000001"}},
		{Interface: "en0", Proto: "udp", Direction: Out, Inner: end("100.64.0.9:5000"), Translated: end("192.0.2.7:50001"),
			Outer: end("1.1.1.1:53"), Source: "MULTIPLE", Destination: "SINGLE", Anchor: -1, Rule: -1},
		{Interface: "utun4", Proto: "ipv6-icmp", Direction: In, Inner: end("[fd00::1]:77"), Translated: end("[fd00::1]:77"),
			Outer: end("[fd00::9]:77"), Source: "0", Destination: "0", Anchor: -1, Rule: -1},
		{Interface: "ALL", Proto: "icmp", Direction: In, Inner: end("[ff02::16]:0"), Translated: end("[ff02::16]:0"),
			Outer: end("[::]:0"), Source: "0", Destination: "0", Anchor: -1, Rule: -1},
		{Interface: "ALL", Proto: "gre", Direction: In, Inner: end("10.0.0.1:0"), Translated: end("10.0.0.1:0"),
			Outer: end("10.0.0.2:0"), Source: "SINGLE", Destination: "NO_TRAFFIC", Anchor: -1, Rule: -1},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, bad := range []string{"x\n", "   age 1\n", "ALL tcp a -> b  X:Y\n", "ALL tcp 1.1.1.1:1 -> 2.2.2.2:2 <- 3.3.3.3:3 A:B\n",
		"ALL tcp 1.1.1.1:1 -> 2.2.2.2:2 AB\n", "ALL tcp 1.1.1.1:99999 -> 2.2.2.2:2 A:B\n"} {
		if _, err := ParseStates(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}
