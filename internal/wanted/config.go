package wanted

import (
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Sends says what a peer's configuration has to send through the host at now.
func Sends(p *mesh.Peer, now time.Time) string { return p.Sends(p.Permissions.At(now)) }

// outdatedConfig says that a configuration for what a peer might do before, which its device may have
// or not, sends what is of no use now, or not what it
// could, or returns "".
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
