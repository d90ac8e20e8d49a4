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

// newExplainCommand returns `explain`.
func newExplainCommand(a *app) *cobra.Command {
	o := &explainOptions{app: a}
	c := &cobra.Command{
		Use: "explain PEER DESTINATION[:PORT]", Short: "Say what happens to a peer's packet, and why",
		Long: `Say whether what PEER sends to DESTINATION passes, and why: by the policy, by the
rules as loaded, by other software's rules, and by the way that the host would send
it. DESTINATION is an address, a peer's name, or a name that this computer looks up.

With --from ADDRESS, judge the other direction: what ADDRESS sends to PEER, after
PEER sent to DESTINATION. Where ADDRESS is DESTINATION, that is an answer.`,
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
	c.Flags().StringVar(&o.from, "from", "", "judge what the host at `ADDRESS` sends to PEER instead: an answer, where it is DESTINATION")
	c.Flags().StringVar(&o.host, "host", "", "judge by the policy alone, on the host that `FILE` describes; - is stdin")
	c.Flags().StringVar(&o.language, "platform", "pf", "whose rules to name with --host: pf, nft or guard")
	return c
}

// explainOptions are the flags of explain.
type explainOptions struct {
	app                         *app
	proto, from, host, language string
	languageGiven               bool
}

func runExplain(ctx context.Context, o *explainOptions, peer, to string) error {
	a := o.app
	if _, ok := languages[o.language]; !ok {
		return usagef("--platform: %q is unknown: it is pf, nft or guard", o.language)
	}
	if o.languageGiven && o.host == "" {
		return usagef("--platform is for the host of --host, which isn't given: without it, the rules are this host's")
	}
	t, q, err := parseQuestion(peer, to, o.proto, o.from)
	if err != nil {
		return err
	}
	if q.To, err = a.resolveDestination(ctx, t, &q); err != nil {
		return err
	}
	e, err := a.explain(ctx, q, o.host, o.language)
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

// explain asks the helper, or judges its mesh on the host in a file.
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
	return explain.Explain(r, q, languages[language])
}

// destination is what explain was given as one.
type destination struct {
	name  string // "" where it is an address
	from  string // the name in --from, "" where that is an address or isn't given
	found string // what the name was found to be
	peer  bool   // whether that is a peer
}

// parseQuestion reads the arguments of explain. To is not set where the destination is a
// name.
func parseQuestion(peer, to, proto, from string) (t *destination, q api.Question, err error) {
	t, q = &destination{}, api.Question{Peer: peer, Proto: proto}
	if u, wrong := url.Parse(to); wrong == nil && u.Host != "" {
		port := cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
		return t, q, usagef("destination %q looks like a URL; did you mean: meshhelper explain %s %s", to, peer, strings.TrimSuffix(net.JoinHostPort(u.Hostname(), port), ":"))
	}
	if q.To, err = netip.ParseAddr(to); err != nil {
		if target, failed := netip.ParseAddrPort(to); failed == nil {
			q.To, q.Port = target.Addr(), target.Port()
		} else if t.name, q.Port, err = parseNamed(to); err != nil {
			return t, q, err
		}
	}
	if from != "" {
		if q.From, err = netip.ParseAddr(from); err != nil {
			if from != t.name {
				return t, q, usagef("--from: %q is not an address, nor the name of DESTINATION", from)
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
		return t, q, usagef("ICMP has no ports, and %q names one: leave it out, or take --proto tcp or udp", to)
	}
	return t, q, nil
}

// parseNamed reads NAME or NAME:PORT. A name is one of DNS (RFC 1123 2.1) or a peer's.
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
		return "", 0, usagef("destination %q is not an address nor a name, alone or with a port", to)
	}
	if !strings.ContainsFunc(name, unicode.IsLetter) {
		return "", 0, usagef("destination %q is not an address", to)
	}
	return name, port, nil
}

// lookupLimit bounds the look-up of a destination's name.
const lookupLimit = 10 * time.Second

// resolveDestination returns the address that is asked about: of a peer by its name, or of
// another name as this computer looks it up.
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
			found[i] = found[i].Unmap()
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
		t.found = fmt.Sprintf("%s; judged is %s", joinAddresses(found), to)
	}
	if t.from != "" {
		q.From = to
	}
	return to, nil
}

// lookUp asks this computer's resolver.
func (a *app) lookUp(ctx context.Context, name string) ([]netip.Addr, error) {
	if a.resolve != nil {
		return a.resolve(ctx, name)
	}
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// writeExplanation writes the verdict, what stops the packet, what would change it, and then
// by what it was judged. found is what the destination's name was found to be, "" where
// none was given.
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

// nameFor returns the far end's address, with its name where it was given by one.
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

// newDoctorCommand returns `doctor`, which fails when something is wrong.
func newDoctorCommand(a *app) *cobra.Command {
	label := ""
	c := &cobra.Command{
		Use: "doctor", Short: "Look at every precondition",
		Long: `Look at every precondition, and say what to do about those that don't hold. It
works without a helper, too: it then looks at the installed service, and at this
host's addresses.`,
		RunE: func(c *cobra.Command, _ []string) error { return runDoctor(c.Context(), a, label) },
	}
	if a.service != nil {
		c.Flags().StringVar(&label, "label", a.service.defaultLabel(), "`NAME` of the service")
	}
	return c
}

// doctorLimit bounds the wait for a helper that takes the question and doesn't
// answer.
const doctorLimit = 10 * time.Second

// logCheck names the log's last lines among the checks.
const logCheck = "log"

func runDoctor(ctx context.Context, a *app, label string) error {
	limit, cancel := context.WithTimeout(ctx, doctorLimit)
	defer cancel()
	helpers, failed := a.client().Doctor(limit)
	var checks []api.Check
	var what *install.Options
	if a.service != nil {
		what = a.installed(label)
		checks = a.checkService(ctx, what, failed == nil)
	}
	if errors.Is(failed, api.ErrUnreachable) {
		checks = append(checks, a.noHelper(failed, len(checks) > 1))
		helpers, failed = a.checksWithout(), nil
	}
	checks = append(checks, helpers...)
	if failed != nil && len(checks) == 0 {
		return failed // the helper refused the question, and nothing else was looked at
	}
	wrong := 0
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
	case failed != nil: // the helper refused the question
		return failed
	case wrong > 0:
		return fmt.Errorf("%d of %d checks found a problem", wrong, len(checks))
	}
	return nil
}

// checkService looks at the installed service. A helper that runs without being
// installed is fine.
func (a *app) checkService(ctx context.Context, what *install.Options, answers bool) (out []api.Check) {
	for _, c := range install.Checks(ctx, what) {
		out = append(out, checkOf(c))
	}
	if len(out) == 1 && answers {
		return []api.Check{{Name: "service", OK: true, Message: "not installed; the helper runs in the foreground"}}
	}
	return out
}

// checkOf is a check of the installed service.
func checkOf(c install.Check) api.Check {
	return api.Check{Name: c.Name, OK: c.OK, Message: c.Message, Hint: c.Hint}
}

// noHelper is what doctor says where no helper answers.
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

// checksWithout are a helper's checks, as far as they can be made without one.
func (a *app) checksWithout() []api.Check {
	prefixes := mesh.DefaultPrefixes()
	mesh := []netip.Prefix{prefixes.V4, prefixes.V6}
	if a.service != nil {
		// Only root may read them; others have the defaults judged.
		kept, err := wanted.ReadSettings(filepath.Join(a.service.root, a.installed("").StateDir))
		for i, key := range []string{wanted.SettingMeshPrefix4, wanted.SettingMeshPrefix6} {
			if p, bad := netip.ParsePrefix(kept[key]); err == nil && bad == nil {
				mesh[i] = p
			}
		}
	}
	return explain.ChecksWithout(mesh, hostInterfaces())
}

// hostInterfaces are this host's interfaces and addresses, as far as they can be read.
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

// indent is the width of what stands before a check.
const indent = "         "

// writeChecks writes a line for each check, and what to do below it.
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

func newUnsupportedCommand(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short + " (macOS)", DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return api.Errorf(api.CodeUnsupported, "%s isn't available on this platform", use).
				WithHint("run the helper in the foreground: sudo meshhelper run")
		},
	}
}
