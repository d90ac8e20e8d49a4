package darwin_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
)

// captured returns a Mac's output without the first line, which names its source.
func captured(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "pfconf", "testdata", "mac", name))
	if err != nil {
		t.Fatal(err)
	}
	source, text, _ := strings.Cut(string(b), "\n")
	if !strings.HasPrefix(source, "# source: ") {
		t.Fatalf("%s begins with %q", name, source)
	}
	return text
}

// netstatFlags are the flag letters of netstat(1), from network_cmds
// netstat.tproj/route.c.
var netstatFlags = map[rune]darwin.RouteFlags{
	'U': darwin.RouteUp, 'G': darwin.RouteGateway, 'H': darwin.RouteHost, 'S': darwin.RouteStatic, 'C': 0x100 /* RTF_CLONING */, 'L': darwin.RouteLLInfo,
	'I': darwin.RouteScoped, 'm': darwin.RouteMulticast, 'b': darwin.RouteBroadcast, 'B': darwin.RouteBlackhole, 'R': darwin.RouteReject, 'W': darwin.RouteCloned,
	'c': 0x10000,    // RTF_PRCLONING
	'g': 0x40000000, // RTF_GLOBAL
	'i': 0, '1': darwin.RouteProto1,
}

// netstat converts the output of `netstat -rn` to routing messages and parses those.
// Interfaces exist and are up once a line names them; tunnels have only a link-local IPv6
// address. further, "name prefix", adds addresses.
func netstat(t testing.TB, text string, further ...string) *darwin.Network {
	t.Helper()
	k := darwintest.NewKernel()
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 || f[0] == "Destination" {
			continue
		}
		name := f[3]
		if !k.Has(name) {
			flags := darwin.InterfaceUp | darwin.InterfaceBroadcast | darwin.InterfaceRunning
			if darwin.KindOf(name) == "utun" {
				flags = darwin.InterfaceUp | darwin.InterfacePointToPoint | darwin.InterfaceRunning
			}
			k.AddInterface(name, flags, 1500)
			if darwin.KindOf(name) == "utun" {
				addAddress(t, k, name+" fe80::1/64")
			}
		}
		r := darwin.Route{Dst: netstatDestination(t, f[0], strings.Contains(f[1], ":")), Index: observe(t, k).Interface(name).Index}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			r.Gateway = a.WithZone("")
		}
		for _, c := range f[2] {
			flag, ok := netstatFlags[c]
			if !ok {
				t.Fatalf("flag %c of %q", c, line)
			}
			r.Flags |= flag
		}
		k.InstallRoute(r)
	}
	for _, a := range further {
		addAddress(t, k, a)
	}
	return observe(t, k)
}

func addAddress(t testing.TB, k *darwintest.Kernel, nameAndPrefix string) {
	t.Helper()
	name, prefix, _ := strings.Cut(nameAndPrefix, " ")
	if err := k.AddAddress(name, netip.MustParsePrefix(prefix)); err != nil {
		t.Fatal(err)
	}
}

// netstatDestination parses default, 10.0.0.1, 127 (a class A network), 224.0.0/4 and the
// IPv6 forms.
func netstatDestination(t testing.TB, s string, six bool) netip.Prefix {
	t.Helper()
	if s == "default" && six {
		return netip.MustParsePrefix("::/0")
	}
	if s == "default" {
		return netip.MustParsePrefix("0.0.0.0/0")
	}
	if strings.Contains(s, ":") {
		if !strings.Contains(s, "/") {
			s += "/128"
		}
		return netip.MustParsePrefix(s).Masked()
	}
	address, length, hasLength := strings.Cut(s, "/")
	parts := strings.Split(address, ".")
	n := 8 * len(parts)
	if hasLength {
		n, _ = strconv.Atoi(length)
	}
	for len(parts) < 4 {
		parts = append(parts, "0")
	}
	return netip.MustParsePrefix(fmt.Sprintf("%s/%d", strings.Join(parts, "."), n)).Masked()
}

// checkUplink compares the uplink's interface and router with want, "" for no uplink.
func checkUplink(t *testing.T, n *darwin.Network, f darwin.Family, want string, except ...string) {
	t.Helper()
	i, router := n.Uplink(f, except...)
	got := ""
	if i != nil {
		got = i.Name
		if router.IsValid() {
			got += " " + router.String()
		}
	}
	if got != want {
		t.Errorf("%v uplink %q, want %q", f, got, want)
	}
}

func TestUplinkCaptured(t *testing.T) {
	four, six := captured(t, "netstat-rn-26.txt"), captured(t, "netstat-rn-inet6.txt")
	// vmnet's bridge has a scoped default route.
	checkUplink(t, netstat(t, four), darwin.IPv4, "en0 192.168.178.1")
	// The system's own tunnels have scoped default routes.
	checkUplink(t, netstat(t, six), darwin.IPv6, "")
	read := slices.DeleteFunc(netstat(t, four).Routes, func(r darwin.Route) bool { return r.Dst.Addr().Is6() })
	if len(read) != 7 {
		t.Errorf("%d routes read: %+v", len(read), read)
	}
	// Even with unscoped ones, the tunnels have only link-local addresses.
	checkUplink(t, netstat(t, strings.ReplaceAll(six, "UGcIg", "UGcg")), darwin.IPv6, "")
	// A VPN's tunnel with another address becomes the family's uplink.
	vpn := six + "default fe80::%utun5 UGcg utun5\n"
	checkUplink(t, netstat(t, vpn, "utun5 fd6f:74a0:9a49::1/64"), darwin.IPv6, "utun5 fe80::")
}

func TestUplinkByLongerRoutes(t *testing.T) {
	const wifi = "default 192.168.178.1 UGScg en0\n"
	private := "utun4 10.8.0.2/32"
	lines := func(netif string, dsts ...string) (s string) {
		for _, d := range dsts {
			s += d + " 10.8.0.1 UGSc " + netif + "\n"
		}
		return s
	}
	// The routes of the WireGuard apps' "exclude private IPs".
	public := []string{"0.0.0.0/5", "8.0.0.0/7", "11.0.0.0/8", "12.0.0.0/6", "16.0.0.0/4", "32.0.0.0/3", "64.0.0.0/2", "128.0.0.0/3",
		"160.0.0.0/5", "168.0.0.0/6", "172.0.0.0/12", "172.32.0.0/11", "172.64.0.0/10", "172.128.0.0/9", "173.0.0.0/8", "174.0.0.0/7",
		"176.0.0.0/4", "192.0.0.0/9", "192.128.0.0/11", "192.160.0.0/13", "192.169.0.0/16", "192.170.0.0/15", "192.172.0.0/14",
		"192.176.0.0/12", "192.192.0.0/10", "193.0.0.0/8", "194.0.0.0/7", "196.0.0.0/6", "200.0.0.0/5", "208.0.0.0/4"}
	for _, tt := range []struct {
		name, text, want string
		except           []string
	}{
		{"a VPN by two halves", wifi + lines("utun4", "0.0.0.0/1", "128.0.0.0/1"), "utun4 10.8.0.1", nil},
		{"and no default beside", lines("utun4", "0.0.0.0/1", "128.0.0.0/1"), "utun4 10.8.0.1", nil},
		{"the caller's own tunnel", wifi + lines("utun4", "0.0.0.0/1", "128.0.0.0/1"), "en0 192.168.178.1", []string{"utun4"}},
		{"a VPN by the default itself", "default 10.8.0.1 UGSc utun4\n", "utun4 10.8.0.1", nil},
		{"one half", wifi + lines("utun4", "0.0.0.0/1"), "en0 192.168.178.1", nil},
		{"one half and most of the other", wifi + lines("utun4", "0.0.0.0/1", "128.0.0.0/2"), "en0 192.168.178.1", nil},
		{"quarters", wifi + lines("utun4", "0.0.0.0/2", "64.0.0.0/2", "128.0.0.0/1"), "utun4 10.8.0.1", nil},
		{"all but private space", wifi + lines("utun4", public...), "utun4 10.8.0.1", nil},
		{"but a piece of it", wifi + lines("utun4", public[1:]...), "en0 192.168.178.1", nil},
		{"scoped halves", wifi + strings.ReplaceAll(lines("utun4", "0.0.0.0/1", "128.0.0.0/1"), "UGSc", "UGScI"), "en0 192.168.178.1", nil},
		{"a kill switch", wifi + strings.ReplaceAll(lines("utun4", "0.0.0.0/1", "128.0.0.0/1"), "UGSc", "UGScB"), "en0 192.168.178.1", nil},
		{"Thunderbolt's bridge", "default 192.168.2.1 UGScg bridge0\n", "bridge0 192.168.2.1", nil},
		{"peer-to-peer Wi-Fi", "default 192.168.2.1 UGScg awdl0\n", "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var further []string
			if strings.Contains(tt.text, "utun4") {
				further = []string{private}
			}
			checkUplink(t, netstat(t, tt.text, further...), darwin.IPv4, tt.want, tt.except...)
		})
	}
	six := func(dsts ...string) *darwin.Network {
		text := "default fe80::9%en0 UGcg en0\n"
		for _, d := range dsts {
			text += d + " link#9 USc utun4\n"
		}
		return netstat(t, text, "utun4 fd00:8::2/128")
	}
	checkUplink(t, six("::/1", "8000::/1"), darwin.IPv6, "utun4")
	checkUplink(t, six("2000::/3"), darwin.IPv6, "utun4")
	checkUplink(t, six("2000::/4"+" link#9 USc utun4\n"+"fd00::/8"), darwin.IPv6, "en0 fe80::9")
}

// TestUplinkOfSeveralInterfaces checks that routes to different interfaces which together
// cover all addresses make none of these the uplink.
func TestUplinkOfSeveralInterfaces(t *testing.T) {
	const halves = "default 192.168.178.1 UGScg en0\n0.0.0.0/1 10.8.0.1 UGSc utun4\n128.0.0.0/1 10.9.0.1 UGSc utun5\n"
	n := netstat(t, halves, "utun4 10.8.0.2/32", "utun5 10.9.0.2/32")
	checkUplink(t, n, darwin.IPv4, "en0 192.168.178.1")
	// If two VPNs each cover all addresses, the longer routes win.
	both := "0.0.0.0/1 10.8.0.1 UGSc utun4\n128.0.0.0/1 10.8.0.1 UGSc utun4\n" +
		"0.0.0.0/2 10.9.0.1 UGSc utun5\n64.0.0.0/2 10.9.0.1 UGSc utun5\n128.0.0.0/2 10.9.0.1 UGSc utun5\n192.0.0.0/2 10.9.0.1 UGSc utun5\n"
	n = netstat(t, both, "utun4 10.8.0.2/32", "utun5 10.9.0.2/32")
	checkUplink(t, n, darwin.IPv4, "utun5 10.9.0.1")
	checkUplink(t, n, darwin.IPv4, "utun4 10.8.0.1", "utun5")
}

// TestUplinkOfALargeTable checks that coverage is computed in bounded time for a table of
// any size.
func TestUplinkOfALargeTable(t *testing.T) {
	n := netstat(t, "default 192.168.178.1 UGScg en0\n")
	for i := range 20000 {
		a := netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), 0})
		n.Routes = append(n.Routes, darwin.Route{Dst: netip.PrefixFrom(a, 24), Index: n.Interface("en0").Index, Flags: darwin.RouteUp})
	}
	checkUplink(t, n, darwin.IPv4, "en0 192.168.178.1")
}
