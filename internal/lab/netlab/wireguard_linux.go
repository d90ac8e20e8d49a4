package netlab

// Stock WireGuard ends: wireguard-go with the addresses, routes and rules that wg-quick
// would set.

import (
	"bufio"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tunnel is the stock wireguard-go program running on a host.
type Tunnel struct {
	Process *Process
	Name    string // the interface's name
	Config  Config

	host *Host
}

// fullTunnelMark is the mark of a tunnel's own packets and the number of the table
// for all others; wg-quick(8) uses the same number for both, too.
const fullTunnelMark = 51820

// wireguardStart is how long wireguard-go may take to create its interface.
const wireguardStart = 20 * time.Second

// wireguardGo builds the wireguard-go program from its module, once.
var wireguardGo = sync.OnceValues(func() (string, error) {
	return Build("golang.zx2c4.com/wireguard")
})

// NewKey returns a new private key and its public key.
func NewKey() (private, public Key, err error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return Key{}, Key{}, fmt.Errorf("make WireGuard key: %w", err)
	}
	return Key(k.Bytes()), Key(k.PublicKey().Bytes()), nil
}

// WireGuard starts wireguard-go on the host, with an interface of this name, and
// configures it from the text as wg-quick(8) would: keys and peers, addresses, MTU, and
// routes to the peers' allowed IPs. DNS servers are ignored.
func (h *Host) WireGuard(name, text string) (*Tunnel, error) {
	t, err := h.startWireGuard(name, text)
	if err != nil {
		return nil, fmt.Errorf("set up WireGuard on %s: %w", h.Name, err)
	}
	return t, nil
}

func (h *Host) startWireGuard(name, text string) (*Tunnel, error) {
	config, err := ParseConfig(text)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	program, err := wireguardGo()
	if err != nil {
		return nil, err
	}
	p, err := h.Start([]string{"LOG_LEVEL=error"}, program, "-f", name)
	if err != nil {
		return nil, err
	}
	t := &Tunnel{Process: p, Name: name, Config: config, host: h}
	if err := t.waitUntilUp(); err != nil {
		return nil, err
	}
	mark := fmt.Sprintf("set=1\nfwmark=%d\n", fullTunnelMark)
	if _, err := t.uapi(mark + config.uapi()); err != nil {
		return nil, err
	}
	return t, t.address()
}

// waitUntilUp waits until the program answers on its socket.
func (t *Tunnel) waitUntilUp() error {
	deadline := time.Now().Add(wireguardStart)
	for {
		_, err := t.uapi("get=1\n")
		if err == nil {
			return nil
		}
		select {
		case <-t.Process.Done():
			return fmt.Errorf("wireguard-go ended: %s", t.Process.Output())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for wireguard-go: %w", err)
		}
	}
}

// uapi sends one request of the configuration protocol and returns the answer's values.
func (t *Tunnel) uapi(request string) (map[string]string, error) {
	var conn net.Conn
	err := t.host.Do(func() (err error) {
		conn, err = net.Dial("unix", "/var/run/wireguard/"+t.Name+".sock")
		return err
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(wireguardStart))
	if _, err := conn.Write([]byte(request + "\n")); err != nil {
		return nil, err
	}
	answer := map[string]string{}
	lines := bufio.NewScanner(conn)
	for lines.Scan() && lines.Text() != "" {
		name, value, _ := strings.Cut(lines.Text(), "=")
		answer[name] = value
	}
	if answer["errno"] != "0" {
		return nil, fmt.Errorf("configure wireguard-go: errno %s", answer["errno"])
	}
	return answer, lines.Err()
}

// address sets the addresses and MTU of the configuration's [Interface], and adds the
// routes of the allowed IPs.
func (t *Tunnel) address() error {
	h := t.host
	if t.Config.MTU != 0 {
		if err := h.SetMTU(t.Name, t.Config.MTU); err != nil {
			return err
		}
	}
	if err := h.SetUp(t.Name, true); err != nil {
		return err
	}
	for _, a := range t.Config.Addresses {
		if err := h.AddAddr(t.Name, a); err != nil {
			return err
		}
	}
	for _, p := range t.Config.Peers {
		for _, to := range p.AllowedIPs {
			if err := t.route(to); err != nil {
				return err
			}
		}
	}
	return nil
}

// route adds a route for a prefix into the tunnel. A default route is added to a table of
// its own, as wg-quick(8) does: all packets use it except the tunnel's own, which have
// the mark, and those with a more specific route in the main table.
func (t *Tunnel) route(to netip.Prefix) error {
	if to.Bits() > 0 {
		return t.host.AddRoute(Route{To: to, Link: t.Name})
	}
	route, err := t.host.route(Route{To: to, Link: t.Name})
	if err != nil {
		return err
	}
	route.Table = fullTunnelMark
	if err := t.host.nl.RouteReplace(route); err != nil {
		return fmt.Errorf("add default route by %s of %s: %w", t.Name, t.host.Name, err)
	}
	return t.host.addTunnelRules(to.Addr().Is6())
}

func (h *Host) addTunnelRules(v6 bool) error {
	family := netlink.FAMILY_V4
	if v6 {
		family = netlink.FAMILY_V6
	}
	rest := netlink.NewRule()
	rest.Family, rest.Mark, rest.Invert, rest.Table = family, fullTunnelMark, true, fullTunnelMark
	main := netlink.NewRule()
	main.Family, main.Table, main.SuppressPrefixlen = family, unix.RT_TABLE_MAIN, 0
	// Each new rule goes before the existing ones.
	for _, rule := range []*netlink.Rule{rest, main} {
		if err := h.nl.RuleAdd(rule); err != nil {
			return fmt.Errorf("add policy rule for tunnel of %s: %w", h.Name, err)
		}
	}
	return nil
}

// Renew drops the tunnel's sessions, so that the next packet starts a handshake. A stock
// end whose other end restarted does so by itself after 15 s.
func (t *Tunnel) Renew() error {
	_, err := t.uapi("set=1\n" + t.Config.uapi())
	return err
}

// ListenPort returns the UDP port of the tunnel's own packets.
func (t *Tunnel) ListenPort() (uint16, error) {
	answer, err := t.uapi("get=1\n")
	if err != nil {
		return 0, err
	}
	port, err := strconv.ParseUint(answer["listen_port"], 10, 16)
	return uint16(port), err
}

// LastHandshake returns when the tunnel's only peer last completed a handshake; the zero
// time for never.
func (t *Tunnel) LastHandshake() (time.Time, error) {
	answer, err := t.uapi("get=1\n")
	if err != nil {
		return time.Time{}, err
	}
	sec, err := strconv.ParseInt(answer["last_handshake_time_sec"], 10, 64)
	if err != nil || sec == 0 {
		return time.Time{}, err
	}
	nsec, err := strconv.ParseInt(answer["last_handshake_time_nsec"], 10, 64)
	return time.Unix(sec, nsec), err
}

// PublicKey returns the public key of a private one.
func (k Key) PublicKey() Key {
	private, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		panic("netlab: 32 bytes are an X25519 key: " + err.Error())
	}
	return Key(private.PublicKey().Bytes())
}

// uapi returns the configuration in the form of the configuration protocol,
// https://www.wireguard.com/xplatform/.
func (c Config) uapi() string {
	var b strings.Builder
	set := func(name string, value any) { fmt.Fprintf(&b, "%s=%v\n", name, value) }
	set("private_key", hex.EncodeToString(c.PrivateKey[:]))
	set("listen_port", c.ListenPort)
	set("replace_peers", true)
	for _, p := range c.Peers {
		set("public_key", hex.EncodeToString(p.PublicKey[:]))
		set("preshared_key", hex.EncodeToString(p.PresharedKey[:]))
		if p.Endpoint.IsValid() {
			set("endpoint", p.Endpoint)
		}
		set("persistent_keepalive_interval", p.Keepalive)
		set("replace_allowed_ips", true)
		for _, a := range p.AllowedIPs {
			set("allowed_ip", a)
		}
	}
	return b.String()
}
