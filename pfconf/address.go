package pfconf

import "net/netip"

// An AddressKind is which of its forms an [Address] has.
type AddressKind uint8

// The forms of an address.
const (
	// AddrAny is any.
	AddrAny AddressKind = iota
	// AddrPrefix is an address or a network: Prefix.
	AddrPrefix
	// AddrRange is Prefix.Addr() - Last.
	AddrRange
	// AddrTable is <Name>.
	AddrTable
	// AddrInterface is Name, an interface or self, without parentheses: the
	// addresses that it has at the time of loading. Expand replaces it.
	AddrInterface
	// AddrDynamic is (Name): the addresses that the interface has when the
	// packet comes.
	AddrDynamic
	// AddrNoRoute is no-route. On macOS it matches nothing.
	AddrNoRoute
	// AddrURPFFailed is urpf-failed. On macOS it matches nothing.
	AddrURPFFailed
)

// AddressModifier is a set of the words after an interface's name.
type AddressModifier uint8

// The modifiers: en0:network, en0:broadcast, en0:peer, en0:0 (no aliases).
const (
	ModNetwork AddressModifier = 1 << iota
	ModBroadcast
	ModPeer
	ModNoAlias
)

// An Address is what may stand for an address in a rule, a table or a pool.
type Address struct {
	Kind AddressKind
	Not  bool // ! before it
	// Prefix is masked: pf keeps the network only.
	Prefix netip.Prefix
	// Zone is the interface of a link-local address, fe80::1%en0.
	Zone string
	Last netip.Addr
	Name string
	Mod  AddressModifier
	// Bits is the prefix length after an interface, (en0)/24. nil: none.
	Bits *uint8
}
