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

// MaxKeepalive is the longest persistent keepalive interval that WireGuard's
// configuration protocol can carry.
const MaxKeepalive = 65535 * time.Second

// Endpoint is where a WireGuard device is reached: a name or an address, and a
// UDP port. A name is resolved by the app that reads the configuration.
type Endpoint struct {
	Host string // a DNS name or an address without brackets
	Port uint16 // 1 to 65535
}

// Name returns the host if it is a name, and "" if it is an address or empty.
func (e Endpoint) Name() string {
	if _, err := netip.ParseAddr(e.Host); err == nil {
		return ""
	}
	return e.Host
}

// ParseEndpoint reads host:port, where an IPv6 address stands in brackets. A
// fallback port other than 0 stands in for a missing one; an IPv6 address
// without a port may then come without brackets. A name with letters outside ASCII
// is kept in its xn-- form.
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

// asciiName returns a name as it is asked in the DNS: letters outside ASCII in the
// form of RFC 5891 (xn--…), which every app and resolver takes.
func asciiName(host string) (string, error) {
	for _, c := range []byte(host) {
		if c < utf8.RuneSelf {
			continue
		}
		ascii, err := idna.Lookup.ToASCII(host)
		if err != nil || !utf8.ValidString(host) {
			return "", errors.New("not a name in the DNS; where it has letters outside ASCII, give its xn-- form")
		}
		return ascii, nil
	}
	return host, nil
}

// Validate refuses what can't be the end of a tunnel, and every character that
// has a meaning in a configuration.
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

// broadcast is RFC 919's.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

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
