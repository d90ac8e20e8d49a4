package netlab

// Configurations of stock WireGuard, in the form of wg-quick(8), parsed for the ends of
// the lab.

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Config is a WireGuard configuration as wg-quick(8) and the phone apps read it.
type Config struct {
	PrivateKey Key
	ListenPort uint16 // 0: any
	Addresses  []netip.Prefix
	DNS        []netip.Addr
	MTU        int // 0: the program's own
	Peers      []ConfigPeer
}

// ConfigPeer is one [Peer] section.
type ConfigPeer struct {
	PublicKey    Key
	PresharedKey Key // the zero key: none
	AllowedIPs   []netip.Prefix
	Endpoint     netip.AddrPort // the zero value: none
	Keepalive    int            // seconds; 0: none
}

// Key is a WireGuard key, private or public.
type Key [32]byte

// ParseKey reads a key in the base64 form of wg(8).
func ParseKey(s string) (Key, error) {
	var k Key
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(b) != len(k) {
		return Key{}, fmt.Errorf("parse key: want 32 bytes in base64")
	}
	return Key(b), nil
}

// String returns the key in the base64 form of wg(8).
func (k Key) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// ParseConfig parses a configuration. Keys that a stock client accepts and the lab
// doesn't (PostUp, Table, ...) are errors, as is an endpoint with a host name, since the
// lab has no resolver.
func ParseConfig(text string) (Config, error) {
	var c Config
	section := ""
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line, _, _ := strings.Cut(lines.Text(), "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if strings.HasPrefix(line, "[") {
			section = strings.ToLower(line)
			if section == "[peer]" {
				c.Peers = append(c.Peers, ConfigPeer{})
			} else if section != "[interface]" {
				return Config{}, fmt.Errorf("line %d: section %q is unknown", n, line)
			}
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			return Config{}, fmt.Errorf("line %d: want NAME = VALUE, found %q", n, line)
		}
		if err := c.set(section, strings.TrimSpace(name), strings.TrimSpace(value)); err != nil {
			return Config{}, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return c, lines.Err()
}

func (c *Config) set(section, name, value string) (err error) {
	switch section {
	case "[interface]":
		return c.setInterface(name, value)
	case "[peer]":
		return c.Peers[len(c.Peers)-1].set(name, value)
	}
	return fmt.Errorf("%q stands before any section", name)
}

func (c *Config) setInterface(name, value string) (err error) {
	switch strings.ToLower(name) {
	case "privatekey":
		c.PrivateKey, err = ParseKey(value)
	case "listenport":
		c.ListenPort, err = parseUint16(value)
	case "address":
		err = eachOf(value, &c.Addresses, parsePrefix)
	case "dns":
		err = eachOf(value, &c.DNS, netip.ParseAddr)
	case "mtu":
		var mtu uint16
		mtu, err = parseUint16(value)
		c.MTU = int(mtu)
	default:
		err = fmt.Errorf("[Interface] has no %q", name)
	}
	return err
}

func (p *ConfigPeer) set(name, value string) (err error) {
	switch strings.ToLower(name) {
	case "publickey":
		p.PublicKey, err = ParseKey(value)
	case "presharedkey":
		p.PresharedKey, err = ParseKey(value)
	case "allowedips":
		err = eachOf(value, &p.AllowedIPs, parsePrefix)
	case "endpoint":
		p.Endpoint, err = netip.ParseAddrPort(value)
	case "persistentkeepalive":
		var seconds uint16
		if value != "off" {
			seconds, err = parseUint16(value)
		}
		p.Keepalive = int(seconds)
	default:
		err = fmt.Errorf("[Peer] has no %q", name)
	}
	return err
}

// eachOf appends every element of a comma-separated list.
func eachOf[T any](list string, to *[]T, parse func(string) (T, error)) error {
	for s := range strings.SplitSeq(list, ",") {
		v, err := parse(strings.TrimSpace(s))
		if err != nil {
			return err
		}
		*to = append(*to, v)
	}
	return nil
}

// parsePrefix parses a prefix, or an address as a /32 or /128.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	return netip.ParsePrefix(s)
}

func parseUint16(s string) (uint16, error) {
	v, err := strconv.ParseUint(s, 10, 16)
	return uint16(v), err
}

// String returns the configuration in the form of wg-quick(8).
func (c Config) String() string {
	var b strings.Builder
	set := func(name, value string) {
		if value != "" && value != "0" {
			fmt.Fprintf(&b, "%s = %s\n", name, value)
		}
	}
	b.WriteString("[Interface]\n")
	set("PrivateKey", c.PrivateKey.String())
	set("ListenPort", strconv.Itoa(int(c.ListenPort)))
	set("Address", join(c.Addresses))
	set("DNS", join(c.DNS))
	set("MTU", strconv.Itoa(c.MTU))
	for _, p := range c.Peers {
		b.WriteString("\n[Peer]\n")
		set("PublicKey", p.PublicKey.String())
		if p.PresharedKey != (Key{}) {
			set("PresharedKey", p.PresharedKey.String())
		}
		set("AllowedIPs", join(p.AllowedIPs))
		if p.Endpoint.IsValid() {
			set("Endpoint", p.Endpoint.String())
		}
		set("PersistentKeepalive", strconv.Itoa(p.Keepalive))
	}
	return b.String()
}

func join[T fmt.Stringer](list []T) string {
	words := make([]string, len(list))
	for i, v := range list {
		words[i] = v.String()
	}
	return strings.Join(words, ", ")
}
