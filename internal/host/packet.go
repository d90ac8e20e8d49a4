package host

import "github.com/meshhelper/meshhelper/internal/policy"

// Packet is a packet as the host's kernel receives or sends it.
type Packet struct {
	// In is the interface that the packet arrives on; empty for one that the host itself
	// sends.
	In string
	policy.Packet
}

// Judge returns the verdict of r: FromPeer, FromHost or FromElsewhere, depending on In.
func (p Packet) Judge(r *policy.Ruleset) policy.Verdict {
	switch {
	case p.In == r.Host().Interface:
		return r.FromPeer(p.Packet)
	case p.In == "", policy.IsLoopback(p.In):
		return r.FromHost(p.Packet)
	}
	return r.FromElsewhere(p.Packet)
}
