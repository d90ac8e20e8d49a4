package darwintest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// An Engine is the packet filter behind a [PF]: the kernel's part, without pfctl's
// command line. "" as an anchor is the main ruleset. Tests use pfsim for it.
type Engine interface {
	// SetEnabled enables or disables packet filtering.
	SetEnabled(on bool)
	// Load replaces the anchor's contents, or changes nothing and returns a
	// *SyntaxError or darwin.ErrBusy.
	Load(anchor, text string) error
	// Flush empties the anchor. It reports false if the anchor doesn't exist.
	Flush(anchor string) bool
	// Rules and NAT return the anchor's filter and translation rules. They report
	// false if the anchor doesn't exist.
	Rules(anchor string) ([]pfsim.CountedRule, bool)
	NAT(anchor string) ([]pfsim.CountedRule, bool)
	// Anchors returns the full paths of the anchors directly below anchor. It reports
	// false if anchor doesn't exist.
	Anchors(anchor string) ([]string, bool)
	// Tables returns the entries of the anchor's tables, by the tables' names. It reports
	// false if the anchor doesn't exist.
	Tables(anchor string) (map[string][]string, bool)
	// AddToTable adds entries, DeleteFromTable removes them, and ReplaceTable makes
	// them the only ones. The first and the last make the table if it doesn't exist; the
	// error of DeleteFromTable then is pfsim.ErrNoTable.
	AddToTable(anchor, table string, entries []pfconf.Address) error
	DeleteFromTable(anchor, table string, entries []pfconf.Address) error
	ReplaceTable(anchor, table string, entries []pfconf.Address) error
	// TestTable reports whether an address is in a table.
	TestTable(anchor, table string, a netip.Addr) (bool, error)
	// Kill ends the states from src to dst and returns their number. The zero Prefix for
	// dst means any.
	Kill(src, dst netip.Prefix) int
	// States returns all states.
	States() []pfsim.State
	// Checksum returns the digest of the main ruleset as it was last loaded, in
	// hexadecimal.
	Checksum() string
	// Counters returns the totals of `pfctl -s info` by their names.
	Counters() map[string]uint64
	// Interfaces returns the interfaces by name, true for those with set skip.
	Interfaces() map[string]bool
}

// A SyntaxError says that pfctl refuses a ruleset because of a line, counted from 1.
type SyntaxError struct{ Line int }

// Error returns the line that pfctl prints.
func (e *SyntaxError) Error() string { return fmt.Sprintf("stdin:%d: syntax error", e.Line) }

// A PF is pfctl(8) in front of an Engine. It is a [darwin.Runner] that takes pfctl's
// command line, keeps the tokens of -E, and prints what pfctl prints, on the same output
// and with the same exit status. That differs from other programs: notices on every call,
// results such as the token on standard error, exit status 0 for an anchor that doesn't
// exist.
type PF struct {
	// Engine executes the commands. Required.
	Engine Engine
	// NextToken returns a new token for each -E. Required.
	NextToken func() darwin.Token

	mu      sync.Mutex
	tokens  []pfconf.Reference   // held, the newest first
	untoken bool                 // enabled by -e, which takes a reference without a token
	taken   map[uint64]time.Time // when each token was made
	enabled bool
	since   time.Time // of the last change of enabled; zero: none since the boot
	pid     int       // commands so far, from which PIDs are made
	calls   []string
	misuse  []string
}

// Misuse returns the commands that were run though a program that shares the packet
// filter with others must never run them: -d, -e, and -F or -f for the main ruleset.
func (f *PF) Misuse() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.misuse)
}

// Calls returns the commands since the last Calls, each as one line.
func (f *PF) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

// Enabled reports whether the packet filter is enabled.
func (f *PF) Enabled() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.enabled
}

// Tokens returns the tokens that are held, the newest first.
func (f *PF) Tokens() []pfconf.Reference {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.tokens)
}

// Boot voids all tokens and disables the packet filter, as a reboot does. The caller has
// to empty the engine.
func (f *PF) Boot() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tokens, f.untoken = nil, false
	f.set(false)
	f.since = time.Time{}
}

// Disable does what another program's `pfctl -d` does: it disables the packet filter and
// voids all tokens.
func (f *PF) Disable() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tokens, f.untoken = nil, false
	f.set(false)
}

// set enables or disables the packet filter and records the time of a change (pf_start
// and pf_stop of xnu bsd/net/pf_ioctl.c). The lock is held.
func (f *PF) set(on bool) {
	if on != f.enabled {
		f.since = time.Now()
	}
	f.enabled = on
	f.Engine.SetEnabled(on)
}

// pfctlReply has the output and exit status of pfctl.
type pfctlReply struct {
	stdout, stderr string
	status         int
}

// Run implements darwin.Runner.
func (f *PF) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, -1, err
	}
	if path != "/sbin/pfctl" {
		return nil, nil, -1, &exec.Error{Name: path, Err: exec.ErrNotFound}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	line := strings.Join(append([]string{"pfctl"}, args...), " ")
	f.calls = append(f.calls, line)
	f.pid++
	c, err := parsePfctl(args)
	if c.enable || c.disable || c.anchor == "" && (c.flush != "" || c.file != "") {
		f.misuse = append(f.misuse, line)
	}
	r := pfctlReply{stderr: "usage: pfctl [-AdeEghmNnOqRrvXz]\n", status: 1}
	if err == nil {
		r = f.do(c, string(stdin))
		r.stderr = noise + r.stderr
	}
	return []byte(r.stdout), []byte(r.stderr), r.status, nil
}

// pfctlCommand is a parsed command line.
type pfctlCommand struct {
	anchor, table, token, file string // -a, -t, -X, -f
	show, flush, tableCommand  string // -s, -F, -T
	iface                      string // -i
	enable, disable, reference bool   // -e, -d, -E
	verbose                    bool   // -v
	kill                       []string
	words                      []string // arguments behind the options
}

// parsePfctl parses a command line by the options of macOS's pfctl, as far as package
// darwin uses them.
func parsePfctl(args []string) (c pfctlCommand, err error) {
	for len(args) > 0 {
		option := args[0]
		if !strings.HasPrefix(option, "-") && c.tableCommand != "" {
			c.words = args
			return c, nil
		}
		args = args[1:]
		flag := map[string]*bool{"-e": &c.enable, "-d": &c.disable, "-E": &c.reference, "-v": &c.verbose}[option]
		if flag != nil {
			*flag = true
			continue
		}
		value := map[string]*string{"-a": &c.anchor, "-t": &c.table, "-X": &c.token, "-f": &c.file,
			"-s": &c.show, "-i": &c.iface, "-F": &c.flush, "-T": &c.tableCommand}[option]
		switch {
		case len(args) == 0 || option != "-k" && value == nil:
			return c, fmt.Errorf("option %q", option)
		case option == "-k":
			c.kill = append(c.kill, args[0])
		default:
			*value = args[0]
		}
		args = args[1:]
	}
	return c, nil
}

// do executes a command, by the first of its options in this order.
func (f *PF) do(c pfctlCommand, stdin string) pfctlReply {
	switch {
	case c.disable:
		f.tokens, f.untoken = nil, false
		f.set(false)
		return pfctlReply{stderr: "pf disabled\n"}
	case c.enable:
		return f.enable()
	case c.token != "":
		return f.release(c.token)
	case c.reference:
		return f.reference()
	case c.show != "":
		return f.show(c)
	case c.flush != "":
		return f.flush(c)
	case len(c.kill) > 0:
		return f.kill(c.kill)
	case c.tableCommand != "":
		return f.table(c, stdin)
	case c.file == "-":
		return f.load(c.anchor, stdin)
	}
	return pfctlReply{status: 1}
}

// enable is pfctl -e.
func (f *PF) enable() pfctlReply {
	if f.enabled {
		return pfctlReply{stderr: "pfctl: pf already enabled\n", status: 1}
	}
	f.untoken = true
	f.set(true)
	return pfctlReply{stderr: "pf enabled\n"}
}

// reference is pfctl -E.
func (f *PF) reference() pfctlReply {
	return pfctlReply{stderr: fmt.Sprintf("pf enabled\nToken : %d\n", f.hold("pfctl"))}
}

// Hold makes a token for another process, as a daemon of macOS does without pfctl
// (DIOCSTARTREF), and enables the packet filter.
func (f *PF) Hold(process string) darwin.Token {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hold(process)
}

// hold is Hold with the lock held.
func (f *PF) hold(process string) darwin.Token {
	t := f.NextToken()
	f.tokens = slices.Insert(f.tokens, 0, pfconf.Reference{PID: 4000 + f.pid, Process: process, Token: uint64(t)})
	if f.taken == nil {
		f.taken = map[uint64]time.Time{}
	}
	f.taken[uint64(t)] = time.Now()
	f.set(true)
	return t
}

// release is pfctl -X. The packet filter stays enabled while there is another reference.
func (f *PF) release(text string) pfctlReply {
	if !f.enabled {
		return pfctlReply{stderr: "pfctl: pf not enabled\n", status: 1}
	}
	n := slices.IndexFunc(f.tokens, func(r pfconf.Reference) bool { return strconv.FormatUint(r.Token, 10) == text })
	if n < 0 {
		return pfctlReply{stderr: "pfctl: pf: token invalid\n", status: 1}
	}
	f.tokens = slices.Delete(f.tokens, n, n+1)
	if left := len(f.tokens); left > 0 || f.untoken {
		return pfctlReply{stderr: fmt.Sprintf("disable request successful. %d more pf enable reference(s) remaining, pf still enabled.\n", max(left, 1))}
	}
	f.set(false)
	return pfctlReply{stderr: "pf disabled\n"}
}

// show is pfctl -s. For an anchor that doesn't exist the exit status is 0 all the same.
func (f *PF) show(c pfctlCommand) pfctlReply {
	missing := pfctlReply{stderr: missingAnchor}
	switch c.show {
	case "all":
		return f.showAll(c)
	case "info":
		return pfctlReply{stdout: f.info(c.verbose)}
	case "states":
		return pfctlReply{stdout: f.states(c)}
	case "References":
		return pfctlReply{stdout: f.references()}
	case "Interfaces":
		return pfctlReply{stdout: f.interfaces()}
	case "rules":
		if rules, ok := f.Engine.Rules(c.anchor); ok {
			return pfctlReply{stdout: showRules(rules, c.verbose)}
		}
		return missing
	case "nat":
		if rules, ok := f.Engine.NAT(c.anchor); ok {
			return pfctlReply{stdout: showRules(rules, c.verbose)}
		}
		return missing
	case "Anchors":
		names, ok := f.Engine.Anchors(c.anchor)
		switch {
		case !ok:
			return pfctlReply{stderr: fmt.Sprintf("Anchor '%s' not found.\n", c.anchor)}
		case c.verbose:
			names = f.descend(names)
		}
		return pfctlReply{stdout: indented(names)}
	case "Tables":
		tables, ok := f.Engine.Tables(c.anchor)
		if !ok {
			return pfctlReply{stderr: "pfctl: Anchor or Ruleset does not exist.\n"}
		}
		var out strings.Builder
		for _, name := range sortedKeys(tables) {
			out.WriteString(shownTable(name, c))
		}
		return pfctlReply{stdout: out.String()}
	}
	return pfctlReply{stderr: fmt.Sprintf("pfctl: Unknown show modifier '%s'\n", c.show), status: 1}
}

// descend returns each anchor followed by those below it, the order of -v
// (pfctl_show_anchors in pfctl.c).
func (f *PF) descend(names []string) []string {
	var all []string
	for _, name := range names {
		below, _ := f.Engine.Anchors(name)
		all = append(append(all, name), f.descend(below)...)
	}
	return all
}

// references returns the output of pfctl -s References.
func (f *PF) references() string {
	if len(f.tokens) == 0 {
		return "No pf starter references held\n"
	}
	var b strings.Builder
	b.WriteString("TOKENS:\nPID      Process Name                 TOKEN                    TIMESTAMP\n")
	for _, r := range f.tokens {
		fmt.Fprintf(&b, "%-8d %-28s %-24d %s\n", r.PID, r.Process, r.Token, daysAndClock(time.Since(f.taken[r.Token])))
	}
	return b.String()
}

// interfaces returns the output of pfctl -vv -s Interfaces, with the statistics of an
// interface without traffic.
func (f *PF) interfaces() string {
	var b strings.Builder
	skipped := f.Engine.Interfaces()
	for _, name := range sortedKeys(skipped) {
		b.WriteString(name)
		if skipped[name] {
			b.WriteString(" (skip)")
		}
		b.WriteString("\n\tCleared:     Thu Jan  1 00:00:00 1970\n\tReferences:  [ States:  0                  Rules: 0                  ]\n")
	}
	return b.String()
}

// flush is pfctl -F all, of an anchor or of everything.
func (f *PF) flush(c pfctlCommand) pfctlReply {
	states := len(f.Engine.States())
	if !f.Engine.Flush(c.anchor) {
		return pfctlReply{stderr: missingAnchor, status: 1}
	}
	r := pfctlReply{stderr: "rules cleared\nnat cleared\ndummynet cleared\n0 tables deleted.\n"}
	if c.anchor == "" {
		r.stderr += fmt.Sprintf("%d states cleared\nsource tracking entries cleared\npf: statistics cleared\npf: interface flags reset\n", states)
	}
	return r
}

// kill is pfctl -k with one host or network, or two.
func (f *PF) kill(hosts []string) pfctlReply {
	var p [2]netip.Prefix
	if len(hosts) > 2 {
		return pfctlReply{status: 1}
	}
	for i, h := range hosts {
		var err error
		if p[i], err = parseHost(h); err != nil {
			return pfctlReply{stderr: "pfctl: getaddrinfo: nodename nor servname provided, or not known\n", status: 1}
		}
	}
	n := f.Engine.Kill(p[0], p[1])
	// The kernel returns the number in a field of 8 bits (psk_af of struct
	// pfioc_state_kill).
	return pfctlReply{stderr: fmt.Sprintf("killed %d states from 1 sources and %d destinations\n", n%256, len(hosts)-1)}
}

// parseHost reads an address or a network. Names don't resolve here.
func parseHost(h string) (netip.Prefix, error) {
	if strings.Contains(h, "/") {
		return netip.ParsePrefix(h)
	}
	a, err := netip.ParseAddr(h)
	if err != nil {
		return netip.Prefix{}, err
	}
	return a.Prefix(a.BitLen())
}

// table is pfctl -T, with the messages of pfctl_table.c.
func (f *PF) table(c pfctlCommand, stdin string) pfctlReply {
	words := c.words
	if c.file == "-" {
		words = append(words, strings.Fields(stdin)...)
	}
	var entries []pfconf.Address
	for _, w := range words {
		e, err := parseEntry(w)
		if err != nil {
			return pfctlReply{stderr: fmt.Sprintf("no IP address found for %s\npfctl: cannot load table entries\n", w), status: 1}
		}
		entries = append(entries, e)
	}
	before, exists := f.entries(c)
	failed := func(err error) pfctlReply {
		text := err.Error()
		if errors.Is(err, pfsim.ErrNoTable) {
			text = "Table does not exist"
		}
		return pfctlReply{stderr: "pfctl: " + text + ".\n", status: 1}
	}
	var made string
	if !exists {
		made = "1 table created.\n"
	}
	switch c.tableCommand {
	case "show":
		if !exists {
			return failed(pfsim.ErrNoTable)
		}
		return pfctlReply{stdout: indented(before)}
	case "test":
		return f.testTable(c, entries, failed)
	case "add":
		if err := f.Engine.AddToTable(c.anchor, c.table, entries); err != nil {
			return failed(err)
		}
		added, _, _ := f.changed(c, before)
		return pfctlReply{stderr: fmt.Sprintf("%s%d/%d addresses added.\n", made, added, len(entries))}
	case "delete":
		if err := f.Engine.DeleteFromTable(c.anchor, c.table, entries); err != nil {
			return failed(err)
		}
		_, deleted, _ := f.changed(c, before)
		return pfctlReply{stderr: fmt.Sprintf("%d/%d addresses deleted.\n", deleted, len(entries))}
	case "replace":
		if err := f.Engine.ReplaceTable(c.anchor, c.table, entries); err != nil {
			return failed(err)
		}
		return pfctlReply{stderr: made + replaced(f.changed(c, before))}
	}
	return pfctlReply{stderr: "usage: pfctl -T command\n", status: 1}
}

// testTable is pfctl -T test. Its exit status is 2 if an address isn't in the table.
func (f *PF) testTable(c pfctlCommand, entries []pfconf.Address, failed func(error) pfctlReply) pfctlReply {
	matches := 0
	for _, e := range entries {
		in, err := f.Engine.TestTable(c.anchor, c.table, e.Prefix.Addr())
		if err != nil {
			return failed(err)
		}
		if in {
			matches++
		}
	}
	r := pfctlReply{stderr: fmt.Sprintf("%d/%d addresses match.\n", matches, len(entries))}
	if matches < len(entries) {
		r.status = 2
	}
	return r
}

// entries returns the entries of the command's table, and whether the table exists.
func (f *PF) entries(c pfctlCommand) ([]string, bool) {
	tables, _ := f.Engine.Tables(c.anchor)
	entries, ok := tables[c.table]
	return entries, ok
}

// changed counts the entries of a table that were added, deleted, or changed between
// negated and not, compared with before.
func (f *PF) changed(c pfctlCommand, before []string) (added, deleted, flipped int) {
	now, _ := f.entries(c)
	was := map[string]bool{}
	for _, e := range before {
		was[e] = true
	}
	is := map[string]bool{}
	for _, e := range now {
		is[e] = true
		switch {
		case was[e]:
		case was[negated(e)]:
			flipped++
		default:
			added++
		}
	}
	for _, e := range before {
		if !is[e] && !is[negated(e)] {
			deleted++
		}
	}
	return added, deleted, flipped
}

// negated returns the entry with the opposite negation.
func negated(entry string) string {
	if plain, ok := strings.CutPrefix(entry, "!"); ok {
		return plain
	}
	return "!" + entry
}

// replaced returns the message of pfctl -T replace.
func replaced(added, deleted, flipped int) string {
	var b strings.Builder
	for _, n := range []struct {
		count int
		what  string
	}{{added, "added"}, {deleted, "deleted"}, {flipped, "changed"}} {
		if n.count > 0 {
			fmt.Fprintf(&b, "%d addresses %s.\n", n.count, n.what)
		}
	}
	if b.Len() == 0 {
		return "no changes.\n"
	}
	return b.String()
}

// parseEntry reads a table's entry as pfctl does: each ! before it negates it once more.
func parseEntry(s string) (pfconf.Address, error) {
	host := strings.TrimLeft(s, "!")
	p, err := parseHost(host)
	if err != nil {
		return pfconf.Address{}, err
	}
	return pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: p.Masked(), Not: (len(s)-len(host))%2 == 1}, nil
}

// Notices on standard error: pfctl prints noise on every run without -q, and loadNoise on
// every -f, also for an anchor.
const (
	noise     = "No ALTQ support in kernel\nALTQ related functions disabled\n"
	loadNoise = "pfctl: Use of -f option, could result in flushing of rules\n" +
		"present in the main ruleset added by the system at startup.\nSee /etc/pf.conf for further details.\n\n"
)

// load is pfctl -f -, which reads the rules from standard input.
func (f *PF) load(anchor, text string) pfctlReply {
	err := f.Engine.Load(anchor, text)
	var syntax *SyntaxError
	switch {
	case err == nil:
		return pfctlReply{stderr: loadNoise}
	case errors.As(err, &syntax):
		return pfctlReply{stderr: loadNoise + syntax.Error() + "\npfctl: Syntax error in config file: pf rules not loaded\n", status: 1}
	case errors.Is(err, darwin.ErrBusy):
		return pfctlReply{stderr: loadNoise + "stdin:1: cannot define table t: Resource busy\npfctl: Syntax error in config file: pf rules not loaded\n", status: 1}
	}
	return pfctlReply{stderr: loadNoise + "pfctl: " + err.Error() + "\n", status: 1}
}

// indented returns a list as pfctl prints anchors and addresses.
func indented(list []string) string {
	var b strings.Builder
	for _, s := range list {
		b.WriteString("   " + s + "\n")
	}
	return b.String()
}

// sortedKeys returns the keys of a map, sorted.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
