package policy

import "github.com/meshhelper/meshhelper/internal/mesh"

// Rule is the line of the policy that decided.
type Rule uint8

// The lines of the policy. Those up to RuleTransit pass; the others refuse.
const (
	// RuleNone is the zero Rule; no verdict has it.
	RuleNone Rule = iota
	RuleIncoming
	RuleDNS
	RuleLAN
	RuleInternet
	RuleHostToPeer
	RuleThroughPeer
	RuleNotOurs
	RuleTunnel
	RuleTransit

	RuleMalformed
	RuleSpoofed
	RuleProtocol
	RuleMartian
	RuleRedirect
	RuleUnquoted
	RuleUnasked
	RuleFull
	RuleMesh
	RuleWireGuard
	RuleHairpin
	RuleNoIncoming
	RuleNoLAN
	RuleNoRouting
	RuleNoForwarding
	RuleNoUplink
	RuleForeignSource
	RuleNotThroughPeer
	RuleToHost
	RuleToPeer
	RuleFormer
	RuleUnassigned
	RuleClosedTransit
	RuleWrongWay
)

var ruleTexts = [...]string{
	RuleNone:           "no rule",
	RuleIncoming:       "a peer with incoming may connect to the host",
	RuleDNS:            "a peer with incoming or routing may ask the host's DNS",
	RuleLAN:            "a peer with routing and lan may reach the host's other networks",
	RuleInternet:       "a peer with routing may reach the internet by the uplink",
	RuleHostToPeer:     "the host may connect to its peers",
	RuleThroughPeer:    "the host may send to other networks through the peer that it routes through",
	RuleNotOurs:        "the packet has nothing to do with the mesh",
	RuleTunnel:         "WireGuard's own packets pass, whatever outer address a peer has",
	RuleTransit:        "the host forwarded before the helper came, so transit of others is left alone",
	RuleMalformed:      "the header is malformed, truncated or source-routed",
	RuleSpoofed:        "the source isn't an address of the sender",
	RuleProtocol:       "only TCP, UDP and ICMP pass from and to a peer",
	RuleMartian:        "the destination is never a valid one",
	RuleRedirect:       "ICMP redirects never pass",
	RuleUnquoted:       "the ICMP error quotes no flow that may pass",
	RuleUnasked:        "the packet begins nothing and belongs to no flow",
	RuleFull:           "the peer, or all peers together, have as many flows or unfinished datagrams as they may, or it opens flows too fast",
	RuleMesh:           "the host does not forward between peers",
	RuleWireGuard:      "WireGuard's own packets don't go through the tunnel",
	RuleHairpin:        "WireGuard's own packets don't go through the tunnel to the host's router, which would turn them back",
	RuleNoIncoming:     "connecting to the host needs incoming",
	RuleNoLAN:          "the host's other networks need routing and lan",
	RuleNoRouting:      "the internet needs routing",
	RuleNoForwarding:   "the host does not forward this address family",
	RuleNoUplink:       "the host has no default route for this address family",
	RuleForeignSource:  "the host reaches its peers from its mesh address only",
	RuleNotThroughPeer: "the host sends nothing there through a peer",
	RuleToHost:         "the host's mesh addresses are reached by the mesh only",
	RuleToPeer:         "no host outside the mesh opens a flow to a peer",
	RuleFormer:         "the mesh address was a peer's until less than a day ago",
	RuleUnassigned:     "no peer has this mesh address",
	RuleClosedTransit:  "the host did not forward before the helper came, so it doesn't forward for others",
	RuleWrongWay:       "the answer arrives by another interface than the flow left by",
}

// String returns the rule as a sentence without a full stop.
func (r Rule) String() string {
	if int(r) < len(ruleTexts) {
		return ruleTexts[r]
	}
	return ruleTexts[RuleNone]
}

// Exit is the set of interfaces by which a packet that passes may leave the host.
type Exit uint8

// The exits. The zero Exit is none: the packet doesn't pass.
const (
	ExitNone Exit = iota
	// ExitHost: the packet is for the host itself.
	ExitHost
	// ExitMesh: by the mesh interface only.
	ExitMesh
	// ExitUplink: by the default route's interface only, with its address as the
	// source.
	ExitUplink
	// ExitOther: by any interface but the mesh's, with that interface's address
	// as the source.
	ExitOther
	// ExitAny: by any interface but the mesh's. The packet isn't the mesh's business.
	ExitAny
)

// Verdict is the policy's judgement of a packet.
type Verdict struct {
	Pass bool
	// Rule is the line of the policy that decided.
	Rule Rule
	// Class is the destination's class for packets from a peer, Spoofed where
	// the source is wrong, and 0 otherwise.
	Class Class
	// Exit is where the packet may leave.
	Exit Exit
	// Missing are the permissions without which it was refused, if permissions
	// would have let it pass.
	Missing mesh.Permissions
	// Peer is the index in [Ruleset.Peers] of the peer that the packet is from or
	// to, or -1.
	Peer int

	answered bool
}

// Answered reports whether the guard answers the packet with an ICMP error. It does so
// where a permission is missing, or the address family isn't forwarded; everything else
// is dropped in silence. The answer never depends on networks of the host that the peer
// can't know.
func (v Verdict) Answered() bool { return v.answered }

// NAT reports whether the packet leaves with the address of the interface that
// it leaves by.
func (v Verdict) NAT() bool { return v.Exit == ExitUplink || v.Exit == ExitOther }
