package daemon

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// Config returns the configuration for a peer's WireGuard app. Its private key
// is a placeholder: the helper never learns it.
func (d *Daemon) Config(ref string) (api.Config, error) {
	doc := d.wanted.Load()
	i, err := doc.find(ref)
	if err != nil {
		return api.Config{}, err
	}
	p := &doc.Peers[i]
	endpoint, warnings := d.endpoint()
	config := wireguard.FullTunnel(wireguard.PrivateKey{},
		wireguard.Addresses{V4: p.Addresses[0], V6: p.Addresses[1]}, d.mesh.key, endpoint, d.opts.DNS)
	if err := config.Validate(); err != nil {
		return api.Config{}, err
	}
	return api.Config{Text: config.Text(), Warnings: warnings}, nil
}

// endpoint returns where peers reach this host, and what is to be said of it.
func (d *Daemon) endpoint() (wireguard.Endpoint, []string) {
	c, _ := d.condition()
	if e := d.opts.Endpoint; e.Host != "" {
		if e.Port == 0 {
			e.Port = c.listenPort
		}
		return e, []string{}
	}
	a, ok := uplinkAddress(c.host)
	if !ok || c.listenPort == 0 {
		return wireguard.Endpoint{}, []string{
			"no endpoint is known and there is no uplink: add Endpoint = HOST:PORT to the [Peer] section, or run the helper with --endpoint",
		}
	}
	warning := "the endpoint is the uplink's address " + a.String() +
		": it works where the peer reaches this address; give the helper a name or public address with --endpoint"
	return wireguard.Endpoint{Host: a.String(), Port: c.listenPort}, []string{warning}
}

// uplinkAddress returns an address of the uplink, IPv4 before IPv6, a public
// one before a private one.
func uplinkAddress(h policy.Host) (netip.Addr, bool) {
	var best netip.Addr
	rank := 0
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			a := p.Addr()
			if i.Name != h.Uplink(a) || !a.IsGlobalUnicast() {
				continue
			}
			if r := rankOf(a); r > rank {
				best, rank = a, r
			}
		}
	}
	return best, rank > 0
}

func rankOf(a netip.Addr) int {
	rank := 1
	if !a.IsPrivate() {
		rank += 2
	}
	if a.Is4() {
		rank++
	}
	return rank
}
