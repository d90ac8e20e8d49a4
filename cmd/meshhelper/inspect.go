package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/install"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// newExplainCommand returns `explain`. The helper judges (internal/explain); the command
// resolves names and words the answer.
func newExplainCommand(a *app) *cobra.Command {
	o := &explainOptions{app: a}
	c := &cobra.Command{
		Use: "explain PEER DESTINATION[:PORT]", Short: "Say what happens to a peer's packet, and why",
		Long: `Say whether a packet from PEER to DESTINATION passes, and why. The verdict takes into
account the policy, the loaded rules, other software's rules, and the host's routes.
DESTINATION is an address, a peer's name, or a name that this computer looks up.

With --from ADDRESS, judge the other direction: a packet from ADDRESS to PEER, after
PEER sent one to DESTINATION. If ADDRESS is DESTINATION, that packet is an answer.`,
		Example: `  meshhelper explain phone example.org:443
  meshhelper explain phone 192.168.1.5 --proto icmp
  meshhelper explain phone 192.0.2.1:443 --from 192.0.2.1   (the answer to phone)`,
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			o.languageGiven = c.Flags().Changed("platform")
			return runExplain(c.Context(), o, args[0], args[1])
		},
	}
	c.Flags().StringVar(&o.proto, "proto", "", "tcp, udp or icmp (tcp with a port, else icmp)")
	c.Flags().StringVar(&o.from, "from", "", "judge a packet from `ADDRESS` to PEER instead; an answer, if ADDRESS is DESTINATION")
	c.Flags().StringVar(&o.host, "host", "", "judge by the policy alone, on the host that `FILE` describes; - is stdin")
	c.Flags().StringVar(&o.language, "platform", "pf", "whose rules to name with --host: pf, nft or guard")
	return c
}

// explainOptions are the flags of explain.
type explainOptions struct {
	app                         *app
	proto, from, host, language string
	languageGiven               bool // whether --platform was given
}

// runExplain answers `explain PEER DESTINATION`.
func runExplain(ctx context.Context, o *explainOptions, peer, to string) error {
	a := o.app
	if _, ok := languages[o.language]; !ok {
		return usagef("--platform: %q is unknown: it is pf, nft or guard", o.language)
	}
	if o.languageGiven && o.host == "" {
		return usagef("--platform needs --host: without it, the rules are this host's")
	}
	t, q, err := parseQuestion(peer, to, o.proto, o.from)
	if err != nil {
		return err
	}
	if q.To, err = a.resolveDestination(ctx, t, &q); err != nil {
		return err
	}
	e, err := a.explain(ctx, q, o.host, o.language)
	// The arguments may have been swapped: PEER is unknown, and DESTINATION is a peer.
	var unknown *api.Error
	if errors.As(err, &unknown) && unknown.Code == api.CodeUnknownPeer && t.peer && !strings.Contains(unknown.Hint, "did you mean") {
		return api.Errorf(unknown.Code, "%s", unknown.Message).WithHint("%q is a peer; did you mean: meshhelper explain %s %s", t.name, t.name, peer)
	}
	if err != nil {
		return err
	}
	e.Name = t.name
	return a.print(e, func() { a.writeExplanation(e, t.found) })
}

// explain asks the helper about this host. With a file it judges here, for the helper's mesh
// on the host that the file describes, by the policy alone.
func (a *app) explain(ctx context.Context, q api.Question, file, language string) (api.Explanation, error) {
	if file == "" {
		return a.client().Explain(ctx, q)
	}
	r, err := a.compileFor(ctx, file)
	if err != nil {
		return api.Explanation{}, err
	}
	p, err := a.client().Peer(ctx, q.Peer)
	if err != nil {
		return api.Explanation{}, err
	}
	q.Peer = p.Name
	var grants mesh.Grants
	for i, one := range p.Permissions {
		grants[i] = mesh.Grant{Allowed: one.Allowed, Until: one.Until}
	}
	return explain.Explain(r, q, grants, languages[language])
}

// destination is the DESTINATION of explain, as far as it is more than an address.
type destination struct {
	name  string // the name, "" if DESTINATION is an address
	from  string // the name in --from, "" if that is an address or isn't given
	found string // what the name stands for, as text for the answer
	peer  bool   // whether the name is a peer's
}

// parseQuestion reads the arguments of explain, and chooses the protocol that --proto leaves
// open. If the destination is a name, q.To isn't set yet: see resolveDestination. Errors are
// usageErrors.
func parseQuestion(peer, to, proto, from string) (t *destination, q api.Question, err error) {
	t, q = &destination{}, api.Question{Peer: peer, Proto: proto}
	if u, wrong := url.Parse(to); wrong == nil && u.Host != "" {
		port := cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
		return t, q, usagef("destination %q looks like a URL; did you mean: meshhelper explain %s %s", to, peer, strings.TrimSuffix(net.JoinHostPort(u.Hostname(), port), ":"))
	}
	if q.To, err = netip.ParseAddr(to); err != nil {
		if target, failed := netip.ParseAddrPort(to); failed == nil {
			if q.To, q.Port = target.Addr(), target.Port(); q.Port == 0 {
				return t, q, usagef("destination %q: the port is a number from 1 to 65535", to)
			}
		} else if t.name, q.Port, err = parseNamed(to); err != nil {
			return t, q, err
		}
	}
	if from != "" {
		if q.From, err = netip.ParseAddr(from); err != nil {
			if from != t.name {
				return t, q, usagef("--from: %q is neither an address nor the name given as DESTINATION", from)
			}
			t.from = from
		}
	}
	switch {
	case q.Proto == "" && q.Port != 0:
		q.Proto = "tcp"
	case q.Proto == "":
		q.Proto = "icmp"
	case q.Proto != "tcp" && q.Proto != "udp" && q.Proto != "icmp":
		return t, q, usagef("--proto: %q is unknown: it is tcp, udp or icmp", proto)
	case q.Proto == "icmp" && q.Port != 0:
		return t, q, usagef("ICMP has no ports, but %q names one: leave it out, or use --proto tcp or udp", to)
	}
	return t, q, nil
}

// parseNamed reads NAME or NAME:PORT; port is 0 without one. NAME is a host name (RFC 1123,
// section 2.1, with letters of any script, which the resolver encodes) or a peer's name.
// The length is that of a domain name in text, 253 (RFC 1035, section 2.3.4). A name without
// a letter is a mistyped address.
func parseNamed(to string) (name string, port uint16, err error) {
	name, text, given := strings.Cut(to, ":")
	if given {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return "", 0, usagef("destination %q: the port is a number from 1 to 65535", to)
		}
		port = uint16(n)
	}
	odd := func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_.", r)
	}
	if name == "" || len(name) > 253 || strings.ContainsFunc(name, odd) || strings.HasPrefix(name, "-") {
		return "", 0, usagef("destination %q is neither an address nor a name, alone or with a port", to)
	}
	if !strings.ContainsFunc(name, unicode.IsLetter) {
		return "", 0, usagef("destination %q is not an address", to)
	}
	return name, port, nil
}

// lookupLimit bounds the lookup of a destination's name. It leaves the resolver its second
// attempt: resolv.conf(5) gives each 5 s.
const lookupLimit = 10 * time.Second

// resolveDestination returns the address that the question is about. A name is a peer's, or
// else one that this computer's resolver knows. If it has several addresses, the one of
// --from counts, else the first; the answer lists all. It sets t.found and t.peer, and
// q.From if --from is the same name.
func (a *app) resolveDestination(ctx context.Context, t *destination, q *api.Question) (netip.Addr, error) {
	if t.name == "" {
		return q.To, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	p, err := a.client().Peer(ctx, t.name)
	var unknown *api.Error
	var found []netip.Addr
	switch {
	case err == nil:
		found, t.peer = p.Addresses, true
		t.found = fmt.Sprintf("the peer %s, at %s", p.Name, joinAddresses(found))
	case !errors.As(err, &unknown) || unknown.Code != api.CodeUnknownPeer && unknown.Code != api.CodeAlreadyRemoved:
		return netip.Addr{}, err
	default:
		if found, err = a.lookUp(ctx, t.name); err == nil && len(found) == 0 {
			err = errors.New("it has no address")
		}
		if err != nil {
			return netip.Addr{}, api.Errorf(codeFailed, "destination %q is no peer, and looking it up failed: %v", t.name, err).WithHint("give its address")
		}
		for i := range found {
			found[i] = found[i].Unmap() // the resolver may return IPv4 as ::ffff:192.0.2.1
		}
		t.found = found[0].String()
	}
	to := found[0]
	if q.From.IsValid() {
		if i := slices.IndexFunc(found, func(f netip.Addr) bool { return f == q.From }); i >= 0 {
			to = q.From
		}
	}
	if len(found) > 1 {
		t.found = fmt.Sprintf("%s; the answer is about %s", joinAddresses(found), to)
	}
	if t.from != "" {
		q.From = to
	}
	return to, nil
}

// lookUp asks this computer's resolver for the addresses of a name, of both families.
func (a *app) lookUp(ctx context.Context, name string) ([]netip.Addr, error) {
	if a.resolve != nil {
		return a.resolve(ctx, name)
	}
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// writeExplanation writes the verdict, then each reason that stops the packet and what to do
// about it, then the lines of the policy and the rules behind the verdict. found says what
// the destination's name stands for, "" if it was given as an address.
func (a *app) writeExplanation(e api.Explanation, found string) {
	port := ""
	if e.Port != 0 {
		port = " port " + strconv.Itoa(int(e.Port))
	}
	name := a.nameFor(e)
	switch e.Direction {
	case api.AnswerToPeer:
		a.say("an answer to %s, %s from %s%s to %s, %s", e.Peer, e.Proto, name, port, e.To, verdictOf(e))
	case api.ToPeer:
		a.say("%s from %s%s to %s (%s), which isn't an answer to %s, %s", e.Proto, e.From, port, e.Peer, e.To, e.Peer, verdictOf(e))
	default:
		a.say("%s from %s (%s) to %s%s %s", e.Proto, e.Peer, e.From, name, port, verdictOf(e))
	}
	for _, s := range e.Stops {
		text := s.Message
		switch {
		case s.Answer && s.Unclear:
			text = "the answer may not pass: " + text
		case s.Answer:
			text = "the answer does not pass: " + text
		default:
			text = "the policy lets it pass, but " + text
		}
		a.sayWrapped("stop    ", "        ", text)
		if s.Hint != "" {
			a.sayWrapped("        -> ", "           ", s.Hint)
		}
	}
	line := func(name, text string) {
		if text != "" {
			a.sayWrapped(fmt.Sprintf("%-8s", name), "        ", text)
		}
	}
	line("change", e.Command)
	if found != "" {
		line("name", e.Name+" is "+found)
	}
	line("policy", e.Policy)
	line("class", e.Class)
	line("rule", e.Loaded)
	if !e.Until.IsZero() {
		line("until", formatEnd(e.Until)+", when the permission ends")
	}
}

// nameFor returns the address of the destination, or of --from, with the name if the user
// gave one.
func (a *app) nameFor(e api.Explanation) string {
	far := e.To
	if e.Direction != api.FromPeer {
		far = e.From
	}
	if e.Name != "" {
		return fmt.Sprintf("%s (%s)", e.Name, far)
	}
	return far
}

// verdictOf returns the verdict as a verb. A packet passes only if its answer does, too, so
// an answer that is stopped is part of it. "may" marks a stop
// that is unclear, such as a rule of other software that isn't fully understood.
func verdictOf(e api.Explanation) string {
	switch {
	case e.Unclear:
		return "may not pass"
	case !e.Pass:
		return "does not pass"
	}
	for _, s := range e.Stops {
		if s.Answer && !s.Unclear {
			return "passes, but its answer does not"
		}
	}
	if len(e.Stops) > 0 {
		return "passes, but its answer may not"
	}
	return "passes"
}

// newDoctorCommand returns `doctor`, which exits with status 1 if a check finds a problem.
func newDoctorCommand(a *app) *cobra.Command {
	label := ""
	c := &cobra.Command{
		Use: "doctor", Short: "Check every precondition",
		Long: `Check every precondition, and say what to do about those that don't hold. It also
works without a helper: then it checks the installed service and this host's
addresses.`,
		RunE: func(c *cobra.Command, _ []string) error { return runDoctor(c.Context(), a, label) },
	}
	if a.service != nil {
		c.Flags().StringVar(&label, "label", a.service.defaultLabel(), "`NAME` of the service")
	}
	return c
}

// doctorLimit bounds the wait for a helper that accepts the connection but doesn't answer.
// Its checks run programs such as pfctl, each of which has a limit of its own.
const doctorLimit = 10 * time.Second

// logCheck is the name under which the last lines of the log appear among the checks.
const logCheck = "log"

// runDoctor prints the checks of the installed service and of the helper. They don't depend
// on each other: without a helper, or with one that refuses the request, those of the
// service are printed all the same.
func runDoctor(ctx context.Context, a *app, label string) error {
	limit, cancel := context.WithTimeout(ctx, doctorLimit)
	defer cancel()
	helpers, failed := a.client().Doctor(limit)
	var checks []api.Check
	var what *install.Options
	if a.service != nil {
		what = a.installed(label)
		checks = a.checkService(ctx, what, failed == nil || refuses(failed))
	}
	switch {
	case errors.Is(failed, api.ErrUnreachable):
		checks = append(checks, a.noHelper(failed, len(checks) > 1))
		helpers, failed = a.checksWithout(), nil
	case failed != nil:
		checks = append(checks, a.refusedCheck(failed))
		// The mesh interface of the helper that runs would be taken for another one in the prefix.
		helpers = explain.ChecksWithout("the helper isn't asked", nil, nil)
	}
	checks = append(checks, helpers...)
	wrong := 0 // problems, without those that follow from another one
	for _, c := range checks {
		if !c.OK && c.Follows == "" {
			wrong++
		}
	}
	if wrong > 0 && a.onLaunchd() {
		l := checkOf(install.LastLines(what))
		l.Name = logCheck
		checks = append(checks, l)
	}
	printed := a.print(checks, func() { a.writeChecks(checks) })
	switch {
	case printed != nil:
		return printed
	case failed != nil: // the helper refused the request
		return failed
	case wrong > 0:
		return fmt.Errorf("%d of %d checks found a problem", wrong, len(checks))
	}
	return nil
}

// refuses reports whether err says that a helper runs but doesn't answer this user.
func refuses(err error) bool {
	var refused *api.Error
	return errors.As(err, &refused) || errors.Is(err, api.ErrNotPermitted)
}

// refusedCheck returns the failed check of a helper that doesn't answer this user, or whose
// socket can't be trusted.
func (a *app) refusedCheck(err error) api.Check {
	c := api.Check{Name: "helper", Message: err.Error(), Hint: a.reachHint(err)}
	var refused *api.Error
	if errors.As(err, &refused) {
		c.Message, c.Hint = refused.Message, refused.Hint
	}
	return c
}

// checkService returns the checks of the installed service. answers says whether a helper
// answers: one in the foreground without an installed service is no problem, and then a
// single check says that nothing is installed.
func (a *app) checkService(ctx context.Context, what *install.Options, answers bool) (out []api.Check) {
	for _, c := range install.Checks(ctx, what) {
		out = append(out, checkOf(c))
	}
	if len(out) == 1 && answers {
		return []api.Check{{Name: "service", OK: true, Message: "not installed; the helper runs in the foreground"}}
	}
	return out
}

// checkOf converts a check of the installed service.
func checkOf(c install.Check) api.Check {
	return api.Check{Name: c.Name, OK: c.OK, Message: c.Message, Hint: c.Hint}
}

// noHelper returns the check that fails if no helper answers, with the system's reason
// (ENOENT: no socket, ECONNREFUSED: no process serves it). If the service is installed, its
// checks say more than the usual hint to start the helper.
func (a *app) noHelper(err error, installed bool) api.Check {
	c := api.Check{Name: "helper", Message: "none answers on " + a.socket, Hint: a.startHint()}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		c.Message += ": " + errno.Error()
	}
	switch {
	case installed && a.onLaunchd():
		c.Hint = "see the checks of the service above, and the log below"
	case installed:
		c.Hint = "see the checks of the service above"
	}
	return c
}

// checksWithout returns the helper's checks if no helper answers. Only the one of the mesh
// prefixes needs none: it compares them with this host's addresses.
func (a *app) checksWithout() []api.Check {
	prefixes := mesh.DefaultPrefixes()
	mesh := []netip.Prefix{prefixes.V4, prefixes.V6}
	if a.service != nil {
		// Only root can read the settings. For other users the default prefixes count.
		kept, err := wanted.ReadSettings(filepath.Join(a.service.root, a.installed("").StateDir))
		for i, key := range []string{wanted.SettingMeshPrefix4, wanted.SettingMeshPrefix6} {
			if p, bad := netip.ParsePrefix(kept[key]); err == nil && bad == nil {
				mesh[i] = p
			}
		}
	}
	return explain.ChecksWithout("no helper answers", mesh, hostInterfaces())
}

// hostInterfaces returns this host's interfaces and addresses, without loopback ones. What
// can't be read is left out: doctor says more with less than with an error.
func hostInterfaces() (out []policy.Interface) {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	for _, i := range all {
		addresses, err := i.Addrs()
		if err != nil || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		one := policy.Interface{Name: i.Name}
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				one.Addresses = append(one.Addresses, netip.PrefixFrom(p.Addr().Unmap(), p.Bits()))
			}
		}
		out = append(out, one)
	}
	return out
}

// indent is as wide as the marks of writeChecks.
const indent = "         "

// writeChecks writes each check on a line that begins with a mark: ok, problem, follows (a
// problem that another one explains) or log. A message of several lines keeps its own
// indentation, and the hint follows after an arrow.
func (a *app) writeChecks(checks []api.Check) {
	for _, c := range checks {
		mark, text := "ok       ", c.Name+": "+c.Message
		switch {
		case c.Name == logCheck:
			mark, text = "log      ", c.Message
		case c.Follows != "":
			mark, text = "follows  ", fmt.Sprintf("%s (from %s)", text, c.Follows)
		case !c.OK:
			mark = "problem  "
		}
		for line := range strings.Lines(text) {
			line = strings.TrimRight(line, "\n")
			deeper := line[:len(line)-len(strings.TrimLeft(line, " "))]
			a.sayWrapped(mark+deeper, indent+deeper, line[len(deeper):])
			mark = indent
		}
		if c.Hint != "" {
			a.sayWrapped(indent+"-> ", indent+"   ", c.Hint)
		}
	}
}

// newUnsupportedCommand returns a command in the place of one that this platform doesn't
// have, so that it fails with a reason and a hint instead of as an unknown command.
func newUnsupportedCommand(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short + " (macOS and Linux)", DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return api.Errorf(api.CodeUnsupported, "%s isn't available on this platform", use).
				WithHint("run the helper in the foreground: sudo meshhelper run")
		},
	}
}
