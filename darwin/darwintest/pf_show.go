package darwintest

import (
	"fmt"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// showRules returns rules as pfctl prints them, with -v each followed by its counters
// (pfctl_print_rule_counters in pfctl.c).
func showRules(rules []pfsim.CountedRule, verbose bool) string {
	var b strings.Builder
	for _, r := range rules {
		b.WriteString(r.Text + "\n")
		if verbose {
			fmt.Fprintf(&b, "%s\n  [ Inserted: uid 0 pid 4000 ]\n", r.RuleCounters)
		}
	}
	return b.String()
}

// showAll is `pfctl [-a ANCHOR] [-i IF] [-v] -s all`: sections with titles, in the
// order of pfctl.c, with DUMMYNET RULES where OpenBSD's has ALTQ. Empty sections of
// rules, states and tables are left out with their titles. Rules and tables are those of
// the anchor, states those of the interface; all else is of the whole packet filter.
func (f *PF) showAll(c pfctlCommand) pfctlReply {
	var r pfctlReply
	nat, hasNAT := f.Engine.NAT(c.anchor)
	rules, hasRules := f.Engine.Rules(c.anchor)
	for _, has := range []bool{hasNAT, hasRules} {
		if !has {
			r.stderr += missingAnchor
		}
	}
	var dummynet []pfsim.CountedRule
	if c.anchor == "" {
		dummynet = []pfsim.CountedRule{{Text: `dummynet-anchor "com.apple/*" all`}}
	}
	first := true
	section := func(title, body string, always bool) {
		if body == "" && !always {
			return
		}
		if !first {
			r.stdout += "\n"
		}
		first = false
		r.stdout += title + ":\n" + body
	}
	section("TRANSLATION RULES", showRules(nat, c.verbose), false)
	section("FILTER RULES", showRules(rules, c.verbose), false)
	section("DUMMYNET RULES", showRules(dummynet, c.verbose), false)
	section("STATES", f.states(c), false)
	section("INFO", f.info(c.verbose), true)
	section("TIMEOUTS", timeouts, true)
	section("LIMITS", limits, true)
	tables, _ := f.Engine.Tables(c.anchor)
	var names strings.Builder
	for _, name := range sortedKeys(tables) {
		names.WriteString(shownTable(name, c))
	}
	section("TABLES", names.String(), false)
	section("OS FINGERPRINTS", "696 fingerprints loaded\n", true)
	return r
}

// missingAnchor is the message of pfctl for an anchor that doesn't exist.
const missingAnchor = "pfctl: DIOCGETRULES: Invalid argument\n"

// shownTable returns a table's line: its name, with -v its flags before and its anchor
// behind it (print_table in pfctl_table.c).
func shownTable(name string, c pfctlCommand) string {
	switch {
	case !c.verbose:
		return name + "\n"
	case c.anchor == "":
		return "--a-r--\t" + name + "\n"
	}
	return "--a-r--\t" + name + "\t" + c.anchor + "\n"
}

// states returns the output of pfctl -s states. With -i it has the states that are bound
// to that interface; floating ones belong to an interface called ALL.
func (f *PF) states(c pfctlCommand) string {
	var b strings.Builder
	for _, s := range f.Engine.States() {
		if on := s.Interface; c.iface != "" && on != c.iface && (on != "" || c.iface != "ALL") {
			continue
		}
		b.WriteString(s.String() + "\n")
		if c.verbose {
			fmt.Fprintf(&b, "   age %s, expires in %s, 1:1 pkts, 64:64 bytes\n", clock(s.Age), clock(s.Expires))
		}
	}
	return b.String()
}

// clock returns a duration as hours, minutes and seconds, 03:22:04.
func clock(d time.Duration) string {
	s := int(d / time.Second)
	return fmt.Sprintf("%.2d:%.2d:%.2d", s/3600, s/60%60, s%60)
}

// daysAndClock returns a duration as 8 days 03:22:04.
func daysAndClock(d time.Duration) string {
	const day = 24 * time.Hour
	return fmt.Sprintf("%d days %s", d/day, clock(d%day))
}

// infoCounters are the names of the status's counters in their order (PFRES_NAMES of xnu
// bsd/net/pfvar.h).
var infoCounters = []string{"match", "bad-offset", "fragment", "short", "normalize", "memory", "bad-timestamp", "congestion", "ip-option",
	"proto-cksum", "state-mismatch", "state-insert", "state-limit", "src-limit", "synproxy", "dummynet", "invalid-port"}

// info returns the output of pfctl -s info (print_status in pfctl_parser.c).
func (f *PF) info(verbose bool) string {
	status, since := "Status: Disabled", time.Since(f.since)
	if f.enabled {
		status = "Status: Enabled"
	}
	if !f.since.IsZero() {
		status += " for " + daysAndClock(since)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-44s%15s\n\n", status, "Debug: Urgent")
	if verbose {
		fmt.Fprintf(&b, "Hostid:   0x00000000\nChecksum: 0x%s\n\n", f.Engine.Checksum())
	}
	counters := f.Engine.Counters()
	row := func(name string, n uint64) {
		if seconds := since.Seconds(); f.enabled && seconds >= 1 {
			fmt.Fprintf(&b, "  %-25s %14d %14.1f/s\n", name, n, float64(n)/seconds)
			return
		}
		fmt.Fprintf(&b, "  %-25s %14d %14s\n", name, n, "")
	}
	fmt.Fprintf(&b, "%-27s %14s %16s\n", "State Table", "Total", "Rate")
	fmt.Fprintf(&b, "  %-25s %14d %14s\n", "current entries", len(f.Engine.States()), "")
	for _, name := range []string{"searches", "inserts", "removals"} {
		row(name, counters[name])
	}
	if verbose {
		b.WriteString("Source Tracking Table\n")
		fmt.Fprintf(&b, "  %-25s %14d %14s\n", "current entries", 0, "")
	}
	b.WriteString("Counters\n")
	for _, name := range infoCounters {
		row(name, counters[name])
	}
	return b.String()
}

// timeouts and limits are the output of pfctl -s timeouts and -s memory with the
// defaults.
const (
	timeouts = `tcp.first                   120s
tcp.opening                  30s
tcp.established           86400s
tcp.closing                 900s
tcp.finwait                  45s
tcp.closed                   90s
tcp.tsdiff                   60s
udp.first                    60s
udp.single                   30s
udp.multiple                 60s
icmp.first                   20s
icmp.error                   10s
grev1.first                 120s
grev1.initiating             30s
grev1.estblished           1800s
esp.first                   120s
esp.estblished              900s
other.first                  60s
other.single                 30s
other.multiple               60s
frag                         30s
interval                     10s
adaptive.start             6000 states
adaptive.end              12000 states
src.track                     0s
`
	limits = `states        hard limit    10000
app-states    hard limit    10000
src-nodes     hard limit    10000
frags         hard limit     5000
tables        hard limit     1000
table-entries hard limit   200000
`
)
