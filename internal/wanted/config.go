package wanted

import (
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Sends returns what a peer's WireGuard configuration should route through this host, given
// the permissions that the peer has at now: one of the mesh.Tunnel constants.
func Sends(p *mesh.Peer, now time.Time) string { return p.Sends(p.Permissions.At(now)) }

// outdatedConfig returns a warning for when the configuration on a peer's device may no
// longer suit its permissions, or "". was and is are what Sends returned before and after
// the change. Whether the device has a configuration for was isn't known here.
func outdatedConfig(name, was, is string) string {
	sent := map[string]string{
		mesh.TunnelFull: "everything", mesh.TunnelNetworks: "this host's networks", mesh.TunnelHost: "only this host's addresses",
	}
	switch {
	case was == is:
		return ""
	case was == mesh.TunnelFull:
		return fmt.Sprintf("a configuration for what %s might do before sends everything through this host, so that it has no internet while it is connected: print a new one with: meshhelper peer config %s", name, name)
	}
	return fmt.Sprintf("a configuration for what %s might do before sends %s through this host: print a new one with: meshhelper peer config %s", name, sent[was], name)
}
