package host

import "github.com/meshhelper/meshhelper/internal/policy"

// Packet is a packet as a host's kernel meets it.
type Packet struct {
	// In is the interface that it arrives by; empty for one that the host itself sends.
	In string
	policy.Packet
}

// Judge asks r the question that fits where p comes from.
func (p Packet) Judge(r *policy.Ruleset) policy.Verdict {
	switch {
	case p.In == r.Host().Interface:
		return r.FromPeer(p.Packet)
	case p.In == "", policy.IsLoopback(p.In):
		return r.FromHost(p.Packet)
	}
	return r.FromElsewhere(p.Packet)
}
