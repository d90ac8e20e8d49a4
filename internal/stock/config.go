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

// Values of a configuration that suit every peer.
const (
	// ConfigMTU is the MTU of the tunnel on a peer in bytes: the minimum for IPv6 (RFC 8200
	// section 5). WireGuard's default of 1420 needs a path MTU of 1500 to the host, which DSL,
	// mobile networks and hotels often don't have. A full tunnel then stalls without an error.
	// The WireGuard app for iOS uses 1280 for the same reason.
	ConfigMTU = 1280

	// ConfigKeepalive keeps the peer's mappings in NATs alive, so that the host can reach it.
	// wg(8) recommends 25 s.
	ConfigKeepalive = 25 * time.Second
)

// KeyPlaceholder stands in a configuration for a private key that only the peer's owner has.
// It isn't a valid key, so a WireGuard app refuses the unchanged configuration instead of
// making a tunnel that can't work.
const KeyPlaceholder = "REPLACE-WITH-THE-PRIVATE-KEY-OF-THIS-DEVICE"

// configLimit limits the text that ParseConfig reads, in bytes. A configuration with all that the
// helper may put into it has less than 3 KiB.
const configLimit = 1 << 16

// ErrBadConfig is in the chain of the errors of ParseConfig and Config.Validate.
var ErrBadConfig = errors.New("not a WireGuard configuration of this kind")

// Config is a configuration for a stock WireGuard app: one interface and one
// peer, which is the host.
type Config struct {
	PrivateKey mesh.PrivateKey // optional: zero is written as KeyPlaceholder
	Addresses  []netip.Prefix  // required: of the interface
	DNS        []netip.Addr    // optional: resolvers
	MTU        int             // optional: 576 (RFC 791) to 65535 bytes; 0 leaves it to the app

	PublicKey  mesh.PublicKey // required: the host's
	AllowedIPs []netip.Prefix // required: destinations that are sent into the tunnel
	Endpoint   mesh.Endpoint  // optional: zero if the host's isn't known
	Keepalive  time.Duration  // optional: whole seconds up to mesh.MaxKeepalive
}

// Everything returns the default routes of both families: the allowed IPs of a full tunnel.
func Everything() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
}

// ForPeer returns a device's configuration that sends the prefixes in allowed through the
// host. Which of these packets pass is for the host's policy to decide.
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

// Validate returns an error, with ErrBadConfig in its chain, if apps wouldn't accept c.
func (c Config) Validate() error {
	var fault string
	switch {
	case c.PublicKey.IsZero():
		fault = "no public key of the host"
	case len(c.Addresses) == 0:
		fault = "no address"
	case len(c.AllowedIPs) == 0:
		fault = "no allowed IPs"
	case !allValid(c.Addresses) || !allValid(c.AllowedIPs):
		fault = "an invalid prefix"
	case c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535):
		fault = fmt.Sprintf("MTU %d is not 576 to 65535", c.MTU)
	case c.Keepalive < 0 || c.Keepalive > mesh.MaxKeepalive || c.Keepalive%time.Second != 0:
		fault = fmt.Sprintf("keepalive %v is not a number of whole seconds from 0 to 65535", c.Keepalive)
	case c.Endpoint != (mesh.Endpoint{}) && c.Endpoint.Validate() != nil:
		fault = "endpoint: " + c.Endpoint.Validate().Error()
	default:
		return nil
	}
	return fmt.Errorf("%s: %w", fault, ErrBadConfig)
}

// allValid reports whether all prefixes are valid.
func allValid(prefixes []netip.Prefix) bool {
	for _, p := range prefixes {
		if !p.IsValid() {
			return false
		}
	}
	return true
}

// Text returns c in the format of wg-quick(8), which all WireGuard apps import. It has the
// private key, so it must only be shown to the user who asked for it, and never logged. c must
// be valid; see Validate.
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

// Compact returns Text without optional white space: fewer bytes make a QR code that is easier
// to scan.
func (c Config) Compact() string {
	return strings.NewReplacer(" = ", "=", ", ", ",", "\n\n", "\n").Replace(c.Text())
}

// list returns the values separated by commas.
func list[T fmt.Stringer](values []T) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = v.String()
	}
	return strings.Join(texts, ", ")
}

// ParseConfig parses a configuration as Text writes it and as people edit it: with sections
// and keys in any case, comments, and lists on several lines. It refuses unknown keys, such as
// wg-quick's PostUp, because a configuration that is understood in part isn't the one that was
// meant. Errors have ErrBadConfig in their chain. They name the line but don't quote its
// value, which may be a private key.
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

// configParser parses a configuration line by line.
type configParser struct {
	config  Config
	section string          // "", "interface" or "peer"
	seen    map[string]bool // sections and keys, in lower case
}

// line parses one line. "#" begins a comment anywhere, as in wg-quick(8): no value can have it.
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

// enter begins the section that line names, such as "[Peer]".
func (p *configParser) enter(line string) error {
	section := strings.ToLower(strings.Trim(line, "[] \t"))
	if _, ok := configKeys[section]; !ok || !strings.HasSuffix(line, "]") {
		return fmt.Errorf("section %q is not [Interface] or [Peer]", line)
	}
	p.section = section
	return p.once("[" + section)
}

// once refuses the second occurrence of a section or a key. Keys with a list may be repeated,
// which extends the list.
func (p *configParser) once(name string) error {
	repeatable := name == "address" || name == "dns" || name == "allowedips"
	if p.seen[name] && !repeatable {
		return fmt.Errorf("%s a second time", strings.TrimPrefix(name, "["))
	}
	p.seen[name] = true
	return nil
}

// configKeys has the parser of each value, by section and key in lower case.
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

// setPrivateKey accepts KeyPlaceholder as no key.
func setPrivateKey(c *Config, v string) (err error) {
	if v == KeyPlaceholder {
		return nil
	}
	c.PrivateKey, err = mesh.ParsePrivateKey(v)
	return err
}

// setKeepalive accepts "off" as wg(8) does.
func setKeepalive(c *Config, v string) error {
	if strings.EqualFold(v, "off") {
		return nil
	}
	seconds, err := parseNumber(v)
	c.Keepalive = time.Duration(seconds) * time.Second
	return err
}

// parseNumber parses a decimal number from 0 to 65535, the range of all numbers in a
// configuration.
func parseNumber(v string) (int, error) {
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil {
		return 0, errors.New("not a number from 0 to 65535")
	}
	return int(n), nil
}

// parseAddress parses a prefix. A bare address is a /32 or /128. Host bits are kept, since an
// interface's address has them.
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

// appendList appends values, which are separated by commas, to a list.
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
