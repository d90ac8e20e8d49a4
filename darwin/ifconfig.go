package darwin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
)

// ifconfigPath is ifconfig(8). The ioctls for IPv6 addresses aren't in x/sys, and
// every VPN for macOS runs this program.
const ifconfigPath = "/sbin/ifconfig"

// An Ifconfig changes interfaces with ifconfig(8). [Observe] reads them.
type Ifconfig struct{ r Runner }

// NewIfconfig returns an Ifconfig that runs its commands by r.
func NewIfconfig(r Runner) *Ifconfig { return &Ifconfig{r} }

// AddAddress adds an address to a point-to-point interface, with a host mask: with a
// wider one the kernel would answer a packet between two hosts behind the interface with
// an ICMP redirect (ip_forward in xnu bsd/netinet/ip_input.c). The destination address is
// the address itself, since a tunnel with many peers has no single other end. The caller
// should check first that [Observe] doesn't show the address: adding it twice may fail.
func (c *Ifconfig) AddAddress(ctx context.Context, iface string, a netip.Addr) error {
	text := a.String()
	args := []string{iface, "inet", text + "/32", text, "alias"}
	if a.Is6() {
		// Without a destination: one is only legal with a prefix of 128 (xnu
		// bsd/netinet6/in6.c), and nothing needs it.
		args = []string{iface, "inet6", text, "prefixlen", "128", "alias"}
	}
	return c.run(ctx, "add address "+text, iface, a, args)
}

// RemoveAddress removes an address from an interface.
func (c *Ifconfig) RemoveAddress(ctx context.Context, iface string, a netip.Addr) error {
	family := "inet"
	if a.Is6() {
		family = "inet6"
	}
	return c.run(ctx, "remove address "+a.String(), iface, a, []string{iface, family, a.String(), "-alias"})
}

// SetMTU sets the interface's MTU, in bytes, and brings the interface up.
func (c *Ifconfig) SetMTU(ctx context.Context, iface string, mtu int) error {
	args := []string{iface, "mtu", strconv.Itoa(mtu), "up"}
	return c.run(ctx, fmt.Sprintf("set mtu %d", mtu), iface, netip.IPv4Unspecified(), args)
}

func (c *Ifconfig) run(ctx context.Context, what, iface string, a netip.Addr, args []string) error {
	err := checkInterface(iface)
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
		err = errors.New("address is not valid")
	}
	if err == nil {
		err = c.ifconfig(ctx, args)
	}
	if err != nil {
		return fmt.Errorf("%s of interface %q: %w", what, iface, err)
	}
	return nil
}

func (c *Ifconfig) ifconfig(ctx context.Context, args []string) error {
	_, stderr, status, err := c.r.Run(ctx, nil, ifconfigPath, args...)
	if err != nil {
		return err
	}
	// ifconfig exits 0 after some failures that it only prints.
	if status != 0 || firstLine(stderr) != "" {
		return failure(stderr, status, ifconfigPath, args)
	}
	return nil
}

// checkInterface fails for a string that can't be an interface's name (IFNAMSIZ is 16 with
// the NUL, xnu bsd/net/if.h) or that ifconfig would read as an option.
func checkInterface(name string) error {
	if !isName(name, 15) {
		return fmt.Errorf("interface name %q is not valid", name)
	}
	return nil
}
