package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
)

// firewall is the command that queries and configures the Application Firewall. It exits
// 0 even when it fails, and prints the reason on stdout (socket_vmnet PR#51), so every
// change is read back.
const firewall = "/usr/libexec/ApplicationFirewall/socketfilterfw"

// An appRule is the Application Firewall's rule for a program, as messages name it.
type appRule string

const (
	appUnknown appRule = "in an unknown state" // socketfilterfw printed something new
	appAbsent  appRule = "not registered"
	appBlocked appRule = "blocked"
	appAllowed appRule = "allowed"
)

// allow registers the program with the Application Firewall, which otherwise may drop
// the packets that the program listens for, without notice.
func (o *Options) allow(ctx context.Context) error {
	said, err := o.tellFirewall(ctx, "--add", "--unblockapp")
	if err != nil {
		return err
	}
	rule, err := o.appRule(ctx)
	if err == nil && rule != appAllowed {
		err = fmt.Errorf("the program is %s (socketfilterfw says %q); allow it in System Settings > Network > Firewall > Options", rule, said)
	}
	return err
}

// disallow removes the program from the Application Firewall's list.
func (o *Options) disallow(ctx context.Context) error {
	if rule, err := o.appRule(ctx); err == nil && rule == appAbsent {
		return errNothing
	}
	said, err := o.tellFirewall(ctx, "--remove")
	if err != nil {
		return err
	}
	rule, err := o.appRule(ctx)
	if err == nil && rule != appAbsent {
		err = fmt.Errorf("the program is still %s (socketfilterfw says %q); remove it in System Settings > Network > Firewall > Options", rule, said)
	}
	return err
}

// tellFirewall runs socketfilterfw with each verb for the program, and returns the first
// line of the last answer, at most 200 bytes.
func (o *Options) tellFirewall(ctx context.Context, verbs ...string) (said string, err error) {
	for _, verb := range verbs {
		out, err := o.askFirewall(ctx, verb, o.Program())
		if err != nil {
			return "", err
		}
		said, _, _ = strings.Cut(strings.TrimSpace(out), "\n")
		said = strings.ToValidUTF8(said[:min(len(said), 200)], "")
	}
	return said, nil
}

// askFirewall runs socketfilterfw and returns its stdout. An exit status other than 0 is
// an error.
func (o *Options) askFirewall(ctx context.Context, args ...string) (string, error) {
	stdout, stderr, status, err := o.Runner.Run(ctx, nil, firewall, args...)
	if err == nil && status != 0 {
		err = fmt.Errorf("exit status %d: %.200q", status, bytes.TrimSpace(append(stdout, stderr...)))
	}
	if err != nil {
		return "", fmt.Errorf("socketfilterfw %s: %w", args[0], err)
	}
	return string(stdout), nil
}

// appRule asks how the program is registered. For an unregistered program newer releases
// answer --getappblocked with "permitted", so --listapps decides.
func (o *Options) appRule(ctx context.Context) (appRule, error) {
	list, err := o.askFirewall(ctx, "--listapps")
	if err != nil {
		return appUnknown, err
	}
	said, err := o.askFirewall(ctx, "--getappblocked", o.Program())
	if err != nil {
		return appUnknown, err
	}
	listed, blocked := parseApps(list, o.Program()), parseAppBlocked(said, o.Program())
	switch {
	case listed == appUnknown:
		return blocked, nil
	case listed == appAllowed && (blocked == appBlocked || blocked == appAbsent):
		return blocked, nil
	}
	return listed, nil
}

// parseApps reads `socketfilterfw --listapps`:
//
//	ALF: total number of apps = 2
//
//	1 :  /usr/libexec/bootpd
//	 	 ( Allow incoming connections )
//
// Newer releases print no "ALF:" and no spaces inside the parentheses.
func parseApps(out, program string) appRule {
	if !strings.Contains(strings.ToLower(out), "total number of apps") {
		return appUnknown
	}
	ours := false
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if number, path, ok := strings.Cut(line, ":"); ok && isNumber(strings.TrimSpace(number)) {
			path = strings.TrimSpace(path)
			if ours = path == program; ours {
				continue
			}
			// The path and the verdict are on one line.
			rest, found := strings.CutPrefix(path, program)
			if rest = strings.TrimSpace(rest); !found || !strings.HasPrefix(rest, "(") {
				continue
			}
			ours, line = true, rest
		}
		if !ours || !strings.HasPrefix(line, "(") {
			continue
		}
		switch verdict := strings.ToLower(line); {
		case strings.Contains(verdict, "block"):
			return appBlocked
		case strings.Contains(verdict, "allow"):
			return appAllowed
		}
		return appUnknown
	}
	if ours {
		return appUnknown
	}
	return appAbsent
}

// isNumber reports whether s is a decimal number, as each entry of --listapps begins with.
func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// parseAppBlocked reads `socketfilterfw --getappblocked`: "Incoming connection to
// the application is permitted", with the program's path in newer releases.
func parseAppBlocked(out, program string) appRule {
	words := strings.ToLower(strings.ReplaceAll(out, program, ""))
	switch {
	case strings.Contains(words, "not part of the firewall"):
		return appAbsent
	case strings.Contains(words, "blocked"):
		return appBlocked
	case strings.Contains(words, "permitted"):
		return appAllowed
	}
	return appUnknown
}

// checkFirewall checks whether the Application Firewall lets packets through to the
// helper.
func (o *Options) checkFirewall(ctx context.Context) Check {
	c := Check{Name: "application firewall"}
	state, err := o.askFirewall(ctx, "--getglobalstate")
	if err != nil {
		return c.unknown(err)
	}
	all, err := o.askFirewall(ctx, "--getblockall")
	if err != nil {
		return c.unknown(err)
	}
	rule, err := o.appRule(ctx)
	if err != nil {
		return c.unknown(err)
	}
	on, blockAll := parseFirewall(state, all)
	switch {
	case on == nil:
		return c.unknown(errors.New("socketfilterfw printed a state that isn't known"))
	case !*on:
		return c.fine("off; the program is %s", rule)
	case blockAll:
		return c.wrong("it blocks all incoming connections, those of peers included",
			`System Settings > Network > Firewall > Options: switch off "Block all incoming connections"`)
	case rule == appAbsent, rule == appBlocked:
		return c.wrong("it is on, and the program is "+string(rule)+": packets of peers may be dropped",
			"sudo meshhelper install, or System Settings > Network > Firewall > Options: allow "+o.Program())
	}
	return c.fine("on; the program is %s", rule)
}

// parseFirewall reads `socketfilterfw --getglobalstate`, which prints "Firewall is
// enabled. (State = 1)", or State = 2 for "block all", and --getblockall, which prints
// "Firewall has block all state set to disabled." or "Block all DISABLED!". on is nil if
// the state isn't known.
func parseFirewall(state, all string) (on *bool, blockAll bool) {
	state, all = strings.ToLower(state), strings.ToLower(all)
	switch {
	case strings.Contains(state, "enabled") == strings.Contains(state, "disabled"):
		return nil, false
	case strings.Contains(state, "disabled"):
		return new(false), false
	}
	return new(true), strings.Contains(state, "state = 2") ||
		strings.Contains(all, "block all") && strings.Contains(all, "enabled") && !strings.Contains(all, "disabled")
}
