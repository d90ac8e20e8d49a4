package darwin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// scutilPath is scutil(8), which prints the DNS configuration. /etc/resolv.conf could be
// read without a process, but has only the default resolvers, not those of single domains
// or of other interfaces, as its header says.
const scutilPath = "/usr/sbin/scutil"

// A Resolver is one entry of the DNS configuration: servers, and the domain and interface
// that they are used for.
type Resolver struct {
	// Servers are in the order in which they are asked; link-local ones have a zone.
	Servers []netip.Addr
	// Port is the servers' port; 0 means 53.
	Port uint16
	// Domain is the domain that they are asked about; "" means every name.
	Domain string
	// Interface is the interface that they belong to; "" if scutil doesn't print it.
	Interface string
	// Scoped resolvers are asked only for sockets that are bound to Interface.
	Scoped bool
}

// Resolvers returns the addresses of all DNS servers in this Mac's configuration, sorted,
// without zones. It starts a process, so call it when the network has changed, and now and
// then, since the configuration may also change by itself.
func Resolvers(ctx context.Context, r Runner) ([]netip.Addr, error) {
	args := []string{"--dns"}
	stdout, stderr, status, err := r.Run(ctx, nil, scutilPath, args...)
	if err == nil && status != 0 {
		err = failure(stderr, status, scutilPath, args)
	}
	var list []Resolver
	if err == nil {
		list, err = ParseResolvers(string(stdout))
	}
	if err != nil {
		return nil, fmt.Errorf("read DNS configuration: %w", err)
	}
	var all []netip.Addr
	for _, one := range list {
		for _, a := range one.Servers {
			// A server on this Mac itself is on no network. An IPv4-mapped address is the
			// IPv4 address.
			if a = a.Unmap().WithZone(""); !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast() {
				all = append(all, a)
			}
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all), nil
}

// ParseResolvers reads what `scutil --dns` prints (configd scutil.tproj/tests.c and
// dnsinfo/dnsinfo_logging.h). Resolvers without servers, as those of multicast DNS,
// are left out. It fails for a text that isn't a DNS configuration, which must not be taken
// for one without servers.
func ParseResolvers(text string) ([]Resolver, error) {
	var list []Resolver
	known, open := false, false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "DNS configuration"):
			known, open = true, false
		case line == "No DNS configuration available":
			known = true
		case strings.HasPrefix(line, "resolver #") && known:
			list, open = append(list, Resolver{}), true
		case open:
			if err := list[len(list)-1].read(line); err != nil {
				return nil, fmt.Errorf("read %q: %w", firstLine([]byte(line)), err)
			}
		}
	}
	if !known {
		return nil, errors.New("the text has no DNS configuration")
	}
	return slices.DeleteFunc(list, func(r Resolver) bool { return len(r.Servers) == 0 }), nil
}

// read reads a line `name : value`. It ignores names that it doesn't know.
func (r *Resolver) read(line string) error {
	name, value, ok := strings.Cut(line, " : ")
	if !ok {
		return nil
	}
	name, value = strings.TrimSpace(name), strings.TrimSpace(value)
	switch key, _, _ := strings.Cut(name, "["); key {
	case "nameserver":
		a, err := netip.ParseAddr(value)
		if err != nil {
			return err
		}
		r.Servers = append(r.Servers, a)
	case "port":
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil {
			return fmt.Errorf("port %q is not valid", value)
		}
		r.Port = uint16(n)
	case "domain":
		r.Domain = value
	case "if_index":
		if _, after, ok := strings.Cut(value, "("); ok {
			r.Interface = strings.TrimSuffix(after, ")")
		}
	case "flags":
		r.Scoped = strings.Contains(value, "Scoped")
	}
	return nil
}
