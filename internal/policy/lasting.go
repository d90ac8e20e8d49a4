package policy

import "net/netip"

// SharedSpace is what providers give to customers behind their NAT (RFC 6598).
var SharedSpace = netip.MustParsePrefix("100.64.0.0/10")

// IsPublic reports whether an address can be reached from the internet, as far as the
// address tells: it is neither private (RFC 1918, RFC 4193) nor a provider's shared one
// (RFC 6598), nor link-local.
func IsPublic(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.IsPrivate() && !SharedSpace.Contains(a)
}

// LastingAddress returns the best of the uplinks' lasting addresses to tell other devices:
// a public one before a private one or one behind a provider's NAT, then IPv4 before IPv6,
// because fewer networks have the latter, then the one that the host itself uses.
func (h Host) LastingAddress() (netip.Addr, bool) {
	var best netip.Addr
	most := 0
	for _, a := range h.Lasting {
		if !a.IsGlobalUnicast() {
			continue
		}
		rank := 1
		if IsPublic(a) {
			rank += 4
		}
		if a.Is4() {
			rank += 2
		}
		if a == h.Source(a) {
			rank++
		}
		if rank > most {
			best, most = a, rank
		}
	}
	return best, most > 0
}
