package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/install"
	"github.com/meshhelper/meshhelper/internal/macos"
)

// newExplainCommand returns `explain`.
func newExplainCommand(a *app) *cobra.Command {
	var proto, from, host, language string
	c := &cobra.Command{
		Use: "explain PEER DESTINATION[:PORT]", Short: "Say what happens to a peer's packet, and why",
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			q, err := parseQuestion(args[0], args[1], proto, from)
			if err != nil {
				return err
			}
			e, err := a.explain(c.Context(), q, host, language)
			if err != nil {
				return err
			}
			return a.print(e, func() { a.writeExplanation(e) })
		},
	}
	c.Flags().StringVar(&proto, "proto", "", "tcp, udp or icmp (tcp with a port, else icmp)")
	c.Flags().StringVar(&from, "from", "", "judge what comes back from `ADDRESS` instead")
	c.Flags().StringVar(&host, "host", "", "judge on the host that `FILE` describes; - is stdin")
	c.Flags().StringVar(&language, "platform", "pf", "whose rules to name with --host: pf, nft or guard")
	return c
}

// explain asks the helper, or judges its mesh on the host in a file.
func (a *app) explain(ctx context.Context, q api.Question, file, language string) (api.Explanation, error) {
	if _, ok := languages[language]; !ok {
		return api.Explanation{}, usagef("--platform: %q is unknown: it is pf, nft or guard", language)
	}
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
	return daemon.Explain(r, q, languages[language])
}

// parseQuestion reads the arguments of explain.
func parseQuestion(peer, to, proto, from string) (q api.Question, err error) {
	q = api.Question{Peer: peer, Proto: proto}
	if q.To, err = netip.ParseAddr(to); err != nil {
		target, failed := netip.ParseAddrPort(to)
		if failed != nil {
			return q, usagef("destination %q is not an address, nor one with a port", to)
		}
		q.To, q.Port = target.Addr(), target.Port()
	}
	if from != "" {
		if q.From, err = netip.ParseAddr(from); err != nil {
			return q, usagef("--from: %q is not an address", from)
		}
	}
	switch {
	case q.Proto == "" && q.Port != 0:
		q.Proto = "tcp"
	case q.Proto == "":
		q.Proto = "icmp"
	case q.Proto != "tcp" && q.Proto != "udp" && q.Proto != "icmp":
		return q, usagef("--proto: %q is unknown: it is tcp, udp or icmp", proto)
	}
	return q, nil
}

func (a *app) writeExplanation(e api.Explanation) {
	verdict := "does not pass"
	if e.Pass {
		verdict = "passes"
	}
	port := ""
	if e.Port != 0 {
		port = " port " + strconv.Itoa(int(e.Port))
	}
	a.say("%s from %s to %s%s %s", e.Proto, e.From, e.To, port, verdict)
	if e.Class != "" {
		a.say("class   %s", e.Class)
	}
	a.say("policy  %s", e.Policy)
	if e.Loaded != "" {
		a.say("rule    %s", e.Loaded)
	}
	if e.Command != "" {
		a.say("change  %s", e.Command)
	}
}

// newDoctorCommand returns `doctor`, which fails when something is wrong.
func newDoctorCommand(a *app) *cobra.Command {
	label := macos.DefaultLabel
	c := &cobra.Command{
		Use: "doctor", Short: "Look at every precondition",
		Long: `Look at every precondition, and say what to do about those that don't hold. It
works without a helper, too: on a Mac it then looks at the installed service.`,
		RunE: func(c *cobra.Command, _ []string) error { return runDoctor(c.Context(), a, label) },
	}
	if a.service != nil {
		c.Flags().StringVar(&label, "label", label, "`NAME` of the service")
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
		failed = nil
	}
	checks = append(checks, helpers...)
	if failed != nil && len(checks) == 0 {
		return failed // the helper refused the question, and nothing else was looked at
	}
	wrong := 0
	for _, c := range checks {
		if !c.OK {
			wrong++
		}
	}
	if wrong > 0 && what != nil {
		l := api.Check(install.LastLines(what))
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
		out = append(out, api.Check(c))
	}
	if len(out) == 1 && answers {
		return []api.Check{{Name: "service", OK: true, Message: "not installed; the helper runs in the foreground"}}
	}
	return out
}

// noHelper is what doctor says where no helper answers.
func (a *app) noHelper(err error, installed bool) api.Check {
	c := api.Check{Name: "helper", Message: "none answers on " + a.socket, Hint: "start it with: sudo meshhelper run"}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		c.Message += ": " + errno.Error()
	}
	switch {
	case installed:
		c.Hint = "see the checks of the service above, and the log below"
	case a.service != nil:
		c.Hint = "sudo meshhelper install, or in the foreground: sudo meshhelper run"
	}
	return c
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

// newEventsCommand returns `events`.
func newEventsCommand(a *app) *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use: "events", Short: "Show what happened",
		RunE: func(c *cobra.Command, _ []string) error {
			return a.client().Events(c.Context(), follow, func(e api.Event) error {
				return a.print(e, func() {
					a.say("%s  %-9s  %s", e.Time.Local().Format("2006-01-02 15:04:05"), e.Kind, e.Message)
				})
			})
		},
	}
	c.Flags().BoolVar(&follow, "follow", false, "go on with what happens")
	return c
}

func notHere(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short + " (macOS)", DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return api.Errorf(api.CodeUnsupported, "%s isn't available on this platform", use).
				WithHint("run the helper in the foreground: sudo meshhelper run")
		},
	}
}
