package macos

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// endStrays ends the states that came to be while our anchor wasn't in force, or that
// a socket of this host has to be rid of. They outlive what made them: by a state that
// another product's rule made for a peer's untranslated packet, all that follow leave
// untranslated, and one on every interface lets in by the LAN what comes by the
// tunnel only. Where states can't be read, all that have to do with peers end.
func (b *Backend) killUnwantedStates(ctx context.Context, r *policy.Ruleset) error {
	if !b.unwantedStates {
		return nil
	}
	var kills []Kill
	if states, err := b.pf.States(ctx); err == nil {
		kills = unwantedStates(states, r, b.portTaken())
	} else {
		b.o.Log.Warn("end states that aren't ours", "error", err)
		for _, m := range r.Sets().Mesh {
			kills = append(kills, killsOf(m)...)
		}
	}
	if len(kills) > maxKills {
		kills = widenKills(kills, r.Sets().Mesh)
	}
	if err := b.kill(ctx, kills); err != nil {
		return err
	}
	b.unwantedStates = false
	return nil
}

// taken returns what says whether a socket of this host has a port. A state keeps its
// port when the rules come to name another range, for as long as its ends send.
func (b *Backend) portTaken() func(proto string, port uint16) bool {
	ike := b.ports.ike(b.o.Now())
	return func(proto string, port uint16) bool {
		return proto == "udp" && port == ikePort && ike || b.ports.has(proto, port)
	}
}

// inspectStrays looks for such states, which also come to be, and stay, between two
// looks that find all else as it was. What it finds is ended when flows are cut.
func (b *Backend) inspectUnwantedStates(ctx context.Context, r *policy.Ruleset, drift func(step, message string)) {
	states, err := b.pf.States(ctx)
	if b.statesErr = err; err != nil {
		return
	}
	if n := len(unwantedStates(states, r, b.portTaken())); n > 0 {
		b.unwantedStates = true
		drift(StepCut, fmt.Sprintf("the packet filter has states of peers' packets that no rule of ours made, or with ports that sockets of this host have, between %d pairs of hosts", n))
	}
}

// strayProblems says that such states can't be looked for.
func (b *Backend) stateProblems() []host.Problem {
	if b.statesErr == nil {
		return nil
	}
	return []host.Problem{{
		Step: StepCut, Message: "the packet filter's states can't be read: " + b.statesErr.Error(),
		Hint: "see what `sudo pfctl -s states` says; the helper tries again",
	}}
}

// killsOf ends everything from and to a prefix.
func killsOf(m netip.Prefix) []Kill {
	opened := killOpened(m.Addr())
	opened.From = m
	return []Kill{opened, {opened.To, opened.From}}
}

// strays names the states that no rule of ours made: ours are bound to an interface
// (if-bound), and on another than the mesh's they are translated. It names also those
// by which a peer has a port of this host that is taken.
func unwantedStates(states []pfconf.ShownState, r *policy.Ruleset, taken func(proto string, port uint16) bool) []Kill {
	var ours []netip.Prefix
	ours = append(ours, peersWith(r, 0, anyFamily)...)
	ours = append(append(ours, r.Sets().Former...), hostPrefixes(r.Mesh().Addresses)...)
	known := map[netip.Addr]bool{}
	for _, p := range ours {
		if p.IsSingleIP() {
			known[p.Addr()] = true
		}
	}
	seen := map[Kill]bool{}
	var out []Kill
	for _, s := range states {
		if s.Interface == loopback || !known[s.Inner.Addr()] && !known[s.Outer.Addr()] {
			continue
		}
		bound := s.Interface == r.Host().Interface || s.Interface != anyInterface && s.Inner != s.Translated
		if bound && (s.Inner == s.Translated || !taken(s.Proto, s.Translated.Port())) {
			continue
		}
		from, to := s.Inner.Addr(), s.Outer.Addr()
		if s.Direction == pfconf.In {
			from, to = to, from
		}
		if from.Is4() != to.Is4() {
			continue
		}
		k := Kill{netip.PrefixFrom(from, from.BitLen()), netip.PrefixFrom(to, to.BitLen())}
		if !seen[k] {
			seen[k] = true
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b Kill) int { return a.From.Compare(b.From) })
	return out
}

// anyInterface is how pfctl shows a state that is bound to no interface.
const anyInterface = "ALL"
