package simmac

// Where a tunnel's own addresses lead, and the addresses that pf translates to.

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// The Mac's packets to its own address on a tunnel: IPv4 comes out of the device,
// and what is written back arrives there and is for the Mac; IPv6 stays inside.
func TestOwnAddress(t *testing.T) {
	m := newMac(t)
	d, name := newTunnel(t, m)
	pf := darwin.NewPF(m)
	_, err := pf.Enable(t.Context())
	must(t, err)
	var local []byte
	m.Local(func(b []byte) { local = b })

	own := picture.host.Addresses[0]
	p := syn(own, own)
	if o := m.Emit(p); o.Fate != Sent || o.Link != name || !o.Out.Seen {
		t.Fatalf("IPv4: %s by %q, %s", o.Fate, o.Link, o.Why)
	}
	buf, sizes := make([]byte, 2000), make([]int, 1)
	if _, err := d.Read([][]byte{buf}, sizes, 16); err != nil || string(buf[16:16+sizes[0]]) != string(p) {
		t.Fatalf("the device gave %x, %v", buf[16:16+sizes[0]], err)
	}
	if _, err := d.Write([][]byte{buf[:16+sizes[0]]}, 16); err != nil || string(local) != string(p) {
		t.Errorf("turned round, the Mac got %x, %v", local, err)
	}
	must(t, pf.Load(t.Context(), anchor, "block drop in quick on utun0 from 100.64.0.1 to 100.64.0.1\n"))
	if o := m.Inject(name, p); o.Fate != Dropped || o.Why != "pf" || !o.In.Seen {
		t.Errorf("turned round against a rule: %s, %s", o.Fate, o.Why)
	}
	must(t, pf.Load(t.Context(), anchor, "block drop out quick on utun0 from 100.64.0.1 to 100.64.0.1\n"))
	if o := m.Emit(p); o.Fate != Dropped || o.Why != "pf" {
		t.Errorf("sent against a rule: %s, %s", o.Fate, o.Why)
	}

	six := picture.host.Addresses[1]
	if o := m.Emit(syn(six, six)); o.Fate != Delivered || o.Link != "" || !o.In.Seen {
		t.Errorf("IPv6: %s by %q, %s", o.Fate, o.Link, o.Why)
	}
	ethernet := netip.MustParseAddr("203.0.113.1")
	if o := m.Emit(syn(own, ethernet)); o.Fate != Delivered || o.Link != "" {
		t.Errorf("an address of en0: %s by %q, %s", o.Fate, o.Link, o.Why)
	}
	must(t, m.Kernel.AddAddress("lo0", netip.MustParsePrefix("10.254.254.254/32")))
	if o := m.Emit(syn(own, netip.MustParseAddr("10.254.254.254"))); o.Fate != Delivered || o.Link != "" {
		t.Errorf("an alias of lo0: %s by %q, %s", o.Fate, o.Link, o.Why)
	}
	n, err := darwin.Observe(m)
	must(t, err)
	for _, r := range n.Routed() {
		if r.Prefix.Addr() == own || r.Prefix.Addr() == six || r.Interface == "lo0" {
			t.Errorf("%v by %s passes for a network", r.Prefix, r.Interface)
		}
	}
	if lo := n.Interface("lo0"); len(lo.Addresses) != 3 || lo.Addresses[2].Prefix.String() != "10.254.254.254/32" {
		t.Errorf("lo0 has %v", lo.Addresses)
	}
}

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
		var out pfsim.Hook
		m.Judge(func(pf *pfsim.PF) {
			out = pf.Send(pfsim.Packet{Src: netip.MustParseAddr("fd00::2"), Dst: b6, Proto: pfconf.ProtoUDP, SrcPort: port, DstPort: 53}, "en0").Out
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
