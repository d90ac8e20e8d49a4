package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// newPeerCommand returns `peer` and its subcommands.
func newPeerCommand(a *app) *cobra.Command {
	return group("peer", "Add, remove and permit peers",
		newPeerAddCommand(a), newPeerRemoveCommand(a), newPeerRenameCommand(a),
		newPeerListCommand(a), newPeerShowCommand(a),
		newToggleCommand(a, true), newToggleCommand(a, false),
		newPeerConfigCommand(a), newPeerRekeyCommand(a),
	)
}

// completePeers completes the first argument with the names of the helper's peers. Without
// a helper it completes nothing.
func (a *app) completePeers(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	s, err := a.client().Status(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, p := range s.Peers {
		names = append(names, fmt.Sprintf("%s\t%s, %v", p.Name, p.Kind, p.Addresses[0]))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// newPeerRemoveCommand returns `peer remove`. Repeating it is success, as long as the helper
// remembers the removed peer.
func newPeerRemoveCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "remove NAME", Aliases: []string{"rm"}, SuggestFor: []string{"delete", "del", "drop"}, Short: "Remove a peer",
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			changed, err := a.client().RemovePeer(c.Context(), args[0])
			var refused *api.Error
			if errors.As(err, &refused) && refused.Code == api.CodeAlreadyRemoved {
				return a.print(removedAnswer{args[0], true, true}, func() { a.say("%s was already removed", args[0]) })
			}
			if err != nil {
				return err
			}
			return a.print(removedAnswer{changed.Peer.Name, true, false}, func() { a.say("%s is no longer a peer", changed.Peer.Name) })
		},
	}
}

// removedAnswer is what peer remove prints with --json.
type removedAnswer struct {
	Name    string `json:"name"`
	Removed bool   `json:"removed"` // always true: a failure is an error
	Already bool   `json:"already"` // the peer had been removed before
}

// newPeerRenameCommand returns `peer rename`.
func newPeerRenameCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "rename NAME NEW", Short: "Give a peer another name",
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			if args[1] == "" {
				return usagef("the new name is empty")
			}
			changed, err := a.client().ChangePeer(c.Context(), args[0], api.PeerChange{Name: args[1]})
			if err != nil {
				return err
			}
			return a.print(changed.Peer, func() {
				if changed.Already {
					a.say("%s is already called %s", args[0], changed.Peer.Name)
					return
				}
				a.say("%s is now called %s", args[0], changed.Peer.Name)
			})
		},
	}
}

// newPeerListCommand returns `peer list`. An empty list prints nothing on stdout.
func newPeerListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the peers",
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := a.client().Status(c.Context())
			if err != nil {
				return err
			}
			return a.print(s.Peers, func() {
				if len(s.Peers) == 0 {
					a.talk("there is no peer yet; run: meshhelper peer add NAME")
					return
				}
				a.writePeers(s.Peers, time.Now())
			})
		},
	}
}

// newPeerShowCommand returns `peer show`.
func newPeerShowCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show a peer",
		Long:              `Show a peer: what it may, and what it does. ` + directionsHelp,
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			p, err := a.client().Peer(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(p, func() { a.writePeer(p) })
		},
	}
}

// writePeer writes a peer for a reader, in a column of names and one of values.
func (a *app) writePeer(p api.Peer) {
	line := func(name, text string) { a.sayWrapped(name, strings.Repeat(" ", 12), text) }
	line("name        ", p.Name)
	line("kind        ", string(p.Kind))
	line("public key  ", p.PublicKey)
	line("addresses   ", listAddresses(p.Addresses))
	line("may         ", describePermissions(p.Permissions))
	line("endpoint    ", orNone(p.Endpoint))
	line("handshake   ", describeHandshake(p.LastHandshake, time.Now()))
	line("traffic     ", describeTraffic(p.RxBytes, p.TxBytes))
	line("routes      ", describeRouting(p))
	line("refused     ", p.Refused.String())
}

// toggleOptions are the flags of peer allow and peer deny.
type toggleOptions struct {
	app      *app
	allow    bool
	limitSet bool // whether --for was given: --for 0s is an error, not "for good"
	limit    time.Duration
	// limitText is limit as it was given.
	limitText string
}

// verb is the command's name.
func (o *toggleOptions) verb() string {
	if o.allow {
		return "allow"
	}
	return "deny"
}

// newToggleCommand returns `peer allow`, or `peer deny`: the same command with the opposite
// effect and without --for.
func newToggleCommand(a *app, allow bool) *cobra.Command {
	o := &toggleOptions{app: a, allow: allow}
	c := &cobra.Command{
		Use: "deny NAME PERMISSION...", Short: "Take permissions from a peer, also on running connections",
		RunE: func(c *cobra.Command, args []string) error {
			if o.limitSet = c.Flags().Changed("for"); o.limitSet {
				o.limitText = c.Flag("for").Value.String()
			}
			return toggle(c.Context(), o, args[0], args[1:])
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, text string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return a.completePeers(c, args, text)
			}
			return completePermissions(args[1:], text)
		},
	}
	if allow {
		c.Use, c.Short = "allow NAME PERMISSION...", "Give permissions to a peer, for good or for a time"
		c.Flags().Var(durationFlag(&o.limit), "for", "how long, such as 30m, 2h, 1d or 1w; without it, for good")
	}
	c.Long = c.Short + ".\n\nPERMISSION is one or more of\n" + permissionsHelp()
	return c
}

// permissionsHelp describes each permission on a line of its own, for the help of commands
// that take permissions.
func permissionsHelp() string {
	var lines []string
	for _, one := range mesh.AllPermissions {
		line := fmt.Sprintf("  %-8s  %s", one.Name, one.Opens)
		if one.Needs != 0 {
			line += fmt.Sprintf("; also needs %v", one.Needs)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// toggle gives or takes permissions, and prints what now holds of each. words are the
// permissions as given. It asks for the peer before the change, because the answer holds
// only the new permissions, and the sentences compare.
func toggle(ctx context.Context, o *toggleOptions, ref string, words []string) error {
	asked, err := parsePermissions(words)
	if right := swappedArguments(append([]string{ref}, words...)); err != nil && right != nil {
		return usagef("the peer's name comes first: meshhelper peer %s %s", o.verb(), strings.Join(right, " "))
	}
	if i := slices.Index(words, "for"); err != nil && o.allow && i > 0 && i == len(words)-2 {
		return usagef("a time is a flag; did you mean: meshhelper peer allow %s %s --for %s", ref, strings.Join(words[:i], " "), words[i+1])
	}
	if err != nil {
		return err
	}
	change := api.PeerChange{Permissions: map[string]api.PermissionChange{}}
	for _, one := range asked {
		c := api.PermissionChange{Allowed: o.allow}
		if o.limitSet {
			if o.limit <= 0 {
				return usagef("--for %s ends before it begins; take permissions with: meshhelper peer deny", o.limitText)
			}
			if o.limit > wanted.MaxTimed {
				return errLongTime
			}
			c.For = new(shortDuration(o.limit))
		}
		change.Permissions[one.Name] = c
	}
	client := o.app.client()
	before, err := client.Peer(ctx, ref)
	if err != nil {
		return err
	}
	changed, err := client.ChangePeer(ctx, ref, change)
	if err != nil {
		return err
	}
	return o.app.print(changed.Peer, func() {
		for _, one := range asked {
			o.app.say("%s", describeChange(changed.Peer.Name, one, before.Permissions.Of(one.Set), changed.Peer.Permissions.Of(one.Set)))
		}
		o.app.warnIdle(changed.Peer, o.allow)
		o.app.warnTunnel(ctx, before.Tunnel, changed.Peer)
	})
}

// parsePermissions reads words of one or more permissions, separated by commas. A
// permission that is given twice comes once. Each error is a usageError, without the
// helper: the permissions are known at compile time.
func parsePermissions(words []string) ([]*mesh.Permission, error) {
	var out []*mesh.Permission
	var all mesh.Permissions
	for _, word := range words {
		for name := range strings.SplitSeq(word, ",") {
			name = strings.TrimSpace(name)
			one, err := mesh.ParsePermission(name)
			if err != nil {
				if near := mesh.Closest(name, mesh.PermissionNames()); near != "" {
					return nil, usagef("permission %q is unknown; did you mean %q?", name, near)
				}
				return nil, &usageError{err}
			}
			if !all.Has(one.Set) {
				out = append(out, one)
			}
			all |= one.Set
		}
	}
	return out, nil
}

// swappedArguments returns the arguments of allow or deny in the right order if the peer's
// name, as the only argument that is no permission, doesn't come first, and else nil.
func swappedArguments(args []string) []string {
	var names, permissions []string
	for _, arg := range args {
		if _, err := parsePermissions([]string{arg}); err == nil {
			permissions = append(permissions, arg)
		} else {
			names = append(names, arg)
		}
	}
	if len(names) != 1 || names[0] == args[0] {
		return nil
	}
	return append(names, permissions...)
}

// describeChange returns a sentence about one permission of the peer: what it was before
// the request and is now. It distinguishes a request that changed nothing, a permission
// that has no effect without another one, and a new or removed end.
func describeChange(name string, one *mesh.Permission, was, is api.Permission) string {
	same := was.Allowed == is.Allowed && was.Until.Equal(is.Until)
	when := ""
	if !is.Until.IsZero() {
		when = " until " + formatEnd(is.Until)
	}
	idle := is.Effective != nil && !*is.Effective // nil: it needs no other permission
	switch {
	case idle && same:
		return fmt.Sprintf("%s already has %s%s, which has no effect without %v", name, one.Name, when, one.Needs)
	case idle:
		return fmt.Sprintf("%s now has %s%s, which has no effect until it may %s", name, one.Name, when, one.Needs.List()[0].Verb)
	case is.Allowed && same:
		return fmt.Sprintf("%s may already %s%s", name, one.Verb, when)
	case is.Allowed && was.Allowed && was.Until.IsZero():
		return fmt.Sprintf("%s may %s until %s only; before, it had no end", name, one.Verb, formatEnd(is.Until))
	case is.Allowed && was.Allowed && is.Until.IsZero():
		return fmt.Sprintf("%s may now %s without an end", name, one.Verb)
	case is.Allowed:
		return fmt.Sprintf("%s may now %s%s", name, one.Verb, when)
	case same:
		return fmt.Sprintf("%s already may not %s", name, one.Verb)
	}
	return fmt.Sprintf("%s may no longer %s", name, one.Verb)
}

// warnIdle says which of the peer's permissions have no effect, because another one is
// missing. After allow it names the command that gives the missing one. After deny the user
// doesn't want that, so it names the command that takes the rest, too.
func (a *app) warnIdle(p api.Peer, allow bool) {
	for i, one := range mesh.AllPermissions {
		switch effective := p.Permissions[i].Effective; {
		case effective == nil || *effective:
		case allow:
			need := one.Needs.List()[0]
			a.say("to let it %s, run: meshhelper peer allow %s %s", need.Verb, p.Name, need.Name)
		default:
			a.say("it keeps %s, which has no effect without %v; to take it as well, run: meshhelper peer deny %s %s", one.Name, one.Needs, p.Name, one.Name)
		}
	}
}

// addressSet returns the mesh addresses of the host and of its peers. A removed peer's
// aren't in the status; the helper refuses them (CodeAddressTaken).
func addressSet(s api.Status) map[netip.Addr]bool {
	taken := map[netip.Addr]bool{}
	for _, a := range s.Addresses {
		taken[a] = true
	}
	for _, p := range s.Peers {
		for _, a := range p.Addresses {
			taken[a] = true
		}
	}
	return taken
}
