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
	// The device may have an older configuration, so the remark is about one for the former
	// permissions.
	sends := map[string]string{
		mesh.TunnelFull:     "sends everything here, so that it has no internet while it is connected",
		mesh.TunnelNetworks: "sends what is for this host and its networks",
		mesh.TunnelHost:     "sends only this host's addresses",
	}[was]
	a.talk("a configuration for what %s might do before %s", is.Name, sends)
	a.talk("if the device has such a configuration, print a new one with: meshhelper peer config %s", is.Name)
	c, err := a.client().Config(ctx, is.Name)
	if err != nil {
		return // peer config, which was just named, says why
	}
	config, err := stock.ParseConfig(c.Text)
	if err != nil {
		return
	}
	a.talk("or change these lines in the old one:")
	switch {
	case len(config.DNS) > 0:
		a.talk("  DNS = %s", joinTexts(config.DNS, ", "))
	case was == mesh.TunnelFull:
		a.talk("  (no DNS line)")
	}
	a.talk("  AllowedIPs = %s", joinTexts(config.AllowedIPs, ", "))
}
