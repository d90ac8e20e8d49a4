package daemon

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// resolveInterval is how long a peer that moved to another address may be
// looked for at the old one; resolveTimeout bounds one look-up.
const (
	resolveInterval = time.Minute
	resolveTimeout  = 5 * time.Second
)

// lookup asks the host's resolver.
func lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// resolve keeps the addresses of endpoints that are given by name. It is a task
// of its own, so that a slow resolver holds nothing up; a name that can't be
// resolved keeps its last address.
func (d *Daemon) resolve(ctx context.Context) error {
	t := time.NewTicker(resolveInterval)
	defer t.Stop()
	for {
		if d.resolveAll(ctx) {
			poke(d.moved)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-d.renamed:
		}
	}
}

// resolveAll looks every name up and reports whether an address changed.
func (d *Daemon) resolveAll(ctx context.Context) bool {
	d.mu.Lock()
	old := d.names
	d.mu.Unlock()
	names := map[string]netip.Addr{}
	for _, host := range endpointNames(d.wanted.Load()) {
		names[host] = old[host]
		limit, cancel := context.WithTimeout(ctx, resolveTimeout)
		found, err := d.opts.Resolve(limit, host)
		cancel()
		if err != nil || len(found) == 0 {
			d.opts.Logger.Warn(fmt.Sprintf("resolve endpoint %q: %v", host, err))
			continue
		}
		names[host] = found[0].Unmap()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names = names
	return !maps.Equal(old, names)
}

// endpointNames returns the hosts of endpoints that aren't addresses.
func endpointNames(doc *document) []string {
	var out []string
	for i := range doc.Peers {
		e, err := wireguard.ParseEndpoint(doc.Peers[i].Endpoint, 0)
		if err != nil {
			continue
		}
		if _, err := netip.ParseAddr(e.Host); err != nil {
			out = append(out, e.Host)
		}
	}
	return out
}

// tunnelPeers returns doc's peers as the tunnel takes them.
func (d *Daemon) tunnelPeers(doc *document) []wireguard.Peer {
	d.mu.Lock()
	names := d.names
	d.mu.Unlock()
	out := make([]wireguard.Peer, len(doc.Peers))
	for i := range doc.Peers {
		p := &doc.Peers[i]
		out[i] = wireguard.Peer{
			PublicKey: p.PublicKey,
			Addresses: wireguard.Addresses{V4: p.Addresses[0], V6: p.Addresses[1]},
			Endpoint:  endpointOf(p.Endpoint, names),
			Keepalive: time.Duration(p.Keepalive) * time.Second,
		}
	}
	return out
}

// endpointOf returns where to reach an endpoint, or zero where its name isn't
// resolved.
func endpointOf(text string, names map[string]netip.Addr) netip.AddrPort {
	e, err := wireguard.ParseEndpoint(text, 0)
	if err != nil {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddr(e.Host)
	if err != nil {
		a = names[e.Host]
	}
	if !a.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, e.Port)
}
