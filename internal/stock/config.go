package stock

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Values of a configuration that a peer's owner has no reason to change.
const (
	// ConfigMTU is the MTU of the tunnel on a peer: what IPv6 demands of every
	// link (RFC 8200 section 5). The 1420 that WireGuard assumes needs 1500
	// bytes all the way to the host, which DSL, mobile networks and hotels
	// don't give, and there a full tunnel stalls without an error. The
	// WireGuard app for iOS uses 1280 for the same reason.
	ConfigMTU = 1280

	// ConfigKeepalive keeps the peer's entry in the NATs on its way alive, so
	// that the host can reach it; 25 s is what WireGuard's authors recommend.
	ConfigKeepalive = 25 * time.Second
)

// KeyPlaceholder stands in a configuration for a private key that only the
// peer's owner has. It isn't a key, so a WireGuard app that is given it
// unchanged says so instead of making a tunnel that can't work.
const KeyPlaceholder = "REPLACE-WITH-THE-PRIVATE-KEY-OF-THIS-DEVICE"

// configLimit bounds the text that ParseConfig reads, in bytes.
const configLimit = 1 << 16

// ErrBadConfig is in the chain of ParseConfig's and Validate's errors.
var ErrBadConfig = errors.New("not a WireGuard configuration of this kind")

// Config is a configuration for a stock WireGuard app: one interface and one
// peer, which is the host.
type Config struct {
	PrivateKey mesh.PrivateKey // optional: zero is written as KeyPlaceholder
	Addresses  []netip.Prefix  // required: of the interface
	DNS        []netip.Addr    // optional
	MTU        int             // optional: bytes, 0 leaves it to the app, else 576 to 65535

	PublicKey  mesh.PublicKey // required: the host's
	AllowedIPs []netip.Prefix // required: what goes into the tunnel
	Endpoint   mesh.Endpoint  // optional: zero where the host has no known address
	Keepalive  time.Duration  // optional: whole seconds up to mesh.MaxKeepalive
}

// Everything is what a device sends that has no way of its own: both families.
func Everything() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
}

// ForPeer returns a device's configuration to send what is in allowed through the host.
// What the host then lets pass is decided there.
func ForPeer(own mesh.PrivateKey, a mesh.Addresses, host mesh.PublicKey, endpoint mesh.Endpoint, allowed []netip.Prefix, dns []netip.Addr) Config {
	return Config{
		PrivateKey: own,
		Addresses:  []netip.Prefix{netip.PrefixFrom(a[0], 32), netip.PrefixFrom(a[1], 128)},
		DNS:        dns,
		MTU:        ConfigMTU,
		PublicKey:  host,
		AllowedIPs: allowed,
		Endpoint:   endpoint,
		Keepalive:  ConfigKeepalive,
	}
}

// Validate reports what would make c a configuration that no app takes.
func (c Config) Validate() error {
	var wrong string
	switch {
	case c.PublicKey.IsZero():
		wrong = "no public key of the host"
	case len(c.Addresses) == 0:
		wrong = "no address"
	case len(c.AllowedIPs) == 0:
		wrong = "no allowed IPs"
	case !allValid(c.Addresses) || !allValid(c.AllowedIPs):
		wrong = "an invalid prefix"
	case c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535):
		wrong = fmt.Sprintf("MTU %d is not 576 to 65535", c.MTU)
	case c.Keepalive < 0 || c.Keepalive > mesh.MaxKeepalive || c.Keepalive%time.Second != 0:
		wrong = fmt.Sprintf("keepalive %v is not a number of whole seconds from 0 to 65535", c.Keepalive)
	case c.Endpoint != (mesh.Endpoint{}) && c.Endpoint.Validate() != nil:
		wrong = "endpoint: " + c.Endpoint.Validate().Error()
	default:
		return nil
	}
	return fmt.Errorf("%s: %w", wrong, ErrBadConfig)
}

func allValid(prefixes []netip.Prefix) bool {
	for _, p := range prefixes {
		if !p.IsValid() {
			return false
		}
	}
	return true
}

// Text returns c in the format of wg-quick(8), which all WireGuard apps import.
// It holds the private key, so it belongs on the terminal of the user who asked and
// nowhere else. c must be valid; see Validate.
func (c Config) Text() string {
	var b strings.Builder
	key := KeyPlaceholder
	if !c.PrivateKey.IsZero() {
		key = c.PrivateKey.Reveal()
	}
	b.WriteString("[Interface]\nPrivateKey = " + key + "\n")
	b.WriteString("Address = " + list(c.Addresses) + "\n")
	if len(c.DNS) > 0 {
		b.WriteString("DNS = " + list(c.DNS) + "\n")
	}
	if c.MTU != 0 {
		b.WriteString("MTU = " + strconv.Itoa(c.MTU) + "\n")
	}
	b.WriteString("\n[Peer]\nPublicKey = " + c.PublicKey.String() + "\n")
	b.WriteString("AllowedIPs = " + list(c.AllowedIPs) + "\n")
	if c.Endpoint != (mesh.Endpoint{}) {
		b.WriteString("Endpoint = " + c.Endpoint.String() + "\n")
	}
	if c.Keepalive != 0 {
		b.WriteString("PersistentKeepalive = " + strconv.Itoa(int(c.Keepalive/time.Second)) + "\n")
	}
	return b.String()
}

// Compact returns c as Text does, in fewer bytes and with the same meaning, for a QR
// code that is easier to scan.
func (c Config) Compact() string {
	return strings.NewReplacer(" = ", "=", ", ", ",", "\n\n", "\n").Replace(c.Text())
}

// list joins values with commas.
func list[T fmt.Stringer](values []T) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = v.String()
	}
	return strings.Join(texts, ", ")
}

// ParseConfig reads what Text writes, and what people make of it: sections and
// keys in any case, comments, lists on several lines. It refuses what it
// doesn't know, such as wg-quick's commands to run, because a configuration
// that is understood in part isn't the one that was meant. Errors name
// the line, never its value, which may be a private key.
func ParseConfig(text string) (Config, error) {
	if len(text) > configLimit {
		return Config{}, fmt.Errorf("%d bytes, at most %d: %w", len(text), configLimit, ErrBadConfig)
	}
	p := configParser{seen: make(map[string]bool)}
	number := 0
	for line := range strings.SplitSeq(text, "\n") {
		number++
		if err := p.line(line); err != nil {
			return Config{}, fmt.Errorf("line %d: %w: %w", number, err, ErrBadConfig)
		}
	}
	if !p.seen["privatekey"] {
		return Config{}, fmt.Errorf("no PrivateKey: %w", ErrBadConfig)
	}
	return p.config, p.config.Validate()
}

// configParser reads a configuration line by line.
type configParser struct {
	config  Config
	section string          // "", "interface" or "peer"
	seen    map[string]bool // sections and keys, in lower case
}

func (p *configParser) line(line string) error {
	line, _, _ = strings.Cut(line, "#")
	line = strings.TrimSpace(line)
	if line == "" {
		return nil
	}
	if strings.HasPrefix(line, "[") {
		return p.enter(line)
	}
	key, value, ok := strings.Cut(line, "=")
	if !ok {
		return errors.New(`neither a section nor "key = value"`)
	}
	key, value = strings.TrimSpace(key), strings.TrimSpace(value)
	set, ok := configKeys[p.section][strings.ToLower(key)]
	if !ok {
		return fmt.Errorf("key %q is not known in section %q", key, p.section)
	}
	if err := p.once(strings.ToLower(key)); err != nil {
		return err
	}
	if err := set(&p.config, value); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func (p *configParser) enter(line string) error {
	section := strings.ToLower(strings.Trim(line, "[] \t"))
	if _, ok := configKeys[section]; !ok || !strings.HasSuffix(line, "]") {
		return fmt.Errorf("section %q is not [Interface] or [Peer]", line)
	}
	p.section = section
	return p.once("[" + section)
}

// once refuses a second section or single value of a name; lists may go on.
func (p *configParser) once(name string) error {
	repeatable := name == "address" || name == "dns" || name == "allowedips"
	if p.seen[name] && !repeatable {
		return fmt.Errorf("%s a second time", strings.TrimPrefix(name, "["))
	}
	p.seen[name] = true
	return nil
}

// configKeys holds, by section and key in lower case, how a value is read.
var configKeys = map[string]map[string]func(*Config, string) error{
	"interface": {
		"privatekey": setPrivateKey,
		"address": func(c *Config, v string) (err error) {
			c.Addresses, err = appendList(c.Addresses, v, parseAddress)
			return err
		},
		"dns": func(c *Config, v string) (err error) {
			c.DNS, err = appendList(c.DNS, v, netip.ParseAddr)
			return err
		},
		"mtu": func(c *Config, v string) (err error) {
			c.MTU, err = parseNumber(v)
			return err
		},
	},
	"peer": {
		"publickey": func(c *Config, v string) (err error) {
			c.PublicKey, err = mesh.ParsePublicKey(v)
			return err
		},
		"allowedips": func(c *Config, v string) (err error) {
			c.AllowedIPs, err = appendList(c.AllowedIPs, v, parseAddress)
			return err
		},
		"endpoint": func(c *Config, v string) (err error) {
			c.Endpoint, err = mesh.ParseEndpoint(v, 0)
			return err
		},
		"persistentkeepalive": setKeepalive,
	},
}

func setPrivateKey(c *Config, v string) (err error) {
	if v == KeyPlaceholder {
		return nil
	}
	c.PrivateKey, err = mesh.ParsePrivateKey(v)
	return err
}

func setKeepalive(c *Config, v string) error {
	if strings.EqualFold(v, "off") {
		return nil
	}
	seconds, err := parseNumber(v)
	c.Keepalive = time.Duration(seconds) * time.Second
	return err
}

// parseNumber reads a decimal number up to 65535, the range of all numbers in
// a configuration.
func parseNumber(v string) (int, error) {
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil {
		return 0, errors.New("not a number from 0 to 65535")
	}
	return int(n), nil
}

// parseAddress reads a prefix, or an address alone as its /32 or /128.
func parseAddress(v string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(v); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(v)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not an address or prefix", v)
	}
	return p, nil
}

// appendList reads values separated by commas.
func appendList[T any](to []T, values string, parse func(string) (T, error)) ([]T, error) {
	for v := range strings.SplitSeq(values, ",") {
		parsed, err := parse(strings.TrimSpace(v))
		if err != nil {
			return nil, err
		}
		to = append(to, parsed)
	}
	return to, nil
}
