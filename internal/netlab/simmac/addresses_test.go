package simmac

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf"
)

// pf's (en0) stands for the settled addresses only, and pf isn't told of an
// address that becomes one.
func TestTranslationAddresses(t *testing.T) {
	m := New(Options{Seed: 1})
	must(t, m.AddEthernet("en0", []string{"2001:db8:1::1/64"}, "2001:db8:1::fe"))
	settled := netip.MustParseAddr("2001:db8:1::1")
	for s, flags := range map[string]darwin.AddressFlags{
		"2001:db8:1::7e/64": darwin.AddressAutoconf | darwin.AddressTemporary,
		"2001:db8:1::de/64": darwin.AddressAutoconf | darwin.AddressDeprecated,
		"2001:db8:1::7a/64": darwin.AddressAutoconf | darwin.AddressTentative,
		"fe80::1/64":        darwin.AddressSecured,
	} {
		must(t, m.Kernel.AddAddress6("en0", netip.MustParsePrefix(s), flags))
	}
	pf := darwin.NewPF(m)
	_, err := pf.Enable(t.Context())
	must(t, err)
	const rules = "nat on en0 inet6 from fd00::/8 to any -> (en0)\n"
	must(t, pf.Load(t.Context(), anchor, rules))
	source := func(port uint16) netip.Addr {
		var out pfconf.Hook
		m.Judge(func(pf *pfconf.Machine) {
			out = pf.Send(pfconf.Packet{Src: netip.MustParseAddr("fd00::2"), Dst: b6, Proto: pfconf.ProtoUDP, SrcPort: port, DstPort: 53}, "en0").Out
		})
		return out.Packet.Src
	}
	for port := range uint16(8) {
		if got := source(1000 + port); got != settled {
			t.Errorf("translated to %v, want %v", got, settled)
		}
	}
	// The tentative one turns out to be the Mac's, and the other becomes deprecated.
	must(t, m.Kernel.SetAddressFlags("en0", netip.MustParseAddr("2001:db8:1::7a"), darwin.AddressAutoconf))
	must(t, m.Kernel.SetAddressFlags("en0", settled, darwin.AddressDeprecated))
	if got := source(2000); got != settled {
		t.Errorf("translated to %v without being told of an address", got)
	}
	must(t, pf.Load(t.Context(), anchor, rules))
	for port := range uint16(8) {
		if got := source(3000 + port); got != netip.MustParseAddr("2001:db8:1::7a") {
			t.Errorf("after another load translated to %v", got)
		}
	}
}
