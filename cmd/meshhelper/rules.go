package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// rulesOptions are the flags of rules.
type rulesOptions struct {
	app            *app
	platform, host string
}

func newRulesCommand(a *app) *cobra.Command {
	o := &rulesOptions{app: a}
	c := &cobra.Command{
		Use: "rules", Short: "Show the rules as loaded, or as another platform would load them", Args: cobra.NoArgs,
		Long: `Show the rules as loaded. With --platform, show them as that platform would load
them for this mesh, and with --host, for the host that FILE describes instead of
this one, so that the rules of a Mac can be read on any machine. Which ports peers'
flows are translated to depends on a host's settings and sockets: in rules that
aren't this host's they are those of its system's defaults, as a comment says.`,
		RunE: func(c *cobra.Command, _ []string) error { return showRules(c.Context(), o) },
	}
	c.Flags().StringVar(&o.platform, "platform", "", "pf, nft or guard")
	c.Flags().StringVar(&o.host, "host", "", "`FILE` with a host's facts as JSON; - is stdin")
	return c
}

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

// compileFor compiles the helper's mesh for the host that a file describes.
func (a *app) compileFor(ctx context.Context, file string) (*policy.Ruleset, error) {
	host, err := a.readHost(file)
	if err != nil {
		return nil, err
	}
	s, err := a.client().Status(ctx)
	if err != nil {
		return nil, err
	}
	mesh, err := meshOf(s)
	if err != nil {
		return nil, err
	}
	// The helper leaves out what has ended by its own clock; to compile at the
	// start of time takes the rest as it is.
	return policy.Compile(mesh, host, time.Time{})
}

func (a *app) readHost(file string) (policy.Host, error) {
	var from io.Reader = a.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return policy.Host{}, fmt.Errorf("read host facts: %w", err)
		}
		defer f.Close()
		from = f
	}
	return policy.ReadHost(from)
}

// meshOf turns what the helper shows back into the policy's input. The addresses of
// removed peers aren't shown.
func meshOf(s api.Status) (policy.Mesh, error) {
	m := policy.Mesh{Prefixes: s.MeshPrefixes, Addresses: s.Addresses, ListenPort: s.ListenPort}
	for _, p := range s.Peers {
		key, err := wireguard.ParsePublicKey(p.PublicKey)
		if err != nil {
			return m, fmt.Errorf("read the helper's peer %q: %w", p.Name, err)
		}
		one := policy.Peer{ID: policy.PeerID(key), Name: p.Name, Addresses: p.Addresses}
		for _, permission := range policy.AllPermissions {
			one.Grants.Of(permission).Allowed = p.Permissions.Of(permission).Allowed
		}
		m.Peers = append(m.Peers, one)
	}
	return m, nil
}
