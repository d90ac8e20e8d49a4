package darwin_test

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

var compareNetip = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

// unhex decodes hex with spaces. "0*68" stands for 68 zero bytes.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	s = strings.ReplaceAll(s, "0*68", strings.Repeat("00", 68))
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The messages that golang.org/x/net/route v0.62 marshals for darwin, except for the link
// address, which here has the full size of its struct, as route(8) sends it.
var goldenMessages = []struct {
	name  string
	typ   byte
	route darwin.Route
	hex   string
}{
	{"a host by an interface", xnu.RTMAdd,
		darwin.Route{Dst: netip.MustParsePrefix("100.64.0.2/32"), Index: 7, Flags: darwin.RouteUp | darwin.RouteHost | darwin.RouteStatic | darwin.RouteProto1},
		"8000 05 01 0700 0000 05880000 03000000 00000000 01000000 0*68 " +
			"1002 0000 64400002 0000000000000000 1412 0700 00000000 000000000000000000000000"},
	{"half of IPv4", xnu.RTMAdd,
		darwin.Route{Dst: netip.MustParsePrefix("128.0.0.0/1"), Index: 7, Flags: darwin.RouteUp | darwin.RouteStatic | darwin.RouteProto1},
		"9000 05 01 0700 0000 01880000 07000000 00000000 01000000 0*68 " +
			"1002 0000 80000000 0000000000000000 1412 0700 00000000 000000000000000000000000 1002 0000 80000000 0000000000000000"},
	{"an IPv6 network", xnu.RTMDelete,
		darwin.Route{Dst: netip.MustParsePrefix("fd6d:6500::/48"), Index: 7, Flags: darwin.RouteUp | darwin.RouteStatic | darwin.RouteProto1},
		"a800 05 02 0700 0000 01880000 07000000 00000000 01000000 0*68 " +
			"1c1e 0000 00000000 fd6d6500000000000000000000000000 00000000 " +
			"1412 0700 00000000 000000000000000000000000 " +
			"1c1e 0000 00000000 ffffffffffff00000000000000000000 00000000"},
	{"a host by a router", xnu.RTMAdd,
		darwin.Route{Dst: netip.MustParsePrefix("2001:db8::9/128"), Gateway: netip.MustParseAddr("2001:db8::1"), Index: 4, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteHost | darwin.RouteStatic | darwin.RouteProto1},
		"9400 05 01 0400 0000 07880000 03000000 00000000 01000000 0*68 " +
			"1c1e 0000 00000000 20010db8000000000000000000000009 00000000 " +
			"1c1e 0000 00000000 20010db8000000000000000000000001 00000000"},
}

// dump returns a route as the kernel lists it.
func dump(r darwin.Route) []byte {
	return xnu.DumpMessage(xnu.Route{Dst: r.Dst, Gateway: r.Gateway, Index: r.Index, Flags: uint32(r.Flags)})
}

// wire returns an interface in the form of the kernel's messages.
func wire(i darwin.Interface) xnu.Interface {
	return xnu.Interface{Name: i.Name, Index: i.Index, Flags: uint32(i.Flags), MTU: i.MTU}
}

func TestAppendRouteGolden(t *testing.T) {
	for _, tt := range goldenMessages {
		t.Run(tt.name, func(t *testing.T) {
			got := darwin.AppendRoute([]byte("before"), tt.typ, 1, tt.route)
			if diff := cmp.Diff(unhex(t, tt.hex), got[len("before"):]); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			back, ok := darwin.ParseRoute(got[len("before"):])
			if diff := cmp.Diff(tt.route, back, compareNetip); !ok || diff != "" {
				t.Errorf("parsed again: %v (-want +got):\n%s", ok, diff)
			}
		})
	}
}

// TestParseRouteCaptured parses socket addresses that Macs' kernels wrote (published with
// the tests of x/net and netbird): masks of odd lengths and families, and a link address
// with a name.
func TestParseRouteCaptured(t *testing.T) {
	head := func(size, index string, flags, addrs string) string {
		return size + " 05 14 " + index + " 0000 " + flags + " " + addrs + " 00000000 00000000 0*68 "
	}
	for _, tt := range []struct {
		name, hex string
		want      darwin.Route
	}{
		{"network on the link", head("8800", "0400", "01010000", "07000000") +
			"1002 0000 c0a85600 0000000000000000 1412 0400 06000000 000000000000000000000000 07ffffffffffff00",
			darwin.Route{Dst: netip.MustParsePrefix("192.168.86.0/24"), Index: 4, Flags: 0x101}},
		{"by a tunnel with a name", head("8800", "2100", "01080000", "07000000") +
			"1002 0000 64710000 0000000000000000 1412 2100 01080000 7574756e34333139 00000000 06020000ffff0000",
			darwin.Route{Dst: netip.MustParsePrefix("100.113.0.0/16"), Index: 33, Flags: darwin.RouteUp | darwin.RouteStatic}},
		{"default, mask of length 0", head("8000", "0400", "03080000", "07000000") +
			"1002 0000 00000000 0000000000000000 1002 0000 c0a85601 0000000000000000 00000000",
			darwin.Route{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("192.168.86.1"), Index: 4, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic}},
		{"scoped default by a link-local router with the scope inside", head("9800", "0600", "03080001", "07000000") +
			"1c1e 0000 00000000 00000000000000000000000000000000 00000000 1c1e 0000 00000000 fe80000600000000f22f4bfffe093bff 00000000 00000000",
			darwin.Route{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fe80::f22f:4bff:fe09:3bff"), Index: 6, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic | darwin.RouteScoped}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := darwin.ParseRoutes(unhex(t, tt.hex))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]darwin.Route{tt.want}, got, compareNetip); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseSkipsDamage(t *testing.T) {
	good := dump(goldenMessages[0].route)
	bad := func(change func(b []byte)) []byte {
		b := dump(goldenMessages[2].route)
		change(b)
		return b
	}
	for name, b := range map[string][]byte{
		"another version":      bad(func(b []byte) { b[2] = 6 }),
		"another type":         bad(func(b []byte) { b[3] = 99 }),
		"another family":       bad(func(b []byte) { b[xnu.SizeRt+1] = 7 }),
		"a mask with holes":    bad(func(b []byte) { b[xnu.SizeRt+28+20+8] = 0xf0 }),
		"a destination beyond": bad(func(b []byte) { b[xnu.SizeRt+8+15] = 1 }),
		"an address too long":  bad(func(b []byte) { b[xnu.SizeRt] = 255 }),
		"more addresses":       bad(func(b []byte) { b[xnu.OffRtAddrs] = 0xff }),
		"a short message":      {8, 0, xnu.RTMVersion, xnu.RTMGet2, 0, 0, 0, 0},
	} {
		got, err := darwin.ParseRoutes(append(b, good...))
		if err != nil || len(got) != 1 || got[0] != goldenMessages[0].route {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for name, b := range map[string][]byte{
		"length 0":        {0, 0, xnu.RTMVersion, xnu.RTMGet2},
		"length beyond":   {200, 0, xnu.RTMVersion, xnu.RTMGet2},
		"half a header":   {8, 0},
		"cut in a header": good[:20],
	} {
		list := append(append([]byte(nil), good...), b...)
		if got, err := darwin.ParseRoutes(list); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
		if got, err := darwin.ParseInterfaces(list); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestParseInterfacesDamaged(t *testing.T) {
	i := &darwin.Interface{Name: "en0", Index: 4, Flags: darwin.InterfaceUp}
	for name, change := range map[string]func(b []byte) []byte{
		"a name with an option's look": func(b []byte) []byte { b[xnu.SizeIf2+8] = '-'; return b },
		"a name beyond the end":        func(b []byte) []byte { b[xnu.SizeIf2+5] = 200; return b },
		"no number":                    func(b []byte) []byte { b[xnu.OffIfIndex] = 0; return b },
		"too short":                    func(b []byte) []byte { b[0] = xnu.SizeIf2 - 4; return b[:xnu.SizeIf2-4] },
	} {
		if list, err := darwin.ParseInterfaces(change(xnu.InterfaceMessage(xnu.RTMIfInfo2, xnu.SizeIf2, wire(*i)))); err == nil {
			t.Errorf("%s: %+v", name, list)
		}
	}
	// An address of an interface that isn't listed is dropped.
	b := append(xnu.InterfaceMessage(xnu.RTMIfInfo2, xnu.SizeIf2, wire(*i)), xnu.AddressMessage(xnu.RTMNewAddr, 5, netip.MustParsePrefix("10.0.0.1/8"), netip.Addr{})...)
	if list, err := darwin.ParseInterfaces(b); err != nil || len(list) != 1 || list[0].Addresses != nil {
		t.Errorf("%+v, %v", list, err)
	}
}

func FuzzParseRIB(f *testing.F) {
	for _, m := range goldenMessages {
		f.Add(unhex(f, m.hex))
		f.Add(dump(m.route))
	}
	k := darwintest.NewKernel()
	k.AddInterface("en0", darwin.InterfaceUp|darwin.InterfaceBroadcast, 1500)
	k.AddAddress("en0", netip.MustParsePrefix("192.0.2.5/24"))
	k.AddAddress("en0", netip.MustParsePrefix("2001:db8::5/64"))
	list, _ := k.Interfaces()
	f.Add(list)
	f.Fuzz(func(t *testing.T, b []byte) {
		routes, _ := darwin.ParseRoutes(b)
		for _, r := range routes {
			if !r.Dst.IsValid() || r.Dst != r.Dst.Masked() {
				t.Errorf("route %+v", r)
			}
			// A parsed route can be written, and parses to the same route again.
			back, ok := darwin.ParseRoute(darwin.AppendRoute(nil, xnu.RTMAdd, 0, r))
			if !ok || back.Dst != r.Dst && r.Flags&darwin.RouteHost == 0 {
				t.Errorf("%+v became %+v", r, back)
			}
		}
		list, err := darwin.ParseInterfaces(b)
		for _, i := range list {
			if err == nil && (darwin.CheckInterface(i.Name) != nil || i.Index <= 0) {
				t.Errorf("interface %+v", i)
			}
		}
		darwin.Matters(b)
	})
}
