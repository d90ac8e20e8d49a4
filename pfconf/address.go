package pfconf

import "net/netip"

// An AddressKind says in which of its forms an [Address] is.
type AddressKind uint8

// The forms of an address. The kernel's name for each is in struct pf_addr_wrap
// (xnu bsd/net/pfvar.h); the comments show how pf.conf(5) writes it.
const (
	// AddrAny is any. The kernel holds it as 0.0.0.0/0 or ::/0.
	AddrAny AddressKind = iota
	// AddrPrefix is an address or a network, 192.0.2.1 or 192.0.2.0/24: Prefix
	// (PF_ADDR_ADDRMASK).
	AddrPrefix
	// AddrRange is Prefix.Addr() - Last, both ends included (PF_ADDR_RANGE).
	AddrRange
	// AddrTable is <Name> (PF_ADDR_TABLE).
	AddrTable
	// AddrInterface is Name, an interface or self, without parentheses: the
	// addresses that it has when the ruleset is loaded. pfctl resolves it, and so
	// does Expand; the kernel never sees this form.
	AddrInterface
	// AddrDynamic is (Name): the addresses that the interface has when the packet
	// arrives (PF_ADDR_DYNIFTL). The kernel leaves out IPv6 addresses that are
	// link-local, temporary, deprecated or tentative (pfi_instance_add in xnu
	// bsd/net/pf_if.c).
	AddrDynamic
	// AddrNoRoute is no-route, an address without a route (PF_ADDR_NOROUTE). On
	// macOS it matches nothing: pf_routable in xnu bsd/net/pf.c always returns 1.
	AddrNoRoute
	// AddrURPFFailed is urpf-failed, a source that fails the check of its reverse
	// path (PF_ADDR_URPFFAILED). On macOS it matches nothing, as AddrNoRoute.
	AddrURPFFailed
)

// AddressModifier is a set of the modifiers after an interface's name, PFI_AFLAG_*
// of xnu bsd/net/pfvar.h. At most one of ModNetwork, ModBroadcast and ModPeer may
// be set; ModNoAlias goes with each.
type AddressModifier uint8

const (
	// ModNetwork is en0:network, the networks attached to the interface.
	ModNetwork AddressModifier = 1 << iota
	// ModBroadcast is en0:broadcast, the broadcast addresses; IPv4 only.
	ModBroadcast
	// ModPeer is en0:peer, the remote addresses of a point-to-point interface.
	ModPeer
	// ModNoAlias is en0:0, only the first address of each family.
	ModNoAlias
)

// An Address is what may stand for an address in a rule, a table or a pool.
type Address struct {
	// Kind says which of the other fields are used; the rest stay zero.
	Kind AddressKind
	Not  bool // ! before it
	// Prefix is masked: pf keeps the network only. It is a single address unless
	// a length was written.
	Prefix netip.Prefix
	// Zone is the interface of a link-local address, fe80::1%en0. The kernel
	// doesn't store it in the address: Expand binds the rule to that interface.
	Zone string
	Last netip.Addr // AddrRange: its highest address
	Name string     // AddrTable, AddrInterface, AddrDynamic: at most 31, 15 and 15 bytes
	Mod  AddressModifier
	// Bits is the prefix length after an interface, (en0)/24: each of its
	// addresses stands for its network of that length. nil: none.
	Bits *uint8
}
