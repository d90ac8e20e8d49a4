package darwin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// pfctlPath is the packet filter's control program. Its ioctls are private and
// changed with macOS 12 (xnu-8019 grew struct pf_status); the program goes with
// the kernel.
const pfctlPath = "/sbin/pfctl"

// Errors of PF, for errors.Is.
var (
	// ErrNotEnabled: a token was given back while the packet filter is off. All
	// tokens are void then: after a reboot, or after a `pfctl -d`.
	ErrNotEnabled = errors.New("packet filter is not enabled")
	// ErrTokenInvalid: the token isn't held (any more).
	ErrTokenInvalid = errors.New("token is not held")
	// ErrBusy: a table that the text declares is in use (tuist#11425); nothing
	// changed. Loading once more, or replacing the table's addresses, helps.
	ErrBusy = errors.New("resource busy")
	// ErrNoTable: there is no such table, or no such anchor.
	ErrNoTable = errors.New("table does not exist")
)

// A PF drives the packet filter through pfctl(8), one command at a time. It works
// on anchors below the main ruleset only. What it never runs: anything that reads
// or writes /etc/pf.conf or loads the main ruleset, which drops the anchor calls
// that Internet Sharing and other software have inserted; -F without -a; -d,
// which turns the packet filter off for all programs and voids all tokens; -e.
type PF struct{ r Runner }

// NewPF returns a PF.
func NewPF(r Runner) *PF { return &PF{&serial{r: r}} }

// A Token is one reference that keeps the packet filter on (DIOCSTARTREF, xnu
// bsd/net/pf_ioctl.c). It outlives the process and dies at reboot, so keep it on
// disk with the boot session's id.
type Token uint64

// Enable turns the packet filter on, if it is off, and returns a token that keeps
// it on until Release. Each call takes another token.
func (p *PF) Enable(ctx context.Context) (Token, error) {
	// Not with -q, which suppresses the token and so leaks it.
	_, stderr, err := p.run(ctx, nil, "-E")
	if err != nil {
		return 0, fmt.Errorf("enable packet filter: %w", err)
	}
	t, err := pfconf.ParseToken(string(stderr))
	if err != nil {
		return 0, fmt.Errorf("enable packet filter: %w", err)
	}
	return Token(t), nil
}

// Release gives a token back; the packet filter goes off with the last one. The
// error of a token that isn't held is ErrTokenInvalid, or ErrNotEnabled while the
// packet filter is off.
func (p *PF) Release(ctx context.Context, t Token) error {
	_, _, err := p.run(ctx, nil, "-X", strconv.FormatUint(uint64(t), 10))
	var ce *CommandError
	if errors.As(err, &ce) {
		switch {
		case strings.Contains(ce.Message, "pf not enabled"):
			err = ErrNotEnabled
		case strings.Contains(ce.Message, "token invalid"):
			err = ErrTokenInvalid
		}
	}
	if err != nil {
		return fmt.Errorf("release packet filter: %w", err)
	}
	return nil
}

// Load replaces everything in the anchor (translation, filter, scrub and the
// tables that rules declares) by one transaction: either all of rules is in
// force, or nothing changed. `set` lines are ignored by pfctl in an anchor.
// Running states go on, see Kill.
func (p *PF) Load(ctx context.Context, anchor, rules string) error {
	if err := checkAnchor(anchor); err != nil {
		return fmt.Errorf("load anchor %q: %w", anchor, err)
	}
	_, stderr, err := p.run(ctx, []byte(rules), "-a", anchor, "-f", "-")
	if err == nil {
		return nil
	}
	if strings.Contains(string(stderr), "Resource busy") {
		err = ErrBusy
	}
	return fmt.Errorf("load anchor %q: %w", anchor, err)
}

// Flush empties the anchor: rules, translation, tables. Its running states go on.
// xnu keeps an empty anchor until reboot.
func (p *PF) Flush(ctx context.Context, anchor string) error {
	if err := checkAnchor(anchor); err != nil {
		return fmt.Errorf("flush anchor %q: %w", anchor, err)
	}
	_, stderr, err := p.run(ctx, nil, "-a", anchor, "-F", "all")
	if err != nil && !saysMissing(stderr) {
		return fmt.Errorf("flush anchor %q: %w", anchor, err)
	}
	return nil
}

// Rules returns what pfctl prints of the anchor's scrub and filter rules and anchor
// calls (`-s rules`), of the main ruleset with "" for the anchor. The text differs
// from what was loaded: pfctl prints each rule in full. [pfconf.EqualShown] compares
// the two. A missing anchor has no rules.
func (p *PF) Rules(ctx context.Context, anchor string) (string, error) {
	return p.show(ctx, anchor, "rules")
}

// NAT returns what pfctl prints of the anchor's translation rules (`-s nat`).
func (p *PF) NAT(ctx context.Context, anchor string) (string, error) {
	return p.show(ctx, anchor, "nat")
}

// Anchors returns the names of the anchors directly below anchor, in full. An
// anchor stays listed after it was flushed: being there is no proof of rules.
func (p *PF) Anchors(ctx context.Context, anchor string) ([]string, error) {
	out, err := p.show(ctx, anchor, "Anchors")
	return pfconf.ParseAnchors(out), err
}

// AllAnchors returns the full names of all anchors, by one process: pfctl -v -s
// Anchors descends. The nameless inline ones are among them, as com.apple/x/_1.
func (p *PF) AllAnchors(ctx context.Context) ([]string, error) {
	stdout, stderr, err := p.run(ctx, nil, "-v", "-s", "Anchors")
	if err == nil {
		err = complaint(stderr)
	}
	if err != nil {
		return nil, fmt.Errorf("show all anchors: %w", err)
	}
	return pfconf.ParseAnchors(string(stdout)), nil
}

// Tables returns the names of the anchor's tables.
func (p *PF) Tables(ctx context.Context, anchor string) ([]string, error) {
	out, err := p.show(ctx, anchor, "Tables")
	var names []string
	for _, t := range pfconf.ParseTables(out) {
		names = append(names, t.Name)
	}
	return names, err
}

// Table returns the entries of a table, of the main ruleset with "" for the anchor.
// The error of one that doesn't exist is ErrNoTable.
func (p *PF) Table(ctx context.Context, anchor, table string) ([]pfconf.Address, error) {
	args, err := tableArgs(anchor, table, "show")
	if err != nil {
		return nil, err
	}
	stdout, stderr, err := p.run(ctx, nil, args...)
	if err == nil {
		err = complaint(stderr)
	}
	if strings.Contains(string(stderr), "Table does not exist") || saysMissing(stderr) {
		err = ErrNoTable
	}
	if err != nil {
		return nil, fmt.Errorf("show table %q of anchor %q: %w", table, anchor, err)
	}
	return pfconf.ParseTableEntries(string(stdout))
}

// ReplaceTable makes entries the whole contents of a table, in one step. pfctl
// makes a table that doesn't exist, persistent. The entries are of the kind
// pfconf.AddrPrefix, and may be negated. States that the table let be made go on.
//
// pf never stores the all-zero host, 0.0.0.0 or :: (its radix tree has that node
// already, xnu bsd/net/radix.c), and says nothing of it.
func (p *PF) ReplaceTable(ctx context.Context, anchor, table string, entries []pfconf.Address) error {
	return p.changeTable(ctx, anchor, table, "replace", entries)
}

// AddToTable adds entries to a table, which pfctl makes, persistent, if it doesn't
// exist. An entry that is in it already stays as it is, negated or not.
func (p *PF) AddToTable(ctx context.Context, anchor, table string, entries []pfconf.Address) error {
	return p.changeTable(ctx, anchor, table, "add", entries)
}

// DeleteFromTable removes entries from a table, a negated one only as such. Those
// that aren't in it are no error; a missing table is one.
func (p *PF) DeleteFromTable(ctx context.Context, anchor, table string, entries []pfconf.Address) error {
	return p.changeTable(ctx, anchor, table, "delete", entries)
}

func (p *PF) changeTable(ctx context.Context, anchor, table, command string, entries []pfconf.Address) error {
	args, err := tableArgs(anchor, table, command)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Kind != pfconf.AddrPrefix || !e.Prefix.IsValid() {
			return fmt.Errorf("%s table %q of anchor %q: entry %+v is no address", command, table, anchor, e)
		}
	}
	text := strings.Join((&pfconf.Table{Addrs: entries}).Entries(), "\n") + "\n"
	// On stdin, since ten thousand addresses don't fit into the arguments.
	if _, _, err := p.run(ctx, []byte(text), append(args, "-f", "-")...); err != nil {
		return fmt.Errorf("%s table %q of anchor %q: %w", command, table, anchor, err)
	}
	return nil
}

// Info tells whether the packet filter is on, and its counters.
func (p *PF) Info(ctx context.Context) (*pfconf.Info, error) {
	out, err := p.show(ctx, "", "info")
	if err != nil {
		return nil, err
	}
	return pfconf.ParseInfo(out)
}

// All returns the anchor's rules and translation rules, with their counters, and the
// packet filter's state, all by one process. A missing anchor has no rules.
func (p *PF) All(ctx context.Context, anchor string) (*pfconf.All, error) {
	if err := checkAnchor(anchor); err != nil {
		return nil, fmt.Errorf("show all of anchor %q: %w", anchor, err)
	}
	return p.all(ctx, anchor)
}

// AllOfAny is All for what any program loaded: anchors of any name that can be asked
// for, and the main ruleset, "". The section TABLES has the tables' names.
func (p *PF) AllOfAny(ctx context.Context, anchor string) (*pfconf.All, error) {
	if anchor != "" {
		if err := checkReadable(anchor); err != nil {
			return nil, fmt.Errorf("show all of anchor %q: %w", anchor, err)
		}
	}
	return p.all(ctx, anchor)
}

func (p *PF) all(ctx context.Context, anchor string) (*pfconf.All, error) {
	// No interface has this name, and so no state shows: there may be thousands.
	args := []string{"-i", "none", "-v", "-s", "all"}
	if anchor != "" {
		args = append([]string{"-a", anchor}, args...)
	}
	stdout, stderr, err := p.run(ctx, nil, args...)
	if err == nil && !saysMissing(stderr) {
		err = complaint(stderr)
	}
	var all *pfconf.All
	if err == nil {
		all, err = pfconf.ParseAll(string(stdout))
	}
	if err != nil {
		return nil, fmt.Errorf("show all of anchor %q: %w", anchor, err)
	}
	return all, nil
}

// References returns the references that keep the packet filter on. Each has the
// name of the program that asked, which is `pfctl` for every user of it, and whose
// process has mostly ended: only the token tells whose it is.
func (p *PF) References(ctx context.Context) ([]pfconf.Reference, error) {
	out, err := p.show(ctx, "", "References")
	if err != nil {
		return nil, err
	}
	// One of the two is always there: text without them mustn't pass for "none",
	// which would be acted on.
	if !strings.Contains(out, "TOKENS:") && !strings.Contains(out, "No pf starter references held") {
		return nil, fmt.Errorf("show References: unexpected text %q", firstLine([]byte(out)))
	}
	return pfconf.ParseReferences(out)
}

// Skipped returns the interfaces that the packet filter ignores because of a `set
// skip on` in the main ruleset: no rule and no translation works there.
func (p *PF) Skipped(ctx context.Context) ([]string, error) {
	stdout, stderr, err := p.run(ctx, nil, "-v", "-s", "Interfaces")
	if err == nil {
		err = complaint(stderr)
	}
	if err != nil {
		return nil, fmt.Errorf("show Interfaces: %w", err)
	}
	return ParseSkipped(string(stdout)), nil
}

// ParseSkipped finds the interfaces marked "(skip)" in `pfctl -v -s Interfaces`,
// where interfaces start a line and their counters are indented:
//
//	en0
//	lo0 (skip)
func ParseSkipped(out string) []string {
	var names []string
	for line := range strings.Lines(out) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " (skip)"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

// States returns all states.
func (p *PF) States(ctx context.Context) ([]pfconf.ShownState, error) {
	out, err := p.show(ctx, "", "states")
	if err != nil {
		return nil, err
	}
	return pfconf.ParseStates(out)
}

// Kill ends the states of the given hosts or prefixes: those that they opened and
// those that others opened to them. A state outlives the rule that made it, for
// a day if it is a TCP connection, and keeps being translated. Load the new rules
// first.
//
// The kernel compares -k with the source only, before translation for outgoing
// states (DIOCKILLSTATES, xnu bsd/net/pf_ioctl.c), hence two commands each. The
// count that pfctl prints wraps at 256 and is ignored.
func (p *PF) Kill(ctx context.Context, hosts ...netip.Prefix) error {
	for _, h := range hosts {
		if !h.IsValid() {
			return errors.New("kill states: invalid prefix")
		}
		anyone := "0.0.0.0/0"
		if h.Addr().Is6() {
			anyone = "::/0"
		}
		host := hostText(h)
		for _, args := range [][]string{{"-k", host}, {"-k", anyone, "-k", host}} {
			if _, _, err := p.run(ctx, nil, args...); err != nil {
				return fmt.Errorf("kill states of %s: %w", host, err)
			}
		}
	}
	return nil
}

// KillFromTo ends the states that hosts in from opened to hosts in to.
func (p *PF) KillFromTo(ctx context.Context, from, to netip.Prefix) error {
	if !from.IsValid() || !to.IsValid() || from.Addr().Is4() != to.Addr().Is4() {
		return fmt.Errorf("kill states from %v to %v: not valid", from, to)
	}
	if _, _, err := p.run(ctx, nil, "-k", hostText(from), "-k", hostText(to)); err != nil {
		return fmt.Errorf("kill states from %v to %v: %w", from, to, err)
	}
	return nil
}

// hostText is how pfctl takes a host or a network.
func hostText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.Masked().String()
}

// show runs `pfctl [-a anchor] -s what`. Its exit status is 0 whatever happens:
// what it complains about on stderr decides.
func (p *PF) show(ctx context.Context, anchor, what string) (string, error) {
	args := []string{"-s", what}
	if anchor != "" {
		if err := checkReadable(anchor); err != nil {
			return "", fmt.Errorf("show %s of anchor %q: %w", what, anchor, err)
		}
		args = append([]string{"-a", anchor}, args...)
	}
	stdout, stderr, err := p.run(ctx, nil, args...)
	if err == nil {
		err = complaint(stderr)
	}
	if saysMissing(stderr) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("show %s of anchor %q: %w", what, anchor, err)
	}
	return string(stdout), nil
}

// run runs pfctl and makes a failure of an exit status other than 0.
func (p *PF) run(ctx context.Context, stdin []byte, args ...string) (stdout, stderr []byte, err error) {
	stdout, stderr, status, err := p.r.Run(ctx, stdin, pfctlPath, args...)
	if err == nil && status != 0 {
		err = failure(stderr, status, pfctlPath, args)
	}
	return stdout, stderr, err
}

// noise is what pfctl prints on stderr while all is well: the kernel has no ALTQ,
// and -f warns of the main ruleset even when it loads an anchor.
var noise = []string{
	"No ALTQ support in kernel",
	"ALTQ related functions disabled",
	"pfctl: Use of -f option, could result in flushing of rules",
	"present in the main ruleset added by the system at startup.",
	"See /etc/pf.conf for further details.",
}

func isNoise(line string) bool {
	for _, n := range noise {
		if line == n {
			return true
		}
	}
	return false
}

// complaint returns what stderr says besides noise, as an error.
func complaint(stderr []byte) error {
	if line := firstLine(stderr); line != "" {
		return &CommandError{Command: "pfctl", Message: line}
	}
	return nil
}

// saysMissing reports whether pfctl complained about an anchor that doesn't exist.
// The words differ by what was asked for: rules and translation rules, the anchor's
// tables or their entries (pfr_strerror of OpenBSD's pfctl), or the anchors below.
func saysMissing(stderr []byte) bool {
	for line := range strings.Lines(string(stderr)) {
		line = strings.TrimSpace(line)
		if line == "pfctl: DIOCGETRULES: Invalid argument" ||
			line == "pfctl: Anchor or Ruleset does not exist." ||
			strings.HasPrefix(line, "Anchor '") && strings.HasSuffix(line, "' not found.") {
			return true
		}
	}
	return false
}

// Limits of names: PF_ANCHOR_NAME_SIZE, MAXPATHLEN and PF_TABLE_NAME_SIZE of xnu
// bsd/net/pfvar.h, with the terminating NUL.
const (
	maxAnchorName = 63
	maxAnchorPath = 1023
	maxTableName  = 31
)

// checkAnchor refuses a name that pfctl would refuse or read as something else.
func checkAnchor(anchor string) error {
	if len(anchor) > maxAnchorPath {
		return errors.New("anchor path is too long")
	}
	for part := range strings.SplitSeq(anchor, "/") {
		// A leading _ is reserved (pfctl(8)), * would mean every anchor.
		if !isName(part, maxAnchorName) || part[0] == '_' {
			return fmt.Errorf("anchor name %q is not valid", part)
		}
	}
	return nil
}

// checkReadable refuses what can't be asked for. Other programs load anchors by
// ioctl, with any name: what pfctl listed may be asked for as one argument, unless
// it would be taken for an option or for every anchor.
func checkReadable(anchor string) error {
	if len(anchor) > maxAnchorPath || strings.ContainsAny(anchor, "\x00\n*") || strings.HasPrefix(anchor, "-") {
		return fmt.Errorf("anchor name %q can't be asked for", anchor)
	}
	for part := range strings.SplitSeq(anchor, "/") {
		if part == "" || len(part) > maxAnchorName {
			return fmt.Errorf("anchor name %q is not valid", part)
		}
	}
	return nil
}

func tableArgs(anchor, table, command string) ([]string, error) {
	check, readable := checkAnchor, isName(table, maxTableName)
	if command == "show" {
		check, readable = checkReadable, table != "" && len(table) <= maxTableName && table[0] != '-' && !strings.ContainsAny(table, "\x00\n")
	}
	if !readable {
		return nil, fmt.Errorf("%s table: name %q is not valid", command, table)
	}
	if anchor == "" && command == "show" {
		return []string{"-t", table, "-T", command}, nil
	}
	if err := check(anchor); err != nil {
		return nil, fmt.Errorf("%s table of anchor %q: %w", command, anchor, err)
	}
	return []string{"-a", anchor, "-t", table, "-T", command}, nil
}

// isName reports whether s is 1 to limit letters, digits, dots, dashes and
// underscores, and doesn't look like an option.
func isName(s string, limit int) bool {
	if s == "" || len(s) > limit || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || strings.IndexByte("._-", c) >= 0) {
			return false
		}
	}
	return true
}
