package mesh

import (
	"errors"
	"fmt"
)

// Peer is the configuration of a device that the host knows. It holds only what a person
// asked for, nothing that was observed. Peers are comparable with ==.
type Peer struct {
	Name      string    `json:"name"`      // unique in the mesh; see CheckName
	PublicKey PublicKey `json:"publicKey"` // identifies the peer: another key makes another peer
	Kind      Kind      `json:"kind"`
	Addresses Addresses `json:"addresses"` // in the mesh
	// Endpoint is host:port, where the peer is reached until it is heard from elsewhere.
	// Empty if it isn't known.
	Endpoint string `json:"endpoint,omitempty"`
	// Keepalive is the persistent keepalive interval in seconds, 0 for none.
	Keepalive uint16 `json:"keepalive,omitempty"`
	// Tunnel is the traffic that the peer's configuration sends through the host:
	// TunnelFull, TunnelSplit, or empty to follow the peer's permissions. See Sends.
	Tunnel      string `json:"tunnel,omitempty"`
	Permissions Grants `json:"permissions"`
}

// The traffic that a peer's configuration sends through the host.
const (
	TunnelFull     = "full"     // everything
	TunnelNetworks = "networks" // packets to the host and its networks
	TunnelHost     = "host"     // packets to the host
	// TunnelSplit stands for TunnelNetworks while the peer may reach them, and for
	// TunnelHost otherwise.
	TunnelSplit = "split"
)

// Sends returns the traffic that the peer's configuration sends through the host if the peer
// has the permissions may: TunnelFull, TunnelNetworks or TunnelHost. A peer with TunnelFull
// that may not route has no internet.
func (p *Peer) Sends(may Permissions) string {
	switch {
	case p.Tunnel == TunnelFull, p.Tunnel == "" && may.Has(Routing):
		return TunnelFull
	case p.Tunnel == TunnelSplit && may.Has(Routing|LAN):
		return TunnelNetworks
	}
	return TunnelHost
}

// Validate returns an error if the peer is invalid whatever the mesh and the other peers
// are. Collisions with them are the caller's to check.
func (p *Peer) Validate() error {
	if err := CheckName(p.Name); err != nil {
		return err
	}
	switch {
	case p.PublicKey.IsZero():
		return errors.New("no public key")
	case p.Kind != Own && p.Kind != External:
		return fmt.Errorf("kind %.20q is neither own nor external", p.Kind)
	case p.Tunnel != "" && p.Tunnel != TunnelFull && p.Tunnel != TunnelSplit:
		return fmt.Errorf("tunnel %.20q is neither full nor split", p.Tunnel)
	}
	if err := p.Addresses.Validate(); err != nil {
		return err
	}
	if p.Endpoint == "" {
		return nil
	}
	_, err := ParseEndpoint(p.Endpoint, 0)
	return err
}
