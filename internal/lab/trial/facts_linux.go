package trial

// The expected verdicts: the policy compiled from the picture, not from the helper's facts.

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Facts returns B's facts for the policy, from the picture instead of what the helper
// observed.
func (m *Mesh) Facts(status Status) (policy.Host, error) {
	host := policy.Host{
		Interface: status.Interface,
		Uplink4:   netlab.Uplink, Uplink6: netlab.Uplink,
		Forwarding: policy.Families{IPv4: true, IPv6: true},
		Routes: []policy.Route{
			{Prefix: netip.MustParsePrefix("198.18.0.0/16"), Interface: netlab.VPN},
			{Prefix: netip.MustParsePrefix("2001:db8:9900::/48"), Interface: netlab.VPN},
		},
	}
	for _, name := range []string{netlab.Uplink, netlab.LAN, netlab.Public, netlab.VPN} {
		addrs, err := m.B.Addrs(name)
		if err != nil {
			return policy.Host{}, err
		}
		host.Interfaces = append(host.Interfaces, policy.Interface{Name: name, Addresses: addrs})
	}
	return host, nil
}

// Ruleset compiles the policy for the mesh's peers, with permissions given by the caller,
// on the host as the picture built it.
func (m *Mesh) Ruleset(ctx context.Context, may map[string]mesh.Permissions) (*policy.Ruleset, error) {
	status, err := m.Status(ctx)
	if err != nil {
		return nil, err
	}
	host, err := m.Facts(status)
	if err != nil {
		return nil, err
	}
	picture := policy.Mesh{Prefixes: []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6}, Addresses: status.Addresses}
	for i, name := range slices.Sorted(maps.Keys(m.Peers)) {
		picture.Peers = append(picture.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(i + 1)}, Name: name,
			Addresses: mesh.Addresses(m.Peers[name].Addresses.List()), Permissions: mesh.Granted(may[name]),
		})
	}
	r, err := policy.Compile(picture, host, time.Now())
	if err != nil {
		return nil, fmt.Errorf("compile the policy for the picture: %w", err)
	}
	return r, nil
}

// Opening returns the first packet of a probe in the policy's form, as it arrives on an
// interface of B ("" for one that B sends).
func Opening(in string, src, dst netip.Addr, proto netlab.Proto) host.Packet {
	p := host.Packet{In: in, Packet: policy.Packet{Src: src, Dst: dst, SrcPort: 20000, DstPort: netlab.EchoPort}}
	switch {
	case proto == netlab.TCP:
		p.Proto = policy.ProtoTCP
	case proto == netlab.UDP:
		p.Proto = policy.ProtoUDP
	case dst.Is6():
		p.Proto, p.ICMPType, p.DstPort = policy.ProtoICMPv6, 128, p.SrcPort
	default:
		p.Proto, p.ICMPType, p.DstPort = policy.ProtoICMP, 8, p.SrcPort
	}
	return p
}
