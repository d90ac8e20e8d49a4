package simmac

// IGMP, whose packets have an IP option.

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// igmp is a membership report (RFC 3376) with the option Router Alert (RFC 2113),
// without which no host sends one.
func igmp(src, group netip.Addr) []byte {
	b := make([]byte, 32)
	b[0], b[8], b[9] = 0x46, 1, 2
	binary.BigEndian.PutUint16(b[2:], 32)
	copy(b[20:], []byte{0x94, 4, 0, 0})
	b[24] = 0x16
	copy(b[28:], group.AsSlice())
	putAddresses(b, src, group)
	binary.BigEndian.PutUint16(b[26:], checksum(b[24:], 0))
	return b
}

// With pf on, a packet with options passes only by a rule that allows them.
func TestIGMP(t *testing.T) {
	m := newMac(t)
	m.Kernel.SetVariable("net.inet.ip.forwarding", "1")
	group := netip.MustParseAddr("239.255.255.250")
	own, neighbour := igmp(netip.MustParseAddr("203.0.113.1"), group), igmp(netip.MustParseAddr("203.0.113.9"), group)
	p, _, ok := decode(own)
	if !ok || p.Proto != 2 || !p.Options || p.Dst != group {
		t.Fatalf("decoded as %+v", p)
	}
	check := func(when string, pass bool) {
		t.Helper()
		if o := m.Emit(own); (o.Fate == Sent && o.Link == "en0") != pass {
			t.Errorf("%s: the Mac's own report: %s by %q, %s", when, o.Fate, o.Link, o.Why)
		}
		if o := m.Inject("en0", neighbour); (o.Fate == Delivered) != pass {
			t.Errorf("%s: a neighbour's report: %s by %q, %s", when, o.Fate, o.Link, o.Why)
		}
	}
	check("pf off", true)
	pf := darwin.NewPF(m)
	_, err := pf.Enable(t.Context())
	must(t, err)
	check("pf on", false)
	const allow = "pass inet proto igmp all no state allow-opts\n"
	must(t, pf.Load(t.Context(), anchor, allow))
	check("a rule with allow-opts", true)
	must(t, pf.Load(t.Context(), anchor, "pass all\n"))
	check("a rule without allow-opts", false)
	// It left a state behind, which decides until its time is up.
	must(t, pf.Load(t.Context(), anchor, allow))
	check("after a rule without allow-opts", false)
	m.Judge(func(pf *pfsim.PF) { pf.FlushStates() })
	check("without its state", true)
}
