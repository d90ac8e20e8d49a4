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
	// ErrNotEnabled says that a token was released while the packet filter is off. All
	// tokens are void then, as after a reboot or a `pfctl -d`.
	ErrNotEnabled = errors.New("packet filter is not enabled")
	// ErrTokenInvalid says that the token isn't held (any more).
	ErrTokenInvalid = errors.New("token is not held")
	// ErrBusy says that a table that the rules declare is in use (tuist#11425), and that
	// nothing changed. Loading again, or replacing the table's addresses, helps.
	ErrBusy = errors.New("resource busy")
	// ErrNoTable says that the table, or its anchor, doesn't exist.
	ErrNoTable = errors.New("table does not exist")
)

// A PF controls the packet filter through pfctl(8), one command at a time; commands of
// another PF may run at the same time. It changes only anchors below the main ruleset. It
// never reads /etc/pf.conf or loads the main ruleset, which would drop the anchor calls
// that Internet Sharing and other software have inserted; it never flushes without an
// anchor, and never runs -e, or -d, which would turn the packet filter off for all programs
// and void all tokens.
type PF struct{ r Runner }

// NewPF returns a PF that runs pfctl by r.
func NewPF(r Runner) *PF { return &PF{&serial{r: r}} }

// A Token is a reference that keeps the packet filter on (DIOCSTARTREF, xnu
// bsd/net/pf_ioctl.c). It outlives the process but not the boot, so the caller should save
// it together with the boot session's ID.
type Token uint64

// Enable turns the packet filter on, if it is off, and returns a token that keeps it on
// until Release. Each call returns another token.
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

// Release releases a token; the packet filter goes off with the last one. The error for a
// token that isn't held wraps ErrTokenInvalid, or ErrNotEnabled while the packet filter is
// off.
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
// tables that rules declares) in one transaction: either all of rules is in force, or
// nothing changed. pfctl ignores `set` lines in an anchor. Existing states keep passing
// packets, see Kill.
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

// Flush removes the anchor's rules, translation rules and tables. Its states keep passing
// packets. xnu keeps the empty anchor until reboot.
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

// Rules returns the anchor's scrub and filter rules and anchor calls as `pfctl -s rules`
// prints them; the anchor "" is the main ruleset. The text differs from the rules that were
// loaded, since pfctl prints each rule in full; [pfconf.EqualShown] compares the two. It is
// empty for an anchor that doesn't exist.
func (p *PF) Rules(ctx context.Context, anchor string) (string, error) {
	return p.show(ctx, anchor, "rules")
}

// NAT returns the anchor's translation rules as `pfctl -s nat` prints them.
func (p *PF) NAT(ctx context.Context, anchor string) (string, error) {
	return p.show(ctx, anchor, "nat")
}

// Anchors returns the full paths of the anchors directly below anchor. An anchor stays
// listed after it was flushed, so a listed anchor may have no rules.
func (p *PF) Anchors(ctx context.Context, anchor string) ([]string, error) {
	out, err := p.show(ctx, anchor, "Anchors")
	return pfconf.ParseAnchors(out), err
}

// AllAnchors returns the full paths of all anchors with one process, since `pfctl -v -s
// Anchors` descends. It includes nameless inline anchors, such as com.apple/x/_1.
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

// Table returns the entries of a table in an anchor; the anchor "" is the main ruleset. The
// error for a table that doesn't exist wraps ErrNoTable.
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

// ReplaceTable makes entries the whole content of a table, in one step. pfctl creates a
// table that doesn't exist, as a persistent one. The entries must be of the kind
// pfconf.AddrPrefix, and may be negated. States of flows that the table let pass go on.
//
// pf silently doesn't store the all-zero host, 0.0.0.0 or ::, since its radix tree already
// has that node (xnu bsd/net/radix.c).
func (p *PF) ReplaceTable(ctx context.Context, anchor, table string, entries []pfconf.Address) error {
	return p.changeTable(ctx, anchor, table, "replace", entries)
}

// AddToTable adds entries to a table, which pfctl creates as a persistent one if it doesn't
// exist. An entry that already exists stays as it is, negated or not.
func (p *PF) AddToTable(ctx context.Context, anchor, table string, entries []pfconf.Address) error {
	return p.changeTable(ctx, anchor, table, "add", entries)
}

// DeleteFromTable removes entries from a table. A negated entry must be given as such.
// Entries that aren't in the table are ignored; a table that doesn't exist is an error.
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
			return fmt.Errorf("%s table %q of anchor %q: entry %+v isn't an address", command, table, anchor, e)
		}
	}
	text := strings.Join((&pfconf.Table{Addrs: entries}).Entries(), "\n") + "\n"
	// On stdin, since ten thousand addresses don't fit on a command line.
	if _, _, err := p.run(ctx, []byte(text), append(args, "-f", "-")...); err != nil {
		return fmt.Errorf("%s table %q of anchor %q: %w", command, table, anchor, err)
	}
	return nil
}

// Info returns whether the packet filter is on, and its counters.
func (p *PF) Info(ctx context.Context) (*pfconf.Info, error) {
	out, err := p.show(ctx, "", "info")
	if err != nil {
		return nil, err
	}
	return pfconf.ParseInfo(out)
}

// All returns the anchor's rules and translation rules with their counters, and the packet
// filter's status, with one process. An anchor that doesn't exist has no rules.
func (p *PF) All(ctx context.Context, anchor string) (*pfconf.All, error) {
	if err := checkAnchor(anchor); err != nil {
		return nil, fmt.Errorf("show all of anchor %q: %w", anchor, err)
	}
	return p.all(ctx, anchor)
}

// AllOfAny is All for anchors of any program, whose names may be ones that Load refuses,
// and for the main ruleset, "". The section TABLES lists the tables' names.
func (p *PF) AllOfAny(ctx context.Context, anchor string) (*pfconf.All, error) {
	if anchor != "" {
		if err := checkReadable(anchor); err != nil {
			return nil, fmt.Errorf("show all of anchor %q: %w", anchor, err)
		}
	}
	return p.all(ctx, anchor)
}

func (p *PF) all(ctx context.Context, anchor string) (*pfconf.All, error) {
	// No interface is called none, so pfctl prints no states, of which there may be
	// thousands.
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

// References returns the references that keep the packet filter on. Each names the process
// that took it, which is `pfctl` for every program that runs pfctl, and has usually ended:
// only the token identifies a reference.
func (p *PF) References(ctx context.Context) ([]pfconf.Reference, error) {
	out, err := p.show(ctx, "", "References")
	if err != nil {
		return nil, err
	}
	// pfctl always prints one of the two. A text without either must not be taken for "no
	// references", which callers would act on.
	if !strings.Contains(out, "TOKENS:") && !strings.Contains(out, "No pf starter references held") {
		return nil, fmt.Errorf("show References: unexpected text %q", firstLine([]byte(out)))
	}
	return pfconf.ParseReferences(out)
}

// Skipped returns the interfaces that the packet filter ignores because of `set skip on` in
// the main ruleset: no filter or translation rule applies to their packets.
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

// Kill removes the states of flows from or to the given hosts or prefixes. A state outlives
// the rule that created it, by a day if it is of a TCP connection, and keeps being
// translated. The caller must load the new rules first.
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

// KillFromTo removes the states of flows that hosts in from opened to hosts in to.
func (p *PF) KillFromTo(ctx context.Context, from, to netip.Prefix) error {
	if !from.IsValid() || !to.IsValid() || from.Addr().Is4() != to.Addr().Is4() {
		return fmt.Errorf("kill states from %v to %v: invalid prefix", from, to)
	}
	if _, _, err := p.run(ctx, nil, "-k", hostText(from), "-k", hostText(to)); err != nil {
		return fmt.Errorf("kill states from %v to %v: %w", from, to, err)
	}
	return nil
}

// hostText returns a host or a network in pfctl's notation.
func hostText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.Masked().String()
}

// show runs `pfctl [-a anchor] -s what`. pfctl exits 0 even if that fails, so its stderr
// decides.
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

// run runs pfctl and turns an exit status other than 0 into a *CommandError.
func (p *PF) run(ctx context.Context, stdin []byte, args ...string) (stdout, stderr []byte, err error) {
	stdout, stderr, status, err := p.r.Run(ctx, stdin, pfctlPath, args...)
	if err == nil && status != 0 {
		err = failure(stderr, status, pfctlPath, args)
	}
	return stdout, stderr, err
}

// noise holds the lines that pfctl prints on stderr when it succeeds: the kernel has no
// ALTQ, and -f warns about the main ruleset even when it loads an anchor.
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

// complaint returns the first line of stderr that isn't noise, as an error, or nil.
func complaint(stderr []byte) error {
	if line := firstLine(stderr); line != "" {
		return &CommandError{Command: "pfctl", Message: line}
	}
	return nil
}

// saysMissing reports whether pfctl complained about an anchor that doesn't exist.
// The message depends on the request: for rules and translation rules, for tables or their
// entries (pfr_strerror of OpenBSD's pfctl), or for the anchors below.
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

// checkAnchor fails for a name that pfctl would refuse or misread.
func checkAnchor(anchor string) error {
	if len(anchor) > maxAnchorPath {
		return errors.New("anchor path is too long")
	}
	for part := range strings.SplitSeq(anchor, "/") {
		// A leading _ is reserved (pfctl(8)), and * means every anchor.
		if !isName(part, maxAnchorName) || part[0] == '_' {
			return fmt.Errorf("anchor name %q is not valid", part)
		}
	}
	return nil
}

// checkReadable fails for a name that pfctl can't show. Other programs load anchors by
// ioctl under any name; any that pfctl lists can be passed as one argument, unless pfctl
// would read it as an option or as every anchor.
func checkReadable(anchor string) error {
	if len(anchor) > maxAnchorPath || strings.ContainsAny(anchor, "\x00\n*") || strings.HasPrefix(anchor, "-") {
		return fmt.Errorf("anchor name %q can't be passed to pfctl", anchor)
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
