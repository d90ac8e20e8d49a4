package main

import (
	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
)

// newRouteCommand returns `route`. This helper carries peers' traffic only, so
// there is nothing to switch off, and nothing else can be switched on.
func newRouteCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use: "route", Short: "Show by which peer this host's own traffic goes", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := a.client().Status(c.Context())
			if err != nil {
				return err
			}
			return a.print(map[string]string{"routeVia": s.RouteVia}, func() {
				if s.RouteVia == "" {
					a.say("this host's own traffic goes through no peer")
					return
				}
				a.say("this host's own traffic goes through %s", s.RouteVia)
			})
		},
	}
	c.AddCommand(
		&cobra.Command{
			Use: "off", Short: "Send this host's own traffic by its uplink", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				s, err := a.client().Status(c.Context())
				if err != nil {
					return err
				}
				return a.print(map[string]string{"routeVia": s.RouteVia}, func() {
					a.say("this host's own traffic already goes through no peer")
				})
			},
		},
		&cobra.Command{
			Use: "via NAME", Short: "Send this host's own traffic through a peer", Args: cobra.ExactArgs(1),
			ValidArgsFunction: a.completePeers,
			RunE: func(c *cobra.Command, args []string) error {
				p, err := a.client().Peer(c.Context(), args[0])
				if err != nil {
					return err
				}
				return api.Errorf(api.CodeUnsupported, "this meshhelper can't send the host's own traffic through %s", p.Name).
					WithHint("it routes for its peers only")
			},
		},
	)
	return c
}
