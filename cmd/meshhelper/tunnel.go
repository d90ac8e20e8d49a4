package main

import (
	"context"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// warnTunnel says on stderr that a peer's configuration no longer fits what the peer may
// after a change, and which lines of it are others now: a device that sends everything
// and may not route has no internet, and one that sends only what is for this host
// doesn't route although it may.
func (a *app) warnTunnel(ctx context.Context, was string, is api.Peer) {
	if routing := is.Permissions.Of(mesh.Routing); is.Tunnel == mesh.TunnelFull && !routing.Until.IsZero() {
		subject := is.Name + "'s configuration sends everything here"
		if was != is.Tunnel {
			subject = "with the new one it sends everything here"
		}
		// After the lines of the new one, where there is one.
		defer a.talk("%s; from %s on it has no internet while it is connected", subject, formatEnd(routing.Until))
	}
	if was == is.Tunnel || was == "" || is.Tunnel == "" {
		return
	}
	// What the device has isn't known: it may have one of an earlier time.
	sends := map[string]string{
		mesh.TunnelFull:     "sends everything here, so that it has no internet while it is connected",
		mesh.TunnelNetworks: "sends what is for this host and its networks",
		mesh.TunnelHost:     "sends only this host's addresses",
	}[was]
	a.talk("a configuration for what %s might do before %s", is.Name, sends)
	a.talk("if it has such a one, print a new one with: meshhelper peer config %s", is.Name)
	c, err := a.client().Config(ctx, is.Name)
	if err != nil {
		return // the command says why
	}
	config, err := stock.ParseConfig(c.Text)
	if err != nil {
		return
	}
	a.talk("or change the old one, where these lines are others now:")
	switch {
	case len(config.DNS) > 0:
		a.talk("  DNS = %s", joinTexts(config.DNS, ", "))
	case was == mesh.TunnelFull:
		a.talk("  (no DNS line)")
	}
	a.talk("  AllowedIPs = %s", joinTexts(config.AllowedIPs, ", "))
}
