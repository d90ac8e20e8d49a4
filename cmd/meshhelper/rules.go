package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// rulesOptions are the flags of rules.
type rulesOptions struct {
	app            *app
	platform, host string
}

// newRulesCommand returns `rules`.
func newRulesCommand(a *app) *cobra.Command {
	o := &rulesOptions{app: a}
	c := &cobra.Command{
		Use: "rules", Short: "Show the rules as loaded, or as another platform would load them",
		Long: `Show the rules as loaded. With --platform, show them as that platform would load
them for this mesh, and with --host also for the host that FILE describes instead of
this one, so that the rules of a Mac can be read on any machine. The ports to which
peers' flows are translated depend on a host's settings and sockets: rules for another
host have its system's default ports, as a comment in them says.`,
		RunE: func(c *cobra.Command, _ []string) error { return showRules(c.Context(), o) },
	}
	c.Flags().StringVar(&o.platform, "platform", "", "pf, nft or guard")
	c.Flags().StringVar(&o.host, "host", "", "`FILE` with a host's facts as JSON; - is stdin")
	return c
}

// showRules prints the rules: the loaded ones, those the helper renders for another
// platform, or, with --host, those rendered here.
func showRules(ctx context.Context, o *rulesOptions) error {
	if _, ok := languages[o.platform]; o.platform != "" && !ok {
		return usagef("--platform: %q is unknown: it is pf, nft or guard", o.platform)
	}
	var rules api.Rules
	var err error
	if o.host == "" {
		rules, err = o.app.client().Rules(ctx, o.platform)
	} else {
		rules, err = o.rulesFor(ctx)
	}
	if err != nil {
		return err
	}
	return o.app.print(rules, func() { fmt.Fprint(o.app.stdout, rules.Text) })
}

// rulesFor renders the helper's mesh for the host in a file.
func (o *rulesOptions) rulesFor(ctx context.Context) (api.Rules, error) {
	if o.platform == "" {
		return api.Rules{}, usagef("--host needs --platform")
	}
	r, err := o.app.compileFor(ctx, o.host)
	if err != nil {
		return api.Rules{}, err
	}
	out := api.Rules{Platform: o.platform}
	out.Anchor, out.Text, err = languages[o.platform].Render(r)
	return out, err
}

// compileFor compiles the helper's mesh for the host that a file describes. The helper gives
// the mesh and the command reads the file, so that the helper opens no path for a user.
func (a *app) compileFor(ctx context.Context, file string) (*policy.Ruleset, error) {
	host, err := a.readHost(ctx, file)
	if err != nil {
		return nil, err
	}
	s, err := a.client().Status(ctx)
	if err != nil {
		return nil, err
	}
	m, err := meshOf(s)
	if err != nil {
		return nil, err
	}
	// The status shows only permissions that haven't ended by the helper's clock. Compile
	// for the zero time, before any end, takes them all.
	return policy.Compile(m, host, time.Time{})
}

// readHost reads a host's facts from a JSON file (policy.ReadHost), or from standard input
// for "-".
func (a *app) readHost(ctx context.Context, file string) (policy.Host, error) {
	if file == "-" {
		return interruptible(ctx, "read host facts from standard input", func() (policy.Host, error) { return policy.ReadHost(a.stdin) })
	}
	return interruptible(ctx, "read host facts from "+file, func() (policy.Host, error) {
		f, err := os.Open(file) // blocks on a named pipe until it has a writer (fifo(7))
		if err != nil {
			return policy.Host{}, fmt.Errorf("read host facts: %w", err)
		}
		defer f.Close()
		return policy.ReadHost(f)
	})
}

// interruptible calls do, and returns an error when ctx ends first. It is for calls that
// can't be cancelled, such as reading from a terminal: the Go runtime restarts a read(2) that
// a handled signal interrupts (SA_RESTART, signal(7)). After the end of ctx do keeps running
// until the process exits. what names the call in the error.
func interruptible[T any](ctx context.Context, what string, do func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := do()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var zero T
		return zero, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
}

// meshOf converts a status to the policy's input. The status lacks the addresses of removed
// peers, so that rules compiled from it have no lines for these (policy.RuleFormer).
func meshOf(s api.Status) (policy.Mesh, error) {
	m := policy.Mesh{Prefixes: s.MeshPrefixes, Addresses: s.Addresses, ListenPort: s.ListenPort}
	for _, p := range s.Peers {
		key, err := mesh.ParsePublicKey(p.PublicKey)
		if err != nil {
			return m, fmt.Errorf("read the helper's peer %q: %w", p.Name, err)
		}
		if len(p.Addresses) != len(mesh.Addresses{}) {
			return m, fmt.Errorf("read the helper's peer %q: it has %d addresses, want one IPv4 and one IPv6", p.Name, len(p.Addresses))
		}
		one := mesh.Peer{PublicKey: key, Name: p.Name, Addresses: mesh.Addresses(p.Addresses)}
		for i := range one.Permissions {
			one.Permissions[i].Allowed = p.Permissions[i].Allowed
		}
		m.Peers = append(m.Peers, one)
	}
	return m, nil
}
