package main

import (
	"context"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// warnTunnel says on stderr that a change of permissions makes a peer's configuration wrong,
// and which lines of it differ now. The helper can't change the device: one that still sends
// everything but may no longer route has no internet, and one that sends only what is for
// this host doesn't route although it may. was and is.Tunnel are the tunnels (mesh.Tunnel
// constants) before and after the change, "" if the helper doesn't know one.
func (a *app) warnTunnel(ctx context.Context, was string, is api.Peer) {
	if routing := is.Permissions.Of(mesh.Routing); is.Tunnel == mesh.TunnelFull && !routing.Until.IsZero() {
		subject := is.Name + "'s configuration sends everything here"
		if was != is.Tunnel {
			subject = "with the new one it sends everything here"
		}
		// Deferred, so that it follows the lines of the new configuration, if there are any.
		defer a.talk("%s; from %s on it has no internet while it is connected", subject, formatEnd(routing.Until))
	}
	if was == is.Tunnel || was == "" || is.Tunnel == "" {
		return
	}
	// Which configuration the device has isn't known, so the remark is about one for the
	// former permissions.
	routes := map[string]string{
		mesh.TunnelFull:     "routes everything through this host, so that the device has no internet while it is connected",
		mesh.TunnelNetworks: "routes only this host and its networks",
		mesh.TunnelHost:     "routes only this host's addresses",
	}[was]
	a.talk("a configuration made before this change %s", routes)
	a.talk("if %s uses one, print a new one with: meshhelper peer config %s", is.Name, is.Name)
	c, err := a.client().Config(ctx, is.Name)
	if err != nil {
		return // peer config, which was just named, says why
	}
	config, err := stock.ParseConfig(c.Text)
	if err != nil {
		return
	}
	a.talk("or replace these lines in it:")
	switch {
	case len(config.DNS) > 0:
		a.talk("  DNS = %s", joinTexts(config.DNS, ", "))
	case was == mesh.TunnelFull:
		a.talk("  (no DNS line)")
	}
	a.talk("  AllowedIPs = %s", joinTexts(config.AllowedIPs, ", "))
}
