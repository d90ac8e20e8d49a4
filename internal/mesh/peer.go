package mesh

import (
	"errors"
	"fmt"
)

// Peer is a device that the host knows, as it is wanted: what a person asked for, and
// nothing that was found out. Two peers are the same where they are equal.
type Peer struct {
	Name      string    `json:"name"`      // see CheckName
	PublicKey PublicKey `json:"publicKey"` // identifies the peer: a peer with another key is another one
	Kind      Kind      `json:"kind"`
	Addresses Addresses `json:"addresses"`
	// Endpoint is host:port, where the peer is expected, or empty.
	Endpoint string `json:"endpoint,omitempty"`
	// Keepalive is in seconds, 0 for none.
	Keepalive uint16 `json:"keepalive,omitempty"`
	// Tunnel is what the peer's configuration is to send through the host: TunnelFull,
	// TunnelSplit, or empty for what it may.
	Tunnel      string `json:"tunnel,omitempty"`
	Permissions Grants `json:"permissions"`
}

// What a peer's configuration sends through the host.
const (
	TunnelFull     = "full"     // everything
	TunnelNetworks = "networks" // packets to the host and its networks
	TunnelHost     = "host"     // packets to the host
	// TunnelSplit asks for TunnelNetworks while the peer may reach them, else TunnelHost.
	TunnelSplit = "split"
)

// Sends returns what the peer's configuration has to send through the host for what the
// peer may: TunnelFull, TunnelNetworks or TunnelHost. A peer that sends everything and
// may not route has no internet.
func (p *Peer) Sends(may Permissions) string {
	switch {
	case p.Tunnel == TunnelFull, p.Tunnel == "" && may.Has(Routing):
		return TunnelFull
	case p.Tunnel == TunnelSplit && may.Has(Routing|LAN):
		return TunnelNetworks
	}
	return TunnelHost
}

// Validate reports what is wrong with the peer by itself.
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
