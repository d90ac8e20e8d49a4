package nlconn

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	library "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestRoute looks up packets' routes by each property that a request can have.
func TestRoute(t *testing.T) {
	inNamespace(t)
	h, err := NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	defer h.Close()
	c, err := Dial(unix.NETLINK_ROUTE)
	must(t, err)
	defer c.Close()
	must(t, h.LinkAdd(&library.Veth{LinkAttrs: library.LinkAttrs{Name: "a"}, PeerName: "b"}))
	index := map[string]int{}
	network := func(s string) *net.IPNet {
		_, n, err := net.ParseCIDR(s)
		must(t, err)
		return n
	}
	for _, name := range []string{"lo", "a", "b"} {
		l, err := h.LinkByName(name)
		must(t, err, h.LinkSetUp(l))
		index[name] = l.Attrs().Index
	}
	for name, address := range map[string]string{"a": "192.0.2.1/24", "b": "198.51.100.1/24"} {
		l, err := h.LinkByName(name)
		must(t, err)
		a, err := library.ParseAddr(address)
		must(t, err, h.AddrAdd(l, a))
	}
	must(t, h.RouteAdd(&library.Route{Dst: network("0.0.0.0/0"), Gw: net.IPv4(192, 0, 2, 254), Priority: 7}),
		h.RouteAdd(&library.Route{Dst: network("0.0.0.0/0"), Gw: net.IPv4(198, 51, 100, 254), Table: 100}),
		h.RouteAdd(&library.Route{Dst: network("203.0.113.0/24"), Type: unix.RTN_UNREACHABLE}),
		h.RouteAdd(&library.Route{Dst: network("203.0.114.0/24"), Type: unix.RTN_PROHIBIT}),
		h.RouteAdd(&library.Route{Dst: network("203.0.115.0/24"), Type: unix.RTN_BLACKHOLE}))
	for _, say := range []func(*library.Rule){
		func(r *library.Rule) { r.Mark = 9 },
		func(r *library.Rule) { r.IPProto, r.Dport = unix.IPPROTO_TCP, library.NewRulePortRange(443, 443) },
		func(r *library.Rule) { r.Src = network("192.0.2.1/32") },
	} {
		r := library.NewRule()
		r.Family, r.Table = unix.AF_INET, 100
		say(r)
		must(t, h.RuleAdd(r))
	}
	at := netip.MustParseAddr
	for name, c2 := range map[string]struct {
		packet Packet
		want   Route
		err    error
	}{
		"by default":  {Packet{Dst: at("8.8.8.8")}, Route{OIF: index["a"], Router: at("192.0.2.254"), Src: at("192.0.2.1")}, nil},
		"on the link": {Packet{Dst: at("198.51.100.7")}, Route{OIF: index["b"], Src: at("198.51.100.1")}, nil},
		"by a mark":   {Packet{Dst: at("8.8.8.8"), Mark: 9}, Route{OIF: index["b"], Router: at("198.51.100.254"), Src: at("198.51.100.1")}, nil},
		"by a port": {Packet{Dst: at("8.8.8.8"), Proto: unix.IPPROTO_TCP, DstPort: 443},
			Route{OIF: index["b"], Router: at("198.51.100.254"), Src: at("198.51.100.1")}, nil},
		"by another protocol's port": {Packet{Dst: at("8.8.8.8"), Proto: unix.IPPROTO_UDP, SrcPort: 5, DstPort: 443},
			Route{OIF: index["a"], Router: at("192.0.2.254"), Src: at("192.0.2.1")}, nil},
		"of a protocol without ports": {Packet{Dst: at("8.8.8.8"), Proto: unix.IPPROTO_ICMP, SrcPort: 5, DstPort: 443},
			Route{OIF: index["a"], Router: at("192.0.2.254"), Src: at("192.0.2.1")}, nil},
		"by a source": {Packet{Dst: at("8.8.8.8"), Src: at("192.0.2.1")},
			Route{OIF: index["b"], Router: at("198.51.100.254")}, nil}, // the request has the source
		"by an interface": {Packet{Dst: at("198.51.100.7"), OIF: index["a"]}, Route{OIF: index["a"], Router: at("192.0.2.254"), Src: at("192.0.2.1")}, nil},
		"as it is in the table": {Packet{Dst: at("8.8.8.8"), Match: true},
			Route{OIF: index["a"], Router: at("192.0.2.254"), Metric: 7}, nil},
		"unreachable": {Packet{Dst: at("203.0.113.1")}, Route{}, unix.EHOSTUNREACH},
		"prohibited":  {Packet{Dst: at("203.0.114.1")}, Route{}, unix.EACCES},
		"a blackhole": {Packet{Dst: at("203.0.115.1")}, Route{}, unix.EINVAL},
		"none":        {Packet{Dst: at("2001:db8::1")}, Route{}, unix.ENETUNREACH},
	} {
		got, err := c.Route(c2.packet)
		if !errors.Is(err, c2.err) || (err == nil) != (c2.err == nil) {
			t.Errorf("%s: %v, want %v", name, err, c2.err)
			continue
		}
		if err == nil {
			c2.want.Kind = unix.RTN_UNICAST
		}
		// The answers differ in what they say about the table's entry.
		c2.want.Table, c2.want.Dst = got.Table, got.Dst
		if got != c2.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c2.want)
		}
	}
	own, err := c.Route(Packet{Dst: at("192.0.2.1")})
	if err != nil || own.Kind != unix.RTN_LOCAL {
		t.Errorf("to the host itself: %+v, %v", own, err)
	}
	all, err := c.Routes(unix.AF_INET, func(r Route) bool { return r.Kind == unix.RTN_UNICAST && r.Dst.Bits() == 0 })
	if err != nil || len(all) != 2 || all[0].Table+all[1].Table != 100+unix.RT_TABLE_MAIN || all[0].Dst.Addr() != netip.IPv4Unspecified() {
		t.Errorf("default routes %+v, %v", all, err)
	}
}

// FuzzRoute parses arbitrary bytes as a route.
func FuzzRoute(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(make([]byte, unix.SizeofRtMsg), 8, 0, 4, 0, 1, 0, 0, 0))
	f.Add([]byte{2, 0, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0, 8, 0, 30, 0, 7, 0, 0, 0})
	f.Add([]byte{2, 33, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0, 8, 0, 1, 0, 10, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRoute(b)
		if err == nil && r.Dst.IsValid() && r.Dst.Bits() != int(b[1]) {
			t.Errorf("%d bits became %v", b[1], r.Dst)
		}
	})
}
