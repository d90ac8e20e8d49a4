package linux

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// findObstacles names the chains of other software that stop what the policy lets a
// peer do: an accept in our table doesn't override a drop in another one. Such
// chains are evaluated for the packets that matter; what can't be evaluated is
// called unclear rather than guessed.
func (o *others) findObstacles(ctx context.Context, h policy.Host, all []sample) ([]platform.Problem, error) {
	e, err := o.newEvaluator(ctx)
	if err != nil {
		return nil, err
	}
	var out []platform.Problem
	told := map[string]bool{} // places, each of which is named once
	for _, s := range all {
		f := e.run(s)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("judge %s: %w", f.where(), err)
		}
		if p, ok := obstacle(s, f); ok && !told[f.where()] {
			told[f.where()] = true
			out = append(out, p)
		}
	}
	bypasses, err := o.bypasses(h)
	return append(out, bypasses...), err
}

// obstacle says that others' chains stop a packet, or change where it goes.
func obstacle(s sample, f finding) (platform.Problem, bool) {
	verb := map[outcome]string{
		dropped: "drops", redirected: "sends elsewhere", untracked: "takes out of connection tracking, so that they aren't translated, all",
	}[f.outcome]
	if verb == "" {
		return platform.Problem{}, false
	}
	if f.unclear {
		verb = map[outcome]string{dropped: "may drop", redirected: "may send elsewhere", untracked: "may take out of connection tracking, so that they aren't translated,"}[f.outcome]
	}
	let := "interface " + s.iif
	switch {
	case s.iif == "":
		let = fmt.Sprintf("UDP from port %d", s.sport)
	case s.oif == "" && strings.HasPrefix(s.what, "of WireGuard"):
		let = fmt.Sprintf("UDP to port %d", s.dport)
	case s.reply:
		let = "interface " + s.oif
	}
	return platform.Problem{
		Step:    lookAround,
		Message: fmt.Sprintf("%s %s packets %s", f.where(), verb, s.what),
		Hint:    fmt.Sprintf("let %s through there, in the software that the table belongs to", let),
	}, true
}

// bypasses names flow tables of other software on the uplinks: packets of a
// running flow that is in one pass around every other rule.
func (o *others) bypasses(h policy.Host) ([]platform.Problem, error) {
	tables, err := o.conn.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	var out []platform.Problem
	for _, t := range tables {
		fs, err := o.conn.ListFlowtables(t)
		if err != nil {
			return nil, fmt.Errorf("list flow tables of %s: %w", t.Name, err)
		}
		for _, f := range fs {
			out = append(out, bypass(h, t, f)...)
		}
	}
	return out, nil
}

func bypass(h policy.Host, t *nftables.Table, f *nftables.Flowtable) []platform.Problem {
	for _, up := range slices.Concat([]string{h.Uplink4, h.Uplink6}, h.Equal4, h.Equal6) {
		if slices.Contains(f.Devices, up) {
			return []platform.Problem{{
				Step: lookAround,
				Message: fmt.Sprintf("flow table %s of table %s %s takes running flows on %s past every packet filter",
					f.Name, familyName(t.Family), t.Name, up),
				Hint: "keep interface " + h.Interface + " out of the rules that add flows there",
			}}
		}
	}
	return nil
}

// lookAround is the step under which others' rules are reported.
const lookAround = "look at other packet filters"

// samples returns packets for what the ruleset's peers may do, one of each kind: rules
// that tell one peer's address from another's are rare, and there may be thousands of
// peers.
func samples(r *policy.Ruleset) []sample {
	var out []sample
	add := func(s sample) {
		if !slices.ContainsFunc(out, func(have sample) bool { return have.what == s.what && have.src.Is4() == s.src.Is4() }) {
			s.proto, s.sport, s.dport = unix.IPPROTO_UDP, 40_000, 40_001
			out = append(out, s)
		}
	}
	h := r.Host()
	for _, a := range r.Mesh().Addresses {
		near := false
		for _, p := range r.Peers() {
			i := slices.IndexFunc(p.Addresses, func(b netip.Addr) bool { return a.Is4() == b.Is4() })
			if i < 0 {
				continue
			}
			peer, far := p.Addresses[i], netip.MustParseAddr("198.51.100.1")
			if a.Is6() {
				far = netip.MustParseAddr("2001:db8::1")
			}
			if up := h.Uplink(a); p.Permissions.Has(policy.Routing) && up != "" && h.Forwarding.Of(a) {
				add(sample{what: "from peers to the internet", iif: h.Interface, oif: up, src: peer, dst: far})
				add(sample{what: "from the internet to peers", iif: up, oif: h.Interface, src: far, dst: peer, reply: true})
			}
			if p.Permissions.Has(policy.Routing|policy.LAN) && h.Forwarding.Of(a) && !near {
				near = true
				for _, n := range neighbours(h, a.Is4()) {
					add(sample{what: "from peers to the network at " + n.iface, iif: h.Interface, oif: n.iface, src: peer, dst: n.addr})
					add(sample{what: "from the network at " + n.iface + " to peers", iif: n.iface, oif: h.Interface, src: n.addr, dst: peer, reply: true})
				}
			}
			if p.Permissions.Has(policy.Incoming) {
				add(sample{what: "from peers to this host", iif: h.Interface, src: peer, dst: a})
			}
		}
	}
	return append(out, tunnelSamples(r)...)
}

// neighbour is an address of a network that the host is attached to.
type neighbour struct {
	iface string
	addr  netip.Addr
}

// maxNeighbours bounds how many attached networks of a family others' chains are
// evaluated for: a host may have an interface for each of hundreds of containers.
const maxNeighbours = 16

// neighbours returns an address of another host for each interface with a network of the
// family, which is class lan.
func neighbours(h policy.Host, four bool) []neighbour {
	var own []netip.Addr
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			own = append(own, p.Addr())
		}
	}
	var out []neighbour
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			a := p.Addr()
			if i.Name == h.Interface || a.Is4() != four || p.IsSingleIP() || a.IsLinkLocalUnicast() || a.IsLoopback() || len(out) == maxNeighbours {
				continue
			}
			a = p.Masked().Addr().Next()
			for slices.Contains(own, a) {
				a = a.Next()
			}
			if p.Contains(a) {
				out = append(out, neighbour{i.Name, a})
				break
			}
		}
	}
	return out
}

// tunnelSamples returns packets of WireGuard itself, by the uplinks.
func tunnelSamples(r *policy.Ruleset) []sample {
	var out []sample
	h, port := r.Host(), r.Mesh().ListenPort
	for _, f := range []struct {
		up       string
		own, far netip.Addr
	}{
		{h.Uplink4, h.Source4, netip.MustParseAddr("198.51.100.1")}, {h.Uplink6, h.Source6, netip.MustParseAddr("2001:db8::1")},
	} {
		if f.up == "" || !f.own.IsValid() || port == 0 {
			continue
		}
		out = append(out, sample{
			what: fmt.Sprintf("of WireGuard (UDP port %d) from devices to this host", port),
			iif:  f.up, src: f.far, dst: f.own, proto: unix.IPPROTO_UDP, sport: 40_000, dport: port,
		}, sample{
			what: fmt.Sprintf("of WireGuard (UDP port %d) from this host to devices", port),
			oif:  f.up, src: f.own, dst: f.far, proto: unix.IPPROTO_UDP, sport: port, dport: 40_000,
		})
	}
	return out
}

func familyName(f nftables.TableFamily) string {
	return map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
		nftables.TableFamilyNetdev: "netdev",
	}[f]
}
