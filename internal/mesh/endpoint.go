package mesh

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// MaxKeepalive is the longest persistent keepalive interval of WireGuard: its configuration
// has 16 bits for the seconds (wg(8)).
const MaxKeepalive = 65535 * time.Second

// Endpoint is where a WireGuard device is reached: a name or an address, and a UDP port. The
// program that reads a configuration resolves the name.
type Endpoint struct {
	Host string // a DNS name or an address without brackets
	Port uint16 // 1 to 65535
}

// Name returns the host if it is a DNS name, and "" if it is an address or empty.
func (e Endpoint) Name() string {
	if _, err := netip.ParseAddr(e.Host); err == nil {
		return ""
	}
	return e.Host
}

// ParseEndpoint parses host:port, with brackets around an IPv6 address. If fallback isn't 0,
// it replaces a missing port, and an IPv6 address without a port needs no brackets. A name
// with letters outside ASCII becomes its xn-- form (asciiName).
func ParseEndpoint(s string, fallback uint16) (Endpoint, error) {
	e, err := splitEndpoint(s, fallback)
	if err == nil {
		e.Host, err = asciiName(e.Host)
	}
	if err == nil {
		err = e.Validate()
	}
	if _, rest, url := strings.Cut(s, "://"); url {
		host, _, _ := strings.Cut(rest, "/")
		err = fmt.Errorf("it looks like a URL; give only the host, and a UDP port if you know it, such as %q", host)
	}
	if err != nil {
		return Endpoint{}, fmt.Errorf("parse endpoint %q: %w", s, err)
	}
	return e, nil
}

// splitEndpoint splits s into host and port, without checking the host.
func splitEndpoint(s string, fallback uint16) (Endpoint, error) {
	bare := strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")
	_, notAddr := netip.ParseAddr(bare)
	if fallback != 0 && (notAddr == nil || !strings.Contains(s, ":")) {
		return Endpoint{Host: bare, Port: fallback}, nil
	}
	host, digits, err := net.SplitHostPort(s)
	if err != nil {
		return Endpoint{}, errors.New("not host:port")
	}
	port, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return Endpoint{}, errors.New("the port is not a number from 1 to 65535")
	}
	return Endpoint{Host: host, Port: uint16(port)}, nil
}

// asciiName returns a name as the DNS has it: with letters outside ASCII in the form of
// RFC 5891 (xn--…), which every app and resolver accepts.
func asciiName(host string) (string, error) {
	for _, c := range []byte(host) {
		if c < utf8.RuneSelf {
			continue
		}
		ascii, err := idna.Lookup.ToASCII(host)
		if err != nil || !utf8.ValidString(host) {
			return "", errors.New("not a name in the DNS; if it has letters outside ASCII, give its xn-- form")
		}
		return ascii, nil
	}
	return host, nil
}

// Validate returns an error for a host that can't be the other end of a tunnel, for port 0,
// and for every character with a meaning in a configuration file, such as a line break.
func (e Endpoint) Validate() error {
	if e.Port == 0 {
		return errors.New("no port")
	}
	if a, err := netip.ParseAddr(e.Host); err == nil {
		if a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" || a.Unmap() == broadcast {
			return fmt.Errorf("%v is not the address of a host on the network", a)
		}
		return nil
	}
	// RFC 1035 section 2.3.4 allows 253 characters in all and 63 a label.
	if len(e.Host) == 0 || len(e.Host) > 253 {
		return errors.New("neither an address nor a name")
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(e.Host, "."), ".") {
		if !validLabel(label) {
			return errors.New("neither an address nor a name")
		}
	}
	return nil
}

// ValidZone reports whether a zone of an IPv6 address (RFC 4007) is empty or can be an
// interface's name or number. [netip.ParseAddr] accepts any text, line breaks too. Linux
// allows names of up to 15 bytes without '/', ':' and space (dev_valid_name of
// net/core/dev.c); one with bytes outside printable ASCII isn't valid here.
func ValidZone(zone string) bool {
	if len(zone) > 15 {
		return false
	}
	for _, c := range []byte(zone) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("/:[]%", c) >= 0 {
			return false
		}
	}
	return true
}

// broadcast is the limited broadcast address of RFC 919.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// validLabel reports whether label may stand between the dots of a name. Underscores aren't
// allowed in names of hosts (RFC 952), but occur in the DNS.
func validLabel(label string) bool {
	for _, c := range []byte(label) {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return 0 < len(label) && len(label) <= 63 && label[0] != '-'
}

// String returns host:port, with brackets around an IPv6 address.
func (e Endpoint) String() string { return net.JoinHostPort(e.Host, strconv.Itoa(int(e.Port))) }
