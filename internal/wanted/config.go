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
	routed := map[string]string{
		mesh.TunnelNetworks: "only this host and its networks", mesh.TunnelHost: "only this host's addresses",
		mesh.TunnelFull: "everything through this host, so that the device has no internet while it is connected",
	}
	if was == is {
		return ""
	}
	return fmt.Sprintf("a configuration of %s made before this change routes %s; if the device uses one, print a new one with: meshhelper peer config %s", name, routed[was], name)
}
