package policy

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Families has a flag for each address family.
type Families struct {
	IPv4 bool `json:"ipv4"`
	IPv6 bool `json:"ipv6"`
}

// Of returns the flag of the address's family.
func (f Families) Of(a netip.Addr) bool {
	if a.Is4() {
		return f.IPv4
	}
	return f.IPv6
}

// Interface is a network interface of the host with its addresses, each with the length of
// the prefix that it attaches. A local anycast address has its full length (/32, /128), which
// attaches nothing.
type Interface struct {
	Name      string         `json:"name"`
	Addresses []netip.Prefix `json:"addresses"`
}

// Route is a prefix that the host reaches through an interface.
type Route struct {
	Prefix    netip.Prefix `json:"prefix"`
	Interface string       `json:"interface"`
}

// Host has the facts that were observed of a host. Its JSON form is the input of `rules
// --host FILE`.
type Host struct {
	// Interface is the mesh interface's name, such as "utun7".
	Interface string `json:"interface"`
	// Uplink4 and Uplink6 are the interfaces of the default routes. Without one ("") nothing of
	// that family reaches the internet.
	Uplink4 string `json:"uplink"`
	Uplink6 string `json:"uplink6"`
	// Equal4 and Equal6 are other interfaces with a default route of the same cost as the
	// uplink's (ECMP): the kernel chooses one of them for each flow.
	Equal4 []string `json:"equalUplinks,omitempty"`
	Equal6 []string `json:"equalUplinks6,omitempty"`
	// Forwarding says for which families the host forwards once the ruleset is enforced. For
	// another family, lan and internet are refused.
	Forwarding Families `json:"forwarding"`
	// FoundForwarding says for which families the host forwarded before the helper changed
	// anything. Transit traffic of these families isn't restricted.
	FoundForwarding Families `json:"foundForwarding"`
	// Interfaces need not have the loopback interface if its only addresses are
	// 127.0.0.1/8, ::1 and a link-local one.
	Interfaces []Interface `json:"interfaces"`
	// Routes are the prefixes reached other than through an attached prefix. They may include
	// default routes, which are recognised and ignored.
	Routes []Route `json:"routes"`
	// IPsec has the destinations of the host's IPsec policies: networks that are reached
	// without a route of their own. Like Routes it may include default ones.
	IPsec []netip.Prefix `json:"ipsec,omitempty"`
	// Resolvers are the DNS servers that the host is configured with, except link-local ones,
	// in any order. A mesh address among them belongs to that server.
	Resolvers []netip.Addr `json:"resolvers,omitempty"`
	// Outside has the addresses under which others know this host and that it doesn't have
	// itself, such as its router's. The host's own networks may be reachable there.
	Outside []netip.Addr `json:"outside,omitempty"`
	// OutsidePort is the UDP port under which others reach this host's WireGuard at these
	// addresses. It is 0 if it isn't known, or the router maps the same port.
	OutsidePort uint16 `json:"outsidePort,omitempty"`
	// Source4 and Source6 are the source addresses that the host uses on the uplink of the
	// family, also for its peers' packets. Not valid if there is no uplink or the address
	// isn't known.
	Source4 netip.Addr `json:"source,omitzero"`
	Source6 netip.Addr `json:"source6,omitzero"`
	// Router4 and Router6 are the next hops of the default routes, without a zone. Not valid
	// if there is none, as on a point-to-point uplink.
	Router4 netip.Addr `json:"router,omitzero"`
	Router6 netip.Addr `json:"router6,omitzero"`
	// Lasting has the addresses of the uplinks that can be published as this host's: no
	// anycast address, and none that is temporary, deprecated or tentative. They don't affect
	// verdicts.
	Lasting []netip.Addr `json:"lasting,omitempty"`
}

// maxHostFacts limits the size of a facts document in bytes. Only a host with a full routing
// table of the internet has more, which this product isn't for.
const maxHostFacts = 8 << 20

// ReadHost reads the JSON document of `rules --host`. Unknown fields, a second document, more
// than maxHostFacts bytes, and facts that [Host.Validate] refuses are errors.
func ReadHost(r io.Reader) (Host, error) {
	var h Host
	limited := &io.LimitedReader{R: r, N: maxHostFacts + 1}
	dec := json.NewDecoder(limited)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&h); err != nil {
		if limited.N == 0 {
			return Host{}, fmt.Errorf("read host facts: more than %d bytes", maxHostFacts)
		}
		return Host{}, fmt.Errorf("read host facts: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return Host{}, fmt.Errorf("read host facts: something follows the document")
	}
	if err := h.Validate(); err != nil {
		return Host{}, fmt.Errorf("read host facts: %w", err)
	}
	return h, nil
}

// Validate returns an error for the first fact that can't be true of a host: an interface name
// that is missing, listed twice or longer than 15 bytes (IFNAMSIZ is 16 on Linux and macOS,
// with the final NUL), or an address that is invalid, IPv4-mapped, of the wrong family, or has
// a zone.
func (h Host) Validate() error {
	if err := validateName(h.Interface); err != nil {
		return fmt.Errorf("mesh interface: %w", err)
	}
	seen := map[string]bool{}
	for _, i := range h.Interfaces {
		if err := validateName(i.Name); err != nil {
			return err
		}
		if seen[i.Name] {
			return fmt.Errorf("interface %q is listed twice", i.Name)
		}
		seen[i.Name] = true
		for _, p := range i.Addresses {
			if !p.IsValid() || p.Addr().Is4In6() {
				return fmt.Errorf("interface %q: address %v is not valid", i.Name, p)
			}
		}
	}
	for _, u := range slices.Concat([]string{h.Uplink4, h.Uplink6}, h.Equal4, h.Equal6) {
		if u == "" {
			continue
		}
		if err := validateName(u); err != nil {
			return fmt.Errorf("uplink: %w", err)
		}
		if u == h.Interface {
			return fmt.Errorf("uplink: %q is the mesh interface", u)
		}
	}
	for _, r := range h.Routes {
		if !r.Prefix.IsValid() || r.Prefix.Addr().Is4In6() {
			return fmt.Errorf("route %v by %q is not valid", r.Prefix, r.Interface)
		}
		if err := validateName(r.Interface); err != nil {
			return fmt.Errorf("route %v: %w", r.Prefix, err)
		}
	}
	for _, p := range h.IPsec {
		if !p.IsValid() || p.Addr().Is4In6() {
			return fmt.Errorf("destination %v of an IPsec policy is not valid", p)
		}
	}
	return h.validateAddresses()
}

// validateAddresses checks the facts that are single addresses.
func (h Host) validateAddresses() error {
	for _, a := range h.Resolvers {
		if !mesh.IsPlain(a) {
			return fmt.Errorf("resolver %v is not valid", a)
		}
	}
	for _, a := range h.Lasting {
		if !mesh.IsPlain(a) {
			return fmt.Errorf("lasting address %v is not valid", a)
		}
	}
	for _, a := range h.Outside {
		if !mesh.IsPlain(a) {
			return fmt.Errorf("address %v of this host from outside is not valid", a)
		}
	}
	for _, f := range []struct {
		what string
		a    netip.Addr
		is   func(netip.Addr) bool
	}{
		{"source", h.Source4, netip.Addr.Is4}, {"source6", h.Source6, netip.Addr.Is6},
		{"router", h.Router4, netip.Addr.Is4}, {"router6", h.Router6, netip.Addr.Is6},
	} {
		if f.a.IsValid() && (!mesh.IsPlain(f.a) || !f.is(f.a)) {
			return fmt.Errorf("%s %v is not a valid address of its family", f.what, f.a)
		}
	}
	return nil
}

// validateName accepts interface names that both kernels and both packet filters' languages
// accept, and that can't be read as syntax there.
func validateName(name string) error {
	if name == "" || len(name) > 15 {
		return fmt.Errorf("interface name %q: want 1 to 15 bytes", name)
	}
	for _, c := range []byte(name) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !ok && !strings.ContainsRune("._-@:+", rune(c)) {
			return fmt.Errorf("interface name %q: unexpected %q", name, c)
		}
	}
	return nil
}

// Uplink returns the uplink of the address's family, or "".
func (h Host) Uplink(a netip.Addr) string {
	if a.Is4() {
		return h.Uplink4
	}
	return h.Uplink6
}

// Uplinks returns the uplink of the address's family and the interfaces of equal cost, or
// none if there is no uplink.
func (h Host) Uplinks(a netip.Addr) []string {
	up, equal := h.Uplink(a), h.Equal6
	if a.Is4() {
		equal = h.Equal4
	}
	if up == "" {
		return nil
	}
	return append([]string{up}, equal...)
}

// isUplink reports whether an interface is one of the uplinks of the address's family.
func (h Host) isUplink(name string, a netip.Addr) bool {
	if a.Is4() {
		return name == h.Uplink4 || h.Uplink4 != "" && slices.Contains(h.Equal4, name)
	}
	return name == h.Uplink6 || h.Uplink6 != "" && slices.Contains(h.Equal6, name)
}

// Source returns the source address on the uplink of a's family. It isn't valid if it isn't
// known.
func (h Host) Source(a netip.Addr) netip.Addr {
	if a.Is4() {
		return h.Source4
	}
	return h.Source6
}

// IsLoopback reports whether this is the loopback interface's name: lo on
// Linux, lo0 on macOS.
func IsLoopback(name string) bool { return name == "lo" || name == "lo0" }

// attached returns the masked prefixes that are attached to interfaces other than the mesh
// interface and loopback, without those of full length, which attach nothing.
func (h Host) attached() []netip.Prefix {
	var out []netip.Prefix
	for _, i := range h.Interfaces {
		if i.Name == h.Interface || IsLoopback(i.Name) {
			continue
		}
		for _, p := range i.Addresses {
			if !p.IsSingleIP() {
				out = append(out, p.Masked())
			}
		}
	}
	return out
}

// Networks returns the networks that the host is attached to or has routes to, except by
// default routes and through the mesh interface. They are sorted, and none is inside another.
func (h Host) Networks() []netip.Prefix {
	all := slices.Concat(h.attached(), h.routed())
	all = slices.DeleteFunc(all, func(p netip.Prefix) bool {
		a := p.Addr()
		return a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast()
	})
	slices.SortFunc(all, comparePrefix)
	return outermost(slices.Compact(all))
}

// addresses returns every address of the host, including aliases on the loopback interface,
// but without loopback and link-local addresses, which are martians.
func (h Host) addresses() []netip.Addr {
	var out []netip.Addr
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			a := p.Addr()
			if !a.IsLoopback() && !(a.Is6() && a.IsLinkLocalUnicast()) {
				out = append(out, a)
			}
		}
	}
	return out
}

// uplinkAddresses returns the addresses of the uplinks and of the routers on them. The routers
// matter by themselves: a carrier may assign a public address and still have its routers and
// DHCP servers in 100.64/10.
func (h Host) uplinkAddresses() []netip.Addr {
	var out []netip.Addr
	for _, a := range []netip.Addr{h.Source4, h.Source6, h.Router4, h.Router6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			if slices.Contains(h.Uplinks(p.Addr()), i.Name) {
				out = append(out, p.Addr())
			}
		}
	}
	return out
}

// routed returns the prefixes of Routes and IPsec, without default routes and those of the mesh
// interface and loopback. An IPsec policy for everything is left out, too: it is how the host
// reaches the internet, like the default route of another VPN.
func (h Host) routed() []netip.Prefix {
	var all []netip.Prefix
	for _, r := range h.Routes {
		if r.Interface != h.Interface && !IsLoopback(r.Interface) {
			all = append(all, r.Prefix.Masked())
		}
	}
	return append(withoutDefaults(all), withoutDefaults(masked(h.IPsec))...)
}

// withoutDefaults drops the default routes from ps, in place.
func withoutDefaults(ps []netip.Prefix) []netip.Prefix {
	isDefault := defaultRoutes(ps)
	return slices.DeleteFunc(ps, func(p netip.Prefix) bool { return isDefault[p] })
}

// masked returns the prefixes without their host bits.
func masked(ps []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, len(ps))
	for i, p := range ps {
		out[i] = p.Masked()
	}
	return out
}

// InternetByIPsec returns the families for which IPsec policies cover the whole internet.
func (h Host) InternetByIPsec() Families {
	var f Families
	for p := range defaultRoutes(masked(h.IPsec)) {
		f.IPv4 = f.IPv4 || p.Addr().Is4()
		f.IPv6 = f.IPv6 || p.Addr().Is6()
	}
	return f
}

// special is the space that routes may leave out and still count as a default route. For IPv4
// it is private space, multicast, and the special-purpose addresses that aren't globally
// reachable (RFC 6890 and IANA's registry). For IPv6 it is everything except 2000::/3, the only
// global unicast space that IANA has allocated.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"), netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/3"), netip.MustParsePrefix("4000::/2"), netip.MustParsePrefix("8000::/1"),
}

// defaultRoutes returns those of the prefixes that are default routes: /0, and those that
// [Covering] finds.
func defaultRoutes(routes []netip.Prefix) map[netip.Prefix]bool {
	out := map[netip.Prefix]bool{}
	for _, r := range routes {
		if r.Bits() == 0 {
			out[r] = true
		}
	}
	for _, all := range []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
		parts, _ := Covering(all, routes)
		for _, p := range parts {
			out[p] = true
		}
	}
	return out
}

// Covering returns the widest of the prefixes, except /0, that together cover a family apart
// from special space, and whether there are any. VPNs set such routes (0/1 and 128/1, ::/1 and
// 8000::/1, 2000::/3, or all public prefixes) because they take precedence over the /0 without
// replacing it. family is 0.0.0.0/0 or ::/0.
func Covering(family netip.Prefix, prefixes []netip.Prefix) ([]netip.Prefix, bool) {
	var longer []netip.Prefix
	for _, p := range prefixes {
		if p.Bits() > 0 && p.Addr().Is4() == family.Addr().Is4() {
			longer = append(longer, p.Masked())
		}
	}
	slices.SortFunc(longer, comparePrefix)
	return cover(family, longer)
}

// cover returns those of the prefixes that make up p together with special space, and whether
// they do. prefixes is sorted, and all of it is inside p. It splits p only as far as a prefix
// requires, so the number of prefixes bounds the work.
func cover(p netip.Prefix, prefixes []netip.Prefix) ([]netip.Prefix, bool) {
	if len(prefixes) > 0 && prefixes[0] == p {
		return []netip.Prefix{p}, true
	}
	if slices.ContainsFunc(special, func(h netip.Prefix) bool { return h.Overlaps(p) && h.Bits() <= p.Bits() }) {
		return nil, true
	}
	if p.IsSingleIP() || len(prefixes) == 0 {
		return nil, false
	}
	low, high := halves(p)
	middle, _ := slices.BinarySearchFunc(prefixes, high.Addr(), func(q netip.Prefix, a netip.Addr) int { return q.Addr().Compare(a) })
	a, ok := cover(low, prefixes[:middle])
	if !ok {
		return nil, false
	}
	b, ok := cover(high, prefixes[middle:])
	if !ok {
		return nil, false
	}
	return append(a, b...), true
}

// halves splits a prefix into two that are one bit longer.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bits := p.Bits()
	b := p.Addr().AsSlice()
	low = netip.PrefixFrom(p.Addr(), bits+1)
	b[bits/8] |= 0x80 >> (bits % 8)
	a, _ := netip.AddrFromSlice(b)
	return low, netip.PrefixFrom(a, bits+1)
}
