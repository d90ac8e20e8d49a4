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

// killUnwantedStates kills the states that were created while our anchor wasn't in
// force, or that use a port which a socket of this host has now. A state outlives the
// rule that created it, and all later packets of its flow match it. One that a foreign
// rule created for a peer's untranslated packet lets the rest of the flow leave
// untranslated; one that isn't bound to an interface accepts the flow's packets from
// the LAN. If the states can't be read, all states from and to the mesh are killed.
func (b *Backend) killUnwantedStates(ctx context.Context, r *policy.Ruleset) error {
	if !b.unwantedStates {
		return nil
	}
	var kills []Kill
	if states, err := b.pf.States(ctx); err == nil {
		kills = unwantedStates(states, r, b.portTaken())
	} else {
		b.o.Log.Warn("kill states that no rule of ours created", "error", err)
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

// portTaken returns a function that reports whether a socket of this host has a port. A
// state keeps its translated port after the rules changed to another range.
func (b *Backend) portTaken() func(proto string, port uint16) bool {
	ike := b.ports.ike(b.o.Now())
	return func(proto string, port uint16) bool {
		return proto == "udp" && port == ikePort && ike || b.ports.has(proto, port)
	}
}

// inspectUnwantedStates looks for such states. They can be created, and stay, between
// two full reads that find no other change. The next Cut kills them.
func (b *Backend) inspectUnwantedStates(ctx context.Context, r *policy.Ruleset, drift func(step, message string)) {
	states, err := b.pf.States(ctx)
	if b.statesErr = err; err != nil {
		return
	}
	if n := len(unwantedStates(states, r, b.portTaken())); n > 0 {
		b.unwantedStates = true
		drift(StepCut, fmt.Sprintf("the packet filter has states of peers' packets that no rule of ours created, or with ports that sockets of this host have, between %d pairs of hosts", n))
	}
}

// stateProblems reports that the states can't be read.
func (b *Backend) stateProblems() []host.Problem {
	if b.statesErr == nil {
		return nil
	}
	return []host.Problem{{
		Step: StepCut, Message: "the packet filter's states can't be read: " + b.statesErr.Error(),
		Hint: "see what `sudo pfctl -s states` says; the helper tries again",
	}}
}

// killsOf selects all states from and to a prefix.
func killsOf(m netip.Prefix) []Kill {
	opened := killOpened(m.Addr())
	opened.From = m
	return []Kill{opened, {opened.To, opened.From}}
}

// unwantedStates selects the states with an address of the mesh that no rule of ours
// created: ours are if-bound, and translated on every interface but the mesh's. It also
// selects those of ours whose translated port is taken.
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

// anyInterface is the interface that pfctl -s states shows for a floating state.
const anyInterface = "ALL"
