package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/host/linux"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// languages are the languages in which a ruleset is enforced, by the name that --platform
// takes. Every build has all of them, so that a Mac's rules can be read on Linux. Find
// returns, for a line of the policy that decides about a packet, the rule in the rendered
// text that enforces it: what explain shows as "rule". A rule has no identity in the text
// but its label (pf) or its chain and sets (nft), which the tables below name.
var languages = map[string]explain.Language{
	"nft": {
		Render: func(r *policy.Ruleset) (string, string, error) {
			return "", linux.Text(r, daemon.DefaultMTU), nil
		},
		Find: findNft,
	},
	"pf": {
		Render: func(r *policy.Ruleset) (string, string, error) {
			return macos.Text(r, macos.AnchorOptions{MTU: daemon.DefaultMTU})
		},
		Find: findPf,
	},
	"guard": {
		Render: func(r *policy.Ruleset) (string, string, error) { return "", guardText(r), nil },
		// The guard applies the policy itself, so it has no rule to show beside its line.
		Find: func(string, policy.Rule, policy.Packet) string { return "" },
	},
}

// pfLabels are the labels of the pf rules that enforce the lines of the policy, without the
// prefix "mesh-". A service's rule has the service's name.
var pfLabels = map[policy.Rule]string{
	policy.RuleIncoming: "incoming", policy.RuleNoIncoming: "no-incoming",
	policy.RuleLAN: "lan", policy.RuleNoLAN: "no-lan",
	policy.RuleInternet: "internet", policy.RuleNoRouting: "no-routing", policy.RuleNoUplink: "no-routing",
	policy.RuleMartian: "martian", policy.RuleMesh: "mesh", policy.RuleHostToPeer: "to-peer",
	policy.RuleToPeer: "away", policy.RuleUnassigned: "away", policy.RuleFormer: "away", policy.RuleToHost: "weak-host",
	policy.RuleWireGuard: "wireguard", policy.RuleHairpin: "hairpin",
	policy.RuleSpoofed: "elsewhere-spoofed",
}

// findPf returns the first rule of an anchor that enforces a line of the policy for the
// packet's family and protocol, or "".
func findPf(text string, rule policy.Rule, p policy.Packet) string {
	name := pfLabels[rule]
	if s, ok := policy.ServiceBy(rule); ok {
		name = s.Name
	}
	label := fmt.Sprintf("label %q", "mesh-"+name)
	for line := range strings.Lines(text) {
		if strings.Contains(line, label) && ruleApplies(line, p) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// ruleApplies reports whether a pf rule is for the packet's family ("inet", "inet6") and
// protocol ("proto tcp", "proto { tcp, udp }"). A rule that names none is for all
// (pf.conf(5)).
func ruleApplies(line string, p policy.Packet) bool {
	if v6 := p.Dst.Is6(); v6 && strings.Contains(line, " inet ") || !v6 && strings.Contains(line, " inet6 ") {
		return false
	}
	_, rest, named := strings.Cut(line, " proto ")
	protos, _, _ := strings.Cut(strings.TrimPrefix(rest, "{ "), " }")
	if !strings.HasPrefix(rest, "{") {
		protos, _, _ = strings.Cut(rest, " ")
	}
	name := map[uint8]string{policy.ProtoTCP: "tcp", policy.ProtoUDP: "udp", policy.ProtoICMP: "icmp", policy.ProtoICMPv6: "ipv6-icmp"}[p.Proto]
	return !named || slices.Contains(strings.Split(protos, ", "), name)
}

// nftRule locates a rule in the table: the line of the chain that contains text, or the
// chain's last line if text is empty. A # stands for the family, 4 or 6.
type nftRule struct{ chain, text string }

// nftRules are the nft rules that enforce the lines of the policy.
var nftRules = map[policy.Rule]nftRule{
	policy.RuleIncoming:   {"permitted_self#", "@may_incoming# "},
	policy.RuleNoIncoming: {"permitted_self#", ""},
	policy.RuleLAN:        {"permitted#", "@may_lan# return"},
	policy.RuleNoLAN:      {"permitted#", "@lan# drop"},
	policy.RuleInternet:   {"permitted#", "@may_routing# return"},
	policy.RuleNoRouting:  {"permitted#", ""},
	policy.RuleNoUplink:   {"from_mesh", ""},
	policy.RuleMartian:    {"permitted#", "@martian# drop"},
	policy.RuleMesh:       {"permitted#", `drop comment "mesh: `},
	policy.RuleSpoofed:    {"ingress_elsewhere", "saddr @peers# drop"},
	policy.RuleToHost:     {"ingress_elsewhere", "daddr @own# drop"},
	policy.RuleToPeer:     {"ingress_elsewhere", "daddr @peers# drop"},
	policy.RuleUnassigned: {"unclaimed#", ""},
	policy.RuleFormer:     {"ingress_elsewhere", "daddr @former# drop"},
	policy.RuleProtocol:   {"carried", ""},
	policy.RuleWireGuard:  {"permitted_self#", "WireGuard's port"},
	policy.RuleHairpin:    {"permitted#", "WireGuard's port"},
}

// findNft returns the rule of a table that enforces a line of the policy for the packet's
// family, with its chain, or "".
func findNft(text string, rule policy.Rule, p policy.Packet) string {
	where, ok := nftRules[rule]
	if s, served := policy.ServiceBy(rule); served {
		where, ok = nftRule{"permitted_self#", "@may_" + s.Name + "# "}, true
	}
	if !ok {
		return ""
	}
	family, other := "4", "ip6 "
	if p.Dst.Is6() {
		family, other = "6", "ip "
	}
	chain, want := strings.ReplaceAll(where.chain, "#", family), strings.ReplaceAll(where.text, "#", family)
	_, rest, _ := strings.Cut(text, "chain "+chain+" {\n")
	body, _, _ := strings.Cut(rest, "\n\t}")
	lines := strings.Split(body, "\n")
	if want != "" {
		// In a chain for both families, rules of either may contain the text.
		lines = slices.DeleteFunc(lines, func(line string) bool {
			return !strings.Contains(line, want) || strings.Contains(line, other)
		})
		lines = lines[:min(len(lines), 1)]
	}
	last := len(lines) - 1
	if last < 0 || lines[last] == "" {
		return ""
	}
	return "chain " + chain + ": " + strings.TrimSpace(lines[last])
}

// guardText describes what the guard decides by: the destinations of each class on this
// host, in the order in which they are tried, and each peer's permissions. The policy that
// it applies to them is the same for every mesh (docs/policy.md).
func guardText(r *policy.Ruleset) string {
	var b strings.Builder
	sets := r.Sets()
	fmt.Fprintf(&b, "classes, the first that fits:\n")
	for _, c := range []struct {
		class policy.Class
		texts []string
	}{
		{policy.Martian, textsOf(sets.Martians)}, {policy.Self, textsOf(sets.Self)},
		{policy.InMesh, textsOf(append(sets.Mesh[:len(sets.Mesh):len(sets.Mesh)], sets.Peers...))},
		{policy.OnLAN, textsOf(sets.LAN)}, {policy.Internet, []string{"the rest"}},
	} {
		fmt.Fprintf(&b, "  %-8s  %s\n", c.class, strings.Join(c.texts, " "))
	}
	for _, line := range []struct {
		about string
		ps    []netip.Prefix
	}{
		{"addresses of this host's router, where WireGuard's port is closed", sets.Outside},
		{"mesh addresses of another owner, which only this host reaches", sets.Others},
		{"mesh addresses of removed peers, to which nothing is sent", sets.Former},
	} {
		if len(line.ps) > 0 {
			fmt.Fprintf(&b, "%s:\n  %s\n", line.about, strings.Join(textsOf(line.ps), " "))
		}
	}
	fmt.Fprintf(&b, "peers:\n")
	for _, p := range r.Peers() {
		fmt.Fprintf(&b, "  %s %s: %v\n", p.Name, listAddresses(p.Addresses[:]), p.Permissions)
	}
	return b.String()
}

// textsOf formats values for strings.Join.
func textsOf[T fmt.Stringer](values []T) []string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = v.String()
	}
	return texts
}
