package tunnel_test

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }

// TestAnsweredByTheUplinkThatWasAsked has a peer on the internet send to each address of a
// host with two uplinks, and of a host whose own traffic is routed into a VPN: each answer
// leaves by the uplink of the address. The internet accepts from an uplink only that uplink's
// own address as source (RFC 2827).
func TestAnsweredByTheUplinkThatWasAsked(t *testing.T) {
	if err := netlab.Unavailable(); err != nil {
		t.Skip("the network lab isn't available:", err)
	}
	for _, tt := range []struct {
		about, commands string
		// answers are the host's addresses from which it must answer.
		answers []string
	}{
		{"two uplinks", "route add default via 198.51.100.1 metric 100\nroute add default via 203.0.113.1 metric 200",
			[]string{"198.51.100.2", "203.0.113.2"}},
		{"equal uplinks", "route add default nexthop via 198.51.100.1 nexthop via 203.0.113.1",
			[]string{"198.51.100.2", "203.0.113.2"}},
		{"a VPN as wg-quick makes it", `route add default via 198.51.100.1
			route add default dev vpn0 table 51820
			rule add not fwmark 0xca6c lookup 51820
			rule add lookup main suppress_prefixlength 0`, []string{"198.51.100.2"}},
		{"a VPN as Tailscale's exit node", `route add default via 198.51.100.1
			route add default dev vpn0 table 52
			rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
			rule add priority 5270 lookup 52`, []string{"198.51.100.2"}},
		{"a VPN by two halves", `route add default via 198.51.100.1
			route add 0.0.0.0/1 dev vpn0
			route add 128.0.0.0/1 dev vpn0`, []string{"198.51.100.2"}},
		// The answer must go to the gateway, not to the peer as if it were on the link.
		{"one default route, by the first", "route add default via 198.51.100.1", []string{"198.51.100.2"}},
	} {
		t.Run(tt.about, func(t *testing.T) {
			n := newNet(t)
			n.ip(n.host, tt.commands)
			n.listen()
			for _, at := range tt.answers {
				// Several flows, as Linux chooses among equal routes for each flow.
				for range 4 {
					if !n.answered(at) {
						t.Errorf("no answer from %s", at)
					}
				}
			}
		})
	}
}

// TestAnswersFollowTheRoutes has a peer send to the address of an uplink without a default
// route: the answer leaves by the only uplink that has one.
func TestAnswersFollowTheRoutes(t *testing.T) {
	if err := netlab.Unavailable(); err != nil {
		t.Skip("the network lab isn't available:", err)
	}
	n := newNet(t)
	n.ip(n.host, "route add default via 198.51.100.1 metric 100")
	n.listen()
	if err := n.inet.SetSysctl("net.ipv4.conf.x0.rp_filter", "0"); err != nil {
		t.Fatal(err)
	}
	if !n.answered("203.0.113.2") {
		t.Error("no answer by the only uplink with a route")
	}
}

// network is a host with two uplinks to a second host, which stands for the internet, and a
// VPN interface that delivers nothing.
type network struct {
	t          *testing.T
	host, inet *netlab.Host
	port       uint16
}

func newNet(t *testing.T) *network {
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error("close lab:", err)
		}
	})
	n := &network{t: t}
	for name, h := range map[string]**netlab.Host{"host": &n.host, "internet": &n.inet} {
		if *h, err = lab.Host(name); err != nil {
			t.Fatal(err)
		}
	}
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	for _, l := range [][2]netlab.Port{
		{{Host: n.host, Name: "u0", Addrs: p("198.51.100.2/30")}, {Host: n.inet, Name: "x0", Addrs: p("198.51.100.1/30")}},
		{{Host: n.host, Name: "u1", Addrs: p("203.0.113.2/30")}, {Host: n.inet, Name: "x1", Addrs: p("203.0.113.1/30")}},
	} {
		if err := lab.Link(l[0], l[1]); err != nil {
			t.Fatal(err)
		}
	}
	n.ip(n.host, "tuntap add vpn0 mode tun\nlink set vpn0 up\naddr add 10.8.0.2/32 dev vpn0")
	n.ip(n.inet, "addr add 192.0.2.9/32 dev lo")
	for name, value := range map[string]string{"net.ipv4.conf.all.rp_filter": "0", "net.ipv4.conf.u0.rp_filter": "0", "net.ipv4.conf.u1.rp_filter": "0"} {
		if err := n.host.SetSysctl(name, value); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"net.ipv4.conf.x0.rp_filter", "net.ipv4.conf.x1.rp_filter"} {
		if err := n.inet.SetSysctl(name, "1"); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func (n *network) ip(h *netlab.Host, commands string) {
	n.t.Helper()
	for line := range strings.Lines(commands) {
		err := h.Do(func() error {
			out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput()
			if err != nil {
				n.t.Logf("ip %s: %s", strings.TrimSpace(line), out)
			}
			return err
		})
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

// listen opens WireGuard's sockets on the host and sends each datagram back to its source.
func (n *network) listen() {
	n.t.Helper()
	s := tunnel.NewSockets(slog.New(slog.DiscardHandler))
	var fns []conn.ReceiveFunc
	if err := n.host.Do(func() (err error) {
		fns, n.port, err = s.Open(0)
		return err
	}); err != nil {
		n.t.Fatal(err)
	}
	done := make(chan struct{})
	n.t.Cleanup(func() {
		s.Release()
		<-done
	})
	go func() {
		defer close(done)
		bufs, sizes, eps := make([][]byte, s.BatchSize()), make([]int, s.BatchSize()), make([]conn.Endpoint, s.BatchSize())
		for i := range bufs {
			bufs[i] = make([]byte, 2000)
		}
		for {
			got, err := fns[0](bufs, sizes, eps)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			for i := range got {
				_ = s.Send([][]byte{bufs[i][:sizes[i]]}, eps[i])
			}
		}
	}()
}

// answered reports whether a peer on the internet gets an answer from the address to which it
// sent.
func (n *network) answered(at string) bool {
	n.t.Helper()
	var peer *net.UDPConn
	if err := n.inet.Do(func() (err error) {
		peer, err = net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(192, 0, 2, 9)}, net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(at), n.port)))
		return err
	}); err != nil {
		n.t.Fatal(err)
	}
	defer peer.Close()
	for range 5 {
		if _, err := peer.Write(make([]byte, 148)); err != nil {
			n.t.Fatal(err)
		}
		if err := peer.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			n.t.Fatal(err)
		}
		if _, err := peer.Read(make([]byte, 200)); err == nil {
			return true
		}
	}
	return false
}
