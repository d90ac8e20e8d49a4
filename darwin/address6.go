package darwin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// AddressFlags are IN6_IFF_* of xnu bsd/netinet6/in6_var.h: of what kind an IPv6
// address is, and what state it is in. Routing messages don't carry them.
type AddressFlags uint32

// The flags that ifconfig(8) prints.
const (
	AddressAnycast    AddressFlags = 0x1
	AddressTentative  AddressFlags = 0x2 // it isn't known yet whether another host has it
	AddressDuplicated AddressFlags = 0x4 // another host has it
	AddressDetached   AddressFlags = 0x8
	AddressDeprecated AddressFlags = 0x10 // not used for new flows
	AddressAutoconf   AddressFlags = 0x40
	// AddressTemporary addresses go after a day or a week (RFC 8981).
	AddressTemporary  AddressFlags = 0x80
	AddressDynamic    AddressFlags = 0x100 // from DHCPv6
	AddressOptimistic AddressFlags = 0x200 // tentative, and used all the same (RFC 4429)
	AddressSecured    AddressFlags = 0x400 // stable, and not made of the hardware address
	AddressCLAT46     AddressFlags = 0x1000
)

type addressWord struct {
	flag AddressFlags
	word string
}

// addressWords are the words for the flags in the order in which ifconfig prints
// them (network_cmds ifconfig.tproj/af_inet6.c, in6_status).
var addressWords = []addressWord{
	{AddressAnycast, "anycast"}, {AddressTentative, "tentative"}, {AddressOptimistic, "optimistic"}, {AddressDuplicated, "duplicated"},
	{AddressDetached, "detached"}, {AddressDeprecated, "deprecated"}, {AddressAutoconf, "autoconf"}, {AddressTemporary, "temporary"},
	{AddressDynamic, "dynamic"}, {AddressSecured, "secured"}, {AddressCLAT46, "clat46"},
}

// String returns the flags as ifconfig prints them.
func (f AddressFlags) String() string {
	var words []string
	for _, w := range addressWords {
		if f&w.flag != 0 {
			words = append(words, w.word)
		}
	}
	return strings.Join(words, " ")
}

// An Address6 is an IPv6 address of an interface, with its kind.
type Address6 struct {
	// Prefix has the address, without a zone, and the length of its network.
	Prefix netip.Prefix
	// Peer is the other end of a point-to-point link; invalid if there is none.
	Peer netip.Addr
	// Scope is the number of the interface that a link-local address belongs to, 0
	// for other addresses.
	Scope int
	Flags AddressFlags
}

// unsettled are the addresses that pf leaves out of (if), link-local ones besides
// (pfi_instance_add of xnu bsd/net/pf_if.c).
const unsettled = AddressAnycast | AddressTentative | AddressDuplicated | AddressDetached | AddressCLAT46 | AddressTemporary | AddressDeprecated

// IsSettled reports whether the address is one to keep: permanent, preferred, and
// not link-local. These are the addresses that pf's (if) stands for.
//
// pf looks at the flags when a rule with (if) is loaded and when an address of the
// interface comes or goes (ifnet_notify_address of xnu bsd/net/dlil.c), not when
// one turns out to be unique or becomes deprecated. No routing message tells
// of that either.
func (a Address6) IsSettled() bool {
	return a.Flags&unsettled == 0 && !a.Prefix.Addr().IsLinkLocalUnicast()
}

// Addresses6 returns the IPv6 addresses of an interface with what only ifconfig
// tells: whether they are temporary, deprecated, tentative and so on. It starts a
// process: ask when the network has changed.
func (c *Ifconfig) Addresses6(ctx context.Context, iface string) ([]Address6, error) {
	if err := checkInterface(iface); err != nil {
		return nil, fmt.Errorf("show addresses of interface %q: %w", iface, err)
	}
	args := []string{iface, "inet6"}
	stdout, stderr, status, err := c.r.Run(ctx, nil, ifconfigPath, args...)
	if err == nil && (status != 0 || firstLine(stderr) != "") {
		err = failure(stderr, status, ifconfigPath, args)
	}
	var list []Address6
	if err == nil {
		list, err = ParseAddresses6(string(stdout))
	}
	if err != nil {
		return nil, fmt.Errorf("show addresses of interface %q: %w", iface, err)
	}
	return list, nil
}

// ParseAddresses6 reads the lines of ifconfig(8) that begin with inet6; others, as
// those of the interface itself, are passed over, and so are words behind the
// prefix length that it doesn't know:
//
//	inet6 2001:db8::8c9:acbf prefixlen 64 deprecated autoconf temporary
//	inet6 fe80::400:228%en0 prefixlen 64 secured scopeid 0x6
//	inet6 fd00::1 --> fd00::2 prefixlen 128
func ParseAddresses6(out string) ([]Address6, error) {
	var list []Address6
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "inet6" {
			continue
		}
		a, err := parseAddress6(f[1:])
		if err != nil {
			return nil, fmt.Errorf("read %q: %w", firstLine([]byte(line)), err)
		}
		list = append(list, a)
	}
	return list, nil
}

func parseAddress6(f []string) (a Address6, err error) {
	if len(f) < 3 {
		return a, errors.New("too few words")
	}
	addr, err := parseAddr6(f[0])
	if err != nil {
		return a, err
	}
	f = f[1:]
	if f[0] == "-->" {
		if a.Peer, err = parseAddr6(f[1]); err != nil {
			return a, err
		}
		f = f[2:]
	}
	if len(f) < 2 || f[0] != "prefixlen" {
		return a, errors.New("no prefixlen")
	}
	bits, err := strconv.ParseUint(f[1], 10, 8)
	if err != nil || bits > 128 {
		return a, fmt.Errorf("prefixlen %q is not valid", f[1])
	}
	a.Prefix = netip.PrefixFrom(addr, int(bits))
	f = f[2:]
	for i, word := range f {
		if n := slices.IndexFunc(addressWords, func(w addressWord) bool { return w.word == word }); n >= 0 {
			a.Flags |= addressWords[n].flag
		}
		if word == "scopeid" && i+1 < len(f) {
			n, err := strconv.ParseUint(f[i+1], 0, 31)
			if err != nil {
				return a, fmt.Errorf("scopeid %q is not valid", f[i+1])
			}
			a.Scope = int(n)
		}
	}
	return a, nil
}

// parseAddr6 reads an IPv6 address and takes its zone off.
func parseAddr6(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err == nil && !a.Is6() {
		err = fmt.Errorf("%q is not IPv6", s)
	}
	return a.WithZone(""), err
}
